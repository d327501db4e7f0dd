//! `pgsiloctl leases audit`: roles in the tenants' databases that no live lease explains, leases
//! that no live session explains; `--fix` takes them back.
//!
//! pgsilo revokes what it leased, and OpenBAO what pgsilo could not. This finds what both lost: an
//! OpenBAO restored from a backup, a forced revocation, a broker without rights. It looks twice,
//! some time apart, and believes only what is wrong both times: logins and endings go on meanwhile.
//! Works as the provisioner, with the policy of `docker/openbao/provisioner.hcl`.

mod census;
mod mend;
mod verdict;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use futures_util::{StreamExt, stream};
use pgsilo::registry::{Registry, Tenant};
use serde_json::{Value, json};

use crate::bao::Bao;
use crate::postgres::Identity;
use crate::secret::Secret;
use crate::{duration, say};
use verdict::Finding;

/// Tenants looked at at once.
const AT_ONCE: usize = 8;
/// What an audit that found something, and left it, ends with.
const FOUND: u8 = 3;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Audit(Audit),
}

/// Find leased roles that no lease explains and leases that no session uses; --fix revokes them.
///
/// Compares, for each tenant of the registry, the roles that OpenBAO made in its database server,
/// who is logged in as them, and the leases that OpenBAO holds. It looks twice, --settle apart, and
/// reports what is wrong both times, one line each:
///
///   orphan_role     no lease explains the role: nothing will ever drop it
///   idle_role       a lease explains it, but nobody is logged in as it
///   roleless_lease  the role that the lease made is gone
///   overdue_lease   OpenBAO should have revoked it a minute ago and could not
///   doubtful        more roles in use than leases that can be theirs; which, is not known
///   surplus         more leases than roles in use that can be theirs; which, is not known
///
/// --fix ends the sessions of orphaned roles, drops them, and revokes leases. It never touches what
/// is doubtful or surplus: leases that nobody renews end by themselves, and then it is known.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Audit {
    /// The registry's file, as pgsilo reads it.
    #[arg(
        long,
        value_name = "FILE",
        env = "PGSILO_REGISTRY",
        default_value = "/etc/pgsilo/tenants.toml"
    )]
    registry: PathBuf,
    /// Look at this tenant only; may be repeated.
    #[arg(long = "tenant", value_name = "ID")]
    tenants: Vec<String>,
    /// The provisioner's user and password, as a libpq DSN; hosts and databases are the registry's.
    #[arg(long, value_name = "DSN", env = "PROVISIONER_DSN", hide_env_values = true)]
    provisioner: String,
    /// A file that holds the provisioner's password, if the DSN does not.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// OpenBAO's address.
    #[arg(long, value_name = "URL", env = "BAO_ADDR")]
    bao: String,
    /// A file that holds the provisioner's OpenBAO token [default: what PROVISIONER_BAO_TOKEN holds].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
    /// PEM of the authorities that OpenBAO's certificate must chain to [default: the system's].
    #[arg(long, value_name = "FILE", env = "BAO_CACERT")]
    bao_ca: Option<PathBuf>,
    /// OpenBAO's namespace.
    #[arg(long, value_name = "NAME", env = "BAO_NAMESPACE")]
    bao_namespace: Option<String>,
    /// Between the two looks: longer than pgsilo's login_timeout and its lease window.
    #[arg(long, default_value = "15s", value_parser = duration::parse)]
    settle: Duration,
    /// Take back what was found.
    #[arg(long)]
    fix: bool,
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

/// Runs the command to its end.
pub(crate) fn run(command: Command) -> Result<ExitCode> {
    let Command::Audit(audit) = command;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(audit.run())
}

impl Audit {
    async fn run(self) -> Result<ExitCode> {
        let auditor = self.auditor()?;
        let tenants = self.chosen()?;
        say::progress(&format!("looking at {}", count(tenants.len(), "tenant")));
        let mut report = Report::default();
        let suspects = auditor.look(&tenants, &mut report).await;
        if !suspects.is_empty() {
            say::progress(&format!(
                "{} to be looked at again in {} s",
                count(suspects.iter().map(|suspect| suspect.findings.len()).sum(), "finding"),
                self.settle.as_secs()
            ));
            tokio::time::sleep(self.settle).await;
            let again: Vec<_> = suspects.iter().map(|one| Arc::clone(&one.tenant)).collect();
            for mut confirmed in auditor.look(&again, &mut report).await {
                let before = suspects.iter().find(|one| one.tenant.id() == confirmed.tenant.id());
                let before: BTreeSet<_> = before.iter().flat_map(|one| one.keys()).collect();
                confirmed.findings.retain(|finding| before.contains(&key(finding)));
                auditor.settle(confirmed, self.fix, self.json, &mut report).await;
            }
        }
        Ok(report.conclude(tenants.len()))
    }

    fn chosen(&self) -> Result<Vec<Arc<Tenant>>> {
        let registry = Registry::open(&self.registry).context("the registry")?;
        let mut all: Vec<_> = registry.snapshot().tenants().cloned().collect();
        all.sort_by(|a, b| a.id().as_str().cmp(b.id().as_str()));
        for wanted in &self.tenants {
            ensure!(
                all.iter().any(|tenant| tenant.id().as_str() == wanted),
                "no tenant {wanted:?} in {}",
                self.registry.display()
            );
        }
        if !self.tenants.is_empty() {
            all.retain(|tenant| self.tenants.iter().any(|id| id == tenant.id().as_str()));
        }
        Ok(all)
    }

    fn auditor(&self) -> Result<Auditor> {
        let file = |path: &PathBuf| {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| format!("reading {}", path.display()))?;
            Ok::<_, anyhow::Error>(Secret::new(text.trim().to_owned()))
        };
        // The parser's error may hold what it could not parse.
        let dsn: tokio_postgres::Config = match self.provisioner.parse() {
            Ok(dsn) => dsn,
            Err(_) => bail!("--provisioner is not a DSN; write it like postgresql://user@host"),
        };
        let user = dsn.get_user().context("--provisioner names no user")?.to_owned();
        let password = match (&self.password_file, dsn.get_password()) {
            (Some(path), _) => file(path)?,
            (None, Some(password)) => Secret::new(String::from_utf8_lossy(password).into_owned()),
            (None, None) => bail!("no password: put it in --provisioner or in a --password-file"),
        };
        let token = match (&self.bao_token_file, std::env::var("PROVISIONER_BAO_TOKEN")) {
            (Some(path), _) => file(path)?,
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
        let bao = Bao::trusting(&self.bao, ca.as_deref(), self.bao_namespace.as_deref())?;
        Ok(Auditor { provisioner: Identity { user, password }, bao: bao.as_token(token) })
    }
}

/// Whoever may look, and mend.
#[derive(Debug)]
struct Auditor {
    provisioner: Identity,
    bao: Bao,
}

/// What was found of one tenant.
#[derive(Debug)]
struct Suspect {
    tenant: Arc<Tenant>,
    findings: Vec<Finding>,
}

impl Suspect {
    fn keys(&self) -> impl Iterator<Item = (&'static str, Vec<&str>)> {
        self.findings.iter().map(key)
    }
}

impl Auditor {
    /// Looks at each tenant once; gives back those with findings.
    async fn look(&self, tenants: &[Arc<Tenant>], report: &mut Report) -> Vec<Suspect> {
        let looks = stream::iter(tenants.iter().cloned()).map(|tenant| async move {
            let judged = self.judge(&tenant).await;
            (tenant, judged)
        });
        let mut looks = looks.buffered(AT_ONCE);
        let mut suspects = Vec::new();
        while let Some((tenant, judged)) = looks.next().await {
            match judged {
                Ok(findings) if findings.is_empty() => {}
                Ok(findings) => suspects.push(Suspect { tenant, findings }),
                Err(error) => report.fail(&tenant, &error),
            }
        }
        suspects
    }

    async fn judge(&self, tenant: &Tenant) -> Result<Vec<Finding>> {
        let database = self.provisioner.connect(tenant.placement()).await?;
        let groups = census::take(tenant, &database, &self.bao).await?;
        Ok(groups.into_iter().flat_map(|group| verdict::judge(group.roles, group.leases)).collect())
    }

    /// Reports what was confirmed, and mends it if that is wanted.
    async fn settle(&self, confirmed: Suspect, fix: bool, as_json: bool, report: &mut Report) {
        if confirmed.findings.is_empty() {
            return;
        }
        let tenant = &confirmed.tenant;
        let database = match self.provisioner.connect(tenant.placement()).await {
            Ok(database) => database,
            Err(error) => return report.fail(tenant, &error),
        };
        for finding in &confirmed.findings {
            let outcome = match fix {
                false => Outcome::Left,
                true => match mend::mend(finding, &database, &self.bao).await {
                    Ok(true) => Outcome::Mended,
                    Ok(false) => Outcome::Left,
                    Err(error) => Outcome::Failed(format!("{error:#}")),
                },
            };
            report.count(&outcome);
            say::result(&match as_json {
                true => as_object(tenant, finding, &outcome).to_string(),
                false => as_line(tenant, finding, &outcome),
            });
        }
    }
}

/// What became of a finding.
#[derive(Debug)]
enum Outcome {
    Mended,
    Left,
    Failed(String),
}

/// What an audit comes to.
#[derive(Debug, Default)]
struct Report {
    mended: usize,
    left: usize,
    failed: usize,
    /// Tenants that could not be looked at.
    unseen: BTreeSet<String>,
}

impl Report {
    fn fail(&mut self, tenant: &Tenant, error: &anyhow::Error) {
        let id = tenant.id().as_str();
        if self.unseen.insert(id.to_owned()) {
            say::progress(&format!("pgsiloctl: error: tenant {id}: {error:#}"));
        }
    }

    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Mended => self.mended += 1,
            Outcome::Left => self.left += 1,
            Outcome::Failed(_) => self.failed += 1,
        }
    }

    fn conclude(&self, tenants: usize) -> ExitCode {
        let Report { mended, left, failed, unseen } = self;
        let mut words = vec![count(mended + left + failed, "finding")];
        for (number, what) in [(mended, "mended"), (left, "left"), (failed, "not to be mended")] {
            if *number > 0 {
                words.push(format!("{number} {what}"));
            }
        }
        if !unseen.is_empty() {
            words.push(format!("{} could not be looked at", count(unseen.len(), "tenant")));
        }
        say::progress(&format!("{}: {}", count(tenants, "tenant"), words.join(", ")));
        match (unseen.is_empty() && *failed == 0, *left) {
            (false, _) => ExitCode::FAILURE,
            (true, 0) => ExitCode::SUCCESS,
            (true, _) => ExitCode::from(FOUND),
        }
    }
}

/// What makes a finding the same one at a second look, however many are logged in by then.
fn key(finding: &Finding) -> (&'static str, Vec<&str>) {
    match finding {
        Finding::OrphanRole { role, .. } => ("orphan_role", vec![role]),
        Finding::IdleRole { role, .. } => ("idle_role", vec![role]),
        Finding::RolelessLease(lease) => ("roleless_lease", vec![lease]),
        Finding::OverdueLease(lease) => ("overdue_lease", vec![lease]),
        Finding::Doubtful { roles, .. } => ("doubtful", roles.iter().map(String::as_str).collect()),
        Finding::Surplus { leases, .. } => ("surplus", leases.iter().map(String::as_str).collect()),
    }
}

fn as_object(tenant: &Tenant, finding: &Finding, outcome: &Outcome) -> Value {
    let (kind, _) = key(finding);
    let mut object = match finding {
        Finding::OrphanRole { role, sessions } => json!({ "role": role, "sessions": sessions }),
        Finding::IdleRole { role, leases, exact } => {
            json!({ "role": role, "leases": leases, "exact": exact })
        }
        Finding::RolelessLease(lease) | Finding::OverdueLease(lease) => json!({ "lease": lease }),
        Finding::Doubtful { roles, unexplained } => {
            json!({ "roles": roles, "unexplained": unexplained })
        }
        Finding::Surplus { leases, roleless } => json!({ "leases": leases, "roleless": roleless }),
    };
    object["tenant"] = tenant.id().as_str().into();
    object["finding"] = kind.into();
    object["outcome"] = match outcome {
        Outcome::Mended => "mended".into(),
        Outcome::Left => "left".into(),
        Outcome::Failed(error) => json!({ "failed": error }),
    };
    object
}

fn as_line(tenant: &Tenant, finding: &Finding, outcome: &Outcome) -> String {
    let (kind, _) = key(finding);
    let what = match finding {
        Finding::OrphanRole { role, sessions } => {
            format!(
                "{role}: no lease explains it; {}",
                count(usize::try_from(*sessions).unwrap_or(0), "session")
            )
        }
        Finding::IdleRole { role, leases, exact: true } => {
            format!("{role}: nobody is logged in as it; its lease is {}", leases.join(" or "))
        }
        Finding::IdleRole { role, leases, exact: false } => {
            format!("{role}: nobody is logged in as it; its lease is one of {}", leases.len())
        }
        Finding::RolelessLease(lease) => format!("{lease}: its role is gone"),
        Finding::OverdueLease(lease) => format!("{lease}: it has ended, and is not revoked"),
        Finding::Doubtful { roles, unexplained } => {
            format!("{unexplained} of these have no lease: {}", roles.join(" "))
        }
        Finding::Surplus { leases, roleless } => {
            format!("{roleless} of these have no role: {}", leases.join(" "))
        }
    };
    let outcome = match outcome {
        Outcome::Mended => "; mended".to_owned(),
        Outcome::Left => String::new(),
        Outcome::Failed(error) => format!("; NOT MENDED: {error}"),
    };
    format!("{}  {kind}  {what}{outcome}", tenant.id())
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
