//! The tagged messages that pgsilo itself writes or reads: those of the login.
//!
//! Encoders append whole messages; parsers get one body, already framed and bounded, and
//! check every length in it. All text is bytes. Source: protocol chapter, "Message Formats".

use alloc::string::String;
use alloc::vec::Vec;

use bytes::Bytes;

use super::sasl::OAUTHBEARER;
use super::startup::Version;

/// ErrorResponse, severity FATAL: the one message that a refusal or an ending consists of.
///
/// NUL bytes in a text would end it early, so they are left out.
pub fn fatal(sqlstate: &str, text: &str, detail: Option<&str>, hint: Option<&str>) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    append(&mut out, b'E', |body| {
        let fields = [
            (b'S', Some("FATAL")),
            (b'V', Some("FATAL")),
            (b'C', Some(sqlstate)),
            (b'M', Some(text)),
            (b'D', detail),
            (b'H', hint),
        ];
        for (field, value) in fields {
            let Some(value) = value else { continue };
            body.push(field);
            body.extend(value.bytes().filter(|byte| *byte != 0));
            body.push(0);
        }
        body.push(0);
    });
    out
}

/// AuthenticationCleartextPassword.
pub fn ask_password(out: &mut Vec<u8>) {
    append(out, b'R', |body| {
        body.extend_from_slice(&3u32.to_be_bytes());
    });
}

/// AuthenticationSASL, with the one mechanism that there is.
pub fn ask_bearer(out: &mut Vec<u8>) {
    append(out, b'R', |body| {
        body.extend_from_slice(&10u32.to_be_bytes());
        body.extend_from_slice(OAUTHBEARER);
        body.extend_from_slice(&[0, 0]);
    });
}

/// AuthenticationSASLContinue: a challenge, or what OAUTHBEARER has to say of an error.
pub fn sasl_continue(out: &mut Vec<u8>, challenge: &[u8]) {
    append(out, b'R', |body| {
        body.extend_from_slice(&11u32.to_be_bytes());
        body.extend_from_slice(challenge);
    });
}

/// AuthenticationOk.
pub fn authentication_ok(out: &mut Vec<u8>) {
    append(out, b'R', |body| {
        body.extend_from_slice(&0u32.to_be_bytes());
    });
}

/// BackendKeyData. The secret has 4 bytes below protocol 3.2 and up to 256 from there on.
pub fn backend_key_data(out: &mut Vec<u8>, pid: u32, secret: &[u8]) {
    append(out, b'K', |body| {
        body.extend_from_slice(&pid.to_be_bytes());
        body.extend_from_slice(secret);
    });
}

/// ReadyForQuery, outside a transaction.
pub fn ready_for_query(out: &mut Vec<u8>) {
    append(out, b'Z', |body| body.push(b'I'));
}

/// NegotiateProtocolVersion: the version served, and the extensions that are not known.
pub fn negotiate<'a>(out: &mut Vec<u8>, served: Version, unknown: impl Iterator<Item = &'a Bytes>) {
    let unknown: Vec<_> = unknown.collect();
    append(out, b'v', |body| {
        body.extend_from_slice(&served.code().to_be_bytes());
        body.extend_from_slice(&(unknown.len() as u32).to_be_bytes());
        for name in unknown {
            body.extend_from_slice(name);
            body.push(0);
        }
    });
}

/// Any message whose body is at hand.
pub fn raw(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    append(out, tag, |into| into.extend_from_slice(body));
}

fn append(out: &mut Vec<u8>, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[tag, 0, 0, 0, 0]);
    write(out);
    let length = (out.len() - start - 1) as u32;
    out[start + 1..start + 5].copy_from_slice(&length.to_be_bytes());
}

/// How much of a server's words is kept, in characters.
const MAX_TEXT: usize = 500;

/// The fields of an ErrorResponse that pgsilo looks at. A server may leave any of them out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ErrorFields {
    /// `C`: the SQLSTATE; empty when there is none.
    pub sqlstate: String,
    /// `M`: the message, lossily decoded.
    pub text: String,
    /// `R`: the function in PostgreSQL's source that said it.
    pub routine: String,
}

impl ErrorFields {
    /// Reads an ErrorResponse's body, tolerating whatever else is in it. What goes into a log is
    /// one line of bounded length, whatever its source.
    pub fn parse(body: &[u8]) -> ErrorFields {
        let mut fields = ErrorFields::default();
        for field in body.split(|byte| *byte == 0) {
            let Some((kind, value)) = field.split_first() else {
                break;
            };
            let value = || {
                let text = String::from_utf8_lossy(value);
                let one_line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
                one_line.take(MAX_TEXT).collect::<String>()
            };
            match kind {
                b'C' => fields.sqlstate = value(),
                b'M' => fields.text = value(),
                b'R' => fields.routine = value(),
                _ => {}
            }
        }
        fields
    }
}

/// A backend's AuthenticationRequest.
#[derive(Debug, PartialEq, Eq)]
pub enum Authentication {
    /// 0
    Ok,
    /// 3
    CleartextPassword,
    /// 5, with its salt.
    Md5Password([u8; 4]),
    /// 10, with the mechanisms offered.
    Sasl(Vec<String>),
    /// 11, with the server's challenge.
    SaslContinue(Bytes),
    /// 12, with the server's last word.
    SaslFinal(Bytes),
    /// Any other: Kerberos, GSSAPI, SSPI, ...
    Other(u32),
}

impl Authentication {
    /// Reads the body of an `R` message; `None` when it is too short for what it says it is.
    pub fn parse(body: &Bytes) -> Option<Authentication> {
        let code = u32::from_be_bytes(body.get(..4)?.try_into().ok()?);
        let rest = body.slice(4..);
        Some(match code {
            0 => Authentication::Ok,
            3 => Authentication::CleartextPassword,
            5 => Authentication::Md5Password(rest.get(..4)?.try_into().ok()?),
            10 => Authentication::Sasl(
                rest.split(|byte| *byte == 0)
                    .take_while(|name| !name.is_empty())
                    .map(|name| String::from_utf8_lossy(name).into_owned())
                    .collect(),
            ),
            11 => Authentication::SaslContinue(rest),
            12 => Authentication::SaslFinal(rest),
            other => Authentication::Other(other),
        })
    }
}

/// BackendKeyData's body: the process id and the secret.
pub fn parse_backend_key_data(body: &[u8]) -> Option<(u32, Bytes)> {
    let pid = u32::from_be_bytes(body.get(..4)?.try_into().ok()?);
    let secret = &body[4..];
    let fits = (1..=super::startup::MAX_CANCEL_SECRET).contains(&secret.len());
    // Kept for as long as the session: not with all that came beside it.
    fits.then(|| (pid, Bytes::copy_from_slice(secret)))
}

/// The only column of a DataRow; `None` when it is NULL or not the only one.
pub fn parse_single_column(body: &[u8]) -> Option<&[u8]> {
    let (count, rest) = body.split_at_checked(2)?;
    let (length, value) = rest.split_at_checked(4)?;
    let length = i32::from_be_bytes(length.try_into().ok()?);
    let fits = count == [0, 1] && usize::try_from(length).ok()? == value.len();
    fits.then_some(value)
}

/// Terminate, whole.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// The tagged messages that follow one another in `bytes`; stops where that is not a whole one.
pub fn split(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    core::iter::from_fn(move || {
        let (header, rest) = bytes.split_at_checked(5)?;
        let length = u32::from_be_bytes(header[1..].try_into().ok()?).checked_sub(4)?;
        let (body, rest) = rest.split_at_checked(length as usize)?;
        bytes = rest;
        Some((header[0], body))
    })
}

/// A PasswordMessage's body without its final NUL; `None` when that is missing or not the only one.
pub fn parse_password(body: &[u8]) -> Option<&[u8]> {
    body.strip_suffix(&[0]).filter(|password| !password.contains(&0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fatal_error_is_laid_out_as_the_protocol_says() {
        let bytes = fatal("28000", "no\0", Some("why"), None);
        assert_eq!(bytes, b"E\0\0\0\x23SFATAL\0VFATAL\0C28000\0Mno\0Dwhy\0\0".as_slice());
    }

    #[test]
    fn an_error_without_a_sqlstate_is_tolerated() {
        let fields = ErrorFields::parse(b"SFATAL\0Mgo away\0\0");
        assert_eq!(fields, ErrorFields { text: "go away".into(), ..ErrorFields::default() });
    }

    #[test]
    fn authentication_requests_are_read() {
        let parse = |body: &'static [u8]| Authentication::parse(&Bytes::from_static(body));
        assert_eq!(parse(b"\0\0\0\0"), Some(Authentication::Ok));
        assert_eq!(parse(b"\0\0\0\x05abcd"), Some(Authentication::Md5Password(*b"abcd")));
        assert_eq!(
            parse(b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"),
            Some(Authentication::Sasl(vec!["SCRAM-SHA-256-PLUS".into(), "SCRAM-SHA-256".into()]))
        );
        assert_eq!(parse(b"\0\0\0\x07"), Some(Authentication::Other(7)));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"\0\0\0\x05ab"), None);
    }

    #[test]
    fn a_single_column_is_read_and_nothing_else() {
        assert_eq!(parse_single_column(b"\0\x01\0\0\0\x04acme"), Some(&b"acme"[..]));
        for bad in [
            &b"\0\x01\xff\xff\xff\xff"[..],
            b"\0\x02\0\0\0\x01a\0\0\0\x01b",
            b"\0\x01\0\0\0\x05a",
            b"",
        ] {
            assert_eq!(parse_single_column(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn messages_are_split_as_far_as_they_are_whole() {
        let mut bytes = Vec::new();
        raw(&mut bytes, b'S', b"abc");
        raw(&mut bytes, b'N', b"");
        let whole: Vec<_> = split(&bytes).collect();
        assert_eq!(whole, [(b'S', &b"abc"[..]), (b'N', b"")]);
        assert_eq!(split(&bytes[..bytes.len() - 1]).count(), 1);
        assert_eq!(split(b"S\0\0\0\x03").count(), 0, "an impossible length");
    }

    #[test]
    fn a_password_ends_with_its_only_nul() {
        assert_eq!(parse_password(b"abc\0"), Some(&b"abc"[..]));
        assert_eq!(parse_password(b"\0"), Some(&b""[..]));
        for bad in [&b""[..], b"abc", b"a\0b\0"] {
            assert_eq!(parse_password(bad), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(body: Vec<u8>) {
            let body = Bytes::from(body);
            let _ = ErrorFields::parse(&body);
            let _ = Authentication::parse(&body);
            let _ = parse_backend_key_data(&body);
            let _ = parse_single_column(&body);
            let _ = parse_password(&body);
        }
    }
}
