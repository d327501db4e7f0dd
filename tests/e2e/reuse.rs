//! Reuse of connections (`pool.reuse = "reset"`): no state of a session reaches the next one, and a
//! connection that was not left clean is closed.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Message, Raw, query, tagged};
use pgsilo_sandbox::testing::world::{World, world};
use rustix::process::Signal;
use serde_json::json;

use crate::leases::role_is_of_no_use;
use crate::openbao::{own_token, session_authority};
use crate::pool;

const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

fn settings(keys: &str) -> Settings {
    Settings {
        pool: format!("idle_timeout = \"60s\"\nreuse = \"reset\"\n{keys}"),
        ..Settings::default()
    }
}

async fn proxy() -> Proxy {
    Proxy::with(settings("")).await
}

/// Whether the seal is read again when a connection is taken: always, and not within a minute.
const CHECKS: [&str; 2] = ["check_delay = \"0s\"\n", "check_delay = \"60s\"\n"];

async fn log_in(proxy: &Proxy) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client
}

/// Sends a Terminate as drivers do, and waits until the connection is idle in the pool.
async fn leave(proxy: &Proxy, mut client: Raw) {
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None, "the session is over");
    proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
}

async fn pid(client: &mut Raw) -> String {
    client.ask("SELECT pg_backend_pid()::text").await
}

/// Runs SQL that is to succeed.
async fn run(client: &mut Raw, sql: &str) -> Vec<Message> {
    client.send(&query(sql)).await;
    let answer = client.until(b'Z').await;
    assert!(answer.iter().all(|message| message.tag != b'E'), "{sql}: {answer:?}");
    answer
}

#[tokio::test]
async fn the_next_session_reuses_the_connection_and_its_lease() {
    let proxy = proxy().await;
    let mut first = log_in(&proxy).await;
    let had = pid(&mut first).await;
    leave(&proxy, first).await;
    let mut second = log_in(&proxy).await;
    assert_eq!(pid(&mut second).await, had);
    let (one, two) = (proxy.served(0).await, proxy.served(1).await);
    assert_eq!(one["role"], two["role"]);
    assert_eq!((&one["pooled"], &one["reused"]), (&json!(false), &json!(false)));
    assert_eq!((&two["pooled"], &two["reused"]), (&json!(true), &json!(true)));
    assert_ne!(one["session"], two["session"]);
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 1.0, "and there is no prewarm");
    let ended = proxy.event("ended", |_| true).await;
    assert_eq!(ended["ending"], "client_left");
}

#[tokio::test]
async fn a_connection_whose_seal_changed_is_not_reused() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, settings("")).await;
    let token = mint::token_of(&world, "acme");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token, "acme").await;
    let sql = "ALTER DATABASE tenant_acme SET pgsilo.tenant = 'globex'";
    world.superuser("postgres").await.batch_execute(sql).await.expect("sealed for another");
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None, "the session is over");
    proxy.metric_reaches("pgsilo_pool_resets_total{result=\"error\"}", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_pool_idle_connections").await, 0.0);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
}

/// RESET ROLE does not check whether the role still exists.
#[tokio::test]
async fn a_connection_whose_role_has_lost_its_rights_is_closed() {
    let proxy = proxy().await;
    let superuser = world().superuser("tenant_acme").await;
    let losses: [fn(&str) -> String; 2] = [
        |role| format!("DROP ROLE \"{role}\""),
        |role| format!("REVOKE tenant_acme_app FROM \"{role}\" GRANTED BY tenant_acme_broker"),
    ];
    for (number, loss) in losses.into_iter().enumerate() {
        let mut client = log_in(&proxy).await;
        let role = proxy.served(number).await["role"].as_str().expect("a role").to_owned();
        superuser.batch_execute(&loss(&role)).await.expect("lost");
        client.send(&TERMINATE).await;
        assert_eq!(client.next().await, None, "the session is over");
        let unclean = (number + 1) as f64;
        proxy.metric_reaches("pgsilo_pool_resets_total{result=\"error\"}", unclean).await;
    }
    assert_eq!(proxy.metric("pgsilo_pool_idle_connections").await, 0.0);
}

/// A client that sends other settings each time uses up the routes that are tracked, but not for
/// good.
#[tokio::test]
async fn a_new_route_is_pooled_however_many_came_before() {
    let proxy = Proxy::with(settings("max_idle_per_tenant = 2\n")).await;
    let session = async |application: &str| {
        let parameters = [("user", "app"), ("database", "acme"), ("application_name", application)];
        let (mut client, _) = pool::log_in(&proxy, &mint::token("acme"), &parameters).await;
        client.send(&TERMINATE).await;
        assert_eq!(client.next().await, None, "the session is over");
        proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
    };
    for number in 0..20 {
        session(&number.to_string()).await;
    }
    // For all but the first two another one was evicted.
    proxy.metric_reaches("pgsilo_pool_closed_total{reason=\"evicted\"}", 18.0).await;
    proxy.metric_reaches("pgsilo_pool_idle_connections", 2.0).await;
    session("19").await;
    assert_eq!(proxy.served(20).await["reused"], true, "the newest is kept, whatever came before");
}

/// What one session does, and a query whose answer in the next one must be the same as on a new
/// connection.
const STATE: [(&str, &str); 13] = [
    (
        "CREATE TEMP TABLE secrets AS SELECT 1",
        "SELECT (to_regclass('pg_temp.secrets') IS NULL)::text",
    ),
    ("PREPARE stolen AS SELECT 1", "SELECT count(*)::text FROM pg_prepared_statements"),
    ("SET search_path = pg_temp", "SHOW search_path"),
    ("SET statement_timeout = '1s'", "SHOW statement_timeout"),
    ("SET application_name = 'somebody'", "SHOW application_name"),
    ("SET TimeZone = 'Asia/Tokyo'", "SHOW TimeZone"),
    ("SET client_encoding = 'LATIN1'", "SHOW client_encoding"),
    ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SHOW transaction_read_only"),
    ("LISTEN gossip", "SELECT count(*)::text FROM pg_listening_channels()"),
    (
        "SELECT pg_advisory_lock(42)",
        "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    (
        "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT",
        "SELECT count(*)::text FROM pg_cursors",
    ),
    (
        "CREATE TEMP SEQUENCE numbers; SELECT nextval('numbers')",
        "SELECT (pg_my_temp_schema() = 0 OR to_regclass('pg_temp.numbers') IS NULL)::text",
    ),
    // The last: what comes behind it would be made by another role.
    ("SET ROLE NONE", "SELECT current_user::text"),
];

#[tokio::test]
async fn session_state_does_not_reach_the_next_session() {
    for keys in CHECKS {
        nothing_crosses(&Proxy::with(settings(keys)).await).await;
    }
}

async fn nothing_crosses(proxy: &Proxy) {
    let mut fresh = log_in(proxy).await;
    let mut expected = Vec::new();
    for (_, look) in STATE {
        expected.push(fresh.ask(look).await);
    }
    let had = pid(&mut fresh).await;
    leave(proxy, fresh).await;
    // Each on its own, and all together at last.
    let mut rounds: Vec<Vec<&str>> = STATE.iter().map(|(act, _)| vec![*act]).collect();
    rounds.push(STATE.iter().map(|(act, _)| *act).filter(|act| *act != STATE[7].0).collect());
    for acts in rounds {
        let mut client = log_in(proxy).await;
        for act in &acts {
            run(&mut client, act).await;
        }
        leave(proxy, client).await;
        let mut next = log_in(proxy).await;
        assert_eq!(pid(&mut next).await, had, "{acts:?}: the same connection");
        for ((_, look), expected) in STATE.iter().zip(&expected) {
            assert_eq!(next.ask(look).await, *expected, "{acts:?}: {look}");
        }
        let lastval = query("SELECT lastval()");
        next.send(&lastval).await;
        let answer = next.until(b'Z').await;
        let error = answer.iter().find(|message| message.tag == b'E').expect("refused");
        assert_eq!(error.sqlstate(), "55000", "lastval is not yet defined in this session");
        leave(proxy, next).await;
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 1.0);
}

#[tokio::test]
async fn a_reused_connection_greets_with_the_settings_in_force() {
    for keys in CHECKS {
        let proxy = Proxy::with(settings(keys)).await;
        let mut client = Raw::unix(&proxy.socket()).await;
        let first = client.log_in(&mint::token("acme"), "acme").await;
        for sql in ["SET TimeZone = 'Asia/Tokyo'", "SET application_name = 'somebody'"] {
            run(&mut client, sql).await;
        }
        leave(&proxy, client).await;
        let mut client = Raw::unix(&proxy.socket()).await;
        let second = client.log_in(&mint::token("acme"), "acme").await;
        assert_eq!(but_the_key(&first), but_the_key(&second));
        let key =
            |greeting: &[Message]| greeting.iter().find(|message| message.tag == b'K').cloned();
        assert_ne!(key(&first), key(&second), "a cancel key of its own");
    }
}

fn but_the_key(greeting: &[Message]) -> Vec<Message> {
    greeting.iter().filter(|message| message.tag != b'K').cloned().collect()
}

/// A client may have the database send notices about every query, pgsilo's included.
#[tokio::test]
async fn notices_of_reset_and_check_queries_are_not_forwarded() {
    for keys in CHECKS {
        let proxy = Proxy::with(settings(keys)).await;
        let parameters = [
            ("user", "app"),
            ("database", "acme"),
            ("options", "-c client_min_messages=log -c debug_print_plan=on"),
        ];
        let mut greetings = Vec::new();
        for _ in 0..4 {
            let (mut client, greeting) =
                pool::log_in(&proxy, &mint::token("acme"), &parameters).await;
            client.send(&query("SELECT 1")).await;
            let answer = client.until(b'Z').await;
            assert!(
                answer.iter().any(|message| message.tag == b'N'),
                "a plan, to whom it concerns"
            );
            leave(&proxy, client).await;
            greetings.push(but_the_key(&greeting));
        }
        assert_eq!(proxy.served(3).await["reused"], true);
        assert!(greetings.iter().all(|greeting| *greeting == greetings[0]));
        assert!(greetings[0].iter().all(|message| message.tag != b'N'), "{:?}", greetings[0]);
    }
}

/// Ways to end a session after which its connection is not reused.
#[tokio::test]
async fn a_connection_not_left_clean_is_closed() {
    let proxy = proxy().await;
    let flush = tagged(b'H', b"");
    let parse = tagged(b'P', b"\0SELECT 1\0\0\0");
    // A relay that believed these would owe no answer, and the next session would read the answers.
    let stray = tagged(b'c', b"");
    let slow = query("SELECT pg_sleep(0.3)");
    let forged = [
        &slow[..],
        &query("SELECT 'acme'"),
        &tagged(b'S', b""),
        &stray,
        &stray,
        &stray,
        &TERMINATE,
    ];
    let unclean: [(&str, Vec<Vec<u8>>); 10] = [
        ("a Terminate behind CopyDones that end nothing", vec![forged.concat()]),
        ("no Terminate", vec![]),
        ("an open transaction", vec![query("BEGIN"), TERMINATE.to_vec()]),
        ("a failed one", vec![query("BEGIN"), query("SELECT 1/0"), TERMINATE.to_vec()]),
        ("COPY in progress", vec![query("COPY customers FROM STDIN"), TERMINATE.to_vec()]),
        ("an unfinished extended query", vec![[parse, flush].concat(), TERMINATE.to_vec()]),
        ("a Terminate behind a query", vec![[query("SELECT 1"), TERMINATE.to_vec()].concat()]),
        ("bytes behind the Terminate", vec![[&TERMINATE[..], &query("SELECT 1")].concat()]),
        ("a Terminate in two pieces", vec![TERMINATE[..2].to_vec(), TERMINATE[2..].to_vec()]),
        ("half a message", vec![query("SELECT 1")[..7].to_vec()]),
    ];
    let count = unclean.len();
    for (number, (how, packets)) in unclean.into_iter().enumerate() {
        let mut client = log_in(&proxy).await;
        for packet in packets {
            client.send_anyway(&packet).await;
            if packet[0] == b'Q' && packet.len() > 8 && !packet.ends_with(&TERMINATE) {
                // Answered, or asked for data.
                let mut tag = client.message().await.tag;
                while tag != b'Z' && tag != b'G' {
                    tag = client.message().await.tag;
                }
            } else if packet.len() == 2 {
                proxy.metric_reaches("pgsilo_sessions_active", 1.0).await;
            }
        }
        drop(client);
        proxy.metric_reaches("pgsilo_revocations_total", number as f64 + 1.0).await;
        assert_eq!(proxy.served(number).await["reused"], false, "{how}");
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, count as f64);
    assert_eq!(proxy.metric("pgsilo_pool_requests_total{result=\"hit\"}").await, 0.0);
}

#[tokio::test]
async fn a_connection_that_cannot_be_reset_is_closed() {
    let proxy = proxy().await;
    // A reset is refused: its time is up before it began.
    let mut client = log_in(&proxy).await;
    run(&mut client, "CREATE TEMP TABLE t (x int)").await;
    let had = pid(&mut client).await;
    let superuser = world().superuser("tenant_acme").await;
    // The reset waits for the table's lock, until its patience is over.
    let schema: String = superuser
        .query_one(
            "SELECT nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
             WHERE relname = 't' AND relpersistence = 't'",
            &[],
        )
        .await
        .expect("told")
        .get(0);
    let lock = format!("BEGIN; LOCK TABLE {schema}.t");
    superuser.batch_execute(&lock).await.expect("locked");
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None);
    proxy.metric_reaches("pgsilo_pool_resets_total{result=\"error\"}", 1.0).await;
    superuser.batch_execute("ROLLBACK").await.expect("unlocked");
    let mut next = log_in(&proxy).await;
    assert_ne!(pid(&mut next).await, had);
    assert_eq!(proxy.served(1).await["reused"], false);
}

#[tokio::test]
async fn a_connection_older_than_max_lifetime_is_closed() {
    let proxy = Proxy::with(settings("max_lifetime = \"1s\"\n")).await;
    let client = log_in(&proxy).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut client = client;
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_pool_idle_connections").await, 0.0);
}

#[tokio::test]
async fn under_session_authority_a_connection_is_reused_for_the_same_token_only() {
    let Settings { pool, .. } = settings("");
    let proxy = Proxy::with(Settings { pool, ..session_authority() }).await;
    let (own, other) = (own_token("acme", "read-write"), own_token("acme", "read-write"));
    assert_ne!(own, other, "two tokens of one subject");
    let mut first = Raw::unix(&proxy.socket()).await;
    first.log_in(&own, "acme").await;
    let had = pid(&mut first).await;
    leave(&proxy, first).await;
    let mut second = Raw::unix(&proxy.socket()).await;
    second.log_in(&other, "acme").await;
    assert_ne!(pid(&mut second).await, had);
    let mut third = Raw::unix(&proxy.socket()).await;
    third.log_in(&own, "acme").await;
    assert_eq!(pid(&mut third).await, had);
}

#[tokio::test]
async fn under_proxy_authority_a_connection_is_reused_by_another_subject() {
    let proxy = proxy().await;
    let mut first = log_in(&proxy).await;
    let had = pid(&mut first).await;
    leave(&proxy, first).await;
    let mut other = Raw::unix(&proxy.socket()).await;
    other.log_in(&mint::token_with("acme", json!({ "sub": "colleague" })), "acme").await;
    assert_eq!(pid(&mut other).await, had);
    leave(&proxy, other).await;
    let mut reader = Raw::unix(&proxy.socket()).await;
    reader.log_in(&mint::token_with("acme", json!({ "access": "read-only" })), "acme").await;
    assert_ne!(pid(&mut reader).await, had, "another access is another connection");
}

#[tokio::test]
async fn a_cancel_key_ends_with_its_session_when_the_connection_is_reused() {
    let proxy = proxy().await;
    let mut first = Raw::unix(&proxy.socket()).await;
    let greeting = first.log_in(&mint::token("acme"), "acme").await;
    let key = greeting.iter().find(|message| message.tag == b'K').expect("a key").body.clone();
    leave(&proxy, first).await;
    let mut second = log_in(&proxy).await;
    second.send(&query("SELECT pg_sleep(0.5)::text || 'slept'")).await;
    let mut cancel = Raw::unix(&proxy.socket()).await;
    cancel.send(&pgsilo_sandbox::testing::raw::packet(80_877_102, &key)).await;
    cancel.silence().await;
    let answer = second.until(b'Z').await;
    assert!(answer.iter().any(|message| message.tag == b'D'), "not cancelled: {answer:?}");
    proxy.metric_reaches("pgsilo_cancel_requests_total{result=\"unknown_key\"}", 1.0).await;
}

#[tokio::test]
async fn a_stop_closes_connections_kept_for_reuse() {
    let mut proxy = proxy().await;
    let client = log_in(&proxy).await;
    leave(&proxy, client).await;
    let role = proxy.served(0).await["role"].as_str().expect("a role").to_owned();
    proxy.signal(Signal::TERM);
    assert!(proxy.ended().await.success());
    role_is_of_no_use(&role).await;
}
