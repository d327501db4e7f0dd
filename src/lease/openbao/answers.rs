//! What OpenBAO answers, as far as pgsilo reads it.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use serde::Deserialize;

use super::{BaoToken, Nature};

#[derive(Deserialize)]
pub(super) struct CredsAnswer {
    pub(super) lease_id: String,
    pub(super) lease_duration: u64,
    #[serde(default)]
    pub(super) renewable: bool,
    pub(super) data: CredsData,
}

#[derive(Deserialize)]
pub(super) struct RenewAnswer {
    pub(super) lease_duration: u64,
    #[serde(default)]
    pub(super) renewable: bool,
}

#[derive(Deserialize)]
pub(super) struct CredsData {
    pub(super) username: String,
    pub(super) password: Secret,
}

#[derive(Deserialize)]
pub(super) struct AuthAnswer {
    pub(super) auth: AuthData,
}

#[derive(Deserialize)]
pub(super) struct AuthData {
    pub(super) client_token: Secret,
    pub(super) lease_duration: u64,
    pub(super) renewable: bool,
    pub(super) num_uses: u64,
    pub(super) token_type: String,
    pub(super) orphan: bool,
    #[serde(default)]
    pub(super) policies: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct LookupAnswer {
    pub(super) data: LookupData,
}

#[derive(Deserialize)]
pub(super) struct LookupData {
    pub(super) ttl: u64,
    /// Nothing: it never expires. Its `ttl` is 0 as in the last second of one that does.
    pub(super) expire_time: Option<String>,
    #[serde(default)]
    pub(super) renewable: bool,
    pub(super) num_uses: u64,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) orphan: bool,
    pub(super) explicit_max_ttl: u64,
    #[serde(default)]
    pub(super) policies: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct CountAnswer {
    pub(super) data: CountData,
}

#[derive(Deserialize)]
pub(super) struct CountData {
    pub(super) lease_count: u64,
}

#[derive(Deserialize)]
pub(super) struct UnwrapAnswer {
    pub(super) data: UnwrapData,
}

#[derive(Deserialize)]
pub(super) struct UnwrapData {
    pub(super) secret_id: Secret,
}

#[derive(Deserialize)]
pub(super) struct Errors {
    pub(super) errors: Vec<String>,
}

impl From<AuthData> for BaoToken {
    fn from(auth: AuthData) -> BaoToken {
        BaoToken {
            secret: auth.client_token,
            ttl: Duration::from_secs(auth.lease_duration),
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
    pub(super) fn of(self, secret: Secret) -> BaoToken {
        let least = u64::from(self.expire_time.is_some());
        let max = Duration::from_secs(self.explicit_max_ttl);
        BaoToken {
            secret,
            ttl: Duration::from_secs(self.ttl.max(least)),
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
