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
use crate::{duration, say, secret};
use verdict::{Finding, Lease, Role};

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
///   idle_roles      leases explain them, but nobody is logged in as them
///   roleless_lease  the role that the lease made is gone
///   overdue_lease   OpenBAO should have revoked it a minute ago and could not
///   doubtful        more roles in use than leases that can be theirs; which, is not known
///   surplus         more leases than roles in use that can be theirs; which, is not known
///
/// --fix looks once more, ends the sessions of orphaned roles, drops roles, and revokes leases. It
/// never touches what is doubtful or surplus: leases that nobody renews end by themselves, and then
/// it is known. The registry must name the servers where all sessions are, and each cluster's leased
/// roles must come from this OpenBAO.
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
    /// The provisioner's user, and its password if this comes from the environment (a command line
    /// can be read by others), as a libpq DSN; hosts and databases are the registry's.
    #[arg(
        long,
        value_name = "DSN",
        env = "PROVISIONER_DSN",
        hide_env_values = true,
        value_parser = secret::parse
    )]
    provisioner: Secret,
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
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = settle)]
    settle: Duration,
    /// Take back what was found.
    #[arg(long)]
    fix: bool,
    /// Print JSON objects, one a line.
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
            for suspect in auditor.look_again(suspects, &mut report).await {
                auditor.settle(suspect, self.fix, self.json, &mut report).await;
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
        let dsn: tokio_postgres::Config = match self.provisioner.expose().parse() {
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

    /// Looks at the suspects once more; gives back those with findings that are still the same.
    async fn look_again(&self, suspects: Vec<Suspect>, report: &mut Report) -> Vec<Suspect> {
        let tenants: Vec<_> = suspects.iter().map(|one| Arc::clone(&one.tenant)).collect();
        let mut confirmed = self.look(&tenants, report).await;
        for now in &mut confirmed {
            let before = suspects.iter().find(|one| one.tenant.id() == now.tenant.id());
            let before = before.map(|one| &one.findings[..]).unwrap_or_default();
            now.findings = verdict::confirmed(before, std::mem::take(&mut now.findings));
        }
        confirmed.retain(|one| !one.findings.is_empty());
        confirmed
    }

    async fn judge(&self, tenant: &Tenant) -> Result<Vec<Finding>> {
        let database = self.provisioner.connect(tenant.placement()).await?;
        let groups = census::take(tenant, &database, &self.bao).await?;
        let mut findings = Vec::new();
        for group in groups {
            findings.extend(verdict::judge(group.roles, group.leases)?);
        }
        Ok(findings)
    }

    /// Reports what was confirmed; mends what still is so, if that is wanted: other tenants may
    /// have taken their time since.
    async fn settle(&self, confirmed: Suspect, fix: bool, as_json: bool, report: &mut Report) {
        if !fix {
            for finding in &confirmed.findings {
                report.tell(&confirmed.tenant, finding, &Outcome::Left, as_json);
            }
            return;
        }
        let tenant = Arc::clone(&confirmed.tenant);
        let Some(confirmed) = self.look_again(vec![confirmed], report).await.pop() else { return };
        let database = match self.provisioner.connect(tenant.placement()).await {
            Ok(database) => database,
            Err(error) => return report.fail(&tenant, &error),
        };
        for finding in &confirmed.findings {
            let outcome = match mend::mend(finding, &database, &self.bao).await {
                Ok(true) => Outcome::Mended,
                Ok(false) => Outcome::Left,
                Err(error) => Outcome::Failed(format!("{error:#}")),
            };
            report.tell(&tenant, finding, &outcome, as_json);
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

    fn tell(&mut self, tenant: &Tenant, finding: &Finding, outcome: &Outcome, as_json: bool) {
        match outcome {
            Outcome::Mended => self.mended += 1,
            Outcome::Left => self.left += 1,
            Outcome::Failed(_) => self.failed += 1,
        }
        say::result(&match as_json {
            true => as_object(tenant, finding, outcome).to_string(),
            false => as_line(tenant, finding, outcome),
        });
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

fn kind(finding: &Finding) -> &'static str {
    match finding {
        Finding::OrphanRole(_) => "orphan_role",
        Finding::IdleRoles { .. } => "idle_roles",
        Finding::RolelessLease(_) => "roleless_lease",
        Finding::OverdueLease(_) => "overdue_lease",
        Finding::Doubtful { .. } => "doubtful",
        Finding::Surplus { .. } => "surplus",
    }
}

fn names(roles: &[Role]) -> Vec<&str> {
    roles.iter().map(|role| role.name.as_str()).collect()
}

fn ids(leases: &[Lease]) -> Vec<&str> {
    leases.iter().map(|lease| lease.id.as_str()).collect()
}

fn as_object(tenant: &Tenant, finding: &Finding, outcome: &Outcome) -> Value {
    let mut object = match finding {
        Finding::OrphanRole(role) => json!({ "role": role.name, "sessions": role.sessions }),
        Finding::IdleRoles { roles, leases, exact } => {
            json!({ "roles": names(roles), "leases": ids(leases), "exact": exact })
        }
        Finding::RolelessLease(lease) | Finding::OverdueLease(lease) => {
            json!({ "lease": lease.id })
        }
        Finding::Doubtful { roles, unexplained } => {
            json!({ "roles": names(roles), "unexplained": unexplained })
        }
        Finding::Surplus { leases, roleless } => {
            json!({ "leases": ids(leases), "roleless": roleless })
        }
    };
    object["tenant"] = tenant.id().as_str().into();
    object["finding"] = kind(finding).into();
    object["outcome"] = match outcome {
        Outcome::Mended => "mended".into(),
        Outcome::Left => "left".into(),
        Outcome::Failed(error) => json!({ "failed": error }),
    };
    object
}

fn as_line(tenant: &Tenant, finding: &Finding, outcome: &Outcome) -> String {
    let what = match finding {
        Finding::OrphanRole(role) => {
            let sessions = count(usize::try_from(role.sessions).unwrap_or(0), "session");
            format!("{}: no lease explains it; {sessions}", role.name)
        }
        Finding::IdleRoles { roles, leases, exact } => {
            let whose = if *exact { "" } else { ", some of them of others" };
            let (roles, leases) = (names(roles).join(" "), count(leases.len(), "lease"));
            format!("{roles}: nobody is logged in; {leases}{whose}")
        }
        Finding::RolelessLease(lease) => format!("{}: its role is gone", lease.id),
        Finding::OverdueLease(lease) => format!("{}: it has ended, and is not revoked", lease.id),
        Finding::Doubtful { roles, unexplained } => {
            format!("{unexplained} of these have no lease: {}", names(roles).join(" "))
        }
        Finding::Surplus { leases, roleless } => {
            format!("{roleless} of these have no role: {}", ids(leases).join(" "))
        }
    };
    let outcome = match outcome {
        Outcome::Mended => "; mended".to_owned(),
        Outcome::Left => String::new(),
        Outcome::Failed(error) => format!("; NOT MENDED: {error}"),
    };
    format!("{}  {}  {what}{outcome}", tenant.id(), kind(finding))
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
