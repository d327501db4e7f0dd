//! What a source of the registry says of tenants, and what makes it acceptable.
//!
//! The schema is that of the file, which is also how other sources exchange entries. One bad entry
//! refuses all: a registry that is partly right would serve some tenants and forget others. What is
//! checked here is never checked again.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde::Deserialize;

use super::{
    AuthMethods, Binding, ChannelBinding, Host, LeaseRoles, OwnLimits, Placement, PlacementTls,
    Snapshot, State, Tenant, TlsClients,
};
use crate::tenant::{Access, TenantId};
use crate::text::is_loggable;
use crate::tls::{self, CaFile, TlsError};
use crate::toml_file::text::Text;

/// All that a source says, unchecked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entries {
    /// Not optional: an empty file is more likely a failed write than an empty registry.
    tenant: Vec<RawTenant>,
    #[serde(default)]
    binding: Vec<RawBinding>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBinding {
    certificate: String,
    tenant: String,
    access: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTenant {
    id: String,
    #[serde(default)]
    state: RawState,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(default)]
    database_names: Vec<String>,
    placement: RawPlacement,
    lease: RawLease,
    #[serde(default)]
    limits: RawLimits,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum RawState {
    #[default]
    Active,
    Suspended,
    Paused,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlacement {
    host: Option<String>,
    port: Option<u16>,
    socket: Option<PathBuf>,
    dbname: String,
    region: Option<String>,
    tls: Option<RawTls>,
    auth: Option<Vec<RawAuth>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    #[serde(default)]
    mode: RawMode,
    ca: Option<PathBuf>,
    server_name: Option<String>,
    channel_binding: Option<RawChannelBinding>,
}

#[derive(Debug, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum RawChannelBinding {
    Prefer,
    Require,
}

#[derive(Debug, Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum RawMode {
    Disable,
    Require,
    VerifyCa,
    #[default]
    VerifyFull,
}

#[derive(Debug, Deserialize)]
enum RawAuth {
    #[serde(rename = "scram-sha-256")]
    Scram,
    #[serde(rename = "md5")]
    Md5,
    #[serde(rename = "password")]
    Password,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLease {
    mount: Option<String>,
    roles: RawRoles,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawRoles {
    read_write: Option<String>,
    read_only: Option<String>,
    migrate: Option<String>,
}

/// As in the configuration, where a key that is left out has its value.
#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    max_sessions: Option<usize>,
    idle_timeout: Option<Text<Duration>>,
    idle_in_transaction_timeout: Option<Text<Duration>>,
    transaction_timeout: Option<Text<Duration>>,
    max_session_age: Option<Text<Duration>>,
}

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
struct Wrong(&'static str, String);

fn wrong<T>(field: &'static str, what: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong(field, what.into()))
}

/// The snapshot that entries make. What they say of a tenant as `before` did is that one's.
/// `resolve` says where a file is that an entry names.
pub(super) fn snapshot(
    entries: Entries,
    before: Option<&Snapshot>,
    resolve: &dyn Fn(&Path) -> PathBuf,
) -> Result<Snapshot, EntryError> {
    let mut reading = Reading::after(before, resolve);
    let mut tenants = HashMap::with_capacity(entries.tenant.len());
    let mut ids: HashMap<TenantId, usize> = HashMap::with_capacity(entries.tenant.len());
    let mut places: HashMap<(Host, String), usize> = HashMap::with_capacity(entries.tenant.len());
    let mut aliases = Vec::new();
    for (index, mut raw) in entries.tenant.into_iter().enumerate() {
        aliases.push(std::mem::take(&mut raw.aliases));
        let field = |field: &str| format!("tenant[{index}].{field}");
        let tenant =
            reading.tenant(raw).map_err(|Wrong(of, what)| EntryError::new(field(of), what))?;
        if let Some(first) = ids.insert(tenant.id.clone(), index) {
            let what = format!("{:?} is already the tenant", tenant.id.as_str());
            let because = Some((format!("tenant[{first}].id"), "ids are unique"));
            return Err(EntryError { field: field("id"), what, because });
        }
        let place = (tenant.placement.host.comparable(), tenant.placement.dbname.clone());
        if let Some(first) = places.insert(place, index) {
            let Placement { dbname, host, .. } = &tenant.placement;
            let what = format!("{dbname:?} on {host} is already the database");
            let rule = "tenants never share one";
            let because = Some((format!("tenant[{first}].placement.dbname"), rule));
            return Err(EntryError { field: field("placement.dbname"), what, because });
        }
        let known = before.and_then(|before| before.tenants.get(&tenant.id));
        let same = known.filter(|known| ***known == tenant).cloned();
        tenants.insert(tenant.id.clone(), same.unwrap_or_else(|| Arc::new(tenant)));
    }
    no_names_of_others(&ids, &tenants)?;
    let aliases = unambiguous(aliases, &ids)?;
    no_roles_of_others(&ids, &tenants)?;
    let bindings = bindings(entries.binding, &tenants)?;
    Ok(Snapshot { tenants, aliases, bindings, clients: reading.clients })
}

/// The aliases, as they were listed for each tenant. A word in a token means one tenant: so an
/// alias is that of one, and the id of none, be it its own.
fn unambiguous(
    listed: Vec<Vec<String>>,
    ids: &HashMap<TenantId, usize>,
) -> Result<HashMap<String, TenantId>, EntryError> {
    let mut owners: Vec<&TenantId> = ids.keys().collect();
    owners.sort_unstable_by_key(|id| ids.get(id));
    let mut aliases = HashMap::new();
    for (index, (owner, listed)) in owners.into_iter().zip(listed).enumerate() {
        for (number, alias) in listed.into_iter().enumerate() {
            let what = if !is_loggable(&alias) {
                "is not one: 1 to 256 characters, none of them controls or marks of direction"
                    .to_owned()
            } else if TenantId::parse(&alias).is_ok_and(|id| ids.contains_key(&id)) {
                "is a tenant's id, which means that tenant".to_owned()
            } else if let Some(other) = aliases.get(&alias) {
                format!("is already an alias of {other}; aliases are unique")
            } else {
                aliases.insert(alias, owner.clone());
                continue;
            };
            let field = format!("tenant[{index}].aliases[{number}]");
            return Err(EntryError::new(field, format!("{alias:?} {what}")));
        }
    }
    Ok(aliases)
}

/// A tenant's id always means it (`route.rs`), so as another's further name it would mean nothing
/// to a token for both. What a database is called where it stands is not the registry's to choose.
fn no_names_of_others(
    ids: &HashMap<TenantId, usize>,
    tenants: &HashMap<TenantId, Arc<Tenant>>,
) -> Result<(), EntryError> {
    for tenant in tenants.values() {
        let another = |name: &&String| {
            tenant.id.as_str() != *name
                && TenantId::parse(name).is_ok_and(|id| ids.contains_key(&id))
        };
        if let Some(name) = tenant.database_names.iter().find(another) {
            let index = ids.get(&tenant.id).copied().unwrap_or_default();
            let field = format!("tenant[{index}].database_names");
            return Err(EntryError::new(field, format!("{name:?} is another tenant's id")));
        }
    }
    Ok(())
}

/// Several tenants may have one mount, and none has the roles of another: a credential for one
/// would be one for the other.
fn no_roles_of_others(
    ids: &HashMap<TenantId, usize>,
    tenants: &HashMap<TenantId, Arc<Tenant>>,
) -> Result<(), EntryError> {
    let mut all: Vec<_> = tenants.values().collect();
    all.sort_by_key(|tenant| ids.get(&tenant.id));
    // Whether OpenBAO tells capitals from small letters there is its business.
    let mut owners: HashMap<(&str, String), &TenantId> = HashMap::with_capacity(all.len());
    for tenant in all {
        for access in Access::ALL {
            let Some(role) = tenant.lease.role(access) else { continue };
            let owner = *owners
                .entry((&tenant.lease.mount, role.to_ascii_lowercase()))
                .or_insert(&tenant.id);
            if *owner != tenant.id {
                let index = ids.get(&tenant.id).copied().unwrap_or_default();
                let field = format!("tenant[{index}].lease.roles.{access}");
                let mount = &tenant.lease.mount;
                let owner = owner.as_str();
                let what = format!(
                    "{role:?} of {mount:?} is tenant {owner:?}'s; tenants never share a role"
                );
                return Err(EntryError::new(field, what));
            }
        }
    }
    Ok(())
}

/// Each holder has one tenant, which is there.
fn bindings(
    raw: Vec<RawBinding>,
    tenants: &HashMap<TenantId, Arc<Tenant>>,
) -> Result<HashMap<String, Binding>, EntryError> {
    let mut bindings = HashMap::with_capacity(raw.len());
    for (index, RawBinding { certificate, tenant, access }) in raw.into_iter().enumerate() {
        let wrong =
            |field: &str, what: String| EntryError::new(format!("binding[{index}].{field}"), what);
        if !tls::Holder::may_be_named(&certificate) {
            return Err(wrong(
                "certificate",
                format!("{certificate:?} is not a URI, nor \"dns:\" and a host in lower case"),
            ));
        }
        let tenant =
            TenantId::parse(&tenant).ok().filter(|id| tenants.contains_key(id)).ok_or_else(
                || wrong("tenant", format!("{tenant:?} is not a tenant of this registry")),
            )?;
        let access = match access.parse() {
            Ok(access) => access,
            Err(error) => return Err(wrong("access", format!("{access:?} is not one: {error}"))),
        };
        if bindings.insert(certificate.clone(), Binding { tenant, access }).is_some() {
            return Err(wrong(
                "certificate",
                format!("{certificate:?} is bound already; one certificate is for one tenant"),
            ));
        }
    }
    Ok(bindings)
}

struct Reading<'a> {
    resolve: &'a dyn Fn(&Path) -> PathBuf,
    /// Each is read once.
    ca_files: HashMap<PathBuf, CaFile>,
    /// Those of the snapshot before, of which what is still asked for stays.
    known: Option<&'a TlsClients>,
    clients: TlsClients,
}

impl<'a> Reading<'a> {
    fn after(before: Option<&'a Snapshot>, resolve: &'a dyn Fn(&Path) -> PathBuf) -> Reading<'a> {
        let known = before.map(|before| &before.clients);
        Reading { resolve, ca_files: HashMap::new(), known, clients: TlsClients::new() }
    }

    fn tenant(&mut self, raw: RawTenant) -> Result<Tenant, Wrong> {
        let id = match TenantId::parse(&raw.id) {
            Ok(id) => id,
            Err(error) => return wrong("id", format!("{:?} is not one: {error}", raw.id)),
        };
        let state = match raw.state {
            RawState::Active => State::Active,
            RawState::Suspended => State::Suspended,
            RawState::Paused => State::Paused,
        };
        let placement = self.placement(raw.placement)?;
        let placement_text = placement.to_string().into();
        if raw.database_names.iter().any(|name| name.is_empty() || name.contains('\0')) {
            return wrong(
                "database_names",
                "empty or with a NUL; list names, or leave the key out",
            );
        }
        let database_names = raw.database_names.into();
        let (lease, limits) = (lease(raw.lease, &id)?, own_limits(&raw.limits));
        Ok(Tenant { id, state, database_names, placement, placement_text, lease, limits })
    }

    fn placement(&mut self, raw: RawPlacement) -> Result<Placement, Wrong> {
        let host = host(raw.host, raw.port, raw.socket)?;
        if raw.dbname.is_empty() || raw.dbname.contains('\0') {
            return wrong(
                "placement.dbname",
                "empty or with a NUL; name the tenant's own database",
            );
        }
        if raw.region.as_ref().is_some_and(String::is_empty) {
            return wrong("placement.region", "empty; name the region or leave the key out");
        }
        let mut auth = AuthMethods::default();
        for method in raw.auth.into_iter().flatten() {
            match method {
                RawAuth::Scram => {}
                RawAuth::Md5 => auth.md5 = true,
                RawAuth::Password => auth.password = true,
            }
        }
        let tls = match (&host, raw.tls) {
            (Host::Unix(_), None) => PlacementTls::Disable,
            (Host::Unix(_), Some(_)) => {
                return wrong("placement.tls", "a Unix socket has no TLS; remove it");
            }
            (Host::Tcp { .. }, raw) => self.tls(raw.unwrap_or(RawTls {
                mode: RawMode::default(),
                ca: None,
                server_name: None,
                channel_binding: None,
            }))?,
        };
        let must_be_bound =
            matches!(tls, PlacementTls::Enabled { channel_binding: ChannelBinding::Require, .. });
        if must_be_bound && (auth.md5 || auth.password) {
            return wrong(
                "placement.auth",
                "\"md5\" and \"password\" cannot be bound to the TLS connection, as channel_binding = \
                 \"require\" has it (the default of the modes \"require\" and \"verify-ca\"); remove \
                 them, or write tls = { channel_binding = \"prefer\", ... }",
            );
        }
        Ok(Placement { host, dbname: raw.dbname, region: raw.region, tls, auth })
    }

    fn tls(&mut self, raw: RawTls) -> Result<PlacementTls, Wrong> {
        let mode = match raw.mode {
            RawMode::Disable => {
                let unused =
                    raw.ca.is_some() || raw.server_name.is_some() || raw.channel_binding.is_some();
                return match unused {
                    true => wrong(
                        "placement.tls",
                        "mode \"disable\" checks nothing; remove the other keys or the mode",
                    ),
                    false => Ok(PlacementTls::Disable),
                };
            }
            RawMode::Require if raw.ca.is_some() => {
                return wrong(
                    "placement.tls.ca",
                    "mode \"require\" checks no certificate; use \"verify-ca\" or \"verify-full\", \
                     or remove ca",
                );
            }
            RawMode::Require => tls::Mode::Require,
            RawMode::VerifyCa => tls::Mode::VerifyCa,
            RawMode::VerifyFull => tls::Mode::VerifyFull,
        };
        if let Some(name) = &raw.server_name
            && ServerName::try_from(name.as_str()).is_err()
        {
            return wrong(
                "placement.tls.server_name",
                format!("{name:?} is not a host name or an IP address"),
            );
        }
        let config = self.client(mode, raw.ca)?;
        let channel_binding = match raw.channel_binding {
            Some(RawChannelBinding::Prefer) => ChannelBinding::Prefer,
            Some(RawChannelBinding::Require) => ChannelBinding::Require,
            None => ChannelBinding::default_of(mode),
        };
        Ok(PlacementTls::Enabled { config, mode, server_name: raw.server_name, channel_binding })
    }

    /// How databases of these settings are checked: as before, if they were known.
    fn client(&mut self, mode: tls::Mode, ca: Option<PathBuf>) -> Result<Arc<ClientConfig>, Wrong> {
        let field = if ca.is_some() { "placement.tls.ca" } else { "placement.tls" };
        let failed = |error: TlsError| Wrong(field, error.to_string());
        let ca = ca.map(|ca| self.ca_file(&ca)).transpose().map_err(failed)?;
        let key = (mode, ca);
        let known = self.clients.get(&key).or_else(|| self.known?.get(&key)).cloned();
        let config = match known {
            Some(config) => config,
            None => tls::client(mode, key.1.as_ref()).map_err(failed)?,
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

/// By default a tenant's credentials come from a mount of its own: OpenBAO shares its workers
/// between mounts, so that one tenant's revocations that are stuck do not hold another's up.
fn lease(raw: RawLease, tenant: &TenantId) -> Result<LeaseRoles, Wrong> {
    let mount = raw.mount.unwrap_or_else(|| format!("pgsilo/{tenant}"));
    if !mount.split('/').all(is_segment) {
        return wrong(
            "lease.mount",
            format!("{mount:?} is not a mount path; use A-Z a-z 0-9 _ . - between single slashes"),
        );
    }
    let RawRoles { read_write, read_only, migrate } = raw.roles;
    for (field, role) in [
        ("lease.roles.read-write", &read_write),
        ("lease.roles.read-only", &read_only),
        ("lease.roles.migrate", &migrate),
    ] {
        if let Some(role) = role
            && !is_segment(role)
        {
            return wrong(field, format!("{role:?} is not a role's name; use A-Z a-z 0-9 _ . -"));
        }
    }
    if read_write.is_none() && read_only.is_none() && migrate.is_none() {
        return wrong("lease.roles", "empty; name at least one role");
    }
    Ok(LeaseRoles { mount, read_write, read_only, migrate })
}

fn own_limits(raw: &RawLimits) -> OwnLimits {
    let time = |limit: Option<Text<Duration>>| limit.map(|Text(limit)| limit);
    OwnLimits {
        max_sessions: raw.max_sessions,
        idle: time(raw.idle_timeout),
        idle_in_transaction: time(raw.idle_in_transaction_timeout),
        transaction: time(raw.transaction_timeout),
        session: time(raw.max_session_age),
    }
}

/// These go into a URL's path, where `..` or an escape would reach another tenant's.
fn is_segment(text: &str) -> bool {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    !matches!(text, "" | "." | "..") && text.len() <= 255 && text.bytes().all(safe)
}
