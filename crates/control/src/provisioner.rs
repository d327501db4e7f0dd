//! As whom tenants are looked after: the provisioner's login to their servers, and to OpenBAO.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client as Bao, Settings};

use crate::postgres::Identity;
use crate::secrets;

/// The provisioner, as a command line names it.
#[derive(Debug, Args)]
pub(crate) struct Provisioner {
    /// The provisioner's user, and its password if this comes from the environment (a command line
    /// can be read by others), as a libpq DSN; hosts and databases are the registry's.
    #[arg(
        long,
        value_name = "DSN",
        env = "PROVISIONER_DSN",
        hide_env_values = true,
        value_parser = secrets::secret
    )]
    provisioner: Secret,
    /// A file that holds the provisioner's password, if the DSN does not.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// OpenBAO's address.
    #[arg(long, value_name = "URL", env = "BAO_ADDR")]
    bao: String,
    /// A file that holds the provisioner's OpenBAO token [default: what PROVISIONER_BAO_TOKEN
    /// holds].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
    /// PEM of the authorities that OpenBAO's certificate must chain to [default: the system's].
    #[arg(long, value_name = "FILE", env = "BAO_CACERT")]
    bao_ca: Option<PathBuf>,
    /// OpenBAO's namespace.
    #[arg(long, value_name = "NAME", env = "BAO_NAMESPACE")]
    bao_namespace: Option<String>,
}

impl Provisioner {
    /// Its login to tenants' servers.
    pub(crate) fn identity(&self) -> Result<Identity> {
        // The parser's error may hold what it could not parse.
        let dsn: tokio_postgres::Config = match self.provisioner.expose_text().map(str::parse) {
            Ok(Ok(dsn)) => dsn,
            _ => bail!("--provisioner is not a DSN; write it like postgresql://user@host"),
        };
        let user = dsn.get_user().context("--provisioner names no user")?.to_owned();
        let file = ("--password-file", self.password_file.as_ref());
        let password = secrets::password(("--provisioner", &dsn), file)?;
        Ok(Identity { user, password })
    }

    /// Its login to OpenBAO.
    pub(crate) fn bao(&self) -> Result<Bao> {
        #[expect(clippy::disallowed_methods, reason = "a secret must not be an argument")]
        let named = std::env::var("PROVISIONER_BAO_TOKEN");
        let token = match (&self.bao_token_file, named) {
            (Some(path), _) => secrets::file(path)?,
            (None, Ok(token)) => Secret::new(token),
            (None, Err(_)) => {
                bail!("no OpenBAO token: set PROVISIONER_BAO_TOKEN or --bao-token-file")
            }
        };
        let ca = match &self.bao_ca {
            Some(path) => {
                let pem = std::fs::read(path);
                Some(pem.with_context(|| format!("reading {}", path.display()))?)
            }
            None => None,
        };
        let namespace = self.bao_namespace.clone();
        let bao = Bao::new(Settings { ca, namespace, ..Settings::for_control(&self.bao) });
        Ok(bao.context("OpenBAO")?.as_token(token))
    }
}
