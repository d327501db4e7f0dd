//! The pool of idle connections: a session cannot tell that its connection came from the pool, and
//! is not given one of another route, one that is dead, or one that is out of date.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Message, Raw, query, startup};
use pgsilo_sandbox::testing::world::{World, world};
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio_postgres::SimpleQueryMessage;

use crate::leases::role_is_of_no_use;

fn pool(keys: &str) -> Settings {
    Settings { pool: keys.to_owned(), ..Settings::default() }
}

/// At most one idle connection, so that it is known which is taken; its seal is always read again.
const ONE: &str = "max_idle_per_tenant = 1\nidle_timeout = \"60s\"\ncheck_delay = \"0s\"\n";
/// The same, but its seal is not read again within a minute.
const UNCHECKED: &str = "max_idle_per_tenant = 1\nidle_timeout = \"60s\"\ncheck_delay = \"60s\"\n";

/// Why the pool closes connections.
const CLOSE_REASONS: [&str; 6] =
    ["expired", "evicted", "backend_full", "check_failed", "tenant_changed", "shutdown"];

async fn proxy() -> Proxy {
    Proxy::with(pool(ONE)).await
}

/// What a client may send at the start.
pub(crate) type Parameters<'a> = &'a [(&'a str, &'a str)];

const PLAIN: Parameters<'_> = &[("user", "app"), ("database", "acme")];

/// Logs in with these parameters; everything up to ReadyForQuery.
pub(crate) async fn log_in(
    proxy: &Proxy,
    token: &str,
    parameters: Parameters<'_>,
) -> (Raw, Vec<Message>) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(parameters)).await;
    client.send_password(token).await;
    let greeting = client.until(b'Z').await;
    (client, greeting)
}

/// Two sessions, so that a connection is prewarmed for a third; the log line about it.
async fn prewarmed(proxy: &Proxy, token: &str, parameters: Parameters<'_>) -> Value {
    for _ in 0..2 {
        let (client, _) = log_in(proxy, token, parameters).await;
        drop(client);
    }
    proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
    let is_prewarmed = |line: &Value| line["message"] == "connection prewarmed";
    proxy.logged(is_prewarmed).await;
    proxy.lines().into_iter().rfind(is_prewarmed).expect("logged")
}

fn pid(waiting: &Value) -> Pid {
    let pid = waiting["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    pid.and_then(Pid::from_raw).expect("a pid")
}

/// What a client can find out about its session, except what differs between any two sessions.
const FOUND_OUT: &str = "SELECT name, setting, source, reset_val FROM pg_settings ORDER BY 1;
    SELECT session_user = current_user, current_user, current_database(), pg_is_in_recovery();
    SELECT count(*) FROM pg_prepared_statements; SELECT count(*) FROM pg_cursors;
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid();
    SELECT pg_my_temp_schema(); SELECT pg_listening_channels();
    SELECT current_setting('application_name'), current_setting('pgsilo.tenant'), txid_current_if_assigned()";

async fn found_out(client: &mut Raw) -> Vec<Message> {
    client.send(&query(FOUND_OUT)).await;
    client.until(b'Z').await
}

#[tokio::test]
async fn a_pooled_connection_looks_like_a_new_one_to_its_session() {
    let proxy = proxy().await;
    let parameters: Parameters<'_> = &[
        ("user", "app"),
        ("database", "acme"),
        ("application_name", "shop"),
        ("options", "-c statement_timeout=12345 -c my.own=value"),
        ("DateStyle", "SQL, DMY"),
        ("client_encoding", "LATIN1"),
    ];
    let token = mint::token("acme");
    let (mut cold, cold_greeting) = log_in(&proxy, &token, parameters).await;
    let cold_found = found_out(&mut cold).await;
    let waiting = prewarmed(&proxy, &token, parameters).await;
    let (mut ready, greeting) = log_in(&proxy, &token, parameters).await;

    assert_eq!(proxy.served(0).await["pooled"], false);
    let event = proxy.served(3).await;
    assert_eq!((&event["pooled"], &event["role"]), (&json!(true), &waiting["role"]));
    assert_eq!(event["backend_pid"], waiting["pid"]);
    assert_ne!(proxy.served(0).await["role"], event["role"], "a lease of its own");
    // The cancel key and the role differ.
    let but_its_own = |greeting: &[Message]| -> Vec<Message> {
        let own = |message: &&Message| {
            message.tag == b'K' || message.body.starts_with(b"session_authorization\0")
        };
        greeting.iter().filter(|message| !own(message)).cloned().collect()
    };
    assert_eq!(but_its_own(&greeting), but_its_own(&cold_greeting));
    assert_eq!(found_out(&mut ready).await, cold_found);
    assert_eq!(proxy.metric("pgsilo_pool_requests_total{result=\"hit\"}").await, 1.0);
}

#[tokio::test]
async fn an_idle_connection_is_taken_by_a_session_of_an_equal_route_only() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    prewarmed(&proxy, &token, PLAIN).await;
    let reader = mint::token_with("acme", json!({ "access": "read-only" }));
    let other_tenant = mint::token("globex");
    let others: [(&str, Parameters<'_>); 6] = [
        (&reader, PLAIN),
        (&other_tenant, &[("user", "app"), ("database", "globex")]),
        (&token, &[("user", "app"), ("database", "acme"), ("application_name", "x")]),
        (&token, &[("user", "app"), ("database", "acme"), ("options", "")]),
        (&token, &[("user", "app"), ("database", "acme"), ("datestyle", "ISO")]),
        (&token, &[("user", "app"), ("database", "acme"), ("DateStyle", "ISO")]),
    ];
    for (number, (token, parameters)) in others.into_iter().enumerate() {
        let (_client, _) = log_in(&proxy, token, parameters).await;
        let event = proxy.served(2 + number).await;
        assert_eq!(event["pooled"], false, "{parameters:?}");
    }
    // Neither names that are only logged nor the subject are part of the route.
    let colleague = mint::token_with("acme", json!({ "sub": "colleague" }));
    let (_client, _) =
        log_in(&proxy, &colleague, &[("database", "tenant_acme"), ("user", "somebody")]).await;
    let event = proxy.served(8).await;
    assert_eq!((&event["pooled"], &event["subject"]), (&json!(true), &json!("colleague")));
}

#[tokio::test]
async fn stale_idle_connection_is_evicted_for_a_requested_route() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let first = prewarmed(&proxy, &token, PLAIN).await;
    let other: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("application_name", "other")];
    let other_is_prewarmed =
        |line: &Value| line["message"] == "connection prewarmed" && line["pid"] != first["pid"];
    eventually("a connection of the other route", async || {
        drop(log_in(&proxy, &token, other).await);
        proxy.lines().into_iter().find(other_is_prewarmed)
    })
    .await;
    proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
    let served_before = proxy.events("started").len();
    let (_client, _) = log_in(&proxy, &token, other).await;
    assert_eq!(proxy.served(served_before).await["pooled"], true);
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"evicted\"}", 1.0).await;
}

#[tokio::test]
async fn a_single_session_causes_no_prewarm_and_idle_connections_expire() {
    let proxy = Proxy::with(pool("max_idle_per_tenant = 1\nidle_timeout = \"1s\"\n")).await;
    let token = mint::token("acme");
    let (client, _) = log_in(&proxy, &token, PLAIN).await;
    drop(client);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 1.0, "there was no prewarm");

    prewarmed(&proxy, &token, PLAIN).await;
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"expired\"}", 1.0).await;
    proxy.metric_reaches("pgsilo_pool_idle_connections", 0.0).await;
    let leases = proxy.metric("pgsilo_leases_total").await;
    proxy.metric_reaches("pgsilo_revocations_total", leases).await;
    assert_eq!(proxy.metric("pgsilo_leases_total").await, leases, "and no other prewarm");
}

#[tokio::test]
async fn an_idle_connection_is_closed_before_its_lease_ends() {
    let proxy = Proxy::with_role("tenant-acme-pool", "6s", "6s", pool(ONE)).await;
    let token = mint::token("acme");
    prewarmed(&proxy, &token, PLAIN).await;
    // No session begins in the last two of its six seconds.
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"expired\"}", 1.0).await;
    let ended = proxy.events("ended");
    assert!(ended.iter().all(|event| event["ending"] == "client_left"), "{ended:?}");
}

#[tokio::test]
async fn a_dead_idle_connection_is_replaced_by_a_new_one() {
    for keys in [ONE, UNCHECKED] {
        let proxy = Proxy::with(pool(keys)).await;
        let token = mint::token("acme");
        let pid = pid(&prewarmed(&proxy, &token, PLAIN).await).as_raw_nonzero().get();
        let superuser = world().superuser("postgres").await;
        let sql = "SELECT pg_terminate_backend($1, 10000)";
        assert!(superuser.query_one(sql, &[&pid]).await.expect("terminated").get::<_, bool>(0));
        let (mut client, _) = log_in(&proxy, &token, PLAIN).await;
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
        assert_eq!(proxy.served(2).await["pooled"], false);
        proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"check_failed\"}", 1.0).await;
    }
}

/// `idle_session_timeout` of the server or of the client would end each prewarmed connection.
#[tokio::test]
async fn a_route_whose_database_ends_idle_sessions_is_not_prewarmed_again() {
    let mut proxy = Proxy::with(pool(ONE)).await;
    let token = mint::token("acme");
    let idle: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("options", "-c idle_session_timeout=500")];
    let ready = prewarmed(&proxy, &token, idle).await;
    let superuser = world().superuser("postgres").await;
    eventually("it to be ended", async || {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE pid = $1";
        let pid = pid(&ready).as_raw_nonzero().get();
        superuser.query_opt(sql, &[&pid]).await.expect("told").is_none().then_some(())
    })
    .await;
    for _ in 0..4 {
        drop(log_in(&proxy, &token, idle).await);
    }
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"check_failed\"}", 1.0).await;
    proxy.signal(rustix::process::Signal::TERM);
    proxy.ended().await;
    let prewarmed = proxy.events("leased").iter().filter(|event| event["prewarm"] == true).count();
    assert_eq!(prewarmed, 1);
}

/// When a database's process began its latest query.
async fn last_query_start(superuser: &tokio_postgres::Client, pid: Pid) -> String {
    let sql = "SELECT query_start::text FROM pg_stat_activity WHERE pid = $1";
    superuser.query_one(sql, &[&pid.as_raw_nonzero().get()]).await.expect("it lives").get(0)
}

#[tokio::test]
async fn seal_is_not_rechecked_within_check_delay() {
    let world = World::own().await;
    let superuser = world.superuser("postgres").await;
    for (keys, is_checked) in [(ONE, true), (UNCHECKED, false)] {
        let proxy = Proxy::of(&world, pool(keys)).await;
        let token = mint::token_of(&world, "acme");
        let pid = pid(&prewarmed(&proxy, &token, PLAIN).await);
        let before = last_query_start(&superuser, pid).await;
        let (_client, _) = log_in(&proxy, &token, PLAIN).await;
        assert_eq!(proxy.served(2).await["backend_pid"], pid.as_raw_nonzero().get());
        assert_eq!(before != last_query_start(&superuser, pid).await, is_checked, "{keys}");
    }
}

#[tokio::test]
async fn an_idle_connection_that_does_not_answer_is_replaced_by_a_new_one() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let hung = pid(&prewarmed(&proxy, &token, PLAIN).await);
    kill_process(hung, Signal::STOP).expect("it lives");
    let (mut client, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    assert_eq!(proxy.served(2).await["pooled"], false);
    kill_process(hung, Signal::CONT).expect("it lives");
    assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"check_failed\"}").await, 1.0);
}

#[tokio::test]
async fn a_reload_that_changes_a_tenant_closes_its_idle_connections() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    prewarmed(&proxy, &token, PLAIN).await;
    let tenants = proxy.tenants();
    let changed =
        tenants.replacen("id = \"acme\"", "id = \"acme\"\ndatabase_names = [\"legacy\"]", 1);
    assert_ne!(tenants, changed);
    proxy.reload(&changed);
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"tenant_changed\"}", 1.0).await;
    proxy.metric_reaches("pgsilo_pool_idle_connections", 0.0).await;
    let leases = proxy.metric("pgsilo_leases_total").await;
    proxy.metric_reaches("pgsilo_revocations_total", leases).await;
    let (_client, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(proxy.served(2).await["pooled"], false);
}

#[tokio::test]
async fn a_reload_that_does_not_change_a_tenant_keeps_its_idle_connections() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let waiting = prewarmed(&proxy, &token, PLAIN).await;
    let tenants = proxy.tenants();
    let other = tenants.replacen("id = \"globex\"", "id = \"globex\"\nstate = \"paused\"", 1);
    assert_ne!(tenants, other);
    for (count, registry) in [(1.0, &tenants), (2.0, &other)] {
        proxy.reload(registry);
        proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", count).await;
    }
    // Globex's new state is in force, so the reload has had all its effects.
    let refused = proxy.connect(&mint::token("globex"), "globex").await.expect_err("paused");
    assert_eq!(refused.code().map(|code| code.code()), Some("57P03"));
    let (_client, _) = log_in(&proxy, &token, PLAIN).await;
    let served = proxy.served(2).await;
    assert_eq!((&served["pooled"], &served["backend_pid"]), (&json!(true), &waiting["pid"]));
    assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"tenant_changed\"}").await, 0.0);
}

#[tokio::test]
async fn a_seal_that_changed_while_a_connection_was_idle_is_detected() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, pool(ONE)).await;
    let token = mint::token_of(&world, "acme");
    prewarmed(&proxy, &token, PLAIN).await;
    let superuser = world.superuser("postgres").await;
    let sql = "ALTER DATABASE tenant_acme SET pgsilo.tenant = 'globex'";
    superuser.batch_execute(sql).await.expect("sealed for another");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(PLAIN)).await;
    client.send_password(&token).await;
    assert_eq!(client.fatal().await.sqlstate(), "XX000");
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "seal_broken");
    assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"check_failed\"}").await, 1.0);
}

#[tokio::test]
async fn a_setting_that_the_client_encoding_cannot_represent_does_not_fail_the_login() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, pool(ONE)).await;
    let token = mint::token_of(&world, "acme");
    let superuser = world.superuser("postgres").await;
    let sql = "ALTER DATABASE tenant_acme SET shop.currency = '\u{20ac}'";
    superuser.batch_execute(sql).await.expect("set");
    let parameters: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("client_encoding", "LATIN1")];
    prewarmed(&proxy, &token, parameters).await;
    let (mut client, _) = log_in(&proxy, &token, parameters).await;
    assert_eq!(client.ask("SHOW client_encoding").await, "LATIN1");
    assert_eq!(proxy.served(2).await["pooled"], true);
}

#[tokio::test]
async fn a_setting_reloaded_while_a_connection_was_idle_is_reported_to_its_session() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, pool(ONE)).await;
    let token = mint::token_of(&world, "acme");
    let told = |greeting: &[Message]| {
        let last = greeting.iter().rev().find_map(|message| {
            message.body.strip_prefix(b"TimeZone\0").filter(|_| message.tag == b'S')
        });
        String::from_utf8(last.expect("told").to_vec()).expect("text")
    };
    let waiting = prewarmed(&proxy, &token, PLAIN).await;
    let superuser = world.superuser("postgres").await;
    for sql in ["ALTER SYSTEM SET timezone = 'Asia/Tokyo'", "SELECT pg_reload_conf()"] {
        superuser.batch_execute(sql).await.expect("set");
    }
    // The postmaster signals each process; a later one having the setting shows that this one has.
    eventually("the setting", async || {
        let rows = world.superuser("postgres").await.simple_query("SHOW timezone").await;
        rows.expect("told").iter().any(|row| {
            matches!(row, SimpleQueryMessage::Row(row) if row.get(0) == Some("Asia/Tokyo"))
        })
        .then_some(())
    })
    .await;
    let (mut client, greeting) = log_in(&proxy, &token, PLAIN).await;
    let event = proxy.served(2).await;
    assert_eq!((&event["pooled"], &event["backend_pid"]), (&json!(true), &waiting["pid"]));
    assert_eq!(told(&greeting), "Asia/Tokyo\0");
    assert_eq!(client.ask("SHOW timezone").await, "Asia/Tokyo");
}

#[tokio::test]
async fn idle_connections_stay_within_their_limits() {
    let proxy =
        Proxy::with(pool("max_idle = 3\nmax_idle_per_tenant = 2\nidle_timeout = \"60s\"\n")).await;
    for _ in 0..12 {
        for tenant in ["acme", "globex"] {
            let parameters: Parameters<'_> = &[("user", "app"), ("database", tenant)];
            let _client = log_in(&proxy, &mint::token(tenant), parameters).await;
            assert!(proxy.metric("pgsilo_pool_idle_connections").await <= 3.0);
        }
    }
    let is_prewarmed = |line: &Value| line["message"] == "connection prewarmed";
    let opened = proxy.lines().into_iter().filter(is_prewarmed).count() as f64;
    let used = proxy.metric("pgsilo_pool_requests_total{result=\"hit\"}").await;
    let mut gone = used;
    for reason in ["check_failed", "expired", "evicted"] {
        gone += proxy.metric(&format!("pgsilo_pool_closed_total{{reason=\"{reason}\"}}")).await;
    }
    assert!(opened > 0.0 && used > 0.0 && opened - gone <= 3.0, "{opened} opened, {gone} gone");
    eventually("all that was opened to be given to a session, closed or idle", async || {
        let opened = proxy.metric("pgsilo_pool_prewarms_total{result=\"ok\"}").await;
        let mut accounted = proxy.metric("pgsilo_pool_requests_total{result=\"hit\"}").await;
        accounted += proxy.metric("pgsilo_pool_idle_connections").await;
        for reason in CLOSE_REASONS {
            accounted +=
                proxy.metric(&format!("pgsilo_pool_closed_total{{reason=\"{reason}\"}}")).await;
        }
        (opened == accounted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_stop_closes_idle_connections_and_revokes_their_leases() {
    let mut proxy = proxy().await;
    let waiting = prewarmed(&proxy, &mint::token("acme"), PLAIN).await;
    proxy.signal(Signal::TERM);
    assert!(proxy.ended().await.success());
    role_is_of_no_use(waiting["role"].as_str().expect("a role")).await;
}

#[tokio::test]
async fn a_failed_prewarm_is_not_retried_at_once_and_fails_no_session() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    // After the reload the lease is for a role that OpenBAO does not know.
    prewarmed(&proxy, &token, PLAIN).await;
    let (_first, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(proxy.served(2).await["pooled"], true);
    proxy.reload(&proxy.tenants().replacen("tenant-acme-rw", "tenant-acme-none", 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(PLAIN)).await;
    client.send_password(&token).await;
    client.fatal().await;
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "lease_denied");
    assert_eq!(proxy.metric("pgsilo_pool_idle_connections").await, 0.0);
}

#[tokio::test]
async fn max_idle_zero_disables_the_pool() {
    let proxy = Proxy::start().await;
    for _ in 0..4 {
        let _client = log_in(&proxy, &mint::token("acme"), PLAIN).await;
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 4.0);
    assert_eq!(proxy.metric("pgsilo_pool_requests_total{result=\"miss\"}").await, 0.0);
}
