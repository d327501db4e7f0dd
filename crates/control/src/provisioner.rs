//! As whom tenants are looked after: the provisioner's login to their servers, and to OpenBAO.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Args;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::Client as Bao;

use crate::bao::BaoServer;
use crate::bootstrap::PROVISIONER_MOUNT as MOUNT;
use crate::postgres::{Identity, LeasedLogins};
use crate::settings::SettingsFile;
use crate::{logins, secrets};

/// The provisioner: as the file of settings says, or as a command line does.
#[derive(Debug, Args)]
pub(crate) struct Provisioner {
    /// The provisioner's user, and its password if this comes from the environment (a command line
    /// can be read by others), as a libpq DSN; hosts and databases are the registry's [default: a
    /// login at each cluster that OpenBAO makes, as pgsiloctl bootstrap has it].
    #[arg(
        long,
        value_name = "DSN",
        env = "PROVISIONER_DSN",
        hide_env_values = true,
        value_parser = secrets::secret
    )]
    provisioner: Option<Secret>,
    /// A file that holds the provisioner's password, if the DSN does not.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    #[command(flatten)]
    bao: BaoServer,
    /// A file that holds the provisioner's OpenBAO token [default: what PROVISIONER_BAO_TOKEN
    /// holds; without that, what the file of settings says].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
}

impl Provisioner {
    /// Its login to tenants' servers, where `bao` is its login to OpenBAO.
    pub(crate) fn identity(&self, bao: &Bao) -> Result<Identity> {
        let Some(provisioner) = &self.provisioner else {
            return Ok(Identity::Leased(Arc::new(LeasedLogins::of(bao, MOUNT))));
        };
        let file = ("--password-file", self.password_file.as_ref());
        Identity::by_dsn(("--provisioner", provisioner), file)
    }

    /// Its login to OpenBAO.
    pub(crate) async fn bao(&self, settings: &SettingsFile) -> Result<Bao> {
        const VARIABLE: &str = "PROVISIONER_BAO_TOKEN";
        let is_said = self.bao_token_file.is_some() || BaoServer::has_token(VARIABLE);
        if is_said {
            return self.bao.client(self.bao_token_file.as_deref(), VARIABLE);
        }
        if !settings.exists() {
            bail!(
                "nothing says where OpenBAO is, and as whom it is asked: write {settings}, or set BAO_ADDR and \
                 {VARIABLE}"
            );
        }
        let settings = settings.read()?;
        logins::log_in(&settings.provisioner, &settings.bao()?).await
    }
}
