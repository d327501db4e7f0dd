//! Tokens: what a client shows, and the claims that a verified one makes.
//!
//! A token is an unverified [`Secret`]. [`Verifier::verify`] is the only way from it to [`Claims`],
//! and does no I/O: the signature is checked by jsonwebtoken, everything around it (shape, header,
//! which key, which algorithm, every claim) strictly here. The algorithm comes from the key and the
//! issuer's list, never from the token. Nothing is said about a token's content unless its
//! signature verified ([`Rejected::verified`]). Of a well-formed token only the issuer's name is
//! looked at before it is known whether that issuer has keys in force: so a refusal for want of
//! keys says nothing about the token.
//!
//! A token names tenants by their ids, or by words of its issuer's that the issuer's
//! `tenant_values` or the registry knows. A session belongs to the tenant that the word means now,
//! and ends when it means another.
//!
//! [`Verifier::identify`] verifies once more when a token names a key that is not there.
//! `keyring.rs` tells how keys come and go. The configuration makes the verifier; the Identified
//! stage asks it.

mod explain;
mod fetch;
mod issuer;
mod keyring;
mod keys;
mod refresh_gate;
mod rules;
mod source;
mod strict;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::select_all;
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::{Access, TenantId, TenantPattern};
use serde_json::Value;
use tokio::runtime::Handle;

pub use self::fetch::{FetchError, Fetcher, KeysAt, KeysUrl, KeysUrlError};
pub use self::issuer::{Issuer, IssuerError, IssuerFault};
pub(crate) use self::keyring::KeySourceError;
pub use self::keyring::{KeyFile, KeyFileError, KeySource, Keyring};
pub use self::keys::{Algorithm, AlgorithmError, Key, KeyError, KeySet};
pub use self::rules::{ClaimPath, ClaimPathError};
pub(crate) use self::source::SourceError;
pub use self::source::{Source, SourceSettings};

/// No token is longer, whatever the configuration says.
pub const MAX_TOKEN_BYTES: usize = 65_536;

/// Clocks that differ more than this are to be repaired, not tolerated.
pub const MAX_LEEWAY: Duration = Duration::from_secs(300);

/// What a verified token says. Only [`Verifier::verify`] makes one.
#[derive(Debug)]
pub struct Claims {
    issuer: Arc<str>,
    subject: Arc<str>,
    token_id: Option<Arc<str>>,
    tenants: Box<[Named]>,
    /// Its issuer's, for whatever the registry says that the words mean.
    bounds: Option<Arc<[TenantPattern]>>,
    access: Access,
    issued_at: Option<SystemTime>,
    expires_at: SystemTime,
    bound_to: Option<Box<[u8; 32]>>,
}

impl Claims {
    /// `iss`: one of the configured issuers.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// `sub`: not empty, at most 256 characters, safe in a log line.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// `jti`, under the same bounds.
    pub fn token_id(&self) -> Option<&str> {
        self.token_id.as_deref()
    }

    /// Issuer, subject and token id, to be shared.
    pub(crate) fn names(&self) -> (&Arc<str>, &Arc<str>, Option<&Arc<str>>) {
        (&self.issuer, &self.subject, self.token_id.as_ref())
    }

    /// The memberships, at least one, each once, in the token's order. `known` says which tenant a
    /// word means, be it an id or an alias; what it does not know may still be an id.
    ///
    /// # Errors
    /// When a word means nothing, or a tenant that the issuer may not speak for.
    pub fn tenants(
        &self,
        known: impl Fn(&str) -> Option<TenantId>,
    ) -> Result<Vec<TenantId>, Rejected> {
        let (mut seen, mut tenants) = (HashSet::new(), Vec::new());
        for named in &self.tenants {
            let no = |error, word| self.rejected(error, explain::word(word));
            let id = named.tenant(&known).ok_or_else(|| no(TokenError::TenantMalformed, named))?;
            let bounds = self.bounds.as_ref();
            if bounds.is_some_and(|own| !own.iter().any(|pattern| pattern.matches(&id))) {
                return Err(no(TokenError::TenantBeyond, &Named::Tenant(id)));
            }
            if seen.insert(id.clone()) {
                tenants.push(id);
            }
        }
        Ok(tenants)
    }

    /// This token, for what it names.
    fn rejected(&self, error: TokenError, detail: String) -> Rejected {
        let (subject, token_id) = (Some(self.subject().into()), self.token_id().map(Into::into));
        Rejected { error, detail, verified: true, subject, token_id }
    }

    /// Whether this tenant is among them.
    pub(crate) fn means(&self, id: &TenantId, known: impl Fn(&str) -> Option<TenantId>) -> bool {
        // Nearly always by its id, which is always its own.
        self.tenants.iter().any(|named| named.is(id))
            || self.tenants.iter().any(|named| named.tenant(&known).as_ref() == Some(id))
    }

    /// Forgets what it calls other tenants than that one, if it has that one's id: it means that
    /// tenant for ever, and a token may name a thousand.
    pub(crate) fn settle_on(&mut self, id: &TenantId) {
        if let Some(own) = self.tenants.iter().find(|named| named.is(id)) {
            self.tenants = [own.clone()].into();
        }
    }

    /// How much the sessions of this token may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// `iat`.
    pub fn issued_at(&self) -> Option<SystemTime> {
        self.issued_at
    }

    /// The client certificate that alone may show this token: its SHA-256 (`cnf`, RFC 8705).
    pub fn bound_to(&self) -> Option<&[u8; 32]> {
        self.bound_to.as_deref()
    }

    /// From when on this token is refused: its `exp` plus the issuer's leeway. A session
    /// that was let in by the leeway therefore does not end at once.
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }
}

#[cfg(test)]
impl Claims {
    /// Of a token that calls its tenants so, for those who meet claims and no tokens.
    pub(crate) fn of(tenants: &[&str], access: Access) -> Claims {
        let words = tenants.iter().map(|word| Named::Word((*word).into()));
        Claims {
            issuer: "https://issuer.example".into(),
            subject: "alice".into(),
            token_id: None,
            tenants: words.collect(),
            bounds: None,
            access,
            issued_at: None,
            expires_at: SystemTime::now() + Duration::from_secs(60),
            bound_to: None,
        }
    }
}

/// A tenant as a token names it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Named {
    /// What its issuer's `tenant_values` make of the word.
    Tenant(TenantId),
    /// A word that the registry may know. Fit for a log line.
    Word(Arc<str>),
}

impl Named {
    fn is(&self, other: &TenantId) -> bool {
        match self {
            Named::Tenant(id) => id == other,
            Named::Word(word) => **word == *other.as_str(),
        }
    }

    fn tenant(&self, known: impl Fn(&str) -> Option<TenantId>) -> Option<TenantId> {
        match self {
            Named::Tenant(id) => Some(id.clone()),
            Named::Word(word) => known(word).or_else(|| TenantId::parse(word).ok()),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Named::Tenant(id) => id.fmt(f),
            Named::Word(word) => f.write_str(word),
        }
    }
}

/// Why a token is refused. No text holds any part of the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nothing was sent.
    #[error("no token")]
    Missing,
    /// Not three base64url parts, not strict JSON objects, or too long.
    #[error("malformed token")]
    Malformed,
    /// A header member that asks for something that is never done here.
    #[error("header member {member:?} is refused")]
    HeaderRefused {
        /// Which one.
        member: &'static str,
    },
    /// An algorithm that the issuer's list or the chosen key does not have.
    #[error("algorithm refused")]
    AlgorithmRefused,
    /// `iss` is absent or not configured.
    #[error("unknown issuer")]
    IssuerUnknown,
    /// The issuer's keys were never fetched, or too long ago. Said of any token that names the
    /// issuer, whatever else is in it.
    #[error("the issuer's keys are not available")]
    KeysUnavailable,
    /// `kid` is absent where there are several keys, or the issuer has no such key.
    #[error("unknown key")]
    KeyUnknown,
    /// `kid` is none of the keys in force, and whether it is new cannot be found out: the look at
    /// the issuer's source failed.
    #[error("unknown key, and the issuer cannot be asked whether it is new")]
    KeyUnchecked,
    /// The signature is not the chosen key's over these bytes.
    #[error("invalid signature")]
    SignatureInvalid,
    /// `aud` does not name this service.
    #[error("wrong audience")]
    AudienceWrong,
    /// `nbf` or `iat` lies in the future.
    #[error("not valid yet")]
    NotYetValid,
    /// `exp` has passed.
    #[error("expired {} s ago", since.as_secs())]
    Expired {
        /// How long ago.
        since: Duration,
    },
    /// A claim that must be there is not, or it is of the wrong type or out of bounds.
    #[error("claim {claim:?} is missing or invalid")]
    ClaimInvalid {
        /// Which one.
        claim: &'static str,
    },
    /// The access claim is there and names no access level.
    #[error("the access claim names no access level")]
    AccessUnknown,
    /// There is no access claim, and its issuer has no default.
    #[error("no access claim, and default_access is \"refuse\"")]
    AccessAbsent,
    /// More than its issuer may grant.
    #[error("it asks for {asked} access, more than the issuer's max_access")]
    AccessBeyond {
        /// How much.
        asked: Access,
    },
    /// No tenant claim, or an empty one.
    #[error("no tenant claim")]
    TenantAbsent,
    /// From `iat` to `exp` it is longer than its issuer's tokens may live.
    #[error("a life of {} s, longer than the issuer's max_lifetime", lifetime.as_secs())]
    LifetimeBeyond {
        /// How long.
        lifetime: Duration,
    },
    /// A tenant claim that is not the name of one tenant or a list of at most 1000.
    #[error("malformed tenant claim")]
    TenantMalformed,
    /// A tenant that its issuer may not speak for.
    #[error("it names a tenant that the issuer's `tenants` does not have")]
    TenantBeyond,
}

/// A refused token: the reason, and what the audit may know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}{}{detail}", if detail.is_empty() { "" } else { ": " })]
pub struct Rejected {
    /// The reason.
    pub error: TokenError,
    /// What was found and what was expected, for operators only; of one value at most 80
    /// characters. Anybody may have written it.
    pub detail: String,
    /// Whether the signature was good. Only then may a client learn the reason, and only
    /// then is anything of the token believed.
    pub verified: bool,
    /// `sub` of a verified token, if it is fit for a log line.
    pub subject: Option<String>,
    /// `jti` of a verified token, if it is fit for a log line.
    pub token_id: Option<String>,
}

impl Rejected {
    fn names_an_unknown_key(&self) -> bool {
        self.error == TokenError::KeyUnknown
    }
}

impl From<TokenError> for Rejected {
    fn from(error: TokenError) -> Rejected {
        Rejected { error, detail: String::new(), verified: false, subject: None, token_id: None }
    }
}

/// Verifies tokens; shared by every session. Only the issuers' keys change.
#[derive(Debug)]
pub struct Verifier {
    issuers: HashMap<Arc<str>, Issuer>,
}

impl Verifier {
    /// Checks the issuers against each other and narrows every key's algorithms to what
    /// its issuer allows.
    pub fn new(issuers: Vec<Issuer>) -> Result<Verifier, IssuerError> {
        let mut known: HashMap<Arc<str>, Issuer> = HashMap::with_capacity(issuers.len());
        for (index, mut issuer) in issuers.into_iter().enumerate() {
            issuer.settle().map_err(|fault| IssuerError { issuer: index, fault })?;
            if known.contains_key(&issuer.issuer) {
                return Err(IssuerError { issuer: index, fault: IssuerFault::Duplicate });
            }
            known.insert(issuer.issuer.clone(), issuer);
        }
        Ok(Verifier { issuers: known })
    }

    /// Whether there is no issuer.
    pub fn is_empty(&self) -> bool {
        self.issuers.is_empty()
    }

    /// Verifies a token now. If it names a key that its issuer does not have, the issuer's source
    /// is looked at once more, as soon as it may be, and the token verified again: so a new key
    /// works from its first token on. Strangers can ask for that; see `refresh_gate.rs`.
    pub async fn identify(&self, token: &Secret) -> Result<Claims, Rejected> {
        let verdict = self.verify(token, SystemTime::now());
        if !verdict.as_ref().is_err_and(Rejected::names_an_unknown_key) {
            return verdict;
        }
        let Some(gate) = self.named_keyring(token).and_then(Keyring::refresh_gate) else {
            return verdict;
        };
        let seen = gate.request_refresh().await;
        match self.verify(token, SystemTime::now()) {
            Err(rejected) if !seen && rejected.names_an_unknown_key() => {
                Err(Rejected { error: TokenError::KeyUnchecked, ..rejected })
            }
            verdict => verdict,
        }
    }

    /// Whose key a token names, if it names one.
    fn named_keyring(&self, token: &Secret) -> Option<&Keyring> {
        let parts = strict::read(token.expose()).ok()?;
        strict::header(&parts.header).ok()?.key_id?;
        let issuer = parts.payload.get("iss").and_then(Value::as_str)?;
        self.issuers.get(issuer).map(|issuer| &issuer.keys)
    }

    /// Fetches keys in the background, from now on.
    pub(crate) fn spawn_key_refresh(&'static self, runtime: &Handle) {
        for issuer in self.issuers.values() {
            runtime.spawn(issuer.keys.refresh_periodically(&issuer.issuer));
        }
    }

    /// Reads the files of keys again that have changed, or all of them; what came of each. Blocks.
    pub(crate) fn reload_files(&self, in_any_case: bool) -> Vec<Result<bool, KeyFileError>> {
        let issuers = self.issuers.values();
        issuers.filter_map(|issuer| issuer.keys.reload(&issuer.issuer, in_any_case)).collect()
    }

    /// Resolves when a token names a key that its issuer's file did not have.
    pub(crate) async fn file_refresh_requested(&self) {
        let asked =
            self.issuers.values().map(|issuer| Box::pin(issuer.keys.file_refresh_requested()));
        let never = Box::pin(std::future::pending()) as Pin<Box<dyn Future<Output = ()> + Send>>;
        select_all(asked.map(|asked| asked as _).chain([never])).await;
    }

    /// Whether this issuer's word is not enough.
    pub(crate) fn needs_grant(&self, issuer: &str) -> bool {
        self.issuers.get(issuer).is_some_and(|issuer| issuer.needs_grant)
    }

    /// Whether any issuer has usable keys.
    pub(crate) fn has_usable_keys(&self) -> bool {
        self.issuers.values().any(|issuer| issuer.keys.in_force().is_some())
    }

    /// For each issuer whose keys may change, how long they have not been known to be its own.
    pub(crate) fn ages(&self) -> impl Iterator<Item = (&str, Duration)> {
        self.issuers.values().filter_map(|issuer| Some((&*issuer.issuer, issuer.keys.age()?)))
    }

    /// The one way from a token to claims. `now` is the only clock for what the token says.
    pub fn verify(&self, token: &Secret, now: SystemTime) -> Result<Claims, Rejected> {
        if token.expose().is_empty() {
            return Err(TokenError::Missing.into());
        }
        let parts = strict::read(token.expose()).map_err(|error| {
            let detail = explain::shape(token.expose()).to_owned();
            Rejected { detail, ..Rejected::from(error) }
        })?;
        let issuer = parts.payload.get("iss").and_then(Value::as_str);
        let issuer = issuer.and_then(|iss| self.issuers.get(iss));
        judged(token, &parts, issuer, now).map_err(|rejected| {
            let detail = explain::difference(&rejected.error, &parts, issuer, &self.issuers);
            Rejected { detail, ..rejected }
        })
    }
}

/// The header and `iss` are not believed here: they only choose whose signature to check, among
/// keys that are all trusted.
fn judged(
    token: &Secret,
    parts: &strict::Parts,
    issuer: Option<&Issuer>,
    now: SystemTime,
) -> Result<Claims, Rejected> {
    let header = strict::header(&parts.header)?;
    let issuer = issuer.ok_or(TokenError::IssuerUnknown)?;
    let keys = issuer.keys.in_force().ok_or(TokenError::KeysUnavailable)?;
    let key = keys.key(header.key_id).ok_or(TokenError::KeyUnknown)?;
    if !key.algorithms().contains(&header.algorithm) {
        return Err(TokenError::AlgorithmRefused.into());
    }
    let agreed = issuer.check_signature(token, key, &header)?;
    let verdict = rules::judge(&parts.payload, issuer, now);
    let verdict = if agreed { verdict } else { verdict.and(Err(TokenError::Malformed)) };
    verdict.map_err(|error| Rejected {
        error,
        verified: true,
        detail: String::new(),
        subject: rules::loggable(&parts.payload, "sub"),
        token_id: rules::loggable(&parts.payload, "jti"),
    })
}

#[cfg(test)]
mod tests;
