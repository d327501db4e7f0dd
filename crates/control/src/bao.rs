//! Where OpenBAO is, and as whom it is asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client, DatabaseConfig, Error, Failure, Settings};
use serde_json::Value;

use crate::secrets;

/// OpenBAO, as a command line names it.
#[derive(Debug, Args)]
pub(crate) struct BaoServer {
    /// OpenBAO's address.
    #[arg(long, value_name = "URL", env = "BAO_ADDR")]
    bao: Option<String>,
    /// PEM of the authorities that OpenBAO's certificate must chain to [default: the system's].
    #[arg(long, value_name = "FILE", env = "BAO_CACERT")]
    bao_ca: Option<PathBuf>,
    /// OpenBAO's namespace.
    #[arg(long, value_name = "NAME", env = "BAO_NAMESPACE")]
    bao_namespace: Option<String>,
}

/// What an environment variable holds, if anything.
pub(crate) fn variable_of(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "a secret must not be an argument")]
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

impl BaoServer {
    /// Whether a variable holds a token.
    pub(crate) fn has_token(variable: &str) -> bool {
        variable_of(variable).is_some()
    }

    /// As who holds the token of a file, or of a variable where there is none.
    pub(crate) fn client(&self, token_file: Option<&Path>, variable: &str) -> Result<Client> {
        let Some(address) = &self.bao else {
            bail!("no address of OpenBAO: set BAO_ADDR or --bao")
        };
        let token = match (token_file, variable_of(variable)) {
            (Some(path), _) => secrets::file(path)?,
            (None, Some(token)) => Secret::new(token),
            (None, None) => bail!("no OpenBAO token: set {variable} or --bao-token-file"),
        };
        let ca = match &self.bao_ca {
            Some(path) => {
                let pem = std::fs::read(path);
                Some(pem.with_context(|| format!("reading {}", path.display()))?)
            }
            None => None,
        };
        let namespace = self.bao_namespace.clone();
        let bao = Client::new(Settings { ca, namespace, ..Settings::for_control(address) });
        Ok(bao.context("OpenBAO")?.as_token(token))
    }
}

/// How often something is asked again that OpenBAO could not store, because others stored meanwhile.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);

/// Asks OpenBAO again for what it could not store: two who write at once may be in each other's way.
pub(crate) async fn again<T>(ask: impl AsyncFn() -> Result<T, Failure>) -> Result<T> {
    let mut attempt = 1;
    loop {
        match ask().await {
            Err(failure) if attempt < ATTEMPTS && is_storage_race(failure.error()) => {
                tokio::time::sleep(PAUSE * attempt).await;
                attempt += 1;
            }
            answered => return Ok(answered?),
        }
    }
}

fn is_storage_race(error: &Error) -> bool {
    matches!(error, Error::Said { status: 500, words } if words.contains("transaction commit failed"))
}

/// Whether a role's statements are those: OpenBAO tells them without the white space behind them.
pub(crate) fn is_same(found: &[String], expected: &[impl AsRef<str>]) -> bool {
    let found = found.iter().map(|one| one.trim());
    found.eq(expected.iter().map(|one| one.as_ref().trim()))
}

/// Describes a database to OpenBAO, which alone knows its login's password afterwards. A description may not
/// be updated, see the provisioner's policy: what is there goes, its password with it.
pub(crate) async fn describe(
    bao: &Client,
    (mount, connection): (&str, &str),
    description: &Value,
    password: &Secret,
) -> Result<()> {
    forget(bao, mount, connection).await?;
    again(async || bao.set_database_config(mount, connection, description, password).await).await?;
    Ok(bao.rotate_root(mount, connection).await?)
}

/// Deletes a description, if there is one, and looks that it is gone.
pub(crate) async fn forget(bao: &Client, mount: &str, connection: &str) -> Result<()> {
    if bao.database_config(mount, connection).await?.is_none() {
        return Ok(());
    }
    again(async || bao.delete_database_config(mount, connection).await).await?;
    let left = bao.database_config(mount, connection).await?;
    ensure!(left.is_none(), "OpenBAO still has {mount}/config/{connection}");
    Ok(())
}

/// Whether a description says that of a setting: texts are told without the white space behind them, and what is not
/// set may be told as an empty one.
pub(crate) fn tells(found: &DatabaseConfig, key: &str, expected: Option<&Value>) -> bool {
    let found = found.connection_details.get(key).or(found.others.get(key));
    let text = |value: Option<&Value>| match value {
        None => Some(String::new()),
        Some(value) => value.as_str().map(|text| text.trim_end().to_owned()),
    };
    match (text(found), text(expected)) {
        (Some(found), Some(expected)) => found == expected,
        _ => found == expected,
    }
}
