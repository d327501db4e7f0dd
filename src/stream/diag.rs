//! What the kernel knows of a TCP connection of this machine, by sock_diag(7): it is what `ss -i`
//! shows. TCP_INFO says the same, but no safe wrapper of it is to be had.
//!
//! A request is answered within the call that sends it, so asking never waits. Anybody may ask.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// What is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// Bytes that were written wait to be sent, or to be acknowledged.
    pub(super) owes: bool,
    /// How many the peer has acknowledged so far.
    pub(super) acknowledged: u64,
    /// How long ago it last answered anything.
    pub(super) silent: Duration,
    /// Probes of its window, or repetitions of what was sent, since then.
    pub(super) unanswered: u8,
}

/// An answer, with all that we ask for, has 400 bytes and some.
const ROOM: usize = 4096;

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h: lengths in bytes, and kinds.
const NLMSG_HEADER: usize = 16;
const INET_DIAG_MSG: usize = 72;
const ATTRIBUTE: usize = 4;
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// An attribute of an answer, a `tcp_info`; and the bit that asks for it.
const INET_DIAG_INFO: u16 = 2;
const WANTS_INFO: u8 = 1 << (INET_DIAG_INFO - 1);
const ANY_STATE: u32 = u32::MAX;
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// A netlink socket, one for each thread.
struct Diag {
    socket: OwnedFd,
    /// Of the newest request.
    number: u32,
}

thread_local! {
    static DIAG: RefCell<Option<Diag>> = const { RefCell::new(None) };
}

/// Asks about one connection; `None` when there is none between these two.
///
/// # Errors
/// When the kernel cannot be asked such things, or answers something else.
pub(super) fn ask(local: SocketAddr, peer: SocketAddr) -> io::Result<Option<Known>> {
    DIAG.with_borrow_mut(|slot| {
        let diag = match slot {
            Some(diag) => diag,
            none => none.insert(Diag::open()?),
        };
        diag.ask(local, peer)
    })
}

impl Diag {
    fn open() -> io::Result<Diag> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(netlink::SOCK_DIAG);
        #[expect(clippy::disallowed_methods, reason = "a netlink socket, which asks the kernel")]
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
        Ok(Diag { socket, number: 0 })
    }

    fn ask(&mut self, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<Known>> {
        self.number = self.number.wrapping_add(1);
        send(&self.socket, &request(self.number, local, peer), SendFlags::empty())?;
        let mut room = [0; ROOM];
        loop {
            let (_, length) = recv(&self.socket, &mut room[..], RecvFlags::empty())?;
            let message = room.get(..length).unwrap_or_default();
            // An unexpected answer would be to an earlier request.
            if u32_at(message, 8) == Some(self.number) {
                return parse(message);
            }
        }
    }
}

/// `nlmsghdr`, `inet_diag_req_v2`.
fn request(number: u32, local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    let mut request = Vec::with_capacity(72);
    request.extend_from_slice(&72_u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&number.to_ne_bytes());
    request.extend_from_slice(&0_u32.to_ne_bytes());
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    request.extend_from_slice(&[family, IPPROTO_TCP, WANTS_INFO, 0]);
    request.extend_from_slice(&ANY_STATE.to_ne_bytes());
    // `inet_diag_sockid`
    for end in [local, peer] {
        request.extend_from_slice(&end.port().to_be_bytes());
    }
    for end in [local, peer] {
        let mut address = [0; 16];
        match end.ip() {
            IpAddr::V4(v4) => address[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => address.copy_from_slice(&v6.octets()),
        }
        request.extend_from_slice(&address);
    }
    let interface = match peer {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(v6) => v6.scope_id(),
    };
    request.extend_from_slice(&interface.to_ne_bytes());
    request.extend_from_slice(&NO_COOKIE);
    request
}

/// `nlmsghdr`, then an error, or `inet_diag_msg` and attributes.
fn parse(message: &[u8]) -> io::Result<Option<Known>> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    match u16_at(message, 4) {
        Some(NLMSG_ERROR) => {
            let code = u32_at(message, NLMSG_HEADER).ok_or_else(malformed)?;
            let error = io::Error::from_raw_os_error(code.cast_signed().wrapping_neg());
            return match error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) {
                true => Ok(None),
                false => Err(error),
            };
        }
        Some(SOCK_DIAG_BY_FAMILY) => {}
        _ => return Err(malformed()),
    }
    let unanswered = *message.get(NLMSG_HEADER + 3).ok_or_else(malformed)?;
    let unsent = u32_at(message, NLMSG_HEADER + 60).ok_or_else(malformed)?;
    let info = attribute(message.get(NLMSG_HEADER + INET_DIAG_MSG..).unwrap_or_default());
    let info = info.ok_or_else(malformed)?;
    let silent = u32_at(info, 56).ok_or_else(malformed)?;
    let acknowledged = info.get(120..128).and_then(|bytes| bytes.try_into().ok());
    Ok(Some(Known {
        owes: unsent > 0,
        acknowledged: u64::from_ne_bytes(acknowledged.ok_or_else(malformed)?),
        silent: Duration::from_millis(silent.into()),
        unanswered,
    }))
}

/// The `tcp_info` among attributes: each a length, a kind, a value, and up to three bytes more.
fn attribute(mut rest: &[u8]) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(ATTRIBUTE..length)?;
        if u16_at(rest, 2)? == INET_DIAG_INFO {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn pair(on: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(on).expect("bound");
        let port = listener.local_addr().expect("an address").port();
        let one = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        (one, listener.accept().expect("accepted").0)
    }

    fn ask_of(tcp: &TcpStream) -> Known {
        let ends = (tcp.local_addr().expect("an end"), tcp.peer_addr().expect("an end"));
        ask(ends.0, ends.1).expect("an answer").expect("a connection")
    }

    fn a_reader_that_does_not_read_owes(mut writer: TcpStream, mut reader: TcpStream) {
        assert!(!ask_of(&writer).owes);
        writer.set_nonblocking(true).expect("set");
        let mut written = 0;
        while let Ok(more) = writer.write(&[0; 65536]) {
            written += more;
        }
        let known = ask_of(&writer);
        assert!(known.owes, "{known:?}");
        // The handshake's SYN counts as one.
        assert!(known.acknowledged <= written as u64, "{known:?}, of {written}");
        assert!(known.silent < Duration::from_secs(60), "{known:?}");
        let mut read = vec![0; written];
        reader.read_exact(&mut read).expect("all of it");
        // What it says acknowledges what it has read.
        reader.write_all(b"!").expect("written");
        writer.set_nonblocking(false).expect("set");
        writer.read_exact(&mut [0]).expect("a byte");
        let known = ask_of(&writer);
        assert!(!known.owes && known.acknowledged >= written as u64, "{known:?}, of {written}");
    }

    #[test]
    fn the_kernel_knows_what_a_peer_has_not_acknowledged() {
        let (writer, reader) = pair("127.0.0.1:0");
        a_reader_that_does_not_read_owes(writer, reader);
    }

    #[test]
    fn an_ipv4_client_of_an_ipv6_listener_is_found() {
        let (reader, writer) = pair("[::]:0");
        assert!(writer.local_addr().expect("an end").is_ipv6());
        a_reader_that_does_not_read_owes(writer, reader);
    }

    #[test]
    fn an_unknown_connection_is_not_found() {
        let end = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(ask(end(0), end(0)).expect("an answer"), None);
        assert!(parse(&[]).is_err() && parse(&[0; 500]).is_err());
    }
}
