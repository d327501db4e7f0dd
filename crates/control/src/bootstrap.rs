//! `pgsiloctl bootstrap`: once for OpenBAO, for the registry and for each cluster, with an administrator's
//! logins that are not kept. What is there already is left alone, so it may be run again, and after an
//! update should be.
//!
//! Afterwards nothing of pgsilo has a password that a person has seen: each login to PostgreSQL is one that
//! OpenBAO makes, and the passwords that it makes them with are rotated as soon as it has them. What is on a
//! disk are the secret ids of three AppRoles at OpenBAO: the proxy's, the provisioner's and the operator's.

mod cluster;
mod logins;
mod openbao;
mod registry;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use pgsilo_core::secret::Secret;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::CreateOrphanTokenRequest;

use crate::bao::variable_of;
use crate::logins::block_on;
use crate::postgres::Identity;
use crate::settings::Settings;
use crate::{say, secrets};

/// Where OpenBAO makes the provisioner's logins, with a role for each cluster.
pub(crate) const PROVISIONER_MOUNT: &str = "pgsilo-provisioner";
/// The provisioner's policy.
const PROVISIONER_POLICY: &str = "pgsilo-provisioner";
/// Where it makes those of who watches clusters.
const MONITOR_MOUNT: &str = "pgsilo-monitor";

/// What is made ready.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Openbao(openbao::Openbao),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Registry(registry::Registry),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Cluster(cluster::Cluster),
}

/// Runs the command to its end.
pub fn run(command: Command) -> Result<ExitCode> {
    block_on(async {
        match command {
            Command::Openbao(openbao) => openbao.run().await,
            Command::Registry(registry) => registry.run().await,
            Command::Cluster(cluster) => cluster.run().await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// OpenBAO as its administrator.
#[derive(Debug, Args)]
struct BaoAdministrator {
    /// A file that holds an administrator's OpenBAO token [default: what BAO_TOKEN holds].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
}

impl BaoAdministrator {
    fn client(&self, settings: &Settings) -> Result<Bao> {
        let token = match (&self.bao_token_file, variable_of("BAO_TOKEN")) {
            (Some(path), _) => secrets::file(path)?,
            (None, Some(token)) => Secret::new(token),
            (None, None) => {
                bail!("no OpenBAO token of an administrator: set BAO_TOKEN or --bao-token-file")
            }
        };
        Ok(settings.bao()?.as_token(token))
    }
}

/// The provisioner, by a token that an administrator makes for this process: what it leases ends with it.
async fn as_provisioner(bao: &Bao) -> Result<Bao> {
    let options = CreateOrphanTokenRequest {
        display_name: Some("bootstrap".to_owned()),
        policies: Some(vec![PROVISIONER_POLICY.to_owned()]),
        no_default_policy: Some(true),
        period: Some("10m".to_owned()),
        ..CreateOrphanTokenRequest::default()
    };
    let token = bao.new_token(&options).await.context("a token of the provisioner")?;
    Ok(crate::logins::hold(bao.as_token(token.secret)))
}

/// A superuser of a PostgreSQL server.
#[derive(Debug, Args)]
struct Administrator {
    /// A superuser, and the password if this comes from the environment (a command line can be
    /// read by others), as a libpq DSN like postgresql://postgres@any; hosts and databases are not read of
    /// it.
    #[arg(
        long,
        value_name = "DSN",
        env = "PGSILO_ADMIN_DSN",
        hide_env_values = true,
        value_parser = secrets::secret
    )]
    admin: Secret,
    /// A file that holds the superuser's password, if the DSN does not.
    #[arg(long, value_name = "FILE")]
    admin_password_file: Option<PathBuf>,
}

impl Administrator {
    fn identity(&self) -> Result<Identity> {
        Identity::by_dsn(
            ("--admin", &self.admin),
            ("--admin-password-file", self.admin_password_file.as_ref()),
        )
    }
}

/// Does what is not so yet, or says what it would do.
#[derive(Debug)]
struct Doing {
    dry_run: bool,
    changes: usize,
}

impl Doing {
    fn new(dry_run: bool) -> Doing {
        Doing { dry_run, changes: 0 }
    }

    /// One thing: `is_so` already, or done by `work`.
    async fn ensure(
        &mut self,
        what: impl Display,
        is_so: bool,
        work: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        if is_so {
            return Ok(());
        }
        self.changes += 1;
        if self.dry_run {
            say::result(&format!("would: {what}"));
            return Ok(());
        }
        work.await.with_context(|| what.to_string())?;
        say::result(&format!("done:  {what}"));
        Ok(())
    }

    fn conclude(&self, subject: &str) {
        match (self.changes, self.dry_run) {
            (0, _) => say::progress(&format!("{subject} is as it should be")),
            (changes, true) => {
                say::progress(&format!("{subject}: {changes} changes, none made (--dry-run)"));
            }
            (changes, false) => say::progress(&format!("{subject}: {changes} changes")),
        }
    }
}
