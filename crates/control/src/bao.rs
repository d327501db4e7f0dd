//! Where OpenBAO is, and as whom it is asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client, Error, Failure, Settings};

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
