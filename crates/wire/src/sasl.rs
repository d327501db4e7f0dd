//! SASL as a client may speak it here: OAUTHBEARER (RFC 7628) in PostgreSQL's messages.
//!
//! As strict as PostgreSQL 18: what it calls malformed is malformed here, and nothing but the token
//! is taken from a message. Source: `auth-sasl.c` and `auth-oauth.c`; RFC 7628, 3.1 and 3.2.3; RFC
//! 6750, 2.1.

/// The one mechanism.
pub const OAUTHBEARER: &[u8] = b"OAUTHBEARER";
/// What a client answers an error of the mechanism with.
pub const KVSEP: u8 = 0x01;
/// How much a client's first message may have beside its token, in bytes: the mechanism's name, a
/// `host` and a `port`.
pub const MAX_AROUND_TOKEN: usize = 1024;

/// `Bearer `, in any case.
const SCHEME: &[u8] = b"Bearer ";

/// SASLInitialResponse: the mechanism that the client chose, and what it has to say.
#[derive(Debug, PartialEq, Eq)]
pub struct InitialResponse<'a> {
    /// Its name.
    pub mechanism: &'a [u8],
    /// `None`: it waits for a challenge first.
    pub response: Option<&'a [u8]>,
}

impl<'a> InitialResponse<'a> {
    /// Reads the body of a `p` message; `None` when its lengths do not fit.
    pub fn parse(body: &'a [u8]) -> Option<InitialResponse<'a>> {
        let end = body.iter().position(|byte| *byte == 0)?;
        let (mechanism, rest) = (&body[..end], &body[end + 1..]);
        let (length, response) = rest.split_at_checked(4)?;
        let length = i32::from_be_bytes(length.try_into().ok()?);
        let response = match length {
            -1 if response.is_empty() => None,
            length if usize::try_from(length).ok()? == response.len() => Some(response),
            _ => return None,
        };
        Some(InitialResponse { mechanism, response })
    }
}

/// What PostgreSQL calls a malformed OAUTHBEARER message, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BearerError {
    /// Nothing at all.
    #[error("the OAUTHBEARER message is empty")]
    Empty,
    /// `p=`: there is no channel binding for this mechanism.
    #[error("the OAUTHBEARER message asks for channel binding")]
    ChannelBinding,
    /// An identity to act as.
    #[error("the OAUTHBEARER message names an authorization identity")]
    AuthorizationIdentity,
    /// Not the header, separators or keys that the RFC has.
    #[error("the OAUTHBEARER message is malformed")]
    Layout,
    /// No `auth` among the keys.
    #[error("the OAUTHBEARER message has no auth value")]
    NoAuth,
    /// `auth` twice.
    #[error("the OAUTHBEARER message has several auth values")]
    SeveralAuths,
}

/// The token of a client's first message. Empty when the client asks where to get one, and when
/// what it shows is not a bearer token: either way it is told.
///
/// # Errors
/// When PostgreSQL would end the connection without an answer of the mechanism.
pub fn bearer(message: &[u8]) -> Result<&[u8], BearerError> {
    let rest = match message {
        [] => return Err(BearerError::Empty),
        [b'p', ..] => return Err(BearerError::ChannelBinding),
        // A client that could bind, and sees that the server cannot.
        [b'n' | b'y', b',', rest @ ..] => rest,
        _ => return Err(BearerError::Layout),
    };
    let rest = match rest {
        [b'a', ..] => return Err(BearerError::AuthorizationIdentity),
        [b',', KVSEP, rest @ ..] => rest,
        _ => return Err(BearerError::Layout),
    };
    // Pairs, each with its separator, and one more: a split leaves two empty ends.
    let pairs = rest.strip_suffix(&[KVSEP]).ok_or(BearerError::Layout)?;
    let mut auth = None;
    if !pairs.is_empty() {
        let pairs = pairs.strip_suffix(&[KVSEP]).ok_or(BearerError::Layout)?;
        for pair in pairs.split(|byte| *byte == KVSEP) {
            let (key, value) = read_pair(pair).ok_or(BearerError::Layout)?;
            if key == b"auth" && auth.replace(value).is_some() {
                return Err(BearerError::SeveralAuths);
            }
        }
    }
    auth.map(token).ok_or(BearerError::NoAuth)
}

/// `key=value` of RFC 7628, 3.1.
fn read_pair(pair: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = pair.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&pair[..at], &pair[at + 1..]);
    let readable = |byte: &u8| byte.is_ascii_graphic() || b" \t\r\n".contains(byte);
    let good =
        !key.is_empty() && key.iter().all(u8::is_ascii_alphabetic) && value.iter().all(readable);
    good.then_some((key, value))
}

/// The token behind the scheme; empty when it is not one of RFC 6750.
fn token(auth: &[u8]) -> &[u8] {
    let Some((scheme, rest)) = auth.split_at_checked(SCHEME.len()) else { return b"" };
    if !scheme.eq_ignore_ascii_case(SCHEME) {
        return b"";
    }
    let spaces = rest.iter().take_while(|byte| **byte == b' ').count();
    let token = &rest[spaces..];
    let unpadded = token.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let of_a_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
    match unpadded > 0 && token[..unpadded].iter().all(of_a_token) {
        true => token,
        false => b"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_is_taken_from_a_good_message() {
        for message in [
            &b"n,,\x01auth=Bearer a.b-c_d\x01\x01"[..],
            b"y,,\x01auth=bearer   a.b-c_d\x01\x01",
            b"n,,\x01host=db.example\x01port=5432\x01auth=BEARER a.b-c_d\x01\x01",
        ] {
            assert_eq!(bearer(message), Ok(&b"a.b-c_d"[..]));
        }
        assert_eq!(bearer(b"n,,\x01auth=Bearer YQ==\x01\x01"), Ok(&b"YQ=="[..]));
    }

    #[test]
    fn empty_and_non_bearer_responses_yield_no_token() {
        for auth in [
            "",
            "Bearer",
            "Bearer ",
            "Basic YTpi",
            "Bearer a b",
            "Bearer =",
            "Bearer a=b",
            "Bearer \ta",
        ] {
            let message = format!("n,,\x01auth={auth}\x01\x01");
            assert_eq!(bearer(message.as_bytes()), Ok(&b""[..]), "{auth:?}");
        }
    }

    #[test]
    fn responses_malformed_for_postgresql_are_refused() {
        use BearerError::{
            AuthorizationIdentity, ChannelBinding, Empty, Layout, NoAuth, SeveralAuths,
        };
        for (message, error) in [
            (&b""[..], Empty),
            (b"p=tls-server-end-point,,\x01auth=Bearer a\x01\x01", ChannelBinding),
            (b"n,a=root,\x01auth=Bearer a\x01\x01", AuthorizationIdentity),
            (b"x,,\x01auth=Bearer a\x01\x01", Layout),
            (b"n", Layout),
            (b"n,,", Layout),
            (b"n,,auth=Bearer a\x01\x01", Layout),
            (b"n,,\x01auth=Bearer a\x01", Layout),
            (b"n,,\x01auth=Bearer a", Layout),
            (b"n,,\x01auth=Bearer a\x01\x01more", Layout),
            (b"n,,\x01auth\x01\x01", Layout),
            (b"n,,\x01=Bearer a\x01\x01", Layout),
            (b"n,,\x01au th=Bearer a\x01\x01", Layout),
            (b"n,,\x01auth=Bearer a\0\x01\x01", Layout),
            (b"n,,\x01auth=Bearer \xff\x01\x01", Layout),
            (b"n,,\x01\x01auth=Bearer a\x01\x01", Layout),
            (b"n,,\x01\x01", NoAuth),
            (b"n,,\x01host=h\x01\x01", NoAuth),
            (b"n,,\x01auth=Bearer a\x01auth=Bearer b\x01\x01", SeveralAuths),
        ] {
            assert_eq!(bearer(message), Err(error), "{message:?}");
        }
    }

    #[test]
    fn an_initial_response_says_its_length_and_keeps_it() {
        let parse = InitialResponse::parse;
        let mechanism = OAUTHBEARER;
        assert_eq!(
            parse(b"OAUTHBEARER\0\0\0\0\x02ab"),
            Some(InitialResponse { mechanism, response: Some(b"ab") })
        );
        assert_eq!(
            parse(b"OAUTHBEARER\0\xff\xff\xff\xff"),
            Some(InitialResponse { mechanism, response: None })
        );
        for bad in [
            &b""[..],
            b"OAUTHBEARER",
            b"OAUTHBEARER\0",
            b"OAUTHBEARER\0\0\0\0",
            b"OAUTHBEARER\0\0\0\0\x03ab",
            b"OAUTHBEARER\0\0\0\0\x01ab",
            b"OAUTHBEARER\0\xff\xff\xff\xffab",
            b"OAUTHBEARER\0\xff\xff\xff\xfe",
            b"OAUTHBEARER\0\x7f\xff\xff\xffab",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(body: Vec<u8>, tail: Vec<u8>) {
            let _ = InitialResponse::parse(&body);
            let _ = bearer(&body);
            let _ = bearer(&[b"n,,\x01auth=", &tail[..]].concat());
        }

        #[test]
        fn a_token_survives_encoding_and_parsing(token in "[A-Za-z0-9._~+/-]{1,200}=?") {
            let message = format!("n,,\x01host=h\x01auth=Bearer {token}\x01\x01");
            prop_assert_eq!(bearer(message.as_bytes()), Ok(token.as_bytes()));
        }
    }
}
