//! What OpenBAO answers, as far as pgsilo reads it.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::leases::Granted;
use crate::tokens::{Nature, Token};

/// What most answers are wrapped in.
#[derive(Deserialize)]
pub(crate) struct Data<T> {
    pub(crate) data: T,
}

#[derive(Deserialize)]
pub(crate) struct CredsAnswer {
    pub(crate) lease_id: String,
    pub(crate) lease_duration: u64,
    #[serde(default)]
    pub(crate) renewable: bool,
    pub(crate) data: CredsData,
}

#[derive(Deserialize)]
pub(crate) struct CredsData {
    pub(crate) username: String,
    pub(crate) password: Secret,
}

#[derive(Deserialize)]
pub(crate) struct RenewAnswer {
    pub(crate) lease_duration: u64,
    #[serde(default)]
    pub(crate) renewable: bool,
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
pub(crate) struct CountData {
    pub(crate) lease_count: u64,
}

#[derive(Deserialize)]
pub(crate) struct SecretIdData {
    pub(crate) secret_id: Secret,
}

#[derive(Deserialize)]
pub(crate) struct ListData {
    pub(crate) keys: Vec<String>,
}

#[derive(Deserialize)]
pub(crate) struct EngineData {
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

#[derive(Deserialize)]
pub(crate) struct Errors {
    pub(crate) errors: Vec<String>,
}

/// What OpenBAO knows of a lease.
#[derive(Clone, Debug, Deserialize)]
pub struct LeaseInfo {
    /// When it ends, as RFC 3339 has it.
    pub expire_time: String,
    /// How long it still lives, in seconds; negative: OpenBAO should have revoked it so long ago.
    pub ttl: i64,
    /// Why its revocation was given up, if it was.
    #[serde(default)]
    pub revoke_error: Option<String>,
}

/// A role of the database engine: how credentials are made.
#[derive(Clone, Debug, Deserialize)]
pub struct DatabaseRole {
    /// The configuration that it makes them with.
    pub db_name: String,
    /// In SQL, with templates.
    #[serde(default, deserialize_with = "or_none")]
    pub creation_statements: Vec<String>,
    /// The same.
    #[serde(default, deserialize_with = "or_none")]
    pub renew_statements: Vec<String>,
}

/// A database of the database engine, without its password, which OpenBAO does not tell.
#[derive(Clone, Debug, Deserialize)]
pub struct DatabaseConfig {
    /// What the plugin was given.
    #[serde(default)]
    pub connection_details: Map<String, Value>,
    /// What is set for every plugin.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl DatabaseConfig {
    /// Whom OpenBAO logs in as.
    pub fn username(&self) -> Option<&str> {
        self.connection_details.get("username").and_then(Value::as_str)
    }

    /// How roles are named.
    pub fn username_template(&self) -> Option<&str> {
        self.connection_details.get("username_template").and_then(Value::as_str)
    }
}

/// An empty list may be told as `null`.
fn or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl From<CredsAnswer> for Granted {
    fn from(answer: CredsAnswer) -> Granted {
        Granted {
            lease_id: answer.lease_id,
            duration: Duration::from_secs(answer.lease_duration),
            renewable: answer.renewable,
            username: answer.data.username,
            password: answer.data.password,
        }
    }
}

impl From<AuthData> for Token {
    fn from(auth: AuthData) -> Token {
        Token {
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
    pub(crate) fn of(self, secret: Secret) -> Token {
        let least = u64::from(self.expire_time.is_some());
        let max = Duration::from_secs(self.explicit_max_ttl);
        Token {
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
