//! What every session of the process shares: made once at the start, never changed by a
//! session, alive as long as the process.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::cancel::CancelKeys;
use crate::clock::BootTime;
use crate::config::{Config, Limits};
use crate::lease::{Lessor, OpenBaoError};
use crate::limits::Tally;
use crate::registry::Registry;
use crate::tenant::TenantId;
use crate::token::Verifier;

/// The parts that the stages of a session meet in.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) config: &'static Config,
    pub(crate) lessor: Lessor,
    pub(crate) cancel_keys: CancelKeys,
    /// Connections that are not logged in yet.
    pub(crate) handshakes: Arc<Semaphore>,
    pub(crate) sessions: Arc<Semaphore>,
    pub(crate) tenants: Tally<TenantId>,
    pub(crate) addresses: Tally<IpAddr>,
    /// When the last transaction must have ended; `None` while pgsilo is not stopping.
    drain: watch::Sender<Option<BootTime>>,
}

impl Proxy {
    /// Makes the shared parts of a configuration. Their background tasks run on `runtime`.
    ///
    /// # Errors
    /// When the OpenBAO client cannot be set up.
    pub(crate) fn start(
        config: &'static Config,
        runtime: Handle,
    ) -> Result<&'static Proxy, OpenBaoError> {
        let limits = &config.limits;
        config.verifier.keep_keys(&runtime);
        let proxy = Proxy {
            lessor: Lessor::start(&config.openbao, runtime)?,
            cancel_keys: CancelKeys::new(),
            handshakes: Arc::new(Semaphore::new(limits.max_handshakes)),
            sessions: Arc::new(Semaphore::new(limits.max_sessions)),
            tenants: Tally::new(limits.max_sessions_per_tenant),
            addresses: Tally::new(limits.max_connections_per_address),
            drain: watch::Sender::new(None),
            config,
        };
        Ok(Box::leak(Box::new(proxy)))
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

    /// From now on connections are refused, idle sessions end, and transactions get `patience`.
    pub(crate) fn drain(&self, patience: Duration) {
        self.drain.send_replace(Some(BootTime::now() + patience));
    }

    /// Whether pgsilo is stopping.
    pub(crate) fn is_draining(&self) -> bool {
        self.drain.borrow().is_some()
    }

    /// Resolves when pgsilo begins to stop, to the time by which it wants to be done.
    pub(crate) async fn drained(&self) -> BootTime {
        let mut drain = self.drain.subscribe();
        match drain.wait_for(Option::is_some).await.map(|by| *by) {
            Ok(Some(by)) => by,
            _ => std::future::pending().await,
        }
    }
}
