//! A sandbox's workspace: its folder, a lock on it, a short temporary folder, its children.
//!
//! The folder (`--dir`) stays and belongs to one sandbox at a time. The temporary one holds what
//! runs: its path is short enough for Unix sockets, and it is gone when the sandbox is.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::files;
use crate::process::Processes;

/// The two folders, the lock on one of them, and whatever was started.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) dir: PathBuf,
    pub(super) runtime: PathBuf,
    pub(super) processes: Processes,
    /// Held while the process lives; the system releases it however that ends.
    _lock: File,
}

impl Workspace {
    pub(super) fn prepare(dir: &Path) -> Result<Self> {
        if !dir.exists() {
            if let Some(parent) = dir.parent() {
                fs::create_dir_all(parent)
                    .with_context(|| format!("making {}", parent.display()))?;
            }
            files::make_dir(dir, 0o700)?;
        }
        let dir = dir.canonicalize().with_context(|| format!("{}", dir.display()))?;
        let lock = lock(&dir)?;
        // Of a sandbox that was killed together with its watchdog.
        files::remove(&dir.join("env"))?;
        let mode = if rustix::process::geteuid().is_root() { 0o711 } else { 0o700 };
        let runtime = files::make_unique_dir(&runtime_parent(), mode)?;
        let processes = Processes::new(&[&dir.join("env"), &runtime])?;
        Ok(Self { dir, runtime, processes, _lock: lock })
    }

    pub(super) fn forget_env(&self) -> Result<()> {
        files::remove(&self.dir.join("env")).context("removing env")
    }

    pub(super) fn clear(&self) -> Result<()> {
        let removed = fs::remove_dir_all(&self.runtime);
        self.processes.dismiss_watchdog();
        removed.with_context(|| format!("removing {}", self.runtime.display()))
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("{}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0)?;
            write!(file, "{}", std::process::id())?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            bail!(
                "a sandbox already runs in {} (pid {}): stop it, or choose another folder with --dir",
                dir.display(),
                if pid.is_empty() { "unknown" } else { &pid }
            )
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking {}", path.display()))
        }
    }
}

/// The temporary folder, unless a socket's path in it would be too long (`sun_path` holds 104
/// bytes or more) or PostgreSQL's account could not get there.
fn runtime_parent() -> PathBuf {
    let longest = "/pgsilo-01234567/pg/.s.PGSQL.65535.lock".len();
    let parent = std::env::temp_dir();
    let short = parent.as_os_str().len() + longest < 100;
    let passable = |folder: &Path| {
        let mode = folder.metadata().map_or(0, |metadata| metadata.permissions().mode());
        mode & 0o001 != 0
    };
    let open = !rustix::process::geteuid().is_root() || parent.ancestors().all(passable);
    if short && open && parent.is_absolute() { parent } else { PathBuf::from("/tmp") }
}
