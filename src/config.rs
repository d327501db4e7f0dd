//! The configuration: what the file says, then objects that are ready to use.
//!
//! [`Config::load`] reads the file and everything it names, or returns one line that says
//! where the error is and what to do. Nothing else in the library looks at the
//! environment, and what reads a file again while pgsilo runs keeps the one before where it is not
//! valid, so a `Config` that exists is one that works.
//! Called by the program's `serve` and `check`.

mod build;
mod raw;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
pub use pgsilo_core::limits::TimeLimits;
use pgsilo_core::tls;
pub use pgsilo_core::toml_file::FileError;

use crate::lease;
use crate::registry::{Denied, Registry};
pub use crate::route::DatabaseNames;
use crate::token::{Source, Verifier};

/// Everything that the data plane is told.
#[derive(Debug)]
pub struct Config {
    /// At least one.
    pub listeners: Vec<Listener>,
    /// Whose tokens are believed.
    pub verifier: Verifier,
    /// Where tenants live.
    pub registry: Registry,
    /// Whose tokens and certificates are refused before they expire.
    pub denied: Option<Denied>,
    /// How long a registry that cannot be reloaded still serves; `None`: for ever.
    pub max_staleness: Option<Duration>,
    /// Regions that may be served; `None`: any.
    pub regions: Option<BTreeSet<String>>,
    /// Where credentials come from.
    pub openbao: lease::Settings,
    /// How sessions end with their authority.
    pub lease: LeaseRules,
    /// Bounds.
    pub limits: Limits,
    /// Connections that wait for a session.
    pub warm: Warm,
    /// Where metrics and health are served, if anywhere.
    pub admin: Option<SocketAddr>,
    /// How to log.
    pub log: Log,
    /// How the audit trail is written.
    pub audit: Audit,
    /// Event loops, at least one.
    pub cores: usize,
    /// What is allowed but unwise, one line each, with its place in the file.
    pub warnings: Vec<String>,
}

/// How many connections may wait for a session, and how long.
#[derive(Debug)]
pub struct Warm {
    /// In all; 0: none.
    pub max: usize,
    /// Of one tenant.
    pub max_per_tenant: usize,
    /// How long one waits. Where sessions come less often than that, none does.
    pub idle_timeout: Duration,
    /// How old its database's word may be, of whose it is, for a session to take one unasked.
    pub check_after: Duration,
    /// How old a connection may be that waits for another session when one has left it; `None`: it
    /// is closed.
    pub reuse: Option<Duration>,
}

/// Where clients connect, and what is asked of them there.
#[derive(Debug)]
pub struct Listener {
    /// What to bind.
    pub place: Place,
    /// `None`: a Unix socket, or the file says `plaintext = true`.
    pub tls: Option<ListenerTls>,
    /// How clients prove who they are.
    pub proof: Proof,
    /// Who may use a Unix socket, by user id; `None`: whoever may open its file.
    pub uids: Option<BTreeSet<u32>>,
    /// What follows a tenant's id in the host that a client names in TLS: `.db.example.com`.
    pub sni_suffix: Option<String>,
    /// Names of databases that say nothing here.
    pub database_names: DatabaseNames,
    /// Who says on whose behalf it connects (PROXY protocol).
    pub balancers: Vec<IpNet>,
}

/// How clients of a listener prove who they are.
#[derive(Debug)]
pub enum Proof {
    /// A token, sent as the password.
    Password,
    /// A token, sent as SASL OAUTHBEARER.
    Bearer {
        /// What a client without a good token is told: JSON of RFC 7628, 3.2.2.
        challenge: Vec<u8>,
    },
    /// The client's certificate, bound to a tenant by the registry.
    Certificate,
    /// Nothing: pgsilo has the token itself.
    Sidecar(Source),
}

/// What a listener binds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix {
        /// The socket's path.
        path: PathBuf,
        /// The permissions of the socket file.
        mode: u32,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix { path, .. } => path.display().fmt(f),
        }
    }
}

/// TLS at a listener.
#[derive(Debug)]
pub struct ListenerTls {
    /// Certificate, key and protocols.
    pub server: tls::Server,
    /// Whether a session in clear is refused.
    pub required: bool,
}

/// How sessions end with their authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRules {
    /// How long before the end of its credential or token a session is ended at the first
    /// moment at which it is idle.
    pub grace: Duration,
    /// Whether the expiry of its token ends a session.
    pub end_at_expiry: bool,
}

/// Bounds on what clients may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From accept to login; not zero.
    pub login_timeout: Duration,
    /// From accept to a whole startup packet, TLS included; not zero.
    pub startup_timeout: Duration,
    /// Connections of each listener that are not logged in yet; at least one.
    pub max_handshakes: usize,
    /// At least one.
    pub max_sessions: usize,
    /// `None`: no bound of its own.
    pub max_sessions_per_tenant: Option<usize>,
    /// `None`: no bound of its own.
    pub max_connections_per_address: Option<usize>,
    /// Of a token, 1 to 65536.
    pub max_token_bytes: usize,
    /// How long sessions, and what they are in the middle of, may last.
    pub times: TimeLimits,
    /// What transactions get to finish in at SIGTERM.
    pub drain_timeout: Duration,
    /// A peer, client or database, that has answered nothing for so long counts as gone.
    pub dead_peer_timeout: Duration,
}

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    /// For whom.
    pub format: LogFormat,
    /// How much.
    pub level: tracing::Level,
    /// Bytes of lines that may wait to be written; more are lost.
    pub queue_bytes: usize,
}

/// How the audit trail is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audit {
    /// What is done when it cannot be.
    pub on_loss: OnLoss,
    /// Bytes of events that may wait to be written; more are lost.
    pub queue_bytes: usize,
}

/// What is done when events cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLoss {
    /// They are counted, and told of later.
    Count,
    /// That, and no session begins meanwhile.
    Refuse,
}

/// For whom the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Machines: one JSON object a line.
    Json,
    /// People.
    Human,
}

impl Config {
    /// How many descriptors pgsilo may come to hold: a session has two, a login under way three at most.
    pub fn descriptors(&self) -> u64 {
        /// For OpenBAO, issuers, files, connections that wait and whoever is being refused.
        const OTHERS: usize = 500;
        let logins = self.limits.max_handshakes.saturating_mul(self.listeners.len());
        let sessions = self.limits.max_sessions.saturating_mul(2);
        let all = logins.saturating_mul(3).saturating_add(sessions).saturating_add(OTHERS);
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    /// Reads the file and all that it names. Blocks.
    pub fn load(path: &Path) -> Result<Config, FileError> {
        build::load(path)
    }
}
