//! What every session of the process shares: made once at the start, never changed by a
//! session, alive as long as the process.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use pgsilo_core::clock::{BootTime, Suspensions};
use pgsilo_core::registry::Snapshot;
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_openbao::OpenBao;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::interval;

use crate::audit::{AuditSettings, OnLoss};
use crate::cancel::CancelKeys;
use crate::cluster_watch::ClusterWatch;
use crate::clusters::Clusters;
use crate::identity::Identity;
use crate::lease::{self, Lessor};
use crate::limits::{Limits, Slots, Tally};
use crate::listener::Listener;
use crate::log::LogQueue;
use crate::pool::{Pool, PoolSettings};
use crate::registry::{Denied, Grant, Registry};
use crate::registry_database::RegistrySource;
use crate::sessions::Sessions;
use crate::token::Verifier;

/// How long a connection has to prove something before its place may be another's: what a thousand
/// TLS handshakes take one processor.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

/// Between two looks whether the registry has become too old.
const STALENESS_LOOKS: Duration = Duration::from_millis(500);

/// Cancel requests of one tenant that are under way without a place among the handshakes.
const CANCELLING: usize = 8;

/// What the configuration says of sessions, wherever they come in.
#[derive(Debug)]
pub struct ProxySettings {
    /// Bounds.
    pub limits: Limits,
    /// How sessions end with their authority.
    pub endings: EndingRules,
    /// Regions that may be served; `None`: any.
    pub regions: Option<BTreeSet<String>>,
    /// How long a registry that cannot be reloaded still serves; `None`: for ever.
    pub max_staleness: Option<Duration>,
    /// How the audit trail is written.
    pub audit: AuditSettings,
    /// Idle connections to databases.
    pub pool: PoolSettings,
    /// How credentials are asked for.
    pub lease: lease::Settings,
}

/// How sessions end with their authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndingRules {
    /// How long before the end of its credential or token a session is ended at the first
    /// moment at which it is idle.
    pub grace: Duration,
    /// Whether the expiry of its token ends a session.
    pub end_at_expiry: bool,
    /// Whether sessions end once the registry is too old for new ones.
    pub end_when_stale: bool,
}

/// What was read from the files that the configuration names, and may be read again.
#[derive(Debug)]
pub struct Sources {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) verifier: Verifier,
    pub(crate) registry: Registry,
    pub(crate) registry_source: RegistrySource,
    /// Whose tokens and certificates are refused before they expire.
    pub(crate) denied: Option<Denied>,
}

/// The parts that the stages of a session meet in.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) settings: &'static ProxySettings,
    pub(crate) sources: Sources,
    pub(crate) lessor: Lessor,
    pub(crate) pool: Pool,
    pub(crate) clusters: Arc<Clusters>,
    pub(crate) cluster_watch: ClusterWatch,
    pub(crate) cancel_keys: CancelKeys,
    pub(crate) log: LogQueue,
    /// Connections that are not logged in yet, of each listener.
    pub(crate) handshakes: Vec<Slots>,
    pub(crate) sessions: Sessions,
    pub(crate) addresses: Tally<IpAddr>,
    /// Cancel requests that have given their place back.
    pub(crate) cancelling: Tally<TenantId>,
    /// Reads the registry's database.
    following: Mutex<Option<JoinHandle<()>>>,
    /// When the last transaction must have ended; not set while pgsilo is not stopping.
    drain: OnceLock<BootTime>,
}

impl Proxy {
    /// Makes the shared parts. Their background tasks run on `runtime`.
    pub(crate) fn start(
        settings: ProxySettings,
        openbao: OpenBao,
        sources: Sources,
        runtime: Handle,
        log: LogQueue,
    ) -> &'static Proxy {
        let settings: &'static ProxySettings = Box::leak(Box::new(settings));
        let limits = &settings.limits;
        let background = runtime.clone();
        let lessor = Lessor::start(&settings.lease, openbao, runtime.clone());
        let clusters = Arc::new(Clusters::new());
        let proxy = Proxy {
            pool: Pool::new(
                &settings.pool,
                limits.dead_peer_timeout,
                lessor.clone(),
                Arc::clone(&clusters),
                runtime.clone(),
            ),
            cluster_watch: ClusterWatch::new(Arc::clone(&clusters), lessor.clone(), runtime),
            clusters,
            lessor,
            cancel_keys: CancelKeys::new(),
            log,
            handshakes: sources
                .listeners
                .iter()
                .map(|_| Slots::new(limits.max_handshakes, HANDSHAKE_GRACE))
                .collect(),
            sessions: Sessions::new(limits.max_sessions),
            addresses: Tally::new(limits.max_connections_per_address),
            cancelling: Tally::new(Some(CANCELLING)),
            following: Mutex::default(),
            drain: OnceLock::new(),
            settings,
            sources,
        };
        let proxy: &'static Proxy = Box::leak(Box::new(proxy));
        proxy.verifier().spawn_key_refresh(&background);
        background.spawn(proxy.tell_of_changes());
        background.spawn(proxy.tell_of_failovers());
        if settings.endings.end_when_stale {
            background.spawn(proxy.tell_of_staleness());
        }
        if let RegistrySource::Database(database) = &proxy.sources.registry_source {
            let following = background.spawn(database.follow(proxy.registry(), &proxy.lessor));
            *proxy.following.lock().unwrap_or_else(PoisonError::into_inner) = Some(following);
        }
        background.spawn(proxy.pool.run_sweeper());
        background.spawn(proxy.cancel_keys.report_periodically());
        proxy
    }

    pub(crate) fn verifier(&self) -> &Verifier {
        &self.sources.verifier
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.sources.registry
    }

    /// The grant that an identity needs for a tenant, if its issuer's word is not enough.
    pub(crate) fn grant(
        &self,
        identity: &Identity,
        tenant: &TenantId,
        access: Access,
    ) -> Option<Option<Arc<Grant>>> {
        let Identity::Token(claims) = identity else { return None };
        let (issuer, subject, _token_id) = claims.names();
        let needs_one = self.verifier().needs_grant(issuer);
        let now = SystemTime::now();
        needs_one.then(|| self.registry().grants().of((issuer, subject), tenant, access, now))
    }

    /// For how long the registry could not be read, once that is longer than it may serve. What was
    /// never read serves nobody.
    pub(crate) fn too_stale(&self) -> Option<Duration> {
        if !self.registry().is_read() {
            return self.registry().stale_for();
        }
        let max = self.settings.max_staleness?;
        self.registry().stale_for().filter(|stale| *stale > max)
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// Whether a session may begin, as far as the audit trail goes.
    pub(crate) fn is_audited(&self) -> bool {
        match self.settings.audit.on_loss {
            OnLoss::Count => true,
            OnLoss::Refuse => self.log.audit_keeps_up(),
        }
    }

    /// From now on connections are refused, idle sessions end, and transactions get `patience`.
    pub(crate) fn drain(&'static self, patience: Duration) {
        self.drain.get_or_init(|| BootTime::now() + patience);
        self.pool.close();
        self.sessions.wake_all();
    }

    /// The registry's database is not read any more, nor are clusters' servers looked at, and what
    /// was leased for that is handed back.
    pub(crate) async fn stop_following(&self) {
        self.cluster_watch.stop().await;
        let taken = self.following.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(following) = taken {
            following.abort();
            let _aborted = following.await;
        }
    }

    /// Whether pgsilo is stopping.
    pub(crate) fn is_draining(&self) -> bool {
        self.drained_by().is_some()
    }

    /// By when pgsilo wants to be done, once it is stopping.
    pub(crate) fn drained_by(&self) -> Option<BootTime> {
        self.drain.get().copied()
    }

    /// Whom listeners believe has changed.
    pub(crate) fn authorities_changed(&self) {
        self.sessions.wake_all();
    }

    /// Has sessions look again whenever a cluster has failed over: some may be at its primary
    /// before.
    async fn tell_of_failovers(&'static self) {
        let mut failovers = self.clusters.failovers();
        while failovers.changed().await.is_ok() {
            self.pool.retain_unovertaken();
            self.lessor.forget_windows();
            self.sessions.wake_all();
        }
    }

    /// Has sessions look again once the registry has become too old.
    async fn tell_of_staleness(&'static self) {
        let mut looks = interval(STALENESS_LOOKS);
        let mut was_too_stale = false;
        loop {
            looks.tick().await;
            let is_too_stale = self.too_stale().is_some();
            if is_too_stale && !was_too_stale {
                self.sessions.wake_all();
            }
            was_too_stale = is_too_stale;
        }
    }

    /// Has sessions look again whenever something changes that may end them.
    async fn tell_of_changes(&'static self) {
        let Sources { registry, denied, .. } = &self.sources;
        let withdrawn = |tenants: &HashSet<TenantId>, now: &Snapshot| {
            self.clusters.follow(now);
            self.pool.retain_current(now);
            self.lessor.forget_tenants(tenants);
        };
        let suspensions = Suspensions::watch();
        wake_on_changes(&self.sessions, registry, denied.as_ref(), suspensions, withdrawn).await;
    }
}

/// Wakes the sessions of the tenants that the registry says something else of, once `withdrawn` has
/// been told of it, and all sessions where a change may be anybody's: of the list of those denied,
/// and of the time, by a suspension of the machine.
async fn wake_on_changes(
    sessions: &Sessions,
    registry: &Registry,
    denied: Option<&Denied>,
    mut suspensions: Suspensions<impl Fn() -> Duration>,
    withdrawn: impl Fn(&HashSet<TenantId>, &Snapshot),
) {
    let mut denied = denied.map(Denied::subscribe);
    let mut locks = registry.locks().subscribe();
    loop {
        tokio::select! {
            tenants = registry.changed() => {
                withdrawn(&tenants, &registry.snapshot());
                for tenant in &tenants {
                    sessions.wake(tenant);
                }
            }
            () = changed(denied.as_mut()) => sessions.wake_all(),
            () = changed(Some(&mut locks)) => sessions.wake_all(),
            () = suspensions.next() => sessions.wake_all(),
        }
    }
}

async fn changed(list: Option<&mut watch::Receiver<u64>>) {
    match list {
        Some(list) => drop(list.changed().await),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::{Pin, pin};

    use futures_util::{FutureExt, poll};
    use pgsilo_core::registry::State;
    use tokio::sync::futures::Notified;

    use super::*;
    use crate::audit::Trail;
    use crate::registry::RegistryFile;
    use crate::registry::tests::entry;

    #[tokio::test]
    async fn of_ten_thousand_sessions_only_those_of_the_changed_tenant_wake() {
        let id = |number: usize| TenantId::parse(&format!("t{number}")).expect("an id");
        let text: String = (0..1_000).map(|number| entry(id(number).as_str())).collect();
        let name = format!("pgsilo-{}-changes.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, &text).expect("written");
        let (file, registry) = RegistryFile::open(&path).expect("a registry");
        let sessions: &'static Sessions = Box::leak(Box::new(Sessions::new(10_000)));
        let snapshot = registry.snapshot();
        let admit = |number: usize| {
            let tenant = id(number % 1_000);
            let known = snapshot.tenant(&tenant).expect("a tenant");
            sessions.admit(&tenant, None, &known.placement().cluster).expect("a place")
        };
        let places: Vec<_> = (0..10_000).map(admit).collect();
        let running: Vec<_> = places.iter().map(|place| place.begin(Trail::new(None))).collect();
        let waits = || running.iter().map(|one| Box::pin(one.changed())).collect::<Vec<_>>();
        let woken = |waits: &mut [Pin<Box<Notified<'_>>>]| {
            waits.iter_mut().filter_map(|wait| wait.as_mut().now_or_never()).count()
        };

        let told = Cell::new(0);
        let withdrawn = |tenants: &HashSet<TenantId>, now: &Snapshot| {
            assert_eq!(*tenants, HashSet::from([id(7)]));
            let suspended = now.tenants().filter(|tenant| tenant.state() == State::Suspended);
            told.set(told.get() + suspended.count());
        };
        let suspensions = Suspensions::watch();
        let mut waking = pin!(wake_on_changes(sessions, &registry, None, suspensions, withdrawn));
        assert!(poll!(&mut waking).is_pending());
        let mut waiting = waits();
        assert_eq!((woken(&mut waiting), told.get()), (0, 0));

        let seventh = format!("id = \"{}\"\n", id(7));
        let suspended = text.replace(&seventh, &format!("{seventh}state = \"suspended\"\n"));
        std::fs::write(&path, suspended).expect("written");
        assert_eq!(file.reload(&registry).expect("read"), 1_000);
        assert!(poll!(&mut waking).is_pending());
        assert_eq!((woken(&mut waiting), told.get()), (10, 1));

        let mut waiting = waits();
        file.reload(&registry).expect("read");
        assert!(poll!(&mut waking).is_pending());
        assert_eq!((woken(&mut waiting), told.get()), (0, 1), "it says the same");
        std::fs::remove_file(&path).expect("removed");
    }
}
