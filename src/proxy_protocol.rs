//! The PROXY protocol's header: who a balancer says a connection comes from.
//!
//! Framed here, so that not a byte behind the header is taken; read by a library. Versions 1 and 2
//! of the specification (haproxy, `doc/proxy-protocol.txt`).

use std::net::SocketAddr;

use proxy_header::{ParseConfig, ProxyHeader};

/// The first byte of version 1: `PROXY `.
pub const VERSION_1: u8 = b'P';
/// The first byte of version 2's signature.
pub const VERSION_2: u8 = 0x0d;
/// The longest line of version 1, in bytes, its CR LF included.
pub const MAX_LINE: usize = 107;
/// Version 2's signature, command, family and length, in bytes.
pub const FIXED: usize = 16;
/// How much may follow those, in bytes: addresses, and what balancers like to add.
pub const MAX_BEHIND_FIXED: usize = 4096;

/// Not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a PROXY protocol header was expected")]
pub struct NoHeader;

/// How many bytes follow the fixed part of version 2.
///
/// # Errors
/// When they would be more than any balancer sends.
pub fn length_behind(fixed: &[u8; FIXED]) -> Result<usize, NoHeader> {
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > MAX_BEHIND_FIXED { Err(NoHeader) } else { Ok(length) }
}

/// Reads one whole header: the client's address, or `None` where the balancer speaks for itself
/// (a health check).
///
/// # Errors
/// When it is no header, not a whole one, or more than one.
pub fn parse(header: &[u8]) -> Result<Option<SocketAddr>, NoHeader> {
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    let (read, length) = ProxyHeader::parse(header, config).map_err(|_error| NoHeader)?;
    if length != header.len() {
        return Err(NoHeader);
    }
    Ok(read.proxied_address().map(|address| address.source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn version_2(command: u8, family: u8, behind: &[u8]) -> Vec<u8> {
        let length = u16::try_from(behind.len()).expect("short").to_be_bytes();
        [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &length, behind].concat()
    }

    #[test]
    fn both_versions_name_the_client() {
        let of = |header: &[u8]| parse(header).map(|client| client.map(|a| a.to_string()));
        let client = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(of(b"PROXY TCP4 192.0.2.7 10.0.0.1 56324 6432\r\n"), client("192.0.2.7:56324"));
        assert_eq!(of(b"PROXY TCP6 2001:db8::7 ::1 1 2\r\n"), client("[2001:db8::7]:1"));
        let behind = [192, 0, 2, 7, 10, 0, 0, 1, 0xdc, 4, 0x19, 0x20];
        assert_eq!(of(&version_2(0x21, 0x11, &behind)), client("192.0.2.7:56324"));
        // What a balancer adds is passed over.
        let more = [&behind[..], &[0x04, 0, 2, 1, 2]].concat();
        assert_eq!(of(&version_2(0x21, 0x11, &more)), client("192.0.2.7:56324"));
    }

    #[test]
    fn a_balancer_may_speak_for_itself() {
        assert_eq!(parse(b"PROXY UNKNOWN\r\n"), Ok(None));
        assert_eq!(parse(&version_2(0x20, 0, &[])), Ok(None));
    }

    #[test]
    fn bytes_that_are_no_header_are_refused() {
        for bad in [
            &b""[..],
            b"PROXY",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 56324 6432\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 56324\r\n",
            b"PROXY TCP4 192.0.2.777 10.0.0.1 56324 6432\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 56324 6432\r\nmore",
            b"\0\0\0\x08\x04\xd2\x16\x2f",
        ] {
            assert_eq!(parse(bad), Err(NoHeader), "{bad:?}");
        }
        let mut long = [0; FIXED];
        long[14..].copy_from_slice(&4097u16.to_be_bytes());
        assert_eq!(length_behind(&long), Err(NoHeader));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(mut header: Vec<u8>, which in 0..3usize) {
            let _ = parse(&header);
            let start: &[u8] = [&b"PROXY "[..], b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT\n"][which];
            header.splice(..0, start.iter().copied());
            let _ = parse(&header);
        }
    }
}
