//! Databases at names with several addresses. A name takes a mount namespace, in which /etc/hosts
//! is a file of ours.

use std::fs;
use std::net::{Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::OnceLock;

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::vanish;
use pgsilo_sandbox::testing::world::world;

/// The database's port on `::1`, where nothing answers: PostgreSQL listens on 127.0.0.1.
fn keep_silent() {
    static SILENT: OnceLock<TcpListener> = OnceLock::new();
    SILENT.get_or_init(|| {
        let port: u16 = world().var("PG_PORT").parse().expect("a port");
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).expect("bound");
        vanish(&listener);
        listener
    });
}

/// A pgsilo for which acme's database is at a name with these addresses.
async fn at(name: &'static str, addresses: &[&str]) -> Proxy {
    let hosts = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hosts-{name}"));
    let lines: Vec<_> = addresses.iter().map(|address| format!("{address} {name}\n")).collect();
    fs::write(&hosts, lines.concat()).expect("written");
    let before = format!(
        "exec unshare --mount --map-root-user \
         sh -c 'mount --bind \"{}\" /etc/hosts && exec \"$0\" \"$@\"' \"$0\" \"$@\";",
        hosts.display()
    );
    let proxy = Proxy::with(Settings { before, ..Settings::default() }).await;
    let tenants = proxy.tenants().replacen("\"127.0.0.1\"", &format!("\"{name}\""), 1);
    proxy.reload(&tenants);
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    proxy
}

#[tokio::test]
async fn an_address_that_does_not_answer_does_not_take_the_time_of_one_that_would() {
    keep_silent();
    let proxy = at("both.test", &["::1", "127.0.0.1"]).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let key = client.ask("SELECT pg_backend_pid()::text").await;
    assert!(!key.is_empty());
}

#[tokio::test]
async fn the_cause_names_every_address_and_the_client_is_told_none() {
    // Nothing listens on the second.
    keep_silent();
    let proxy = at("neither.test", &["::1", "127.0.0.9"]).await;
    let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    let told = format!("{:?}", error.as_db_error().expect("told"));
    assert_eq!(error.code().map(|code| code.code()), Some("08001"), "{told}");
    assert!(!told.contains("::1") && !told.contains("127.0.0.9"), "{told}");
    let event = proxy.event("refused", |_| true).await;
    let cause = event["cause"].as_str().expect("a cause");
    assert!(cause.contains("neither.test") && cause.contains("did not answer"), "{cause}");
    assert!(cause.contains("[::1]") && cause.contains("no answer"), "{cause}");
    assert!(cause.contains("127.0.0.9") && cause.contains("refused"), "{cause}");
}
