//! Which server of a cluster takes writes, where it has several.
//!
//! What servers say of themselves is collected here, from each login and from those who watch
//! (`cluster_watch.rs`). A server that takes writes says on which timeline. Each promotion begins a
//! higher one, so the server with the highest that was ever seen is the primary, and one that says
//! it is on a lower was overtaken: it lives on, cut off from the others or thawed, and what is
//! written there is lost. No session is let in there any more, and those that are there end.
//!
//! What was seen is kept for as long as the process runs, or until the registry gives the cluster other
//! servers only. What a server says that is not among the cluster's any more counts for nothing, and
//! sessions there end. A server that only says that it is on the same timeline as the primary that is
//! known is not believed: two names of one server say that, and so do two servers of which one was made
//! a primary by force.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use pgsilo_core::registry::{Cluster, ClusterKey, Host, Snapshot};
use pgsilo_core::tenant::TenantId;
use pgsilo_core::timeline::{Standing, Timeline};
use tokio::sync::{OnceCell, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics;

/// For how long what was seen of a server says something of it.
const RECENT: Duration = Duration::from_secs(3);
/// How long who only reads stays away from a standby that has not let one in.
const OF_NO_USE: Duration = Duration::from_secs(5);
/// How long after the watch has begun sessions wait for the first look at all servers.
pub(crate) const FIRST_LOOK: Duration = Duration::from_millis(1_500);

/// All clusters of several servers that were asked for.
#[derive(Debug)]
pub(crate) struct Clusters {
    known: DashMap<ClusterKey, Arc<ClusterState>>,
    failovers: Arc<watch::Sender<u64>>,
}

/// What is known of the servers of one.
#[derive(Debug)]
pub(crate) struct ClusterState {
    sights: Mutex<Sights>,
    /// Raised when something was seen.
    seen: watch::Sender<u64>,
    failovers: Arc<watch::Sender<u64>>,
    /// Which standby is the next one's.
    turns: AtomicUsize,
}

/// Which of a cluster's servers a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The one that takes writes.
    Primary,
    /// One that replays; without any, the one that takes writes.
    Standby,
}

#[derive(Debug)]
struct Sights {
    /// As the registry has it.
    cluster: Arc<Cluster>,
    /// Its servers.
    hosts: HashSet<Host>,
    /// It has one server now, or none: nobody is to look at it any more.
    is_gone: bool,
    primary: Option<Host>,
    /// The highest on which each server took writes.
    timelines: HashMap<Host, Timeline>,
    /// How often another server has become the primary.
    failovers: u64,
    servers: HashMap<Host, (Sight, Instant)>,
    /// Servers that were told of as overtaken.
    overtaken: HashSet<Host>,
    /// Standbys that have not let in who only reads, and when that was.
    of_no_use: HashMap<Host, Instant>,
    /// Cancelled when another server has become the primary.
    until_failover: CancellationToken,
    /// Once there has been a failover: for which tenants OpenBAO was told to connect anew. The
    /// connections of others may still lead to the primary before.
    reconnected: Option<HashMap<TenantId, Reconnected>>,
    last_used: Instant,
    watched_since: Option<Instant>,
    /// Held by each [`Reign`], too.
    held: Arc<()>,
}

/// Set once OpenBAO has been told; who comes meanwhile waits for that.
pub(crate) type Reconnected = Arc<OnceCell<()>>;

/// What was last seen of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    Primary,
    Standby,
    /// It did not answer.
    Nothing,
    /// It answered something else.
    Unknown,
}

/// A server says that it takes writes, and another was promoted after it, or is the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overtaken {
    /// The cluster's timeline.
    pub(crate) newest: Timeline,
}

/// One server of several, as a session has it.
#[derive(Clone, Debug)]
pub(crate) struct Reign {
    state: Arc<ClusterState>,
    host: Box<Host>,
    of: ReignOf,
    _held: Arc<()>,
}

#[derive(Clone, Copy, Debug)]
enum ReignOf {
    /// The primary of that timeline.
    Primary(Timeline),
    /// A standby, after so many failovers: it may have followed the primary before.
    Standby(u64),
}

impl Reign {
    /// Of which cluster.
    pub(crate) fn cluster(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// Whether another server has been promoted since, or it is none of the cluster's any more.
    pub(crate) fn is_over(&self) -> bool {
        let sights = self.state.sights();
        let is_overtaken = match self.of {
            ReignOf::Primary(timeline) => Some(timeline) < sights.newest(),
            ReignOf::Standby(failovers) => failovers != sights.failovers,
        };
        is_overtaken || !sights.hosts.contains(&self.host)
    }
}

impl Clusters {
    pub(crate) fn new() -> Clusters {
        Clusters { known: DashMap::new(), failovers: Arc::new(watch::Sender::new(0)) }
    }

    /// What is known of the servers of a cluster; `None` where there is one only.
    pub(crate) fn of(&self, cluster: &Arc<Cluster>) -> Option<Arc<ClusterState>> {
        if !cluster.has_several() {
            return None;
        }
        let new = || Arc::new(ClusterState::new(cluster, Arc::clone(&self.failovers)));
        let state = Arc::clone(&self.known.entry(cluster.key().clone()).or_insert_with(new));
        state.sights().last_used = Instant::now();
        Some(state)
    }

    /// The registry says this of clusters now. What was seen of one is kept, also while it has one
    /// server: sessions may stay there that began before.
    pub(crate) fn follow(&self, now: &Snapshot) {
        for state in &self.known {
            let ClusterKey::Named(name) = state.key() else { continue };
            match now.cluster(name) {
                Some(cluster) => state.follow(cluster),
                // Its tenants' sessions end with it.
                None => state.end(),
            }
        }
    }

    /// Whether a session that began while its cluster had one server may be at one that was overtaken:
    /// the cluster has several now, and has failed over.
    pub(crate) fn may_have_left(&self, cluster: &Cluster) -> bool {
        let state = self.known.get(cluster.key());
        state.is_some_and(|state| {
            let sights = state.sights();
            !sights.is_gone && sights.failovers > 0
        })
    }

    /// Told whenever another server has become a cluster's primary.
    pub(crate) fn failovers(&self) -> watch::Receiver<u64> {
        self.failovers.subscribe()
    }
}

impl ClusterState {
    fn new(cluster: &Arc<Cluster>, failovers: Arc<watch::Sender<u64>>) -> ClusterState {
        let sights = Sights {
            cluster: Arc::clone(cluster),
            hosts: hosts_of(cluster),
            is_gone: false,
            primary: None,
            timelines: HashMap::new(),
            failovers: 0,
            servers: HashMap::new(),
            overtaken: HashSet::new(),
            of_no_use: HashMap::new(),
            until_failover: CancellationToken::new(),
            reconnected: None,
            last_used: Instant::now(),
            watched_since: None,
            held: Arc::default(),
        };
        let (sights, seen) = (Mutex::new(sights), watch::Sender::new(0));
        ClusterState { sights, seen, failovers, turns: AtomicUsize::new(0) }
    }

    /// The registry says this of it now. A cluster that has none of its servers any more is another one.
    fn follow(&self, cluster: &Arc<Cluster>) {
        let mut sights = self.sights();
        let is_same = *sights.cluster == **cluster;
        sights.cluster = Arc::clone(cluster);
        sights.is_gone = !cluster.has_several();
        if is_same {
            return;
        }
        let hosts = hosts_of(cluster);
        let loses_primary = sights.primary.as_ref().is_some_and(|primary| !hosts.contains(primary));
        if loses_primary {
            sights.primary = None;
            sights.fail_over();
        }
        // What those have said that are gone counts for nothing.
        sights.timelines.retain(|host, _| hosts.contains(host));
        sights.servers.retain(|host, _| hosts.contains(host));
        sights.overtaken.retain(|host| hosts.contains(host));
        sights.of_no_use.retain(|host, _| hosts.contains(host));
        sights.hosts = hosts;
        drop(sights);
        self.seen.send_modify(|seen| *seen += 1);
        self.failovers.send_modify(|failovers| *failovers += 1);
    }

    fn end(&self) {
        self.sights().is_gone = true;
    }

    /// As the registry has it.
    pub(crate) fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&self.sights().cluster)
    }

    /// Since when it is watched, and whether that is to begin now: nobody has watched it yet.
    pub(crate) fn watched_since(&self) -> (Instant, bool) {
        let mut sights = self.sights();
        let is_new = sights.watched_since.is_none();
        (*sights.watched_since.get_or_insert_with(Instant::now), is_new)
    }

    /// Whether nobody is to watch it any more: it is gone, or no session is there, nor has any wanted to
    /// go there within `idle`. What was seen is kept.
    pub(crate) fn ends_watch(&self, idle: Duration) -> bool {
        let mut sights = self.sights();
        let is_unused = Arc::strong_count(&sights.held) == 1 && sights.last_used.elapsed() > idle;
        let ends = sights.is_gone || is_unused;
        if ends {
            sights.watched_since = None;
        }
        ends
    }

    /// Its servers, by their numbers among its endpoints, in the order in which they are tried: the
    /// primary, then those of which nothing is known, then those that were seen to be something else.
    /// Before them, for who only reads, standbys in turn.
    pub(crate) fn order(&self, cluster: &Cluster, wanted: Wanted) -> Vec<usize> {
        let sights = self.sights();
        let rank = |number: &usize| {
            let host = cluster.endpoints[*number].comparable();
            let recent = sights.servers.get(&host).filter(|(_, at)| at.elapsed() < RECENT);
            let is_primary = sights.primary.as_ref() == Some(&host);
            match recent.map(|(sight, _)| *sight) {
                Some(Sight::Standby) if wanted == Wanted::Standby && sights.may_read(&host) => 0_u8,
                Some(Sight::Nothing) => 4,
                Some(Sight::Standby) => 3,
                _ if sights.overtaken.contains(&host) => 3,
                Some(Sight::Primary | Sight::Unknown) | None => 1 + u8::from(!is_primary),
            }
        };
        let mut order: Vec<usize> = (0..cluster.endpoints.len()).collect();
        if wanted == Wanted::Standby {
            let first = self.turns.fetch_add(1, Ordering::Relaxed) % order.len().max(1);
            order.rotate_left(first);
        }
        order.sort_by_key(rank);
        order
    }

    /// Whether a server is taken for a standby where who only reads may be.
    pub(crate) fn may_read(&self, host: &Host) -> bool {
        self.sights().may_read(&host.comparable())
    }

    /// A standby that who only reads is let in at; `None`: it replays another timeline than the primary
    /// writes, or says what is older than that.
    pub(crate) fn standby(self: &Arc<Self>, host: &Host, on: Timeline) -> Option<Reign> {
        let (state, sights) = (Arc::clone(self), self.sights());
        let host = host.comparable();
        if !sights.may_read(&host) || sights.newest().is_none_or(|newest| on < newest) {
            return None;
        }
        let (of, _held) = (ReignOf::Standby(sights.failovers), Arc::clone(&sights.held));
        Some(Reign { state, host: Box::new(host), of, _held })
    }

    /// A standby did not let in who only reads: it is left alone for a moment.
    pub(crate) fn was_no_use(&self, host: &Host) {
        self.sights().of_no_use.insert(host.comparable(), Instant::now());
    }

    /// Whether its primary is known, and has lately said that it is.
    pub(crate) fn is_settled(&self) -> bool {
        self.sights().is_settled()
    }

    /// Waits until each of its servers was looked at.
    pub(crate) async fn looked_at(&self) {
        let mut seen = self.seen.subscribe();
        while !self.sights().has_seen_all() && seen.changed().await.is_ok() {}
    }

    /// Cancelled when another server has become the primary.
    pub(crate) fn until_failover(&self) -> CancellationToken {
        self.sights().until_failover.clone()
    }

    /// Whether OpenBAO was told since the last failover to connect anew for this tenant; `None`: there
    /// was none.
    pub(crate) fn reconnected(&self, tenant: &TenantId) -> Option<Reconnected> {
        let mut sights = self.sights();
        sights.reconnected.as_mut().map(|told| Arc::clone(told.entry(tenant.clone()).or_default()))
    }

    /// OpenBAO did not answer for a tenant: its connection may lead to a server that is no more.
    pub(crate) fn was_stuck(&self, tenant: &TenantId) {
        self.sights().reconnected.get_or_insert_default().remove(tenant);
    }

    /// A server has said what it is. The primary that it is, if it is one.
    ///
    /// # Errors
    /// When it takes writes, and another server is the primary.
    pub(crate) fn saw(
        self: &Arc<Self>,
        host: &Host,
        standing: Standing,
    ) -> Result<Option<Reign>, Overtaken> {
        match standing {
            Standing::Standby => {
                self.saw_something(host, Sight::Standby);
                Ok(None)
            }
            Standing::Primary(timeline) => {
                self.saw_primary(host, timeline)?;
                let (state, _held) = (Arc::clone(self), Arc::clone(&self.sights().held));
                let of = ReignOf::Primary(timeline);
                Ok(Some(Reign { state, host: Box::new(host.comparable()), of, _held }))
            }
        }
    }

    /// A server did not say anything.
    pub(crate) fn saw_nothing(&self, host: &Host) {
        self.saw_something(host, Sight::Nothing);
    }

    /// A server answers, and does not say what it is.
    pub(crate) fn saw_answer(&self, host: &Host) {
        let host = host.comparable();
        let mut sights = self.sights();
        if sights.hosts.contains(&host) {
            sights.servers.entry(host).or_insert((Sight::Unknown, Instant::now()));
        }
        drop(sights);
        self.seen.send_modify(|seen| *seen += 1);
    }

    fn saw_something(&self, host: &Host, sight: Sight) {
        let host = host.comparable();
        let mut sights = self.sights();
        if sights.hosts.contains(&host) {
            if sight == Sight::Standby {
                sights.overtaken.remove(&host);
            }
            sights.servers.insert(host, (sight, Instant::now()));
        }
        drop(sights);
        self.seen.send_modify(|seen| *seen += 1);
    }

    fn saw_primary(&self, host: &Host, timeline: Timeline) -> Result<(), Overtaken> {
        let host = host.comparable();
        let mut sights = self.sights();
        // The first that was seen is no news.
        let newest = sights.newest().unwrap_or(timeline);
        if !sights.hosts.contains(&host) {
            return Err(Overtaken { newest });
        }
        let is_held = sights.primary.as_ref() != Some(&host) && sights.is_settled();
        if timeline < newest || (timeline == newest && is_held) {
            let is_news = sights.overtaken.insert(host.clone());
            sights.servers.insert(host.clone(), (Sight::Nothing, Instant::now()));
            let cluster = Arc::clone(&sights.cluster);
            drop(sights);
            if is_news && timeline < newest {
                tracing::error!(
                    cluster = %cluster, server = %host, %timeline, %newest,
                    "a server takes writes, and another one is the cluster's primary: \
                     nobody is let in there; stop it"
                );
            } else if is_news {
                tracing::warn!(
                    cluster = %cluster, server = %host, %timeline,
                    "two servers take writes on one timeline: the one that was seen first is used; are \
                     they two names of one server?"
                );
            }
            self.seen.send_modify(|seen| *seen += 1);
            return Err(Overtaken { newest });
        }
        // Until all were looked at, the order in which they were says nothing.
        let is_first_look = sights.watched_since.is_some_and(|at| at.elapsed() < FIRST_LOOK)
            && !sights.has_seen_all();
        sights.timelines.insert(host.clone(), timeline);
        sights.overtaken.remove(&host);
        sights.servers.insert(host.clone(), (Sight::Primary, Instant::now()));
        sights.primary = Some(host.clone());
        // Another name of the same is no news.
        let is_newer = timeline > newest;
        let is_failover = is_newer && !is_first_look;
        if is_failover {
            sights.fail_over();
        }
        let cluster = Arc::clone(&sights.cluster);
        drop(sights);
        self.seen.send_modify(|seen| *seen += 1);
        if is_failover {
            tracing::warn!(cluster = %cluster, primary = %host, %timeline, "the cluster has failed over");
            metrics::FAILOVERS.increment(1);
        }
        if is_newer {
            self.failovers.send_modify(|failovers| *failovers += 1);
        }
        Ok(())
    }

    fn sights(&self) -> MutexGuard<'_, Sights> {
        self.sights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sights {
    /// The highest timeline on which a server took writes, if one was seen.
    fn newest(&self) -> Option<Timeline> {
        self.timelines.values().max().copied()
    }

    /// Whether its primary is known, and has lately said that it is.
    fn is_settled(&self) -> bool {
        let primary = self.primary.as_ref().and_then(|host| self.servers.get(host));
        primary.is_some_and(|(sight, at)| *sight == Sight::Primary && at.elapsed() < RECENT)
    }

    /// Whether a server, which is watched, was lately seen to be a standby, and has not been of no use
    /// since.
    fn may_read(&self, host: &Host) -> bool {
        let seen = self.servers.get(host).filter(|(_, at)| at.elapsed() < RECENT);
        let was_no_use = self.of_no_use.get(host).is_some_and(|at| at.elapsed() < OF_NO_USE);
        let is_standby = seen.is_some_and(|(sight, _)| *sight == Sight::Standby);
        self.watched_since.is_some() && is_standby && !was_no_use
    }

    /// Whether each of its servers was looked at.
    fn has_seen_all(&self) -> bool {
        self.hosts.iter().all(|host| self.servers.contains_key(host))
    }

    /// The primary before is it no more.
    fn fail_over(&mut self) {
        self.failovers += 1;
        self.reconnected = Some(HashMap::new());
        std::mem::take(&mut self.until_failover).cancel();
    }
}

fn hosts_of(cluster: &Cluster) -> HashSet<Host> {
    cluster.endpoints.iter().map(Host::comparable).collect()
}

#[cfg(test)]
mod tests;
