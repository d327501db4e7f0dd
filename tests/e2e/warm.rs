//! Connections that are ready: whoever takes one cannot tell, and nobody gets one that was made for
//! something else, that has died, or that outlived what it was made from.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Message, Raw, query, startup};
use pgsilo_sandbox::testing::world::{World, world};
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio_postgres::SimpleQueryMessage;

use crate::leases::role_is_of_no_use;

fn warm(keys: &str) -> Settings {
    Settings { warm: keys.to_owned(), ..Settings::default() }
}

/// One waits at most, so that it is known which, and is asked whose it is before it is taken.
const ONE: &str = "max_per_tenant = 1\nidle_timeout = \"60s\"\ncheck_after = \"0s\"\n";
/// The same, but for one that has said so within the last minute.
const UNASKED: &str = "max_per_tenant = 1\nidle_timeout = \"60s\"\ncheck_after = \"60s\"\n";

async fn proxy() -> Proxy {
    Proxy::with(warm(ONE)).await
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

/// Two sessions, so that a third is expected; what waits for it.
async fn made_ready(proxy: &Proxy, token: &str, parameters: Parameters<'_>) -> Value {
    for _ in 0..2 {
        let (client, _) = log_in(proxy, token, parameters).await;
        drop(client);
    }
    proxy.metric_reaches("pgsilo_warm_connections", 1.0).await;
    let waits = |line: &Value| line["message"] == "a connection waits for a session";
    proxy.logged(waits).await;
    proxy.lines().into_iter().rfind(waits).expect("logged")
}

fn pid(waiting: &Value) -> Pid {
    let pid = waiting["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    pid.and_then(Pid::from_raw).expect("a pid")
}

/// What a client can find out of its session, but for what is each session's own.
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
async fn a_session_cannot_tell_that_its_connection_was_ready() {
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
    let waiting = made_ready(&proxy, &token, parameters).await;
    let (mut ready, greeting) = log_in(&proxy, &token, parameters).await;

    assert_eq!(proxy.served(0).await["warm"], false);
    let event = proxy.served(3).await;
    assert_eq!((&event["warm"], &event["role"]), (&json!(true), &waiting["role"]));
    assert_eq!(event["backend_pid"], waiting["pid"]);
    assert_ne!(proxy.served(0).await["role"], event["role"], "a lease of its own");
    // Its key and its role are its own.
    let but_its_own = |greeting: &[Message]| -> Vec<Message> {
        let own = |message: &&Message| {
            message.tag == b'K' || message.body.starts_with(b"session_authorization\0")
        };
        greeting.iter().filter(|message| !own(message)).cloned().collect()
    };
    assert_eq!(but_its_own(&greeting), but_its_own(&cold_greeting));
    assert_eq!(found_out(&mut ready).await, cold_found);
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"used\"}").await, 1.0);
}

#[tokio::test]
async fn only_an_equal_session_takes_it() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    made_ready(&proxy, &token, PLAIN).await;
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
        assert_eq!(event["warm"], false, "{parameters:?}");
    }
    // Names that are only logged make no difference; another subject of the tenant makes none.
    let colleague = mint::token_with("acme", json!({ "sub": "colleague" }));
    let (_client, _) =
        log_in(&proxy, &colleague, &[("database", "tenant_acme"), ("user", "somebody")]).await;
    let event = proxy.served(8).await;
    assert_eq!((&event["warm"], &event["subject"]), (&json!(true), &json!("colleague")));
}

#[tokio::test]
async fn what_waits_in_vain_makes_room_for_what_is_wanted() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let first = made_ready(&proxy, &token, PLAIN).await;
    let other: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("application_name", "other")];
    let other_waits = |line: &Value| {
        line["message"] == "a connection waits for a session" && line["pid"] != first["pid"]
    };
    eventually("a connection of the other kind", async || {
        drop(log_in(&proxy, &token, other).await);
        proxy.lines().into_iter().find(other_waits)
    })
    .await;
    proxy.metric_reaches("pgsilo_warm_connections", 1.0).await;
    let served_before = proxy.events("started").len();
    let (_client, _) = log_in(&proxy, &token, other).await;
    assert_eq!(proxy.served(served_before).await["warm"], true);
    proxy.metric_reaches("pgsilo_warm_total{result=\"expired\"}", 1.0).await;
}

#[tokio::test]
async fn nobody_waits_for_one_session_alone_and_nothing_waits_for_long() {
    let proxy = Proxy::with(warm("max_per_tenant = 1\nidle_timeout = \"1s\"\n")).await;
    let token = mint::token("acme");
    let (client, _) = log_in(&proxy, &token, PLAIN).await;
    drop(client);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 1.0, "nothing was made ahead");

    made_ready(&proxy, &token, PLAIN).await;
    proxy.metric_reaches("pgsilo_warm_total{result=\"expired\"}", 1.0).await;
    proxy.metric_reaches("pgsilo_warm_connections", 0.0).await;
    let leases = proxy.metric("pgsilo_leases_total").await;
    proxy.metric_reaches("pgsilo_revocations_total", leases).await;
    assert_eq!(proxy.metric("pgsilo_leases_total").await, leases, "and none is made instead");
}

#[tokio::test]
async fn nothing_waits_until_its_lease_is_nearly_over() {
    let proxy = Proxy::with_role("tenant-acme-warm", "6s", "6s", warm(ONE)).await;
    let token = mint::token("acme");
    made_ready(&proxy, &token, PLAIN).await;
    // Of six seconds, the last two are not for a session to begin in.
    proxy.metric_reaches("pgsilo_warm_total{result=\"expired\"}", 1.0).await;
    let ended = proxy.events("ended");
    assert!(ended.iter().all(|event| event["ending"] == "client_left"), "{ended:?}");
}

#[tokio::test]
async fn a_connection_that_died_waiting_is_noticed() {
    for keys in [ONE, UNASKED] {
        let proxy = Proxy::with(warm(keys)).await;
        let token = mint::token("acme");
        let pid = pid(&made_ready(&proxy, &token, PLAIN).await).as_raw_nonzero().get();
        let superuser = world().superuser("postgres").await;
        let sql = "SELECT pg_terminate_backend($1, 10000)";
        assert!(superuser.query_one(sql, &[&pid]).await.expect("terminated").get::<_, bool>(0));
        let (mut client, _) = log_in(&proxy, &token, PLAIN).await;
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
        assert_eq!(proxy.served(2).await["warm"], false);
        proxy.metric_reaches("pgsilo_warm_total{result=\"lost\"}", 1.0).await;
    }
}

/// The server's `idle_session_timeout`, or the client's: what is made ahead dies waiting, each time.
#[tokio::test]
async fn where_the_database_ends_idle_sessions_none_is_made_ahead_again() {
    let mut proxy = Proxy::with(warm(ONE)).await;
    let token = mint::token("acme");
    let idle: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("options", "-c idle_session_timeout=500")];
    let ready = made_ready(&proxy, &token, idle).await;
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
    proxy.metric_reaches("pgsilo_warm_total{result=\"lost\"}", 1.0).await;
    proxy.signal(rustix::process::Signal::TERM);
    proxy.ended().await;
    let ahead = proxy.events("leased").iter().filter(|event| event["ahead"] == true).count();
    assert_eq!(ahead, 1);
}

/// When a database's process began with its newest query.
async fn last_asked(superuser: &tokio_postgres::Client, pid: Pid) -> String {
    let sql = "SELECT query_start::text FROM pg_stat_activity WHERE pid = $1";
    superuser.query_one(sql, &[&pid.as_raw_nonzero().get()]).await.expect("it lives").get(0)
}

#[tokio::test]
async fn one_that_has_lately_said_whose_it_is_is_not_asked_again() {
    let world = World::own().await;
    let superuser = world.superuser("postgres").await;
    for (keys, asked) in [(ONE, true), (UNASKED, false)] {
        let proxy = Proxy::of(&world, warm(keys)).await;
        let token = mint::token_of(&world, "acme");
        let pid = pid(&made_ready(&proxy, &token, PLAIN).await);
        let before = last_asked(&superuser, pid).await;
        let (_client, _) = log_in(&proxy, &token, PLAIN).await;
        assert_eq!(proxy.served(2).await["backend_pid"], pid.as_raw_nonzero().get());
        assert_eq!(before != last_asked(&superuser, pid).await, asked, "{keys}");
    }
}

#[tokio::test]
async fn a_connection_that_does_not_answer_is_not_waited_for() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let hung = pid(&made_ready(&proxy, &token, PLAIN).await);
    kill_process(hung, Signal::STOP).expect("it lives");
    let (mut client, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    assert_eq!(proxy.served(2).await["warm"], false);
    kill_process(hung, Signal::CONT).expect("it lives");
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"lost\"}").await, 1.0);
}

#[tokio::test]
async fn a_reload_that_changes_its_tenant_lets_go_of_it() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    made_ready(&proxy, &token, PLAIN).await;
    let tenants = proxy.tenants();
    let changed =
        tenants.replacen("id = \"acme\"", "id = \"acme\"\ndatabase_names = [\"legacy\"]", 1);
    assert_ne!(tenants, changed);
    proxy.reload(&changed);
    proxy.metric_reaches("pgsilo_warm_total{result=\"withdrawn\"}", 1.0).await;
    proxy.metric_reaches("pgsilo_warm_connections", 0.0).await;
    let leases = proxy.metric("pgsilo_leases_total").await;
    proxy.metric_reaches("pgsilo_revocations_total", leases).await;
    let (_client, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(proxy.served(2).await["warm"], false);
}

/// A reload is no event for a tenant of which it says nothing new: what waits for it goes on waiting.
#[tokio::test]
async fn a_reload_that_says_the_same_of_its_tenant_leaves_it_waiting() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    let waiting = made_ready(&proxy, &token, PLAIN).await;
    let tenants = proxy.tenants();
    let other = tenants.replacen("id = \"globex\"", "id = \"globex\"\nstate = \"paused\"", 1);
    assert_ne!(tenants, other);
    for (count, registry) in [(1.0, &tenants), (2.0, &other)] {
        proxy.reload(registry);
        proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", count).await;
    }
    // Globex's new state has reached sessions, and with it whatever the reload does.
    let refused = proxy.connect(&mint::token("globex"), "globex").await.expect_err("paused");
    assert_eq!(refused.code().map(|code| code.code()), Some("57P03"));
    let (_client, _) = log_in(&proxy, &token, PLAIN).await;
    let served = proxy.served(2).await;
    assert_eq!((&served["warm"], &served["backend_pid"]), (&json!(true), &waiting["pid"]));
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"withdrawn\"}").await, 0.0);
}

#[tokio::test]
async fn a_seal_that_changed_while_it_waited_is_noticed() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, warm(ONE)).await;
    let token = mint::token_of(&world, "acme");
    made_ready(&proxy, &token, PLAIN).await;
    let superuser = world.superuser("postgres").await;
    let sql = "ALTER DATABASE tenant_acme SET pgsilo.tenant = 'globex'";
    superuser.batch_execute(sql).await.expect("sealed for another");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(PLAIN)).await;
    client.send_password(&token).await;
    assert_eq!(client.fatal().await.sqlstate(), "XX000");
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "seal_broken");
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"lost\"}").await, 1.0);
}

#[tokio::test]
async fn a_setting_that_a_client_cannot_read_in_its_encoding_is_not_in_its_way() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, warm(ONE)).await;
    let token = mint::token_of(&world, "acme");
    let superuser = world.superuser("postgres").await;
    let sql = "ALTER DATABASE tenant_acme SET shop.currency = '\u{20ac}'";
    superuser.batch_execute(sql).await.expect("set");
    let parameters: Parameters<'_> =
        &[("user", "app"), ("database", "acme"), ("client_encoding", "LATIN1")];
    made_ready(&proxy, &token, parameters).await;
    let (mut client, _) = log_in(&proxy, &token, parameters).await;
    assert_eq!(client.ask("SHOW client_encoding").await, "LATIN1");
    assert_eq!(proxy.served(2).await["warm"], true);
}

#[tokio::test]
async fn a_setting_that_is_reloaded_while_it_waits_is_told_to_its_session() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, warm(ONE)).await;
    let token = mint::token_of(&world, "acme");
    let told = |greeting: &[Message]| {
        let last = greeting.iter().rev().find_map(|message| {
            message.body.strip_prefix(b"TimeZone\0").filter(|_| message.tag == b'S')
        });
        String::from_utf8(last.expect("told").to_vec()).expect("text")
    };
    let waiting = made_ready(&proxy, &token, PLAIN).await;
    let superuser = world.superuser("postgres").await;
    for sql in ["ALTER SYSTEM SET timezone = 'Asia/Tokyo'", "SELECT pg_reload_conf()"] {
        superuser.batch_execute(sql).await.expect("set");
    }
    // The postmaster signals each process; this one heard of it when a later one has.
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
    assert_eq!((&event["warm"], &event["backend_pid"]), (&json!(true), &waiting["pid"]));
    assert_eq!(told(&greeting), "Asia/Tokyo\0");
    assert_eq!(client.ask("SHOW timezone").await, "Asia/Tokyo");
}

#[tokio::test]
async fn no_more_wait_than_may() {
    let proxy = Proxy::with(warm("max = 3\nmax_per_tenant = 2\nidle_timeout = \"60s\"\n")).await;
    for _ in 0..12 {
        for tenant in ["acme", "globex"] {
            let parameters: Parameters<'_> = &[("user", "app"), ("database", tenant)];
            let _client = log_in(&proxy, &mint::token(tenant), parameters).await;
            assert!(proxy.metric("pgsilo_warm_connections").await <= 3.0);
        }
    }
    let waits = |line: &Value| line["message"] == "a connection waits for a session";
    let made = proxy.lines().into_iter().filter(waits).count() as f64;
    let used = proxy.metric("pgsilo_warm_total{result=\"used\"}").await;
    let mut gone = used;
    for result in ["lost", "expired"] {
        gone += proxy.metric(&format!("pgsilo_warm_total{{result=\"{result}\"}}")).await;
    }
    assert!(made > 0.0 && used > 0.0 && made - gone <= 3.0, "{made} made, {gone} gone");
}

#[tokio::test]
async fn a_stop_lets_go_of_all_of_them() {
    let mut proxy = proxy().await;
    let waiting = made_ready(&proxy, &mint::token("acme"), PLAIN).await;
    proxy.signal(Signal::TERM);
    assert!(proxy.ended().await.success());
    role_is_of_no_use(waiting["role"].as_str().expect("a role")).await;
}

#[tokio::test]
async fn what_cannot_be_made_is_not_tried_again_at_once_and_harms_nobody() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    // The lease is for a role that OpenBAO does not know, but for the sessions before the reload.
    made_ready(&proxy, &token, PLAIN).await;
    let (_first, _) = log_in(&proxy, &token, PLAIN).await;
    assert_eq!(proxy.served(2).await["warm"], true);
    proxy.reload(&proxy.tenants().replacen("tenant-acme-rw", "tenant-acme-none", 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(PLAIN)).await;
    client.send_password(&token).await;
    client.fatal().await;
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "lease_denied");
    assert_eq!(proxy.metric("pgsilo_warm_connections").await, 0.0);
}

#[tokio::test]
async fn without_any_wished_for_none_is_made() {
    let proxy = Proxy::start().await;
    for _ in 0..4 {
        let _client = log_in(&proxy, &mint::token("acme"), PLAIN).await;
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 4.0);
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"missed\"}").await, 0.0);
}
