//! Revokes the leases of sessions that ended, in the background, until each is gone.
//!
//! A failed revocation is tried again with growing pauses until the lease would have ended by
//! itself. At most [`AT_ONCE`] run at a time: a mass disconnect must not keep OpenBAO from
//! giving out new credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::sleep;

use super::identity::Identity;
use super::keeper::LeaseEnd;
use super::openbao::{OpenBao, OpenBaoError};

const AT_ONCE: usize = 16;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// A lease to be revoked, and when there will be nothing left to revoke.
#[derive(Debug)]
pub(super) struct Revocation {
    lease_id: String,
    end: watch::Receiver<LeaseEnd>,
}

impl Revocation {
    pub(super) fn new(lease_id: String, end: watch::Receiver<LeaseEnd>) -> Revocation {
        Revocation { lease_id, end }
    }
}

/// A hand to give leases back to. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Revoker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    openbao: Arc<OpenBao>,
    identity: Arc<Identity>,
    slots: Semaphore,
    pending: AtomicUsize,
    idle: Notify,
    runtime: Handle,
}

impl Revoker {
    pub(super) fn start(
        openbao: Arc<OpenBao>,
        identity: Arc<Identity>,
        runtime: &Handle,
    ) -> Revoker {
        Revoker(Arc::new(Shared {
            openbao,
            identity,
            slots: Semaphore::new(AT_ONCE),
            pending: AtomicUsize::new(0),
            idle: Notify::new(),
            runtime: runtime.clone(),
        }))
    }

    /// Returns at once. There are never more of these than there were sessions.
    pub(super) fn revoke(&self, revocation: Revocation) {
        let shared = Arc::clone(&self.0);
        shared.pending.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!("pgsilo_revocations_pending").increment(1);
        self.0.runtime.spawn(async move {
            shared.revoke(&revocation).await;
            metrics::gauge!("pgsilo_revocations_pending").decrement(1);
            if shared.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
                shared.idle.notify_waiters();
            }
        });
    }

    /// Leases that are still to be revoked.
    pub(super) fn pending(&self) -> usize {
        self.0.pending.load(Ordering::Acquire)
    }

    /// Waits until there are none.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.0.idle.notified();
            if self.pending() == 0 {
                return;
            }
            idle.await;
        }
    }
}

impl Shared {
    async fn revoke(&self, Revocation { lease_id, end }: &Revocation) {
        let end = end.borrow().at;
        let mut retry = FIRST_RETRY;
        loop {
            let error = match self.try_once(lease_id).await {
                Ok(()) => {
                    metrics::counter!("pgsilo_revocations_total").increment(1);
                    return;
                }
                // OpenBAO has forgotten the lease: it ended with the token that asked for it.
                Err(OpenBaoError::Said { status: 400, .. }) => return,
                Err(error) => error,
            };
            metrics::counter!("pgsilo_revocation_failures_total").increment(1);
            if end.remaining() < retry {
                tracing::error!(%error, lease_id, "a lease was not revoked before its own end");
                return;
            }
            tracing::warn!(%error, lease_id, "cannot revoke a lease yet; trying again");
            sleep(retry).await;
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    async fn try_once(&self, lease_id: &str) -> Result<(), OpenBaoError> {
        let slot = self.slots.acquire().await;
        let token = self.identity.token().map_err(OpenBaoError::Unreachable)?;
        let result = self.openbao.revoke(&token, lease_id).await;
        drop(slot);
        result
    }
}
