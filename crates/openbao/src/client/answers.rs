//! What OpenBAO answers to the control plane.

use pgsilo_core::secret::Secret;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
pub(super) struct ListData {
    pub(super) keys: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct EngineData {
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Deserialize)]
pub(super) struct CredentialAnswer {
    lease_id: String,
    data: CredentialData,
}

#[derive(Deserialize)]
struct CredentialData {
    username: String,
    password: Secret,
}

/// A login at a database.
#[derive(Clone, Debug)]
pub struct Credential {
    /// Whom to log in as.
    pub username: String,
    /// With what.
    pub password: Secret,
    /// What to revoke.
    pub lease_id: String,
}

impl From<CredentialAnswer> for Credential {
    fn from(answer: CredentialAnswer) -> Credential {
        let CredentialAnswer { lease_id, data: CredentialData { username, password } } = answer;
        Credential { username, password, lease_id }
    }
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
    /// The same.
    #[serde(default, deserialize_with = "or_none")]
    pub revocation_statements: Vec<String>,
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
