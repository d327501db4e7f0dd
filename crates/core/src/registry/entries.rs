//! What makes acceptable what a source of the registry says of tenants.
//!
//! One bad entry refuses a whole document: a registry that is partly right would serve some tenants
//! and forget others. What is checked here is never checked again.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;

use super::document::{
    AuthEntry, BindingEntry, ClusterEntry, Document, Entry, LeaseEntry, LimitsEntry, MonitorEntry,
    PlacementEntry, RolesEntry, TenantEntry, TlsEntry, TlsMode,
};
use super::draft::{Conflict, Index, IsId};
use super::{
    AuthMethods, ChannelBinding, Cluster, ClusterKey, Host, LeaseRoles, Monitor, OwnLimits,
    Placement, PlacementTls, ReadOnlyServer, Snapshot, Tenant, TlsClients,
};
use crate::names::Names;
use crate::tenant::TenantId;
use crate::text::is_loggable;
use crate::tls::{self, CaFile, TlsError};
use crate::toml_file::text::Text;

/// What is wrong with an entry.
#[derive(Debug)]
pub struct EntryError {
    /// Of which one: `tenant[0].placement.dbname`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
    /// Where that is so because of another field: that one, and the rule.
    pub because: Option<(String, &'static str)>,
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EntryError { field, what, because } = self;
        match because {
            Some((other, rule)) => write!(f, "{field}: {what} of {other}; {rule}"),
            None => write!(f, "{field}: {what}"),
        }
    }
}

impl std::error::Error for EntryError {}

impl EntryError {
    fn new(field: String, what: impl Into<String>) -> EntryError {
        EntryError { field, what: what.into(), because: None }
    }
}

/// What is wrong, and with which of a tenant's fields.
pub(super) struct Wrong(pub(super) &'static str, pub(super) String);

impl Wrong {
    /// Of no entry in particular.
    pub(super) fn alone(self) -> EntryError {
        EntryError::new(self.0.to_owned(), self.1)
    }
}

fn wrong<T>(field: &'static str, what: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong(field, what.into()))
}

/// The snapshot that a document makes. What it says of a tenant as `before` did is that one's.
/// `resolve` says where a file is that an entry names.
pub(super) fn snapshot(
    document: Document,
    before: Option<&Snapshot>,
    resolve: &dyn Fn(&Path) -> PathBuf,
) -> Result<Snapshot, EntryError> {
    // All are in the document, or it is refused.
    let no_others: IsId<'_> = &|_| false;
    let mut reading = Reading::after(before, resolve);
    let mut index = Index::default();
    for (number, entry) in document.cluster.into_iter().enumerate() {
        let at = |conflict: Conflict| {
            EntryError::new(format!("cluster[{number}].{}", conflict.field), conflict.what)
        };
        let (name, cluster) = reading.served(entry).map_err(|wrong| at(wrong.into()))?;
        index.add_cluster(&name, cluster).map_err(at)?;
    }
    let mut ids: HashMap<TenantId, usize> = HashMap::with_capacity(document.tenant.len());
    let mut tenants = Vec::with_capacity(document.tenant.len());
    let at = |number: usize, ids: &HashMap<TenantId, usize>, conflict: Conflict| {
        let field = |number, field: &str| format!("tenant[{number}].{field}");
        let because = conflict.because.map(|(other, of, rule)| {
            (field(ids.get(&other).copied().unwrap_or_default(), of), rule)
        });
        EntryError { field: field(number, &conflict.field), what: conflict.what, because }
    };
    for (number, mut entry) in document.tenant.into_iter().enumerate() {
        let aliases = std::mem::take(&mut entry.aliases);
        let tenant =
            reading.tenant(entry, &index).map_err(|wrong| at(number, &ids, wrong.into()))?;
        let tenant = same_as(before, tenant);
        index.check_server(&tenant).map_err(|conflict| at(number, &ids, conflict))?;
        index.add(&tenant).map_err(|conflict| at(number, &ids, conflict))?;
        ids.insert(tenant.id.clone(), number);
        tenants.push((tenant, aliases));
    }
    for (number, (tenant, _)) in tenants.iter().enumerate() {
        index.check_names(tenant, no_others).map_err(|conflict| at(number, &ids, conflict))?;
        index.add_seal(tenant, no_others).map_err(|conflict| at(number, &ids, conflict))?;
    }
    for (number, (tenant, aliases)) in tenants.iter_mut().enumerate() {
        let listed = std::mem::take(aliases);
        index
            .add_aliases(&tenant.id, listed, no_others)
            .map_err(|conflict| at(number, &ids, conflict))?;
    }
    for (number, (tenant, _)) in tenants.iter().enumerate() {
        index.add_roles(tenant).map_err(|conflict| at(number, &ids, conflict))?;
    }
    for (number, entry) in document.binding.into_iter().enumerate() {
        index.bind(entry).map_err(|Conflict { field, what, .. }| {
            EntryError::new(format!("binding[{number}].{field}"), what)
        })?;
    }
    Ok(Snapshot { index, clients: reading.clients })
}

/// The tenant that was there, if nothing else is said of it.
fn same_as(before: Option<&Snapshot>, tenant: Tenant) -> Arc<Tenant> {
    let known = before.and_then(|before| before.index.tenants.get(&tenant.id));
    let same = known.filter(|known| ***known == tenant).cloned();
    same.unwrap_or_else(|| Arc::new(tenant))
}

/// What a source that tells of changes has to say. It says one thing of a tenant, or of a cluster, at
/// a time.
#[derive(Debug, Default)]
pub struct News {
    /// Clusters that are new, or other than they were.
    pub clusters: Vec<ClusterEntry>,
    /// Names of those that are gone.
    pub clusters_gone: Vec<String>,
    /// Tenants that are new, or other than they were.
    pub tenants: Vec<Entry>,
    /// Those that are gone.
    pub tenants_gone: Vec<TenantId>,
}

/// What `before` becomes. An entry that is not acceptable is no tenant; the others are. Those that were
/// there come before those that are new: what is said of one does not take another's place.
pub(super) fn change(
    before: &Snapshot,
    news: News,
    is_id: IsId<'_>,
    resolve: &dyn Fn(&Path) -> PathBuf,
) -> Change {
    let mut reading = Reading::after(Some(before), resolve);
    let mut index = before.index.clone();
    let mut rejected = Vec::new();
    let names = news.clusters.iter().map(|entry| &entry.name).chain(&news.clusters_gone);
    let other_clusters: HashSet<ClusterKey> =
        names.map(|name| ClusterKey::Named(name.as_str().into())).collect();
    for name in news.clusters.iter().map(|entry| &entry.name).chain(&news.clusters_gone) {
        index.remove_cluster(name);
    }
    for entry in news.clusters {
        let name = entry.name.clone();
        let added = reading.served(entry).map_err(Conflict::from);
        let added = added.and_then(|(name, cluster)| index.add_cluster(&name, cluster));
        if let Err(conflict) = added {
            rejected.push(Rejected::of("cluster", name, conflict));
        }
    }
    let mut changed: HashSet<TenantId> = news.tenants_gone.iter().cloned().collect();
    let mut tenants = Vec::with_capacity(news.tenants.len());
    // Those that nothing leads to in another way than before.
    let mut in_place = HashMap::new();
    for Entry { tenant: mut entry, bindings } in news.tenants {
        let id = entry.id.clone();
        let aliases = std::mem::take(&mut entry.aliases);
        match reading.tenant(entry, &index) {
            Ok(tenant)
                if !changed.contains(&tenant.id)
                    && index.leads_to_the_same(&tenant, &aliases, &bindings) =>
            {
                in_place.insert(tenant.id.clone(), tenant);
                continue;
            }
            Ok(tenant) => tenants.push((tenant, aliases, bindings)),
            Err(wrong) => rejected.push(Rejected::of("tenant", id.clone(), wrong.into())),
        }
        changed.extend(TenantId::parse(&id));
    }
    if !other_clusters.is_empty() {
        let moved = before.tenants().filter(|tenant| {
            let is_said = changed.contains(&tenant.id) || in_place.contains_key(&tenant.id);
            other_clusters.contains(tenant.placement.cluster.key()) && !is_said
        });
        let moved: Vec<_> = moved.map(|tenant| tenant.id.clone()).collect();
        for id in &moved {
            let what = "is not the one that it was, and its source says nothing new of the tenant";
            let conflict = Wrong("placement.cluster", what.to_owned()).into();
            rejected.push(Rejected::of("tenant", id.to_string(), conflict));
        }
        changed.extend(moved);
    }
    for id in &changed {
        index.remove(id);
    }
    for (id, tenant) in in_place {
        index.tenants.insert(id.clone(), same_as(Some(before), tenant));
        changed.insert(id);
    }
    tenants.sort_by_key(|(tenant, ..)| !before.index.tenants.contains_key(&tenant.id));
    let mut admitted = Vec::with_capacity(tenants.len());
    for (tenant, aliases, bindings) in tenants {
        let tenant = same_as(Some(before), tenant);
        match admit(&mut index, &tenant) {
            Ok(()) => admitted.push((tenant, aliases, bindings)),
            Err(conflict) => {
                rejected.push(Rejected::of("tenant", tenant.id.to_string(), conflict));
            }
        }
    }
    for (tenant, aliases, bindings) in admitted {
        if let Err(conflict) = admit_words(&mut index, &tenant, aliases, bindings, is_id) {
            index.remove(&tenant.id);
            rejected.push(Rejected::of("tenant", tenant.id.to_string(), conflict));
        }
    }
    changed.retain(|id| {
        let (was, is) = (before.index.tenants.get(id), index.tenants.get(id));
        let is_same = match (was, is) {
            (Some(was), Some(is)) => Arc::ptr_eq(was, is),
            (None, None) => true,
            _ => false,
        };
        !is_same || !index.says_the_same(&before.index, id)
    });
    // What the tenants that have not changed are checked with is not asked for again.
    let mut clients = before.clients.clone();
    clients.extend(reading.clients);
    Change { snapshot: Snapshot { index, clients }, changed, rejected }
}

/// Adds a tenant that is new to the index, if it is in no other's way.
fn admit(index: &mut Index, tenant: &Arc<Tenant>) -> Result<(), Conflict> {
    // Before it is there: what it is not may be said of others.
    index.check_id(&tenant.id)?;
    index.check_aliases(&tenant.id)?;
    index.check_seals(&tenant.id)?;
    index.check_server(tenant)?;
    index.add(tenant)
}

/// Adds what is said of it, once all tenants are there.
fn admit_words(
    index: &mut Index,
    tenant: &Arc<Tenant>,
    aliases: Vec<String>,
    bindings: Vec<BindingEntry>,
    is_id: IsId<'_>,
) -> Result<(), Conflict> {
    index.check_names(tenant, is_id)?;
    index.add_seal(tenant, is_id)?;
    index.add_aliases(&tenant.id, aliases, is_id)?;
    index.add_roles(tenant)?;
    bindings.into_iter().try_for_each(|entry| index.bind(entry))
}

/// A snapshot, and how it differs from the one before.
#[derive(Debug)]
pub struct Change {
    /// What is so now.
    pub snapshot: Snapshot,
    /// The tenants of which it says something else.
    pub changed: HashSet<TenantId>,
    /// What the source says and cannot be.
    pub rejected: Vec<Rejected>,
}

/// An entry that is not acceptable: its tenant is not served, or its cluster's tenants are not.
#[derive(Debug)]
pub struct Rejected {
    /// `tenant` or `cluster`.
    pub kind: &'static str,
    /// Which one it would be, as the source has it.
    pub id: String,
    /// Of which field: `placement.dbname`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
}

impl Rejected {
    fn of(kind: &'static str, id: String, conflict: Conflict) -> Rejected {
        let Conflict { field, what, because } = conflict;
        let what = match because {
            Some((other, _, rule)) => format!("{what} of {other}; {rule}"),
            None => what,
        };
        Rejected { kind, id, field, what }
    }
}

/// One cluster, for itself.
pub(super) fn cluster(
    entry: ClusterEntry,
    resolve: &dyn Fn(&Path) -> PathBuf,
) -> Result<Arc<Cluster>, EntryError> {
    match Reading::after(None, resolve).cluster(entry) {
        Ok((_, cluster)) => Ok(cluster),
        Err(Wrong(field, what)) => Err(EntryError::new(field.to_owned(), what)),
    }
}

struct Reading<'a> {
    resolve: &'a dyn Fn(&Path) -> PathBuf,
    /// Each is read once.
    ca_files: HashMap<PathBuf, CaFile>,
    /// Those of the snapshot before, of which what is still asked for stays.
    known: Option<&'a TlsClients>,
    clients: TlsClients,
    /// Servers without a cluster's name, for all placements that say the same of them.
    servers: HashMap<Host, Vec<Arc<Cluster>>>,
    /// Mounts that several tenants have.
    mounts: HashSet<Arc<str>>,
}

impl<'a> Reading<'a> {
    fn after(before: Option<&'a Snapshot>, resolve: &'a dyn Fn(&Path) -> PathBuf) -> Reading<'a> {
        let known = before.map(|before| &before.clients);
        Reading {
            resolve,
            ca_files: HashMap::new(),
            known,
            clients: TlsClients::new(),
            servers: HashMap::new(),
            mounts: HashSet::new(),
        }
    }

    fn tenant(&mut self, entry: TenantEntry, index: &Index) -> Result<Tenant, Wrong> {
        let TenantEntry {
            id, name, state, database_names, regions, placement, lease, limits, ..
        } = entry;
        if name.as_ref().is_some_and(|name| !is_loggable(name)) {
            let what =
                "not one line: 1 to 256 characters, none of them controls or marks of direction";
            return wrong("name", what);
        }
        let id = match TenantId::parse(&id) {
            Ok(id) => id,
            Err(error) => return wrong("id", format!("{id:?} is not one: {error}")),
        };
        let placement = self.placement(placement, &id, index)?;
        let placement_text = placement.to_string().into();
        if database_names.iter().any(|name| name.is_empty() || name.contains('\0')) {
            return wrong(
                "database_names",
                "empty or with a NUL; list names, or leave the key out",
            );
        }
        if regions.as_ref().is_some_and(|all| all.is_empty() || all.iter().any(String::is_empty)) {
            return wrong("regions", "empty; name each region, or leave the key out for any");
        }
        let (lease, limits) = (self.lease(lease, &id)?, own_limits(&limits));
        Ok(Tenant {
            id,
            state: state.unwrap_or_default(),
            database_names: database_names.into(),
            regions: regions.map(Vec::into_boxed_slice),
            placement,
            placement_text,
            lease,
            limits: (limits != OwnLimits::NONE).then(|| Box::new(limits)),
        })
    }

    fn placement(
        &mut self,
        entry: PlacementEntry,
        id: &TenantId,
        index: &Index,
    ) -> Result<Placement, Wrong> {
        let PlacementEntry { cluster, host, port, socket, dbname, seal, region, tls, auth } = entry;
        let cluster = match cluster {
            None => self.server(host, port, socket, region, tls, auth)?,
            Some(_)
                if host.is_some()
                    || port.is_some()
                    || socket.is_some()
                    || region.is_some()
                    || tls.is_some()
                    || auth.is_some() =>
            {
                return wrong(
                    "placement",
                    "both a cluster and what it says of itself; keep cluster, dbname and seal",
                );
            }
            Some(name) => match index.clusters.get(&*name) {
                Some(cluster) => Arc::clone(cluster),
                None => {
                    return wrong(
                        "placement.cluster",
                        format!("{name:?} is not a cluster of this registry"),
                    );
                }
            },
        };
        if dbname.is_empty() || dbname.contains('\0') {
            return wrong(
                "placement.dbname",
                "empty or with a NUL; name the tenant's own database",
            );
        }
        let seal = seal.filter(|seal| seal != id.as_str()).map(Into::into);
        Ok(Placement { cluster, dbname: dbname.into(), seal })
    }

    /// A server that has no cluster's name: the same one for all that say the same of it.
    fn server(
        &mut self,
        name: Option<String>,
        port: Option<u16>,
        socket: Option<PathBuf>,
        region: Option<String>,
        tls: Option<TlsEntry>,
        auth: Option<Vec<AuthEntry>>,
    ) -> Result<Arc<Cluster>, Wrong> {
        let host = host(name, port, socket)?;
        if region.as_ref().is_some_and(String::is_empty) {
            return wrong("placement.region", "empty; name the region or leave the key out");
        }
        const FIELDS: Fields = Fields {
            tls: "placement.tls",
            ca: "placement.tls.ca",
            ca_pem: "placement.tls.ca_pem",
            server_name: "placement.tls.server_name",
            auth: "placement.auth",
        };
        let is_local = matches!(host, Host::Unix(_));
        let (tls, auth) = self.protection(&FIELDS, is_local, tls, auth, "placement.tls.ca_pem")?;
        let place = host.comparable();
        let key = ClusterKey::Server(place.clone());
        let endpoints = [host].into();
        let (max_sessions, monitor, read_only) = (None, None, ReadOnlyServer::Primary);
        let cluster =
            Cluster { key, endpoints, region, tls, auth, max_sessions, monitor, read_only };
        let known = self.servers.entry(place).or_default();
        match known.iter().find(|known| ***known == cluster) {
            Some(known) => Ok(Arc::clone(known)),
            None => {
                let cluster = Arc::new(cluster);
                known.push(Arc::clone(&cluster));
                Ok(cluster)
            }
        }
    }

    /// One that tenants are in.
    fn served(&mut self, entry: ClusterEntry) -> Result<(Arc<str>, Arc<Cluster>), Wrong> {
        if entry.max_sessions == Some(0) {
            return wrong("max_sessions", "0 lets nobody in; leave it out, or suspend its tenants");
        }
        self.cluster(entry)
    }

    fn cluster(&mut self, entry: ClusterEntry) -> Result<(Arc<str>, Arc<Cluster>), Wrong> {
        const FIELDS: Fields = Fields {
            tls: "tls",
            ca: "tls.ca",
            ca_pem: "tls.ca_pem",
            server_name: "tls.server_name",
            auth: "auth",
        };
        let ClusterEntry { name, endpoints, region, tls, auth, max_sessions, monitor, read_only } =
            entry;
        if !is_label(&name) {
            return wrong(
                "name",
                format!(
                    "{name:?} is not one: 1 to 63 of A-Z a-z 0-9 . _ : - and a letter or digit first"
                ),
            );
        }
        if let Some(region) = region.as_ref().filter(|region| !is_label(region)) {
            let what = format!(
                "{region:?} is not one: 1 to 63 of A-Z a-z 0-9 . _ : - and a letter or digit first"
            );
            return wrong("region", what);
        }
        if endpoints.is_empty() || endpoints.len() > MAX_ENDPOINTS {
            return wrong("endpoints", format!("list 1 to {MAX_ENDPOINTS} servers"));
        }
        let endpoints: Result<Box<[Host]>, Wrong> =
            endpoints.iter().map(|text| endpoint(text)).collect();
        let endpoints = endpoints?;
        let is_local = matches!(&endpoints[..], [Host::Unix(_)]);
        if !is_local && endpoints.iter().any(|host| matches!(host, Host::Unix(_))) {
            return wrong("endpoints", "a Unix socket is one server, and has no others beside it");
        }
        let source = format!("ca_pem of cluster {name:?}");
        let (tls, auth) = self.protection(&FIELDS, is_local, tls, auth, &source)?;
        let monitor = monitor.map(checked_monitor).transpose()?;
        let name: Arc<str> = name.into();
        let key = ClusterKey::Named(Arc::clone(&name));
        let read_only = read_only.unwrap_or_default();
        if read_only == ReadOnlyServer::PreferStandby {
            let what = match (endpoints.len(), &monitor) {
                (1, _) => "there is one server only; list its standbys",
                (_, None) => "nobody watches the servers; add a monitor",
                (_, Some(_)) => "",
            };
            if !what.is_empty() {
                return wrong("read_only", format!("\"prefer-standby\", and {what}"));
            }
        }
        let cluster =
            Cluster { key, endpoints, region, tls, auth, max_sessions, monitor, read_only };
        Ok((name, Arc::new(cluster)))
    }

    /// How connections to a server are protected, and what it may ask for.
    fn protection(
        &mut self,
        fields: &Fields,
        is_local: bool,
        tls: Option<TlsEntry>,
        auth: Option<Vec<AuthEntry>>,
        pem_source: &str,
    ) -> Result<(PlacementTls, AuthMethods), Wrong> {
        let mut methods = AuthMethods::default();
        for method in auth.into_iter().flatten() {
            match method {
                AuthEntry::Scram => {}
                AuthEntry::Md5 => methods.md5 = true,
                AuthEntry::Password => methods.password = true,
            }
        }
        let tls = match (is_local, tls) {
            (true, None) => PlacementTls::Disable,
            (true, Some(_)) => return wrong(fields.tls, "a Unix socket has no TLS; remove it"),
            (false, tls) => self.tls(fields, tls.unwrap_or_default(), pem_source)?,
        };
        let must_be_bound =
            matches!(tls, PlacementTls::Enabled { channel_binding: ChannelBinding::Require, .. });
        if must_be_bound && (methods.md5 || methods.password) {
            return wrong(
                fields.auth,
                "\"md5\" and \"password\" cannot be bound to the TLS connection, as channel_binding = \
                 \"require\" has it (the default of the modes \"require\" and \"verify-ca\"); remove \
                 them, or write tls = { channel_binding = \"prefer\", ... }",
            );
        }
        Ok((tls, methods))
    }

    fn tls(
        &mut self,
        fields: &Fields,
        entry: TlsEntry,
        pem_source: &str,
    ) -> Result<PlacementTls, Wrong> {
        let TlsEntry { mode, ca, ca_pem, server_name, channel_binding } = entry;
        let has_authorities = ca.is_some() || ca_pem.is_some();
        let Some(checks) = mode.checks() else {
            return match has_authorities || server_name.is_some() || channel_binding.is_some() {
                true => wrong(
                    fields.tls,
                    "mode \"disable\" checks nothing; remove the other keys or the mode",
                ),
                false => Ok(PlacementTls::Disable),
            };
        };
        if mode == TlsMode::Require && has_authorities {
            return wrong(
                if ca.is_some() { fields.ca } else { fields.ca_pem },
                "mode \"require\" checks no certificate; use \"verify-ca\" or \"verify-full\", \
                 or remove ca",
            );
        }
        if let Some(name) = &server_name
            && ServerName::try_from(name.as_str()).is_err()
        {
            return wrong(
                fields.server_name,
                format!("{name:?} is not a host name or an IP address"),
            );
        }
        let (field, ca) = match (ca, ca_pem) {
            (None, None) => (fields.tls, None),
            (Some(_), Some(_)) => return wrong(fields.tls, "both ca and ca_pem; keep one"),
            (None, Some(pem)) => (fields.ca_pem, Some(CaFile::named(pem_source, &pem))),
            (Some(path), None) => {
                let read = self.ca_file(&path);
                (fields.ca, Some(read.map_err(|error| Wrong(fields.ca, error.to_string()))?))
            }
        };
        let config = self.client(checks, ca).map_err(|error| Wrong(field, error.to_string()))?;
        let channel_binding = channel_binding.unwrap_or(ChannelBinding::default_of(checks));
        Ok(PlacementTls::Enabled { config, mode: checks, server_name, channel_binding })
    }

    /// How databases of these settings are checked: as before, if they were known.
    fn client(
        &mut self,
        mode: tls::Mode,
        ca: Option<CaFile>,
    ) -> Result<Arc<ClientConfig>, TlsError> {
        let key = (mode, ca);
        let known = self.clients.get(&key).or_else(|| self.known?.get(&key)).cloned();
        let config = match known {
            Some(config) => config,
            None => tls::client(mode, key.1.as_ref())?,
        };
        self.clients.insert(key, Arc::clone(&config));
        Ok(config)
    }

    fn ca_file(&mut self, ca: &Path) -> Result<CaFile, TlsError> {
        let path = (self.resolve)(ca);
        if let Some(known) = self.ca_files.get(&path) {
            return Ok(known.clone());
        }
        let read = CaFile::read(&path)?;
        self.ca_files.insert(path, read.clone());
        Ok(read)
    }

    /// By default a tenant's credentials come from a mount of its own: OpenBAO shares its workers
    /// between mounts, so that one tenant's revocations that are stuck do not hold another's up.
    fn lease(&mut self, entry: LeaseEntry, tenant: &TenantId) -> Result<LeaseRoles, Wrong> {
        let mount = entry.mount.unwrap_or_else(|| format!("pgsilo/{tenant}"));
        check_mount("lease.mount", &mount)?;
        if let Some(name) = &entry.connection {
            check_segment("lease.connection", "a connection's name", name)?;
        }
        // Left out, its name costs no memory.
        let connection = entry.connection.filter(|name| *name != Names::of(tenant).connection());
        let RolesEntry { read_write, read_only, migrate } = entry.roles;
        for (field, role) in [
            ("lease.roles.read-write", &read_write),
            ("lease.roles.read-only", &read_only),
            ("lease.roles.migrate", &migrate),
        ] {
            if let Some(role) = role {
                check_segment(field, "a role's name", role)?;
            }
        }
        if read_write.is_none() && read_only.is_none() && migrate.is_none() {
            return wrong("lease.roles", "empty; name at least one role");
        }
        let [read_write, read_only, migrate] =
            [read_write, read_only, migrate].map(|role| role.map(Into::into));
        let connection = connection.map(Into::into);
        Ok(LeaseRoles { mount: self.mount(mount), connection, read_write, read_only, migrate })
    }

    fn mount(&mut self, mount: String) -> Arc<str> {
        match self.mounts.get(&*mount) {
            Some(known) => Arc::clone(known),
            None => {
                let mount: Arc<str> = mount.into();
                self.mounts.insert(Arc::clone(&mount));
                mount
            }
        }
    }
}

/// Which fields are about a server's protection: a cluster's, or a placement's.
struct Fields {
    tls: &'static str,
    ca: &'static str,
    ca_pem: &'static str,
    server_name: &'static str,
    auth: &'static str,
}

/// Servers of one cluster.
const MAX_ENDPOINTS: usize = 16;

/// `host`, `host:port`, `[address]:port`, or a socket's path.
pub(super) fn endpoint(text: &str) -> Result<Host, Wrong> {
    let written = |Wrong(_, what): Wrong| {
        let what = format!("{text:?}: {what}; write it like \"db1.internal:5432\"");
        Wrong("endpoints", what)
    };
    if text.starts_with('/') {
        return host(None, None, Some(text.into())).map_err(written);
    }
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            (address, port.strip_prefix(':').or(port.is_empty().then_some("5432")))
        }
        // More colons: an address without brackets.
        None => match text.rsplit_once(':').filter(|(name, _)| !name.contains(':')) {
            Some((name, port)) => (name, Some(port)),
            None => (text, Some("5432")),
        },
    };
    let port = port.filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
    match port.and_then(|port| port.parse().ok()) {
        Some(port) => host(Some(name.to_owned()), Some(port), None).map_err(written),
        None => Err(written(Wrong("endpoints", "no port behind the colon".to_owned()))),
    }
}

fn check_mount(field: &'static str, mount: &str) -> Result<(), Wrong> {
    match mount.split('/').all(is_segment) {
        true => Ok(()),
        false => wrong(
            field,
            format!("{mount:?} is not a mount path; use A-Z a-z 0-9 _ . - between single slashes"),
        ),
    }
}

fn check_segment(field: &'static str, what: &str, text: &str) -> Result<(), Wrong> {
    match is_segment(text) {
        true => Ok(()),
        false => wrong(field, format!("{text:?} is not {what}; use A-Z a-z 0-9 _ . -")),
    }
}

fn checked_monitor(entry: MonitorEntry) -> Result<Monitor, Wrong> {
    let MonitorEntry { mount, role, connection, dbname } = entry;
    check_mount("monitor.mount", &mount)?;
    check_segment("monitor.role", "a role's name", &role)?;
    let connection = connection.unwrap_or_else(|| role.clone());
    check_segment("monitor.connection", "a connection's name", &connection)?;
    let dbname = dbname.unwrap_or_else(|| "postgres".to_owned());
    if dbname.is_empty() || dbname.contains('\0') {
        return wrong("monitor.dbname", "empty or with a NUL; name a database that is no tenant's");
    }
    Ok(Monitor { mount, role, connection, dbname })
}

/// What an operator calls a cluster.
fn is_label(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && text.len() <= 63 && text.bytes().all(plain)
}

fn host(host: Option<String>, port: Option<u16>, socket: Option<PathBuf>) -> Result<Host, Wrong> {
    match (host, socket) {
        (Some(_), Some(_)) => wrong("placement", "both host and socket; keep one"),
        (None, None) => wrong("placement", "neither host nor socket; add one"),
        (None, Some(_)) if port.is_some() => {
            wrong("placement.port", "a socket has no port; it is part of the path")
        }
        (None, Some(path))
            if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) =>
        {
            wrong(
                "placement.socket",
                format!("{path:?} is not an absolute path; write it from the root"),
            )
        }
        (None, Some(path)) => Ok(Host::Unix(path)),
        (Some(host), None) => {
            // Also what TLS will be asked to find in the certificate.
            if ServerName::try_from(host.as_str()).is_err() {
                return wrong(
                    "placement.host",
                    format!(
                        "{host:?} is not a host name or an IP address (without brackets or port)"
                    ),
                );
            }
            match port.unwrap_or(5432) {
                0 => wrong("placement.port", "0 is not a port; PostgreSQL's is usually 5432"),
                port => Ok(Host::Tcp { host, port }),
            }
        }
    }
}

fn own_limits(entry: &LimitsEntry) -> OwnLimits {
    let time = |limit: Option<Text<Duration>>| limit.map(|Text(limit)| limit);
    OwnLimits {
        max_sessions: entry.max_sessions,
        max_session_rate: entry.max_session_rate,
        idle: time(entry.idle_timeout),
        idle_in_transaction: time(entry.idle_in_transaction_timeout),
        transaction: time(entry.transaction_timeout),
        session: time(entry.max_session_age),
    }
}

/// Whether it may be a part of a URL's path at OpenBAO, where `..` or an escape would reach another
/// tenant's.
pub fn is_segment(text: &str) -> bool {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    !matches!(text, "" | "." | "..") && text.len() <= 255 && text.bytes().all(safe)
}
