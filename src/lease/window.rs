//! Leases that several sessions share, for applications that open hundreds of connections a
//! second: those of one subject, tenant, role and access that begin within a window, and under
//! session authority with one token. What may not be shared is in the key, so it cannot be.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use pgsilo_core::tenant::{Access, TenantId};
use tokio::runtime::Handle;
use tokio::time::sleep;

use super::{LeaseError, LeaseInner, Role};

/// Who may share a lease: sessions that agree in all of this.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sharers {
    pub(super) tenant: TenantId,
    pub(super) role: Role,
    pub(super) access: Access,
    /// A session can give its role settings and a password, which the next session with the same
    /// role would have: so they are of one subject.
    pub(super) subject: (Option<Box<str>>, Box<str>),
    /// Under session authority a hash of the very token: a lease that OpenBAO granted to one is
    /// never given to another, which OpenBAO might have refused.
    pub(super) token: Option<[u8; 32]>,
}

/// A lease that was asked for once, on its way or here.
type Joint = Shared<BoxFuture<'static, Result<Arc<LeaseInner>, Arc<LeaseError>>>>;

/// The windows that are open now.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    open: Arc<Mutex<HashMap<Sharers, Joint>>>,
    length: Duration,
    runtime: Handle,
}

impl Windows {
    pub(super) fn new(length: Duration, runtime: Handle) -> Windows {
        Windows { open: Arc::default(), length, runtime }
    }

    /// The lease of the window that is open for these sharers; opens one with `ask` if none is,
    /// or if its lease is near an end that is final.
    pub(super) async fn join(
        &self,
        sharers: Sharers,
        ask: impl FnOnce() -> BoxFuture<'static, Result<LeaseInner, LeaseError>>,
    ) -> Result<Arc<LeaseInner>, Arc<LeaseError>> {
        let joint = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            match open.entry(sharers.clone()) {
                Entry::Occupied(entry) if is_fit(entry.get()) => entry.get().clone(),
                Entry::Occupied(mut entry) => {
                    let unfit = entry.insert(joint(&self.runtime, ask()));
                    drop(unfit);
                    entry.get().clone()
                }
                Entry::Vacant(entry) => {
                    self.close_in_time(sharers);
                    entry.insert(joint(&self.runtime, ask())).clone()
                }
            }
        };
        joint.await
    }

    /// Closes every window; sessions go on holding their leases.
    pub(super) fn forget(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = std::mem::take(&mut *open);
        drop(open);
        drop(closed);
    }

    /// Closes the windows of tenants whose entry has changed: a lease is for where its tenant was, and
    /// sessions that begin now are asked for again. Those that have it go on holding it.
    pub(super) fn forget_tenants(&self, changed: &HashSet<TenantId>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let closed: Vec<_> =
            open.extract_if(|sharers, _| changed.contains(&sharers.tenant)).collect();
        drop(open);
        drop(closed);
    }

    /// Forgets the window when it is over; its sessions go on holding the lease.
    fn close_in_time(&self, sharers: Sharers) {
        let (open, length) = (Arc::clone(&self.open), self.length);
        self.runtime.spawn(async move {
            sleep(length).await;
            open.lock().unwrap_or_else(PoisonError::into_inner).remove(&sharers);
        });
    }
}

/// Requests it on a task of its own, so that it continues if a waiter gives up.
fn joint(runtime: &Handle, asking: BoxFuture<'static, Result<LeaseInner, LeaseError>>) -> Joint {
    let asking = runtime.spawn(asking).map(|end| end.unwrap_or(Err(LeaseError::Abandoned)));
    asking.map(|result| result.map(Arc::new).map_err(Arc::new)).boxed().shared()
}

/// A failure is not shared with later sessions, nor a lease that cannot be renewed or was not
/// renewed for a while.
fn is_fit(joint: &Joint) -> bool {
    match joint.peek() {
        None => true,
        Some(Ok(held)) => {
            let (end, _) = held.renewer.poll_renewal();
            !end.is_final && end.at.remaining() > end.duration / 4
        }
        Some(Err(_)) => false,
    }
}
