//! Connection pools in front of a proxy that ends their sessions: the proxy, an issuer that their
//! applications ask for tokens, and what has to be true when they are closed.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::driver::{Transport, all_ended, passes, told};
use super::proxy::{Proxy, Settings};
use super::world::world;
use super::{eventually, fake, mint};

pub const LEASE_TEXT: &str = "terminating connection because its database credential expired";
pub const TOKEN_TEXT: &str = "terminating connection because its session token expired";

/// What ends the sessions that a pool has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    /// Leases are short, tokens are not.
    Lease,
    /// Tokens are short, leases are not.
    Token,
    /// Both live for long: the pool itself retires each connection after so many seconds.
    Pool(u64),
    /// Both live for long, and sessions become so many seconds old. The pool checks what it hands
    /// out.
    Age(u64),
}

/// How many connections each pool has.
const SIZE: usize = 5;
/// Seconds that a short lease or token lives: a third of it is the notice.
const SHORT: u64 = 8;
const LONG: u64 = 600;

/// Runs a pool's script in front of a proxy that ends its sessions, and checks what is left.
pub async fn lives_on(name: &str, mut command: Command, transport: Transport, by: EndedBy) {
    let (lease, token) = match by {
        EndedBy::Lease => (SHORT, LONG),
        EndedBy::Token => (LONG, SHORT),
        EndedBy::Pool(_) | EndedBy::Age(_) => (LONG, LONG),
    };
    let age = match by {
        EndedBy::Age(seconds) => format!("max_session_age = \"{seconds}s\"\n"),
        EndedBy::Lease | EndedBy::Token | EndedBy::Pool(_) => String::new(),
    };
    let settings = Settings {
        issuer: "leeway = \"0s\"\n".to_owned(),
        // A pool logs in with all its connections at once: on a busy machine that takes a while.
        openbao: format!(
            "address = \"{}\"\ntimeout = \"20s\"\n\
             auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"secret-id\" }} }}\n",
            world().var("BAO_ADDR")
        ),
        limits: age + "login_timeout = \"30s\"\ndrain_timeout = \"2s\"\n",
        ..Settings::default()
    };
    let role = format!("tenant-acme-{name}-{by:?}-{transport:?}").replace(['(', ')'], "");
    let lease = format!("{lease}s");
    let proxy = Proxy::with_role(&role, &lease, &lease, settings).await;

    told(&mut command, &proxy, transport);
    command.env("PGSILO_POOL_SIZE", SIZE.to_string());
    command.env("PGSILO_ISSUER", format!("http://{}/", issuer(token).await));
    match by {
        EndedBy::Lease => command.env("PGSILO_WORDS", LEASE_TEXT),
        EndedBy::Token => command.env("PGSILO_WORDS", TOKEN_TEXT),
        EndedBy::Pool(seconds) => command.env("PGSILO_LIFETIME", seconds.to_string()),
        EndedBy::Age(_) => &mut command,
    };
    passes(&mut command).await;

    let ending = match by {
        EndedBy::Lease => "lease_ended",
        EndedBy::Token => "token_expired",
        EndedBy::Pool(_) => "client_left",
        EndedBy::Age(_) => "session_age",
    };
    let endings = all_ended(&proxy).await;
    let ended = endings.iter().filter(|event| event["ending"] == ending).count();
    let expected = match by {
        // SQLAlchemy replaces all that are older than one that it finds dead.
        EndedBy::Age(_) => 1,
        // All of them while idle, one in a transaction, one in a query.
        EndedBy::Lease | EndedBy::Token | EndedBy::Pool(_) => SIZE + 2,
    };
    assert!(ended >= expected, "{ended} sessions ended as {ending}");
    for event in &endings {
        assert!(event["ending"] == ending || event["ending"] == "client_left", "{event}");
    }
    assert_eq!(proxy.events("refused").len(), 0);
    each_had_a_fresh_token(&proxy);
    nothing_is_left(&proxy, &role).await;
}

/// An issuer over HTTP: each request is answered with another token of acme, good for so long.
async fn issuer(seconds: u64) -> SocketAddr {
    let tokens = AtomicU32::new(0);
    fake::serves(move |mut tcp| {
        let id = format!("token-{}", tokens.fetch_add(1, Ordering::Relaxed));
        async move {
            let mut request = [0; 4096];
            let _asked = tcp.read(&mut request).await;
            let claims = json!({ "jti": id, "exp": mint::now() + seconds });
            let token = mint::token_with("acme", claims);
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length:";
            let answer = format!("{head} {}\r\n\r\n{token}", token.len());
            let _said = tcp.write_all(answer.as_bytes()).await;
        }
    })
    .await
}

/// No two sessions began with the same token.
fn each_had_a_fresh_token(proxy: &Proxy) {
    let mut seen = HashSet::new();
    for event in proxy.events("started") {
        assert!(seen.insert(event["token_id"].to_string()), "{event}");
    }
}

/// Every role that was leased is dropped, and every lease revoked.
async fn nothing_is_left(proxy: &Proxy, role: &str) {
    let started = proxy.events("started");
    let roles: Vec<_> = started.iter().filter_map(|event| event["role"].as_str()).collect();
    assert_eq!(roles.len(), started.len());
    eventually("no role to be left", async || {
        (world().usable_roles(&roles).await == 0).then_some(())
    })
    .await;
    eventually("no lease to be left", async || world().leases(role).await.is_empty().then_some(()))
        .await;
}
