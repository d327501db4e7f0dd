//! Sessions of acme's: opened, refused, and their leased roles gone.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::proxy::{Proxy, Settings};
use super::raw::Raw;
use super::world::world;
use super::{eventually, mint};

/// A session, and the name of its leased role.
pub async fn session(proxy: &Proxy) -> (Raw, String) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let role = client.ask("SELECT session_user::text").await;
    assert!(role.starts_with("tenant-acme-rw-"), "{role}");
    (client, role)
}

/// Whether it still works.
pub async fn lives(client: &mut Raw) {
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

/// A new session is refused, in time.
pub async fn turned_away(proxy: &Proxy, token: &str, sqlstate: &str, within: Duration) {
    let began = Instant::now();
    let error = proxy.connect(token, "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some(sqlstate), "{error:?}");
    assert!(began.elapsed() < within, "{:?}", began.elapsed());
}

/// The same, with the audit event of that.
pub async fn refused(proxy: &Proxy, sqlstate: &str, within: Duration) -> Value {
    let before = proxy.events("refused").len();
    turned_away(proxy, &mint::token("acme"), sqlstate, within).await;
    eventually("the event", async || proxy.events("refused").get(before).cloned()).await
}

/// A pgsilo that cannot log in says so: in its health, its log, and to clients.
pub async fn is_not_logged_in(openbao: String, cause: &str) {
    let proxy = Proxy::unready(Settings { openbao, ..Settings::default() }).await;
    let says = |line: &Value, field: &str, words: &str| {
        line[field].as_str().is_some_and(|text| text.contains(words))
    };
    let cannot = "cannot log in to OpenBAO: ";
    let error = proxy.logged(|line| says(line, "message", cannot) && says(line, "error", cause));
    assert_eq!(error.await["level"], "ERROR");
    assert_eq!(proxy.get("/readyz").await.0, 503);
    let event = refused(&proxy, "57P03", Duration::from_secs(2)).await;
    assert_eq!(event["reason"], "lease_unavailable");
    assert!(says(&event, "cause", cause), "{event}");
}

/// New sessions are served, sooner or later.
pub async fn served_again(proxy: &Proxy) {
    let token = mint::token("acme");
    eventually("sessions to be served again", async || proxy.connect(&token, "acme").await.ok())
        .await;
}

/// Waits until the leased role of a session that ended is dropped, which is pgsilo's doing and not
/// just the end of its lease: every lease is a session's or was given back.
pub async fn is_given_back(proxy: &Proxy, role: &str) {
    eventually("every lease of a session that ended to be revoked", async || {
        let leases = proxy.metric("pgsilo_leases_total").await;
        let revoked = proxy.metric("pgsilo_revocations_total").await;
        (leases - revoked == proxy.metric("pgsilo_sessions_active").await).then_some(())
    })
    .await;
    is_of_no_use(role).await;
}

/// A session that still works ends, and its lease is given back.
pub async fn lives_to_its_end(proxy: &Proxy, mut client: Raw, role: &str) {
    lives(&mut client).await;
    drop(client);
    is_given_back(proxy, role).await;
}

/// Waits until a leased role is of no use to anybody.
pub async fn is_of_no_use(role: &str) {
    eventually("the leased role to be dropped", async || {
        (world().usable_roles(&[role]).await == 0).then_some(())
    })
    .await;
}
