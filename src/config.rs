//! The configuration: what the file says, as values.
//!
//! [`Config::load`] reads the file, and of the files that it names those of OpenBAO's and issuers'
//! authorities and of listed keys, which become part of its values, and those of secrets, which it
//! only looks at. [`Config::open`] reads the others and makes what a proxy is started with. Either
//! returns one line that says where the error is and what to do. Nothing is started and nothing is
//! fetched: the program's `check` calls both, and its `serve` goes on from there. Nothing else in
//! the library looks at the environment, and what reads a file again while pgsilo runs keeps the
//! one before where it is not valid.

mod build;
mod open;
mod raw;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub use pgsilo_core::limits::TimeLimits;
pub use pgsilo_core::toml_file::FileError;
use pgsilo_core::toml_file::TomlFile;
use pgsilo_openbao::OpenBao;

pub use crate::audit::{AuditSettings, OnLoss};
pub use crate::lease::{Auth, Authority};
pub use crate::limits::Limits;
pub use crate::listener::{ListenAddress, Listener, ListenerSettings, ListenerTls, Proof};
pub use crate::log::{LogFormat, LogSettings};
pub use crate::pool::PoolSettings;
pub use crate::proxy::{EndingRules, ProxySettings, Sources};
use crate::registry::Registry;
use crate::registry_database;
pub use crate::route::DatabaseNames;
use crate::token::{Issuer, KeySource, Verifier};

/// What makes words of tokens' own unwise where they are shown to OpenBAO.
const WORDS: &str = "tokens may call tenants by words of their own, and under session authority OpenBAO \
                     reads the tenant from the token itself: its role must know the same words";

/// Everything that the data plane is told.
#[derive(Debug)]
pub struct Config {
    /// At least one.
    pub listeners: Vec<ListenerSettings>,
    /// Whose tokens are believed, and where their keys are.
    pub issuers: Vec<Issuer<KeySource>>,
    /// What says where tenants live.
    pub registry: RegistrySettings,
    /// The file of those whose tokens and certificates are refused before they expire.
    pub denied: Option<PathBuf>,
    /// How sessions are served.
    pub proxy: ProxySettings,
    /// How OpenBAO is reached.
    pub openbao: pgsilo_openbao::Settings,
    /// Where metrics and health are served, if anywhere.
    pub admin: Option<SocketAddr>,
    /// How to log.
    pub log: LogSettings,
    /// Event loops, at least one.
    pub cores: usize,
    /// What is allowed but unwise, one line each, with its place in the file.
    pub warnings: Vec<String>,
    /// For errors of what it names.
    file: TomlFile,
}

/// What the registry is read from.
#[derive(Debug)]
pub enum RegistrySettings {
    /// A file.
    File(PathBuf),
    /// A PostgreSQL database.
    Database(registry_database::Settings),
}

/// What a configuration names, as it was read.
#[derive(Debug)]
pub struct Opened {
    /// What a proxy is started with.
    pub(crate) sources: Sources,
    /// How sessions are served there.
    pub(crate) settings: ProxySettings,
    /// The client that leases are asked for with. It has asked nothing.
    pub(crate) openbao: OpenBao,
    /// Where metrics and health are served, if anywhere.
    pub(crate) admin: Option<SocketAddr>,
    /// Event loops, at least one.
    pub(crate) cores: usize,
    /// What is allowed but unwise, in the configuration and in what it names.
    pub warnings: Vec<String>,
}

impl Opened {
    /// The tenants.
    pub fn registry(&self) -> &Registry {
        &self.sources.registry
    }

    /// Whose tokens are believed.
    pub fn verifier(&self) -> &Verifier {
        &self.sources.verifier
    }
}

impl Config {
    /// How many descriptors pgsilo may come to hold: a session has two, a login under way three at
    /// most.
    pub fn descriptors(&self) -> u64 {
        /// For OpenBAO, issuers, files, idle connections and those who are being refused.
        const OTHERS: usize = 500;
        let limits = &self.proxy.limits;
        let logins = limits.max_handshakes.saturating_mul(self.listeners.len());
        let sessions = limits.max_sessions.saturating_mul(2);
        let all = logins.saturating_mul(3).saturating_add(sessions).saturating_add(OTHERS);
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    /// Reads the file. Blocks.
    ///
    /// # Errors
    /// When it cannot be read, or says what makes no sense.
    pub fn load(path: &Path) -> Result<Config, FileError> {
        build::load(path)
    }

    /// Reads all files that it names: keys, certificates, the registry, the list of those denied.
    /// Blocks.
    ///
    /// # Errors
    /// When one of them cannot be read or is not valid.
    pub fn open(self) -> Result<Opened, FileError> {
        open::open(self)
    }
}
