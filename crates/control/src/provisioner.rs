//! As whom tenants are looked after: the provisioner's login to their servers, and to OpenBAO.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::Client as Bao;

use crate::bao::BaoServer;
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
    #[command(flatten)]
    bao: BaoServer,
    /// A file that holds the provisioner's OpenBAO token [default: what PROVISIONER_BAO_TOKEN
    /// holds].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
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
        self.bao.client(self.bao_token_file.as_deref(), "PROVISIONER_BAO_TOKEN")
    }
}
