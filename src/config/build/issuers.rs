//! Whose tokens are believed: their names, rules and keys.

use super::super::raw::RawIssuer;
use super::{Build, FileError};
use crate::token::{Algorithm, ClaimPath, Issuer, IssuerFault, Key, KeySet, Verifier};

impl Build<'_> {
    pub(super) fn verifier(&mut self, raw: Vec<RawIssuer>) -> Result<Verifier, FileError> {
        if raw.is_empty() {
            return self.wrong("issuer", "there is none; add an [[issuer]] table");
        }
        let mut issuers = Vec::with_capacity(raw.len());
        let mut sources = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            sources.push(if raw.jwks.is_some() { "jwks" } else { "keys" });
            issuers.push(self.issuer(&format!("issuer[{index}]"), raw)?);
        }
        Verifier::new(issuers).or_else(|error| {
            let field = match error.fault {
                IssuerFault::Unnamed | IssuerFault::Duplicate => "issuer",
                IssuerFault::NoAudience => "audience",
                IssuerFault::NoAlgorithms | IssuerFault::NoKey => "algorithms",
                IssuerFault::DuplicateKey(_) => sources[error.issuer],
                IssuerFault::Leeway => "leeway",
            };
            self.wrong(format!("issuer[{}].{field}", error.issuer), error)
        })
    }

    fn issuer(&mut self, at: &str, raw: RawIssuer) -> Result<Issuer, FileError> {
        let mut algorithms = Vec::with_capacity(raw.algorithms.len());
        for (index, name) in raw.algorithms.iter().enumerate() {
            algorithms.push(self.algorithm(&format!("{at}.algorithms[{index}]"), name)?);
        }
        let keys = self.keys(at, &raw)?;
        let source = if raw.jwks.is_some() { "jwks" } else { "keys" };
        for key in &keys {
            let id = key.id().unwrap_or_default();
            if key.id().is_none() && keys.len() > 1 {
                self.warn(
                    format!("{at}.{source}"),
                    "a key without kid beside others is never chosen",
                );
            } else if !key.algorithms().iter().any(|algorithm| algorithms.contains(algorithm)) {
                self.warn(
                    format!("{at}.{source}"),
                    format_args!(
                        "the key with the kid {id:?} fits none of `algorithms` and is never used"
                    ),
                );
            }
        }
        let claim = |key: &str, text: &str| {
            let wrong = |error| {
                self.file.wrong(&format!("{at}.{key}"), format_args!("{text:?} is {error}"))
            };
            ClaimPath::parse(text).map_err(wrong)
        };
        Ok(Issuer {
            tenant_claim: claim("tenant_claim", &raw.tenant_claim)?,
            access_claim: claim("access_claim", &raw.access_claim)?,
            default_access: raw.default_access.parse().or_else(|error| {
                self.wrong(
                    format!("{at}.default_access"),
                    format_args!("{:?} is not one: {error}", raw.default_access),
                )
            })?,
            issuer: raw.issuer,
            audience: raw.audience,
            algorithms,
            keys,
            leeway: raw.leeway.0,
        })
    }

    fn algorithm(&self, field: &str, name: &str) -> Result<Algorithm, FileError> {
        name.parse().or_else(|error| self.wrong(field, format_args!("{name:?} is {error}")))
    }

    fn keys(&mut self, at: &str, raw: &RawIssuer) -> Result<Vec<Key>, FileError> {
        match (&raw.jwks, &raw.keys) {
            (Some(_), Some(_)) => self.wrong(format!("{at}.keys"), "both jwks and keys; keep one"),
            (None, None) => self.wrong(at, "no keys; add jwks = FILE, or keys = [...]"),
            (Some(path), None) => {
                let field = format!("{at}.jwks");
                let path = self.file.resolve(path);
                let set = KeySet::from_jwks(&self.read(&field, &path)?)
                    .or_else(|error| self.wrong(&field, format_args!("{path:?}: {error}")))?;
                for warning in set.warnings {
                    self.warn(&field, format_args!("{path:?}: {warning}"));
                }
                Ok(set.keys)
            }
            (None, Some(listed)) if listed.is_empty() => {
                self.wrong(format!("{at}.keys"), "empty; list at least one key")
            }
            (None, Some(listed)) => {
                let mut keys = Vec::with_capacity(listed.len());
                for (index, key) in listed.iter().enumerate() {
                    let at = format!("{at}.keys[{index}]");
                    if key.kid.is_empty() {
                        return self
                            .wrong(format!("{at}.kid"), "empty; it must equal the token's `kid`");
                    }
                    let algorithm = self.algorithm(&format!("{at}.algorithm"), &key.algorithm)?;
                    let path = self.file.resolve(&key.pem);
                    let pem = self.read(&format!("{at}.pem"), &path)?;
                    let key = Key::from_pem(&key.kid, algorithm, &pem);
                    keys.push(key.or_else(|error| {
                        self.wrong(format!("{at}.pem"), format_args!("{path:?}: {error}"))
                    })?);
                }
                Ok(keys)
            }
        }
    }
}
