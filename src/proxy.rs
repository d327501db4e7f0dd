//! What every session of the process shares: made once at the start, never changed by a
//! session, alive as long as the process.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pgsilo_core::clock::{self, BootTime};
use pgsilo_core::tenant::TenantId;
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, Semaphore, watch};

use crate::cancel::CancelKeys;
use crate::config::{Config, Limits, OnLoss};
use crate::lease::{Lessor, OpenBaoError};
use crate::limits::{Slots, Tally};
use crate::log::LogQueue;
use crate::pool::Pool;
use crate::registry::{Denied, Registry};
use crate::token::Verifier;

/// How long a connection has to prove something before its place may be another's: what a thousand TLS
/// handshakes take one processor.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

/// Cancel requests of one tenant that are under way without a place among the handshakes.
const CANCELLING: usize = 8;

/// The parts that the stages of a session meet in.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) config: &'static Config,
    pub(crate) lessor: Lessor,
    pub(crate) pool: Pool,
    pub(crate) cancel_keys: CancelKeys,
    pub(crate) log: LogQueue,
    /// Connections that are not logged in yet, of each listener.
    pub(crate) handshakes: Vec<Slots>,
    pub(crate) sessions: Arc<Semaphore>,
    pub(crate) tenants: Tally<TenantId>,
    pub(crate) addresses: Tally<IpAddr>,
    /// Cancel requests that have given their place back.
    pub(crate) cancelling: Tally<TenantId>,
    /// When the last transaction must have ended; not set while pgsilo is not stopping.
    drain: OnceLock<BootTime>,
    /// See [`Proxy::changed`].
    changed: Notify,
}

impl Proxy {
    /// Makes the shared parts of a configuration. Their background tasks run on `runtime`.
    ///
    /// # Errors
    /// When the OpenBAO client cannot be set up.
    pub(crate) fn start(
        config: &'static Config,
        runtime: Handle,
        log: LogQueue,
    ) -> Result<&'static Proxy, OpenBaoError> {
        let limits = &config.limits;
        let background = runtime.clone();
        config.verifier.keep_keys(&runtime);
        let lessor = Lessor::start(&config.openbao, runtime.clone())?;
        let proxy = Proxy {
            pool: Pool::new(&config.warm, limits.dead_peer_timeout, lessor.clone(), runtime),
            lessor,
            cancel_keys: CancelKeys::new(),
            log,
            handshakes: config
                .listeners
                .iter()
                .map(|_| Slots::new(limits.max_handshakes, HANDSHAKE_GRACE))
                .collect(),
            sessions: Arc::new(Semaphore::new(limits.max_sessions)),
            tenants: Tally::new(limits.max_sessions_per_tenant),
            addresses: Tally::new(limits.max_connections_per_address),
            cancelling: Tally::new(Some(CANCELLING)),
            drain: OnceLock::new(),
            changed: Notify::new(),
            config,
        };
        let proxy: &'static Proxy = Box::leak(Box::new(proxy));
        background.spawn(proxy.tell_of_changes());
        background.spawn(proxy.pool.keep());
        background.spawn(proxy.cancel_keys.keep_telling());
        Ok(proxy)
    }

    pub(crate) fn verifier(&self) -> &Verifier {
        &self.config.verifier
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.config.registry
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.config.limits
    }

    /// Whether a session may begin, as far as the audit trail goes.
    pub(crate) fn is_audited(&self) -> bool {
        match self.config.audit.on_loss {
            OnLoss::Count => true,
            OnLoss::Refuse => self.log.audit_keeps_up(),
        }
    }

    /// From now on connections are refused, idle sessions end, and transactions get `patience`.
    pub(crate) fn drain(&'static self, patience: Duration) {
        self.drain.get_or_init(|| BootTime::now() + patience);
        self.pool.close();
        self.changed.notify_waiters();
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
        self.changed.notify_waiters();
    }

    /// Resolves when anything has changed that may end a session: the registry, the list of those
    /// denied, the authorities of clients' certificates, that pgsilo stops, or the time, by a suspension
    /// of the machine. Made before one looks, it misses nothing. One place to wait, so that an idle
    /// session costs no more than that.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    async fn tell_of_changes(&'static self) {
        let mut registry = self.registry().subscribe();
        let mut denied = self.config.denied.as_ref().map(Denied::subscribe);
        loop {
            tokio::select! {
                _ = registry.changed() => {}
                () = changed(denied.as_mut()) => {}
                () = clock::resumed() => {}
            }
            self.pool.keep_only(&self.registry().snapshot());
            self.changed.notify_waiters();
        }
    }
}

async fn changed(list: Option<&mut watch::Receiver<u64>>) {
    match list {
        Some(list) => drop(list.changed().await),
        None => std::future::pending().await,
    }
}
