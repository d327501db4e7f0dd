//! The registry as it is now: one [`Snapshot`] at a time, and for how long it could not be read again.
//!
//! Readers take a snapshot, which never changes; a reload makes a whole new one or fails and leaves
//! the old one in place, marked stale. The configuration opens it, the Routed stage asks it, SIGHUP
//! reloads it.

mod denied;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::Snapshot;
use pgsilo_core::tenant::TenantId;
use pgsilo_core::toml_file::FileError;
use tokio::sync::Notify;

pub use denied::Denied;
pub(crate) use denied::Shown;

/// The current snapshot and its freshness.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    current: ArcSwap<Snapshot>,
    stale_since: ArcSwapOption<BootTime>,
    /// Tenants of which the snapshot says something else than the one before, until somebody takes them.
    changed: Mutex<HashSet<TenantId>>,
    any_changed: Notify,
    /// Two reloads at once could finish in the wrong order.
    reloading: Mutex<()>,
}

impl Registry {
    /// Reads the file; there is no registry without a good first snapshot.
    pub fn open(path: &Path) -> Result<Registry, FileError> {
        let snapshot = Snapshot::read(path, None)?;
        Ok(Registry {
            path: path.into(),
            current: ArcSwap::from_pointee(snapshot),
            stale_since: ArcSwapOption::empty(),
            changed: Mutex::default(),
            any_changed: Notify::new(),
            reloading: Mutex::new(()),
        })
    }

    /// The tenants as last read.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Reads the file again and returns how many tenants there are. A tenant whose entry says what it
    /// said before is the same one as before. After an error the old snapshot stays. Blocks while it
    /// reads (a second or two for 100,000 tenants): not for a session's thread.
    pub fn reload(&self) -> Result<usize, FileError> {
        let _one_at_a_time = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current.load();
        let snapshot = Snapshot::read(&self.path, Some(&before)).inspect_err(|_| {
            if self.stale_since.load().is_none() {
                self.stale_since.store(Some(Arc::new(BootTime::now())));
            }
        })?;
        let (tenants, changes) = (snapshot.len(), snapshot.changes(&before));
        self.current.store(Arc::new(snapshot));
        self.stale_since.store(None);
        if !changes.is_empty() {
            self.changed.lock().unwrap_or_else(PoisonError::into_inner).extend(changes);
            self.any_changed.notify_one();
        }
        Ok(tenants)
    }

    /// Since the first reload that failed; `None` while the snapshot is the file's.
    pub fn stale_for(&self) -> Option<Duration> {
        self.stale_since.load().as_ref().map(|since| since.elapsed())
    }

    /// The tenants of which the registry has come to say something else since they were last taken, once
    /// there are any: their entries, their aliases, the certificates bound to them. For one who waits.
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
