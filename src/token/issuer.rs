//! One issuer: whose name a token must have, which keys and algorithms sign for it, and how its
//! claims are read.
//!
//! The configuration makes issuers; [`super::Verifier`] checks them against each other and asks
//! them whether a signature is theirs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::{Access, TenantId, TenantPattern};
use serde::de::IgnoredAny;

use super::keys::ED25519_NAME;
use super::strict::Header;
use super::{
    Algorithm, ClaimPath, Key, KeySource, KeySourceError, Keyring, MAX_LEEWAY, TokenError,
};

/// Whose tokens are believed, and how they are read: with its keys, or with where they come from.
#[derive(Debug)]
pub struct Issuer<K = Keyring> {
    /// Must equal `iss`.
    pub issuer: Arc<str>,
    /// One of them must be in the audience claim.
    pub audience: Vec<String>,
    /// Where that is: `aud`, or where it is something else, that and `aud` if it is there.
    pub audience_claim: ClaimPath,
    /// The algorithms in use; a key's own are narrowed to these.
    pub algorithms: Vec<Algorithm>,
    /// The keys, and where they come from.
    pub keys: K,
    /// Where the tenant, or a list of them, is.
    pub tenant_claim: ClaimPath,
    /// What the claim's texts mean, and none else is taken; `None`: they are ids, or the registry's
    /// aliases.
    pub tenant_values: Option<BTreeMap<String, TenantId>>,
    /// Where the access level is.
    pub access_claim: ClaimPath,
    /// What the claim's words mean; `None`: it is one text, a level's own name.
    pub access_values: Option<BTreeMap<String, Access>>,
    /// For a token without that claim; `None`: it is refused.
    pub default_access: Option<Access>,
    /// Whom its tokens may name, whatever they call them; `None`: any tenant.
    pub tenants: Option<Arc<[TenantPattern]>>,
    /// The most that its tokens may grant; `None`: any access.
    pub max_access: Option<Access>,
    /// Its word is not enough: the registry must have a grant, too.
    pub needs_grant: bool,
    /// The longest from `iat` to `exp`; `None`: any. With it, `iat` must be there.
    pub max_lifetime: Option<Duration>,
    /// For clocks that differ; at most [`MAX_LEEWAY`].
    pub leeway: Duration,
}

/// Which setting of which issuer makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct IssuerError {
    /// Counted from 0, in the order given.
    pub issuer: usize,
    /// What is wrong.
    pub fault: IssuerFault,
}

/// What can be wrong with an [`Issuer`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssuerFault {
    /// No name.
    #[error("empty; it must equal the token's `iss`")]
    Unnamed,
    /// The same name twice.
    #[error("this issuer is already there; give each issuer one [[issuer]] table")]
    Duplicate,
    /// Nothing to compare `aud` with.
    #[error("empty; name at least one audience")]
    NoAudience,
    /// Nothing is allowed.
    #[error("empty; name at least one algorithm")]
    NoAlgorithms,
    /// Two keys of the same id.
    #[error("two keys have the kid {0:?}; a kid must be unique")]
    DuplicateKey(String),
    /// The list of algorithms and the keys have nothing in common.
    #[error("no key fits `algorithms`; add the keys' algorithm there or another key")]
    NoKey,
    /// More than [`MAX_LEEWAY`].
    #[error("too long; at most 5m")]
    Leeway,
    /// No life at all.
    #[error("zero; no token would be taken")]
    NoLifetime,
}

impl Issuer<KeySource> {
    /// Its keys, so far as no address has to be asked; nothing is fetched. Blocks. What is unwise
    /// about them is told with it.
    ///
    /// # Errors
    /// When a file is no key set, or the HTTP client cannot be made.
    pub(crate) fn open(self) -> Result<(Issuer, Vec<String>), KeySourceError> {
        let (keys, warnings) = self.keys.open(&self.algorithms)?;
        let issuer = Issuer {
            keys,
            issuer: self.issuer,
            audience: self.audience,
            audience_claim: self.audience_claim,
            algorithms: self.algorithms,
            tenant_claim: self.tenant_claim,
            tenant_values: self.tenant_values,
            access_claim: self.access_claim,
            access_values: self.access_values,
            default_access: self.default_access,
            tenants: self.tenants,
            max_access: self.max_access,
            needs_grant: self.needs_grant,
            max_lifetime: self.max_lifetime,
            leeway: self.leeway,
        };
        Ok((issuer, warnings))
    }
}

impl Issuer {
    pub(super) fn settle(&mut self) -> Result<(), IssuerFault> {
        if self.issuer.is_empty() {
            return Err(IssuerFault::Unnamed);
        }
        if self.audience.is_empty() || self.audience.iter().any(String::is_empty) {
            return Err(IssuerFault::NoAudience);
        }
        if self.algorithms.is_empty() {
            return Err(IssuerFault::NoAlgorithms);
        }
        if self.leeway > MAX_LEEWAY {
            return Err(IssuerFault::Leeway);
        }
        if self.max_lifetime.is_some_and(|max| max.is_zero()) {
            return Err(IssuerFault::NoLifetime);
        }
        self.keys.settle(&self.algorithms)
    }

    /// jsonwebtoken verifies, and then applies its own rules as a second net: `Ok(false)`
    /// is a good signature over claims that it dislikes. Time is not its business: it
    /// would read another clock than `now`.
    pub(super) fn check_signature(
        &self,
        token: &Secret,
        key: &Key,
        header: &Header<'_>,
    ) -> Result<bool, TokenError> {
        use jsonwebtoken::errors::ErrorKind;

        let algorithm = header.algorithm.into();
        if header.algorithm_name == ED25519_NAME {
            return has_signature(token, key, algorithm).map(|()| true);
        }
        // So that below a JSON error can only come from the payload, which is read after
        // the signature was verified.
        jsonwebtoken::decode_header(token.expose()).map_err(|_| TokenError::Malformed)?;
        let mut net = jsonwebtoken::Validation::new(algorithm);
        net.set_issuer(&[&self.issuer]);
        if self.audience_claim.is_aud() {
            net.set_audience(&self.audience);
            net.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        } else {
            net.validate_aud = false;
            net.set_required_spec_claims(&["exp", "iss", "sub"]);
        }
        net.validate_exp = false;
        net.validate_nbf = false;
        match jsonwebtoken::decode::<IgnoredAny>(token.expose(), key.decoding(), &net) {
            Ok(_) => Ok(true),
            Err(error) => match error.kind() {
                ErrorKind::Json(_)
                | ErrorKind::InvalidAudience
                | ErrorKind::InvalidIssuer
                | ErrorKind::MissingRequiredClaim(_) => Ok(false),
                _ => Err(TokenError::SignatureInvalid),
            },
        }
    }
}

/// Whether a token is signed, where its header has a name for the algorithm that jsonwebtoken's own
/// reader of headers does not know.
fn has_signature(
    token: &Secret,
    key: &Key,
    algorithm: jsonwebtoken::Algorithm,
) -> Result<(), TokenError> {
    let text = token.expose_text().map_err(|_| TokenError::Malformed)?;
    let (message, signature) = text.rsplit_once('.').ok_or(TokenError::Malformed)?;
    match jsonwebtoken::crypto::verify(signature, message.as_bytes(), key.decoding(), algorithm) {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(TokenError::SignatureInvalid),
    }
}
