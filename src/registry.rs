//! The registry as it is now: one [`Snapshot`] at a time, and for how long its source has not been
//! read.
//!
//! Readers take a snapshot, which never changes. A source replaces it, or says that it could not be
//! read: then the old one stays, marked stale. A file is a source ([`RegistryFile`]), and so is a
//! database (`registry_database.rs`); the store knows of none.

mod denied;
mod file;
mod grants;
mod locks;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
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
pub(crate) use grants::{Grant, Grants};
pub(crate) use locks::{Lock, Lockable, Locks};

/// A source that is asked whether anything has changed answers more often than that.
const SILENCE: Duration = Duration::from_secs(15);

/// The current snapshot and its freshness.
#[derive(Debug)]
pub struct Registry {
    current: ArcSwap<Snapshot>,
    /// Its source has been read.
    is_read: AtomicBool,
    stale_since: ArcSwapOption<BootTime>,
    /// When its source last said that the snapshot is what it says, if it is asked that.
    confirmed: ArcSwapOption<BootTime>,
    /// Tenants of which the snapshot says something else than the one before, until somebody takes
    /// them.
    changed: Mutex<HashSet<TenantId>>,
    any_changed: Notify,
    locks: Locks,
    grants: Grants,
}

impl Registry {
    /// With a first snapshot.
    pub fn new(first: Snapshot) -> Registry {
        Registry {
            current: ArcSwap::from_pointee(first),
            is_read: AtomicBool::new(true),
            stale_since: ArcSwapOption::empty(),
            confirmed: ArcSwapOption::empty(),
            changed: Mutex::default(),
            any_changed: Notify::new(),
            locks: Locks::new(),
            grants: Grants::default(),
        }
    }

    /// Without any: nothing is known yet, which is not to know that there is no tenant.
    pub(crate) fn unread() -> Registry {
        let registry = Registry::new(Snapshot::empty());
        registry.is_read.store(false, Ordering::Relaxed);
        registry.mark_stale();
        registry
    }

    /// Whether its source was ever read.
    pub fn is_read(&self) -> bool {
        self.is_read.load(Ordering::Acquire)
    }

    /// Who may use what, where that must be said.
    pub(crate) fn grants(&self) -> &Grants {
        &self.grants
    }

    /// Who is kept out.
    pub(crate) fn locks(&self) -> &Locks {
        &self.locks
    }

    /// The tenants as last read.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Puts what its source has read in force, and tells of the tenants that it changes. One source
    /// calls this, once at a time.
    fn replace(&self, snapshot: Snapshot) {
        let changes = snapshot.changes(&self.current.load());
        self.replace_changed(snapshot, changes);
        self.stale_since.store(None);
    }

    /// The same by a source that knows what it changes.
    pub(crate) fn replace_changed(&self, snapshot: Snapshot, changed: HashSet<TenantId>) {
        self.current.store(Arc::new(snapshot));
        self.is_read.store(true, Ordering::Release);
        self.tell_changed(changed);
    }

    /// What is said of these tenants has changed, here or elsewhere.
    pub(crate) fn tell_changed(&self, changed: HashSet<TenantId>) {
        if !changed.is_empty() {
            self.changed.lock().unwrap_or_else(PoisonError::into_inner).extend(changed);
            self.any_changed.notify_one();
        }
    }

    /// Its source was asked then, and the snapshot is what it said.
    pub(crate) fn mark_fresh(&self, asked: BootTime) {
        self.confirmed.store(Some(Arc::new(asked)));
        self.stale_since.store(None);
    }

    /// Its source could not be read: the snapshot is stale from the first such time on, or from when
    /// it was last confirmed.
    pub(crate) fn mark_stale(&self) {
        if self.stale_since.load().is_none() {
            let confirmed = self.confirmed.load_full();
            self.stale_since.store(Some(confirmed.unwrap_or_else(|| Arc::new(BootTime::now()))));
        }
    }

    /// For how long its source could not be read; `None` while the snapshot is what it says. One that is
    /// asked again and again is stale once it has not answered for long, whatever it is waited for.
    pub fn stale_for(&self) -> Option<Duration> {
        let failing = self.stale_since.load().as_ref().map(|since| since.elapsed());
        let confirmed = self.confirmed.load();
        let silent = confirmed.as_ref().map(|confirmed| confirmed.elapsed());
        failing.or(silent.filter(|silent| *silent > SILENCE))
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
