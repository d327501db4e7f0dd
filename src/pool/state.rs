//! The idle connections of each route, and how often sessions ask for it. All of it is under one
//! lock, so nothing here closes, leases or waits: evicted connections are returned to the caller.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::TenantId;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Route;
use crate::backend::IdleBackend;
use crate::lease::{FullScope, Lease};
use crate::limits::TallyPermit;

/// The assumed time to open a connection, before one was measured.
const INITIAL_CONNECT_TIME: Duration = Duration::from_millis(20);
/// Routes of one tenant that are tracked. A client may send different settings each time.
const MAX_ROUTES_PER_TENANT: usize = 16;
/// Routes that are tracked.
const MAX_ROUTES: usize = 4096;

/// Idle connections and demand, by route.
#[derive(Debug, Default)]
pub(super) struct PoolState {
    routes: HashMap<Arc<Route>, RoutePool>,
    /// Moving average of the time that opening a connection takes.
    connect_time: Option<Duration>,
    /// Tenants whose last prewarm failed: not again before this time.
    prewarm_after: HashMap<TenantId, Instant>,
    /// When the next sweep is due.
    next_sweep: Option<Instant>,
    is_closed: bool,
}

/// The pool of one route.
#[derive(Debug)]
pub(super) struct RoutePool {
    demand: Demand,
    /// The oldest first.
    pub(super) idle: Vec<IdleConnection>,
    /// Connections that are being opened for it.
    pub(super) connecting: usize,
    /// No prewarm before then: the database has ended an idle connection of this route.
    pub(super) prewarm_after: Option<Instant>,
}

/// A logged-in connection that no session uses.
#[derive(Debug)]
pub(super) struct IdleConnection {
    // Dropped in this order: the lease last, when nothing uses its credential any more.
    pub(super) backend: IdleBackend,
    pub(super) lease: Lease,
    pub(super) idle_since: Instant,
    pub(super) expires_at: Instant,
    pub(super) permits: PoolPermits,
}

/// An idle connection's share of the limits of the pool and of its tenant.
#[derive(Debug)]
pub(super) struct PoolPermits {
    _total: OwnedSemaphorePermit,
    _tenant: TallyPermit<TenantId>,
}

/// The limit that was reached.
#[derive(Clone, Copy)]
pub(super) enum LimitReached<'t> {
    Total,
    Tenant(&'t TenantId),
}

/// How often sessions ask for a route.
#[derive(Clone, Copy, Debug)]
struct Demand {
    last_arrival: Instant,
    /// Moving average of the time between two sessions.
    interval: Option<Duration>,
}

impl PoolPermits {
    pub(super) fn new(total: OwnedSemaphorePermit, tenant: TallyPermit<TenantId>) -> PoolPermits {
        PoolPermits { _total: total, _tenant: tenant }
    }
}

impl LimitReached<'_> {
    /// Whether connections of this route count towards the limit.
    fn includes(self, route: &Route) -> bool {
        match self {
            LimitReached::Total => true,
            LimitReached::Tenant(tenant) => route.tenant().id() == tenant,
        }
    }
}

/// Whether closing a connection of this route frees one for the tenant, whose database or server is
/// full.
fn shares_backend(route: &Route, tenant: &Tenant, scope: FullScope) -> bool {
    let other = route.tenant();
    match scope {
        FullScope::Tenant => other.id() == tenant.id(),
        FullScope::Server => other.placement().cluster.key() == tenant.placement().cluster.key(),
    }
}

impl PoolState {
    pub(super) fn get(&mut self, route: &Route) -> Option<&mut RoutePool> {
        self.routes.get_mut(route)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub(super) fn idle_count(&self) -> usize {
        self.routes.values().map(|pool| pool.idle.len()).sum()
    }

    /// Takes the newest idle connection of a route that has not expired.
    pub(super) fn take_newest(&mut self, route: &Route, now: Instant) -> Option<IdleConnection> {
        let idle = &mut self.routes.get_mut(route)?.idle;
        let index = idle.iter().rposition(|connection| connection.expires_at > now)?;
        Some(idle.remove(index))
    }

    /// The pool of a route. It is created if the limits on routes allow and the pool is open.
    pub(super) fn get_or_create(
        &mut self,
        route: &Arc<Route>,
        now: Instant,
        idle_timeout: Duration,
    ) -> Option<&mut RoutePool> {
        if self.is_closed {
            return None;
        }
        if !self.routes.contains_key(route) {
            if self.route_limit_reached(route).is_some() {
                self.routes.retain(|_, pool| pool.is_in_use(now, idle_timeout));
            }
            if let Some(limit) = self.route_limit_reached(route) {
                self.evict_route(limit);
            }
            if self.route_limit_reached(route).is_some() {
                return None;
            }
            let demand = Demand { last_arrival: now, interval: None };
            let pool = RoutePool { demand, idle: Vec::new(), connecting: 0, prewarm_after: None };
            self.routes.insert(Arc::clone(route), pool);
        }
        self.routes.get_mut(route)
    }

    /// The limit that keeps one more route from being tracked.
    fn route_limit_reached<'r>(&self, route: &'r Route) -> Option<LimitReached<'r>> {
        let tenant = route.tenant().id();
        let own = self.routes.keys().filter(|known| known.tenant().id() == tenant);
        match self.routes.len() >= MAX_ROUTES {
            true => Some(LimitReached::Total),
            false => (own.count() >= MAX_ROUTES_PER_TENANT).then_some(LimitReached::Tenant(tenant)),
        }
    }

    /// Evicts the least recently requested route that has no idle or connecting backend.
    fn evict_route(&mut self, limit: LimitReached<'_>) {
        let empty = self.routes.iter().filter(|(route, pool)| {
            limit.includes(route) && pool.idle.is_empty() && pool.connecting == 0
        });
        let oldest = empty.min_by_key(|(_, pool)| pool.demand.last_arrival);
        if let Some(route) = oldest.map(|(route, _)| Arc::clone(route)) {
            self.routes.remove(&route);
        }
    }

    /// Records a session of this route. Returns how many connections to open for the next ones: 0
    /// while the tenant's database is full.
    pub(super) fn prewarm_count(
        &mut self,
        route: &Arc<Route>,
        now: Instant,
        idle_timeout: Duration,
        is_full: bool,
    ) -> usize {
        let connect_time = self.connect_time.unwrap_or(INITIAL_CONNECT_TIME);
        let tenant = route.tenant().id();
        let has_failed = self.prewarm_after.get(tenant).is_some_and(|time| now < *time);
        let Some(pool) = self.get_or_create(route, now, idle_timeout) else { return 0 };
        pool.demand.record_arrival(now, idle_timeout);
        if has_failed || is_full || pool.prewarm_after.is_some_and(|time| now < time) {
            return 0;
        }
        let target = pool.demand.target_size(idle_timeout, connect_time);
        target.saturating_sub(pool.idle.len() + pool.connecting)
    }

    /// A connection was opened in this time.
    pub(super) fn record_connect_time(&mut self, time: Duration) {
        self.connect_time = Some(self.connect_time.map_or(time, |mean| (mean * 3 + time) / 4));
    }

    /// A prewarm failed. There is none for the tenant until `retry_at`.
    pub(super) fn record_failure(&mut self, tenant: &TenantId, retry_at: Instant) {
        self.prewarm_after.insert(tenant.clone(), retry_at);
    }

    /// Evicts the connection that has been idle for longest, if that is more than twice the time
    /// between two sessions of its route.
    pub(super) fn evict_stale(
        &mut self,
        now: Instant,
        limit: LimitReached<'_>,
    ) -> Option<IdleConnection> {
        self.evict_oldest(|route, pool| {
            let idle_for = pool.idle.first().map(|oldest| now - oldest.idle_since);
            let is_stale = idle_for
                .zip(pool.demand.interval)
                .is_some_and(|(idle_for, interval)| idle_for > interval * 2);
            is_stale && limit.includes(route)
        })
    }

    /// Evicts the connection of another route that has been idle for longest.
    pub(super) fn evict_other(
        &mut self,
        route: &Route,
        limit: LimitReached<'_>,
    ) -> Option<IdleConnection> {
        self.evict_oldest(|other, _| other != route && limit.includes(other))
    }

    /// Evicts a connection at a full database: the tenant's own that has been idle for longest,
    /// else, if the server is full, another tenant's there.
    pub(super) fn evict_at_backend(
        &mut self,
        tenant: &Tenant,
        scope: FullScope,
    ) -> Option<IdleConnection> {
        self.evict_oldest(|route, _| shares_backend(route, tenant, FullScope::Tenant))
            .or_else(|| self.evict_oldest(|route, _| shares_backend(route, tenant, scope)))
    }

    /// Whether [`PoolState::evict_at_backend`] would find a connection.
    pub(super) fn has_idle_at_backend(&self, tenant: &Tenant, scope: FullScope) -> bool {
        let mut pools = self.routes.iter();
        pools.any(|(route, pool)| !pool.idle.is_empty() && shares_backend(route, tenant, scope))
    }

    fn evict_oldest(
        &mut self,
        is_candidate: impl Fn(&Route, &RoutePool) -> bool,
    ) -> Option<IdleConnection> {
        let (_, pool) = self
            .routes
            .iter_mut()
            .filter(|(route, pool)| !pool.idle.is_empty() && is_candidate(route, pool))
            .min_by_key(|(_, pool)| pool.idle.first().map(|oldest| oldest.idle_since))?;
        Some(pool.idle.remove(0))
    }

    /// Removes expired connections and unused routes. Returns the connections, and when the next
    /// connection expires.
    pub(super) fn sweep(
        &mut self,
        now: Instant,
        idle_timeout: Duration,
    ) -> (Vec<IdleConnection>, Option<Instant>) {
        let (mut expired, mut next) = (Vec::new(), None);
        self.routes.retain(|_, pool| {
            expired.extend(pool.idle.extract_if(.., |connection| connection.expires_at <= now));
            next = pool.idle.iter().map(|connection| connection.expires_at).chain(next).min();
            pool.is_in_use(now, idle_timeout)
        });
        self.prewarm_after.retain(|_, time| now < *time);
        self.next_sweep = next;
        (expired, next)
    }

    /// Has the next sweep at `time` at the latest. Returns whether that is sooner than before.
    pub(super) fn schedule_sweep(&mut self, time: Instant) -> bool {
        let is_sooner = self.next_sweep.is_none_or(|next| time < next);
        if is_sooner {
            self.next_sweep = Some(time);
        }
        is_sooner
    }

    /// Removes all idle connections of a route.
    pub(super) fn drain_route(&mut self, route: &Route) -> Vec<IdleConnection> {
        self.get(route).map(|pool| std::mem::take(&mut pool.idle)).unwrap_or_default()
    }

    /// Removes the routes that do not satisfy the predicate. Returns their idle connections.
    pub(super) fn retain(&mut self, predicate: impl Fn(&Route) -> bool) -> Vec<IdleConnection> {
        let removed = self.routes.extract_if(|route, _| !predicate(route));
        removed.flat_map(|(_, pool)| pool.idle).collect()
    }

    /// Takes the connections to servers that were overtaken by another of their cluster.
    pub(super) fn take_overtaken(&mut self) -> Vec<IdleConnection> {
        let idle = self.routes.values_mut().map(|pool| &mut pool.idle);
        let overtaken = |connection: &mut IdleConnection| connection.backend.is_overtaken();
        idle.flat_map(|idle| idle.extract_if(.., overtaken)).collect()
    }

    /// Removes all connections, and accepts none from now on.
    pub(super) fn close(&mut self) -> Vec<IdleConnection> {
        self.is_closed = true;
        self.retain(|_| false)
    }
}

impl RoutePool {
    fn is_in_use(&self, now: Instant, idle_timeout: Duration) -> bool {
        let is_recent = now - self.demand.last_arrival <= idle_timeout;
        !self.idle.is_empty() || self.connecting > 0 || is_recent
    }
}

impl Demand {
    /// A session has asked for the route, the first one included.
    fn record_arrival(&mut self, now: Instant, idle_timeout: Duration) {
        let interval = now - self.last_arrival;
        self.last_arrival = now;
        // A long pause counts as twice the timeout, so that a few sessions outweigh it.
        let interval = interval.min(idle_timeout * 2);
        self.interval = match self.interval {
            Some(mean) => Some((mean * 3 + interval) / 4),
            None if interval.is_zero() => None,
            None => Some(interval),
        };
    }

    /// How many idle connections a route should have: none if they would expire before the next
    /// session, else one, and as many more as sessions arrive while two are opened.
    fn target_size(&self, idle_timeout: Duration, connect_time: Duration) -> usize {
        match self.interval {
            Some(interval) if interval <= idle_timeout => {
                let arrivals = connect_time.as_secs_f64() * 2.0 / interval.as_secs_f64().max(1e-6);
                1 + arrivals as usize
            }
            Some(_) | None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{Demand, PoolState};

    const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
    const CONNECT_TIME: Duration = Duration::from_millis(20);

    fn target_size_after(intervals: &[u64]) -> usize {
        let mut now = Instant::now();
        let mut demand = Demand { last_arrival: now, interval: None };
        demand.record_arrival(now, IDLE_TIMEOUT);
        for interval in intervals {
            now += Duration::from_millis(*interval);
            demand.record_arrival(now, IDLE_TIMEOUT);
        }
        demand.target_size(IDLE_TIMEOUT, CONNECT_TIME)
    }

    #[test]
    fn a_sweep_is_rescheduled_to_an_earlier_time_only() {
        let (mut state, now) = (PoolState::default(), Instant::now());
        assert!(state.schedule_sweep(now + IDLE_TIMEOUT), "there was none");
        assert!(!state.schedule_sweep(now + IDLE_TIMEOUT));
        assert!(!state.schedule_sweep(now + IDLE_TIMEOUT * 2));
        assert!(state.schedule_sweep(now + IDLE_TIMEOUT / 2));
        assert!(!state.schedule_sweep(now + IDLE_TIMEOUT));
        assert!(state.sweep(now + IDLE_TIMEOUT, IDLE_TIMEOUT).0.is_empty());
        assert!(state.schedule_sweep(now + IDLE_TIMEOUT * 2), "no connection is left");
    }

    #[test]
    fn single_or_rare_sessions_are_not_prewarmed_for() {
        assert_eq!(target_size_after(&[]), 0);
        assert_eq!(target_size_after(&[60_000, 60_000, 60_000]), 0);
    }

    #[test]
    fn target_size_grows_with_the_rate_of_sessions() {
        assert_eq!(target_size_after(&[9_000]), 1);
        assert_eq!(target_size_after(&[50; 20]), 1);
        assert_eq!(target_size_after(&[10; 20]), 5);
        assert_eq!(target_size_after(&[1; 20]), 41);
    }

    #[test]
    fn a_few_sessions_outweigh_a_long_pause() {
        let mut intervals = vec![50; 20];
        intervals.push(3_600_000);
        assert_eq!(target_size_after(&intervals), 1, "the mean is half of what would be too rare");
        intervals.extend([50; 20]);
        assert_eq!(target_size_after(&intervals), 1);
    }
}
