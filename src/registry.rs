//! The registry as it is now: one [`Snapshot`] at a time, and for how long its source has not been
//! read.
//!
//! Readers take a snapshot, which never changes. A source replaces it as a whole, or says that it
//! could not be read: then the old one stays, marked stale. The file is a source
//! ([`RegistryFile`]); the store knows of none.

mod denied;
mod file;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::Snapshot;
use pgsilo_core::tenant::TenantId;
use tokio::sync::Notify;

pub use denied::Denied;
pub(crate) use denied::PresentedCredential;
pub use file::RegistryFile;

/// The current snapshot and its freshness.
#[derive(Debug)]
pub struct Registry {
    current: ArcSwap<Snapshot>,
    stale_since: ArcSwapOption<BootTime>,
    /// Tenants of which the snapshot says something else than the one before, until somebody takes
    /// them.
    changed: Mutex<HashSet<TenantId>>,
    any_changed: Notify,
}

impl Registry {
    /// There is no registry without a first snapshot.
    pub fn new(first: Snapshot) -> Registry {
        Registry {
            current: ArcSwap::from_pointee(first),
            stale_since: ArcSwapOption::empty(),
            changed: Mutex::default(),
            any_changed: Notify::new(),
        }
    }

    /// The tenants as last read.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Puts what its source has read in force, and tells of the tenants that it changes. One source
    /// calls this, once at a time.
    fn replace(&self, snapshot: Snapshot) {
        let changes = snapshot.changes(&self.current.load());
        self.current.store(Arc::new(snapshot));
        self.stale_since.store(None);
        if !changes.is_empty() {
            self.changed.lock().unwrap_or_else(PoisonError::into_inner).extend(changes);
            self.any_changed.notify_one();
        }
    }

    /// Its source could not be read: the snapshot is stale from the first such time on.
    fn mark_stale(&self) {
        if self.stale_since.load().is_none() {
            self.stale_since.store(Some(Arc::new(BootTime::now())));
        }
    }

    /// For how long its source could not be read; `None` while the snapshot is what it says.
    pub fn stale_for(&self) -> Option<Duration> {
        self.stale_since.load().as_ref().map(|since| since.elapsed())
    }

    /// The tenants of which the registry has come to say something else since they were last taken,
    /// once there are any: their entries, their aliases, the certificates bound to them. For one
    /// who waits.
    pub(crate) async fn changed(&self) -> HashSet<TenantId> {
        loop {
            let taken =
                std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner));
            if !taken.is_empty() {
                return taken;
            }
            self.any_changed.notified().await;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
