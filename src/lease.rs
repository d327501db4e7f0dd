//! Leases.

use std::path::PathBuf;
use std::time::Duration;

/// How to reach OpenBAO and as whom; made by [`crate::config`].
#[derive(Debug)]
pub struct Settings {
    /// Base URL, without a trailing slash: `https://127.0.0.1:8200`.
    pub address: String,
    /// PEM of the authorities that OpenBAO's certificate must chain to; `None`: the system's.
    pub ca: Option<Vec<u8>>,
    /// Who pgsilo is to OpenBAO.
    pub auth: Auth,
    /// Of one HTTP request, connect included.
    pub timeout: Duration,
    /// Leases asked for at once.
    pub max_concurrent_requests: usize,
}

/// A login method. Files are read at each login, so that they may be replaced.
#[derive(Debug)]
pub enum Auth {
    /// `auth/approle/login`.
    AppRole {
        /// The role's public id.
        role_id: String,
        /// A file that holds the secret id.
        secret_id_file: PathBuf,
    },
    /// A file that holds an OpenBAO token, as `bao agent` writes it.
    TokenFile(PathBuf),
}
