//! The packets that open a connection: SSLRequest, GSSENCRequest, CancelRequest and the
//! StartupMessage. They have a length but no tag byte.
//!
//! Parameters stay bytes: PostgreSQL does not know their encoding either (CVE-2026-107349 was
//! a proxy that parsed `options`). Source: `ProcessStartupPacket` in `backend_startup.c`.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use bytes::Bytes;

/// The shortest body, in bytes: the protocol code.
pub const MIN_BODY: usize = 4;
/// The longest body, in bytes: `MAX_STARTUP_PACKET_LENGTH` of `libpq/pqcomm.h`.
pub const MAX_BODY: usize = 10_000;
/// The longest secret of a CancelRequest, in bytes (protocol 3.2).
pub const MAX_CANCEL_SECRET: usize = 256;

const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;

/// A protocol version: 3.0, 3.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The high half of the code.
    pub major: u16,
    /// The low half of the code.
    pub minor: u16,
}

impl Version {
    /// What every driver speaks.
    pub const V3_0: Version = Version { major: 3, minor: 0 };
    /// With cancel secrets of up to 256 bytes: PostgreSQL 18 and newer.
    pub const V3_2: Version = Version { major: 3, minor: 2 };

    /// The version that a client which asked for `self` is served with. 3.1 was never released;
    /// it is answered with 3.0.
    pub fn served(self) -> Version {
        if self < Version::V3_2 { Version::V3_0 } else { Version::V3_2 }
    }

    /// The code as it is sent.
    pub fn code(self) -> u32 {
        u32::from(self.major) << 16 | u32::from(self.minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The packets that a client may open a connection with.
#[derive(Debug)]
pub enum InitialPacket {
    /// It asks for TLS.
    Ssl,
    /// It asks for GSSAPI encryption.
    Gss,
    /// It asks to cancel the query of another connection.
    Cancel(CancelRequest),
    /// It starts a session.
    Startup(Startup),
}

/// A request to cancel what another connection runs.
pub struct CancelRequest {
    /// The process id that BackendKeyData named.
    pub pid: u32,
    /// The secret that BackendKeyData named, 1 to 256 bytes.
    pub secret: Bytes,
}

impl fmt::Debug for CancelRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelRequest").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A well-formed StartupMessage of protocol 3.
#[derive(Debug)]
pub struct Startup {
    /// The version that the client asked for.
    pub version: Version,
    parameters: Vec<(Bytes, Bytes)>,
}

/// Why a first packet is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartupError {
    /// The length is impossible.
    #[error("a startup packet of {0} bytes")]
    Length(usize),
    /// A major version that is not 3.
    #[error("protocol {0}")]
    Version(Version),
    /// A CancelRequest without a secret, or with a longer one than there can be.
    #[error("a cancel request of {0} bytes")]
    Cancel(usize),
    /// The parameters do not end where the packet ends.
    #[error("startup parameters are not terminated")]
    Layout,
    /// No `user`.
    #[error("no user name in the startup packet")]
    NoUser,
}

impl InitialPacket {
    /// Reads the body of a first packet: all that follows its length.
    ///
    /// # Errors
    /// When PostgreSQL would refuse it, or when it is longer than anything it could be.
    pub fn parse(body: &Bytes) -> Result<InitialPacket, StartupError> {
        if body.len() < MIN_BODY || body.len() > MAX_BODY {
            return Err(StartupError::Length(body.len()));
        }
        let code = be_u32(body, 0);
        match code {
            SSL_REQUEST if body.len() == 4 => Ok(InitialPacket::Ssl),
            GSSENC_REQUEST if body.len() == 4 => Ok(InitialPacket::Gss),
            SSL_REQUEST | GSSENC_REQUEST => Err(StartupError::Length(body.len())),
            CANCEL_REQUEST => CancelRequest::parse(body).map(InitialPacket::Cancel),
            _ => Startup::parse(code, body).map(InitialPacket::Startup),
        }
    }
}

impl CancelRequest {
    fn parse(body: &Bytes) -> Result<CancelRequest, StartupError> {
        let secret = body.len().saturating_sub(8);
        if secret == 0 || secret > MAX_CANCEL_SECRET {
            return Err(StartupError::Cancel(body.len()));
        }
        Ok(CancelRequest { pid: be_u32(body, 4), secret: body.slice(8..) })
    }

    /// The packet, as a client sends it.
    pub fn encode(&self) -> Vec<u8> {
        let length = 12 + self.secret.len();
        let mut packet = Vec::with_capacity(length);
        packet.extend_from_slice(&(length as u32).to_be_bytes());
        packet.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
        packet.extend_from_slice(&self.pid.to_be_bytes());
        packet.extend_from_slice(&self.secret);
        packet
    }
}

impl Startup {
    fn parse(code: u32, body: &Bytes) -> Result<Startup, StartupError> {
        let version = Version { major: (code >> 16) as u16, minor: code as u16 };
        if version.major != 3 {
            return Err(StartupError::Version(version));
        }
        let mut parameters = Vec::new();
        let mut at = 4;
        loop {
            let name = c_string(body, &mut at)?;
            if name.is_empty() {
                break;
            }
            let value = c_string(body, &mut at)?;
            parameters.push((name, value));
        }
        if at != body.len() {
            return Err(StartupError::Layout);
        }
        let startup = Startup { version, parameters };
        match startup.parameter(b"user") {
            Some(user) if !user.is_empty() => Ok(startup),
            _ => Err(StartupError::NoUser),
        }
    }

    /// The value of a parameter; of a repeated one the last, as PostgreSQL does it.
    pub fn parameter(&self, name: &[u8]) -> Option<&Bytes> {
        self.parameters.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// The user's name. Only logged.
    pub fn user(&self) -> &[u8] {
        self.parameter(b"user").map_or(b"", |user| user)
    }

    /// The database that the client named, if it named one. PostgreSQL takes the user's name
    /// for an absent or empty one; here that selects nothing.
    pub fn database(&self) -> Option<&[u8]> {
        self.parameter(b"database").map(Bytes::as_ref).filter(|name| !name.is_empty())
    }

    /// Whether a walsender is asked for: any value of `replication` that PostgreSQL does not
    /// read as false.
    pub fn wants_replication(&self) -> bool {
        self.parameter(b"replication").is_some_and(|value| !reads_as_false(value))
    }

    /// The names of the protocol extensions asked for, none of which is known here.
    pub fn extensions(&self) -> impl Iterator<Item = &Bytes> {
        self.parameters.iter().map(|(name, _)| name).filter(|name| name.starts_with(b"_pq_."))
    }

    /// Every setting that the database is to see: all but the names that pgsilo replaces
    /// (`user`, `database`), answers itself (`_pq_.`) or refused when true (`replication`).
    pub fn settings(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.parameters.iter().map(|(n, v)| (n.as_ref(), v.as_ref())).filter(|(name, _)| {
            !matches!(*name, b"user" | b"database" | b"replication") && !name.starts_with(b"_pq_.")
        })
    }
}

/// The longest name of a user or a database, in bytes: `NAMEDATALEN` less one.
const MAX_NAME: usize = 63;

/// How much longer than a backend takes its StartupMessage could become, in bytes, whatever its
/// user is called; `None` if it fits.
pub fn excess<'a>(
    database: &str,
    settings: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Option<usize> {
    let own = [("user".len(), MAX_NAME), ("database".len(), database.len())];
    let all = own.into_iter().chain(settings.map(|(name, value)| (name.len(), value.len())));
    let body = MIN_BODY + all.map(|(name, value)| name + value + 2).sum::<usize>() + 1;
    body.checked_sub(MAX_BODY).filter(|excess| *excess > 0)
}

/// The StartupMessage for a backend: protocol 3.0, this user and database, these settings.
///
/// # Errors
/// When a name or a value holds a NUL byte, which would end it early.
pub fn encode<'a>(
    user: &'a str,
    database: &'a str,
    settings: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<Vec<u8>, StartupError> {
    let mut packet = vec![0; 4];
    packet.extend_from_slice(&Version::V3_0.code().to_be_bytes());
    let own = [(&b"user"[..], user.as_bytes()), (b"database", database.as_bytes())];
    for (name, value) in own.into_iter().chain(settings) {
        if name.contains(&0) || value.contains(&0) {
            return Err(StartupError::Layout);
        }
        packet.extend_from_slice(name);
        packet.push(0);
        packet.extend_from_slice(value);
        packet.push(0);
    }
    packet.push(0);
    let length = packet.len() as u32;
    packet[..4].copy_from_slice(&length.to_be_bytes());
    Ok(packet)
}

/// `parse_bool` of `utils/adt/bool.c`: unambiguous prefixes of false, no, off, and 0.
fn reads_as_false(value: &[u8]) -> bool {
    let value = value.to_ascii_lowercase();
    let prefix_of = |word: &[u8], least: usize| value.len() >= least && word.starts_with(&value);
    prefix_of(b"false", 1) || prefix_of(b"no", 1) || prefix_of(b"off", 2) || value == b"0"
}

fn c_string(body: &Bytes, at: &mut usize) -> Result<Bytes, StartupError> {
    let rest = body.get(*at..).ok_or(StartupError::Layout)?;
    let end = rest.iter().position(|byte| *byte == 0).ok_or(StartupError::Layout)?;
    let string = body.slice(*at..*at + end);
    *at += end + 1;
    Ok(string)
}

/// The four bytes at `at`, which the caller knows to be there.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn body(code: u32, rest: &[u8]) -> Bytes {
        Bytes::from([&code.to_be_bytes()[..], rest].concat())
    }

    fn startup(rest: &[u8]) -> Result<Startup, StartupError> {
        match InitialPacket::parse(&body(0x0003_0000, rest))? {
            InitialPacket::Startup(startup) => Ok(startup),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parameters_stay_bytes_and_the_last_of_a_repeated_one_counts() {
        let parsed = startup(b"user\0a\0user\0\xff\xfe\0database\0d\0\0").expect("well formed");
        assert_eq!(parsed.user(), b"\xff\xfe");
        assert_eq!(parsed.database(), Some(&b"d"[..]));
    }

    #[test]
    fn an_absent_or_empty_database_selects_nothing() {
        assert_eq!(startup(b"user\0acme\0\0").expect("ok").database(), None);
        assert_eq!(startup(b"user\0acme\0database\0\0\0").expect("ok").database(), None);
    }

    #[test]
    fn startup_packets_refused_by_postgresql_are_refused() {
        let cases: [(&[u8], StartupError); 6] = [
            (b"", StartupError::Layout),
            (b"user\0a\0", StartupError::Layout),
            (b"user\0a", StartupError::Layout),
            (b"user\0a\0\0x", StartupError::Layout),
            (b"\0", StartupError::NoUser),
            (b"user\0\0\0", StartupError::NoUser),
        ];
        for (rest, error) in cases {
            assert_eq!(startup(rest).err(), Some(error), "{rest:?}");
        }
        let old = InitialPacket::parse(&body(0x0002_0000, b"\0")).expect_err("protocol 2");
        assert_eq!(old, StartupError::Version(Version { major: 2, minor: 0 }));
        assert_eq!(
            InitialPacket::parse(&Bytes::new()).expect_err("empty"),
            StartupError::Length(0)
        );
    }

    #[test]
    fn replication_is_seen_in_every_spelling_that_postgresql_takes() {
        for value in ["true", "on", "1", "database", "yes", "t", "o", "", "maybe"] {
            let packet = format!("user\0a\0replication\0{value}\0\0");
            assert!(startup(packet.as_bytes()).expect("ok").wants_replication(), "{value}");
        }
        for value in ["false", "off", "0", "no", "F", "of", "N"] {
            let packet = format!("user\0a\0replication\0{value}\0\0");
            assert!(!startup(packet.as_bytes()).expect("ok").wants_replication(), "{value}");
        }
    }

    #[test]
    fn user_database_and_protocol_options_are_not_forwarded() {
        let parsed = startup(
            b"user\0a\0database\0d\0_pq_.x\0on\0options\0-c a=b\0replication\0off\0application_name\0n\0\0",
        )
        .expect("ok");
        let settings: Vec<_> = parsed.settings().collect();
        let expected: [(&[u8], &[u8]); 2] = [(b"options", b"-c a=b"), (b"application_name", b"n")];
        assert_eq!(settings, expected);
        let packet = Bytes::from(encode("u", "t", parsed.settings()).expect("no NUL"));
        let InitialPacket::Startup(again) =
            InitialPacket::parse(&packet.slice(4..)).expect("our own")
        else {
            panic!("not a startup packet")
        };
        assert_eq!((again.user(), again.database()), (&b"u"[..], Some(&b"t"[..])));
        assert_eq!(again.settings().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_user_name_with_a_nul_byte_cannot_add_parameters() {
        assert!(encode("u\0database\0other", "t", std::iter::empty()).is_err());
    }

    #[test]
    fn versions_are_served_as_the_nearest_that_exists() {
        let served = |minor| Version { major: 3, minor }.served().minor;
        assert_eq!([0, 1, 2, 3, 9999].map(served), [0, 0, 2, 2, 2]);
    }

    #[test]
    fn cancel_secrets_have_1_to_256_bytes() {
        let parse = |secret: &[u8]| {
            InitialPacket::parse(&body(CANCEL_REQUEST, &[&7u32.to_be_bytes(), secret].concat()))
        };
        for length in [1, 4, 32, 256] {
            let Ok(InitialPacket::Cancel(request)) = parse(&vec![9; length]) else {
                panic!("{length}")
            };
            assert_eq!((request.pid, request.secret.len()), (7, length));
            assert_eq!(request.encode()[8..], [&7u32.to_be_bytes()[..], &vec![9; length]].concat());
        }
        assert!(parse(&[]).is_err() && parse(&[0; 257]).is_err());
        assert!(InitialPacket::parse(&body(CANCEL_REQUEST, b"")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, code in prop_oneof![
            Just(0x0003_0000u32), Just(0x0003_0002), Just(CANCEL_REQUEST), any::<u32>()]) {
            let _ = InitialPacket::parse(&Bytes::from(bytes.clone()));
            let _ = InitialPacket::parse(&body(code, &bytes));
        }
    }
}
