//! Writing files atomically, and secrets never with loose permissions.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pgsilo_core::secret::random_hex;

/// A file that anyone may read.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    replace(path, text, 0o644)
}

/// A file that only its owner may read.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    replace(path, text, 0o600)
}

/// Written beside it, then renamed: the name leads to all of the old text or all of the new.
fn replace(path: &Path, text: &str, mode: u32) -> Result<()> {
    let fresh = path.with_added_extension("new");
    let write = || {
        remove(&fresh)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Removes a file that may be there.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A new folder `pgsilo-RANDOM` inside `parent`.
pub(super) fn make_unique_dir(parent: &Path, mode: u32) -> Result<PathBuf> {
    let path = parent.join(format!("pgsilo-{}", random_hex::<4>()?));
    make_dir(&path, mode)?;
    Ok(path)
}

/// A new folder with exactly this mode, whatever the umask.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .with_context(|| format!("making {}", path.display()))
}

/// Copies a folder with all that is in it; every folder of the copy may be entered by anyone.
pub(super) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    fs::set_permissions(to, Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_tree(&source, &target)?;
        } else {
            fs::copy(&source, &target).with_context(|| format!("copying {}", source.display()))?;
        }
    }
    Ok(())
}

/// The program of that name on the PATH.
pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
}

/// Whether it is a file that somebody may run.
pub(super) fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
