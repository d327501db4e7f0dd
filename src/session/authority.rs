//! What a session's life hangs on: its lease, its identity, its tenant, the process. Each may say
//! that it must end, and by when; what says so more urgently than before is heard.

use std::future::{Future, pending};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::audit::{self, Trail};
use crate::clock::BootTime;
use crate::ending::Ending;
use crate::identity::Identity;
use crate::lease::LeaseEnd;
use crate::proxy::Proxy;
use crate::registry::{Snapshot, State, Tenant};
use crate::splice::{Order, Orders};
use crate::tenant::Access;

/// What is left for the last words before an authority is really over.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// The authority of one session.
pub(super) struct Authority<'s> {
    pub(super) proxy: &'static Proxy,
    pub(super) tenant: &'s Tenant,
    pub(super) lease_end: watch::Receiver<LeaseEnd>,
    pub(super) identity: &'s Identity,
    pub(super) access: Access,
    /// When the token or the certificate ends.
    pub(super) expires: BootTime,
    /// What was left of that when the session began.
    pub(super) left: Duration,
    pub(super) trail: &'s Trail,
    /// The newest failure to renew the lease that an event has told of; 0: none since it was
    /// last renewed.
    pub(super) told: AtomicU32,
}

impl Orders for Authority<'_> {
    /// Resolves when the session must end sooner than `than`.
    async fn sooner(&self, than: Option<Order>) -> Order {
        tokio::select! {
            order = only_if_sooner(self.drained(), than) => order,
            order = only_if_sooner(self.withdrawn(), than) => order,
            order = self.lease_ends(than) => order,
            order = only_if_sooner(self.expires(), than) => order,
            order = only_if_sooner(self.revoked(), than) => order,
        }
    }
}

impl Authority<'_> {
    async fn drained(&self) -> Order {
        Order { ending: Ending::Drained, by: self.proxy.drained().await }
    }

    /// The registry no longer serves the tenant where this session is, or binds its certificate
    /// otherwise. A paused tenant keeps
    /// its sessions.
    async fn withdrawn(&self) -> Order {
        let registry = self.proxy.registry();
        let mut changes = registry.subscribe();
        let placement = self.tenant.placement();
        loop {
            let snapshot = registry.snapshot();
            let serves = snapshot.tenant(self.tenant.id()).is_some_and(|now| {
                now.state() != State::Suspended && now.placement().is_same_database(placement)
            });
            let serves = serves && self.is_still_bound(&snapshot);
            if !serves {
                return Order { ending: Ending::TenantWithdrawn, by: BootTime::now() };
            }
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
    }

    /// A certificate's tenant and access are what the registry binds it to; a token says its own.
    fn is_still_bound(&self, registry: &Snapshot) -> bool {
        let Identity::Certificate(holder) = self.identity else { return true };
        let binding = registry.binding(holder.name());
        binding.is_some_and(|to| to.tenant == *self.tenant.id() && to.access == self.access)
    }

    /// While the lease is still renewed, only what is left after the renewals have failed for
    /// long is a notice; the whole grace is, once its end is final.
    async fn lease_ends(&self, than: Option<Order>) -> Order {
        let mut changes = self.lease_end.clone();
        loop {
            let end = changes.borrow_and_update().clone();
            self.tell_of_renewals(&end);
            let grace = self.proxy.config.lease.grace;
            let notice = grace.min(end.duration / if end.is_final { 3 } else { 6 });
            tokio::select! {
                () = end.at.earlier(notice).arrives() => {
                    let by = last_words(end.at, notice);
                    if than.is_none_or(|than| by < than.by) {
                        return Order { ending: Ending::LeaseEnded, by };
                    }
                    // Its end may come sooner yet.
                    changed(&mut changes).await;
                }
                () = changed(&mut changes) => {}
            }
        }
    }

    /// One event for each renewal that failed, and one for the first that worked again.
    fn tell_of_renewals(&self, end: &LeaseEnd) {
        match &end.failure {
            Some(failure) if failure.number != self.told.load(Ordering::Relaxed) => {
                self.told.store(failure.number, Ordering::Relaxed);
                audit::renewal_failed(self.trail, &failure.cause, end.at.remaining(), end.is_final);
            }
            None if self.told.swap(0, Ordering::Relaxed) > 0 => {
                audit::renewed_again(self.trail, end.at.remaining());
            }
            Some(_) | None => {}
        }
    }

    /// The identity was put on the list of those denied.
    async fn revoked(&self) -> Order {
        let Some(denied) = &self.proxy.config.denied else { return pending().await };
        let mut changes = denied.subscribe();
        loop {
            if self.identity.is_denied(Some(denied)) {
                return Order { ending: Ending::IdentityRevoked, by: BootTime::now() };
            }
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
    }

    async fn expires(&self) -> Order {
        let rules = &self.proxy.config.lease;
        if !rules.end_at_expiry {
            return pending().await;
        }
        // A session that came with a token near its end still gets most of what is left.
        let notice = rules.grace.min(self.left / 3);
        self.expires.earlier(notice).arrives().await;
        Order { ending: self.identity.ending(), by: last_words(self.expires, notice) }
    }
}

/// A little before the end, so that the client can still be told in time.
fn last_words(end: BootTime, notice: Duration) -> BootTime {
    end.earlier(LAST_WORDS.min(notice / 2))
}

async fn only_if_sooner(order: impl Future<Output = Order>, than: Option<Order>) -> Order {
    let order = order.await;
    match than {
        Some(than) if than.by <= order.by => pending().await,
        _ => order,
    }
}

/// Resolves at the next renewal; never when there will be none.
async fn changed(end: &mut watch::Receiver<LeaseEnd>) {
    if end.changed().await.is_err() {
        pending::<()>().await;
    }
}
