//! The log and the audit trail: nothing waits for their readers, and losses are reported.

use std::io::Write;
use std::process::{Command, Stdio};

use pgsilo_sandbox::testing::bao::{Server, Shape};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, folder, write_files};
use pgsilo_sandbox::testing::raw::{Raw, startup};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint, passwords, programs};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The smallest queues: a pipe and they are soon full.
const SMALL: &str = "queue_bytes = 65536\n[audit]\nqueue_bytes = 65536\n";

const LOST_EVENTS: &str = "pgsilo_log_lost_total{kind=\"audit\"}";
const LOST_LINES: &str = "pgsilo_log_lost_total{kind=\"log\"}";

/// A refusal that takes nothing but a packet, as a stranger makes them.
async fn stranger(proxy: &Proxy) {
    let mut client = Raw::unix(&proxy.socket()).await;
    let long = "x".repeat(80);
    let names = [("user", &*long), ("database", &*long), ("application_name", &*long)];
    client.send(&startup(&[&names[..], &[("replication", "true")]].concat())).await;
    assert_eq!(client.fatal().await.sqlstate(), "0A000");
}

async fn strangers_until_events_are_lost(proxy: &Proxy) {
    while proxy.metric(LOST_EVENTS).await < 10.0 || proxy.metric(LOST_LINES).await < 10.0 {
        for _ in 0..20 {
            stranger(proxy).await;
            // Of one that only looks in, the log has a line.
            drop(Raw::unix(&proxy.socket()).await);
        }
    }
}

#[tokio::test]
async fn a_stalled_log_reader_blocks_no_session_and_losses_are_reported() {
    let proxy = Proxy::with(Settings { more: SMALL.to_owned(), ..Settings::default() }).await;
    let mut before = Raw::unix(&proxy.socket()).await;
    before.log_in(&mint::token("acme"), "acme").await;
    proxy.served(0).await;

    let stopped = proxy.stop_reading().await;
    strangers_until_events_are_lost(&proxy).await;
    assert_eq!(before.ask("SELECT 'served'").await, "served");
    let mut during = Raw::unix(&proxy.socket()).await;
    during.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(during.ask("SELECT 'let in'").await, "let in");
    assert_eq!(proxy.get("/livez").await, (200, "ok\n".to_owned()));
    let refusals = proxy.metric("pgsilo_refusals_total{reason=\"replication_refused\"}").await;

    drop(stopped);
    let told = proxy.event("events_lost", |_| true).await;
    assert_eq!(told["level"], "ERROR");
    proxy.logged(|line| line["message"].as_str().is_some_and(|m| m.starts_with("lines of"))).await;
    // Every event is there or counted: the refusals, and the beginnings of both sessions.
    let lost = proxy.metric(LOST_EVENTS).await;
    assert_eq!(told["lost"], lost);
    eventually("the other events", async || {
        let read = proxy.events("refused").len() + proxy.events("started").len();
        (read as f64 + lost == refusals + 2.0).then_some(())
    })
    .await;
    // And what comes now is written again.
    let read = proxy.events("refused").len();
    stranger(&proxy).await;
    eventually("an event", async || (proxy.events("refused").len() > read).then_some(())).await;
}

#[tokio::test]
async fn a_reader_that_stops_does_not_keep_pgsilo_from_stopping() {
    let mut proxy = Proxy::with(Settings { more: SMALL.to_owned(), ..Settings::default() }).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    proxy.served(0).await;
    let _stopped = proxy.stop_reading().await;
    strangers_until_events_are_lost(&proxy).await;
    proxy.signal(Signal::TERM);
    assert_eq!(client.fatal().await.sqlstate(), "57P01");
    assert_eq!(proxy.ended().await.code(), Some(0));
}

#[tokio::test]
async fn an_error_at_the_start_sets_the_exit_code_though_the_log_is_not_read() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("an address");
    let dir = folder();
    let listeners = format!("[[listener]]\naddress = \"{address}\"\nplaintext = true\n");
    write_files(&dir, &Settings { listeners, ..Settings::default() });
    let (reader, mut full) = std::io::pipe().expect("a pipe");
    full.write_all(&[b'\n'; 65536]).expect("what a pipe holds");
    let mut pgsilo = Command::new(programs::pgsilo())
        .args(["serve", "--config"])
        .arg(dir.join("pgsilo.toml"))
        .stderr(full)
        .spawn()
        .expect("pgsilo starts");
    let ended = eventually("its end", async || pgsilo.try_wait().expect("waited")).await;
    assert_eq!(ended.code(), Some(4));
    drop(reader);
    std::fs::remove_dir_all(dir).expect("removed");
}

/// Sessions do not begin while their events could not be written.
pub(crate) async fn without_an_audit() -> (Proxy, pgsilo_sandbox::testing::raw::Message) {
    let more = SMALL.replace("[audit]", "[audit]\non_loss = \"refuse\"");
    let proxy = Proxy::with(Settings { more, ..Settings::default() }).await;
    let stopped = proxy.stop_reading().await;
    while proxy.get("/readyz").await.0 == 200 {
        for _ in 0..10 {
            stranger(&proxy).await;
        }
    }
    assert_eq!(proxy.get("/readyz").await.1, "sessions cannot be audited\n");
    assert_eq!(proxy.metric(LOST_EVENTS).await, 0.0, "nothing is lost yet");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    client.send_password(&mint::token("acme")).await;
    let message = client.fatal().await;
    drop(stopped);
    (proxy, message)
}

#[tokio::test]
async fn sessions_that_cannot_be_audited_are_refused_until_they_can_be() {
    let (proxy, message) = without_an_audit().await;
    assert_eq!(message.sqlstate(), "57P03");
    eventually("the audit to keep up", async || {
        (proxy.get("/readyz").await.0 == 200).then_some(())
    })
    .await;
    Raw::unix(&proxy.socket()).await.log_in(&mint::token("acme"), "acme").await;
    proxy.served(0).await;

    // Not only before events are lost: also while they are, until that was told.
    let stopped = proxy.stop_reading().await;
    strangers_until_events_are_lost(&proxy).await;
    assert_eq!(proxy.get("/readyz").await.0, 503);
    drop(stopped);
    eventually("the audit to keep up", async || {
        (proxy.get("/readyz").await.0 == 200).then_some(())
    })
    .await;
    proxy.event("events_lost", |_| true).await;
}

#[tokio::test]
async fn audit_events_do_not_depend_on_how_much_is_logged() {
    let dir = folder();
    write_files(&dir, &Settings { log_level: "error", ..Settings::default() });
    let pgsilo = Command::new(programs::pgsilo())
        .args(["serve", "--config"])
        .arg(dir.join("pgsilo.toml"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("pgsilo starts");
    let token = mint::token("acme");
    let mut config = tokio_postgres::Config::new();
    config.host_path(&dir).port(6432).user("app").password(&token).dbname("acme");
    let client = eventually("a session", async || {
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    })
    .await;
    drop(client);
    let pid = rustix::process::Pid::from_raw(pgsilo.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, Signal::TERM).expect("told");
    let output = pgsilo.wait_with_output().expect("ended");
    let log = String::from_utf8(output.stderr).expect("UTF-8");
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for event in ["started", "ended"] {
        assert_eq!(lines.iter().filter(|line| line["event"] == event).count(), 1, "{event}: {log}");
    }
    assert!(
        lines.iter().all(|line| line["event"].is_string() || line["level"] == "ERROR"),
        "{log}"
    );
    std::fs::remove_dir_all(dir).expect("removed");
}

// --- The audit trail ---------------------------------------------------------------------------

/// A credential's two events, once both are there.
async fn leased_and_revoked(proxy: &Proxy, role: &str) -> (Value, Value) {
    let leased = proxy.event("leased", |event| event["role"] == role).await;
    let revoked = proxy.event("revoked", |event| event["role"] == role).await;
    for field in ["lease", "tenant", "access", "session", "prewarm"] {
        assert_eq!(leased[field], revoked[field], "{field}");
    }
    let tenant = leased["tenant"].as_str().expect("a tenant");
    let path = format!("pgsilo/{tenant}/creds/tenant-{tenant}-");
    assert!(leased["lease"].as_str().expect("an id").contains(&path), "{leased}");
    (leased, revoked)
}

#[tokio::test]
async fn a_good_token_and_a_close_leave_events() {
    const TIMES: usize = 10;
    let proxy = Proxy::start().await;
    for _ in 0..TIMES {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
        client.send_password(&mint::token("acme")).await;
    }
    let left = eventually("an event of each", async || {
        let left = proxy.events("left");
        (left.len() == TIMES).then_some(left)
    })
    .await;
    for event in left {
        assert_eq!((&event["tenant"], &event["subject"]), (&"acme".into(), &"tester".into()));
        assert_eq!(event["stage"], "leased");
        let (leased, _revoked) =
            leased_and_revoked(&proxy, event["role"].as_str().expect("a role")).await;
        assert_eq!((&leased["session"], &leased["prewarm"]), (&event["session"], &false.into()));
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, TIMES as f64);
}

#[tokio::test]
async fn a_credential_is_followed_from_its_lease_to_its_end() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let started = proxy.served(0).await;
    drop(client);
    let (leased, _revoked) =
        leased_and_revoked(&proxy, started["role"].as_str().expect("a role")).await;
    assert_eq!(leased["session"], started["session"]);

    // Also where the session that asked never had it: its database was not there.
    let tenants = |text: &str| text.replacen("host = \"127.0.0.1\"", "host = \"127.0.0.9\"", 1);
    let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    client.send_password(&mint::token("acme")).await;
    assert_eq!(client.fatal().await.sqlstate(), "08001");
    let refused = proxy.event("refused", |_| true).await;
    let session = &refused["session"];
    assert_eq!(refused["stage"], "routed");
    let leased = proxy.event("leased", |event| &event["session"] == session).await;
    leased_and_revoked(&proxy, leased["role"].as_str().expect("a role")).await;
}

#[tokio::test]
async fn a_credential_of_a_prewarmed_connection_is_followed_as_well() {
    let pool = "max_idle_per_tenant = 1\nidle_timeout = \"60s\"\n".to_owned();
    let mut proxy = Proxy::with(Settings { pool, ..Settings::default() }).await;
    for _ in 0..2 {
        Raw::unix(&proxy.socket()).await.log_in(&mint::token("acme"), "acme").await;
    }
    let leased = proxy.event("leased", |event| event["prewarm"] == true).await;
    assert_eq!((&leased["session"], &leased["tenant"]), (&"".into(), &"acme".into()));
    proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.ended().await.code(), Some(0));
    leased_and_revoked(&proxy, leased["role"].as_str().expect("a role")).await;
}

/// Every log of every test is searched for them when its proxy is dropped.
#[tokio::test]
async fn leased_passwords_are_recognised_in_a_log() {
    let (world, server) = (world(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let mut answers = vec![server.ask("GET", "pgsilo/acme/creds/tenant-acme-rw", None).await];
    for tenant in ["acme", "globex"] {
        for kind in ["rw", "ro", "migrate"] {
            let path = format!("pgsilo/{tenant}/creds/tenant-{tenant}-{kind}");
            answers.push(world.bao("GET", &path, None).await);
            let lease = answers.last().expect("there").1["lease_id"].clone();
            world.bao("PUT", "sys/leases/revoke", Some(json!({ "lease_id": lease }))).await;
        }
    }
    for (status, answer) in answers {
        assert_eq!(status, 200, "{answer}");
        let password = answer["data"]["password"].as_str().expect("a password");
        assert!(passwords::is_in(password), "{password}");
    }
}
