//! Looks at the servers of clusters that have several, about once a second: which takes writes, and on
//! which timeline. A primary that lives on after another was promoted tells nobody of that.
//!
//! It is done with a login of pgsilo's own, which can say that and no more: the cluster's `monitor` in
//! the registry. A cluster is watched from when a session first wants to go there until none has for
//! a while. Without a `monitor`, or without a login of pgsilo's own at OpenBAO, logins alone tell.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::backoff::Backoff;
use pgsilo_core::registry::{Cluster, Host, Monitor};
use pgsilo_registry::connection::Login;
use pgsilo_registry::observe::{ObserveError, Observer};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clusters::{ClusterState, Clusters, FIRST_LOOK};
use crate::lease::{Lessor, OwnLease};

/// Between two looks at a server.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same while no server is known to be the primary.
const UNSETTLED: Duration = Duration::from_millis(200);
/// How long a cluster that nobody is in is watched.
const IDLE: Duration = Duration::from_secs(600);
/// Between attempts to get a login.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// Between one login and another. A server that was overtaken may never know any.
const LAST_OTHER: Duration = Duration::from_secs(60);
/// How long a login that a server does not know is tried there before another is asked for.
const STRANGER: Duration = Duration::from_secs(3);
/// What the servers' other users see.
const NAME: &str = "pgsilo monitor";

/// Clusters, and those who watch them.
#[derive(Debug)]
pub(crate) struct ClusterWatch {
    clusters: Arc<Clusters>,
    lessor: Lessor,
    runtime: Handle,
    watching: TaskTracker,
    stopped: CancellationToken,
}

/// Looks at all servers of a cluster with one login.
struct Looking {
    // In the order in which they are dropped.
    _tasks: JoinSet<()>,
    lease: OwnLease,
    /// A server does not know the login.
    stranger: Arc<Notify>,
}

/// Why another login is needed.
enum Stop {
    /// This one ends.
    Ends,
    /// A server does not know it.
    Unknown,
    /// The registry says something else of the cluster.
    Changed,
}

impl ClusterWatch {
    pub(crate) fn new(clusters: Arc<Clusters>, lessor: Lessor, runtime: Handle) -> ClusterWatch {
        let (watching, stopped) = (TaskTracker::new(), CancellationToken::new());
        ClusterWatch { clusters, lessor, runtime, watching, stopped }
    }

    /// What is known of a cluster's servers; `None` where there is one only. The first who asks has
    /// them watched, and waits for a moment until each was looked at.
    pub(crate) async fn state(&self, cluster: &Arc<Cluster>) -> Option<Arc<ClusterState>> {
        let state = self.clusters.of(cluster)?;
        if self.lessor.own_authorization().is_none() || cluster.monitor.is_none() {
            return Some(state);
        }
        let (since, is_new) = state.watched_since();
        if is_new {
            let watch = watch(Arc::clone(&state), self.lessor.clone());
            let until_stopped = self.stopped.clone().run_until_cancelled_owned(watch);
            self.watching.spawn_on(until_stopped, &self.runtime);
        }
        let _in_time = timeout_at(since + FIRST_LOOK, state.looked_at()).await;
        Some(state)
    }

    /// Looks at no server any more, and hands back what was leased for that.
    pub(crate) async fn stop(&self) {
        self.stopped.cancel();
        self.watching.close();
        self.watching.wait().await;
    }
}

/// For as long as anybody goes there.
async fn watch(state: Arc<ClusterState>, lessor: Lessor) {
    let unused = async {
        while !state.ends_watch(IDLE) {
            sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        _never = look_on(&state, &lessor) => {}
        () = unused => {}
    }
}

async fn look_on(state: &Arc<ClusterState>, lessor: &Lessor) -> Infallible {
    // The first that is known at the primary, and the newest: a server that was promoted or overtaken
    // may know one and not the other.
    let mut looking: Vec<Looking> = Vec::new();
    let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
    let mut another = Backoff::new(FIRST_RETRY, LAST_OTHER);
    loop {
        let cluster = state.cluster();
        let Some(monitor) = &cluster.monitor else {
            looking.clear();
            changed(state, &cluster).await;
            continue;
        };
        let lease = match lessor.lease_own(&monitor.mount, &monitor.role).await {
            Ok(lease) => lease,
            Err(error) => {
                tracing::warn!(%cluster, %error, "no login to watch the cluster's servers with");
                if error.may_be_the_databases() {
                    connect_anew(&cluster, monitor, lessor).await;
                }
                sleep(retry.pause()).await;
                continue;
            }
        };
        retry.reset();
        looking.truncate(1);
        looking.push(Looking::begin(state, &cluster, monitor, lease));
        let began = Instant::now();
        let (first, newest) = (&looking[0], &looking[looking.len() - 1]);
        let stop = tokio::select! {
            () = first.lease.ending() => Stop::Ends,
            () = newest.lease.ending() => Stop::Ends,
            () = newest.stranger.notified() => Stop::Unknown,
            () = changed(state, &cluster) => Stop::Changed,
        };
        match stop {
            // It was made at a server that was overtaken, maybe.
            Stop::Unknown => connect_anew(&cluster, monitor, lessor).await,
            // Until another has begun, one that ends does.
            Stop::Ends => looking.retain(|looking| !looking.lease.is_ending()),
            Stop::Changed => looking.clear(),
        }
        if began.elapsed() > LAST_OTHER * 2 {
            another.reset();
        }
        if !matches!(stop, Stop::Changed) {
            sleep(another.pause()).await;
        }
    }
}

/// OpenBAO's connection may lead to a server that is the primary no more.
async fn connect_anew(cluster: &Cluster, monitor: &Monitor, lessor: &Lessor) {
    let Monitor { mount, connection, .. } = monitor;
    if let Err(error) = lessor.reconnect(mount, connection).await {
        tracing::warn!(%cluster, %error, "OpenBAO does not make its connection anew: allow {mount}/reset/{connection}");
    }
}

/// Resolves when the registry says something else of the cluster.
async fn changed(state: &ClusterState, watched: &Arc<Cluster>) {
    while *watched == state.cluster() {
        sleep(INTERVAL).await;
    }
}

impl Looking {
    fn begin(
        state: &Arc<ClusterState>,
        cluster: &Arc<Cluster>,
        monitor: &Monitor,
        lease: OwnLease,
    ) -> Looking {
        let login = lease.login();
        let stranger = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        for host in &cluster.endpoints {
            let look = Look {
                state: Arc::clone(state),
                cluster: Arc::clone(cluster),
                host: host.clone(),
                dbname: monitor.dbname.clone(),
                login: login.clone(),
                stranger: Arc::clone(&stranger),
            };
            tasks.spawn(look.again_and_again());
        }
        Looking { _tasks: tasks, lease, stranger }
    }
}

/// Looks at one server.
struct Look {
    state: Arc<ClusterState>,
    cluster: Arc<Cluster>,
    host: Host,
    dbname: String,
    login: Login,
    stranger: Arc<Notify>,
}

impl Look {
    async fn again_and_again(self) {
        let Look { state, cluster, host, dbname, login, stranger } = self;
        let (mut told, mut unknown_since) = (false, None::<Instant>);
        loop {
            let error = match Observer::connect(&cluster, &host, &dbname, &login, NAME).await {
                Ok(observer) => {
                    (told, unknown_since) = (false, None);
                    until_lost(&state, &host, &observer).await
                }
                Err(error) => error,
            };
            match error.is_answer() {
                true => state.saw_answer(&host),
                false => state.saw_nothing(&host),
            }
            // A login that was just made is known at a standby a moment later; or never, if that has
            // been promoted before.
            let is_unknown = error.is_of_login();
            let since = *unknown_since.get_or_insert_with(Instant::now);
            if !is_unknown {
                unknown_since = None;
            }
            let is_news = !is_unknown || since.elapsed() > STRANGER;
            if is_news && !told {
                told = true;
                tracing::warn!(%cluster, server = %host, %error, "a server of the cluster cannot be looked at");
            }
            if is_unknown && is_news {
                stranger.notify_one();
            }
            sleep(pause(&state)).await;
        }
    }
}

async fn until_lost(state: &Arc<ClusterState>, host: &Host, observer: &Observer) -> ObserveError {
    loop {
        match observer.look().await {
            // Told there, if it was overtaken.
            Ok(standing) => drop(state.saw(host, standing)),
            Err(error) => return error,
        }
        sleep(pause(state)).await;
    }
}

fn pause(state: &ClusterState) -> Duration {
    if state.is_settled() { INTERVAL } else { UNSETTLED }
}
