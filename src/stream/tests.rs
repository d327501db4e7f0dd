//! Streams between two sockets: what is seen of unread bytes, and how one changes its event loop.

use pgsilo_core::tls::{self, Mode};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::yield_now;
use tokio::time::{Duration, timeout};

use super::*;

fn unix() -> (Stream, Stream) {
    let (one, other) = UnixStream::pair().expect("a pair");
    (Stream::Unix(one), Stream::Unix(other))
}

async fn tcp() -> (Stream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let dialling = TcpStream::connect(listener.local_addr().expect("an address"));
    let (one, other) = tokio::join!(dialling, listener.accept());
    (Stream::Tcp(one.expect("connected")), Stream::Tcp(other.expect("accepted").0))
}

/// Of a server that sends no tickets, as PostgreSQL sends none.
fn certified() -> Arc<rustls::ServerConfig> {
    let own = rcgen::generate_simple_self_signed(["db".to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key);
    let mut config = config.expect("a certificate and its key");
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// Ours, to a database, and the database's.
async fn over_tls() -> (Stream, Stream) {
    let client = tls::client(Mode::Require, None).expect("a client");
    let (ours, mut theirs) = tcp().await;
    let name = ServerName::try_from("db").expect("a name");
    let (ours, accepted) =
        tokio::join!(ours.connect_tls(client, name), theirs.accept_tls(certified()));
    accepted.expect("accepted");
    (ours.expect("a handshake"), theirs)
}

/// Each kind that a connection to a database is of, and its other end.
async fn all() -> [(Stream, Stream); 3] {
    [unix(), tcp().await, over_tls().await]
}

async fn send(stream: &mut Stream, bytes: &[u8]) {
    stream.write_all(bytes).await.expect("written");
    stream.flush().await.expect("flushed");
}

async fn read<const LENGTH: usize>(stream: &mut Stream) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    stream.read_exact(&mut bytes).await.expect("read");
    bytes
}

/// What the system does soon, but not at once.
async fn soon(is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), waiting).await.expect("soon");
}

#[tokio::test]
async fn unread_bytes_are_seen_and_a_close_is_none() {
    for (ours, mut theirs) in [unix(), tcp().await] {
        assert!(!ours.has_unread());
        send(&mut theirs, b"x").await;
        soon(|| ours.has_unread()).await;
        drop(theirs);
        match &ours {
            Stream::Tcp(tcp) => tcp.readable().await.expect("an end"),
            Stream::Unix(unix) => unix.readable().await.expect("an end"),
            other => panic!("{other:?}"),
        }
        assert!(!ours.has_unread());
    }
}

#[tokio::test]
async fn a_detached_connection_resumes_on_another_event_loop() {
    for (mut ours, mut theirs) in all().await {
        send(&mut ours, b"one").await;
        assert_eq!(&read::<3>(&mut theirs).await, b"one");
        let (kind, detached) = (format!("{ours:?}"), ours.detach().expect("detached"));
        let elsewhere = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let mut ours = detached.resume().expect("resumed");
                send(&mut ours, b"two").await;
                (format!("{ours:?}"), read::<5>(&mut ours).await)
            })
        });
        assert_eq!(&read::<3>(&mut theirs).await, b"two");
        send(&mut theirs, b"three").await;
        let (kind_then, read) = elsewhere.join().expect("no panic");
        assert_eq!(&read, b"three");
        let kind_of = |debug: &str| debug.split('(').next().map(str::to_owned);
        assert_eq!(kind_of(&kind_then), kind_of(&kind));
    }
}

#[tokio::test]
async fn a_detached_connection_is_silent_until_its_peer_sends_or_closes() {
    for closes in [false, true] {
        for (ours, mut theirs) in all().await {
            let detached = ours.detach().expect("detached");
            assert!(detached.is_silent(), "{detached:?}");
            match closes {
                true => drop(theirs),
                false => send(&mut theirs, b"x").await,
            }
            soon(|| !detached.is_silent()).await;
        }
    }
}

#[tokio::test]
async fn plaintext_left_inside_tls_is_not_silence() {
    let (mut ours, mut theirs) = over_tls().await;
    send(&mut theirs, b"two").await;
    assert_eq!(&read::<1>(&mut ours).await, b"t");
    let detached = ours.detach().expect("detached");
    assert!(!detached.is_silent());
    let mut ours = detached.resume().expect("resumed");
    assert_eq!(&read::<2>(&mut ours).await, b"wo");
    assert!(ours.detach().expect("detached").is_silent());
}

#[tokio::test]
async fn a_failed_handshake_leaves_no_stream() {
    let (mut client, mut server) = tcp().await;
    send(&mut client, &[0; 64]).await;
    assert!(server.accept_tls(certified()).await.is_err());
    assert!(matches!(server, Stream::Gone));
    let error = server.write_all(b"x").await.expect_err("gone");
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert!(server.detach().is_err());
    let (_database, client) = over_tls().await;
    assert!(client.detach().is_err(), "a client's stays where it is");
}

#[test]
fn exhausted_resources_are_told_from_errors_of_the_peer() {
    let ours = [Errno::NOMEM, Errno::NFILE, Errno::MFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS];
    assert!(ours.into_iter().all(|errno| out_of_resources(&errno.into())));
    let theirs = [Errno::CONNREFUSED, Errno::CONNABORTED, Errno::HOSTUNREACH, Errno::NOENT];
    assert!(!theirs.into_iter().any(|errno| out_of_resources(&errno.into())));
    assert!(!out_of_resources(&io::ErrorKind::OutOfMemory.into()), "of no call to the system");
}
