//! Tokens and subjects that are withdrawn before they expire: refused at once, and their sessions
//! ended.

use std::fs;

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query};
use pgsilo_sandbox::testing::world::world;
use serde_json::json;

const RELOADS: &str = "pgsilo_file_reloads_total{file=\"denied\",result=\"ok\"}";

pub(crate) async fn with_list(list: &str) -> Proxy {
    let files = vec![("denied.toml", list.to_owned())];
    let registry = "denied = \"denied.toml\"\n".to_owned();
    Proxy::with(Settings { registry, files, ..Settings::default() }).await
}

fn deny(proxy: &Proxy, list: &str) {
    // Renamed over: a file that is read while it is written is not the list.
    let new = proxy.dir().join("denied.new");
    fs::write(&new, list).expect("written");
    fs::rename(new, proxy.dir().join("denied.toml")).expect("renamed");
}

async fn session(proxy: &Proxy, token: &str) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(token, "acme").await;
    client
}

fn token(subject: &str, id: &str) -> String {
    mint::token_with("acme", json!({ "sub": subject, "jti": id }))
}

#[tokio::test]
pub(crate) async fn a_denied_identity_is_refused_and_its_sessions_end() {
    let proxy = with_list("denied = []\n").await;
    let mut idle = session(&proxy, &token("mallory", "m1")).await;
    let mut busy = session(&proxy, &token("mallory", "m2")).await;
    let pid = busy.ask("SELECT pg_backend_pid()::text").await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    world().waits_for(&pid, "PgSleep").await;
    let mut by_id = session(&proxy, &token("alice", "a1")).await;
    let mut other = session(&proxy, &token("alice", "a2")).await;

    deny(&proxy, "[[denied]]\nsubject = \"mallory\"\n[[denied]]\ntoken_id = \"a1\"\n");
    for client in [&mut idle, &mut by_id] {
        let told = client.fatal().await;
        assert_eq!(told.sqlstate(), "57P01");
        assert_eq!(
            told.field(b'M').as_deref(),
            Some("terminating connection because its identity has been revoked")
        );
    }
    assert_eq!(busy.message().await.tag, b'T');
    assert_eq!(busy.message().await.sqlstate(), "57014", "its query is cancelled");
    assert_eq!(busy.message().await.tag, b'Z');
    assert_eq!(busy.fatal().await.sqlstate(), "57P01");
    assert_eq!(other.ask("SELECT 'alive'").await, "alive");

    for denied in [token("mallory", "m3"), token("alice", "a1")] {
        let error = proxy.connect(&denied, "acme").await.expect_err("refused");
        assert_eq!(error.code().map(|code| code.code()), Some("28P01"));
    }
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(
        (&event["reason"], &event["subject"]),
        (&json!("identity_revoked"), &json!("mallory"))
    );
    proxy.connect(&token("alice", "a3"), "acme").await.expect("served");
    proxy.metric_reaches("pgsilo_endings_total{ending=\"identity_revoked\"}", 3.0).await;
}

#[tokio::test]
async fn tokens_of_later_are_good_again_and_a_mistake_in_the_list_changes_nothing() {
    let proxy = with_list("denied = []\n").await;
    let issued = |when: u64| mint::token_with("acme", json!({ "sub": "alice", "iat": when }));
    let at = time::OffsetDateTime::from_unix_timestamp(mint::now() as i64 - 60).expect("a moment");
    let (date, clock) = (at.date(), at.time());
    let (hour, minute, second) = clock.as_hms();
    let moment = format!("{date}T{hour:02}:{minute:02}:{second:02}Z");
    deny(&proxy, &format!("[[denied]]\nsubject = \"alice\"\nissued_before = {moment}\n"));
    proxy.metric_reaches(RELOADS, 1.0).await;
    let old = proxy.connect(&issued(mint::now() - 300), "acme").await.expect_err("withdrawn");
    assert_eq!(old.code().map(|code| code.code()), Some("28P01"));
    proxy.connect(&issued(mint::now() - 10), "acme").await.expect("a later one");

    deny(&proxy, "[[denied]]\nsubjekt = \"bob\"\n");
    let failed = "pgsilo_file_reloads_total{file=\"denied\",result=\"error\"}";
    proxy.metric_reaches(failed, 1.0).await;
    proxy.connect(&issued(mint::now() - 300), "acme").await.expect_err("still withdrawn");
    let line = proxy.logged(|line| line["level"] == "ERROR" && line["file"] == "denied").await;
    assert!(line["error"].as_str().expect("words").contains("subjekt"), "{line}");
}

#[tokio::test]
async fn a_truncated_or_unreadable_revocation_list_admits_no_client() {
    let proxy = with_list("[[denied]]\nsubject = \"mallory\"\n").await;
    let failed = "pgsilo_file_reloads_total{file=\"denied\",result=\"error\"}";
    deny(&proxy, "");
    proxy.metric_reaches(failed, 1.0).await;
    proxy.connect(&token("mallory", "m1"), "acme").await.expect_err("still denied");
    fs::remove_file(proxy.dir().join("denied.toml")).expect("removed");
    proxy.metric_reaches(failed, 2.0).await;
    proxy.connect(&token("mallory", "m1"), "acme").await.expect_err("still denied");
    // It is read again although it does not change any more; and logged once.
    deny(&proxy, "denied = []\n");
    proxy.metric_reaches(RELOADS, 1.0).await;
    proxy.connect(&token("mallory", "m1"), "acme").await.expect("pardoned");
    assert_eq!(proxy.metric(failed).await, 2.0);
}
