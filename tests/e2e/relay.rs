//! The relay: whatever works against PostgreSQL works through it, in constant memory, and each
//! side learns when the other is gone.

use std::io::Write as _;
use std::time::Duration;

use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, password, query, startup, tagged};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{fake, mint};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn plain() -> Proxy {
    Proxy::with(Settings { listeners: PLAIN.to_owned() + UNIX, ..Settings::default() }).await
}

async fn session(proxy: &Proxy) -> Raw {
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client
}

/// Resident memory of a process, in KiB.
fn resident(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("read");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[tokio::test]
async fn parameters_and_the_real_pid_are_relayed() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    let login = client.log_in(&mint::token("acme"), "acme").await;
    let tags: Vec<u8> = login.iter().map(|message| message.tag).collect();
    assert_eq!(tags.first(), Some(&b'R'), "AuthenticationOk first");
    assert_eq!(tags[tags.len() - 2..], [b'K', b'Z']);
    let parameters: Vec<String> = login
        .iter()
        .filter(|message| message.tag == b'S')
        .map(|message| String::from_utf8_lossy(&message.body).into_owned())
        .collect();
    for name in ["server_version\0", "client_encoding\0", "integer_datetimes\0", "TimeZone\0"] {
        assert_eq!(parameters.iter().filter(|p| p.starts_with(name)).count(), 1, "{name}");
    }
    client.send(&query("LISTEN here")).await;
    client.until(b'Z').await;
    client.send(&query("NOTIFY here, 'news'")).await;
    let messages = client.until(b'Z').await;
    let notice = messages.iter().find(|message| message.tag == b'A').expect("a notification");
    let key = login.iter().find(|message| message.tag == b'K').expect("a key");
    assert_eq!(notice.body[..4], key.body[..4], "clients compare the two");
}

#[tokio::test]
async fn large_values_pass_both_ways_in_constant_memory() {
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    client.ask("SELECT 'warm'").await;
    let before = resident(&proxy);
    // 64 MiB out.
    client.send(&query("SELECT repeat('x', 64 * 1024 * 1024)")).await;
    let messages = client.until(b'Z').await;
    let row = messages.iter().find(|message| message.tag == b'D').expect("a row");
    assert_eq!(row.body.len(), 6 + 64 * 1024 * 1024);
    // 64 MiB in.
    let sql = format!("SELECT length('{}')::text", "y".repeat(64 * 1024 * 1024));
    assert_eq!(client.ask(&sql).await, (64 * 1024 * 1024).to_string());
    let grown = resident(&proxy).saturating_sub(before);
    assert!(grown < 8 * 1024, "grew by {grown} KiB");
}

#[tokio::test]
async fn copy_passes_both_ways() {
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    client.send(&query("CREATE TEMP TABLE t (n int)")).await;
    client.until(b'Z').await;
    client.send(&query("COPY t FROM STDIN")).await;
    client.until(b'G').await;
    for n in 0..10_000 {
        client.send(&tagged(b'd', format!("{n}\n").as_bytes())).await;
    }
    client.send(&tagged(b'c', b"")).await;
    client.until(b'Z').await;
    client.send(&query("COPY t TO STDOUT")).await;
    let messages = client.until(b'Z').await;
    assert_eq!(messages.iter().filter(|message| message.tag == b'd').count(), 10_000);
    // A COPY that the client gives up.
    client.send(&query("COPY t FROM STDIN")).await;
    client.until(b'G').await;
    client.send(&tagged(b'f', b"changed my mind\0")).await;
    let messages = client.until(b'Z').await;
    assert!(messages.iter().any(|message| message.tag == b'E' && message.sqlstate() == "57014"));
    assert_eq!(client.ask("SELECT count(*)::text FROM t").await, "10000");
}

#[tokio::test]
async fn a_pipeline_of_extended_queries_is_answered_in_order() {
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    let mut pipeline = Vec::new();
    for n in 0..500 {
        pipeline.extend(tagged(b'P', format!("\0SELECT '{n}'\0\0\0").as_bytes()));
        pipeline.extend(tagged(b'B', b"\0\0\0\0\0\0\0\0"));
        pipeline.extend(tagged(b'E', b"\0\0\0\0\0"));
        pipeline.extend(tagged(b'S', b""));
    }
    client.send(&pipeline).await;
    for n in 0..500 {
        let messages = client.until(b'Z').await;
        let row = messages.iter().find(|message| message.tag == b'D').expect("a row");
        assert_eq!(row.body[6..], *n.to_string().as_bytes());
    }
}

#[tokio::test]
async fn a_reader_that_stops_reading_stops_the_database_and_costs_no_memory() {
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    let before = resident(&proxy);
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    client.send(&query("SELECT repeat('x', 1000) FROM generate_series(1, 300000)")).await;
    world().waits_for(&pid, "ClientWrite").await;
    assert!(resident(&proxy).saturating_sub(before) < 8 * 1024);
    // When it reads again, all of it is there.
    let messages = client.until(b'Z').await;
    assert_eq!(messages.iter().filter(|message| message.tag == b'D').count(), 300_000);
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_query_has_it_cancelled() {
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    client.send(&query("SELECT pg_sleep(600)")).await;
    world().waits_for(&pid, "PgSleep").await;
    drop(client);
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "client_left");
    world().has_ended(&pid).await;
}

#[tokio::test]
async fn a_client_that_terminates_and_half_closes_gets_its_answers() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client.send(&[query("SELECT pg_sleep(0.2), 'the answer'"), tagged(b'X', b"")].concat()).await;
    client.shutdown().await;
    let messages = client.until(b'Z').await;
    assert!(messages.iter().any(|message| message.tag == b'D'));
    assert_eq!(client.next().await, None);
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "client_left");
}

#[tokio::test]
async fn a_database_that_dies_silently_is_reported() {
    // A stand-in that logs in (its placement allows a password in clear), then closes.
    let seal = |number: &str| [fake::row(&format!("{number}acme")), tagged(b'Z', b"I")].concat();
    let address = fake::database(seal).await;
    let proxy = plain().await;
    proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
    let mut client = session(&proxy).await;
    client.send(&query("SELECT 1")).await;
    let error = client.fatal().await;
    assert_eq!(error.sqlstate(), "08006");
    assert_eq!(error.field(b'M').as_deref(), Some("server closed the connection unexpectedly"));
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "backend_lost");
}

#[tokio::test]
async fn a_transaction_may_finish_while_the_proxy_drains() {
    let limits = "drain_timeout = \"30s\"\n".to_owned();
    let mut proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client.ask("BEGIN; SELECT 'begun'").await;
    proxy.signal(Signal::TERM);
    proxy.logged(|line| line["message"] == "draining").await;
    assert_eq!(client.ask("SELECT 'still here'").await, "still here");
    client.send(&query("COMMIT")).await;
    let messages = client.until(b'Z').await;
    assert_eq!(messages[0].tag, b'C', "{messages:?}");
    assert_eq!(client.fatal().await.sqlstate(), "57P01");
    assert!(proxy.ended().await.success());
}

/// Who moves a tenant pauses it, and waits until nobody is there.
#[tokio::test]
async fn a_transaction_may_finish_while_its_tenant_is_paused() {
    let limits = "pause_timeout = \"6s\"\n".to_owned();
    let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
    let (token, other) = (mint::token("acme"), mint::token("globex"));
    let session = async |token: &str, tenant: &str| {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(token, tenant).await;
        client
    };
    let mut idle = session(&token, "acme").await;
    let (mut short, mut long) = (session(&token, "acme").await, session(&token, "acme").await);
    let mut elsewhere = session(&other, "globex").await;
    for transaction in [&mut short, &mut long] {
        transaction.ask("BEGIN; SELECT 'begun'").await;
    }
    let before = proxy.tenants();
    proxy.reload(&before.replacen("id = \"acme\"", "id = \"acme\"\nstate = \"paused\"", 1));
    assert_eq!(idle.fatal().await.sqlstate(), "57P01");
    assert_eq!(long.ask("SELECT 'still here'").await, "still here");
    let refused = proxy.connect(&token, "acme").await.expect_err("paused");
    assert_eq!(refused.code().map(|code| code.code()), Some("57P03"));
    short.send(&query("COMMIT")).await;
    let messages = short.until(b'Z').await;
    assert_eq!(messages[0].tag, b'C', "{messages:?}");
    assert_eq!(short.fatal().await.sqlstate(), "57P01");
    assert_eq!(long.fatal().await.sqlstate(), "57P01");
    let ended = proxy.events_reach("ended", 3).await;
    assert!(ended.iter().all(|event| event["ending"] == "tenant_paused"), "{ended:?}");
    assert_eq!(elsewhere.ask("SELECT 'undisturbed'").await, "undisturbed");
    proxy.reload(&before);
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 2.0).await;
    session(&token, "acme").await;
}

#[tokio::test]
async fn an_ending_never_splits_a_message() {
    // Rows stream while the tenant is withdrawn: the client parses strictly to the last byte.
    let proxy = plain().await;
    let mut client = session(&proxy).await;
    client.send(&query("SELECT repeat('x', 3000) FROM generate_series(1, 10000000)")).await;
    client.until(b'T').await;
    for _ in 0..100 {
        assert_eq!(client.message().await.tag, b'D');
    }
    let registry =
        proxy.tenants().replacen("id = \"acme\"", "id = \"acme\"\nstate = \"suspended\"", 1);
    proxy.reload(&registry);
    let mut last = None;
    while let Some(message) = client.next().await {
        last = Some(message);
    }
    let last = last.expect("messages");
    assert_eq!((last.tag, last.sqlstate().as_str()), (b'E', "57P01"));
}

#[tokio::test]
async fn a_login_in_one_write_is_a_login() {
    let proxy = plain().await;
    let mut stream = Raw::tcp(proxy.address()).await.into_inner();
    let all =
        [startup(&[("user", "app")]), password(&mint::token("acme")), tagged(b'X', b"")].concat();
    stream.write_all(&all).await.expect("sent");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.expect("read");
    assert!(said.ends_with(&tagged(b'Z', b"I")), "{said:?}");
}

/// What breaks is told apart from a client that has left: by a byte that TLS cannot decrypt, and by
/// a reset.
#[tokio::test]
async fn a_client_whose_connection_breaks_leaves_the_cause() {
    let proxy = Proxy::start().await;
    for (breaks, cause) in [(Breaks::Tls, "decrypt"), (Breaks::Tcp, "reset")] {
        let tcp = std::net::TcpStream::connect(proxy.address()).expect("connected");
        tcp.set_nonblocking(true).expect("set");
        let mut other = tcp.try_clone().expect("a second handle");
        let tcp = tokio::net::TcpStream::from_std(tcp).expect("on the event loop");
        let mut client = Raw::handshake(tcp, &[b"postgresql"]).await.expect("TLS");
        client.log_in(&mint::token("acme"), "acme").await;
        match breaks {
            Breaks::Tls => {
                other.write_all(b"\x17\x03\x03\x00\x12not what was agreed").expect("sent");
            }
            Breaks::Tcp => {
                socket2::SockRef::from(&other).set_linger(Some(Duration::ZERO)).expect("set");
            }
        }
        drop(other);
        drop(client);
        let ended = proxy.event("ended", |event| event["cause"].to_string().contains(cause)).await;
        assert_eq!(ended["ending"], "client_lost", "{ended}");
    }
}

enum Breaks {
    Tls,
    Tcp,
}

/// Which test provokes which ending. An ending without a test does not compile.
#[test]
fn every_ending_has_a_test() {
    for ending in pgsilo::Ending::ALL {
        let _test: fn() = match ending {
            pgsilo::Ending::ClientLeft => a_client_that_vanishes_in_a_query_has_it_cancelled,
            pgsilo::Ending::ClientLost => a_client_whose_connection_breaks_leaves_the_cause,
            pgsilo::Ending::BackendLeft => {
                crate::leases::a_session_that_is_killed_in_the_database_gives_its_lease_back
            }
            pgsilo::Ending::BackendLost => a_database_that_dies_silently_is_reported,
            pgsilo::Ending::IdleTimeout => {
                crate::limits::an_idle_session_is_ended_and_a_busy_one_is_not
            }
            pgsilo::Ending::IdleInTransaction => {
                crate::times::a_session_idle_in_transaction_is_ended_and_a_working_one_is_not
            }
            pgsilo::Ending::TransactionTimeout => {
                crate::times::transaction_timeout_holds_whatever_the_session_sets
            }
            pgsilo::Ending::SessionAge => crate::times::a_session_ends_at_its_maximum_age,
            pgsilo::Ending::TokenExpired => crate::authority::a_session_ends_with_its_token,
            pgsilo::Ending::CertificateExpired => {
                crate::certificates::a_session_ends_with_its_certificate
            }
            pgsilo::Ending::IdentityRevoked => {
                crate::denied::a_denied_identity_is_refused_and_its_sessions_end
            }
            pgsilo::Ending::AccessLocked => {
                crate::registry::served::a_lock_ends_what_it_names_and_lets_nobody_past
            }
            pgsilo::Ending::GrantWithdrawn => {
                crate::registry::grants::a_session_ends_with_its_grant
            }
            pgsilo::Ending::AuthorityWithdrawn => {
                crate::certificates::an_authority_that_is_replaced_loses_its_sessions_and_no_others
            }
            pgsilo::Ending::LeaseEnded => {
                crate::authority::an_idle_session_ends_in_the_grace_before_its_lease_does
            }
            pgsilo::Ending::FailedOver => {
                crate::failover::nobody_writes_to_a_primary_that_was_overtaken
            }
            pgsilo::Ending::TenantWithdrawn => an_ending_never_splits_a_message,
            pgsilo::Ending::TenantPaused => a_transaction_may_finish_while_its_tenant_is_paused,
            pgsilo::Ending::RegistryStale => {
                crate::registry::served::sessions_end_with_a_registry_that_is_too_old_where_that_is_asked_for
            }
            pgsilo::Ending::Drained => a_transaction_may_finish_while_the_proxy_drains,
        };
    }
}
