//! A file of tenants, as the source of the registry.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pgsilo_core::registry::Snapshot;
use pgsilo_core::toml_file::FileError;

use super::Registry;

/// The registry's file. Read when that is asked for, and not by itself.
#[derive(Debug)]
pub struct RegistryFile {
    path: PathBuf,
    /// Two readings at once could finish in the wrong order.
    reading: Mutex<()>,
}

impl RegistryFile {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// When it is not valid: there is no registry without a first snapshot.
    pub fn open(path: &Path) -> Result<(RegistryFile, Registry), FileError> {
        let registry = Registry::new(Snapshot::read(path, None)?);
        Ok((RegistryFile { path: path.into(), reading: Mutex::new(()) }, registry))
    }

    /// Reads the file again and returns how many tenants there are. A tenant whose entry says what
    /// it said before is the same one as before. Blocks while it reads (a second or two for 100,000
    /// tenants): not for a session's thread.
    ///
    /// # Errors
    /// When it is not valid. The registry keeps its snapshot and is stale.
    pub(crate) fn reload(&self, registry: &Registry) -> Result<usize, FileError> {
        let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = Snapshot::read(&self.path, Some(&registry.snapshot()))
            .inspect_err(|_| registry.mark_stale())?;
        let tenants = snapshot.len();
        registry.replace(snapshot);
        Ok(tenants)
    }
}
