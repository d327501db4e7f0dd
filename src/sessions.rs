//! Who is here: each running session, found by its tenant, and the places that sessions have.
//!
//! A session is in the directory from its splice to its end. What may end it wakes it by name of
//! its tenant, so that a change of one tenant costs the sessions of others nothing; how far it has
//! come is read here without asking it. But for its lease and its timer, nothing else wakes a
//! session that has nothing to do: its tenant's entry, the list of those denied, a stop, a machine
//! that was suspended all come this way. A place is taken when a session is routed, before anything
//! is leased for it, and given back when it ends. No lock is held across an await.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::{Cluster, ClusterKey};
use pgsilo_core::tenant::TenantId;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use crate::audit::{SessionId, Trail};
use crate::limits::{Pace, Rate};
use crate::metrics::{self, Activity};
use crate::splice::Progress;

/// All sessions.
#[derive(Debug)]
pub(crate) struct Sessions {
    tenants: DashMap<TenantId, OfTenant>,
    /// Places taken in clusters that have a name, by that.
    clusters: DashMap<Arc<str>, usize>,
    /// When each tenant's next session may begin.
    pace: Pace<TenantId>,
    /// When each tenant's next refusal may be told.
    refusals: Pace<TenantId>,
    /// Places taken, and how many there are.
    places: AtomicUsize,
    max: usize,
}

/// The sessions of one tenant. None is kept for a tenant of which no place is taken.
#[derive(Debug, Default)]
struct OfTenant {
    /// Places taken. Each running session has one, see [`Running`].
    places: usize,
    running: HashMap<SessionId, Arc<Session>>,
}

/// One running session.
#[derive(Debug)]
pub(crate) struct Session {
    /// What was learned of it at its login; it says no more.
    pub(crate) trail: Trail,
    pub(crate) began: BootTime,
    pub(crate) progress: Progress,
    /// Something that may end it has changed.
    changed: Notify,
}

/// A session's share of the limits on all sessions and on its tenant's, released when it is
/// dropped.
#[derive(Debug)]
pub(crate) struct SessionPermit {
    sessions: &'static Sessions,
    tenant: TenantId,
    cluster: Option<Arc<str>>,
}

/// A session that is in the directory until this is dropped.
#[derive(Debug)]
pub(crate) struct Running<'p> {
    permit: &'p SessionPermit,
    session: Arc<Session>,
}

/// Which places are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// All.
    All,
    /// Those of the tenant.
    Tenant,
    /// Those of the cluster that its database is in.
    Cluster,
}

/// How many sessions do what.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Census {
    by_activity: [usize; Activity::ALL.len()],
    /// How many are to end, by a time that is known.
    pub(crate) ending: usize,
}

impl Census {
    /// How many do this.
    pub(crate) fn of(&self, activity: Activity) -> usize {
        self.by_activity[activity as usize]
    }

    /// How many are in a transaction, or in a request that is not answered.
    pub(crate) fn busy(&self) -> usize {
        self.by_activity.iter().sum::<usize>() - self.of(Activity::Idle)
    }
}

impl Sessions {
    pub(crate) fn new(max: usize) -> Sessions {
        Sessions {
            tenants: DashMap::new(),
            clusters: DashMap::new(),
            pace: Pace::new(),
            refusals: Pace::new(),
            places: AtomicUsize::new(0),
            max,
        }
    }

    /// A place for a session of a tenant that may have so many, in a cluster that may; `None`: as
    /// many as it likes.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn admit(
        &'static self,
        tenant: &TenantId,
        bound: Option<usize>,
        cluster: &Cluster,
    ) -> Result<SessionPermit, Full> {
        let one_more = |taken: usize| (taken < self.max).then_some(taken + 1);
        self.places
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map_err(|_taken| Full::All)?;
        let admitted = {
            let mut of_tenant = self.tenants.entry(tenant.clone()).or_default();
            let fits = bound.is_none_or(|bound| of_tenant.places < bound);
            of_tenant.places += usize::from(fits);
            fits
        };
        if !admitted {
            self.places.fetch_sub(1, Ordering::Relaxed);
            self.forget_if_empty(tenant);
            return Err(Full::Tenant);
        }
        let mut permit = SessionPermit { sessions: self, tenant: tenant.clone(), cluster: None };
        if let ClusterKey::Named(name) = cluster.key() {
            let mut places = self.clusters.entry(Arc::clone(name)).or_default();
            if cluster.max_sessions.is_some_and(|bound| *places >= bound) {
                drop(places);
                return Err(Full::Cluster);
            }
            *places += 1;
            permit.cluster = Some(Arc::clone(name));
        }
        Ok(permit)
    }

    /// When a session of the tenant may begin, whose turn is taken; `None`: not in time. It is now
    /// where no other tenant is here.
    pub(crate) fn turn(
        &self,
        tenant: &TenantId,
        rate: Rate,
        patience: Duration,
    ) -> Option<Instant> {
        let now = Instant::now();
        match self.is_shared() {
            true => self.pace.turn(tenant, rate, now, patience),
            false => Some(now),
        }
    }

    /// When one for whom there is no place may be told: who is told at once comes again at once, and
    /// has another token verified. At `latest` then, whatever others wait for.
    pub(crate) fn refusal(&self, tenant: &TenantId, rate: Rate, latest: Duration) -> Instant {
        let now = Instant::now();
        match self.is_shared() {
            true => self.refusals.turn(tenant, rate, now, latest).unwrap_or(now + latest),
            false => now,
        }
    }

    /// Whether several tenants have sessions here.
    fn is_shared(&self) -> bool {
        self.tenants.len() > 1
    }

    /// Has the sessions of a tenant look whether they must end.
    pub(crate) fn wake(&self, tenant: &TenantId) {
        if let Some(of_tenant) = self.tenants.get(tenant) {
            of_tenant.wake();
        }
    }

    /// Has all sessions look whether they must end.
    pub(crate) fn wake_all(&self) {
        for of_tenant in &self.tenants {
            of_tenant.wake();
        }
    }

    /// What those that run do, in one walk.
    pub(crate) fn census(&self) -> Census {
        let mut census = Census::default();
        for of_tenant in &self.tenants {
            for session in of_tenant.running.values() {
                census.by_activity[session.progress.activity() as usize] += 1;
                census.ending += usize::from(session.progress.termination().is_some());
            }
        }
        census
    }

    fn forget_if_empty(&self, tenant: &TenantId) {
        self.tenants.remove_if(tenant, |_, of_tenant| of_tenant.places == 0);
    }
}

impl OfTenant {
    fn wake(&self) {
        for session in self.running.values() {
            session.changed.notify_waiters();
        }
    }
}

impl Session {
    /// Resolves when anything has changed that may end this session: its tenant's entry, the list
    /// of those denied, the authorities of clients' certificates, that pgsilo stops, or the time,
    /// by a suspension of the machine. Made before one looks, it misses nothing.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

impl SessionPermit {
    /// Puts its session in the directory.
    pub(crate) fn begin(&self, trail: Trail) -> Running<'_> {
        let session = Arc::new(Session {
            trail,
            began: BootTime::now(),
            progress: Progress::default(),
            changed: Notify::new(),
        });
        if let Some(mut of_tenant) = self.sessions.tenants.get_mut(&self.tenant) {
            of_tenant.running.insert(session.trail.session, Arc::clone(&session));
        }
        metrics::SESSIONS_ACTIVE.increment();
        Running { permit: self, session }
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        self.sessions.places.fetch_sub(1, Ordering::Relaxed);
        if let Some(name) = &self.cluster {
            if let Some(mut places) = self.sessions.clusters.get_mut(name) {
                *places -= 1;
            }
            self.sessions.clusters.remove_if(name, |_, places| *places == 0);
        }
        if let Some(mut of_tenant) = self.sessions.tenants.get_mut(&self.tenant) {
            of_tenant.places -= 1;
        }
        self.sessions.forget_if_empty(&self.tenant);
    }
}

impl Deref for Running<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        metrics::SESSIONS_ACTIVE.decrement();
        let SessionPermit { sessions, tenant, .. } = self.permit;
        if let Some(mut of_tenant) = sessions.tenants.get_mut(tenant) {
            of_tenant.running.remove(&self.session.trail.session);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;
    use pgsilo_core::registry::Snapshot;

    use crate::registry::tests::{entry, read};

    use super::*;

    fn sessions(max: usize) -> &'static Sessions {
        Box::leak(Box::new(Sessions::new(max)))
    }

    /// A server without a name.
    fn alone() -> Arc<Cluster> {
        cluster_of(&read(&entry("acme")))
    }

    fn cluster_of(registry: &Snapshot) -> Arc<Cluster> {
        let tenant = registry.tenants().next().expect("a tenant");
        Arc::clone(&tenant.placement().cluster)
    }

    fn id(text: &str) -> TenantId {
        TenantId::parse(text).expect("an id")
    }

    #[test]
    fn session_permits_are_bounded_in_total_and_per_tenant_and_returned() {
        let sessions = sessions(4);
        let (acme, globex) = (id("acme"), id("globex"));
        let bound = Some(2);
        let first = sessions.admit(&acme, bound, &alone()).expect("a place");
        let _second = sessions.admit(&acme, bound, &alone()).expect("a place");
        assert_eq!(sessions.admit(&acme, bound, &alone()).err(), Some(Full::Tenant));
        let _of_its_own = sessions.admit(&acme, Some(3), &alone()).expect("a place");
        assert_eq!(sessions.admit(&acme, Some(3), &alone()).err(), Some(Full::Tenant));
        let _other = sessions.admit(&globex, bound, &alone()).expect("a place");
        assert_eq!(sessions.admit(&globex, None, &alone()).err(), Some(Full::All));
        drop(first);
        assert_eq!(sessions.admit(&acme, bound, &alone()).err(), Some(Full::Tenant));
        drop(sessions.admit(&globex, None, &alone()).expect("a place"));
        assert_eq!(sessions.places.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_clusters_places_are_those_of_all_its_tenants() {
        let bounded = |bound| {
            cluster_of(&read(&format!(
                "[[cluster]]\nname = \"eu\"\nendpoints = [\"db1\"]\nmax_sessions = {bound}\n\
                 tls = {{ mode = \"require\" }}\n[[tenant]]\nid = \"acme\"\n[tenant.placement]\n\
                 cluster = \"eu\"\ndbname = \"acme\"\n[tenant.lease]\nroles = {{ read-only = \"ro\" }}\n"
            )))
        };
        let (sessions, two) = (sessions(10), bounded(2));
        let (acme, globex) = (id("acme"), id("globex"));
        let first = sessions.admit(&acme, None, &two).expect("a place");
        let _second = sessions.admit(&globex, None, &two).expect("a place");
        assert_eq!(sessions.admit(&globex, None, &two).err(), Some(Full::Cluster));
        let _beside = sessions.admit(&globex, None, &alone()).expect("a place elsewhere");
        assert_eq!(sessions.places.load(Ordering::Relaxed), 3, "the one refused took none");
        // It was given more.
        let third = sessions.admit(&acme, None, &bounded(3)).expect("a place");
        drop((first, third));
        drop(sessions.admit(&acme, None, &two).expect("a place"));
        assert_eq!(sessions.clusters.len(), 1);
    }

    #[test]
    fn a_tenant_that_has_no_session_any_more_takes_no_memory() {
        let sessions = sessions(10);
        assert_eq!(sessions.admit(&id("none"), Some(0), &alone()).err(), Some(Full::Tenant));
        for number in 0..100 {
            let tenant = id(&format!("t{number}"));
            let place = sessions.admit(&tenant, None, &alone()).expect("a place");
            let running = place.begin(Trail::new(None));
            assert_eq!(sessions.tenants.len(), 1);
            drop(running);
            drop(place);
        }
        assert!(sessions.tenants.is_empty());
        assert_eq!(sessions.places.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_change_after_subscribing_is_not_missed() {
        let sessions = sessions(1);
        let place = sessions.admit(&id("acme"), None, &alone()).expect("a place");
        let running = place.begin(Trail::new(None));
        let mut changed = pin!(running.changed());
        sessions.wake(&id("acme"));
        assert!(changed.as_mut().now_or_never().is_some());
    }
}
