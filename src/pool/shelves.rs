//! What waits for which route, and how often sessions come for it. All under one lock, so nothing
//! here closes, leases or waits: what has to go is handed back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::TenantId;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Route;
use crate::backend::Parked;
use crate::lease::{Fullness, Lease};
use crate::limits::TallyPermit;

/// How long making one is believed to take before any was made.
const FIRST_GUESS: Duration = Duration::from_millis(20);
/// Routes of one tenant that are kept account of. A client may name other settings each time.
const ROUTES_OF_A_TENANT: usize = 16;
/// Routes that are kept account of.
const ROUTES: usize = 4096;

/// What waits, by route.
#[derive(Debug, Default)]
pub(super) struct Shelves {
    by_route: HashMap<Arc<Route>, Shelf>,
    /// How long it has lately taken to make one.
    takes: Option<Duration>,
    /// Tenants for which making one has failed: not again before then.
    not_before: HashMap<TenantId, Instant>,
    /// When the next sweep is due.
    sweep: Option<Instant>,
    closed: bool,
}

/// What is known and kept of one route.
#[derive(Debug)]
pub(super) struct Shelf {
    demand: Demand,
    /// The oldest first.
    pub(super) ready: Vec<Ready>,
    pub(super) preparing: usize,
    /// Until when what is made ahead would die waiting.
    pub(super) fruitless: Option<Instant>,
}

/// A connection that waits.
#[derive(Debug)]
pub(super) struct Ready {
    // In the order in which it lets go: the lease when nothing uses its credential any more.
    pub(super) parked: Parked,
    pub(super) lease: Lease,
    pub(super) since: Instant,
    pub(super) until: Instant,
    pub(super) places: Places,
}

/// A connection's place among all and among its tenant's.
#[derive(Debug)]
pub(super) struct Places {
    _all: OwnedSemaphorePermit,
    _tenant: TallyPermit<TenantId>,
}

/// Which bound has no place left.
#[derive(Clone, Copy)]
pub(super) enum Full<'t> {
    InAll,
    Of(&'t TenantId),
}

/// How often sessions come.
#[derive(Clone, Copy, Debug)]
struct Demand {
    last: Instant,
    /// Between two of them, lately.
    gap: Option<Duration>,
}

impl Places {
    pub(super) fn new(all: OwnedSemaphorePermit, tenant: TallyPermit<TenantId>) -> Places {
        Places { _all: all, _tenant: tenant }
    }
}

impl Full<'_> {
    fn is_for(self, route: &Route) -> bool {
        match self {
            Full::InAll => true,
            Full::Of(tenant) => route.tenant().id() == tenant,
        }
    }
}

/// Whether a route's connections are among those that are used up for a tenant.
fn takes_up(route: &Route, tenant: &Tenant, whose: Fullness) -> bool {
    let other = route.tenant();
    match whose {
        Fullness::OfOne => other.id() == tenant.id(),
        Fullness::OfServer => {
            other.placement().host.comparable() == tenant.placement().host.comparable()
        }
    }
}

impl Shelves {
    pub(super) fn get(&mut self, route: &Route) -> Option<&mut Shelf> {
        self.by_route.get_mut(route)
    }

    pub(super) fn waiting(&self) -> usize {
        self.by_route.values().map(|shelf| shelf.ready.len()).sum()
    }

    /// Takes the newest of a route that has time left.
    pub(super) fn newest(&mut self, route: &Route, now: Instant) -> Option<Ready> {
        let ready = &mut self.by_route.get_mut(route)?.ready;
        let place = ready.iter().rposition(|ready| ready.until > now)?;
        Some(ready.remove(place))
    }

    /// A route's shelf; a new one where there is room for its account and nothing is closed.
    pub(super) fn shelf(
        &mut self,
        route: &Arc<Route>,
        now: Instant,
        idle: Duration,
    ) -> Option<&mut Shelf> {
        if self.closed {
            return None;
        }
        if !self.by_route.contains_key(route) {
            if self.full_for(route).is_some() {
                self.by_route.retain(|_, shelf| shelf.is_of_use(now, idle));
            }
            if let Some(full) = self.full_for(route) {
                self.forget_one(full);
            }
            if self.full_for(route).is_some() {
                return None;
            }
            let demand = Demand { last: now, gap: None };
            let shelf = Shelf { demand, ready: Vec::new(), preparing: 0, fruitless: None };
            self.by_route.insert(Arc::clone(route), shelf);
        }
        self.by_route.get_mut(route)
    }

    /// What has no room for the account of one route more.
    fn full_for<'r>(&self, route: &'r Route) -> Option<Full<'r>> {
        let tenant = route.tenant().id();
        let own = self.by_route.keys().filter(|known| known.tenant().id() == tenant);
        match self.by_route.len() >= ROUTES {
            true => Some(Full::InAll),
            false => (own.count() >= ROUTES_OF_A_TENANT).then_some(Full::Of(tenant)),
        }
    }

    /// Of the accounts that take up the room, forgets that of the route that nothing waits for and
    /// nobody has come for the longest.
    fn forget_one(&mut self, full: Full<'_>) {
        let empty = self.by_route.iter().filter(|(route, shelf)| {
            full.is_for(route) && shelf.ready.is_empty() && shelf.preparing == 0
        });
        let oldest = empty.min_by_key(|(_, shelf)| shelf.demand.last);
        if let Some(route) = oldest.map(|(route, _)| Arc::clone(route)) {
            self.by_route.remove(&route);
        }
    }

    /// Somebody came for a route: how many connections should be made for those who come next.
    /// None where the tenant's database is full.
    pub(super) fn missing(
        &mut self,
        route: &Arc<Route>,
        now: Instant,
        idle: Duration,
        is_full: bool,
    ) -> usize {
        let takes = self.takes.unwrap_or(FIRST_GUESS);
        let fails = self.not_before.get(route.tenant().id()).is_some_and(|time| now < *time);
        let Some(shelf) = self.shelf(route, now, idle) else { return 0 };
        shelf.demand.came(now, idle);
        if fails || is_full || shelf.fruitless.is_some_and(|until| now < until) {
            return 0;
        }
        let wanted = shelf.demand.wanted(idle, takes);
        wanted.saturating_sub(shelf.ready.len() + shelf.preparing)
    }

    /// One was made, in that time.
    pub(super) fn took(&mut self, time: Duration) {
        self.takes = Some(self.takes.map_or(time, |takes| (takes * 3 + time) / 4));
    }

    /// One could not be made; nor, probably, can another of the tenant's before then.
    pub(super) fn failed(&mut self, tenant: &TenantId, again: Instant) {
        self.not_before.insert(tenant.clone(), again);
    }

    /// Of what takes up the places, what has waited in vain for longest: twice the time in which
    /// sessions of its route came, or more.
    pub(super) fn overdue(&mut self, now: Instant, full: Full<'_>) -> Option<Ready> {
        self.oldest(|route, shelf| {
            let waited = shelf.ready.first().map(|oldest| now - oldest.since);
            let overdue =
                waited.zip(shelf.demand.gap).is_some_and(|(waited, gap)| waited > gap * 2);
            overdue && full.is_for(route)
        })
    }

    /// Of what takes up the places for other routes, what has waited for longest.
    pub(super) fn oldest_of_others(&mut self, route: &Route, full: Full<'_>) -> Option<Ready> {
        self.oldest(|other, _| other != route && full.is_for(other))
    }

    /// Of what takes up a tenant's share of its database, or else its server's connections, what has
    /// waited for longest.
    pub(super) fn oldest_at(&mut self, tenant: &Tenant, whose: Fullness) -> Option<Ready> {
        self.oldest(|route, _| takes_up(route, tenant, Fullness::OfOne))
            .or_else(|| self.oldest(|route, _| takes_up(route, tenant, whose)))
    }

    /// Whether [`Shelves::oldest_at`] would find one.
    pub(super) fn waits_at(&self, tenant: &Tenant, whose: Fullness) -> bool {
        let mut shelves = self.by_route.iter();
        shelves.any(|(route, shelf)| !shelf.ready.is_empty() && takes_up(route, tenant, whose))
    }

    fn oldest(&mut self, fits: impl Fn(&Route, &Shelf) -> bool) -> Option<Ready> {
        let since = |shelf: &Shelf| shelf.ready.first().map(|oldest| oldest.since);
        let (_, shelf) = self
            .by_route
            .iter_mut()
            .filter(|(route, shelf)| !shelf.ready.is_empty() && fits(route, shelf))
            .min_by_key(|(_, shelf)| since(shelf))?;
        Some(shelf.ready.remove(0))
    }

    /// What has waited in vain, and when more will have.
    pub(super) fn sweep(&mut self, now: Instant, idle: Duration) -> (Vec<Ready>, Option<Instant>) {
        let (mut gone, mut next) = (Vec::new(), None);
        self.by_route.retain(|_, shelf| {
            gone.extend(shelf.ready.extract_if(.., |ready| ready.until <= now));
            next = shelf.ready.iter().map(|ready| ready.until).chain(next).min();
            shelf.is_of_use(now, idle)
        });
        self.not_before.retain(|_, time| now < *time);
        self.sweep = next;
        (gone, next)
    }

    /// Puts the next sweep forward, if it would come too late for what waits until then. Whether it has.
    pub(super) fn put_forward(&mut self, until: Instant) -> bool {
        let sooner = self.sweep.is_none_or(|sweep| until < sweep);
        if sooner {
            self.sweep = Some(until);
        }
        sooner
    }

    /// What waits for a route.
    pub(super) fn clear(&mut self, route: &Route) -> Vec<Ready> {
        self.get(route).map(|shelf| std::mem::take(&mut shelf.ready)).unwrap_or_default()
    }

    /// Keeps the shelves of some routes; what waits on the others.
    pub(super) fn keep_only(&mut self, stays: impl Fn(&Route) -> bool) -> Vec<Ready> {
        let gone = self.by_route.extract_if(|route, _| !stays(route));
        gone.flat_map(|(_, shelf)| shelf.ready).collect()
    }

    /// Keeps nothing, from now on.
    pub(super) fn close(&mut self) -> Vec<Ready> {
        self.closed = true;
        self.keep_only(|_| false)
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

    use super::{Demand, Shelves};

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
    fn a_sweep_is_put_forward_and_never_back() {
        let (mut shelves, now) = (Shelves::default(), Instant::now());
        assert!(shelves.put_forward(now + IDLE), "there was none");
        assert!(!shelves.put_forward(now + IDLE));
        assert!(!shelves.put_forward(now + IDLE * 2));
        assert!(shelves.put_forward(now + IDLE / 2));
        assert!(!shelves.put_forward(now + IDLE));
        assert!(shelves.sweep(now + IDLE, IDLE).0.is_empty());
        assert!(shelves.put_forward(now + IDLE * 2), "nothing waits any more");
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
