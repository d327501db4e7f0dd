//! Routed: exactly one active tenant, its placement, and this identity allowed there.
//!
//! The client's database name never selects a route by itself: it can only agree with the
//! token, or choose among the memberships that the token holds (`route.rs`). Only here is the place
//! among its listener's handshakes the client's own: how many a tenant has is bounded from here on.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgsilo_core::registry::Tenant;

use tokio::time::{Instant, sleep_until};

use super::client::{Client, Stop};
use super::identified::Identified;
use super::started::Started;
use crate::audit::{self, Stage};
use crate::identity::Identity;
use crate::lease::{Authorization, Request};
use crate::limits::Rate;
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};
use crate::registry::Lockable;
use crate::route::{Route, RouteError, Rules};
use crate::sessions::{Full, SessionPermit};

/// Proves that this identity may reach this tenant now, and holds its place there.
#[derive(Debug)]
pub(super) struct Routed<'c> {
    started: Started<'c>,
    route: Arc<Route>,
    identity: Box<Identity>,
    authorization: Authorization,
    permit: SessionPermit,
}

/// What is left of a `Routed` once it has a lease: nothing to ask for another with.
#[derive(Debug)]
pub(super) struct Admission<'c> {
    pub(super) started: Started<'c>,
    pub(super) route: Arc<Route>,
    pub(super) identity: Box<Identity>,
    pub(super) permit: SessionPermit,
}

impl<'c> Routed<'c> {
    /// Resolves the one tenant, or refuses.
    pub(super) async fn route(mut identified: Identified<'c>) -> Result<Routed<'c>, Stop> {
        let proxy = identified.client().proxy;
        if let Some(stale) = proxy.too_stale() {
            let cause = format!("the registry could not be reloaded for {} s", stale.as_secs());
            return Err(Refusal::new(Reason::RegistryStale, cause).into());
        }
        if !proxy.is_audited() {
            let cause = "audit events are not written in time, and [audit] on_loss is \"refuse\"";
            return Err(Refusal::new(Reason::AuditUnavailable, cause).into());
        }
        if identified.identity().is_denied(proxy.sources.denied.as_ref()) {
            let cause = "the identity is on the list of those denied";
            return Err(Refusal::new(Reason::IdentityRevoked, cause).into());
        }
        let route = Arc::new(resolve(&mut identified).map_err(Refusal::from)?);
        let tenant = route.tenant();
        check_locks(&mut identified, tenant)?;
        check_grant(&mut identified, &route)?;
        let pace = pace_of(tenant, proxy);
        let permit = match take_permit(tenant, proxy) {
            Ok(permit) => permit,
            Err(refusal) => return Err(told_in_turn(refusal, tenant, pace, proxy).await.into()),
        };
        let Some(turn) = turn(tenant, pace, proxy) else {
            drop(permit);
            let cause = "the tenant's sessions begin more often than they may";
            let refusal = Refusal::new(Reason::TooManyConnections, cause)
                .about(format_args!(" for tenant \"{}\"", tenant.id()));
            return Err(told_in_turn(refusal, tenant, pace, proxy).await.into());
        };
        // Not before: who waits to be refused keeps no place from others.
        identified.client().prove();
        sleep_until(turn).await;

        let (mut started, identity, authorization) = identified.into_parts();
        let client = started.client();
        client.trail.placement = Arc::clone(tenant.placement_text());
        client.trail.role = route.role().into();
        client.reached(Stage::Routed);
        Ok(Routed { started, route, identity, authorization, permit })
    }

    /// Where it leads.
    pub(super) fn resolved(&self) -> &Arc<Route> {
        &self.route
    }

    /// What to ask OpenBAO for, for this session.
    pub(super) fn request(&mut self) -> Request<'_> {
        let session = Some(self.started.client().trail.session);
        let subject = Some(self.identity.subject());
        Request { session, subject, ..self.route.request(self.authorization.clone()) }
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.started.client()
    }

    pub(super) fn into_parts(self) -> Admission<'c> {
        let Routed { started, route, mut identity, permit, .. } = self;
        identity.settle_on(route.tenant().id());
        Admission { started, route, identity, permit }
    }
}

/// Where its issuer's word is not enough, the registry's is asked as well. An event says which grant
/// it was.
fn check_grant(identified: &mut Identified<'_>, route: &Route) -> Result<(), Refusal> {
    let (proxy, tenant) = (identified.client().proxy, route.tenant().id());
    match proxy.grant(identified.identity(), tenant, route.access()) {
        None => Ok(()),
        Some(Some(grant)) => {
            audit::granted(&identified.client().trail, grant.id(), grant.is_break_glass());
            Ok(())
        }
        Some(None) => {
            let cause = format!("the registry has no grant of {} access", route.access());
            Err(Refusal::new(Reason::GrantMissing, cause).about(tenant))
        }
    }
}

/// Nobody is let in past a lock.
fn check_locks(identified: &mut Identified<'_>, tenant: &Tenant) -> Result<(), Refusal> {
    let (address, proxy) = (identified.client().trail.ip(), identified.client().proxy);
    let credential = identified.identity().credential();
    let session = Lockable { tenant: tenant.id(), credential, address };
    match proxy.registry().locks().on(session, SystemTime::now()) {
        None => Ok(()),
        Some(lock) => {
            let about = lock.message().map(|message| format!(": {message}"));
            let cause = format!("the registry's lock {}", lock.id());
            Err(Refusal::new(Reason::AccessLocked, cause).about(about.unwrap_or_default()))
        }
    }
}

/// Decides, and writes down for whom, be that one reached or not.
fn resolve(identified: &mut Identified<'_>) -> Result<Route, RouteError> {
    let client = identified.client();
    let (proxy, listener, host) = (client.proxy, client.listener, named_by_host(client));
    let regions = proxy.settings.regions.as_ref();
    let rules = Rules { allowed: &listener.database_names, regions };
    let startup = identified.started().startup();
    let token = identified.authorization().token();
    let registry = proxy.registry().snapshot();
    let route =
        Route::resolve(identified.identity(), startup, host.as_deref(), &registry, rules, token);
    let chosen = match &route {
        Ok(route) => Some((route.tenant().id(), route.access())),
        Err(RouteError::Closed { tenant, access, .. }) => Some((tenant, *access)),
        Err(_) => None,
    };
    if let Some((tenant, access)) = chosen {
        let trail = &mut identified.client().trail;
        (trail.tenant, trail.access) = (Some(tenant.clone()), access.as_str());
    }
    route
}

/// What the client's host names where the listener has a suffix for that: a tenant's id, if it is
/// one. Any other host is unknown.
fn named_by_host(client: &Client) -> Option<String> {
    let suffix = client.listener.sni_suffix.as_ref()?;
    client.frontend.server_name()?.strip_suffix(suffix.as_str()).map(str::to_owned)
}

fn take_permit(tenant: &Tenant, proxy: &'static Proxy) -> Result<SessionPermit, Refusal> {
    let id = tenant.id();
    let bound = tenant.limits().max_sessions(proxy.limits().max_sessions_per_tenant);
    let cluster = &tenant.placement().cluster;
    proxy.sessions.admit(id, bound, cluster).map_err(|full| match full {
        Full::All => Refusal::new(Reason::TooManyConnections, "[limits] max_sessions is reached"),
        Full::Cluster => {
            let cause = format!("max_sessions of cluster {} is reached", cluster.key());
            Refusal::new(Reason::TooManyConnections, cause)
        }
        Full::Tenant => {
            Refusal::new(Reason::TooManyConnections, "the tenant's bound of sessions is reached")
                .about(format_args!(" for tenant \"{id}\""))
        }
    })
}

/// How often sessions of a tenant may begin, if that is bounded: as many at once as it may have, and
/// then so many a second. Each is a credential, a process and a proof, for which its neighbours'
/// processors work.
fn pace_of(tenant: &Tenant, proxy: &'static Proxy) -> Option<Rate> {
    let limits = proxy.limits();
    let a_second = tenant.limits().max_session_rate(limits.max_session_rate_per_tenant)?;
    let at_once = tenant.limits().max_sessions(limits.max_sessions_per_tenant);
    let burst = at_once.and_then(|at_once| u32::try_from(at_once).ok()).unwrap_or(a_second);
    Some(Rate { a_second, burst: burst.max(1) })
}

/// When the session may begin; `None`: not in the time that it has.
fn turn(tenant: &Tenant, pace: Option<Rate>, proxy: &'static Proxy) -> Option<Instant> {
    match pace {
        None => Some(Instant::now()),
        Some(rate) => proxy.sessions.turn(tenant.id(), rate, patience(proxy)),
    }
}

/// A refusal, when it may be told.
async fn told_in_turn(
    refusal: Refusal,
    tenant: &Tenant,
    pace: Option<Rate>,
    proxy: &'static Proxy,
) -> Refusal {
    if let Some(rate) = pace {
        sleep_until(proxy.sessions.refusal(tenant.id(), rate, patience(proxy))).await;
    }
    refusal
}

/// How long a turn is waited for: what follows needs time, too.
fn patience(proxy: &'static Proxy) -> Duration {
    proxy.limits().login_timeout / 2
}
