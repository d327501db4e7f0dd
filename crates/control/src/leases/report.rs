//! What an audit says, and what it comes to.

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::auditor::Subject;
use super::verdict::{ClusterFinding, Finding, Lease, Role};
use crate::say;

/// What an audit that found something, and left it, ends with.
const FOUND: u8 = 3;

/// What became of a finding.
#[derive(Debug)]
pub(super) enum Outcome {
    Mended,
    Left,
    Failed(String),
}

/// What an audit comes to.
#[derive(Debug)]
pub(super) struct Report {
    as_json: bool,
    mended: usize,
    left: usize,
    failed: usize,
    /// What could not be looked at.
    unseen: BTreeSet<String>,
}

impl Report {
    pub(super) fn new(as_json: bool) -> Self {
        Self { as_json, mended: 0, left: 0, failed: 0, unseen: BTreeSet::new() }
    }

    pub(super) fn fail(&mut self, what: &str, error: &anyhow::Error) {
        if self.unseen.insert(what.to_owned()) {
            say::progress(&format!("pgsiloctl: error: {what}: {error:#}"));
            if self.as_json {
                let unseen = json!({ "unseen": what, "error": format!("{error:#}") });
                say::result(&unseen.to_string());
            }
        }
    }

    pub(super) fn tell(&mut self, subject: &Subject, finding: &Finding, outcome: &Outcome) {
        match outcome {
            Outcome::Mended => self.mended += 1,
            Outcome::Left => self.left += 1,
            Outcome::Failed(_) => self.failed += 1,
        }
        say::result(&match self.as_json {
            true => as_object(subject, finding, outcome).to_string(),
            false => as_line(subject, finding, outcome),
        });
    }

    pub(super) fn conclude(&self, tenants: usize) -> ExitCode {
        let Report { mended, left, failed, unseen, .. } = self;
        let mut words = vec![count(mended + left + failed, "finding")];
        for (number, what) in [(mended, "mended"), (left, "left"), (failed, "not to be mended")] {
            if *number > 0 {
                words.push(format!("{number} {what}"));
            }
        }
        if !unseen.is_empty() {
            words.push(format!("{} of what is to be seen could not be", unseen.len()));
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
        Finding::StoppedRole(_) => "stopped_role",
        Finding::IdleRoles { .. } => "idle_roles",
        Finding::Undecided { .. } => "undecided",
        Finding::RolelessLease(_) => "roleless_lease",
        Finding::OverdueLease(_) => "overdue_lease",
        Finding::IrrevocableLease(_) => "irrevocable_lease",
        Finding::Doubtful { .. } => "doubtful",
        Finding::Surplus { .. } => "surplus",
        Finding::UnknownToOpenBao { .. } => "unknown_to_openbao",
        Finding::Cluster(finding) => match finding {
            ClusterFinding::RolelessSession { .. } => "roleless_session",
            ClusterFinding::PreparedTransaction { .. } => "prepared_transaction",
            ClusterFinding::PreparedAllowed { .. } => "prepared_allowed",
            ClusterFinding::RemovedTenant { .. } => "removed_tenant",
        },
    }
}

fn names(roles: &[Role]) -> Vec<&str> {
    roles.iter().map(|role| role.name.as_str()).collect()
}

fn ids(leases: &[Lease]) -> Vec<&str> {
    leases.iter().map(|lease| lease.id.as_str()).collect()
}

fn as_object(subject: &Subject, finding: &Finding, outcome: &Outcome) -> Value {
    let mut object = match finding {
        Finding::OrphanRole(role) => json!({ "role": role.name, "sessions": role.sessions }),
        Finding::StoppedRole(role) => {
            json!({ "role": role.name, "sessions": role.sessions, "databases": role.databases })
        }
        Finding::IdleRoles { roles, leases, exact } => {
            json!({ "roles": names(roles), "leases": ids(leases), "exact": exact })
        }
        Finding::Undecided { roles, leases } => {
            json!({ "roles": names(roles), "leases": ids(leases) })
        }
        Finding::RolelessLease(lease) | Finding::OverdueLease(lease) => {
            json!({ "lease": lease.id })
        }
        Finding::IrrevocableLease(lease) => {
            json!({ "lease": lease.id, "error": lease.given_up })
        }
        Finding::Doubtful { roles, unexplained } => {
            json!({ "roles": names(roles), "unexplained": unexplained })
        }
        Finding::Surplus { leases, roleless } => {
            json!({ "leases": ids(leases), "roleless": roleless })
        }
        Finding::UnknownToOpenBao { role } => json!({ "role": role }),
        Finding::Cluster(ClusterFinding::RolelessSession { pid, role, database }) => {
            json!({ "pid": pid, "role": role, "database": database })
        }
        Finding::Cluster(ClusterFinding::PreparedTransaction { name, owner, database }) => {
            json!({ "transaction": name, "owner": owner, "database": database })
        }
        Finding::Cluster(ClusterFinding::PreparedAllowed { max }) => json!({ "max": max }),
        Finding::Cluster(ClusterFinding::RemovedTenant { id, roles }) => {
            json!({ "removed": id, "roles": roles })
        }
    };
    let (what, name) = subject.named();
    object[what] = name.into();
    object["finding"] = kind(finding).into();
    object["outcome"] = match outcome {
        Outcome::Mended => "mended".into(),
        Outcome::Left => "left".into(),
        Outcome::Failed(error) => json!({ "failed": error }),
    };
    object
}

fn as_line(subject: &Subject, finding: &Finding, outcome: &Outcome) -> String {
    let sessions = |number: i64| count(usize::try_from(number).unwrap_or(0), "session");
    let what = match finding {
        Finding::OrphanRole(role) => {
            format!("{}: no lease explains it; {}", role.name, sessions(role.sessions))
        }
        Finding::StoppedRole(role) => {
            let named = match &role.databases[..] {
                [] => String::new(),
                databases => format!(", named in {}", databases.join(" ")),
            };
            let sessions = sessions(role.sessions);
            format!("{}: nobody can log in, and it is not dropped; {sessions}{named}", role.name)
        }
        Finding::IdleRoles { roles, leases, exact } => {
            let whose = if *exact { "" } else { ", some of them of others" };
            let (roles, leases) = (names(roles).join(" "), count(leases.len(), "lease"));
            format!("{roles}: nobody is logged in; {leases}{whose}")
        }
        Finding::Undecided { roles, leases } => {
            let (roles, leases) = (names(roles).join(" "), count(leases.len(), "lease"));
            format!(
                "{roles}: nobody is logged in; NOT JUDGED, as OpenBAO has been revoking {leases}; \
                 look again when that is done"
            )
        }
        Finding::RolelessLease(lease) => format!("{}: its role is gone", lease.id),
        Finding::OverdueLease(lease) => format!("{}: it has ended, and is not revoked", lease.id),
        Finding::IrrevocableLease(lease) => {
            let error = lease.given_up.as_deref().unwrap_or_default();
            format!("{}: OpenBAO has given its revocation up: {error}", lease.id)
        }
        Finding::Doubtful { roles, unexplained } => {
            format!("{unexplained} of these have no lease: {}", names(roles).join(" "))
        }
        Finding::Surplus { leases, roleless } => {
            format!("{roleless} of these have no role: {}", ids(leases).join(" "))
        }
        Finding::UnknownToOpenBao { role } => format!(
            "{role}: OpenBAO knows no such role, and what was leased from it is NOT JUDGED; describe \
             the tenant to OpenBAO again, or mend the registry"
        ),
        Finding::Cluster(finding) => of_cluster(finding),
    };
    let outcome = match outcome {
        Outcome::Mended => "; mended".to_owned(),
        Outcome::Left => String::new(),
        Outcome::Failed(error) => format!("; NOT MENDED: {error}"),
    };
    let (_, name) = subject.named();
    format!("{name}  {}  {what}{outcome}", kind(finding))
}

fn of_cluster(finding: &ClusterFinding) -> String {
    match finding {
        ClusterFinding::RolelessSession { pid, role, database } => format!(
            "process {pid} in database {database}: its role {role} is gone; a superuser ends it with \
             SELECT pg_terminate_backend({pid}), and --fix does after \
             GRANT pg_signal_backend TO the provisioner"
        ),
        ClusterFinding::PreparedTransaction { name, owner, database } => {
            let owner = if owner.is_empty() { "a role that is gone" } else { owner };
            format!("{name:?} of {owner} in database {database}: it holds its locks without end")
        }
        ClusterFinding::PreparedAllowed { max } => format!(
            "max_prepared_transactions is {max}: a session may make its own role undroppable; set it \
             to 0 and start the server again"
        ),
        ClusterFinding::RemovedTenant { id, roles } => {
            format!("{id}: its database is gone, and these are not: {}", roles.join(" "))
        }
    }
}

pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
