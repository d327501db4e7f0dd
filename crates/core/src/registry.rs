//! The registry: which tenants there are, where each one's database is and how its
//! credential is leased. Placements, never credentials.
//!
//! A [`Snapshot`] never changes. Nothing is half read and nothing has a default database.

pub mod document;
mod draft;
mod entries;
mod file;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use serde::{Deserialize, Serialize};

pub use document::{Document, Entry};
use draft::Index;
pub use entries::{Change, EntryError, News, Rejected, is_segment};

pub use crate::limits::OwnLimits;
use crate::names::Names;
use crate::tenant::{Access, TenantId};
use crate::tls::{self, CaFile};
use crate::toml_file::FileError;

/// Every tenant, at one moment.
#[derive(Debug)]
pub struct Snapshot {
    index: Index,
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
        document: Document,
        before: Option<&Snapshot>,
        resolve: &dyn Fn(&Path) -> PathBuf,
    ) -> Result<Snapshot, EntryError> {
        entries::snapshot(document, before, resolve)
    }

    /// None at all: what a source begins with that tells of tenants one by one.
    pub fn empty() -> Snapshot {
        Snapshot { index: Index::default(), clients: TlsClients::new() }
    }

    /// What this becomes when a source says something else of some tenants. It costs what it
    /// changes, and for a cluster a look at each tenant. An entry that is not acceptable makes its
    /// tenant none, and no other; so does a cluster that has changed or gone, of whose tenants the
    /// source says nothing new.
    /// `is_id` knows the ids that the source has, acceptable or not.
    pub fn change(
        &self,
        news: News,
        is_id: &dyn Fn(&str) -> bool,
        resolve: &dyn Fn(&Path) -> PathBuf,
    ) -> Change {
        entries::change(self, news, is_id, resolve)
    }

    /// The cluster of a name.
    pub fn cluster(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.index.clusters.get(name)
    }

    /// The tenant of exactly this id.
    pub fn tenant(&self, id: &TenantId) -> Option<Arc<Tenant>> {
        self.index.tenants.get(id).cloned()
    }

    /// The tenant that an issuer means by a word: its id, or an alias.
    pub fn named(&self, word: &str) -> Option<TenantId> {
        let id = TenantId::parse(word).ok().filter(|id| self.index.tenants.contains_key(id));
        id.or_else(|| self.index.aliases.get(word).cloned())
    }

    /// What issuers call tenants instead of their ids, in no order.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &TenantId)> {
        self.index.aliases.iter().map(|(alias, id)| (&**alias, id))
    }

    /// Whether any tenant has an alias.
    pub fn has_aliases(&self) -> bool {
        !self.index.aliases.is_empty()
    }

    /// The tenants of which this says something else than `before` did: their entries, what they
    /// are called in tokens, or the certificates that are bound to them.
    pub fn changes(&self, before: &Snapshot) -> HashSet<TenantId> {
        let mut changed = HashSet::new();
        for (one, other) in [(&self.index, &before.index), (&before.index, &self.index)] {
            let is_same = |id: &TenantId, tenant| {
                other.tenants.get(id).is_some_and(|other| Arc::ptr_eq(tenant, other))
                    && one.says_the_same(other, id)
            };
            let those = one.tenants.iter().filter(|(id, tenant)| !is_same(id, tenant));
            changed.extend(those.map(|(id, _)| id.clone()));
        }
        changed
    }

    /// What a certificate's holder is bound to.
    pub fn binding(&self, holder: &str) -> Option<&Binding> {
        self.index.bindings.get(holder)
    }

    /// What the clusters are called that have names, in no order.
    pub fn cluster_names(&self) -> impl Iterator<Item = &str> {
        self.index.clusters.iter().map(|(name, _)| &**name)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.index.tenants.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.tenants.is_empty()
    }

    /// All of them, in no order.
    pub fn tenants(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.index.tenants.values()
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
    /// Where it may live; `None`: anywhere.
    regions: Option<Box<[String]>>,
    placement: Placement,
    /// The placement as logs tell it, once for all who do.
    placement_text: Arc<str>,
    lease: LeaseRoles,
    /// Where they are not those for all.
    limits: Option<Box<OwnLimits>>,
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

    /// What its database must say of itself.
    pub fn seal(&self) -> &str {
        self.placement.seal.as_deref().unwrap_or(self.id.as_str())
    }

    /// Whether its database is where it may live.
    pub fn is_at_home(&self) -> bool {
        let region = &self.placement.cluster.region;
        let is_allowed =
            |allowed: &[String]| region.as_ref().is_some_and(|it| allowed.contains(it));
        self.regions.as_deref().is_none_or(is_allowed)
    }

    /// What it has in place of the limits for all.
    pub fn limits(&self) -> &OwnLimits {
        const NONE: &OwnLimits = &OwnLimits::NONE;
        self.limits.as_deref().unwrap_or(NONE)
    }

    /// What to lease for it.
    pub fn lease(&self) -> &LeaseRoles {
        &self.lease
    }
}

/// Whether a tenant may be served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Yes.
    #[default]
    Active,
    /// No, until an operator resumes it.
    Suspended,
    /// Not for a moment: it is being moved or restored.
    Paused,
    /// Not any more, unless that is undone in time.
    Deleting,
}

/// Where a tenant's database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// On which servers.
    pub cluster: Arc<Cluster>,
    /// The database, not empty and without NUL.
    pub dbname: Arc<str>,
    /// What it says of itself, if that is not its tenant's id.
    seal: Option<Arc<str>>,
}

impl Placement {
    /// Whether both name the same database of the same cluster.
    pub fn is_same_database(&self, other: &Placement) -> bool {
        self.cluster.key == other.cluster.key && self.dbname == other.dbname
    }

    /// A database of a cluster, which is no tenant's.
    pub fn in_cluster(cluster: &Arc<Cluster>, dbname: &str) -> Placement {
        Placement { cluster: Arc::clone(cluster), dbname: dbname.into(), seal: None }
    }

    /// Another one of the same cluster.
    pub fn beside(&self, dbname: &str) -> Placement {
        Placement::in_cluster(&self.cluster, dbname)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.dbname)
    }
}

/// Servers that hold the same databases, of which one takes writes; or a server alone. How to talk
/// to them.
#[derive(Debug, PartialEq, Eq)]
pub struct Cluster {
    key: ClusterKey,
    /// Its servers, the usual primary first; not empty.
    pub endpoints: Box<[Host]>,
    /// For residency; compared with what this proxy may serve.
    pub region: Option<String>,
    /// How the connection is protected.
    pub tls: PlacementTls,
    /// What the database may ask for besides SCRAM.
    pub auth: AuthMethods,
    /// Sessions of all its tenants at once.
    pub max_sessions: Option<usize>,
    /// With what its servers are watched.
    pub monitor: Option<Monitor>,
    /// Where sessions go that only read.
    pub read_only: ReadOnlyServer,
}

/// To which of a cluster's servers sessions go that only read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadOnlyServer {
    /// To the one that takes writes, as all others.
    #[default]
    Primary,
    /// To one that replays, as long as there is one.
    PreferStandby,
}

/// A login that says of each server of a cluster whether it takes writes, and no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// Where OpenBAO's database engine is mounted that makes it.
    pub mount: String,
    /// The engine's role.
    pub role: String,
    /// What OpenBAO calls its connection to the cluster.
    pub connection: String,
    /// The database that it logs in to, which is no tenant's.
    pub dbname: String,
}

/// Which cluster one is, whatever is said of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClusterKey {
    /// One that has a name.
    Named(Arc<str>),
    /// A server, as [`Host::comparable`] has it, that placements name one by one.
    Server(Host),
}

impl fmt::Display for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClusterKey::Named(name) => f.write_str(name),
            ClusterKey::Server(host) => host.fmt(f),
        }
    }
}

impl Cluster {
    /// Which one it is.
    pub fn key(&self) -> &ClusterKey {
        &self.key
    }

    /// Makes one that is nobody's placement: pgsilo's own. `resolve` says where a file is that it
    /// names; it is read.
    ///
    /// # Errors
    /// When it is not acceptable.
    pub fn read(
        entry: document::ClusterEntry,
        resolve: &dyn Fn(&Path) -> PathBuf,
    ) -> Result<Arc<Cluster>, EntryError> {
        entries::cluster(entry, resolve)
    }

    /// Whether it has several servers, of which one takes writes.
    pub fn has_several(&self) -> bool {
        self.endpoints.len() > 1
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.key, &*self.endpoints) {
            (_, [host]) => host.fmt(f),
            (ClusterKey::Named(name), _) => f.write_str(name),
            (ClusterKey::Server(host), _) => host.fmt(f),
        }
    }
}

/// A database server's address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// Reads `host`, `host:port`, `[address]:port` or a socket's path.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn read(text: &str) -> Result<Host, EntryError> {
        entries::endpoint(text).map_err(|wrong| wrong.alone())
    }

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
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
    pub mount: Arc<str>,
    /// What OpenBAO calls its connection to the database, where that is not `tenant-ID`.
    connection: Option<Arc<str>>,
    read_write: Option<Arc<str>>,
    read_only: Option<Arc<str>>,
    migrate: Option<Arc<str>>,
}

impl LeaseRoles {
    /// What OpenBAO calls its connection to this tenant's database.
    pub fn connection(&self, tenant: &TenantId) -> String {
        match &self.connection {
            Some(name) => name.as_ref().to_owned(),
            None => Names::of(tenant).connection(),
        }
    }

    /// The role that grants exactly this access, if the tenant has one. Never another:
    /// less would break the client, more would break the promise.
    pub fn role(&self, access: Access) -> Option<&str> {
        self.of(access).map(|role| &**role)
    }

    fn of(&self, access: Access) -> Option<&Arc<str>> {
        let role = match access {
            Access::ReadWrite => &self.read_write,
            Access::ReadOnly => &self.read_only,
            Access::Migrate => &self.migrate,
        };
        role.as_ref()
    }
}

#[cfg(test)]
mod tests;
