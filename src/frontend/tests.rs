//! What is read of a client's bytes and what is left, and how a refusal reaches it.

use std::pin::pin;

use futures_util::poll;
use pgsilo_wire::message::raw;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::yield_now;

use super::*;

fn pair() -> (UnixStream, Frontend) {
    let (client, server) = UnixStream::pair().expect("a pair");
    (client, Frontend::new(Stream::Unix(server)))
}

/// As a client sends it, and something behind it.
const BEHIND: &[u8] = b"behind";

fn startup() -> Vec<u8> {
    let body = [&[0, 3, 0, 0], &b"user\0me\0\0"[..]].concat();
    let length = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
    [&length, &body[..]].concat()
}

async fn left(frontend: &mut Frontend) -> Vec<u8> {
    let mut rest = vec![0; BEHIND.len()];
    frontend.stream.read_exact(&mut rest).await.expect("left there");
    rest
}

#[tokio::test]
async fn a_packet_is_read_and_nothing_behind_it() {
    let (mut client, mut frontend) = pair();
    client.write_all(&[&startup(), BEHIND].concat()).await.expect("written");
    let read = frontend.read_initial(true).await.expect("a packet");
    assert!(matches!(read, InitialBytes::Packet(InitialPacket::Startup(_))), "{read:?}");
    assert_eq!(left(&mut frontend).await, BEHIND);
}

#[tokio::test]
async fn a_packet_may_come_byte_by_byte() {
    let (mut client, mut frontend) = pair();
    let packet = startup();
    let (last, first) = packet.split_last().expect("not empty");
    let mut reading = pin!(frontend.read_initial(true));
    for byte in first {
        client.write_all(&[*byte]).await.expect("written");
        yield_now().await;
        assert!(poll!(&mut reading).is_pending());
    }
    client.write_all(&[*last]).await.expect("written");
    assert!(matches!(reading.await, Ok(InitialBytes::Packet(InitialPacket::Startup(_)))));
}

#[tokio::test]
async fn a_length_out_of_bounds_is_refused_before_more_is_read() {
    for length in [0, 3, MIN_BODY + 3, MAX_BODY + 5, u32::MAX as usize] {
        let (mut client, mut frontend) = pair();
        let header = u32::try_from(length).expect("fits").to_be_bytes();
        client.write_all(&header).await.expect("written");
        drop(client);
        let error = frontend.read_initial(true).await.expect_err("out of bounds");
        assert!(
            matches!(error, FrontendError::Startup(StartupError::Length(told)) if told == length),
            "{length}: {error:?}"
        );
    }
}

#[tokio::test]
async fn a_close_before_a_packet_is_no_error_and_one_inside_is() {
    let (client, mut frontend) = pair();
    drop(client);
    assert!(matches!(frontend.read_initial(true).await, Ok(InitialBytes::Closed)));
    for length in [1, 4, 5] {
        let (mut client, mut frontend) = pair();
        client.write_all(&startup()[..length]).await.expect("written");
        drop(client);
        assert!(matches!(frontend.read_initial(true).await, Err(FrontendError::Io(_))), "{length}");
    }
}

#[tokio::test]
async fn a_tls_record_is_recognised_and_left_unread() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    for may_come in [true, false] {
        let dialling = TcpStream::connect(listener.local_addr().expect("an address"));
        let (client, accepted) = tokio::join!(dialling, listener.accept());
        let mut frontend = Frontend::new(Stream::Tcp(accepted.expect("accepted").0));
        let record = [0x16, 3, 1, 0, 7, 1];
        client.expect("connected").write_all(&record).await.expect("written");
        match frontend.read_initial(may_come).await {
            Ok(InitialBytes::TlsRecord) => {
                assert!(may_come);
                assert_eq!(left(&mut frontend).await, record);
            }
            Err(FrontendError::Startup(StartupError::Length(_))) => assert!(!may_come),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_waits_is_answered() {
    let (mut client, mut frontend) = pair();
    client.write_all(&startup()).await.expect("written");
    frontend.read_initial(true).await.expect("a packet");
    frontend.answer(b'S').await.expect("sent");
    assert_eq!(client.read_u8().await.expect("an answer"), b'S');
}

/// Be it with the packet's last byte, or behind all of it.
#[tokio::test]
async fn a_client_that_sends_on_before_the_answer_is_refused() {
    for packets in [vec![[&startup(), BEHIND].concat()], vec![startup(), BEHIND.to_vec()]] {
        let (mut client, mut frontend) = pair();
        let mut bytes = packets.concat();
        let late = bytes.split_off(startup().len() - 1);
        {
            let mut reading = pin!(frontend.read_initial(true));
            client.write_all(&bytes).await.expect("written");
            assert!(poll!(&mut reading).is_pending());
            let with_the_last = if packets.len() == 1 { late.len() } else { 1 };
            client.write_all(&late[..with_the_last]).await.expect("written");
            reading.await.expect("a packet");
            client.write_all(&late[with_the_last..]).await.expect("written");
        }
        // The event loop has heard of it.
        let Stream::Unix(unix) = &frontend.stream else { panic!("a Unix socket") };
        unix.readable().await.expect("open");
        assert!(matches!(frontend.answer(b'S').await, Err(FrontendError::Smuggled)));
        drop(frontend);
        let mut answered = Vec::new();
        let _reset = client.read_to_end(&mut answered).await;
        assert!(answered.is_empty(), "{answered:?}");
    }
}

#[tokio::test]
async fn a_password_is_read_within_its_bound() {
    let body = |length: usize| vec![b'x'; length];
    for length in [0, 1, 99, 100] {
        let (mut client, mut frontend) = pair();
        let mut message = Vec::new();
        raw(&mut message, b'p', &body(length));
        client.write_all(&[&message, BEHIND].concat()).await.expect("written");
        let password = frontend.read_password(100).await.expect("a password");
        assert_eq!(*password, body(length));
        assert_eq!(left(&mut frontend).await, BEHIND);
    }
    for (header, expected) in [
        (&b"p\0\0\0\x69"[..], "a password message of 101 bytes"),
        (b"p\xff\xff\xff\xff", "a password message of 4294967291 bytes"),
        (b"Q\0\0\0\x08", "expected a password message, got 'Q'"),
    ] {
        let (mut client, mut frontend) = pair();
        client.write_all(header).await.expect("written");
        drop(client);
        let error = frontend.read_password(100).await.expect_err("refused");
        assert_eq!(error.to_string(), expected);
    }
}

#[tokio::test]
async fn a_balancers_header_is_read_and_nothing_behind_it() {
    let version_2 =
        [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", &[10, 0, 0, 1, 10, 0, 0, 2, 0, 9, 0, 8][..]];
    for header in [&b"PROXY TCP4 10.0.0.1 10.0.0.2 9 8\r\n"[..], &version_2.concat()] {
        let (mut client, mut frontend) = pair();
        client.write_all(&[header, BEHIND].concat()).await.expect("written");
        let address = frontend.read_balancer().await.expect("a header");
        assert_eq!(address, Some(([10, 0, 0, 1], 9).into()));
        assert_eq!(left(&mut frontend).await, BEHIND);
    }
}

#[tokio::test]
async fn bytes_that_are_no_header_are_refused_within_bounds() {
    let endless = [b"PROXY ", &[b'x'; proxy_protocol::MAX_LINE][..]].concat();
    let too_long = *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff";
    for bytes in [&b"\0\0\0\x08"[..], &endless, &too_long] {
        let (mut client, mut frontend) = pair();
        client.write_all(bytes).await.expect("written");
        drop(client);
        let error = frontend.read_balancer().await.expect_err("no header");
        assert!(matches!(error, FrontendError::Balancer(NoHeader)), "{error:?}");
    }
}

#[tokio::test]
async fn a_refusal_arrives_although_the_client_has_sent_more() {
    let (mut client, mut frontend) = pair();
    client.write_all(&vec![b'x'; LINGER_BYTES / 2]).await.expect("written");
    let last = async {
        frontend.send_last(b"no").await;
        drop(frontend);
    };
    let read = async {
        // It has closed when what was sent is read.
        let mut words = [0; 2];
        client.read_exact(&mut words).await.expect("words");
        client.shutdown().await.expect("half closed");
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.expect("an end, and no reset");
        (words, rest)
    };
    let ((), (words, rest)) = tokio::join!(last, read);
    assert_eq!((&words, rest.len()), (b"no", 0));
}

#[tokio::test]
async fn a_client_that_keeps_sending_is_read_from_up_to_a_bound() {
    let (mut client, mut frontend) = pair();
    let last = async {
        frontend.send_last(b"no").await;
        drop(frontend);
    };
    let flood = async {
        let (chunk, mut sent) = (vec![b'x'; 4096], 0);
        while client.write_all(&chunk).await.is_ok() {
            sent += chunk.len();
        }
        sent
    };
    let ((), sent) = tokio::join!(last, flood);
    // The kernel holds some as well.
    assert!(sent < LINGER_BYTES + 1024 * 1024, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_close_is_waited_for_up_to_a_bound() {
    let (client, mut frontend) = pair();
    let began = Instant::now();
    let _over = timeout_at(began + 2 * LINGER, frontend.send_last(b"no")).await;
    assert_eq!(began.elapsed(), LINGER);
    drop(client);
}
