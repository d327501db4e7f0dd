//! What the log says of a token that is not taken, beside why: what was found, and what was
//! expected.
//!
//! No client reads it. It shows single claims and header members, cut, of tokens that may be
//! anybody's, and never a token, a signature, or anything of a password that is no token.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::Arc;

use pgsilo_core::tenant::Access;
use serde_json::Value;

use super::strict::Parts;
use super::{ClaimPath, Issuer, Key, TokenError};

/// How much of one value is shown, in characters.
const MAX_VALUE: usize = 80;
/// How many of those that would do are named.
const FEW: usize = 5;

/// What a text that has not the shape of a token may be.
pub(super) fn shape(token: &[u8]) -> &'static str {
    let scheme = token.get(..7).is_some_and(|start| start.eq_ignore_ascii_case(b"bearer "));
    if scheme {
        return "it begins with \"Bearer\", which is not part of a token";
    }
    if token.iter().any(u8::is_ascii_whitespace) {
        return "white space around a token, or in it, is not part of it";
    }
    match token.split(|byte| *byte == b'.').count() {
        3 => {
            "three parts as a JWT has them, but not base64url without padding, or not strict JSON objects"
        }
        5 => "no signed JWT: an encrypted one (JWE)?",
        _ => "no JWT: an opaque access token? ask its issuer for one with an audience",
    }
}

/// What was found and expected, if there is anything to show.
pub(super) fn difference(
    error: &TokenError,
    parts: &Parts,
    issuer: Option<&Issuer>,
    issuers: &HashMap<Arc<str>, Issuer>,
) -> String {
    match (error, issuer) {
        (TokenError::HeaderRefused { member: "typ" }, _) => {
            format!("{}, expected \"JWT\" or \"at+jwt\"", found(parts.header.get("typ")))
        }
        (TokenError::IssuerUnknown, _) => {
            format!("{}{}", found(parts.payload.get("iss")), expected(issuers.keys()))
        }
        (TokenError::AlgorithmRefused, Some(issuer)) => {
            let allowed = expected(&issuer.algorithms);
            format!("{}{allowed}{}", found(parts.header.get("alg")), of_key(parts, issuer))
        }
        (TokenError::KeyUnknown | TokenError::KeyUnchecked, Some(issuer)) => {
            let keys = issuer.keys.in_force();
            let ids = keys.iter().flat_map(|keys| keys.ids());
            format!("{}{}", found(parts.header.get("kid")), expected(ids))
        }
        (TokenError::SignatureInvalid, _) => {
            format!(
                "not that of the key {}",
                shown(parts.header.get("kid").unwrap_or(&Value::Null))
            )
        }
        (TokenError::AudienceWrong | TokenError::ClaimInvalid { claim: "aud" }, Some(issuer)) => {
            let claim = claim(&issuer.audience_claim, parts);
            let aud = match parts.payload.get("aud") {
                Some(aud) if !issuer.audience_claim.is_aud() => {
                    format!(", and {} in aud", shown(aud))
                }
                _ => String::new(),
            };
            format!("{claim}{aud}{}", expected(&issuer.audience))
        }
        (TokenError::NotYetValid, _) => {
            let date = |name| found(parts.payload.get(name));
            format!("nbf: {}; iat: {}", date("nbf"), date("iat"))
        }
        (TokenError::ClaimInvalid { claim }, _) => found(parts.payload.get(claim)),
        (TokenError::AccessUnknown, Some(issuer)) => {
            let claim = claim(&issuer.access_claim, parts);
            match &issuer.access_values {
                Some(values) => format!("{claim}{}", expected(values.keys())),
                None => format!("{claim}{}", expected(Access::ALL)),
            }
        }
        (TokenError::AccessAbsent, Some(issuer)) => claim(&issuer.access_claim, parts),
        (TokenError::AccessBeyond { .. }, Some(issuer)) => {
            let max = issuer.max_access.map(Access::as_str);
            format!("{}, at most {}", claim(&issuer.access_claim, parts), max.unwrap_or("any"))
        }
        (TokenError::LifetimeBeyond { .. }, Some(issuer)) => {
            format!("at most {} s", issuer.max_lifetime.unwrap_or_default().as_secs())
        }
        (TokenError::TenantAbsent | TokenError::TenantMalformed, Some(issuer)) => {
            let claim = claim(&issuer.tenant_claim, parts);
            match &issuer.tenant_values {
                Some(values) => format!("{claim}{}", expected(values.keys())),
                None => claim,
            }
        }
        (TokenError::HeaderRefused { .. } | TokenError::Missing | TokenError::Malformed, _)
        | (
            TokenError::Expired { .. } | TokenError::KeysUnavailable | TokenError::TenantBeyond,
            _,
        )
        | (_, None) => String::new(),
    }
}

/// Where there is a choice among keys: what the one that the token names is for.
fn of_key(parts: &Parts, issuer: &Issuer) -> String {
    let keys = issuer.keys.in_force();
    let id = parts.header.get("kid").and_then(Value::as_str);
    let key = keys.as_ref().and_then(|keys| keys.key(id));
    let algorithms = key.map(Key::algorithms).filter(|own| *own != issuer.algorithms);
    algorithms.map(|own| format!("; of its key{}", expected(own))).unwrap_or_default()
}

/// A claim, and where it was looked for.
fn claim(path: &ClaimPath, parts: &Parts) -> String {
    format!("{} at {}", found(path.find(&parts.payload).unwrap_or_default()), cut(path.as_str()))
}

fn found(value: Option<&Value>) -> String {
    value.map_or_else(|| "found nothing".to_owned(), |value| format!("found {}", shown(value)))
}

/// As JSON, which has no line ends.
fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

/// A tenant that an issuer may not name, or a word that means none.
pub(super) fn word(word: impl Display) -> String {
    format!("found {}", shown(&Value::from(word.to_string())))
}

/// One of these would do.
fn expected<T: Display>(all: impl IntoIterator<Item = T>) -> String {
    let mut named: Vec<String> =
        all.into_iter().map(|one| shown(&Value::from(one.to_string()))).collect();
    named.sort_unstable();
    let more = if named.len() > FEW { ", ..." } else { "" };
    named.truncate(FEW);
    if named.is_empty() {
        String::new()
    } else {
        format!(", expected {}{more}", named.join(" or "))
    }
}

fn cut(text: &str) -> String {
    let mut cut: String = text.chars().take(MAX_VALUE).collect();
    if cut.len() < text.len() {
        cut.push_str("...");
    }
    cut
}
