//! Seen from outside: metrics, health, the log, signals.

use rustix::process::Signal;

use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::{PATIENCE, mint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn metrics_count_what_happens() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    proxy.metric_reaches("pgsilo_sessions_active", 1.0).await;
    client.ask("SELECT repeat('x', 100000)").await;
    assert!(proxy.metric("pgsilo_bytes_total{direction=\"to_frontend\"}").await > 100_000.0);
    assert!(proxy.metric("pgsilo_bytes_total{direction=\"to_backend\"}").await > 30.0);
    for stage in ["secured", "identified", "routed", "leased", "attached"] {
        let count = format!("pgsilo_stage_seconds_count{{stage=\"{stage}\"}}");
        assert_eq!(proxy.metric(&count).await, 1.0, "{stage}");
    }
    assert_eq!(proxy.metric("pgsilo_lease_seconds_count").await, 1.0);
    assert_eq!(proxy.metric("pgsilo_openbao_logged_in").await, 1.0);
    assert_eq!(proxy.metric("pgsilo_registry_tenants").await, 2.0);
    drop(client);
    proxy.metric_reaches("pgsilo_endings_total{ending=\"client_left\"}", 1.0).await;
    proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
}

#[tokio::test]
async fn every_reason_and_ending_is_there_from_the_start() {
    let proxy = Proxy::start().await;
    for reason in pgsilo::Reason::ALL {
        let name = format!("pgsilo_refusals_total{{reason=\"{}\"}}", reason.label());
        assert_eq!(proxy.metric(&name).await, 0.0);
    }
    for ending in pgsilo::Ending::ALL {
        let name = format!("pgsilo_endings_total{{ending=\"{}\"}}", ending.label());
        assert_eq!(proxy.metric(&name).await, 0.0);
    }
    let (_status, text) = proxy.get("/metrics").await;
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let name = line.split(['{', ' ']).next().expect("a name");
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let described = |name: &str| text.contains(&format!("# HELP {name} "));
        assert!(described(name) || base.is_some_and(described), "{name} is not described");
    }
}

#[tokio::test]
async fn health_and_unknown_paths() {
    let proxy = Proxy::start().await;
    assert_eq!(proxy.get("/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(proxy.get("/readyz").await, (200, "ok\n".to_owned()));
    assert_eq!(proxy.get("/").await.0, 404);
}

#[tokio::test]
async fn slow_http_clients_do_not_block_others() {
    let proxy = Proxy::start().await;
    let mut slow = Vec::new();
    // More than it has places for. All but a few say nothing.
    for number in 0..700 {
        let mut tcp = TcpStream::connect(proxy.admin()).await.expect("connected");
        match number % 20 {
            0 => tcp
                .write_all(b"GET /livez HTTP/1.1\r\nHost: pgsilo\r\nX-Slow: ")
                .await
                .expect("sent"),
            1 => tcp.write_all(b"GET /livez HTTP/1.1\r\nHost: pgsilo\r\n\r\n").await.expect("sent"),
            _ => {}
        }
        slow.push(tcp);
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        let answer = tokio::time::timeout(PATIENCE, proxy.get(path)).await.expect("in time");
        assert_eq!(answer.0, 200, "{path}");
    }
}

#[tokio::test]
async fn the_endpoints_answer_one_request_and_close() {
    let proxy = Proxy::start().await;
    let mut tcp = TcpStream::connect(proxy.admin()).await.expect("connected");
    let request = b"GET /livez HTTP/1.1\r\nHost: pgsilo\r\nConnection: keep-alive\r\n\r\n";
    tcp.write_all(request).await.expect("sent");
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.expect("an answer, and the end");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("ok\n"), "{answer}");
    assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
}

#[tokio::test]
async fn the_events_of_a_session_tell_the_whole_context() {
    let proxy = Proxy::start().await;
    let token = mint::token("acme");
    let mut client = Raw::tls(proxy.address()).await;
    client.log_in(&token, "acme").await;
    let role = client.ask("SELECT session_user::text").await;
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    drop(client);
    let ended = proxy.event("ended", |_| true).await;
    let started = proxy.event("started", |_| true).await;
    for event in [&started, &ended] {
        assert_eq!(event["tenant"], "acme");
        assert_eq!(event["subject"], "tester");
        assert_eq!(event["issuer"], "https://issuer.sandbox.invalid");
        assert_eq!(event["access"], "read-write");
        assert_eq!(event["user"], "app");
        assert_eq!(event["database"], "acme");
        assert_eq!(event["role"], role.as_str());
        assert_eq!(event["backend_pid"].to_string(), pid);
        assert_eq!(event["tls"], true);
        assert!(event["address"].as_str().expect("an address").starts_with("127.0.0.1:"));
        assert!(event["token_id"].as_str().expect("a jti").starts_with("test-"));
        assert!(event["placement"].as_str().expect("a place").ends_with("/tenant_acme"));
        assert_eq!(event["session"], started["session"]);
    }
    assert_eq!(ended["ending"], "client_left");
    let signature = token.rsplit('.').next().expect("a signature");
    assert!(proxy.lines().iter().all(|line| !line.to_string().contains(signature)));
}

#[tokio::test]
async fn sigterm_stops_an_idle_proxy_at_once_and_removes_its_socket() {
    let mut proxy = Proxy::start().await;
    let socket = proxy.socket();
    assert!(socket.exists());
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.ended().await.code(), Some(0));
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_second_signal_cuts_the_drain_short() {
    let settings = pgsilo_sandbox::testing::proxy::Settings {
        limits: "drain_timeout = \"1h\"\n".to_owned(),
        ..Default::default()
    };
    let mut proxy = Proxy::with(settings).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client.ask("BEGIN; SELECT 'busy'").await;
    proxy.signal(Signal::INT);
    proxy.logged(|line| line["message"] == "draining").await;
    proxy.signal(Signal::INT);
    assert_eq!(proxy.ended().await.code(), Some(0));
    // A session that was cut off leaves a last event, too.
    let left = proxy.event("left", |event| event["stage"] == "spliced").await;
    assert_eq!(left["session"], proxy.events("started")[0]["session"]);
}

#[tokio::test]
async fn the_memory_of_the_process_is_kept_from_others() {
    let proxy = Proxy::start().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", proxy.pid())).expect("read");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
}
