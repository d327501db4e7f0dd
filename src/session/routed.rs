//! Routed: exactly one active tenant, its placement, and this identity allowed there.
//!
//! The client's database name never selects a route by itself: it can only agree with the
//! token, or choose among the memberships that the token holds.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::OwnedSemaphorePermit;

use super::client::{Client, Stop};
use super::identified::Identified;
use super::started::Started;
use crate::clock::BootTime;
use crate::lease::Request;
use crate::limits::TallyPermit;
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};
use crate::registry::{Snapshot, State, Tenant};
use crate::secret::Secret;
use crate::tenant::{Access, TenantId};
use crate::token::Claims;

/// Proves that this identity may reach this tenant now, and holds its place there.
#[derive(Debug)]
pub struct Routed<'c> {
    started: Started<'c>,
    tenant: Arc<Tenant>,
    /// OpenBAO's role for the tenant and the access that the claims grant.
    role: String,
    access: Access,
    token: Option<Secret>,
    token_expires: BootTime,
    permits: SessionPermits,
}

/// What is left of a `Routed` when its credential and its connection have been used.
pub(super) struct Admission<'c> {
    pub(super) started: Started<'c>,
    pub(super) tenant: Arc<Tenant>,
    pub(super) token_expires: BootTime,
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
        let snapshot = proxy.registry().snapshot();
        let id = choose(&identified, &snapshot)?;
        identified.client().trail.tenant = id.to_string();
        let tenant = snapshot
            .tenant(&id)
            .ok_or_else(|| Refusal::new(Reason::TenantUnknown, "not in the registry").about(&id))?;
        refuse_unless_served(&tenant, proxy)?;
        let role = role(&tenant, identified.claims())?;
        let permits = take_permits(&id, proxy)?;

        let (mut started, claims, token) = identified.into_parts();
        let access = claims.access();
        let token_expires = expiry(&claims);
        let client = started.client();
        client.trail.placement = tenant.placement().to_string();
        client.trail.role.clone_from(&role);
        client.reached("routed");
        Ok(Routed { started, tenant, access, role, token, token_expires, permits })
    }

    /// The tenant. Whoever can show a `Routed` may dial its placement.
    pub(crate) fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// The session's token, if the lease is asked for with it. It is needed once.
    pub(super) fn take_token(&mut self) -> Option<Secret> {
        self.token.take()
    }

    /// What to ask OpenBAO for.
    pub(super) fn request(&self, token: Option<Secret>) -> Request<'_> {
        let mount = &self.tenant.lease().mount;
        Request { tenant: self.tenant.id(), mount, role: &self.role, access: self.access, token }
    }

    pub(super) fn started(&self) -> &Started<'c> {
        &self.started
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.started.client()
    }

    pub(super) fn into_parts(self) -> Admission<'c> {
        let Routed { started, tenant, token_expires, permits, .. } = self;
        Admission { started, tenant, token_expires, permits }
    }
}

/// The token's end on the clock that authority is measured in: a clock that is set later
/// neither lengthens nor shortens the session.
fn expiry(claims: &Claims) -> BootTime {
    let left = claims.expires_at().duration_since(SystemTime::now()).unwrap_or_default();
    BootTime::now() + left
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

/// Which of the token's tenants is meant.
fn choose(identified: &Identified<'_>, registry: &Snapshot) -> Result<TenantId, Refusal> {
    let startup = identified.started().startup();
    let named = startup.database().and_then(|name| std::str::from_utf8(name).ok());
    let named_id = named.and_then(|name| TenantId::parse(name).ok());
    match (identified.claims().tenants(), named_id) {
        ([], _) => Err(Refusal::new(Reason::TenantUnresolved, "no tenant in the token")),
        // The token pins the tenant. Another name is only a name, as an application may keep
        // the one that it has always used, unless it names another tenant: that is a
        // disagreement, and one of the two is wrong.
        ([only], Some(named)) if *only != named && registry.tenant(&named).is_some() => {
            Err(Refusal::new(Reason::TenantForbidden, "the database named is another tenant's"))
        }
        ([only], _) => Ok(only.clone()),
        (several, Some(named)) if several.contains(&named) => Ok(named),
        (several, named_id) => {
            let defaulted = named.is_none_or(|name| name.as_bytes() == startup.user());
            let cause = format!("the token names {} tenants", several.len());
            match named_id.is_some() && !defaulted {
                true => {
                    Err(Refusal::new(Reason::TenantForbidden, format!("{cause}, not this one")))
                }
                false => {
                    Err(Refusal::new(Reason::TenantUnresolved, format!("{cause}, none chosen"))
                        .hint("Name the tenant as the database."))
                }
            }
        }
    }
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

fn role(tenant: &Tenant, claims: &Claims) -> Result<String, Refusal> {
    let access = claims.access();
    tenant.lease().role(access).map(str::to_owned).ok_or_else(|| {
        let cause = format!("the registry has no role for {access} access");
        Refusal::new(Reason::TenantForbidden, cause)
    })
}

fn take_permits(id: &TenantId, proxy: &'static Proxy) -> Result<SessionPermits, Refusal> {
    let all = Arc::clone(&proxy.sessions).try_acquire_owned().map_err(|_full| {
        Refusal::new(Reason::TooManyConnections, "[limits] max_sessions is reached")
    })?;
    let tenant = proxy.tenants.count(id).ok_or_else(|| {
        Refusal::new(Reason::TooManyConnections, "[limits] max_sessions_per_tenant is reached")
            .about(format_args!(" for tenant \"{id}\""))
    })?;
    Ok(SessionPermits { _all: all, _tenant: tenant })
}
