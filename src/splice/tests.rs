//! The relay between two sockets: what passes, what a client reads last, and what the database
//! does.

use std::cell::Cell;

use pgsilo_wire::message::{raw, split};
use proptest::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::yield_now;

use super::*;

/// Gives one termination, when it is told to; and how far the session has come.
#[derive(Default)]
struct Teller {
    termination: Cell<Option<Termination>>,
    given: Notify,
    progress: Progress,
}

impl Teller {
    fn end_within(&self, left: Duration) {
        let deadline = BootTime::now() + left;
        self.termination.set(Some(Termination { ending: Ending::Drained, deadline }));
        self.given.notify_one();
    }
}

impl Terminator for Teller {
    async fn next_before(&self, _current: Option<Termination>) -> Termination {
        loop {
            if let Some(termination) = self.termination.take() {
                return termination;
            }
            self.given.notified().await;
        }
    }
}

const NO_LIMITS: TimeLimits =
    TimeLimits { idle: None, idle_in_transaction: None, transaction: None, session: None };

/// How a session ended, whether its connection could be used again, and what was counted.
struct Over {
    ending: Ending,
    is_reusable: bool,
    bytes: (u64, u64),
}

/// Relays until the session has ended, while `peers` is the client and the database.
async fn relay<T>(
    intercepts_terminate: bool,
    limits: TimeLimits,
    peers: impl AsyncFnOnce(UnixStream, UnixStream, &Teller) -> T,
) -> (Over, T) {
    let (client, frontend) = UnixStream::pair().expect("a pair");
    let (database, backend) = UnixStream::pair().expect("a pair");
    let teller = Teller::default();
    let mut frontend = Frontend::new(Stream::Unix(frontend));
    let mut backend = Stream::Unix(backend);
    let process = Process::of(None);
    let dead_peer_timeout = Duration::from_secs(60);
    let mut relay = Relay::new(
        &mut frontend,
        &mut backend,
        &process,
        &teller.progress,
        intercepts_terminate,
        dead_peer_timeout,
        &limits,
    );
    let relayed = async {
        let stopped = relay.run(&teller).await;
        let End { ending, .. } = relay.finish(stopped, "0").await;
        let bytes = teller.progress.bytes();
        Over { ending, is_reusable: relay.is_reusable(), bytes }
    };
    tokio::join!(relayed, peers(client, database, &teller))
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    raw(&mut bytes, tag, body);
    bytes
}

fn query(body: &[u8]) -> Vec<u8> {
    message(b'Q', body)
}

/// An answer with rows of that many bytes.
fn answer(rows: &[usize], status: u8) -> Vec<u8> {
    let rows = rows.iter().map(|length| message(b'D', &vec![b'x'; *length]));
    let mut bytes = rows.flatten().collect::<Vec<_>>();
    raw(&mut bytes, b'C', b"SELECT\0");
    raw(&mut bytes, b'Z', &[status]);
    bytes
}

/// Reads one message.
async fn read_message(stream: &mut UnixStream) -> (u8, Vec<u8>) {
    let tag = stream.read_u8().await.expect("a tag");
    let length = stream.read_u32().await.expect("a length");
    let mut body = vec![0; length as usize - 4];
    stream.read_exact(&mut body).await.expect("a body");
    (tag, body)
}

async fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.expect("read");
    bytes
}

/// What the client reads last.
fn last_words() -> Vec<u8> {
    Ending::Drained.message("0").expect("a message")
}

#[tokio::test]
async fn both_directions_pass_unchanged_and_a_terminate_ends_the_session() {
    let (asked, answered) = (query(b"SELECT 1\0"), answer(&[10, 0, 70_000], b'I'));
    let (over, ()) = relay(false, NO_LIMITS, async |mut client, mut database, _| {
        client.write_all(&asked).await.expect("asked");
        assert_eq!(read_message(&mut database).await, (b'Q', b"SELECT 1\0".to_vec()));
        database.write_all(&answered).await.expect("answered");
        let mut read = vec![0; answered.len()];
        client.read_exact(&mut read).await.expect("the answer");
        assert_eq!(read, answered);
        client.write_all(&TERMINATE).await.expect("asked");
        client.shutdown().await.expect("closed");
        assert_eq!(read_to_end(&mut database).await, TERMINATE);
        drop(database);
        assert_eq!(read_to_end(&mut client).await, b"");
    })
    .await;
    assert_eq!(over.ending, Ending::ClientLeft);
    assert!(!over.is_reusable);
}

#[tokio::test]
async fn under_reuse_a_terminate_is_withheld_from_an_idle_database_only() {
    let (over, ()) = relay(true, NO_LIMITS, async |mut client, database, _| {
        client.write_all(&TERMINATE).await.expect("asked");
        assert_eq!(read_to_end(&mut client).await, b"");
        let silence = database.try_read(&mut [0]).expect_err("silence");
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
    })
    .await;
    assert!(over.is_reusable);

    for open in [&answer(&[], b'T')[..], b""] {
        let (over, ()) = relay(true, NO_LIMITS, async |mut client, mut database, _| {
            client.write_all(&query(b"BEGIN\0")).await.expect("asked");
            read_message(&mut database).await;
            database.write_all(open).await.expect("answered");
            client.read_exact(&mut vec![0; open.len()]).await.expect("the answer");
            client.write_all(&TERMINATE).await.expect("asked");
            client.shutdown().await.expect("closed");
            assert_eq!(read_to_end(&mut database).await, TERMINATE);
        })
        .await;
        assert!(!over.is_reusable, "in a transaction, or unanswered");
    }
}

#[tokio::test]
async fn a_database_that_closes_is_left_when_it_said_why_and_lost_when_not() {
    let fatal = message(b'E', b"SFATAL\0C57P01\0\0");
    for (said, ending) in [(&fatal[..], Ending::BackendLeft), (&fatal[..7], Ending::BackendLost)] {
        let (over, read) = relay(false, NO_LIMITS, async |mut client, mut database, _| {
            database.write_all(said).await.expect("said");
            drop(database);
            read_to_end(&mut client).await
        })
        .await;
        assert_eq!(over.ending, ending);
        assert_eq!(read, said, "nothing is written into the middle of a message");
    }
    let (over, read) = relay(false, NO_LIMITS, async |mut client, database, _| {
        drop(database);
        read_to_end(&mut client).await
    })
    .await;
    assert_eq!(over.ending, Ending::BackendLost);
    assert_eq!(read, Ending::BackendLost.message("0").expect("a message"));
}

#[tokio::test]
async fn a_client_that_vanishes_has_its_database_told() {
    let (over, read) = relay(true, NO_LIMITS, async |client, mut database, _| {
        drop(client);
        read_to_end(&mut database).await
    })
    .await;
    assert_eq!(over.ending, Ending::ClientLeft);
    assert_eq!(read, TERMINATE);
}

#[tokio::test]
async fn an_idle_session_reads_its_ending_and_the_database_a_terminate() {
    let (over, ()) = relay(false, NO_LIMITS, async |mut client, mut database, teller| {
        teller.end_within(Duration::ZERO);
        assert_eq!(read_to_end(&mut client).await, last_words());
        drop(client);
        assert_eq!(read_to_end(&mut database).await, TERMINATE);
    })
    .await;
    assert_eq!(over.ending, Ending::Drained);
}

/// The database waits: for the rest of its message the relay waits, but not for ever.
#[tokio::test]
async fn a_session_whose_database_stops_in_a_message_ends_without_words() {
    let said = &answer(&[100], b'I')[..50];
    let (over, read) = relay(false, NO_LIMITS, async |mut client, mut database, teller| {
        client.write_all(&query(b"\0")).await.expect("asked");
        read_message(&mut database).await;
        database.write_all(said).await.expect("said");
        client.read_exact(&mut [0; 50]).await.expect("it");
        teller.end_within(Duration::ZERO);
        let read = read_to_end(&mut client).await;
        drop(client);
        assert_eq!(read_to_end(&mut database).await, TERMINATE);
        read
    })
    .await;
    assert_eq!((over.ending, read), (Ending::Drained, Vec::new()));
}

#[tokio::test]
async fn what_a_session_does_and_what_will_end_it_can_be_read() {
    let (_, ()) = relay(false, NO_LIMITS, async |mut client, mut database, teller| {
        let progress = &teller.progress;
        let mut exchange = async |answer: &[u8]| {
            client.write_all(&query(b"\0")).await.expect("asked");
            read_message(&mut database).await;
            assert_eq!(progress.activity(), Activity::Active);
            database.write_all(answer).await.expect("answered");
            client.read_exact(&mut vec![0; answer.len()]).await.expect("the answer");
        };
        assert_eq!(progress.activity(), Activity::Idle);
        exchange(&answer(&[1], b'T')).await;
        assert_eq!(progress.activity(), Activity::IdleInTransaction);
        assert!(progress.termination().is_none());
        teller.end_within(Duration::from_secs(60));
        while progress.termination().is_none() {
            yield_now().await;
        }
        exchange(&answer(&[], b'I')).await;
        assert_eq!(progress.activity(), Activity::Idle);
        assert_eq!(
            progress.termination().map(|termination| termination.ending),
            Some(Ending::Drained)
        );
        assert_eq!(read_to_end(&mut client).await, last_words());
    })
    .await;
}

/// What a client has not taken is bounded: the database is not read on.
#[tokio::test]
async fn a_client_that_does_not_read_stops_its_database() {
    let (_, ()) = relay(false, NO_LIMITS, async |client, database, _| {
        let row = message(b'D', &[b'x'; 60_000]);
        let mut written = 0;
        // Silence on a full socket is an event: nothing becomes writable while the relay has its
        // turns.
        let mut refused = 0;
        while refused < 100 {
            match database.try_write(&row) {
                Ok(n) => (written, refused) = (written + n, 0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    refused += 1;
                    yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(written < 4 * 1024 * 1024, "two sockets' buffers and one of ours: {written}");
        drop(client);
    })
    .await;
}

const READY: &[u8] = b"Z\0\0\0\x05I";

/// One request and its answer: the rows' lengths, and in what pieces the database writes it.
#[derive(Clone, Debug)]
struct Exchange {
    rows: Vec<usize>,
    pieces: Vec<usize>,
}

fn exchange() -> impl Strategy<Value = Exchange> {
    let row = prop_oneof![4 => 0..200_usize, 1 => 0..150_000_usize];
    let piece = prop_oneof![1 => 1..6_usize, 2 => 1..100_000_usize];
    (prop::collection::vec(row, 0..5), prop::collection::vec(piece, 1..6))
        .prop_map(|(rows, pieces)| Exchange { rows, pieces })
}

/// Writes an answer in pieces, until the relay has ended. In some hundreds at most: the relay waits
/// for a database, but not for ever.
async fn write_in_pieces(stream: &mut UnixStream, mut bytes: &[u8], pieces: &[usize]) -> bool {
    let least = bytes.len() / 256;
    for piece in pieces.iter().cycle() {
        let (now, rest) = bytes.split_at(bytes.len().min(least.max(*piece)));
        if stream.write_all(now).await.is_err() {
            return false;
        }
        bytes = rest;
        if bytes.is_empty() {
            return true;
        }
        yield_now().await;
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// However the answers come, and whenever the termination does: what the client reads is the
    /// beginning of what the database said, up to a message's end, and behind that why the session
    /// ended.
    #[test]
    fn an_ending_stands_between_two_messages(
        exchanges in prop::collection::vec(exchange(), 1..6),
        terminated_behind in 0..400_000_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()
            .expect("a runtime");
        let (over, (said, read)) = runtime.block_on(relay(
            false,
            NO_LIMITS,
            async |client, mut database, teller| {
                let answers = async {
                    let mut said = Vec::new();
                    for Exchange { rows, pieces } in &exchanges {
                        if read_message(&mut database).await.0 == b'X' {
                            return said;
                        }
                        let answer = answer(rows, b'I');
                        said.extend_from_slice(&answer);
                        if !write_in_pieces(&mut database, &answer, pieces).await {
                            return said;
                        }
                    }
                    read_to_end(&mut database).await;
                    said
                };
                let exchanges = &exchanges;
                let asks = async move {
                    let mut client = client;
                    let (mut read, mut buffer) = (Vec::new(), vec![0; 8192]);
                    let (mut unasked, mut is_terminated) = (exchanges.len(), false);
                    loop {
                        let is_answered = read.is_empty() || read.ends_with(READY);
                        if is_answered && unasked > 0 {
                            unasked -= 1;
                            let _ended_meanwhile = client.write_all(&query(b"\0")).await;
                        } else if !is_terminated && (is_answered || read.len() >= terminated_behind) {
                            is_terminated = true;
                            teller.end_within(Duration::ZERO);
                        }
                        match client.read(&mut buffer).await {
                            Ok(0) | Err(_) => return read,
                            Ok(n) => read.extend_from_slice(&buffer[..n]),
                        }
                    }
                };
                tokio::join!(answers, asks)
            },
        ));
        prop_assert_eq!(over.ending, Ending::Drained);
        let passed = read.strip_suffix(&last_words()[..]).expect("the last words");
        prop_assert!(said.starts_with(passed), "what the database said, unchanged");
        let whole: usize = split(passed).map(|(_, body)| body.len() + 5).sum();
        prop_assert_eq!(whole, passed.len(), "up to a message's end");
        prop_assert_eq!(over.bytes.1, passed.len() as u64, "all of it is counted");
    }
}
