//! What is written of clusters, tenants and certificates: the schema of the registry's file, which is
//! also how registries are exchanged. Nothing of it is checked but its form; what is acceptable is
//! `entries.rs`'s to say.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::{ChannelBinding, ReadOnlyServer, State};
use crate::tls;
use crate::toml_file::text::Text;

/// All that there is.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Servers that placements name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cluster: Vec<ClusterEntry>,
    /// Not optional: an empty file is more likely a failed write than an empty registry.
    pub tenant: Vec<TenantEntry>,
    /// Certificates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub binding: Vec<BindingEntry>,
}

/// What a source says of one tenant: its entry, and the certificates bound to it.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(super) tenant: TenantEntry,
    pub(super) bindings: Vec<BindingEntry>,
}

impl Entry {
    /// Reads both, in whatever form a source has them.
    ///
    /// # Errors
    /// When they are not of this schema.
    pub fn read<'de, D: Deserializer<'de>>(tenant: D, bindings: D) -> Result<Entry, D::Error> {
        let (tenant, bindings) = (TenantEntry::deserialize(tenant)?, Vec::deserialize(bindings)?);
        Ok(Entry { tenant, bindings })
    }
}

/// Servers that hold the same databases.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterEntry {
    /// What placements call it.
    pub name: String,
    /// `host:port`, `host`, or a Unix socket's path; the usual primary first.
    pub endpoints: Vec<String>,
    /// Where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// How connections are protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsEntry>,
    /// What its databases may ask for besides SCRAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<Vec<AuthEntry>>,
    /// All its tenants' sessions at once, for each proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<usize>,
    /// With what its servers are watched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorEntry>,
    /// Where sessions go that only read; left out: to the primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<ReadOnlyServer>,
}

/// A login that says of each server of a cluster whether it takes writes, and no more.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MonitorEntry {
    /// Where OpenBAO's database engine is mounted that makes it.
    pub mount: String,
    /// The engine's role.
    pub role: String,
    /// What OpenBAO calls its connection to the cluster; left out: as the role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<String>,
    /// The database that it logs in to, which is no tenant's; left out: `postgres`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dbname: Option<String>,
}

/// One tenant.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TenantEntry {
    /// What tokens call it.
    pub id: String,
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it is served. Left out in a file that a proxy reads: active; in one that is applied to a
    /// registry: as it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// What else issuers call it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// What else its applications call its database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub database_names: Vec<String>,
    /// Where it may live; left out: anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regions: Option<Vec<String>>,
    /// Where it lives.
    pub placement: PlacementEntry,
    /// Where its credentials come from.
    pub lease: LeaseEntry,
    /// What it has in place of the limits for all.
    #[serde(default, skip_serializing_if = "LimitsEntry::is_empty")]
    pub limits: LimitsEntry,
}

/// Where a tenant's database is: in a cluster, or on a server of which all is said here.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PlacementEntry {
    /// A cluster of the same document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Without a cluster: a name or an address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Without a cluster: a Unix socket's path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The database.
    pub dbname: String,
    /// What the database says of itself; left out: the tenant's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
    /// Without a cluster: where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Without a cluster: how connections are protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsEntry>,
    /// Without a cluster: what the database may ask for besides SCRAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<Vec<AuthEntry>>,
}

/// How connections to databases are protected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsEntry {
    /// How much of a certificate is checked.
    #[serde(default)]
    pub mode: TlsMode,
    /// A file of authorities, where the reader is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The authorities themselves, as PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_pem: Option<String>,
    /// What the certificate names, if not the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// Whether a login must be bound to its connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel_binding: Option<ChannelBinding>,
}

/// libpq's `sslmode`s, of those that do not leave it to chance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// In clear.
    Disable,
    /// Encrypted; no certificate is checked.
    Require,
    /// The chain.
    VerifyCa,
    /// The chain and the name.
    #[default]
    VerifyFull,
}

impl TlsMode {
    /// What is checked under TLS; `None`: in clear.
    pub(super) fn checks(self) -> Option<tls::Mode> {
        match self {
            TlsMode::Disable => None,
            TlsMode::Require => Some(tls::Mode::Require),
            TlsMode::VerifyCa => Some(tls::Mode::VerifyCa),
            TlsMode::VerifyFull => Some(tls::Mode::VerifyFull),
        }
    }
}

/// `pg_hba.conf`'s names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum AuthEntry {
    /// Always answered.
    #[serde(rename = "scram-sha-256")]
    Scram,
    /// A hash of the password.
    #[serde(rename = "md5")]
    Md5,
    /// The password in clear.
    #[serde(rename = "password")]
    Password,
}

/// Where a tenant's credentials come from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseEntry {
    /// Left out: `pgsilo/ID`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// What OpenBAO calls its connection to the database; left out: `tenant-ID`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<String>,
    /// OpenBAO's roles there, by access.
    pub roles: RolesEntry,
}

/// OpenBAO's roles.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RolesEntry {
    /// For sessions that may write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_write: Option<String>,
    /// For those that may only read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<String>,
    /// For those that change the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migrate: Option<String>,
}

/// As in the configuration, where a key that is left out has its value.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsEntry {
    /// Sessions at once, for each proxy; 0: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<usize>,
    /// New sessions a second, for each proxy; 0: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_session_rate: Option<u32>,
    /// Zero: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Text<Duration>>,
    /// Zero: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_in_transaction_timeout: Option<Text<Duration>>,
    /// Zero: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transaction_timeout: Option<Text<Duration>>,
    /// Zero: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_session_age: Option<Text<Duration>>,
}

impl LimitsEntry {
    fn is_empty(&self) -> bool {
        *self == LimitsEntry::default()
    }
}

/// A certificate's holder, and the one tenant that it is for.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BindingEntry {
    /// Its one URI, or `dns:NAME`.
    pub certificate: String,
    /// Whose.
    pub tenant: String,
    /// And how much.
    pub access: String,
}
