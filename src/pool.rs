//! The pool of idle connections to databases: logged in, and used by no session.
//!
//! A login costs a lease, a process and a SCRAM exchange, and the client waits for them. So the
//! pool opens the next connection of a route that sessions ask for before the next session arrives
//! (*prewarm*): with a lease of its own, by the same dial and the same login, its seal checked,
//! never used. It belongs to no event loop until a session takes it.
//!
//! With `[pool] reuse = "reset"` the pool keeps connections that sessions have left instead
//! (*reuse*): reset, checked, and with the lease that they were opened with.
//!
//! # Who may take one
//!
//! A session is identified and routed before it may take a connection, and takes only one of an
//! equal [`Route`]: the same tenant at the same place, the same access, the same settings byte for
//! byte. Under session authority a lease is requested with the client's own token. So there is no
//! prewarm, as there is no token before a client has come, and a connection is reused only by
//! sessions that show the very token that it was leased with.
//!
//! The seal is read again when a connection is taken, which also shows that it still works; what a
//! reload of PostgreSQL's settings has changed meanwhile becomes part of the greeting. A connection
//! whose seal was read within `check_delay` and that has been silent since then is taken as it is:
//! nothing has used it meanwhile, and a close by the database would show. What ALTER ROLE or ALTER
//! DATABASE has changed since the login is not in force. The login is at most `idle_timeout` old,
//! with reuse at most `max_lifetime`.
//!
//! # How many there are
//!
//! Prewarm follows how often sessions come: no connection for a route that is asked for less often
//! than every `idle_timeout`, else one, and as many more as sessions come while two are opened.
//! Bounds in all and for each tenant hold for both kinds. A connection leaves the pool, and its
//! lease is revoked, when
//!
//! - it has been idle for `idle_timeout`, or is older than `max_lifetime` with reuse, or its lease
//!   nears its end: an idle connection's lease is not renewed;
//! - the registry changes its tenant;
//! - another server of its cluster is promoted;
//! - a bound is reached and another route needs the place: prewarm evicts a connection that has
//!   been idle for more than twice the time between sessions of its route, reuse the one of another
//!   route that has been idle for longest;
//! - its database has no connection left for a session (`pool/full.rs`): the tenant's own are
//!   evicted first, then, where all of the server is full, those of other tenants on it. For
//!   `idle_timeout` none is prewarmed there.
//!
//! # Reuse
//!
//! The relay keeps a client's Terminate from the database if everything is answered, the session is
//! outside a transaction, and nothing follows (`splice.rs`). Any other end closes the connection.
//! The session's cancel key is withdrawn first. If a cancel request is using the key at that
//! moment, the connection is closed as well: that request would hit the next session (`cancel.rs`).
//! Then the connection is reset (`backend/reset.rs`). Its lease stays with it, until `max_lifetime`
//! or its own end.

mod full;
mod state;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgsilo_core::registry::{Snapshot, Tenant};
use pgsilo_core::tenant::TenantId;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use crate::backend::{self, Attachment, BackendError, DialError, History, IdleBackend};
use crate::clusters::{Clusters, Reign};
use crate::lease::{Authorization, FullScope, Lease, LeaseEnd, LeaseError, Lessor};
use crate::limits::{Tally, TallyPermit};
use crate::metrics::{self, Outcome, PoolClose, PoolRequest};
use crate::registry::Registry;
use crate::route::Route;
use full::FullDatabases;
use state::{IdleConnection, LimitReached, PoolPermits, PoolState, RoutePool};

/// How long the check of an idle connection may take before a new one is opened instead.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a prewarm may take.
const PREWARM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a database may take to close its end after a Terminate.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long there is no prewarm for a route after its database has ended an idle connection of it,
/// as `idle_session_timeout` does: it would end the next one, too.
const IDLE_ENDED_BACKOFF: Duration = Duration::from_secs(15 * 60);
/// A connection that would expire sooner is not kept.
const MIN_IDLE_TIME: Duration = Duration::from_millis(500);
/// Concurrent prewarms.
const MAX_PREWARMS: usize = 8;
/// Concurrent prewarms of one tenant: its database may hang.
const MAX_PREWARMS_PER_TENANT: usize = 2;

/// The limits on idle connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
    /// Idle connections in total; 0: no pool.
    pub max_idle: usize,
    /// Idle connections of one tenant.
    pub max_idle_per_tenant: usize,
    /// How long a connection may be idle. A route that sessions ask for less often is not
    /// prewarmed.
    pub idle_timeout: Duration,
    /// How long after its seal was last read a connection is taken without reading it again.
    pub check_delay: Duration,
    /// How old a connection may become that is kept for reuse; `None`: no reuse.
    pub reuse: Option<Duration>,
}

/// All idle connections, and the demand for them.
#[derive(Debug)]
pub(crate) struct Pool {
    settings: &'static PoolSettings,
    lessor: Lessor,
    clusters: Arc<Clusters>,
    dead_peer_timeout: Duration,
    runtime: Handle,
    idle_total: Arc<Semaphore>,
    idle_by_tenant: Tally<TenantId>,
    prewarms: Semaphore,
    prewarms_by_tenant: Tally<TenantId>,
    state: Mutex<PoolState>,
    full_databases: Mutex<FullDatabases>,
    /// A connection expires before the sweep that is being waited for.
    sweep_rescheduled: Notify,
    /// Connections that are being opened or closed.
    tasks: TaskTracker,
}

/// Why a prewarm failed. No session is refused for it.
#[derive(Debug, thiserror::Error)]
enum PrewarmError {
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Login(#[from] BackendError),
    #[error("cannot leave the event loop: {0}")]
    Detach(#[from] io::Error),
    #[error("not done within {PREWARM_TIMEOUT:?}")]
    Timeout,
}

/// A database's connection slot that an evicted connection has freed. Dropping this revokes the
/// evicted connection's lease, which may take a slot as well.
#[derive(Debug)]
pub(crate) struct FreedSlot {
    _lease: Lease,
}

/// A prewarm under way. It counts as connecting until this is dropped.
struct Prewarm {
    pool: &'static Pool,
    route: Arc<Route>,
    authorization: Authorization,
    _of_tenant: TallyPermit<TenantId>,
}

impl Drop for Prewarm {
    fn drop(&mut self) {
        if let Some(route_pool) = self.pool.state().get(&self.route) {
            route_pool.connecting = route_pool.connecting.saturating_sub(1);
        }
    }
}

impl Pool {
    pub(crate) fn new(
        settings: &'static PoolSettings,
        dead_peer_timeout: Duration,
        lessor: Lessor,
        clusters: Arc<Clusters>,
        runtime: Handle,
    ) -> Pool {
        Pool {
            settings,
            dead_peer_timeout,
            lessor,
            clusters,
            runtime,
            idle_total: Arc::new(Semaphore::new(settings.max_idle)),
            idle_by_tenant: Tally::new(Some(settings.max_idle_per_tenant)),
            prewarms: Semaphore::new(MAX_PREWARMS),
            prewarms_by_tenant: Tally::new(Some(MAX_PREWARMS_PER_TENANT)),
            state: Mutex::default(),
            full_databases: Mutex::default(),
            sweep_rescheduled: Notify::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// As whom to lease for connections that are opened before a session asks for them. `None`: none
    /// are opened. Not under session authority, where a lease is requested with the session's token;
    /// nor where connections are reused.
    fn prewarms(&self) -> Option<Authorization> {
        let may = self.settings.max_idle > 0 && !self.reuses();
        self.lessor.own_authorization().filter(|_| may)
    }

    /// Whether connections that a session has left are kept for another.
    pub(crate) fn reuses(&self) -> bool {
        self.settings.max_idle > 0 && self.settings.reuse.is_some()
    }

    /// An idle connection of an equal route that passes its check, if there is one.
    pub(crate) async fn take(&'static self, route: &Arc<Route>) -> Option<(Lease, Attachment)> {
        if self.prewarms().is_none() && !self.reuses() {
            return None;
        }
        while let Some(connection) = self.take_newest(route) {
            if connection.backend.is_overtaken() {
                self.close_idle(connection, PoolClose::FailedOver);
                continue;
            }
            if remaining_time(&connection.lease.poll_renewal().0).is_zero() {
                self.close_idle(connection, PoolClose::Expired);
                continue;
            }
            let IdleConnection { backend, lease, .. } = connection;
            match timeout(CHECK_TIMEOUT, backend.resume(route, self.settings.check_delay)).await {
                Ok(Ok(attachment)) => {
                    metrics::POOL_REQUESTS.of(PoolRequest::Hit).increment(1);
                    return Some((lease, attachment));
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "an idle connection failed its check");
                    if error.ended_for_idling()
                        && let Some(route_pool) = self.state().get(route)
                    {
                        route_pool.prewarm_after = Some(Instant::now() + IDLE_ENDED_BACKOFF);
                    }
                }
                Err(_elapsed) => {
                    tracing::debug!("an idle connection does not answer");
                    // Nor would the others of this database: they are not tried one after the
                    // other.
                    let others = self.state().drain_route(route);
                    others.iter().for_each(|_| count_closed(PoolClose::CheckFailed));
                }
            }
            count_closed(PoolClose::CheckFailed);
        }
        metrics::POOL_REQUESTS.of(PoolRequest::Miss).increment(1);
        None
    }

    /// On its own, so that the lock is not held while the connection is checked.
    fn take_newest(&self, route: &Route) -> Option<IdleConnection> {
        self.state().take_newest(route, Instant::now())
    }

    /// The number of idle connections.
    pub(crate) fn idle_count(&self) -> usize {
        self.state().idle_count()
    }

    /// Records that a session of this route is served, and opens connections for the next ones if
    /// more are likely to arrive before `idle_timeout`.
    pub(crate) fn prewarm(&'static self, route: &Arc<Route>, registry: &Registry) {
        let Some(authorization) = self.prewarms() else { return };
        let now = Instant::now();
        let idle_timeout = self.settings.idle_timeout;
        let is_full = self.full_databases().was_full_within(route.tenant(), now, idle_timeout);
        let count = {
            let mut state = self.state();
            match is_current(&registry.snapshot(), route) {
                true => state.prewarm_count(route, now, idle_timeout, is_full),
                false => 0,
            }
        };
        for _ in 0..count {
            if !self.start_prewarm(route, &authorization, now) {
                return;
            }
        }
    }

    /// Starts to open one connection, if the limits allow it or a stale connection can be evicted.
    fn start_prewarm(
        &'static self,
        route: &Arc<Route>,
        authorization: &Authorization,
        now: Instant,
    ) -> bool {
        let tenant = route.tenant().id();
        let Some(of_tenant) = self.prewarms_by_tenant.count(tenant) else { return false };
        let permits = self.permits_or_evict(tenant, |state, limit| state.evict_stale(now, limit));
        let Some(permits) = permits else { return false };
        let mut state = self.state();
        let Some(route_pool) = state.get(route) else { return false };
        route_pool.connecting += 1;
        drop(state);
        let (route, authorization) = (Arc::clone(route), authorization.clone());
        let prewarm = Prewarm { pool: self, route, authorization, _of_tenant: of_tenant };
        self.tasks.spawn_on(self.run_prewarm(prewarm, permits), &self.runtime);
        true
    }

    /// Permits for one more idle connection; if a limit is reached, those of a connection that
    /// `evict` removes.
    fn permits_or_evict(
        &'static self,
        tenant: &TenantId,
        evict: impl FnOnce(&mut PoolState, LimitReached<'_>) -> Option<IdleConnection>,
    ) -> Option<PoolPermits> {
        match self.permits(tenant) {
            Ok(permits) => Some(permits),
            Err(limit) => {
                let evicted = evict(&mut self.state(), limit)?;
                self.close_idle(evicted, PoolClose::Evicted);
                self.permits(tenant).ok()
            }
        }
    }

    fn permits<'t>(&'static self, tenant: &'t TenantId) -> Result<PoolPermits, LimitReached<'t>> {
        let own = self.idle_by_tenant.count(tenant).ok_or(LimitReached::Tenant(tenant))?;
        let total = Arc::clone(&self.idle_total).try_acquire_owned();
        Ok(PoolPermits::new(total.map_err(|_none_left| LimitReached::Total)?, own))
    }

    async fn run_prewarm(&'static self, prewarm: Prewarm, permits: PoolPermits) {
        let Ok(_permit) = self.prewarms.acquire().await else { return };
        let route = &prewarm.route;
        if self.state().get(route).is_none() {
            // A reload or a stop has removed it meanwhile.
            return;
        }
        let started = Instant::now();
        let opened = match timeout(PREWARM_TIMEOUT, self.open(&prewarm)).await {
            Ok(opened) => opened,
            Err(_elapsed) => Err(PrewarmError::Timeout),
        };
        let (lease, backend) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                metrics::POOL_PREWARMS.of(Outcome::Error).increment(1);
                tracing::debug!(%error, tenant = %route.tenant().id(), "prewarm failed");
                let (now, idle_timeout) = (Instant::now(), self.settings.idle_timeout);
                if let Some(scope) = error.full_scope() {
                    self.record_full(route.tenant(), scope);
                }
                return self.state().record_failure(route.tenant().id(), now + idle_timeout);
            }
        };
        metrics::POOL_PREWARMS.of(Outcome::Ok).increment(1);
        let (role, pid) = (Arc::clone(lease.credential().name()), backend.pid());
        let now = Instant::now();
        let expires_at =
            now + self.settings.idle_timeout.min(remaining_time(&lease.poll_renewal().0));
        let connection = IdleConnection { backend, lease, idle_since: now, expires_at, permits };
        let is_added = self.add(connection, |state| {
            state.record_connect_time(now - started);
            let is_closed = state.is_closed();
            state.get(route).ok_or(match is_closed {
                true => PoolClose::Shutdown,
                false => PoolClose::TenantChanged,
            })
        });
        if is_added {
            tracing::debug!(tenant = %route.tenant().id(), role = &*role, pid, "connection prewarmed");
        }
    }

    /// Adds an idle connection to the pool of its route; if that cannot have it, closes it.
    fn add(
        &'static self,
        connection: IdleConnection,
        route_pool: impl FnOnce(&mut PoolState) -> Result<&mut RoutePool, PoolClose>,
    ) -> bool {
        let expires_at = connection.expires_at;
        let mut state = self.state();
        match route_pool(&mut state) {
            Ok(route_pool) => route_pool.idle.push(connection),
            Err(reason) => {
                drop(state);
                self.close_idle(connection, reason);
                return false;
            }
        }
        if state.schedule_sweep(expires_at) {
            self.sweep_rescheduled.notify_one();
        }
        true
    }

    /// Opens a connection as a session does: the lease and the dial concurrently, then the login.
    async fn open(&self, prewarm: &Prewarm) -> Result<(Lease, IdleBackend), PrewarmError> {
        let route = &prewarm.route;
        let request = route.request(prewarm.authorization.clone());
        let lease = async { Ok::<_, PrewarmError>(self.lessor.lease(request).await?) };
        let dial =
            async { Ok(backend::dial(route, &self.clusters, self.dead_peer_timeout).await?) };
        let (lease, connection) = tokio::try_join!(lease, dial)?;
        let attachment = connection.log_in(lease.credential()).await?;
        Ok((lease, attachment.detach()?))
    }

    /// Whether a session may ask for a connection of its own: not if its database has just reported
    /// that it has none left, no idle one here could be evicted for it, and another session of its
    /// tenant has just tried.
    pub(crate) fn may_connect(&self, tenant: &Tenant) -> bool {
        let allowed = self.full_databases().may_connect(tenant, Instant::now());
        allowed.map_or_else(|scope| self.state().has_idle_at_backend(tenant, scope), |()| true)
    }

    /// Records that a session was given a connection of its own, in a slot that was free or that an
    /// eviction had freed.
    pub(crate) fn record_connect(&self, tenant: &Tenant, after_eviction: bool) {
        match after_eviction {
            true => self.full_databases().record_free_slot(tenant),
            false => self.full_databases().clear(tenant),
        }
    }

    /// Records that a session of the tenant has ended.
    pub(crate) fn record_session_end(&self, tenant: &Tenant) {
        self.full_databases().record_free_slot(tenant);
    }

    /// Records that a database has no connection left. There is no prewarm for a while.
    pub(crate) fn record_full(&self, tenant: &Tenant, scope: FullScope) {
        let idle_timeout = self.settings.idle_timeout;
        self.full_databases().record_full(tenant, scope, Instant::now(), idle_timeout);
    }

    /// Evicts an idle connection at a full database, the tenant's own before another tenant's on
    /// the same server, and returns when the database has closed it; `None`: there was none to
    /// evict.
    pub(crate) async fn free_slot(
        &'static self,
        tenant: &Tenant,
        scope: FullScope,
    ) -> Option<FreedSlot> {
        let evicted = self.state().evict_at_backend(tenant, scope)?;
        count_closed(PoolClose::BackendFull);
        Some(FreedSlot { _lease: terminate(evicted).await })
    }

    fn full_databases(&self) -> MutexGuard<'_, FullDatabases> {
        self.full_databases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resets a connection that a session has left and keeps it for reuse, if the limits allow that
    /// and it has time left. Otherwise closes it and revokes its lease.
    pub(crate) async fn release(
        &'static self,
        route: &Arc<Route>,
        lease: Lease,
        used: Attachment,
        registry: &Registry,
    ) {
        let Some(max_lifetime) = self.settings.reuse else { return };
        if used.reign.as_ref().is_some_and(Reign::is_over) {
            return;
        }
        let max_idle_time = |history: History| {
            let left = max_lifetime.saturating_sub(history.opened.elapsed());
            self.settings.idle_timeout.min(left).min(remaining_time(&lease.poll_renewal().0))
        };
        // Before it is reset, and before another is evicted for it.
        let idle_time = max_idle_time(used.history);
        if self.reuse_pool(route, &mut self.state(), idle_time, registry).is_err() {
            return;
        }
        let tenant = route.tenant().id();
        let permits = self.permits_or_evict(tenant, |state, limit| state.evict_other(route, limit));
        let Some(permits) = permits else { return };
        let attachment = match used.reset(route).await {
            Ok(attachment) => attachment,
            Err(error) => {
                metrics::POOL_RESETS.of(Outcome::Error).increment(1);
                tracing::debug!(%error, %tenant, "a connection cannot be reused");
                return;
            }
        };
        let idle_time = max_idle_time(attachment.history);
        let backend = match attachment.detach() {
            Ok(backend) => backend,
            Err(error) => {
                metrics::POOL_RESETS.of(Outcome::Error).increment(1);
                return tracing::warn!(%error, "a connection cannot leave its event loop");
            }
        };
        metrics::POOL_RESETS.of(Outcome::Ok).increment(1);
        let now = Instant::now();
        let expires_at = now + idle_time;
        let connection = IdleConnection { backend, lease, idle_since: now, expires_at, permits };
        self.add(connection, |state| self.reuse_pool(route, state, idle_time, registry));
    }

    /// The pool for a connection that a session has left.
    ///
    /// # Errors
    /// Why it must be closed.
    fn reuse_pool<'s>(
        &self,
        route: &Arc<Route>,
        state: &'s mut PoolState,
        idle_time: Duration,
        registry: &Registry,
    ) -> Result<&'s mut RoutePool, PoolClose> {
        if idle_time < MIN_IDLE_TIME {
            return Err(PoolClose::Expired);
        }
        if !is_current(&registry.snapshot(), route) {
            return Err(PoolClose::TenantChanged);
        }
        let refused = match state.is_closed() {
            true => PoolClose::Shutdown,
            false => PoolClose::Evicted,
        };
        state.get_or_create(route, Instant::now(), self.settings.idle_timeout).ok_or(refused)
    }

    /// Closes expired connections, for as long as the process runs.
    pub(crate) async fn run_sweeper(&'static self) {
        loop {
            let rescheduled = self.sweep_rescheduled.notified();
            let (expired, next) = self.state().sweep(Instant::now(), self.settings.idle_timeout);
            for connection in expired {
                self.close_idle(connection, PoolClose::Expired);
            }
            match next {
                None => rescheduled.await,
                Some(next) => {
                    tokio::select! {
                        () = sleep_until(next) => {}
                        () = rescheduled => {}
                    }
                }
            }
        }
    }

    /// Closes idle connections of tenants whose registry entry changed.
    pub(crate) fn retain_current(&'static self, registry: &Snapshot) {
        let outdated = self.state().retain(|route| is_current(registry, route));
        for connection in outdated {
            self.close_idle(connection, PoolClose::TenantChanged);
        }
    }

    /// Closes idle connections to servers that were overtaken by another of their cluster.
    pub(crate) fn retain_unovertaken(&'static self) {
        let overtaken = self.state().take_overtaken();
        for connection in overtaken {
            self.close_idle(connection, PoolClose::FailedOver);
        }
    }

    /// Closes all idle connections and accepts none from now on: pgsilo is stopping.
    pub(crate) fn close(&'static self) {
        let all = self.state().close();
        all.into_iter().for_each(|connection| self.close_idle(connection, PoolClose::Shutdown));
        self.tasks.close();
    }

    /// Waits, once it is [closed](Pool::close), for connections that are being opened or closed,
    /// for `patience` at most.
    pub(crate) async fn closed(&self, patience: Duration) {
        let _bounded = timeout(patience, self.tasks.wait()).await;
    }

    /// Returns the permits at once; closes the connection and revokes its lease in the background.
    fn close_idle(&'static self, connection: IdleConnection, reason: PoolClose) {
        count_closed(reason);
        let terminated = terminate(connection);
        self.tasks.spawn_on(async move { drop(terminated.await) }, &self.runtime);
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the permits at once; the future closes the connection and yields its lease.
fn terminate(connection: IdleConnection) -> impl Future<Output = Lease> {
    let IdleConnection { backend, lease, permits, .. } = connection;
    drop(permits);
    async move {
        let _best_effort = timeout(TERMINATE_TIMEOUT, backend.terminate()).await;
        lease
    }
}

impl PrewarmError {
    /// What is full, if the database has no connection left.
    fn full_scope(&self) -> Option<FullScope> {
        match self {
            PrewarmError::Lease(error) => error.full_scope(),
            PrewarmError::Login(error) => error.full_scope(),
            PrewarmError::Dial(_) | PrewarmError::Detach(_) | PrewarmError::Timeout => None,
        }
    }
}

/// How long a connection may still be idle, as far as its lease goes. The lease of an idle
/// connection is not renewed, and a session that takes it should not be told at once that it ends.
fn remaining_time(end: &LeaseEnd) -> Duration {
    let reserve = end.duration / if end.is_final { 2 } else { 3 };
    end.at.remaining().saturating_sub(reserve)
}

/// Whether the registry's entry of a route's tenant is unchanged.
fn is_current(registry: &Snapshot, route: &Route) -> bool {
    let tenant = registry.tenant(route.tenant().id());
    tenant.is_some_and(|tenant| Arc::ptr_eq(&tenant, route.tenant()))
}

fn count_closed(reason: PoolClose) {
    metrics::POOL_CLOSED.of(reason).increment(1);
}
