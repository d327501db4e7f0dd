//! A credential for pgsilo itself: to read the registry with, or to look at a cluster's servers.

use std::future::pending;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use pgsilo_core::secret::Secret;
use pgsilo_registry::connection::Login;

use super::{Lease, LeaseEnd};

/// How long before its end it is to be replaced, at most.
const LEAD: Duration = Duration::from_secs(60);

/// One that is held for as long as it can be renewed, and to be replaced then.
#[derive(Debug)]
pub(crate) struct OwnLease(pub(super) Lease);

impl OwnLease {
    /// What it logs in with.
    pub(crate) fn login(&self) -> Login {
        let credential = self.0.credential();
        let user = credential.username().to_owned();
        Login { user, password: Secret::new(credential.password().expose()) }
    }

    /// Whether it ends, and another is needed.
    pub(crate) fn is_ending(&self) -> bool {
        let (end, _again) = self.0.poll_renewal();
        lead(&end).is_some_and(|at| at.remaining().is_zero())
    }

    /// Resolves when that is so. Has the lease renewed meanwhile.
    pub(crate) async fn ending(&self) {
        loop {
            let (renewed, login_changed) = self.0.changed();
            let (end, again) = self.0.poll_renewal();
            let at = lead(&end);
            if at.is_some_and(|at| at.remaining().is_zero()) {
                return;
            }
            let next = [at, again].into_iter().flatten().min();
            tokio::select! {
                () = renewed => {}
                () = login_changed => {}
                () = async { match next { Some(at) => at.arrives().await, None => pending().await } } => {}
            }
        }
    }
}

/// When one that ends is to be replaced; `None`: it is renewed.
fn lead(end: &LeaseEnd) -> Option<BootTime> {
    end.is_final.then(|| end.at.earlier(LEAD.min(end.duration / 3)))
}
