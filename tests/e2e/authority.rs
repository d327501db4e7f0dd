//! No session outlives its authority: leases are renewed while they can be, and a session ends
//! with its lease or its token, at a message boundary, told why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::driver::{Transport, passes, python, told};
use pgsilo_sandbox::testing::pool::{LEASE_TEXT, TOKEN_TEXT};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query};
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::sleep;

async fn with_role(role: &str, default_ttl: &str, max_ttl: &str, lease: &str) -> Proxy {
    let settings = Settings { lease: lease.to_owned(), ..Settings::default() };
    Proxy::with_role(role, default_ttl, max_ttl, settings).await
}

async fn session(proxy: &Proxy) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client
}

#[tokio::test]
async fn a_lease_is_renewed_for_as_long_as_its_session_lives() {
    let proxy = with_role("tenant-acme-renewed", "3s", "1h", "").await;
    let mut client = session(&proxy).await;
    eventually("three renewals", async || {
        (proxy.metric("pgsilo_renewals_total").await >= 3.0).then_some(())
    })
    .await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive", "after twice its first time");
    assert_eq!(proxy.metric("pgsilo_renewal_failures_total").await, 0.0);
    drop(client);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
}

#[tokio::test]
pub(crate) async fn an_idle_session_ends_in_the_grace_before_its_lease_does() {
    let proxy = with_role("tenant-acme-idle", "20s", "20s", "").await;
    let began = Instant::now();
    let mut client = session(&proxy).await;
    let error = client.fatal().await;
    let lived = began.elapsed();
    assert_eq!(
        (error.sqlstate().as_str(), error.field(b'M').as_deref()),
        ("57P01", Some(LEASE_TEXT))
    );
    // Its words came before its end: behind that the database would have said others. And not
    // before a renewal had met the maximum, which is asked for at 0.6 of the time at the earliest.
    assert!(lived > Duration::from_secs(12), "before any renewal: {lived:?}");
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "lease_ended");
}

#[tokio::test]
async fn a_running_query_has_until_the_end_and_is_cancelled_then() {
    let proxy = with_role("tenant-acme-busy", "20s", "20s", "").await;
    let began = Instant::now();
    let mut busy = session(&proxy).await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    let mut working = session(&proxy).await;
    working.ask("BEGIN; SELECT 'begun'").await;
    assert_eq!(busy.message().await.tag, b'T');
    assert_eq!(busy.message().await.sqlstate(), "57014");
    assert_eq!(busy.message().await.tag, b'Z');
    let lived = began.elapsed();
    assert!(lived > Duration::from_secs(16), "just before the end: {lived:?}");
    for client in [&mut busy, &mut working] {
        assert_eq!(client.fatal().await.field(b'M').as_deref(), Some(LEASE_TEXT));
    }
}

#[tokio::test]
async fn a_transaction_that_ends_in_the_grace_is_the_last_one() {
    let proxy = with_role("tenant-acme-last", "10s", "10s", "grace = \"9s\"\n").await;
    let mut client = session(&proxy).await;
    client.ask("BEGIN; SELECT 'begun'").await;
    // The keeper finds out at two thirds that nothing is to be gained.
    proxy.metric_reaches("pgsilo_renewals_total", 1.0).await;
    client.send(&query("COMMIT")).await;
    assert_eq!(client.until(b'Z').await[0].tag, b'C');
    assert_eq!(client.fatal().await.field(b'M').as_deref(), Some(LEASE_TEXT));
}

async fn with_leeway_of_none(lease: &str) -> Proxy {
    let issuer = "leeway = \"0s\"\n".to_owned();
    Proxy::with(Settings { issuer, lease: lease.to_owned(), ..Settings::default() }).await
}

#[tokio::test]
pub(crate) async fn a_session_ends_with_its_token() {
    let proxy = with_leeway_of_none("grace = \"1s\"\n").await;
    let expires = mint::now() + 4;
    let token = mint::token_with("acme", json!({ "exp": expires }));
    let mut idle = Raw::unix(&proxy.socket()).await;
    idle.log_in(&token, "acme").await;
    let mut busy = Raw::unix(&proxy.socket()).await;
    busy.log_in(&token, "acme").await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    assert_eq!(busy.message().await.tag, b'T');

    let error = idle.fatal().await;
    assert_eq!(
        (error.sqlstate().as_str(), error.field(b'M').as_deref()),
        ("57P01", Some(TOKEN_TEXT))
    );
    assert!(mint::now() < expires);
    assert_eq!(busy.message().await.sqlstate(), "57014");
    assert_eq!(busy.message().await.tag, b'Z');
    assert_eq!(busy.fatal().await.field(b'M').as_deref(), Some(TOKEN_TEXT));
    assert!(mint::now() <= expires);
    proxy.metric_reaches("pgsilo_endings_total{ending=\"token_expired\"}", 2.0).await;
}

const AGE_TEXT: &str = "terminating connection because it has reached its maximum age";

/// What somebody does with a connection of a pool that is never silent: a ping, their own work, a
/// transaction of two statements.
const PING: &str = "SELECT 'ping'";
const USES: [&str; 3] = ["BEGIN; SELECT 'begun'", "SELECT 'used'", "COMMIT"];

/// Takes the connection out of its pool and uses it until its session ends; what was asked last,
/// and how that was answered.
async fn used_without_a_pause(mut client: Raw) -> (&'static str, String) {
    loop {
        for sql in [PING].into_iter().chain(USES) {
            if sql == USES[0] {
                // What the application does before its first statement.
                sleep(Duration::from_millis(50)).await;
            }
            client.send_anyway(&query(sql)).await;
            loop {
                let message = client.message().await;
                match message.tag {
                    b'E' => return (sql, message.field(b'M').expect("a text")),
                    b'Z' => break,
                    _ => {}
                }
            }
        }
    }
}

/// In a pool that is always busy there is no moment but behind a transaction: what is asked next, a
/// ping, is answered with the ending, and the pool gives its user another connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_pool_loses_connections_only_at_their_ping() {
    let limits = "max_session_age = \"36s\"\n".to_owned();
    let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
    let mut sessions = Vec::new();
    for _ in 0..16 {
        sessions.push(tokio::spawn(used_without_a_pause(session(&proxy).await)));
    }
    let words = session(&proxy).await.fatal().await.field(b'M');
    assert_eq!(words.as_deref(), Some(AGE_TEXT), "it is idle");
    for session in sessions {
        assert_eq!(session.await.expect("no panic"), (PING, AGE_TEXT.to_owned()));
    }
}

/// As PostgreSQL's own administrator command does: what a busy client asks next is answered with
/// it.
#[tokio::test]
async fn a_busy_client_on_libpq_reads_why_its_session_ends() {
    let proxy = with_leeway_of_none("grace = \"1s\"\n").await;
    let mut command = python("endings.py");
    told(&mut command, &proxy, Transport::Socket);
    let token = mint::token_with("acme", json!({ "exp": mint::now() + 5 }));
    command.env("PGSILO_TOKEN", token).env("PGSILO_WORDS", TOKEN_TEXT);
    passes(&mut command).await;
    proxy.metric_reaches("pgsilo_endings_total{ending=\"token_expired\"}", 8.0).await;
}

#[tokio::test]
async fn a_session_may_be_allowed_to_outlive_its_token() {
    let proxy = with_leeway_of_none("grace = \"1s\"\nend_at_expiry = false\n").await;
    let token = mint::token_with("acme", json!({ "exp": mint::now() + 2 }));
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token, "acme").await;
    eventually("the token to be refused", async || {
        proxy.connect(&token, "acme").await.is_err().then_some(())
    })
    .await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

/// Two hundred at once, each in the middle of something at every moment, each read strictly to
/// its last byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_busy_sessions_end_with_their_leases_without_one_broken_message() {
    let proxy = with_role("tenant-acme-many", "30s", "30s", "").await;
    let socket = proxy.socket();
    // Those who are in leave OpenBAO little of the machine.
    let doors = Arc::new(Semaphore::new(8));
    let sessions: Vec<_> = (0..200)
        .map(|_| {
            let (socket, doors) = (socket.clone(), Arc::clone(&doors));
            tokio::spawn(async move {
                let door = doors.acquire().await.expect("never closed");
                let mut client = Raw::unix(&socket).await;
                client.log_in(&mint::token("acme"), "acme").await;
                drop(door);
                let ask =
                    query("SELECT repeat('x', 2000) FROM pg_sleep(0.2), generate_series(1, 50)");
                loop {
                    client.send_anyway(&ask).await;
                    loop {
                        let message = client.message().await;
                        match message.tag {
                            // It ran when the time was up.
                            b'E' if message.sqlstate() == "57014" => {}
                            b'E' => {
                                assert_eq!(message.field(b'M').as_deref(), Some(LEASE_TEXT));
                                return assert_eq!(client.next().await, None);
                            }
                            b'Z' => break,
                            b'T' | b'D' | b'C' => {}
                            tag => panic!("message {:?}", char::from(tag)),
                        }
                    }
                }
            })
        })
        .collect();
    for session in sessions {
        session.await.expect("no broken message");
    }
    proxy.metric_reaches("pgsilo_endings_total{ending=\"lease_ended\"}", 200.0).await;
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
}
