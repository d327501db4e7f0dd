//! Secrets that a command line names: never on it, in the environment or in a file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pgsilo_core::file::{self, MAX_SECRET};
use pgsilo_core::secret::Secret;
use tokio_postgres::Config;
use zeroize::Zeroizing;

/// Takes an argument for a secret.
pub(crate) fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text))
}

/// What a file holds, without the white space around it.
pub(crate) fn file(path: &Path) -> Result<Secret> {
    let bytes = Zeroizing::new(
        file::read(path, MAX_SECRET).with_context(|| format!("reading {}", path.display()))?,
    );
    let secret = bytes.trim_ascii();
    ensure!(!secret.is_empty(), "{} is empty", path.display());
    Ok(Secret::new(secret))
}

/// The password of a DSN, or a file's where one is named; each with the option that says it.
pub(crate) fn password(
    (dsn_option, dsn): (&str, &Config),
    (file_option, path): (&str, Option<&PathBuf>),
) -> Result<Secret> {
    match (path, dsn.get_password()) {
        (Some(path), _) => file(path),
        (None, Some(password)) => Ok(Secret::new(password)),
        (None, None) => bail!("no password: put it in {dsn_option} or in a {file_option}"),
    }
}
