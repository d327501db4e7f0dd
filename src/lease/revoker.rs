//! Revokes the leases of sessions that ended, in the background, until each is gone.
//!
//! A failed revocation is tried again with growing pauses until the lease would have ended by
//! itself. At most [`AT_ONCE`] run at a time: a mass disconnect must not keep OpenBAO from
//! giving out new credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pgsilo_core::backoff::Backoff;
use pgsilo_openbao::Error;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::login::TokenState;
use super::renewer::Renewer;
use super::server::{Server, retry_after};
use crate::audit::{self, Asker};
use crate::metrics;

const AT_ONCE: usize = 16;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// A lease to be revoked, and when there will be nothing left to revoke.
#[derive(Debug)]
pub(super) struct Revocation {
    pub(super) renewer: Arc<Renewer>,
    pub(super) asker: Asker,
    /// The database role's name.
    pub(super) role: Arc<str>,
    /// The login was made for this lease alone: revoking it revokes both.
    pub(super) with_login: bool,
}

/// A hand to give leases back to. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Revoker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    server: Arc<Server>,
    max_pending: usize,
    slots: Semaphore,
    pending: AtomicUsize,
    idle: Notify,
    /// Cancelled when pending revocations are no longer waited for.
    stopped: CancellationToken,
    runtime: Handle,
}

impl Revoker {
    pub(super) fn new(server: Arc<Server>, max_pending: usize, runtime: &Handle) -> Revoker {
        Revoker(Arc::new(Shared {
            server,
            max_pending,
            slots: Semaphore::new(AT_ONCE),
            pending: AtomicUsize::new(0),
            idle: Notify::new(),
            stopped: CancellationToken::new(),
            runtime: runtime.clone(),
        }))
    }

    /// Returns at once. No lease is ever turned away: the queue is bounded by asking for no more
    /// leases while it [is full](Revoker::is_full).
    pub(super) fn revoke(&self, revocation: Revocation) {
        let shared = Arc::clone(&self.0);
        shared.pending.fetch_add(1, Ordering::Relaxed);
        metrics::REVOCATIONS_PENDING.increment();
        self.0.runtime.spawn(async move {
            shared.revoke(&revocation).await;
            metrics::REVOCATIONS_PENDING.decrement();
            if shared.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
                shared.idle.notify_waiters();
            }
        });
    }

    /// Leases that are still to be revoked.
    pub(super) fn pending(&self) -> usize {
        self.0.pending.load(Ordering::Acquire)
    }

    /// Whether so many wait that more leases would only add to what cannot be given back.
    pub(super) fn is_full(&self) -> bool {
        self.pending() >= self.0.max_pending
    }

    /// Stops waiting: each lease that is not revoked is reported.
    pub(super) async fn give_up(&self) {
        self.0.stopped.cancel();
        self.idle().await;
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
    async fn revoke(&self, revocation: &Revocation) {
        let Revocation { renewer, asker, role, .. } = revocation;
        let (lease_id, login) = (renewer.lease_id(), renewer.login());
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        let mut state = login.watch();
        let mut failed_before = false;
        while login.state() != TokenState::Invalid {
            let tried = self.stopped.run_until_cancelled(self.try_once(revocation)).await;
            let Some(tried) = tried else {
                return audit::unrevoked(asker, role, lease_id, "pgsilo has stopped");
            };
            let error = match tried {
                Ok(()) => {
                    metrics::REVOCATIONS.increment(1);
                    break;
                }
                Err(error) => error,
            };
            metrics::REVOCATION_FAILURES.increment(1);
            let left = revocation.renewer.end().at.remaining();
            if left.is_zero() {
                return audit::unrevoked(asker, role, lease_id, &error.to_string());
            }
            if !failed_before {
                tracing::warn!(%error, lease_id, "cannot revoke a lease yet; trying again");
            }
            failed_before = true;
            let pause = retry.pause().max(retry_after(&error).unwrap_or_default());
            let dead = |state: &TokenState| *state == TokenState::Invalid;
            tokio::select! {
                () = sleep(pause.min(left)) => {}
                _ = state.wait_for(dead) => {}
                () = self.stopped.cancelled() => {}
            }
        }
        // Where its token is dead, OpenBAO has revoked the lease with that.
        audit::revoked(asker, role, lease_id);
    }

    async fn try_once(&self, revocation: &Revocation) -> Result<(), Error> {
        let (lease_id, login) = (revocation.renewer.lease_id(), revocation.renewer.login());
        let _slot = self.slots.acquire().await;
        let result = match revocation.with_login {
            true => self.server.revoke_self(login.secret()).await,
            false => self.server.revoke(login.secret(), lease_id).await,
        };
        if result.as_ref().is_err_and(|error| error.is_status(403)) {
            // Forbidden, or dead. A lookup tells which, and a dead one holds no leases.
            let looked_up = self.server.look_up_self(login.secret().clone()).await;
            if looked_up.is_err_and(|error| error.is_status(403)) {
                login.mark_invalid();
                return Ok(());
            }
        }
        result
    }
}
