//! Connections that serve one session after the other (`backend.reuse = "reset"`): nothing of a
//! session reaches the next, and what was not left clean is closed.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Message, Raw, query, tagged};
use pgsilo_sandbox::testing::world::{World, world};
use rustix::process::Signal;
use serde_json::json;

use crate::leases::role_is_of_no_use;
use crate::openbao::{own_token, session_authority};
use crate::warm;

const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

fn settings(warm: &str, backend: &str) -> Settings {
    Settings {
        warm: format!("idle_timeout = \"60s\"\n{warm}"),
        backend: format!("reuse = \"reset\"\n{backend}"),
        ..Settings::default()
    }
}

async fn proxy() -> Proxy {
    Proxy::with(settings("", "")).await
}

/// Whether a connection is asked whose it is before it is taken: always, and not within a minute.
const ASKED: [&str; 2] = ["check_after = \"0s\"\n", "check_after = \"60s\"\n"];

async fn log_in(proxy: &Proxy) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client
}

/// Says goodbye as every driver does, and waits until the connection waits for another.
async fn leave(proxy: &Proxy, mut client: Raw) {
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None, "the session is over");
    proxy.metric_reaches("pgsilo_warm_connections", 1.0).await;
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
async fn the_next_session_has_the_same_connection_and_lease() {
    let proxy = proxy().await;
    let mut first = log_in(&proxy).await;
    let had = pid(&mut first).await;
    leave(&proxy, first).await;
    let mut second = log_in(&proxy).await;
    assert_eq!(pid(&mut second).await, had);
    let (one, two) = (proxy.served(0).await, proxy.served(1).await);
    assert_eq!(one["role"], two["role"]);
    assert_eq!((&one["warm"], &one["reused"]), (&json!(false), &json!(false)));
    assert_eq!((&two["warm"], &two["reused"]), (&json!(true), &json!(true)));
    assert_ne!(one["session"], two["session"]);
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 1.0, "and nothing is made ahead");
    let ended = proxy.event("ended", |_| true).await;
    assert_eq!(ended["ending"], "client_left");
}

#[tokio::test]
async fn a_database_that_is_another_tenants_when_a_session_leaves_serves_nobody() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, settings("", "")).await;
    let token = mint::token_of(&world, "acme");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token, "acme").await;
    let sql = "ALTER DATABASE tenant_acme SET pgsilo.tenant = 'globex'";
    world.superuser("postgres").await.batch_execute(sql).await.expect("sealed for another");
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None, "the session is over");
    proxy.metric_reaches("pgsilo_warm_total{result=\"unclean\"}", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_warm_connections").await, 0.0);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
}

/// RESET ROLE asks nobody whether the role is still there.
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
        proxy.metric_reaches("pgsilo_warm_total{result=\"unclean\"}", unclean).await;
    }
    assert_eq!(proxy.metric("pgsilo_warm_connections").await, 0.0);
}

/// Whoever names other settings each time takes up the room for accounts, but not for good.
#[tokio::test]
async fn the_next_route_finds_room_however_many_there_were() {
    let proxy = Proxy::with(settings("max_per_tenant = 2\n", "")).await;
    let session = async |application: &str| {
        let parameters = [("user", "app"), ("database", "acme"), ("application_name", application)];
        let (mut client, _) = warm::log_in(&proxy, &mint::token("acme"), &parameters).await;
        client.send(&TERMINATE).await;
        assert_eq!(client.next().await, None, "the session is over");
        proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
    };
    for number in 0..20 {
        session(&number.to_string()).await;
    }
    // All but the first two had another go for them.
    proxy.metric_reaches("pgsilo_warm_total{result=\"expired\"}", 18.0).await;
    proxy.metric_reaches("pgsilo_warm_connections", 2.0).await;
    session("19").await;
    assert_eq!(proxy.served(20).await["reused"], true, "the newest is kept, whatever came before");
}

/// What one session does, and what the next one must not see of it: a question whose answer is the
/// same as in a session that nobody was before.
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
async fn nothing_of_a_session_reaches_the_next() {
    for asked in ASKED {
        nothing_crosses(&Proxy::with(settings(asked, "")).await).await;
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
async fn a_greeting_tells_what_is_so() {
    for asked in ASKED {
        let proxy = Proxy::with(settings(asked, "")).await;
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

/// A client may have the database say much about every question, pgsilo's included.
#[tokio::test]
async fn what_a_database_says_of_our_questions_is_told_to_nobody() {
    for asked in ASKED {
        let proxy = Proxy::with(settings(asked, "")).await;
        let parameters = [
            ("user", "app"),
            ("database", "acme"),
            ("options", "-c client_min_messages=log -c debug_print_plan=on"),
        ];
        let mut greetings = Vec::new();
        for _ in 0..4 {
            let (mut client, greeting) =
                warm::log_in(&proxy, &mint::token("acme"), &parameters).await;
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

/// How a session may end so that its connection is nobody's any more.
#[tokio::test]
async fn what_was_not_left_clean_is_closed() {
    let proxy = proxy().await;
    let flush = tagged(b'H', b"");
    let parse = tagged(b'P', b"\0SELECT 1\0\0\0");
    // Whoever believes these has nothing left to answer, and the next session reads the answers.
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
        ("a goodbye behind CopyDones that end nothing", vec![forged.concat()]),
        ("no goodbye", vec![]),
        ("an open transaction", vec![query("BEGIN"), TERMINATE.to_vec()]),
        ("a failed one", vec![query("BEGIN"), query("SELECT 1/0"), TERMINATE.to_vec()]),
        ("COPY in progress", vec![query("COPY customers FROM STDIN"), TERMINATE.to_vec()]),
        ("an unfinished extended query", vec![[parse, flush].concat(), TERMINATE.to_vec()]),
        ("a goodbye behind a query", vec![[query("SELECT 1"), TERMINATE.to_vec()].concat()]),
        ("bytes behind the goodbye", vec![[&TERMINATE[..], &query("SELECT 1")].concat()]),
        ("a goodbye in two pieces", vec![TERMINATE[..2].to_vec(), TERMINATE[2..].to_vec()]),
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
    assert_eq!(proxy.metric("pgsilo_warm_total{result=\"used\"}").await, 0.0);
}

#[tokio::test]
async fn what_a_reset_cannot_bring_back_is_closed() {
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
    proxy.metric_reaches("pgsilo_warm_total{result=\"unclean\"}", 1.0).await;
    superuser.batch_execute("ROLLBACK").await.expect("unlocked");
    let mut next = log_in(&proxy).await;
    assert_ne!(pid(&mut next).await, had);
    assert_eq!(proxy.served(1).await["reused"], false);
}

#[tokio::test]
async fn a_connection_is_closed_when_it_is_old() {
    let proxy = Proxy::with(settings("", "max_age = \"1s\"\n")).await;
    let client = log_in(&proxy).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut client = client;
    client.send(&TERMINATE).await;
    assert_eq!(client.next().await, None);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
    assert_eq!(proxy.metric("pgsilo_warm_connections").await, 0.0);
}

#[tokio::test]
async fn under_session_authority_nobody_takes_it_but_who_shows_the_same_token() {
    let Settings { warm, backend, .. } = settings("", "");
    let proxy = Proxy::with(Settings { warm, backend, ..session_authority() }).await;
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
async fn another_subject_takes_it_under_the_proxys_authority() {
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
async fn a_cancel_key_dies_with_its_session_not_with_the_connection() {
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
async fn a_stop_lets_go_of_what_waits() {
    let mut proxy = proxy().await;
    let client = log_in(&proxy).await;
    leave(&proxy, client).await;
    let role = proxy.served(0).await["role"].as_str().expect("a role").to_owned();
    proxy.signal(Signal::TERM);
    assert!(proxy.ended().await.success());
    role_is_of_no_use(&role).await;
}
