//! `pgsiloctl leases audit`: roles in the tenants' databases that no live lease explains, leases
//! that no live session explains, and what has outlived its revocation; `--fix` takes it back.
//!
//! pgsilo revokes what it leased, and OpenBAO what pgsilo could not. This finds what both lost: an
//! OpenBAO restored from a backup, a forced revocation, a broker without rights, a role that
//! another tenant's grant keeps. It looks twice, some time apart, and believes only what is wrong
//! both times: logins and endings go on meanwhile. Works as the provisioner, with the policy of
//! `docker/openbao/provisioner.hcl`.

mod auditor;
mod brokers;
mod census;
mod cluster;
pub(crate) mod grants;
mod mend;
mod report;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use pgsilo_core::duration;
use pgsilo_core::registry::{Snapshot, Tenant};
use pgsilo_openbao::Client as Bao;
use tokio::sync::Mutex;

use crate::logins::block_on;
use crate::provisioner::Provisioner;
use crate::registry::{apply, connect_as_set, known};
use crate::say;
use crate::settings::SettingsFile;
use auditor::{Auditor, Subject};
use report::Report;

/// The registry's file, where nothing is said of it.
const FILE: &str = "/etc/pgsilo/tenants.toml";

/// What is done with leases.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Audit(Audit),
}

/// Find leased roles that no lease explains and leases that no session uses; --fix revokes them.
///
/// Compares, for each tenant of the registry, the roles that OpenBAO made in its database server,
/// who is logged in as them, and the leases that OpenBAO holds. It looks twice, --settle apart, and
/// reports what is wrong both times, one line each:
///
///   orphan_role           no lease explains the role: nothing will ever drop it
///   stopped_role          it is revoked and cannot log in, but it could not be dropped
///   idle_roles            leases explain them, but they have no sessions
///   undecided             OpenBAO is revoking leases; whether of these idle roles, is not known
///   roleless_lease        the role that the lease made is gone
///   overdue_lease         OpenBAO should have revoked it a minute ago and could not
///   irrevocable_lease     OpenBAO has given its revocation up
///   doubtful              more roles in use than leases that can be theirs; which, is not known
///   surplus               more leases than roles in use that can be theirs; which, is not known
///   unknown_to_openbao    OpenBAO has no such role to lease from: its backup predates the tenant
///   roleless_session      a session whose role is gone: it works on
///   prepared_transaction  it holds what it has locked, a leased role too, until it is rolled back
///   prepared_allowed      max_prepared_transactions is not 0
///   removed_tenant        roles of a tenant whose database is gone
///
/// --fix looks once more, ends the sessions of orphaned roles, drops roles, takes away what other
/// databases grant them, and revokes leases. It never touches what is undecided, doubtful or
/// surplus: leases that are not renewed end by themselves, and then it is known. The registry must
/// name the servers where all sessions are, and each cluster's leased roles must come from this
/// OpenBAO.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct Audit {
    /// The registry's file, as pgsilo reads it [default: the database that the file of settings names;
    /// without one, /etc/pgsilo/tenants.toml].
    #[arg(long, value_name = "FILE", env = "PGSILO_REGISTRY")]
    registry: Option<PathBuf>,
    /// Look at this tenant only; may be repeated.
    #[arg(long = "tenant", value_name = "ID")]
    tenants: Vec<String>,
    /// The file of settings.
    #[command(flatten)]
    settings: SettingsFile,
    /// As whom.
    #[command(flatten)]
    provisioner: Provisioner,
    /// Between the two looks: longer than pgsilo's login_timeout and its lease window.
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = settle)]
    settle: Duration,
    /// Take back what was found.
    #[arg(long)]
    fix: bool,
    /// First give each tenant's broker a new password and tell it OpenBAO: after OpenBAO was
    /// restored from a backup, or a standby promoted, that has another one than the other side.
    #[arg(long, requires = "fix")]
    new_broker_passwords: bool,
    /// Print JSON objects, one a line: findings, and what could not be looked at (unseen).
    #[arg(long)]
    json: bool,
}

fn settle(text: &str) -> Result<Duration, String> {
    match duration::parse(text)? {
        Duration::ZERO => {
            Err("two looks at one moment see the same; wait a second at least".into())
        }
        settle => Ok(settle),
    }
}

/// Runs the command to its end.
pub fn run(command: Command) -> Result<ExitCode> {
    let Command::Audit(audit) = command;
    block_on(audit.run())
}

impl Audit {
    async fn run(self) -> Result<ExitCode> {
        let bao = self.provisioner.bao(&self.settings).await?;
        let provisioner = self.provisioner.identity(&bao)?;
        let registry = self.snapshot(&bao).await.context("the registry")?;
        let auditor = Auditor { provisioner, bao, alone: Mutex::default() };
        let tenants = self.chosen(&registry)?;
        say::progress(&format!("looking at {}", report::count(tenants.len(), "tenant")));
        let mut report = Report::new(self.json);
        if self.new_broker_passwords {
            auditor.renew_brokers(&tenants, &mut report).await;
        }
        let looked_at = tenants.len();
        let subjects = Subject::all(tenants, &registry);
        let suspects = auditor.look(subjects, &mut report).await;
        if !suspects.is_empty() {
            say::progress(&format!(
                "{} to be looked at again in {} s",
                report::count(suspects.iter().map(|one| one.findings.len()).sum(), "finding"),
                self.settle.as_secs()
            ));
            tokio::time::sleep(self.settle).await;
            let mut confirmed = auditor.look_again(suspects, &mut report).await;
            if self.fix {
                let _claims = auditor.claim(&mut confirmed, &mut report).await;
                auditor.mend(confirmed, &mut report).await;
            } else {
                Auditor::leave(&confirmed, &mut report);
            }
        }
        Ok(report.conclude(looked_at))
    }

    /// What the registry says, of a file or of the database.
    async fn snapshot(&self, bao: &Bao) -> Result<Snapshot> {
        let file = match &self.registry {
            Some(file) => file,
            None if self.settings.exists() => {
                let settings = self.settings.read()?;
                let database = connect_as_set(&settings.registry, async || Ok(bao.clone())).await?;
                return apply::snapshot(&mut known(database).await?.client).await;
            }
            None => Path::new(FILE),
        };
        Ok(Snapshot::read(file, None)?)
    }

    fn chosen(&self, registry: &Snapshot) -> Result<Vec<Arc<Tenant>>> {
        let mut all: Vec<_> = registry.tenants().cloned().collect();
        all.sort_by(|a, b| a.id().as_str().cmp(b.id().as_str()));
        for wanted in &self.tenants {
            ensure!(
                all.iter().any(|tenant| tenant.id().as_str() == wanted),
                "the registry has no tenant {wanted:?}"
            );
        }
        if !self.tenants.is_empty() {
            all.retain(|tenant| self.tenants.iter().any(|id| id == tenant.id().as_str()));
        }
        Ok(all)
    }
}
