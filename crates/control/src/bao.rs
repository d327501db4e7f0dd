//! Where OpenBAO is, and as whom it is asked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client, Settings};

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

impl BaoServer {
    /// As who holds the token of a file, or of a variable where there is none.
    pub(crate) fn client(&self, token_file: Option<&Path>, variable: &str) -> Result<Client> {
        let Some(address) = &self.bao else {
            bail!("no address of OpenBAO: set BAO_ADDR or --bao")
        };
        #[expect(clippy::disallowed_methods, reason = "a secret must not be an argument")]
        let named = std::env::var(variable);
        let token = match (token_file, named) {
            (Some(path), _) => secrets::file(path)?,
            (None, Ok(token)) => Secret::new(token),
            (None, Err(_)) => bail!("no OpenBAO token: set {variable} or --bao-token-file"),
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
