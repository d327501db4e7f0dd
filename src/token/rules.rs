//! What the claims of a token must look like, once its signature is good.
//!
//! Every rule refuses rather than repairs: a claim of the wrong type is an error, never
//! an absent claim. `sub` and `jti` go to logs and are bounded for it. Called only by
//! [`super::Verifier::verify`], which alone may make [`Claims`].

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use super::{Claims, Issuer, TokenError};
use crate::tenant::{Access, TenantId};

/// In characters, of `sub` and `jti`.
const MAX_NAME: usize = 256;

/// A token with more memberships is a mistake of its issuer.
const MAX_TENANTS: usize = 1000;

/// The last second of the year 9999.
const LAST_DATE: u64 = 253_402_300_799;

/// Where a claim is: a top-level claim's name, or a JSON pointer (RFC 6901) when it
/// starts with `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPath(String);

/// A text that is no [`ClaimPath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a claim's name, nor a JSON pointer such as \"/app/tenants\"")]
pub struct ClaimPathError;

impl ClaimPath {
    /// Takes a name or a pointer with correct `~` escapes.
    pub fn parse(text: &str) -> Result<ClaimPath, ClaimPathError> {
        let pointer = text.starts_with('/');
        let escaped = text.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
        if text.is_empty() || text == "/" || (pointer && !escaped) {
            return Err(ClaimPathError);
        }
        Ok(ClaimPath(text.to_owned()))
    }

    fn find<'a>(&self, claims: &'a Value) -> Option<&'a Value> {
        if self.0.starts_with('/') { claims.pointer(&self.0) } else { claims.get(&self.0) }
    }
}

/// Judges in this order: is the token for us, who is it, when is it good, what may it do.
pub(super) fn judge(
    payload: &Value,
    issuer: &Issuer,
    now: SystemTime,
) -> Result<Claims, TokenError> {
    for_us(payload, &issuer.audience)?;
    let subject = name(payload, "sub")?.ok_or(TokenError::ClaimInvalid { claim: "sub" })?;
    let token_id = name(payload, "jti")?;
    let expires_at = in_time(payload, issuer.leeway, now)?;
    let issued_at = date(payload, "iat")?.map(|since| UNIX_EPOCH + since);
    let bound_to = confirmation(payload)?;
    let access = match issuer.access_claim.find(payload) {
        None => issuer.default_access.ok_or(TokenError::AccessAbsent)?,
        Some(claim) => access(claim, issuer.access_values.as_ref())?,
    };
    if issuer.max_access.is_some_and(|max| access > max) {
        return Err(TokenError::AccessBeyond { asked: access });
    }
    let tenants = tenants(issuer.tenant_claim.find(payload).ok_or(TokenError::TenantAbsent)?)?;
    if let Some(own) = &issuer.tenants
        && !tenants.iter().all(|id| own.iter().any(|pattern| pattern.matches(id)))
    {
        return Err(TokenError::TenantBeyond);
    }
    Ok(Claims {
        issuer: Arc::clone(&issuer.issuer),
        subject: subject.into(),
        token_id: token_id.map(Arc::from),
        tenants: tenants.into(),
        access,
        issued_at,
        expires_at,
        bound_to,
    })
}

/// The level that a claim names. A list is of roles, others' among them: so only where there is a map
/// of what is ours, and what it does not have is passed over. What is there and names nothing is never
/// taken for absent, and of two levels none is chosen.
fn access(claim: &Value, values: Option<&BTreeMap<String, Access>>) -> Result<Access, TokenError> {
    match (claim, values) {
        (Value::String(text), None) => text.parse().map_err(|_| TokenError::AccessUnknown),
        (Value::String(text), Some(values)) => {
            values.get(text).copied().ok_or(TokenError::AccessUnknown)
        }
        (Value::Array(roles), Some(values)) => {
            let roles: Option<Vec<&str>> = roles.iter().map(Value::as_str).collect();
            let roles = roles.ok_or(TokenError::AccessUnknown)?;
            let levels: BTreeSet<Access> =
                roles.into_iter().filter_map(|role| values.get(role).copied()).collect();
            match levels.len() {
                0 | 1 => levels.first().copied().ok_or(TokenError::AccessUnknown),
                _ => Err(TokenError::AccessAmbiguous),
            }
        }
        _ => Err(TokenError::AccessUnknown),
    }
}

/// `cnf` (RFC 7800): who alone may show the token. Only a certificate's hash (RFC 8705) can be
/// checked here; a token that asks for anything else would be taken from anybody.
fn confirmation(payload: &Value) -> Result<Option<[u8; 32]>, TokenError> {
    const INVALID: TokenError = TokenError::ClaimInvalid { claim: "cnf" };
    let Some(confirmation) = payload.get("cnf") else { return Ok(None) };
    let members = confirmation.as_object().filter(|members| members.len() == 1).ok_or(INVALID)?;
    let hash = members.get("x5t#S256").and_then(Value::as_str).ok_or(INVALID)?;
    let hash = URL_SAFE_NO_PAD.decode(hash).map_err(|_| INVALID)?;
    hash.try_into().map(Some).map_err(|_| INVALID)
}

/// `sub` or `jti` if it may be written to a log.
pub(super) fn loggable(payload: &Value, claim: &'static str) -> Option<String> {
    name(payload, claim).ok().flatten().map(str::to_owned)
}

fn for_us(payload: &Value, audience: &[String]) -> Result<(), TokenError> {
    const INVALID: TokenError = TokenError::ClaimInvalid { claim: "aud" };
    let ours = |named: &str| audience.iter().any(|our| our == named);
    let found = match payload.get("aud") {
        Some(Value::String(named)) => ours(named),
        Some(Value::Array(names)) => {
            let names: Option<Vec<&str>> = names.iter().map(Value::as_str).collect();
            names.ok_or(INVALID)?.into_iter().any(ours)
        }
        _ => return Err(INVALID),
    };
    if found { Ok(()) } else { Err(TokenError::AudienceWrong) }
}

fn name<'a>(payload: &'a Value, claim: &'static str) -> Result<Option<&'a str>, TokenError> {
    match payload.get(claim) {
        None => Ok(None),
        Some(Value::String(text)) if is_loggable(text) => Ok(Some(text)),
        Some(_) => Err(TokenError::ClaimInvalid { claim }),
    }
}

/// No control characters, no line separators, none that reorder the text around them.
fn is_loggable(text: &str) -> bool {
    let reorders = |c| matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}');
    let isolates = |c| matches!(c, '\u{2066}'..='\u{2069}');
    let hostile = |c: char| c.is_control() || reorders(c) || isolates(c);
    !text.is_empty() && text.chars().count() <= MAX_NAME && !text.chars().any(hostile)
}

/// From when on the token is refused.
fn in_time(payload: &Value, leeway: Duration, now: SystemTime) -> Result<SystemTime, TokenError> {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let expires = date(payload, "exp")?.ok_or(TokenError::ClaimInvalid { claim: "exp" })?;
    // RFC 7519: "on or after which the JWT MUST NOT be accepted".
    if expires + leeway <= now {
        return Err(TokenError::Expired { since: now.saturating_sub(expires) });
    }
    for claim in ["nbf", "iat"] {
        if date(payload, claim)?.is_some_and(|from| from > now + leeway) {
            return Err(TokenError::NotYetValid);
        }
    }
    Ok(UNIX_EPOCH + expires + leeway)
}

/// A NumericDate, since 1970. Strings are refused, not taken for absent: jsonwebtoken
/// once did that, and such tokens never expired (CVE-2026-25537).
fn date(payload: &Value, claim: &'static str) -> Result<Option<Duration>, TokenError> {
    const INVALID: fn(&'static str) -> TokenError = |claim| TokenError::ClaimInvalid { claim };
    let number = match payload.get(claim) {
        None => return Ok(None),
        Some(Value::Number(number)) => number,
        Some(_) => return Err(INVALID(claim)),
    };
    if let Some(seconds) = number.as_u64() {
        let date = (seconds <= LAST_DATE).then(|| Duration::from_secs(seconds));
        return date.map(Some).ok_or(INVALID(claim));
    }
    let seconds = number.as_f64().filter(|s| (0.0..=LAST_DATE as f64).contains(s));
    let date = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    date.map(Some).ok_or(INVALID(claim))
}

fn tenants(claim: &Value) -> Result<Vec<TenantId>, TokenError> {
    let parse = |value: &Value| value.as_str().and_then(|text| TenantId::parse(text).ok());
    let named = match claim {
        Value::String(_) => std::slice::from_ref(claim),
        Value::Array(named) if named.is_empty() => return Err(TokenError::TenantAbsent),
        Value::Array(named) if named.len() <= MAX_TENANTS => named.as_slice(),
        _ => return Err(TokenError::TenantMalformed),
    };
    let mut seen = HashSet::new();
    let mut tenants = Vec::new();
    for value in named {
        let tenant = parse(value).ok_or(TokenError::TenantMalformed)?;
        if seen.insert(tenant.clone()) {
            tenants.push(tenant);
        }
    }
    Ok(tenants)
}
