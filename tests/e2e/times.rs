//! Time that no session can lift: transactions, waiting in one, a session's age, whatever the
//! session sets in the database and however it sends what it sends.

use std::time::Duration;

use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Message, Raw, query, tagged};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use tokio::net::TcpSocket;

const TRANSACTION: (&str, &str) = ("25P04", "terminating connection due to transaction timeout");
const WAITING: (&str, &str) =
    ("25P03", "terminating connection due to idle-in-transaction timeout");
const AGE: (&str, &str) =
    ("57P01", "terminating connection because it has reached its maximum age");

async fn with(limits: &str) -> Proxy {
    let listeners = PLAIN.to_owned() + UNIX;
    Proxy::with(Settings { listeners, limits: limits.to_owned(), ..Settings::default() }).await
}

/// A session that has switched off all that the database would end it by.
async fn session(proxy: &Proxy) -> (Raw, String) {
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    for name in ["transaction_timeout", "idle_in_transaction_session_timeout", "statement_timeout"]
    {
        client.ask(&format!("SELECT set_config('{name}', '0', false)")).await;
    }
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    (client, pid)
}

/// Reads on until the session is told of its end, which is the last that it reads.
async fn ends(client: &mut Raw, (sqlstate, text): (&str, &str)) {
    let mut last: Option<Message> = None;
    while let Some(message) = client.next().await {
        last = Some(message);
    }
    let last = last.expect("it is told");
    assert_eq!((last.sqlstate().as_str(), last.field(b'M').as_deref()), (sqlstate, Some(text)));
    assert_eq!(last.field(b'S').as_deref(), Some("FATAL"));
}

async fn ended(proxy: &Proxy, ending: &str, count: usize) {
    proxy
        .metric_reaches(&format!("pgsilo_endings_total{{ending=\"{ending}\"}}"), count as f64)
        .await;
    eventually("the events of them", async || {
        let events = proxy.events("ended");
        (events.iter().filter(|event| event["ending"] == ending).count() >= count).then_some(())
    })
    .await;
}

#[tokio::test]
pub(crate) async fn transaction_timeout_holds_whatever_the_session_sets() {
    let proxy = with("transaction_timeout = \"1s\"\nidle_in_transaction_timeout = \"0s\"\n").await;
    let (mut idle, _pid) = session(&proxy).await;
    // A statement of its own is a transaction as well.
    let (mut alone, pid) = session(&proxy).await;
    alone.send(&query("SELECT pg_sleep(600)")).await;
    ends(&mut alone, TRANSACTION).await;
    world().has_ended(&pid).await;
    // Waiting in one and working in one are both in it, failed ones are, and what a Sync ends.
    let (mut waiting, pid) = session(&proxy).await;
    waiting.ask("BEGIN; SELECT 'begun'").await;
    ends(&mut waiting, TRANSACTION).await;
    world().has_ended(&pid).await;
    let (mut failed, pid) = session(&proxy).await;
    failed.send(&query("BEGIN; SELECT 1/0")).await;
    failed.until(b'Z').await;
    ends(&mut failed, TRANSACTION).await;
    world().has_ended(&pid).await;
    let (mut unsynced, pid) = session(&proxy).await;
    let parse = tagged(b'P', b"\0SELECT 1\0\0\0");
    let run = [tagged(b'B', b"\0\0\0\0\0\0\0\0"), tagged(b'E', b"\0\0\0\0\0"), tagged(b'H', b"")];
    unsynced.send(&[parse, run.concat()].concat()).await;
    unsynced.until(b'C').await;
    ends(&mut unsynced, TRANSACTION).await;
    world().has_ended(&pid).await;
    // So is one that makes itself look as if it had something to do, which it may.
    let (mut parsing, pid) = session(&proxy).await;
    parsing.ask("BEGIN; SELECT 'begun'").await;
    parsing.send(&tagged(b'P', b"\0SELECT 1\0\0\0")).await;
    ends(&mut parsing, TRANSACTION).await;
    world().has_ended(&pid).await;
    ended(&proxy, "transaction_timeout", 5).await;
    // A session that was idle meanwhile was never in one.
    assert_eq!(idle.ask("SELECT 'still here'").await, "still here");
}

/// What a client sends beside the protocol never makes a session look idle that is not.
#[tokio::test]
async fn no_client_can_make_its_transaction_look_over() {
    let proxy = with("transaction_timeout = \"1s\"\nidle_in_transaction_timeout = \"0s\"\n").await;
    let sleep = [
        tagged(b'P', b"\0SELECT pg_sleep(600)\0\0\0"),
        tagged(b'B', b"\0\0\0\0\0\0\0\0"),
        tagged(b'E', b"\0\0\0\0\0"),
        tagged(b'S', b""),
    ]
    .concat();
    let ways: [(&str, Vec<u8>); 4] = [
        ("claims that a COPY swallowed its Sync", [sleep.clone(), tagged(b'c', b"")].concat()),
        ("gives up a COPY that is none", [sleep.clone(), tagged(b'f', b"x\0")].concat()),
        ("sends a Terminate behind it", [sleep, tagged(b'X', b"")].concat()),
        ("stops in the middle of a message", query("SELECT 1; SELECT 2")[..12].to_vec()),
    ];
    for (number, (way, bytes)) in (1..).zip(ways) {
        let (mut client, pid) = session(&proxy).await;
        client.send(&bytes).await;
        proxy
            .metric_reaches("pgsilo_endings_total{ending=\"transaction_timeout\"}", number as f64)
            .await;
        world().has_ended(&pid).await;
        drop(client);
        println!("{way}: ended");
    }
    // What does not look like messages has no boundary any more; the database closes.
    let (mut client, pid) = session(&proxy).await;
    client.send(&[b'Q', 0, 0, 0, 1]).await;
    world().has_ended(&pid).await;
    while client.next().await.is_some() {}
}

/// A session in a COPY, and what has begun it, as drivers send it: with a Sync that the COPY
/// swallows.
async fn copying(proxy: &Proxy) -> (Raw, Vec<u8>) {
    let (mut copied, _pid) = session(proxy).await;
    copied.ask("CREATE TEMP TABLE t (n int); SELECT 'made'").await;
    let begin = [
        tagged(b'P', b"\0COPY t FROM STDIN\0\0\0"),
        tagged(b'B', b"\0\0\0\0\0\0\0\0"),
        tagged(b'E', b"\0\0\0\0\0"),
        tagged(b'S', b""),
    ];
    let begin = begin.concat();
    copied.send(&begin).await;
    copied.until(b'G').await;
    (copied, begin)
}

/// A COPY of a driver that sends a Sync too many leaves the session idle, for as long as it likes.
#[tokio::test]
async fn a_copy_that_swallows_a_sync_leaves_nothing_behind() {
    let proxy = with("transaction_timeout = \"1s\"\nidle_in_transaction_timeout = \"1s\"\n").await;
    let (mut copied, begin) = copying(&proxy).await;
    copied.send(&[tagged(b'd', b"1\n"), tagged(b'c', b""), tagged(b'S', b"")].concat()).await;
    copied.until(b'Z').await;
    // The same, given up, by the client or for what is in it; then a good one again.
    for (data, error) in [(&b""[..], "57014"), (b"no number\n", "22P02")] {
        copied.send(&begin).await;
        copied.until(b'G').await;
        copied
            .send(&[tagged(b'd', data), tagged(b'f', b"no more\0"), tagged(b'S', b"")].concat())
            .await;
        let complaint = copied.until(b'E').await.pop().expect("an error");
        assert_eq!(complaint.sqlstate(), error);
        copied.until(b'Z').await;
        assert_eq!(copied.ask("SELECT count(*)::text FROM t").await, "1");
    }
    // As long as another one's time takes, and some more.
    for _ in 0..2 {
        let (mut other, _pid) = session(&proxy).await;
        other.ask("BEGIN; SELECT 'begun'").await;
        while other.next().await.is_some() {}
    }
    assert_eq!(copied.ask("SELECT count(*)::text FROM t").await, "1");
}

/// Whether all of it was answered shows with the next request; but it does not wait in a
/// transaction.
#[tokio::test]
async fn an_aborted_copy_does_not_count_as_idle_in_transaction() {
    let proxy = with("idle_in_transaction_timeout = \"1s\"\n").await;
    let (mut copied, _begin) = copying(&proxy).await;
    copied.send(&[tagged(b'f', b"no more\0"), tagged(b'S', b"")].concat()).await;
    copied.until(b'Z').await;
    for _ in 0..2 {
        let (mut other, _pid) = session(&proxy).await;
        other.ask("BEGIN; SELECT 'begun'").await;
        while other.next().await.is_some() {}
    }
    assert_eq!(copied.ask("SELECT 'still here'").await, "still here");
}

#[tokio::test]
pub(crate) async fn a_session_idle_in_transaction_is_ended_and_a_working_one_is_not() {
    let proxy = with("idle_in_transaction_timeout = \"1s\"\n").await;
    let (mut working, _pid) = session(&proxy).await;
    working.send(&query("BEGIN; SELECT pg_sleep(3), 'done'")).await;
    let (mut idle, _pid) = session(&proxy).await;
    let (mut waiting, pid) = session(&proxy).await;
    waiting.ask("BEGIN; SELECT 'begun'").await;
    ends(&mut waiting, WAITING).await;
    world().has_ended(&pid).await;
    let answered = working.until(b'Z').await;
    assert!(answered.iter().all(|message| message.tag != b'E'), "{answered:?}");
    ends(&mut working, WAITING).await;
    ended(&proxy, "idle_in_transaction", 2).await;
    assert_eq!(idle.ask("SELECT 'still here'").await, "still here");
}

/// What the database says waits behind answers that the client takes slowly. That it was outside a
/// transaction then says nothing of now.
#[tokio::test]
async fn a_client_that_reads_slowly_does_not_hide_how_old_its_transaction_is() {
    const ANSWERS: usize = 200;
    const BYTES: usize = 200_000;
    let proxy = with("transaction_timeout = \"2s\"\nidle_in_transaction_timeout = \"0s\"\n").await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("set");
    let mut slow = Raw::over(socket.connect(proxy.address()).await.expect("connected"));
    slow.log_in(&mint::token("acme"), "acme").await;
    let pid = slow.ask("SELECT pg_backend_pid()::text").await;
    let answer = query(&format!("SELECT repeat('x', {BYTES})"));
    slow.send(&[answer.repeat(ANSWERS), query("BEGIN")].concat()).await;
    let over = "pgsilo_endings_total{ending=\"transaction_timeout\"}";
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let mut taken = 0;
    while proxy.metric(over).await < 1.0 {
        pace.tick().await;
        // Ended in the middle of an answer, as it takes so long to take one.
        match slow.bytes(BYTES / 4).await {
            0 => break,
            bytes => taken += bytes,
        }
    }
    assert!(taken < ANSWERS / 2 * BYTES, "{taken} bytes, all of them old");
    proxy.metric_reaches(over, 1.0).await;
    world().has_ended(&pid).await;
}

/// A listener that does not read holds the queue of the whole cluster up.
#[tokio::test]
async fn a_listening_session_that_reads_nothing_is_ended_in_time() {
    let proxy = with("transaction_timeout = \"1s\"\n").await;
    let (mut deaf, pid) = session(&proxy).await;
    deaf.ask("LISTEN gossip; SELECT 'listens'").await;
    let superuser = world().superuser("tenant_acme").await;
    eventually("the listener to hold the queue up", async || {
        let tell = "SELECT count(pg_notify('gossip', repeat('x', 7900) || n)) FROM generate_series(1, 200) n";
        superuser.query_one(tell, &[]).await.expect("told");
        let waits =
            "SELECT 1 FROM pg_stat_activity WHERE pid = $1::text::int AND wait_event = 'ClientWrite'";
        let stuck = superuser.query_opt(waits, &[&pid]).await.expect("asked").is_some();
        // It may be over already: it had a second.
        let over = proxy.events("ended").iter().any(|event| event["ending"] == "transaction_timeout");
        (stuck || over).then_some(())
    })
    .await;
    ended(&proxy, "transaction_timeout", 1).await;
    world().has_ended(&pid).await;
    eventually("the queue to be empty", async || {
        let usage = "SELECT pg_notification_queue_usage()";
        // The tail moves when somebody notifies.
        superuser.query_one("SELECT pg_notify('gossip', '')", &[]).await.expect("told");
        let used: f64 = superuser.query_one(usage, &[]).await.expect("asked").get(0);
        (used == 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
pub(crate) async fn a_session_ends_at_its_maximum_age() {
    let proxy = with("max_session_age = \"2s\"\n").await;
    let (mut idle, pid) = session(&proxy).await;
    let (mut busy, _pid) = session(&proxy).await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    ends(&mut idle, AGE).await;
    world().has_ended(&pid).await;
    ends(&mut busy, AGE).await;
    ended(&proxy, "session_age", 2).await;
}

#[tokio::test]
async fn a_tenant_may_have_bounds_of_its_own() {
    const OWN: &str = "[tenant.limits]\nmax_sessions = 1\ntransaction_timeout = \"1s\"\n\n[[tenant]]\nid = \"globex\"";
    let proxy = with("").await;
    proxy.reload(&proxy.tenants().replacen("[[tenant]]\nid = \"globex\"", OWN, 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    let mut globex = Vec::new();
    for _ in 0..2 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.log_in(&mint::token("globex"), "globex").await;
        client.ask("BEGIN; SELECT 'begun'").await;
        globex.push(client);
    }
    let (mut acme, _pid) = session(&proxy).await;
    let second = proxy.connect(&mint::token("acme"), "acme").await.expect_err("one is enough");
    let second = second.as_db_error().expect("an error of the server");
    assert_eq!(second.message(), "too many connections for tenant \"acme\"");
    acme.ask("BEGIN; SELECT 'begun'").await;
    ends(&mut acme, TRANSACTION).await;
    for client in &mut globex {
        assert_eq!(client.ask("SELECT 'goes on'").await, "goes on");
    }
}
