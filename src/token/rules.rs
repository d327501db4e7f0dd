//! What the claims of a token must look like, once its signature is good.
//!
//! Every rule refuses rather than repairs: a claim of the wrong type is an error, never
//! an absent claim. `sub` and `jti` go to logs and are bounded for it. Called only by
//! [`super::Verifier::verify`], which alone may make [`Claims`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_core::text::is_loggable;
use serde_json::Value;

use super::{Claims, Issuer, Named, TokenError};

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

    /// As it is written.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the claim `aud` itself.
    pub(super) fn is_aud(&self) -> bool {
        self.0 == "aud"
    }

    /// The claim, if it is there. What would hold it and cannot is not taken for its absence.
    pub(super) fn find<'a>(&self, claims: &'a Value) -> Result<Option<&'a Value>, Obstructed> {
        if !self.0.starts_with('/') {
            return Ok(claims.get(&self.0));
        }
        if let Some(claim) = claims.pointer(&self.0) {
            return Ok(Some(claim));
        }
        let mut around = self.0.as_str();
        while let Some((outer, _)) = around.rsplit_once('/') {
            match claims.pointer(outer) {
                Some(Value::Object(_)) => return Ok(None),
                Some(_) => return Err(Obstructed),
                None => around = outer,
            }
        }
        Ok(None)
    }
}

/// On the way to a claim there is something that holds no claims.
#[derive(Debug)]
pub(super) struct Obstructed;

/// Judges in this order: is the token for us, who is it, when is it good, what may it do.
pub(super) fn judge(
    payload: &Value,
    issuer: &Issuer,
    now: SystemTime,
) -> Result<Claims, TokenError> {
    for_us(payload, issuer)?;
    let subject = name(payload, "sub")?.ok_or(TokenError::ClaimInvalid { claim: "sub" })?;
    let token_id = name(payload, "jti")?;
    let expires_at = in_time(payload, issuer.leeway, now)?;
    let issued_at = date(payload, "iat")?.map(|since| UNIX_EPOCH + since);
    if let Some(max) = issuer.max_lifetime {
        short_lived(payload, max)?;
    }
    let bound_to = confirmation(payload)?;
    let access = match issuer.access_claim.find(payload) {
        Ok(None) => issuer.default_access.ok_or(TokenError::AccessAbsent)?,
        Ok(Some(claim)) => {
            access(claim, issuer.access_values.as_ref()).ok_or(TokenError::AccessUnknown)?
        }
        Err(Obstructed) => return Err(TokenError::AccessUnknown),
    };
    if issuer.max_access.is_some_and(|max| access > max) {
        return Err(TokenError::AccessBeyond { asked: access });
    }
    let claim =
        issuer.tenant_claim.find(payload).map_err(|Obstructed| TokenError::TenantMalformed)?;
    let tenants = tenants(claim.ok_or(TokenError::TenantAbsent)?, issuer.tenant_values.as_ref())?;
    Ok(Claims {
        issuer: Arc::clone(&issuer.issuer),
        subject: subject.into(),
        token_id: token_id.map(Arc::from),
        tenants: tenants.into(),
        bounds: issuer.tenants.clone(),
        access,
        issued_at,
        expires_at,
        bound_to: bound_to.map(Box::new),
    })
}

/// The level that a claim names: without a map, by its own name. With one the claim is a word of
/// the map, a list of words, or words between single spaces, as OAuth writes scopes; others are
/// other services' and passed over. Roles and scopes add up, so the highest level among them holds.
/// What is there and names none is never taken for absent.
fn access(claim: &Value, values: Option<&BTreeMap<String, Access>>) -> Option<Access> {
    let Some(values) = values else { return claim.as_str()?.parse().ok() };
    let words: Vec<&str> = match claim {
        Value::String(text) if values.contains_key(text) => vec![text],
        Value::String(text) => scopes(text)?,
        Value::Array(words) => words.iter().map(Value::as_str).collect::<Option<_>>()?,
        _ => return None,
    };
    words.into_iter().filter_map(|word| values.get(word).copied()).max()
}

/// RFC 6749, 3.3: words of visible ASCII but for `"` and `\`, a space between each two.
fn scopes(text: &str) -> Option<Vec<&str>> {
    let is_word = |word: &&str| {
        !word.is_empty() && word.bytes().all(|b| matches!(b, 0x21 | 0x23..=0x5b | 0x5d..=0x7e))
    };
    let words: Vec<&str> = text.split(' ').collect();
    words.iter().all(is_word).then_some(words)
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

/// The audience claim must name us, and where that is not `aud`, so must that if it is there (RFC
/// 7519, 4.1.3).
fn for_us(payload: &Value, issuer: &Issuer) -> Result<(), TokenError> {
    const INVALID: TokenError = TokenError::ClaimInvalid { claim: "aud" };
    let claim = issuer.audience_claim.find(payload).map_err(|Obstructed| INVALID)?;
    names_us(claim.ok_or(INVALID)?, &issuer.audience)?;
    match payload.get("aud") {
        Some(aud) if !issuer.audience_claim.is_aud() => names_us(aud, &issuer.audience),
        _ => Ok(()),
    }
}

fn names_us(claim: &Value, audience: &[String]) -> Result<(), TokenError> {
    const INVALID: TokenError = TokenError::ClaimInvalid { claim: "aud" };
    let ours = |named: &str| audience.iter().any(|our| our == named);
    let found = match claim {
        Value::String(named) => ours(named),
        Value::Array(names) => {
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

/// Who bounds how long a token lives must be told since when it does.
fn short_lived(payload: &Value, max: Duration) -> Result<(), TokenError> {
    let date = |claim| date(payload, claim)?.ok_or(TokenError::ClaimInvalid { claim });
    let lifetime = date("exp")?.saturating_sub(date("iat")?);
    if lifetime > max { Err(TokenError::LifetimeBeyond { lifetime }) } else { Ok(()) }
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

/// What the tenant claim says. With a map, that says which words are pgsilo's: of a list the others
/// are passed over, but not all of them.
fn tenants(
    claim: &Value,
    values: Option<&BTreeMap<String, TenantId>>,
) -> Result<Vec<Named>, TokenError> {
    let words = match claim {
        Value::String(_) => std::slice::from_ref(claim),
        Value::Array(words) if words.is_empty() => return Err(TokenError::TenantAbsent),
        Value::Array(words) if words.len() <= MAX_TENANTS => words.as_slice(),
        _ => return Err(TokenError::TenantMalformed),
    };
    let mut named = Vec::with_capacity(words.len());
    for word in words {
        let word = word.as_str().filter(|word| is_loggable(word));
        let word = word.ok_or(TokenError::TenantMalformed)?;
        match values {
            None => named.push(Named::Word(word.into())),
            Some(values) => named.extend(values.get(word).cloned().map(Named::Tenant)),
        }
    }
    if named.is_empty() { Err(TokenError::TenantMalformed) } else { Ok(named) }
}
