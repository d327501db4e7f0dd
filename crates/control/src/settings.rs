//! `pgsiloctl.toml`: where OpenBAO and the registry are, as whom they are asked, and how tenants are made.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use pgsilo_core::file::MAX_CONFIGURATION;
use pgsilo_core::registry::document::{ClusterEntry, TlsEntry};
use pgsilo_core::registry::is_segment;
use pgsilo_core::tls;
use pgsilo_core::toml_file::{FileError, TomlFile};
use pgsilo_openbao::Client as Bao;
use serde::Deserialize;

use crate::cluster::KnownCluster;
use crate::provision::plan::{Allowance, LeaseHashing};
use crate::secrets;

/// Which file of settings.
#[derive(Clone, Debug, Args)]
pub struct SettingsFile {
    /// The file of settings: where OpenBAO and the registry are, and how tenants are made.
    #[arg(
        long = "config",
        value_name = "FILE",
        env = "PGSILOCTL_CONFIG",
        default_value = "/etc/pgsilo/pgsiloctl.toml"
    )]
    path: PathBuf,
}

impl std::fmt::Display for SettingsFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.display().fmt(f)
    }
}

impl SettingsFile {
    /// What it says.
    pub fn read(&self) -> Result<Settings> {
        Ok(read(&self.path)?)
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }
}

/// What the file says.
#[derive(Debug)]
pub struct Settings {
    /// Where OpenBAO is.
    pub openbao: pgsilo_openbao::Settings,
    /// As whom tenants are made.
    pub provisioner: BaoLogin,
    /// As whom tenants are leased for, as any session is.
    pub operator: Option<BaoLogin>,
    /// The registry's database.
    pub registry: RegistrySettings,
    /// How tenants are made.
    pub provision: ProvisionSettings,
}

/// A login to OpenBAO.
#[derive(Debug)]
pub enum BaoLogin {
    /// By an AppRole.
    AppRole {
        /// Where the method is mounted.
        mount: String,
        /// Public.
        role_id: String,
        /// Read at each login.
        secret_id_file: PathBuf,
    },
    /// With a token that somebody else keeps alive.
    Token(PathBuf),
}

impl BaoLogin {
    /// Logs in.
    pub async fn log_in(&self, bao: &Bao) -> Result<Bao> {
        match self {
            BaoLogin::AppRole { mount, role_id, secret_id_file } => {
                let secret_id = secrets::file(secret_id_file)?;
                let made = bao.log_in_approle(mount, role_id, &secret_id).await;
                made.with_context(|| {
                    format!(
                        "logging in as {role_id} with the secret id of {}",
                        secret_id_file.display()
                    )
                })
            }
            BaoLogin::Token(path) => Ok(bao.as_token(secrets::file(path)?)),
        }
    }

    /// Whether it makes a token that nobody else has.
    pub fn is_own(&self) -> bool {
        matches!(self, BaoLogin::AppRole { .. })
    }
}

/// Where the registry is.
#[derive(Debug)]
pub struct RegistrySettings {
    /// Its servers.
    pub servers: KnownCluster,
    /// Its database.
    pub dbname: String,
    /// As whom.
    pub login: RegistryLogin,
}

/// A login to the registry.
#[derive(Debug)]
pub enum RegistryLogin {
    /// Leased from a role of a database engine.
    Lease {
        /// Where that is.
        mount: String,
        /// The role.
        role: String,
    },
    /// One that lasts.
    Password {
        /// Whose.
        user: String,
        /// Read at each login.
        file: PathBuf,
    },
}

/// How tenants are made.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProvisionSettings {
    /// Connections to a tenant's database: sessions, idle ones of the pool, the broker's, the audit's.
    pub connections: u16,
    /// What its sessions may use of what is the whole cluster's.
    pub allow: Vec<Allowance>,
    /// Who makes the verifiers of leased passwords.
    pub lease_hashing: LeaseHashing,
    /// What a tenant's database is made from.
    pub template: String,
    /// How many databases are to be ready on each cluster for tenants that come.
    pub standby: u16,
}

impl Default for ProvisionSettings {
    fn default() -> ProvisionSettings {
        ProvisionSettings {
            connections: 90,
            allow: Vec::new(),
            lease_hashing: LeaseHashing::default(),
            template: crate::provision::TEMPLATE.to_owned(),
            standby: 0,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    openbao: RawOpenbao,
    registry: RawRegistry,
    #[serde(default)]
    provision: ProvisionSettings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOpenbao {
    address: String,
    ca: Option<PathBuf>,
    namespace: Option<String>,
    provisioner: RawLogin,
    operator: Option<RawLogin>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLogin {
    mount: Option<String>,
    role_id: Option<String>,
    secret_id_file: Option<PathBuf>,
    token_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegistry {
    endpoints: Vec<String>,
    openbao_endpoints: Option<Vec<String>>,
    dbname: String,
    tls: Option<TlsEntry>,
    lease: Option<RawLease>,
    user: Option<String>,
    password_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLease {
    mount: String,
    role: String,
}

fn read(path: &Path) -> Result<Settings, FileError> {
    let file = TomlFile::read(path, MAX_CONFIGURATION)?;
    let raw: Raw = file.parse()?;
    let ca = match raw.openbao.ca.map(|ca| file.resolve(&ca)) {
        Some(path) => Some(tls::roots_pem(&path).map_err(|error| file.wrong("openbao.ca", error))?),
        None => None,
    };
    let address = raw.openbao.address.trim_end_matches('/');
    let openbao = pgsilo_openbao::Settings {
        ca,
        namespace: raw.openbao.namespace,
        ..pgsilo_openbao::Settings::for_control(address)
    };
    let provisioner = bao_login(&file, "openbao.provisioner", raw.openbao.provisioner)?;
    let operator = raw.openbao.operator;
    let operator = operator.map(|login| bao_login(&file, "openbao.operator", login)).transpose()?;
    let registry = registry(&file, raw.registry)?;
    if raw.provision.connections < 4 {
        let what = "too few; the broker alone may have 4";
        return Err(file.wrong("provision.connections", what));
    }
    Ok(Settings { openbao, provisioner, operator, registry, provision: raw.provision })
}

fn bao_login(file: &TomlFile, field: &str, raw: RawLogin) -> Result<BaoLogin, FileError> {
    match raw {
        RawLogin {
            mount,
            role_id: Some(role_id),
            secret_id_file: Some(secret),
            token_file: None,
        } => {
            let mount = mount.unwrap_or_else(|| "approle".to_owned());
            if !mount.split('/').all(is_segment) {
                let what = format!("{mount:?} is not a mount; write it like \"approle\"");
                return Err(file.wrong(&format!("{field}.mount"), what));
            }
            Ok(BaoLogin::AppRole { mount, role_id, secret_id_file: file.resolve(&secret) })
        }
        RawLogin { mount: None, role_id: None, secret_id_file: None, token_file: Some(path) } => {
            Ok(BaoLogin::Token(file.resolve(&path)))
        }
        _ => {
            Err(file
                .wrong(field, "write { role_id, secret_id_file }, or { token_file }, and not both"))
        }
    }
}

fn registry(file: &TomlFile, raw: RawRegistry) -> Result<RegistrySettings, FileError> {
    let at = |field: &str| format!("registry.{field}");
    let RawRegistry { endpoints, openbao_endpoints, dbname, tls, lease, user, password_file } = raw;
    let entry = ClusterEntry {
        name: "registry".to_owned(),
        endpoints,
        region: None,
        tls,
        auth: None,
        max_sessions: None,
        monitor: None,
        read_only: None,
    };
    let servers = KnownCluster::read(entry, openbao_endpoints, &|path| file.resolve(path));
    let servers = servers.map_err(|error| file.wrong(&at(&error.field), error.what))?;
    let login = match (lease, user, password_file) {
        (Some(RawLease { mount, role }), None, None)
            if mount.split('/').all(is_segment) && is_segment(&role) =>
        {
            RegistryLogin::Lease { mount, role }
        }
        (Some(_), None, None) => {
            return Err(file.wrong(&at("lease"), "not a mount and a role; use A-Z a-z 0-9 _ . -"));
        }
        (None, Some(user), Some(path)) => {
            RegistryLogin::Password { user, file: file.resolve(&path) }
        }
        _ => {
            let what = "write lease = { mount, role }, or user and password_file, and not both";
            return Err(file.wrong(&at("lease"), what));
        }
    };
    Ok(RegistrySettings { servers, dbname, login })
}

impl Settings {
    /// OpenBAO, as nobody.
    pub fn bao(&self) -> Result<Bao> {
        Bao::new(self.openbao.clone()).context("OpenBAO")
    }
}
