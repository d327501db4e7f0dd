//! Routed: exactly one active tenant, its placement, and this identity allowed there.
//!
//! The client's database name never selects a route by itself: it can only agree with the
//! token, or choose among the memberships that the token holds (`route.rs`). Only here is the place
//! among its listener's handshakes the client's own: how many a tenant has is bounded from here on.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use pgsilo_core::registry::{Snapshot, State, Tenant};
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_wire::startup::{self, Startup};
use tokio::sync::OwnedSemaphorePermit;

use super::client::{Client, Stop};
use super::identified::Identified;
use super::started::Started;
use crate::audit::Stage;
use crate::identity::Identity;
use crate::lease::Request;
use crate::limits::TallyPermit;
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};
use crate::route::{self, Stated};

/// Proves that this identity may reach this tenant now, and holds its place there.
#[derive(Debug)]
pub struct Routed<'c> {
    started: Started<'c>,
    route: Arc<Route>,
    identity: Box<Identity>,
    token: Option<Secret>,
    permits: SessionPermits,
}

/// A setting's name and value.
type Setting = (Box<[u8]>, Box<[u8]>);

/// Where a routed session leads, whoever it is of: what a connection to a database is made for, all
/// of it. Connections of equal routes cannot be told apart.
#[derive(Debug)]
pub struct Route {
    tenant: Arc<Tenant>,
    /// OpenBAO's role for the tenant and the access that the claims grant.
    role: String,
    access: Access,
    /// A hash of the very token, where the lease is asked for with it: OpenBAO might have refused
    /// another.
    token: Option<[u8; 32]>,
    /// Names and values, as the client sent them.
    settings: Vec<Setting>,
}

impl Route {
    /// The tenant. Whoever can show a route may dial its placement.
    pub(crate) fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// How much a session may do there.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// What the database is to be told at the start.
    pub(crate) fn settings(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.settings.iter().map(|(name, value)| (&**name, &**value))
    }

    /// What to ask OpenBAO for, for nobody in particular.
    pub(crate) fn request(&self) -> Request<'_> {
        let (tenant, mount) = (self.tenant.id(), &self.tenant.lease().mount);
        let (role, access) = (&*self.role, self.access);
        Request { tenant, mount, role, access, session: None, subject: None, token: None }
    }
}

/// Of a tenant as the registry has it: after a reload that says something else of it, it is another.
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

/// What is left of a `Routed` when its credential and its connection have been used.
pub(super) struct Admission<'c> {
    pub(super) started: Started<'c>,
    pub(super) route: Arc<Route>,
    pub(super) identity: Box<Identity>,
    pub(super) permits: SessionPermits,
}

/// A session's place among all sessions and among its tenant's.
#[derive(Debug)]
pub(super) struct SessionPermits {
    _all: OwnedSemaphorePermit,
    _tenant: TallyPermit<TenantId>,
}

impl<'c> Routed<'c> {
    /// Resolves the one tenant, or refuses.
    pub(super) fn route(mut identified: Identified<'c>) -> Result<Routed<'c>, Stop> {
        let proxy = identified.client().proxy;
        refuse_if_stale(proxy)?;
        if !proxy.is_audited() {
            let cause = "audit events are not written in time, and [audit] on_loss is \"refuse\"";
            return Err(Refusal::new(Reason::AuditUnavailable, cause).into());
        }
        if identified.identity().is_denied(proxy.config.denied.as_ref()) {
            let cause = "the identity is on the list of those denied";
            return Err(Refusal::new(Reason::IdentityRevoked, cause).into());
        }
        let snapshot = proxy.registry().snapshot();
        let (id, access) = resolve(&mut identified, &snapshot)?;
        identified.client().trail.access = access.as_str();
        identified.client().trail.tenant = Some(id.clone());
        let tenant = snapshot
            .tenant(&id)
            .ok_or_else(|| Refusal::new(Reason::TenantUnknown, "not in the registry").about(&id))?;
        refuse_unless_served(&tenant, proxy)?;
        let role = role(&tenant, access)?;
        refuse_unless_it_fits(identified.started().startup(), &tenant)?;
        let permits = take_permits(&tenant, proxy)?;
        identified.client().prove();

        let (mut started, identity, token) = identified.into_parts();
        let settings = started.startup().settings();
        let settings = settings.map(|(name, value)| (name.into(), value.into())).collect();
        let client = started.client();
        client.trail.placement = Arc::clone(tenant.place());
        client.trail.role = role.as_str().into();
        client.reached(Stage::Routed);
        let shown = token.as_ref().map(Secret::sha256);
        let route = Arc::new(Route { tenant, role, access, token: shown, settings });
        Ok(Routed { started, route, identity, token, permits })
    }

    /// Where it leads.
    pub(super) fn resolved(&self) -> &Arc<Route> {
        &self.route
    }

    /// What to ask OpenBAO for, for this session. Its token is needed once.
    pub(super) fn request(&mut self) -> Request<'_> {
        let session = Some(self.started.client().trail.session);
        let (subject, token) = (Some(self.identity.subject()), self.token.take());
        Request { session, subject, token, ..self.route.request() }
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.started.client()
    }

    pub(super) fn into_parts(self) -> Admission<'c> {
        let Routed { started, route, identity, permits, .. } = self;
        Admission { started, route, identity, permits }
    }
}

fn refuse_if_stale(proxy: &Proxy) -> Result<(), Refusal> {
    let (Some(max), Some(stale)) = (proxy.config.max_staleness, proxy.registry().stale_for())
    else {
        return Ok(());
    };
    if stale <= max {
        return Ok(());
    }
    let cause = format!("the registry could not be reloaded for {} s", stale.as_secs());
    Err(Refusal::new(Reason::RegistryStale, cause))
}

/// Which tenant it is for, and how much it may do there.
fn resolve(
    identified: &mut Identified<'_>,
    registry: &Snapshot,
) -> Result<(TenantId, Access), Refusal> {
    let listener = identified.client().listener;
    let host = named_by_host(identified.client());
    let startup = identified.started().startup();
    let stated =
        Stated { database: startup.database(), user: startup.user(), host: host.as_deref() };
    let choose = |tenants: &[TenantId]| -> Result<TenantId, Refusal> {
        Ok(route::choose(tenants, &stated, &listener.database_names, registry)?.clone())
    };
    match identified.identity() {
        Identity::Token(claims) => {
            let tenants = claims.tenants(|word| registry.named(word))?;
            Ok((choose(&tenants)?, claims.access()))
        }
        Identity::Certificate(holder) => {
            let binding = registry.binding(holder.name()).ok_or_else(|| {
                let cause = format!("the registry binds {:?} to no tenant", holder.name());
                Refusal::new(Reason::CertificateUnbound, cause)
            })?;
            Ok((choose(std::slice::from_ref(&binding.tenant))?, binding.access))
        }
    }
}

/// What the client's host names where the listener has a suffix for that: a tenant's id, if it is
/// one. Any other host names nobody.
fn named_by_host(client: &Client) -> Option<String> {
    let suffix = client.listener.sni_suffix.as_ref()?;
    client.frontend.server_name()?.strip_suffix(suffix.as_str()).map(str::to_owned)
}

fn refuse_unless_served(tenant: &Tenant, proxy: &Proxy) -> Result<(), Refusal> {
    let no = |reason, cause: &str| Err(Refusal::new(reason, cause).about(tenant.id()));
    match tenant.state() {
        State::Active => {}
        State::Suspended => return no(Reason::TenantSuspended, "suspended in the registry"),
        State::Paused => return no(Reason::TenantPaused, "paused in the registry"),
    }
    let Some(regions) = &proxy.config.regions else {
        return Ok(());
    };
    match &tenant.placement().region {
        Some(region) if regions.contains(region) => Ok(()),
        Some(_other) => no(Reason::ResidencyRefused, "the placement's region is not served here"),
        None => no(Reason::ResidencyRefused, "the placement says no region"),
    }
}

/// What a database takes no more than is known before a lease is spent on it.
fn refuse_unless_it_fits(startup: &Startup, tenant: &Tenant) -> Result<(), Refusal> {
    let Some(excess) = startup::excess(&tenant.placement().dbname, startup.settings()) else {
        return Ok(());
    };
    let about = format!("startup settings are too long by {excess} bytes");
    Err(Refusal::new(Reason::SettingRejected, &about).about(&about))
}

fn role(tenant: &Tenant, access: Access) -> Result<String, Refusal> {
    tenant.lease().role(access).map(str::to_owned).ok_or_else(|| {
        let cause = format!("the registry has no role for {access} access");
        Refusal::new(Reason::TenantForbidden, cause)
    })
}

fn take_permits(tenant: &Tenant, proxy: &'static Proxy) -> Result<SessionPermits, Refusal> {
    let id = tenant.id();
    let all = Arc::clone(&proxy.sessions).try_acquire_owned().map_err(|_full| {
        Refusal::new(Reason::TooManyConnections, "[limits] max_sessions is reached")
    })?;
    let bound = tenant.limits().max_sessions(proxy.limits().max_sessions_per_tenant);
    let tenant = proxy.tenants.count_within(id, bound).ok_or_else(|| {
        Refusal::new(Reason::TooManyConnections, "the tenant's bound of sessions is reached")
            .about(format_args!(" for tenant \"{id}\""))
    })?;
    Ok(SessionPermits { _all: all, _tenant: tenant })
}
