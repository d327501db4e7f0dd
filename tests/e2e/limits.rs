//! Bounds: what a slow, silent, greedy or numerous client costs, and whom it disturbs.

use std::time::Duration;

use crate::support::mint;
use crate::support::proxy::{PLAIN, Proxy, Settings, UNIX};
use crate::support::raw::{Raw, query, startup};

fn limits(limits: &str) -> Settings {
    let listeners = PLAIN.to_owned() + UNIX;
    Settings { listeners, limits: limits.to_owned(), ..Settings::default() }
}

async fn refused(client: &mut Raw, sqlstate: &str, text: &str) {
    let error = client.fatal().await;
    assert_eq!((error.sqlstate().as_str(), error.field(b'M').as_deref()), (sqlstate, Some(text)));
}

#[tokio::test]
async fn every_stage_of_a_login_has_the_same_deadline() {
    let proxy = Proxy::with(limits("login_timeout = \"300ms\"\n")).await;
    let late = "canceling authentication due to timeout";
    let mut silent = Raw::tcp(proxy.address()).await;
    let mut dripping = Raw::tcp(proxy.address()).await;
    dripping.send(&startup(&[("user", "app")])[..12]).await;
    let mut tokenless = Raw::tcp(proxy.address()).await;
    tokenless.send(&startup(&[("user", "app")])).await;
    tokenless.message().await;
    tokenless.send(&[b'p', 0, 0]).await;
    for client in [&mut silent, &mut dripping, &mut tokenless] {
        refused(client, "57014", late).await;
    }
}

#[tokio::test]
async fn a_tls_handshake_that_never_ends_is_closed() {
    let settings =
        Settings { limits: "login_timeout = \"300ms\"\n".to_owned(), ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&crate::support::raw::ssl_request()).await;
    assert_eq!(client.byte().await, b'S');
    // In the middle of a handshake there is no way to say anything.
    client.send(&[0x16, 3, 1]).await;
    client.silence().await;
}

#[tokio::test]
async fn silent_clients_disturb_nobody() {
    let proxy = Proxy::with(limits("max_handshakes = 300\nlogin_timeout = \"60s\"\n")).await;
    let mut silent = Vec::new();
    for n in 0..250 {
        let mut client = Raw::tcp(proxy.address()).await;
        if n % 2 == 0 {
            client.send(&startup(&[("user", "app")])[..10]).await;
        }
        silent.push(client);
    }
    proxy.metric_reaches("pgsilo_handshakes_active", 250.0).await;
    for _ in 0..5 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.log_in(&mint::token("acme"), "acme").await;
        assert_eq!(client.ask("SELECT 'served'").await, "served");
    }
    drop(silent);
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
}

#[tokio::test]
async fn logins_under_way_are_bounded() {
    let proxy = Proxy::with(limits("max_handshakes = 2\nlogin_timeout = \"60s\"\n")).await;
    let mut first = Raw::tcp(proxy.address()).await;
    let second = Raw::tcp(proxy.address()).await;
    proxy.metric_reaches("pgsilo_handshakes_active", 2.0).await;
    let mut third = Raw::tcp(proxy.address()).await;
    refused(&mut third, "53300", "too many connections").await;
    // One that has logged in, or left, makes room.
    first.log_in(&mint::token("acme"), "acme").await;
    drop(second);
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
    let mut fourth = Raw::tcp(proxy.address()).await;
    fourth.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
async fn sessions_are_bounded_in_all_and_for_each_tenant() {
    let proxy = Proxy::with(limits("max_sessions = 3\nmax_sessions_per_tenant = 2\n")).await;
    let log_in = async |tenant: &str| {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
        client.send_password(&mint::token(tenant)).await;
        client
    };
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = log_in("acme").await;
        client.until(b'Z').await;
        open.push(client);
    }
    refused(&mut log_in("acme").await, "53300", "too many connections for tenant \"acme\"").await;
    let mut globex = log_in("globex").await;
    globex.until(b'Z').await;
    refused(&mut log_in("globex").await, "53300", "too many connections").await;
    open.pop();
    proxy.metric_reaches("pgsilo_sessions_active", 2.0).await;
    log_in("acme").await.until(b'Z').await;
}

#[tokio::test]
async fn connections_of_one_address_are_bounded() {
    let proxy = Proxy::with(limits("max_connections_per_address = 2\n")).await;
    let mut first = Raw::tcp(proxy.address()).await;
    first.log_in(&mint::token("acme"), "acme").await;
    let second = Raw::tcp(proxy.address()).await;
    proxy.metric_reaches("pgsilo_handshakes_active", 1.0).await;
    let mut third = Raw::tcp(proxy.address()).await;
    refused(&mut third, "53300", "too many connections from this address").await;
    let mut unix = Raw::unix(&proxy.socket()).await;
    unix.log_in(&mint::token("acme"), "acme").await;
    drop(second);
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
    Raw::tcp(proxy.address()).await.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
pub(crate) async fn an_idle_session_is_ended_and_a_busy_one_is_not() {
    let proxy = Proxy::with(limits("idle_timeout = \"500ms\"\n")).await;
    let mut busy = Raw::tcp(proxy.address()).await;
    busy.log_in(&mint::token("acme"), "acme").await;
    busy.send(&query("SELECT pg_sleep(1.5)")).await;
    let mut idle = Raw::tcp(proxy.address()).await;
    idle.log_in(&mint::token("acme"), "acme").await;
    refused(&mut idle, "57P05", "terminating connection due to idle-session timeout").await;
    let answered = busy.until(b'Z').await;
    assert!(answered.iter().all(|message| message.tag != b'E'), "{answered:?}");
    refused(&mut busy, "57P05", "terminating connection due to idle-session timeout").await;
    let endings = "pgsilo_endings_total{ending=\"idle_timeout\"}";
    proxy.metric_reaches(endings, 2.0).await;
}

#[tokio::test]
async fn a_refused_client_that_goes_on_sending_still_reads_why() {
    let proxy = Proxy::with(limits("")).await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app")])).await;
    client.message().await;
    // A token far beyond the bound, in full: closing at once would reset the connection.
    client.send_anyway(&crate::support::raw::password(&"x".repeat(100_000))).await;
    refused(&mut client, "28P01", "session token authentication failed").await;
}

#[tokio::test]
async fn a_flood_of_cancel_requests_of_one_address_is_cut_off() {
    let proxy = Proxy::with(limits("")).await;
    for _ in 0..300 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&crate::support::raw::packet(80_877_102, &[0, 0, 0, 1, 9, 9, 9, 9])).await;
        client.silence().await;
    }
    proxy.logged(|line| line["message"] == "too many cancel requests: one is ignored").await;
    // Sessions are not affected.
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    tokio::time::timeout(Duration::from_secs(10), client.ask("SELECT 'fine'"))
        .await
        .expect("in time");
}
