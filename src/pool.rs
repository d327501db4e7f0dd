//! Connections to databases that are logged in and wait for a session.
//!
//! A login costs a lease, a fork and a SCRAM exchange, and a client that waits for it. So while
//! nobody waits, the next connection of a route that sessions come for is made: with a fresh lease of
//! its own, by the same dial and the same login, its seal checked, never used by anyone. Whoever
//! comes next on an equal [`Route`] (the same tenant at the same place, the same access, the same
//! settings byte for byte) takes it, checks its seal again, and cannot tell the difference.
//!
//! Where the operator says so (`backend.reuse`), a connection that a session has left takes the place
//! of one made ahead: reset, checked, and with the lease that it was made with.
//!
//! Nobody's authority is stretched: a session is identified and routed before it may take anything,
//! and under session authority, where a lease is asked for with the client's own token, nothing is
//! made ahead and nothing taken that was another subject's. What waits is bounded, in all and for each
//! tenant, goes after a short while, and with any change of the registry; its lease goes with it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use crate::backend::{self, Attachment, BackendError, DialError, Parked};
use crate::config::Warm;
use crate::lease::{Lease, LeaseError, Lessor};
use crate::limits::{Tally, TallyPermit};
use crate::registry::{Registry, Snapshot};
use crate::session::Route;
use crate::tenant::TenantId;

/// How long a connection that waited may take to answer before a new one is made instead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the making of one may take.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that are made at once: what sessions ask for themselves comes first.
const AT_ONCE: usize = 4;
/// How long making one is believed to take before any was made.
const FIRST_GUESS: Duration = Duration::from_millis(20);
/// What has less time left is not kept.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
/// Routes of one tenant that are kept account of. A client may name other settings each time.
const ROUTES_OF_A_TENANT: usize = 16;
/// Routes that are kept account of.
const ROUTES: usize = 4096;

/// All connections that wait, and the account of who comes for them.
#[derive(Debug)]
pub(crate) struct Pool {
    settings: &'static Warm,
    lessor: Lessor,
    runtime: Handle,
    all: Arc<Semaphore>,
    tenants: Tally<TenantId>,
    preparing: Semaphore,
    shelves: Mutex<Shelves>,
    /// Something was put on a shelf.
    stocked: Notify,
}

#[derive(Debug, Default)]
struct Shelves {
    by_route: HashMap<Arc<Route>, Shelf>,
    /// How long it has lately taken to make one.
    takes: Option<Duration>,
    closed: bool,
}

/// What is known and kept of one route.
#[derive(Debug)]
struct Shelf {
    demand: Demand,
    ready: Vec<Ready>,
    preparing: usize,
    /// Making one has failed: not again before then.
    not_before: Option<Instant>,
}

/// A connection that waits.
#[derive(Debug)]
struct Ready {
    // In the order in which it lets go: the lease when nothing uses its credential any more.
    parked: Parked,
    lease: Lease,
    since: Instant,
    until: Instant,
    _places: Places,
}

/// A connection's place among all and among its tenant's.
#[derive(Debug)]
struct Places {
    _all: OwnedSemaphorePermit,
    _tenant: TallyPermit<TenantId>,
}

/// Which bound has no place left.
#[derive(Clone, Copy)]
enum Full<'t> {
    InAll,
    Of(&'t TenantId),
}

/// Why a connection could not be made ahead. Nobody is refused for it.
#[derive(Debug, thiserror::Error)]
enum NotPrepared {
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Login(#[from] BackendError),
    #[error("cannot leave the event loop: {0}")]
    Park(#[from] io::Error),
    #[error("not done within {PREPARE_TIMEOUT:?}")]
    Timeout,
}

/// How often sessions come.
#[derive(Clone, Copy, Debug)]
struct Demand {
    last: Instant,
    /// Between two of them, lately.
    gap: Option<Duration>,
}

impl Pool {
    pub(crate) fn new(settings: &'static Warm, lessor: Lessor, runtime: Handle) -> Pool {
        Pool {
            settings,
            lessor,
            runtime,
            all: Arc::new(Semaphore::new(settings.max)),
            tenants: Tally::new(Some(settings.max_per_tenant)),
            preparing: Semaphore::new(AT_ONCE),
            shelves: Mutex::default(),
            stocked: Notify::new(),
        }
    }

    /// Whether connections are made before a session is here. Not under session authority, where a
    /// lease is asked for with the session's token; nor where what sessions leave takes the places.
    fn makes(&self) -> bool {
        self.settings.max > 0 && !self.keeps() && !self.lessor.needs_token()
    }

    /// Whether connections that a session has left are kept for another.
    pub(crate) fn keeps(&self) -> bool {
        self.settings.max > 0 && self.settings.reuse.is_some()
    }

    /// A connection of an equal route that still lives, if one waits.
    pub(crate) async fn take(&self, route: &Arc<Route>) -> Option<(Lease, Attachment)> {
        if !self.makes() && !self.keeps() {
            return None;
        }
        while let Some(ready) = self.newest(route) {
            let Ready { parked, lease, _places, .. } = ready;
            match timeout(ANSWER_TIMEOUT, parked.resume(route)).await {
                Ok(Ok(attachment)) => {
                    count("used");
                    return Some((lease, attachment));
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a connection did not wait for its session");
                }
                Err(_elapsed) => tracing::debug!("a connection that waited does not answer"),
            }
            count("lost");
        }
        count("missed");
        None
    }

    /// Takes the newest that has time left: the older ones go if they are too many.
    fn newest(&self, route: &Route) -> Option<Ready> {
        let mut shelves = self.lock();
        let ready = &mut shelves.by_route.get_mut(route)?.ready;
        let newest = ready.pop_if(|newest| newest.until > Instant::now())?;
        metrics::gauge!("pgsilo_warm_connections").decrement(1);
        Some(newest)
    }

    /// A session of this route is served: has the next one made, if more are likely to come while it
    /// would wait.
    pub(crate) fn expect(&'static self, route: &Arc<Route>, registry: &Snapshot) {
        if !self.makes() || !is_of(registry, route) {
            return;
        }
        let now = Instant::now();
        let mut shelves = self.lock();
        if shelves.closed {
            return;
        }
        let takes = shelves.takes.unwrap_or(FIRST_GUESS);
        let Some(shelf) = shelves.shelf(route, now, self.settings.idle_timeout) else { return };
        shelf.demand.came(now, self.settings.idle_timeout);
        if shelf.not_before.is_some_and(|time| now < time) {
            return;
        }
        let wanted = shelf.demand.wanted(self.settings.idle_timeout, takes);
        let missing = wanted.saturating_sub(shelf.ready.len() + shelf.preparing);
        for _ in 0..missing {
            let places = self.places(route.tenant().id()).or_else(|full| {
                let overdue = shelves.overdue(now, full).ok_or(full)?;
                count("expired");
                self.let_go(vec![overdue]);
                self.places(route.tenant().id())
            });
            let (Ok(places), Some(shelf)) = (places, shelves.by_route.get_mut(route)) else {
                return;
            };
            shelf.preparing += 1;
            self.runtime.spawn(self.prepare(Arc::clone(route), places));
        }
    }

    fn places<'t>(&'static self, tenant: &'t TenantId) -> Result<Places, Full<'t>> {
        let own = self.tenants.count(tenant).ok_or(Full::Of(tenant))?;
        let all = Arc::clone(&self.all).try_acquire_owned().map_err(|_full| Full::InAll)?;
        Ok(Places { _all: all, _tenant: own })
    }

    async fn prepare(&'static self, route: Arc<Route>, places: Places) {
        let Ok(_slot) = self.preparing.acquire().await else { return };
        let began = Instant::now();
        let made = match timeout(PREPARE_TIMEOUT, self.make(&route)).await {
            Ok(made) => made,
            Err(_elapsed) => Err(NotPrepared::Timeout),
        };
        let now = Instant::now();
        let mut shelves = self.lock();
        let closed = shelves.closed;
        if made.is_ok() {
            let took = now - began;
            shelves.takes = Some(shelves.takes.map_or(took, |takes| (takes * 3 + took) / 4));
        }
        // A reload has cleared the shelf away: what was made for it goes as well.
        let Some(shelf) = shelves.by_route.get_mut(&route) else { return };
        shelf.preparing = shelf.preparing.saturating_sub(1);
        match made {
            Ok(_) if closed => {}
            Ok((lease, parked)) => {
                let (end, _) = lease.tend();
                let (role, pid) = (Arc::clone(lease.credential().name()), parked.pid());
                // Nobody renews a lease that waits: it goes while most of its time is left.
                let wait = self.settings.idle_timeout.min(end.duration / 4);
                let ready = Ready { parked, lease, since: now, until: now + wait, _places: places };
                shelf.ready.push(ready);
                metrics::gauge!("pgsilo_warm_connections").increment(1);
                self.stocked.notify_one();
                tracing::debug!(tenant = %route.tenant().id(), role = &*role, pid, "a connection waits for a session");
            }
            Err(error) => {
                shelf.not_before = Some(now + self.settings.idle_timeout);
                count("failed");
                tracing::debug!(%error, tenant = %route.tenant().id(), "no connection was made ahead");
            }
        }
    }

    /// As a session does it: the lease and the dial at once, then the login.
    async fn make(&self, route: &Arc<Route>) -> Result<(Lease, Parked), NotPrepared> {
        let lease = async { Ok::<_, NotPrepared>(self.lessor.lease(route.request(None)).await?) };
        let dial = async { Ok(backend::dial(route).await?) };
        let (lease, connection) = tokio::try_join!(lease, dial)?;
        let attachment = connection.log_in(lease.credential()).await?;
        Ok((lease, attachment.park()?))
    }

    /// A session has left a connection whole: resets it and keeps it for another, where there is a
    /// place for it and time left. Else it is closed and its lease revoked, as if it were not kept.
    pub(crate) async fn give_back(
        &'static self,
        route: &Arc<Route>,
        lease: Lease,
        used: Attachment,
        registry: &Registry,
    ) {
        let Some(max_age) = self.settings.reuse else { return };
        let Ok(places) = self.places(route.tenant().id()) else { return };
        let attachment = match used.reset(route).await {
            Ok(attachment) => attachment,
            Err(error) => {
                count("unclean");
                tracing::debug!(%error, tenant = %route.tenant().id(), "a connection is not kept");
                return;
            }
        };
        let left = max_age.saturating_sub(attachment.past.made.elapsed());
        let parked = match attachment.park() {
            Ok(parked) => parked,
            Err(error) => return tracing::warn!(%error, "a connection cannot leave its event loop"),
        };
        let (end, _) = lease.tend();
        // Nobody renews a lease that waits.
        let wait = self.settings.idle_timeout.min(left).min(end.at.remaining() / 2);
        let now = Instant::now();
        let ready = Ready { parked, lease, since: now, until: now + wait, _places: places };
        let mut shelves = self.lock();
        if shelves.closed || wait < SHORTEST_WAIT || !is_of(&registry.snapshot(), route) {
            return;
        }
        if let Some(shelf) = shelves.shelf(route, now, self.settings.idle_timeout) {
            shelf.ready.push(ready);
            metrics::gauge!("pgsilo_warm_connections").increment(1);
            self.stocked.notify_one();
        }
    }

    /// Lets go of what has waited in vain, for as long as the process lives.
    pub(crate) async fn keep(&'static self) {
        loop {
            let stocked = self.stocked.notified();
            match self.sweep() {
                Some(next) => sleep_until(next).await,
                None => stocked.await,
            }
        }
    }

    /// When there will be more to let go.
    fn sweep(&self) -> Option<Instant> {
        let (now, idle) = (Instant::now(), self.settings.idle_timeout);
        let mut gone = Vec::new();
        let mut next = None;
        let mut shelves = self.lock();
        shelves.by_route.retain(|_, shelf| {
            gone.extend(shelf.ready.extract_if(.., |ready| ready.until <= now));
            next = shelf.ready.iter().map(|ready| ready.until).chain(next).min();
            shelf.is_of_use(now, idle)
        });
        drop(shelves);
        for _ in &gone {
            count("expired");
        }
        self.let_go(gone);
        next
    }

    /// Lets go of whatever is not of a tenant as the registry has it now.
    pub(crate) fn keep_only(&self, registry: &Snapshot) {
        let mut gone = Vec::new();
        self.lock().by_route.retain(|route, shelf| {
            let stays = is_of(registry, route);
            if !stays {
                gone.append(&mut shelf.ready);
            }
            stays
        });
        self.let_go(gone);
    }

    /// Lets go of everything and makes nothing more: pgsilo is stopping.
    pub(crate) fn close(&self) {
        let mut shelves = self.lock();
        shelves.closed = true;
        let gone = shelves.by_route.drain().flat_map(|(_, shelf)| shelf.ready).collect();
        drop(shelves);
        self.let_go(gone);
    }

    /// Closes the connections; their leases are revoked.
    fn let_go(&self, gone: Vec<Ready>) {
        metrics::gauge!("pgsilo_warm_connections").decrement(gone.len() as f64);
        drop(gone);
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a route's tenant is still as the registry has it.
fn is_of(registry: &Snapshot, route: &Route) -> bool {
    let tenant = registry.tenant(route.tenant().id());
    tenant.is_some_and(|tenant| Arc::ptr_eq(&tenant, route.tenant()))
}

/// What became of a wish for a connection that is ready.
fn count(result: &'static str) {
    metrics::counter!("pgsilo_warm_total", "result" => result).increment(1);
}

impl Shelves {
    /// A route's shelf; a new one where there is room for its account.
    fn shelf(&mut self, route: &Arc<Route>, now: Instant, idle: Duration) -> Option<&mut Shelf> {
        if !self.by_route.contains_key(route) {
            let own = |known: &&Arc<Route>| known.tenant().id() == route.tenant().id();
            let is_full = |shelves: &Shelves| {
                shelves.by_route.len() >= ROUTES
                    || shelves.by_route.keys().filter(own).count() >= ROUTES_OF_A_TENANT
            };
            if is_full(self) {
                self.by_route.retain(|_, shelf| shelf.is_of_use(now, idle));
            }
            if is_full(self) {
                return None;
            }
            let demand = Demand { last: now, gap: None };
            let shelf = Shelf { demand, ready: Vec::new(), preparing: 0, not_before: None };
            return Some(self.by_route.entry(Arc::clone(route)).or_insert(shelf));
        }
        self.by_route.get_mut(route)
    }

    /// Of what takes up the places, what has waited in vain for longest: twice the time in which
    /// sessions of its route came, or more.
    fn overdue(&mut self, now: Instant, full: Full<'_>) -> Option<Ready> {
        let is_in_the_way = |route: &Route| match full {
            Full::InAll => true,
            Full::Of(tenant) => route.tenant().id() == tenant,
        };
        let oldest = |shelf: &Shelf| shelf.ready.first().map(|oldest| oldest.since);
        let is_overdue = |shelf: &Shelf| {
            let waited = oldest(shelf).map(|since| now - since);
            waited.zip(shelf.demand.gap).is_some_and(|(waited, gap)| waited > gap * 2)
        };
        let overdue = self
            .by_route
            .iter_mut()
            .filter(|(route, shelf)| is_in_the_way(route) && is_overdue(shelf))
            .map(|(_, shelf)| shelf)
            .min_by_key(|shelf| oldest(shelf))?;
        Some(overdue.ready.remove(0))
    }
}

impl Shelf {
    fn is_of_use(&self, now: Instant, idle: Duration) -> bool {
        !self.ready.is_empty() || self.preparing > 0 || now - self.demand.last <= idle
    }
}

impl Demand {
    /// Somebody came, the first one or another.
    fn came(&mut self, now: Instant, idle: Duration) {
        let since = now - self.last;
        self.last = now;
        // A long silence counts as one, so that it is soon forgotten.
        let since = since.min(idle * 2);
        self.gap = match self.gap {
            Some(gap) => Some((gap * 3 + since) / 4),
            None if since.is_zero() => None,
            None => Some(since),
        };
    }

    /// How many should wait: none where it would be in vain, else one, and as many more as are
    /// taken while two are made.
    fn wanted(&self, idle: Duration, takes: Duration) -> usize {
        match self.gap {
            Some(gap) if gap <= idle => {
                1 + (takes.as_secs_f64() * 2.0 / gap.as_secs_f64().max(1e-6)) as usize
            }
            Some(_) | None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Demand;

    const IDLE: Duration = Duration::from_secs(10);
    const TAKES: Duration = Duration::from_millis(20);

    fn wanted_after(gaps: &[u64]) -> usize {
        let mut now = Instant::now();
        let mut demand = Demand { last: now, gap: None };
        demand.came(now, IDLE);
        for gap in gaps {
            now += Duration::from_millis(*gap);
            demand.came(now, IDLE);
        }
        demand.wanted(IDLE, TAKES)
    }

    #[test]
    fn none_is_wanted_for_those_who_come_once_or_seldom() {
        assert_eq!(wanted_after(&[]), 0);
        assert_eq!(wanted_after(&[60_000, 60_000, 60_000]), 0);
    }

    #[test]
    fn as_many_are_wanted_as_come_while_they_are_made() {
        assert_eq!(wanted_after(&[9_000]), 1);
        assert_eq!(wanted_after(&[50; 20]), 1);
        assert_eq!(wanted_after(&[10; 20]), 5);
        assert_eq!(wanted_after(&[1; 20]), 41);
    }

    #[test]
    fn a_silence_is_soon_forgotten() {
        let mut gaps = vec![50; 20];
        gaps.push(3_600_000);
        assert_eq!(wanted_after(&gaps), 1, "it is half of what is too seldom");
        gaps.extend([50; 20]);
        assert_eq!(wanted_after(&gaps), 1);
    }
}
