//! The configuration file's schema, as written: every key, and the defaults that
//! `config/pgsilo.toml` documents. Unknown keys are errors everywhere.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use pgsilo_core::registry::document::TlsEntry;
use pgsilo_core::toml_file::text::{FileMode, Text};
use serde::{Deserialize, Deserializer, de};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    #[serde(default)]
    pub(super) listener: Vec<RawListener>,
    #[serde(default)]
    pub(super) issuer: Vec<RawIssuer>,
    pub(super) registry: RawRegistry,
    pub(super) openbao: RawOpenbao,
    #[serde(default)]
    pub(super) lease: RawLease,
    #[serde(default)]
    pub(super) limits: RawLimits,
    #[serde(default)]
    pub(super) pool: RawPool,
    pub(super) admin: Option<RawAdmin>,
    #[serde(default)]
    pub(super) log: RawLog,
    #[serde(default)]
    pub(super) audit: RawAudit,
    #[serde(default)]
    pub(super) runtime: RawRuntime,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawListener {
    pub(super) address: Option<Text<SocketAddr>>,
    pub(super) tls: Option<RawListenerTls>,
    pub(super) require_tls: Option<bool>,
    #[serde(default)]
    pub(super) plaintext: bool,
    pub(super) socket: Option<PathBuf>,
    pub(super) mode: Option<Text<FileMode>>,
    pub(super) allow_uids: Option<Vec<u32>>,
    #[serde(default)]
    pub(super) auth: RawProof,
    pub(super) sni_suffix: Option<String>,
    pub(super) database_names: Option<RawNames>,
    pub(super) proxy_protocol: Option<Vec<String>>,
}

/// A list of names, or all of them.
pub(super) enum RawNames {
    Any,
    Only(Vec<String>),
}

impl<'de> Deserialize<'de> for RawNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> de::Visitor<'de> for Reader {
            type Value = RawNames;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of names such as [\"postgres\"], or \"any\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawNames, E> {
                match text {
                    "any" => Ok(RawNames::Any),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut names: A) -> Result<RawNames, A::Error> {
                let mut only = Vec::new();
                while let Some(name) = names.next_element()? {
                    only.push(name);
                }
                Ok(RawNames::Only(only))
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

/// How clients prove who they are.
#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum RawProof {
    #[default]
    Password,
    Oauthbearer {
        issuer: String,
        #[serde(default)]
        scope: String,
    },
    Certificate,
    TokenFile(PathBuf),
    Exec {
        command: Vec<String>,
        #[serde(default = "exec_refresh")]
        refresh: Text<Duration>,
    },
}

fn exec_refresh() -> Text<Duration> {
    Text(Duration::from_secs(60))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawListenerTls {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) client_ca: Option<PathBuf>,
    #[serde(default)]
    pub(super) client_crl: Vec<PathBuf>,
    pub(super) client_certificate: Option<RawDemand>,
}

/// Whether clients must show a certificate.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawDemand {
    Optional,
    Required,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIssuer {
    pub(super) issuer: String,
    pub(super) audience: Vec<String>,
    #[serde(default = "audience_claim")]
    pub(super) audience_claim: String,
    pub(super) algorithms: Vec<String>,
    pub(super) jwks: Option<PathBuf>,
    pub(super) keys: Option<Vec<RawKey>>,
    pub(super) jwks_url: Option<String>,
    #[serde(default)]
    pub(super) discovery: bool,
    pub(super) refresh: Option<Text<Duration>>,
    pub(super) max_stale: Option<Text<Duration>>,
    pub(super) ca: Option<PathBuf>,
    #[serde(default = "tenant_claim")]
    pub(super) tenant_claim: String,
    pub(super) tenant_values: Option<BTreeMap<String, String>>,
    pub(super) access_claim: Option<String>,
    pub(super) default_access: Option<String>,
    pub(super) access_values: Option<BTreeMap<String, String>>,
    pub(super) tenants: Option<Vec<String>>,
    pub(super) max_access: Option<String>,
    #[serde(default)]
    pub(super) authorization: RawAuthorization,
    pub(super) max_lifetime: Option<Text<Duration>>,
    #[serde(default = "leeway")]
    pub(super) leeway: Text<Duration>,
}

fn audience_claim() -> String {
    "aud".into()
}

fn tenant_claim() -> String {
    "tenant".into()
}

fn leeway() -> Text<Duration> {
    Text(Duration::from_secs(30))
}

/// Whose word lets a token's subject in.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawAuthorization {
    #[default]
    Claim,
    Grant,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKey {
    pub(super) kid: String,
    pub(super) algorithm: String,
    pub(super) pem: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRegistry {
    pub(super) file: Option<PathBuf>,
    pub(super) postgres: Option<RawRegistryDatabase>,
    pub(super) denied: Option<PathBuf>,
    pub(super) max_staleness: Option<Text<Duration>>,
    #[serde(default)]
    pub(super) stale_sessions: RawStaleSessions,
    pub(super) regions: Option<Vec<String>>,
}

/// What becomes of sessions that run while the registry is too old for new ones.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawStaleSessions {
    #[default]
    Keep,
    End,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRegistryDatabase {
    pub(super) endpoints: Vec<String>,
    pub(super) dbname: String,
    pub(super) tls: Option<TlsEntry>,
    pub(super) lease: Option<RawRegistryLease>,
    pub(super) user: Option<String>,
    pub(super) password_file: Option<PathBuf>,
    pub(super) name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRegistryLease {
    pub(super) mount: String,
    pub(super) role: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOpenbao {
    pub(super) address: String,
    pub(super) ca: Option<PathBuf>,
    pub(super) namespace: Option<String>,
    pub(super) client_certificate: Option<RawClientCertificate>,
    pub(super) auth: Option<RawAuth>,
    #[serde(default = "openbao_timeout")]
    pub(super) timeout: Text<Duration>,
    #[serde(default = "openbao_requests")]
    pub(super) max_concurrent_requests: usize,
    pub(super) max_pending_revocations: Option<usize>,
}

fn openbao_timeout() -> Text<Duration> {
    Text(Duration::from_secs(5))
}

fn openbao_requests() -> usize {
    64
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawClientCertificate {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAuth {
    pub(super) approle: Option<RawAppRole>,
    pub(super) kubernetes: Option<RawJwtLogin>,
    pub(super) jwt: Option<RawJwtLogin>,
    pub(super) certificate: Option<RawCertificateLogin>,
    pub(super) token_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAppRole {
    pub(super) mount: Option<String>,
    pub(super) role_id: String,
    pub(super) secret_id_file: PathBuf,
    #[serde(default)]
    pub(super) wrapped: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawJwtLogin {
    pub(super) mount: Option<String>,
    pub(super) role: String,
    pub(super) token_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCertificateLogin {
    pub(super) mount: Option<String>,
    pub(super) role: Option<String>,
}

#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawAuthority {
    #[default]
    Proxy,
    Session,
}

#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawScope {
    #[default]
    Session,
    Window,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSession {
    pub(super) mount: Option<String>,
    pub(super) roles: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLease {
    pub(super) authority: RawAuthority,
    pub(super) session: Option<RawSession>,
    pub(super) scope: RawScope,
    pub(super) window: Text<Duration>,
    pub(super) grace: Text<Duration>,
    pub(super) end_at_expiry: bool,
}

impl Default for RawLease {
    fn default() -> RawLease {
        RawLease {
            authority: RawAuthority::Proxy,
            session: None,
            scope: RawScope::Session,
            window: Text(Duration::from_secs(10)),
            grace: Text(Duration::from_secs(30)),
            end_at_expiry: true,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub(super) login_timeout: Text<Duration>,
    pub(super) startup_timeout: Text<Duration>,
    pub(super) max_handshakes: usize,
    pub(super) max_sessions: usize,
    pub(super) max_sessions_per_tenant: usize,
    pub(super) max_session_rate_per_tenant: u32,
    pub(super) max_connections_per_address: usize,
    pub(super) max_token_bytes: usize,
    pub(super) idle_timeout: Text<Duration>,
    pub(super) idle_in_transaction_timeout: Text<Duration>,
    pub(super) transaction_timeout: Text<Duration>,
    pub(super) max_session_age: Text<Duration>,
    pub(super) drain_timeout: Text<Duration>,
    pub(super) pause_timeout: Text<Duration>,
    pub(super) dead_peer_timeout: Text<Duration>,
}

impl Default for RawLimits {
    fn default() -> RawLimits {
        RawLimits {
            login_timeout: Text(Duration::from_secs(10)),
            startup_timeout: Text(Duration::from_secs(5)),
            max_handshakes: 1000,
            max_sessions: 10_000,
            max_sessions_per_tenant: 80,
            max_session_rate_per_tenant: 20,
            max_connections_per_address: 0,
            max_token_bytes: 16_384,
            idle_timeout: Text(Duration::ZERO),
            idle_in_transaction_timeout: Text(Duration::from_secs(3600)),
            transaction_timeout: Text(Duration::ZERO),
            max_session_age: Text(Duration::ZERO),
            drain_timeout: Text(Duration::from_secs(30)),
            pause_timeout: Text(Duration::from_secs(30)),
            dead_peer_timeout: Text(Duration::from_secs(120)),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPool {
    pub(super) max_idle: usize,
    pub(super) max_idle_per_tenant: usize,
    pub(super) idle_timeout: Text<Duration>,
    pub(super) check_delay: Text<Duration>,
    pub(super) reuse: RawReuse,
    pub(super) max_lifetime: Text<Duration>,
}

impl Default for RawPool {
    fn default() -> RawPool {
        RawPool {
            max_idle: 100,
            max_idle_per_tenant: 4,
            idle_timeout: Text(Duration::from_secs(10)),
            check_delay: Text(Duration::from_millis(250)),
            reuse: RawReuse::Never,
            max_lifetime: Text(Duration::from_secs(300)),
        }
    }
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawReuse {
    Never,
    Reset,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAdmin {
    pub(super) address: Text<SocketAddr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLog {
    pub(super) format: RawFormat,
    pub(super) level: RawLevel,
    pub(super) queue_bytes: usize,
}

impl Default for RawLog {
    fn default() -> RawLog {
        RawLog { format: RawFormat::Json, level: RawLevel::Info, queue_bytes: 1024 * 1024 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAudit {
    pub(super) on_loss: RawOnLoss,
    pub(super) queue_bytes: usize,
}

impl Default for RawAudit {
    fn default() -> RawAudit {
        RawAudit { on_loss: RawOnLoss::Count, queue_bytes: 8 * 1024 * 1024 }
    }
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawOnLoss {
    Count,
    Refuse,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawFormat {
    Json,
    Human,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRuntime {
    pub(super) cores: usize,
}
