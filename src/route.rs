//! Where a session leads: a pure decision over what was proved, what the client stated, and what
//! the registry knows of the proved tenants.
//!
//! What a client states (its database's name, the host in its TLS handshake) selects nothing by
//! itself. It has to agree, or chooses among several memberships: a name that belongs to none of
//! the session's own tenants is refused, no matter whose it is. One that is the id of one of them
//! means that one, whatever others call their databases; other names choose only where they are of
//! exactly one. Only the session's own tenants are looked up, so no answer tells of another's
//! existence. The user's name chooses nothing: a database's name that equals it says nothing, as
//! libpq sends that where none is given. A certificate says nothing of tenants: the registry binds
//! its holder to one.
//!
//! [`Route::resolve`] is the only way to a [`Route`], and nothing is dialled without one. The
//! Routed stage calls it.
//!
//! A route is everything that a connection to a database is made of: the tenant as the registry has
//! it now, the access and its OpenBAO role, the client's settings byte for byte, and under session
//! authority a hash of the token. Only sessions of equal routes use one connection, one after the
//! other (`pool.rs`). A reload of the registry keeps a tenant whose entry says what it said before,
//! the files that it names included; a route made before a change of its tenant equals none made
//! after it.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use pgsilo_core::registry::{ReadOnlyServer, Snapshot, State, Tenant};
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_wire::startup::{self, Startup};

use crate::clusters::Wanted;
use crate::identity::Identity;
use crate::lease::{Authorization, Request};
use crate::token::Rejected;

/// Names of databases that a listener takes for no name at all, beside the user's: what tools open
/// first, or what an application cannot be told to change. The id of one of a session's own tenants
/// is a name all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseNames {
    /// These.
    Only(Vec<String>),
    /// Every name.
    Any,
}

impl Default for DatabaseNames {
    fn default() -> DatabaseNames {
        DatabaseNames::Only(Vec::new())
    }
}

impl DatabaseNames {
    fn contains(&self, name: &[u8]) -> bool {
        match self {
            DatabaseNames::Only(names) => names.iter().any(|allowed| allowed.as_bytes() == name),
            DatabaseNames::Any => true,
        }
    }
}

/// What a client states about its target.
#[derive(Debug, Clone, Copy)]
struct Stated<'a> {
    /// The database of its startup packet. An empty one is none, as in PostgreSQL.
    database: Option<&'a [u8]>,
    /// Its user: the database's name where there is none, so one that equals it says nothing.
    user: &'a [u8],
    /// The tenant's part of the host in its TLS handshake, where the listener has a suffix for it.
    host: Option<&'a str>,
}

/// Why there is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    /// What the token calls a tenant means none, or one that its issuer may not speak for.
    #[error(transparent)]
    Token(#[from] Rejected),
    /// The certificate's holder is bound to no tenant.
    #[error("the registry binds {holder:?} to no tenant")]
    Unbound {
        /// The holder's name.
        holder: String,
    },
    /// Nothing was proved.
    #[error("the identity has no tenant")]
    NoTenant,
    /// Several are possible.
    #[error("the identity has {tenants} tenants, and what the client states does not say which")]
    Ambiguous {
        /// How many.
        tenants: usize,
        /// The database named is the id of one of them, and the user's name.
        as_user: bool,
    },
    /// The database stated is none of theirs.
    #[error("the database named belongs to none of: {}", listed(tenants))]
    DatabaseUnknown {
        /// What the client called it.
        named: String,
        /// Whose it could be.
        tenants: Vec<TenantId>,
    },
    /// The host stated is none of theirs.
    #[error("the host named in TLS belongs to none of: {}", listed(tenants))]
    HostUnknown {
        /// The tenant's part of its name.
        named: String,
        /// Whose it could be.
        tenants: Vec<TenantId>,
    },
    /// There is one tenant, and it is not to be reached.
    #[error("{why}")]
    Closed {
        /// The one.
        tenant: TenantId,
        /// How much would be granted there.
        access: Access,
        /// What is in the way.
        why: Closed,
    },
}

/// Why the one tenant is not to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Closed {
    /// The registry does not know it.
    #[error("not in the registry")]
    Unknown,
    /// Its state says so.
    #[error("suspended in the registry")]
    Suspended,
    /// Its state says so, for a while.
    #[error("paused in the registry")]
    Paused,
    /// Its state says so: soon it will be gone.
    #[error("being deleted")]
    Deleting,
    /// Its database is where it may not live.
    #[error("the registry has placed it outside of its regions")]
    Misplaced,
    /// Its database is in a region that is not served here.
    #[error("the placement's region is not served here")]
    OtherRegion,
    /// Its placement has no region, and only some regions are served here.
    #[error("the placement says no region")]
    NoRegion,
    /// No role of OpenBAO's is for that access.
    #[error("the registry has no role for {0} access")]
    NoRole(Access),
    /// Its database would not take so long a startup packet.
    #[error("startup settings are too long by {excess} bytes")]
    SettingsTooLong {
        /// Bytes.
        excess: usize,
    },
}

/// What is decided with, beside the registry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    /// Names of databases that say nothing where the session came in.
    pub(crate) allowed: &'a DatabaseNames,
    /// Regions that may be served; `None`: any.
    pub(crate) regions: Option<&'a BTreeSet<String>>,
}

/// A setting's name and value.
type Setting = (Box<[u8]>, Box<[u8]>);

/// Where a session leads, whosever it is: what a connection to a database is made for, all of it.
/// Connections of equal routes cannot be told apart.
#[derive(Debug)]
pub(crate) struct Route {
    tenant: Arc<Tenant>,
    /// OpenBAO's role for the tenant and the access that is granted.
    role: String,
    access: Access,
    /// A hash of the very token, where the lease is asked for with it: OpenBAO might have refused
    /// another.
    token: Option<[u8; 32]>,
    /// Names and values, as the client sent them.
    settings: Vec<Setting>,
}

impl Route {
    /// The one route of an identity, or none. `token` is the hash of what the lease is asked for
    /// with, if it is asked for with the session's own token.
    ///
    /// # Errors
    /// When the identity has no tenant that the registry serves here, or several, or what the
    /// client states is of none of them.
    pub(crate) fn resolve(
        identity: &Identity,
        startup: &Startup,
        host: Option<&str>,
        registry: &Snapshot,
        rules: Rules<'_>,
        token: Option<[u8; 32]>,
    ) -> Result<Route, RouteError> {
        let stated = Stated { database: startup.database(), user: startup.user(), host };
        let choose =
            |tenants: &[TenantId]| choose(tenants, &stated, rules.allowed, registry).cloned();
        let (id, access) = match identity {
            Identity::Token(claims) => {
                (choose(&claims.tenants(|word| registry.named(word))?)?, claims.access())
            }
            Identity::Certificate(holder) => {
                let binding = registry.binding(holder.name());
                let unbound = || RouteError::Unbound { holder: holder.name().to_string() };
                let binding = binding.ok_or_else(unbound)?;
                (choose(std::slice::from_ref(&binding.tenant))?, binding.access)
            }
        };
        let closed = |why| RouteError::Closed { tenant: id.clone(), access, why };
        let tenant = registry.tenant(&id).ok_or_else(|| closed(Closed::Unknown))?;
        let role = open(&tenant, access, startup, rules.regions).map_err(closed)?.to_owned();
        let settings = startup.settings();
        let settings = settings.map(|(name, value)| (name.into(), value.into())).collect();
        Ok(Route { tenant, role, access, token, settings })
    }

    /// The tenant. Who can show a route may dial its placement.
    pub(crate) fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// How much a session may do there.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// At which of its cluster's servers a session may be.
    pub(crate) fn wants(&self) -> Wanted {
        match (self.access, self.tenant.placement().cluster.read_only) {
            (Access::ReadOnly, ReadOnlyServer::PreferStandby) => Wanted::Standby,
            _ => Wanted::Primary,
        }
    }

    /// OpenBAO's role for that.
    pub(crate) fn role(&self) -> &str {
        &self.role
    }

    /// What the database is to be told at the start.
    pub(crate) fn settings(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.settings.iter().map(|(name, value)| (&**name, &**value))
    }

    /// What to ask OpenBAO for, for no session in particular.
    pub(crate) fn request(&self, authorization: Authorization) -> Request<'_> {
        let (tenant, mount) = (self.tenant.id(), &self.tenant.lease().mount);
        let cluster = self.tenant.placement().cluster.key();
        let (role, access) = (&*self.role, self.access);
        let (session, subject, until) = (None, None, None);
        Request { tenant, cluster, mount, role, access, session, subject, authorization, until }
    }
}

/// Of a tenant as the registry has it: once its entry says something else, it is another.
impl PartialEq for Route {
    fn eq(&self, other: &Route) -> bool {
        let Route { tenant, role, access, token, settings } = self;
        Arc::ptr_eq(tenant, &other.tenant)
            && *role == other.role
            && *access == other.access
            && *token == other.token
            && *settings == other.settings
    }
}

impl Eq for Route {}

impl Hash for Route {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Route { tenant, role, access, token, settings } = self;
        (tenant.id(), role, access, token, settings).hash(state);
    }
}

/// The role to lease from, if the tenant is served here, for that access, and takes the settings:
/// what a database does not take is known before a lease is spent on it.
fn open<'t>(
    tenant: &'t Tenant,
    access: Access,
    startup: &Startup,
    regions: Option<&BTreeSet<String>>,
) -> Result<&'t str, Closed> {
    match tenant.state() {
        State::Active => {}
        State::Suspended => return Err(Closed::Suspended),
        State::Paused => return Err(Closed::Paused),
        State::Deleting => return Err(Closed::Deleting),
    }
    if !tenant.is_at_home() {
        return Err(Closed::Misplaced);
    }
    let placement = tenant.placement();
    match (regions, &placement.cluster.region) {
        (None, _) => {}
        (Some(_), None) => return Err(Closed::NoRegion),
        (Some(served), Some(region)) if !served.contains(region) => {
            return Err(Closed::OtherRegion);
        }
        (Some(_), Some(_)) => {}
    }
    let role = tenant.lease().role(access).ok_or(Closed::NoRole(access))?;
    match startup::excess(&placement.dbname, startup.settings()) {
        None => Ok(role),
        Some(excess) => Err(Closed::SettingsTooLong { excess }),
    }
}

/// A cause has room for a few.
fn listed(tenants: &[TenantId]) -> String {
    const FEW: usize = 5;
    let mut text: Vec<_> = tenants.iter().take(FEW).map(TenantId::as_str).collect();
    if tenants.len() > FEW {
        text.push("...");
    }
    text.join(", ")
}

/// The one of `tenants` that a session is for.
///
/// # Errors
/// When what the client states agrees with none of them, or with more than one.
fn choose<'t>(
    tenants: &'t [TenantId],
    stated: &Stated<'_>,
    allowed: &DatabaseNames,
    registry: &Snapshot,
) -> Result<&'t TenantId, RouteError> {
    let possible = match stated.host {
        None => tenants,
        Some(host) => match tenants.iter().find(|id| id.as_str() == host) {
            Some(id) => std::slice::from_ref(id),
            None => {
                let (named, tenants) = (host.to_owned(), tenants.to_vec());
                return Err(RouteError::HostUnknown { named, tenants });
            }
        },
    };
    let is_an_id = |name: &[u8]| tenants.iter().any(|id| id.as_str().as_bytes() == name);
    let says = |name: &&[u8]| {
        !name.is_empty() && *name != stated.user && (is_an_id(name) || !allowed.contains(name))
    };
    let named = stated.database.filter(says);
    if let Some(id) = possible.iter().find(|id| Some(id.as_str().as_bytes()) == named) {
        return Ok(id);
    }
    let agrees = |id: &&TenantId| named.is_none_or(|name| is_another_name(name, id, registry));
    let mut agreeing = possible.iter().filter(agrees);
    match (agreeing.next(), agreeing.next(), named) {
        (Some(one), None, _) => Ok(one),
        (Some(_), Some(_), _) => {
            let as_user = stated.database == Some(stated.user) && is_an_id(stated.user);
            Err(RouteError::Ambiguous { tenants: tenants.len(), as_user })
        }
        (None, _, Some(name)) => {
            let (named, tenants) = (String::from_utf8_lossy(name).into(), possible.to_vec());
            Err(RouteError::DatabaseUnknown { named, tenants })
        }
        (None, _, None) => Err(RouteError::NoTenant),
    }
}

/// Its database, or a name that the registry lists for it.
fn is_another_name(name: &[u8], id: &TenantId, registry: &Snapshot) -> bool {
    registry.tenant(id).is_some_and(|tenant| {
        let listed = tenant.database_names().iter().map(String::as_str);
        listed.chain([&*tenant.placement().dbname]).any(|own| own.as_bytes() == name)
    })
}

#[cfg(test)]
mod tests;
