//! The registry: which tenants there are, where each one's database is and how its
//! credential is leased. Placements, never credentials.
//!
//! A [`Snapshot`] never changes. Nothing is half read and nothing has a default database.

mod entries;
mod file;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;

pub use entries::{Entries, EntryError};

pub use crate::limits::OwnLimits;
use crate::tenant::{Access, TenantId};
use crate::tls::{self, CaFile};
use crate::toml_file::FileError;

/// Every tenant, at one moment.
#[derive(Debug)]
pub struct Snapshot {
    tenants: HashMap<TenantId, Arc<Tenant>>,
    /// What issuers call tenants instead of their ids. None is the id of a tenant.
    aliases: HashMap<String, TenantId>,
    /// By the name of the certificate's holder.
    bindings: HashMap<String, Binding>,
    /// What the placements' TLS was made of.
    clients: TlsClients,
}

/// How databases are checked, by all that it is made of: placements with equal settings share one,
/// and the next snapshot's do, too.
type TlsClients = HashMap<(tls::Mode, Option<CaFile>), Arc<ClientConfig>>;

/// Which tenant a certificate's holder is for: its certificate does not say, and it is not asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// A tenant of the same registry.
    pub tenant: TenantId,
    /// How much its sessions may do.
    pub access: Access,
}

impl Snapshot {
    /// Reads a registry's file. A tenant of which it says what `before` said is the same one as
    /// there. Blocks while it reads: a second or two for 100,000 tenants.
    ///
    /// # Errors
    /// When the file cannot be read, or one entry is not acceptable: then the whole file is not.
    pub fn read(path: &Path, before: Option<&Snapshot>) -> Result<Snapshot, FileError> {
        file::load(path, before)
    }

    /// Makes one of what a source says. A tenant of which it says what `before` said is the same
    /// one as there. `resolve` says where a file is that an entry names; it is read.
    ///
    /// # Errors
    /// When one entry is not acceptable: then none is.
    pub fn of(
        entries: Entries,
        before: Option<&Snapshot>,
        resolve: &dyn Fn(&Path) -> PathBuf,
    ) -> Result<Snapshot, EntryError> {
        entries::snapshot(entries, before, resolve)
    }

    /// The tenant of exactly this id.
    pub fn tenant(&self, id: &TenantId) -> Option<Arc<Tenant>> {
        self.tenants.get(id).cloned()
    }

    /// The tenant that an issuer means by a word: its id, or an alias.
    pub fn named(&self, word: &str) -> Option<TenantId> {
        let id = TenantId::parse(word).ok().filter(|id| self.tenants.contains_key(id));
        id.or_else(|| self.aliases.get(word).cloned())
    }

    /// What issuers call tenants instead of their ids, in no order.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &TenantId)> {
        self.aliases.iter().map(|(alias, id)| (alias.as_str(), id))
    }

    /// Whether any tenant has an alias.
    pub fn has_aliases(&self) -> bool {
        !self.aliases.is_empty()
    }

    /// The tenants of which this says something else than `before` did: their entries, what they
    /// are called in tokens, or the certificates that are bound to them.
    pub fn changes(&self, before: &Snapshot) -> HashSet<TenantId> {
        let mut changed = HashSet::new();
        for (one, other) in [(self, before), (before, self)] {
            let entry = |id| one.tenants.get(id).zip(other.tenants.get(id));
            let is_same = |id| entry(id).is_some_and(|(one, other)| Arc::ptr_eq(one, other));
            changed.extend(one.tenants.keys().filter(|id| !is_same(id)).cloned());
            let moved =
                one.aliases.iter().filter(|(word, id)| other.aliases.get(*word) != Some(id));
            changed.extend(moved.map(|(_, id)| id.clone()));
            let rebound = one.bindings.iter();
            let rebound = rebound.filter(|(holder, to)| other.bindings.get(*holder) != Some(to));
            changed.extend(rebound.map(|(_, to)| to.tenant.clone()));
        }
        changed
    }

    /// What a certificate's holder is bound to.
    pub fn binding(&self, holder: &str) -> Option<&Binding> {
        self.bindings.get(holder)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tenants.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    /// All of them, in no order.
    pub fn tenants(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.tenants.values()
    }
}

/// One tenant. Only a registry makes one. While its entry says the same it stays the same one,
/// whatever becomes of the others.
#[derive(Debug, PartialEq, Eq)]
pub struct Tenant {
    id: TenantId,
    state: State,
    /// What else its applications call its database.
    database_names: Box<[String]>,
    placement: Placement,
    /// The placement as logs tell it, once for all who do.
    placement_text: Arc<str>,
    lease: LeaseRoles,
    limits: OwnLimits,
}

impl Tenant {
    /// Its name.
    pub fn id(&self) -> &TenantId {
        &self.id
    }

    /// Whether it may be served now.
    pub fn state(&self) -> State {
        self.state
    }

    /// What its applications may call its database, beside its id and the database's own name.
    pub fn database_names(&self) -> &[String] {
        &self.database_names
    }

    /// Where its database is.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The same, for logs: `db:5432/tenant_acme`.
    pub fn placement_text(&self) -> &Arc<str> {
        &self.placement_text
    }

    /// What it has in place of the limits for all.
    pub fn limits(&self) -> &OwnLimits {
        &self.limits
    }

    /// What to lease for it.
    pub fn lease(&self) -> &LeaseRoles {
        &self.lease
    }
}

/// Whether a tenant may be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Yes.
    Active,
    /// No, until an operator resumes it.
    Suspended,
    /// Not for a moment: it is being moved or restored.
    Paused,
}

/// Where a tenant's database is and how to talk to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The server.
    pub host: Host,
    /// The database, not empty and without NUL.
    pub dbname: String,
    /// For residency; compared with what this proxy may serve.
    pub region: Option<String>,
    /// How the connection is protected.
    pub tls: PlacementTls,
    /// What the database may ask for besides SCRAM.
    pub auth: AuthMethods,
}

impl Placement {
    /// Whether both name the same database on the same server.
    pub fn is_same_database(&self, other: &Placement) -> bool {
        self.host == other.host && self.dbname == other.dbname
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.dbname)
    }
}

/// A database server's address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// TCP.
    Tcp {
        /// A DNS name or an IP address without brackets.
        host: String,
        /// Not 0.
        port: u16,
    },
    /// A Unix socket's absolute path, `.s.PGSQL.5432` included.
    Unix(PathBuf),
}

impl Host {
    /// The same for the same server: DNS does not look at case or at a final dot.
    pub fn comparable(&self) -> Host {
        match self {
            Host::Tcp { host, port } => {
                Host::Tcp { host: host.trim_end_matches('.').to_ascii_lowercase(), port: *port }
            }
            Host::Unix(path) => Host::Unix(path.clone()),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Host::Tcp { host, port } => write!(f, "{host}:{port}"),
            Host::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How the connection to a database is protected.
#[derive(Debug, Clone)]
pub enum PlacementTls {
    /// Not: a Unix socket, or said so in so many words.
    Disable,
    /// TLS, or no connection.
    Enabled {
        /// Shared by every placement with the same mode and CA.
        config: Arc<ClientConfig>,
        /// What that checks.
        mode: tls::Mode,
        /// A valid name for SNI and verification where it is not the host's.
        server_name: Option<String>,
        /// Whether a login must be bound to the connection.
        channel_binding: ChannelBinding,
    },
}

impl PartialEq for PlacementTls {
    fn eq(&self, other: &PlacementTls) -> bool {
        match (self, other) {
            (PlacementTls::Disable, PlacementTls::Disable) => true,
            (
                PlacementTls::Enabled { config, mode, server_name, channel_binding },
                PlacementTls::Enabled {
                    config: other_config,
                    mode: other_mode,
                    server_name: other_name,
                    channel_binding: other_binding,
                },
            ) => {
                // One is made for equal settings, see `TlsClients`.
                Arc::ptr_eq(config, other_config)
                    && mode == other_mode
                    && server_name == other_name
                    && channel_binding == other_binding
            }
            (PlacementTls::Disable, PlacementTls::Enabled { .. })
            | (PlacementTls::Enabled { .. }, PlacementTls::Disable) => false,
        }
    }
}

impl Eq for PlacementTls {}

/// Whether SCRAM is bound to its TLS connection, so that a man in the middle cannot relay it. The
/// values are libpq's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Where the server offers it.
    Prefer,
    /// It is, or there is no login.
    Require,
}

impl ChannelBinding {
    /// What holds where a placement does not say: where a certificate does not prove who the server
    /// is, the password's proof must.
    pub fn default_of(mode: tls::Mode) -> ChannelBinding {
        match mode {
            tls::Mode::Require | tls::Mode::VerifyCa => ChannelBinding::Require,
            tls::Mode::VerifyFull => ChannelBinding::Prefer,
        }
    }
}

/// Authentication methods that are answered; SCRAM-SHA-256 always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AuthMethods {
    /// MD5 may be asked for.
    pub md5: bool,
    /// The password in clear may be asked for.
    pub password: bool,
}

/// OpenBAO's names for a tenant's credentials. Every part is safe in a URL path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRoles {
    /// Where the tenant's database secrets engine is mounted: `pgsilo/acme`.
    pub mount: String,
    read_write: Option<String>,
    read_only: Option<String>,
    migrate: Option<String>,
}

impl LeaseRoles {
    /// The role that grants exactly this access, if the tenant has one. Never another:
    /// less would break the client, more would break the promise.
    pub fn role(&self, access: Access) -> Option<&str> {
        match access {
            Access::ReadWrite => self.read_write.as_deref(),
            Access::ReadOnly => self.read_only.as_deref(),
            Access::Migrate => self.migrate.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests;
