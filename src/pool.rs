//! Connections to databases that are logged in and wait for a session.
//!
//! A login costs a lease, a fork and a SCRAM exchange, and a client that waits for it. So while
//! nobody waits, the next connection of a route that sessions come for is made: with a lease as a session's
//! own would be, by the same dial and the same login, its seal checked, never used by anyone. Whoever
//! comes next on an equal [`Route`] (the same tenant at the same place, the same access, the same
//! settings byte for byte) takes it, its seal read again if that was long ago, and cannot tell the difference.
//!
//! Where the operator says so (`backend.reuse`), a connection that a session has left takes the place
//! of one made ahead: reset, checked, and with the lease that it was made with.
//!
//! Nobody's authority is stretched: a session is identified and routed before it may take anything,
//! and under session authority, where a lease is asked for with the client's own token, nothing is
//! made ahead and nothing taken that was another subject's. What waits is bounded, in all and for each
//! tenant, goes after a short while, and with any change of its tenant in the registry; its lease goes with it.

mod full;
mod shelves;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgsilo_core::registry::{Snapshot, Tenant};
use pgsilo_core::tenant::TenantId;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use crate::backend::{self, Attachment, BackendError, DialError, Parked, Past};
use crate::lease::{Fullness, Lease, LeaseEnd, LeaseError, Lessor};
use crate::limits::{Tally, TallyPermit};
use crate::metrics::{self, PoolEvent};
use crate::registry::Registry;
use crate::route::Route;
use full::FullDatabases;
use shelves::{Full, Places, Ready, Shelf, Shelves};

/// How long a connection that waited may take to answer before a new one is made instead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the making of one may take.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a database may take to hear that a connection is not wanted any more.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long none is made ahead for a route of which the database has ended one because it was idle, as
/// `idle_session_timeout` has it: the next one would wait in vain, too.
const FRUITLESS: Duration = Duration::from_secs(15 * 60);
/// What has less time left is not kept.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
/// Connections that are made at once.
const AT_ONCE: usize = 8;
/// Of them, one tenant's: its database may hang.
const AT_ONCE_FOR_A_TENANT: usize = 2;

/// How many connections may wait for a session, and how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
    /// In all; 0: none.
    pub max: usize,
    /// Of one tenant.
    pub max_per_tenant: usize,
    /// How long one waits. Where sessions come less often than that, none does.
    pub idle_timeout: Duration,
    /// How old its database's word may be, of whose it is, for a session to take one unasked.
    pub check_after: Duration,
    /// How old a connection may be that waits for another session when one has left it; `None`: it
    /// is closed.
    pub reuse: Option<Duration>,
}

/// All connections that wait, and the account of who comes for them.
#[derive(Debug)]
pub(crate) struct Pool {
    settings: &'static PoolSettings,
    lessor: Lessor,
    dead_peer_timeout: Duration,
    runtime: Handle,
    all: Arc<Semaphore>,
    tenants: Tally<TenantId>,
    slots: Semaphore,
    making: Tally<TenantId>,
    shelves: Mutex<Shelves>,
    /// Databases that had no connection left.
    full: Mutex<FullDatabases>,
    /// Something will have waited in vain before the next sweep.
    due: Notify,
    /// Connections that are being made or let go.
    tasks: TaskTracker,
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

/// The place that a connection had at its database, for another. What it was leased with is given back
/// when this is dropped: that may take a connection as well.
#[derive(Debug)]
pub(crate) struct Room {
    _lease: Lease,
}

/// A connection that is being made, counted until it is, or is not.
struct Making {
    pool: &'static Pool,
    route: Arc<Route>,
    _of_tenant: TallyPermit<TenantId>,
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(shelf) = self.pool.lock().get(&self.route) {
            shelf.preparing = shelf.preparing.saturating_sub(1);
        }
    }
}

impl Pool {
    pub(crate) fn new(
        settings: &'static PoolSettings,
        dead_peer_timeout: Duration,
        lessor: Lessor,
        runtime: Handle,
    ) -> Pool {
        Pool {
            settings,
            dead_peer_timeout,
            lessor,
            runtime,
            all: Arc::new(Semaphore::new(settings.max)),
            tenants: Tally::new(Some(settings.max_per_tenant)),
            slots: Semaphore::new(AT_ONCE),
            making: Tally::new(Some(AT_ONCE_FOR_A_TENANT)),
            shelves: Mutex::default(),
            full: Mutex::default(),
            due: Notify::new(),
            tasks: TaskTracker::new(),
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
    pub(crate) async fn take(&'static self, route: &Arc<Route>) -> Option<(Lease, Attachment)> {
        if !self.makes() && !self.keeps() {
            return None;
        }
        while let Some(ready) = self.newest(route) {
            if time_left(&ready.lease.tend().0).is_zero() {
                count(PoolEvent::Expired);
                self.let_go(ready);
                continue;
            }
            let Ready { parked, lease, .. } = ready;
            match timeout(ANSWER_TIMEOUT, parked.resume(route, self.settings.check_after)).await {
                Ok(Ok(attachment)) => {
                    count(PoolEvent::Used);
                    return Some((lease, attachment));
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a connection did not wait for its session");
                    if error.ended_for_idling()
                        && let Some(shelf) = self.lock().get(route)
                    {
                        shelf.fruitless = Some(Instant::now() + FRUITLESS);
                    }
                }
                Err(_elapsed) => {
                    tracing::debug!("a connection that waited does not answer");
                    // Nor will the others there: they are not tried one after the other.
                    let gone = self.lock().clear(route);
                    for _ in &gone {
                        count(PoolEvent::Lost);
                    }
                }
            }
            count(PoolEvent::Lost);
        }
        count(PoolEvent::Missed);
        None
    }

    /// On its own, so that nothing is locked while it is tried.
    fn newest(&self, route: &Route) -> Option<Ready> {
        self.lock().newest(route, Instant::now())
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting()
    }

    /// A session of this route is served: has the next one made, if more are likely to come while it
    /// would wait.
    pub(crate) fn expect(&'static self, route: &Arc<Route>, registry: &Registry) {
        if !self.makes() {
            return;
        }
        let now = Instant::now();
        let idle = self.settings.idle_timeout;
        let is_full = self.full().is_remembered(route.tenant(), now, idle);
        let missing = {
            let mut shelves = self.lock();
            match is_of(&registry.snapshot(), route) {
                true => shelves.missing(route, now, idle, is_full),
                false => 0,
            }
        };
        for _ in 0..missing {
            if !self.begin(route, now) {
                return;
            }
        }
    }

    /// Begins to make one, if there is a place for it or what is there has waited in vain.
    fn begin(&'static self, route: &Arc<Route>, now: Instant) -> bool {
        let tenant = route.tenant().id();
        let Some(of_tenant) = self.making.count(tenant) else { return false };
        let Some(places) = self.places(tenant, |shelves, full| shelves.overdue(now, full)) else {
            return false;
        };
        let mut shelves = self.lock();
        let Some(shelf) = shelves.get(route) else { return false };
        shelf.preparing += 1;
        drop(shelves);
        let making = Making { pool: self, route: Arc::clone(route), _of_tenant: of_tenant };
        self.tasks.spawn_on(self.prepare(making, places), &self.runtime);
        true
    }

    /// A place for one more, if need be that of another, which goes.
    fn places(
        &'static self,
        tenant: &TenantId,
        other: impl FnOnce(&mut Shelves, Full<'_>) -> Option<Ready>,
    ) -> Option<Places> {
        match self.free_places(tenant) {
            Ok(places) => Some(places),
            Err(full) => {
                let other = other(&mut self.lock(), full)?;
                count(PoolEvent::Expired);
                self.let_go(other);
                self.free_places(tenant).ok()
            }
        }
    }

    fn free_places<'t>(&'static self, tenant: &'t TenantId) -> Result<Places, Full<'t>> {
        let own = self.tenants.count(tenant).ok_or(Full::Of(tenant))?;
        let all = Arc::clone(&self.all).try_acquire_owned().map_err(|_full| Full::InAll)?;
        Ok(Places::new(all, own))
    }

    async fn prepare(&'static self, making: Making, places: Places) {
        let Ok(_slot) = self.slots.acquire().await else { return };
        let route = &making.route;
        if self.lock().get(route).is_none() {
            // A reload or a stop has cleared its shelf away.
            return;
        }
        let began = Instant::now();
        let made = match timeout(PREPARE_TIMEOUT, self.make(route)).await {
            Ok(made) => made,
            Err(_elapsed) => Err(NotPrepared::Timeout),
        };
        let (lease, parked) = match made {
            Ok(made) => made,
            Err(error) => {
                count(PoolEvent::Failed);
                tracing::debug!(%error, tenant = %route.tenant().id(), "no connection was made ahead");
                let (now, idle) = (Instant::now(), self.settings.idle_timeout);
                if let Some(whose) = error.fullness() {
                    self.is_full(route.tenant(), whose);
                }
                return self.lock().failed(route.tenant().id(), now + idle);
            }
        };
        let (role, pid) = (Arc::clone(lease.credential().name()), parked.pid());
        let now = Instant::now();
        let until = now + self.settings.idle_timeout.min(time_left(&lease.tend().0));
        let ready = Ready { parked, lease, since: now, until, places };
        let waits = self.shelve(ready, |shelves| {
            shelves.took(now - began);
            shelves.get(route)
        });
        if waits {
            tracing::debug!(tenant = %route.tenant().id(), role = &*role, pid, "a connection waits for a session");
        }
    }

    /// Puts one on its shelf; if there is none, lets it go.
    fn shelve(
        &'static self,
        ready: Ready,
        shelf: impl FnOnce(&mut Shelves) -> Option<&mut Shelf>,
    ) -> bool {
        let until = ready.until;
        let mut shelves = self.lock();
        let Some(shelf) = shelf(&mut shelves) else {
            drop(shelves);
            self.let_go(ready);
            return false;
        };
        shelf.ready.push(ready);
        if shelves.put_forward(until) {
            self.due.notify_one();
        }
        true
    }

    /// As a session does it: the lease and the dial at once, then the login.
    async fn make(&self, route: &Arc<Route>) -> Result<(Lease, Parked), NotPrepared> {
        let lease = async { Ok::<_, NotPrepared>(self.lessor.lease(route.request()).await?) };
        let dial = async { Ok(backend::dial(route, self.dead_peer_timeout).await?) };
        let (lease, connection) = tokio::try_join!(lease, dial)?;
        let attachment = connection.log_in(lease.credential()).await?;
        Ok((lease, attachment.park()?))
    }

    /// Whether a session may try to get a connection: not where its database said a moment ago that it has
    /// none, nothing here could make room for it, and another one of its tenant's has just tried.
    pub(crate) fn may_try(&self, tenant: &Tenant) -> bool {
        let judged = self.full().may_try(tenant, Instant::now());
        judged.map_or_else(|whose| self.lock().waits_at(tenant, whose), |()| true)
    }

    /// A session has got a connection of its own, in a place that was free or that was made for it.
    pub(crate) fn has_got_in(&self, tenant: &Tenant, in_place_of_another: bool) {
        match in_place_of_another {
            true => self.full().has_a_place(tenant),
            false => self.full().is_over(tenant),
        }
    }

    /// A session of the tenant's has ended.
    pub(crate) fn has_left(&self, tenant: &Tenant) {
        self.full().has_a_place(tenant);
    }

    /// A database said that it has no connection left. For a while none is made ahead there.
    pub(crate) fn is_full(&self, tenant: &Tenant, whose: Fullness) {
        self.full().said(tenant, whose, Instant::now(), self.settings.idle_timeout);
    }

    /// A database has no connection left for a session. Gives up one that waits there, the tenant's own
    /// before that of another one on the same server, and returns when its place is free; `None`: there was
    /// none.
    pub(crate) async fn make_room(&'static self, tenant: &Tenant, whose: Fullness) -> Option<Room> {
        let ready = self.lock().oldest_at(tenant, whose)?;
        count(PoolEvent::Yielded);
        Some(Room { _lease: part_with(ready).await })
    }

    fn full(&self) -> MutexGuard<'_, FullDatabases> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
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
        let wait = |past: Past| {
            let left = max_age.saturating_sub(past.made.elapsed());
            self.settings.idle_timeout.min(left).min(time_left(&lease.tend().0))
        };
        // Before anything is done for it, or goes for it.
        if self.shelf_for(route, &mut self.lock(), wait(used.past), registry).is_none() {
            return;
        }
        let places =
            self.places(route.tenant().id(), |shelves, full| shelves.oldest_of_others(route, full));
        let Some(places) = places else { return };
        let attachment = match used.reset(route).await {
            Ok(attachment) => attachment,
            Err(error) => {
                count(PoolEvent::Unclean);
                tracing::debug!(%error, tenant = %route.tenant().id(), "a connection is not kept");
                return;
            }
        };
        let wait = wait(attachment.past);
        let parked = match attachment.park() {
            Ok(parked) => parked,
            Err(error) => return tracing::warn!(%error, "a connection cannot leave its event loop"),
        };
        let now = Instant::now();
        let ready = Ready { parked, lease, since: now, until: now + wait, places };
        self.shelve(ready, |shelves| self.shelf_for(route, shelves, wait, registry));
    }

    /// A shelf for what a session leaves, if it may wait there for long enough.
    fn shelf_for<'s>(
        &self,
        route: &Arc<Route>,
        shelves: &'s mut Shelves,
        wait: Duration,
        registry: &Registry,
    ) -> Option<&'s mut Shelf> {
        let fits = wait >= SHORTEST_WAIT && is_of(&registry.snapshot(), route);
        fits.then(|| shelves.shelf(route, Instant::now(), self.settings.idle_timeout))?
    }

    /// Lets go of what has waited in vain, for as long as the process lives.
    pub(crate) async fn keep(&'static self) {
        loop {
            let due = self.due.notified();
            let (gone, next) = self.lock().sweep(Instant::now(), self.settings.idle_timeout);
            for ready in gone {
                count(PoolEvent::Expired);
                self.let_go(ready);
            }
            match next {
                None => due.await,
                Some(next) => {
                    tokio::select! {
                        () = sleep_until(next) => {}
                        () = due => {}
                    }
                }
            }
        }
    }

    /// Lets go of whatever is not of a tenant as the registry has it now.
    pub(crate) fn keep_only(&'static self, registry: &Snapshot) {
        let gone = self.lock().keep_only(|route| is_of(registry, route));
        for ready in gone {
            count(PoolEvent::Withdrawn);
            self.let_go(ready);
        }
    }

    /// Lets go of everything and keeps nothing more: pgsilo is stopping.
    pub(crate) fn close(&'static self) {
        let gone = self.lock().close();
        gone.into_iter().for_each(|ready| self.let_go(ready));
        self.tasks.close();
    }

    /// Waits, once it is [closed](Pool::close), until what was being made or let go is gone.
    pub(crate) async fn closed(&self, patience: Duration) {
        let _bounded = timeout(patience, self.tasks.wait()).await;
    }

    /// Frees the place at once, says goodbye to the database, closes, and gives the lease back.
    fn let_go(&'static self, ready: Ready) {
        let part = part_with(ready);
        self.tasks.spawn_on(async move { drop(part.await) }, &self.runtime);
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says goodbye to a database; the lease is left.
fn part_with(ready: Ready) -> impl Future<Output = Lease> {
    let Ready { parked, lease, places, .. } = ready;
    drop(places);
    async move {
        let _best_effort = timeout(GOODBYE, parked.say_goodbye()).await;
        lease
    }
}

impl NotPrepared {
    fn fullness(&self) -> Option<Fullness> {
        match self {
            NotPrepared::Lease(error) => error.fullness(),
            NotPrepared::Login(error) => error.fullness(),
            NotPrepared::Dial(_) | NotPrepared::Park(_) | NotPrepared::Timeout => None,
        }
    }
}

/// How long a connection may go on waiting, as far as its lease goes: nobody renews one that waits, and
/// a session that takes it should not be told at once that it ends.
fn time_left(end: &LeaseEnd) -> Duration {
    let least = end.duration / if end.is_final { 2 } else { 3 };
    end.at.remaining().saturating_sub(least)
}

/// Whether a route's tenant is still as the registry has it.
fn is_of(registry: &Snapshot, route: &Route) -> bool {
    let tenant = registry.tenant(route.tenant().id());
    tenant.is_some_and(|tenant| Arc::ptr_eq(&tenant, route.tenant()))
}

fn count(event: PoolEvent) {
    metrics::WARM.of(event).increment(1);
}
