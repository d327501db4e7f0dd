//! The bodies of the fuzz targets: bytes in, and what must hold whatever they are.
//!
//! Shared by `fuzz_targets/` and by `tests/corpora.rs`, which replays `fuzz/corpus/` in the
//! ordinary test run. Each is a thin call into the part that reads bytes of strangers.

use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use pgsilo::proxy_protocol;
use pgsilo::token::{Algorithm, ClaimPath, Issuer, KeySet, Keyring, TokenError, Verifier};
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::Access;
use pgsilo_wire::frame::{FrameCounter, Status};
use pgsilo_wire::message::{self, Authentication, ErrorFields};
use pgsilo_wire::sasl::{self, InitialResponse};
use pgsilo_wire::startup::{self, CancelRequest, InitialPacket, MAX_BODY, Startup, Version};

/// The issuer's public keys; `fuzz/seeds.py` makes them, and tokens that they verify.
const JWKS: &[u8] = include_bytes!("issuer.jwks.json");
/// When the seeds' tokens are good: 2027-01-15 08:00:00 UTC.
const NOW: Duration = Duration::from_secs(1_800_000_000);

/// The body of a client's first packet, behind its length.
pub(crate) fn startup(data: &[u8]) {
    match InitialPacket::parse(&Bytes::copy_from_slice(data)) {
        Ok(InitialPacket::Startup(startup)) => forwarded(&startup),
        Ok(InitialPacket::Cancel(request)) => cancelled(&request, data),
        Ok(InitialPacket::Ssl | InitialPacket::Gss) => assert_eq!(data.len(), 4),
        Err(_refused) => {}
    }
}

/// What a database gets to read of a client's packet: our names, and its settings unchanged.
fn forwarded(startup: &Startup) {
    assert!(!startup.user().is_empty());
    assert_ne!(startup.database(), Some(&b""[..]));
    let served = startup.version.served();
    assert!(served == Version::V3_0 || served == Version::V3_2);

    let mut answer = Vec::new();
    message::negotiate(&mut answer, served, startup.extensions());
    assert_eq!(frames(&answer, answer.len()).tags, [b'v']);

    let settings: Vec<_> = startup.settings().collect();
    let packet = startup::encode("leased", "tenant_acme", startup.settings());
    let packet = packet.expect("a parsed setting holds no NUL");
    if packet.len() - 4 > MAX_BODY {
        return;
    }
    let again = InitialPacket::parse(&Bytes::copy_from_slice(&packet[4..]));
    let Ok(InitialPacket::Startup(again)) = again else {
        unreachable!("our own packet is read as {again:?}");
    };
    assert_eq!(again.user(), b"leased");
    assert_eq!(again.database(), Some(&b"tenant_acme"[..]));
    assert_eq!(again.settings().collect::<Vec<_>>(), settings);
    assert!(!again.wants_replication() && again.extensions().next().is_none());
}

fn cancelled(request: &CancelRequest, data: &[u8]) {
    assert!((1..=256).contains(&request.secret.len()));
    assert_eq!(&request.encode()[4..], data);
    // The secret must not be logged. A short one may be found in any text.
    let shown = format!("{request:?}");
    assert_eq!(shown, format!("CancelRequest {{ pid: {}, .. }}", request.pid));
}

/// Messages of a database before its first ReadyForQuery: tag, length, body, and the next.
pub(crate) fn backend_messages(data: &[u8]) {
    body(data);
    let mut rest = data;
    while let Some((header, behind)) = rest.split_at_checked(5) {
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let length = length.saturating_sub(4).min(behind.len());
        body(&behind[..length]);
        rest = &behind[length..];
    }
}

/// One body, read as everything that it could be.
fn body(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let fields = ErrorFields::parse(data);
    let told = message::fatal("28000", &fields.text, Some(&fields.sqlstate), None);
    assert_eq!(frames(&told, told.len()).tags, [b'E']);
    assert!(told.ends_with(&[0, 0]));
    match Authentication::parse(&bytes) {
        Some(Authentication::Sasl(offered)) => assert!(offered.iter().all(|m| !m.is_empty())),
        Some(Authentication::SaslContinue(rest) | Authentication::SaslFinal(rest)) => {
            assert_eq!(rest.len(), data.len() - 4);
        }
        Some(_) => assert!(data.len() >= 4),
        None => assert!(data.len() < 8),
    }
    if let Some((pid, secret)) = message::parse_backend_key_data(&bytes) {
        let mut again = Vec::new();
        message::backend_key_data(&mut again, pid, &secret);
        assert_eq!(&again[5..], data);
    }
    if let Some(value) = message::parse_single_column(data) {
        assert_eq!(value, &data[6..]);
    }
    if let Some(password) = message::parse_password(data) {
        assert!(password.len() + 1 == data.len() && !password.contains(&0));
    }
}

/// A password: what a client says is a token.
pub(crate) fn token(data: &[u8]) {
    let now = UNIX_EPOCH + NOW;
    match verifier().verify(&Secret::new(data.to_vec()), now) {
        Ok(claims) => {
            assert_eq!(claims.issuer(), "https://issuer.example");
            assert!(!claims.subject().is_empty());
            match claims.tenants(|_| None) {
                Ok(tenants) => assert!(!tenants.is_empty()),
                Err(rejected) => assert_eq!(rejected.error, TokenError::TenantMalformed),
            }
            assert!(claims.expires_at() > now);
        }
        Err(rejected) if rejected.verified => {
            assert_ne!(rejected.error, TokenError::SignatureInvalid);
        }
        Err(rejected) => {
            assert_eq!((rejected.subject, rejected.token_id), (None, None));
            assert!(!matches!(rejected.error, TokenError::Expired { .. }));
        }
    }
}

/// Whether it is a token that is believed, of tenants that it names by their ids.
pub(crate) fn is_verified(data: &[u8]) -> bool {
    let token = Secret::new(data.to_vec());
    let verified = verifier().verify(&token, UNIX_EPOCH + NOW);
    verified.is_ok_and(|claims| claims.tenants(|_| None).is_ok())
}

fn verifier() -> &'static Verifier {
    static VERIFIER: OnceLock<Verifier> = OnceLock::new();
    VERIFIER.get_or_init(|| {
        let claim = |path| ClaimPath::parse(path).expect("a claim's name");
        let issuer = Issuer {
            issuer: "https://issuer.example".into(),
            audience: vec!["pgsilo".into()],
            algorithms: vec![Algorithm::Rs256],
            keys: Keyring::listed(KeySet::from_jwks(JWKS).expect("a key set").keys),
            audience_claim: claim("aud"),
            tenant_claim: claim("tenant"),
            tenant_values: None,
            access_claim: claim("/app/access"),
            access_values: None,
            default_access: Some(Access::ReadWrite),
            tenants: None,
            max_access: None,
            needs_grant: false,
            max_lifetime: None,
            leeway: Duration::from_secs(30),
        };
        Verifier::new(vec![issuer]).expect("an issuer")
    })
}

/// The first byte says how the rest, a stream of messages, is cut.
pub(crate) fn frame_counter(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else {
        return;
    };
    let whole = frames(stream, stream.len());
    let pieces = frames(stream, usize::from(*cut));
    assert_eq!(whole, pieces);
    assert_eq!(whole.passed, stream.len() as u64);
    if whole.at_boundary {
        // A boundary is no accident: what follows is counted from it.
        let mut longer = stream.to_vec();
        message::ready_for_query(&mut longer);
        let longer = frames(&longer, longer.len());
        assert!(longer.at_boundary);
        assert_eq!(longer.tags.len(), whole.tags.len() + 1);
        assert_eq!(longer.statuses.last(), Some(&Some(Status::Idle)));
    }
}

/// What a counter tells of a stream.
#[derive(Debug, PartialEq, Eq)]
struct Frames {
    tags: Vec<u8>,
    lengths: Vec<u32>,
    statuses: Vec<Option<Status>>,
    passed: u64,
    at_boundary: bool,
}

fn frames(stream: &[u8], cut: usize) -> Frames {
    let mut counter = FrameCounter::default();
    let (mut tags, mut lengths, mut statuses) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in stream.chunks(cut.max(1)) {
        counter.count(chunk, |header| {
            tags.push(header.tag);
            lengths.push(header.length);
            if header.tag == b'Z' {
                statuses.push(header.first.and_then(Status::parse));
            }
        });
    }
    Frames { tags, lengths, statuses, passed: counter.passed(), at_boundary: counter.at_boundary() }
}

/// The body of a client's `p` message where the listener speaks OAUTHBEARER.
pub(crate) fn sasl(data: &[u8]) {
    if let Some(initial) = InitialResponse::parse(data) {
        assert!(initial.mechanism.len() < data.len());
        initial.response.map(bearer);
    }
    bearer(data);
}

fn bearer(message: &[u8]) {
    let Ok(token) = sasl::bearer(message) else { return };
    // Whatever is taken for a token has the characters of one, and stood in the message.
    assert!(token.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(byte)));
    assert!(token.is_empty() || message.windows(token.len()).any(|part| part == token));
}

/// What a balancer sends first.
pub(crate) fn balancer(data: &[u8]) {
    if let Some(fixed) = data.first_chunk() {
        let _ = proxy_protocol::length_behind(fixed);
    }
    if proxy_protocol::parse(data).is_ok() {
        // A header is just one header.
        let more = [data, b"x"].concat();
        assert!(proxy_protocol::parse(&more).is_err());
    }
}
