//! What OpenBAO answers to both planes.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use serde::Deserialize;

use crate::tokens::{Nature, Token};

/// No time that OpenBAO tells is believed to be longer: about ten years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A time of an answer. Whatever is told, it can be added to a time.
pub(crate) fn seconds(told: u64) -> Duration {
    Duration::from_secs(told).min(LONGEST)
}

/// What most answers are wrapped in.
#[derive(Deserialize)]
pub(crate) struct Data<T> {
    pub(crate) data: T,
}

#[derive(Deserialize)]
pub(crate) struct AuthAnswer {
    pub(crate) auth: AuthData,
}

#[derive(Deserialize)]
pub(crate) struct AuthData {
    client_token: Secret,
    lease_duration: u64,
    renewable: bool,
    num_uses: u64,
    token_type: String,
    orphan: bool,
    #[serde(default)]
    policies: Vec<String>,
}

#[derive(Deserialize)]
pub(crate) struct LookupData {
    ttl: u64,
    /// Nothing: it never expires. Its `ttl` is 0 as in the last second of one that does.
    expire_time: Option<String>,
    #[serde(default)]
    renewable: bool,
    num_uses: u64,
    #[serde(rename = "type")]
    kind: String,
    orphan: bool,
    explicit_max_ttl: u64,
    #[serde(default)]
    policies: Vec<String>,
}

#[derive(Deserialize)]
pub(crate) struct SecretIdData {
    pub(crate) secret_id: Secret,
}

#[derive(Deserialize)]
pub(crate) struct Errors {
    pub(crate) errors: Vec<String>,
}

impl From<AuthData> for Token {
    fn from(auth: AuthData) -> Token {
        Token {
            secret: auth.client_token,
            ttl: seconds(auth.lease_duration),
            renewable: auth.renewable,
            nature: Nature {
                uses: auth.num_uses,
                kind: auth.token_type,
                orphan: auth.orphan,
                policies: auth.policies,
            },
            explicit_max: None,
        }
    }
}

impl LookupData {
    /// The token that was looked up.
    pub(crate) fn of(self, secret: Secret) -> Token {
        let least = u64::from(self.expire_time.is_some());
        let max = seconds(self.explicit_max_ttl);
        Token {
            secret,
            ttl: seconds(self.ttl.max(least)),
            renewable: self.renewable,
            nature: Nature {
                uses: self.num_uses,
                kind: self.kind,
                orphan: self.orphan,
                policies: self.policies,
            },
            explicit_max: Some(max).filter(|max| !max.is_zero()),
        }
    }
}
