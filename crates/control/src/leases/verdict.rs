//! Which roles a lease explains, and which leases a session explains: from names and times alone.
//!
//! OpenBAO does not say which role a lease made. But it gives a role VALID UNTIL the lease's end
//! and five seconds more, when it makes it and when it renews it. So a role and a lease belong
//! together only if their ends do. Where several fit, it is not known which belongs to which: what
//! is said then is true for either, and what cannot be said is called doubtful, never guessed.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Result, ensure};

/// A leased role, as PostgreSQL has it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Role {
    pub(super) name: String,
    /// VALID UNTIL, in seconds since 1970.
    pub(super) valid_until: f64,
    /// How many are logged in as it.
    pub(super) sessions: i64,
}

/// A leased role that was stopped, by a revocation or an audit, and is not dropped: it cannot log
/// in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stopped {
    pub(super) name: String,
    /// When, in seconds since 1970.
    pub(super) since: f64,
    /// How many are logged in as it all the same.
    pub(super) sessions: i64,
    /// Databases where something depends on it.
    pub(super) databases: Vec<String>,
}

/// A lease, as OpenBAO has it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Lease {
    pub(super) id: String,
    /// In seconds since 1970.
    pub(super) expires: f64,
    /// For how long it should have been gone, in seconds; negative while it is in force.
    pub(super) overdue: i64,
    /// OpenBAO has given its revocation up, and why.
    pub(super) given_up: Option<String>,
}

/// What is not as it should be. Two of two looks are equal only if nothing of it has moved: a
/// VALID UNTIL that did is one that a lease has renewed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Finding {
    /// No lease can explain the role.
    OrphanRole(Role),
    /// These roles have no sessions, and may be those of these leases.
    IdleRoles {
        roles: Vec<Role>,
        leases: Vec<Lease>,
        /// No role in use may be any of the leases'.
        exact: bool,
    },
    /// These roles have no sessions, and no lease in force explains them; but OpenBAO is
    /// revoking these leases, and any of them may be a role's.
    Undecided { roles: Vec<Role>, leases: Vec<Lease> },
    /// A role that was stopped and is still there.
    StoppedRole(Stopped),
    /// OpenBAO has given the lease's revocation up.
    IrrevocableLease(Lease),
    /// OpenBAO does not know this role of its own: no lease can explain a credential of it.
    UnknownToOpenBao { role: String },
    /// Of the whole cluster, for all tenants.
    Cluster(ClusterFinding),
    /// The role that the lease made is gone.
    RolelessLease(Lease),
    /// The lease has ended, and OpenBAO could not revoke it.
    OverdueLease(Lease),
    /// More of these roles, all of them in use, than there are leases: some are not explained.
    Doubtful { roles: Vec<Role>, unexplained: usize },
    /// More of these leases than there are roles, all of those in use.
    Surplus { leases: Vec<Lease>, roleless: usize },
}

/// What is wrong with a cluster, and of no tenant that it could be told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ClusterFinding {
    /// A session whose role is gone: it works on, and only a superuser and who has
    /// `pg_signal_backend` may end it.
    RolelessSession { pid: i32, role: u32, database: String },
    /// A prepared transaction: it holds what it has locked, its role too, for ever.
    PreparedTransaction { name: String, owner: String, database: String },
    /// Sessions may prepare transactions.
    PreparedAllowed { max: i32 },
    /// Roles of a tenant whose database is gone.
    RemovedTenant { id: String, roles: Vec<String> },
}

/// What VALID UNTIL has over the lease's end at the most: five seconds, and rounding.
const OVER: f64 = 6.0;
/// What it may be behind: as long as OpenBAO may have taken for the statements between the two.
const BEHIND: f64 = 120.0;
/// OpenBAO revokes what has ended within seconds.
const OVERDUE_SECONDS: i64 = 60;

/// Roles and leases that belong together or may: all leases of a range, in the order of their ends.
#[derive(Debug)]
struct Company<'a> {
    roles: Vec<&'a Role>,
    leases: Range<usize>,
}

/// Judges the roles and the leases that go by one name.
///
/// # Errors
/// When roles and leases have nothing in common at all: then it is the times that are not
/// understood, and everything would be accused.
pub(super) fn judge(mut roles: Vec<Role>, leases: Vec<Lease>) -> Result<Vec<Finding>> {
    // A lease that was given back ends at once, whatever its role says, and OpenBAO is at it.
    let (ended, mut leases): (Vec<_>, Vec<_>) =
        leases.into_iter().partition(|lease| lease.overdue >= 0);
    roles.sort_by(|a, b| a.valid_until.total_cmp(&b.valid_until));
    leases.sort_by(|a, b| a.expires.total_cmp(&b.expires));
    ensure!(
        roles.is_empty()
            || leases.is_empty()
            || roles.iter().any(|role| !within(role, &leases).is_empty()),
        "no lease of {} ends when any of {} roles does, so they cannot be told to belong together: \
         was OpenBAO restored from a backup (then look again when the leases of the backup have ended, \
         within the longest default_ttl), does it cut leases to the life of the token (batch tokens), \
         or did its clock jump?",
        leases.len(),
        roles.len()
    );
    let mut findings = Vec::new();
    let mut explained = 0;
    for company in companies(&roles, &leases) {
        let range = company.leases.clone();
        findings.extend(roleless(&leases[explained..range.start.max(explained)]));
        explained = explained.max(range.end);
        findings.extend(of_company(&company, &leases));
    }
    findings.extend(roleless(&leases[explained..]));
    if !ended.is_empty() {
        findings = undecided(findings, &ended);
    }
    findings.extend(ended.into_iter().filter_map(|lease| match lease.given_up {
        Some(_) => Some(Finding::IrrevocableLease(lease)),
        None if lease.overdue > OVERDUE_SECONDS => Some(Finding::OverdueLease(lease)),
        None => None,
    }));
    Ok(findings)
}

/// Which role a lease made that is being revoked, OpenBAO knows and does not say.
fn undecided(findings: Vec<Finding>, ended: &[Lease]) -> Vec<Finding> {
    let mut unused = Vec::new();
    let mut others = Vec::new();
    for finding in findings {
        match finding {
            Finding::OrphanRole(role) if role.sessions == 0 => unused.push(role),
            other => others.push(other),
        }
    }
    if !unused.is_empty() {
        others.push(Finding::Undecided { roles: unused, leases: ended.to_vec() });
    }
    others
}

fn roleless(leases: &[Lease]) -> impl Iterator<Item = Finding> {
    leases.iter().cloned().map(Finding::RolelessLease)
}

/// Roles whose leases may be one another's, together.
fn companies<'a>(roles: &'a [Role], leases: &[Lease]) -> Vec<Company<'a>> {
    let mut companies: Vec<Company<'a>> = Vec::new();
    for role in roles {
        let range = within(role, leases);
        match companies.last_mut() {
            Some(last) if range.start < last.leases.end => {
                last.roles.push(role);
                last.leases.end = last.leases.end.max(range.end);
            }
            _ => companies.push(Company { roles: vec![role], leases: range }),
        }
    }
    companies
}

/// The leases that may be a role's.
fn within(role: &Role, leases: &[Lease]) -> Range<usize> {
    let start = leases.partition_point(|lease| lease.expires < role.valid_until - OVER);
    let end = leases.partition_point(|lease| lease.expires <= role.valid_until + BEHIND);
    start..end
}

fn of_company(company: &Company<'_>, leases: &[Lease]) -> Vec<Finding> {
    let theirs = &leases[company.leases.clone()];
    if theirs.is_empty() {
        return company.roles.iter().copied().cloned().map(Finding::OrphanRole).collect();
    }
    let (busy, idle): (Vec<&Role>, Vec<&Role>) =
        company.roles.iter().partition(|role| role.sessions > 0);
    let named = |roles: &[&Role]| roles.iter().copied().cloned().collect::<Vec<_>>();
    let mut findings = Vec::new();
    if !idle.is_empty() {
        let (roles, leases) = (named(&idle), theirs.to_vec());
        findings.push(Finding::IdleRoles { roles, leases, exact: busy.is_empty() });
    }
    let unexplained = unmatched(&busy, leases);
    if unexplained > 0 {
        findings.push(Finding::Doubtful { roles: named(&busy), unexplained });
    }
    if idle.is_empty() && theirs.len() > busy.len() {
        let roleless = theirs.len() - busy.len();
        findings.push(Finding::Surplus { leases: theirs.to_vec(), roleless });
    }
    findings
}

/// How many roles are left over, if each takes a lease of its own. The first to end takes the
/// first to end: no other way leaves fewer over, as all may differ by the same.
fn unmatched(roles: &[&Role], leases: &[Lease]) -> usize {
    let mut next = 0;
    let mut left = 0;
    for role in roles {
        let range = within(role, leases);
        next = range.start.max(next);
        if next < range.end { next += 1 } else { left += 1 }
    }
    left
}

/// What is wrong at both of two looks. What has moved in between is alive; and of idle roles only
/// what both looks say of their leases may be acted upon.
pub(super) fn confirmed(before: &[Finding], now: Vec<Finding>) -> Vec<Finding> {
    let mut confirmed = Vec::new();
    for finding in now {
        match finding {
            Finding::IdleRoles { roles, leases, exact } => {
                confirmed.extend(still_idle(before, roles, leases, exact));
            }
            Finding::Undecided { roles, leases } => {
                confirmed.extend(decided(before, roles, leases));
            }
            Finding::OrphanRole(role) if role.sessions == 0 => {
                let unused = unused(before).any(|before| before.is_still(&role));
                confirmed.extend(unused.then_some(Finding::OrphanRole(role)));
            }
            finding => {
                if before.iter().any(|before| before.is_still(&finding)) {
                    confirmed.push(finding);
                }
            }
        }
    }
    confirmed
}

/// Roles without sessions, whatever could explain them.
fn unused(findings: &[Finding]) -> impl Iterator<Item = &Role> {
    findings.iter().flat_map(|finding| match finding {
        Finding::IdleRoles { roles, .. } | Finding::Undecided { roles, .. } => roles.as_slice(),
        Finding::OrphanRole(role) if role.sessions == 0 => std::slice::from_ref(role),
        _ => &[],
    })
}

fn still_idle(
    before: &[Finding],
    mut roles: Vec<Role>,
    leases: Vec<Lease>,
    exact: bool,
) -> Option<Finding> {
    let mut leases_before = BTreeSet::new();
    for finding in before {
        if let Finding::IdleRoles { leases, exact: true, .. } = finding {
            leases_before.extend(leases.iter().map(|lease| lease.id.as_str()));
        }
    }
    roles.retain(|role| unused(before).any(|before| before.is_still(role)));
    let known = leases.iter().all(|lease| leases_before.contains(lease.id.as_str()));
    (!roles.is_empty()).then_some(Finding::IdleRoles { roles, leases, exact: exact && known })
}

/// Roles that no lease in force explains any more. The lease of one that was there at the look
/// before is one of those that could explain it then, in force or ended; so where none of those is
/// left, the role has no lease.
fn decided(before: &[Finding], mut roles: Vec<Role>, mut leases: Vec<Lease>) -> Vec<Finding> {
    let mut possible = BTreeSet::new();
    for finding in before {
        if let Finding::IdleRoles { leases, .. } | Finding::Undecided { leases, .. } = finding {
            possible.extend(leases.iter().map(|lease| lease.id.as_str()));
        }
    }
    roles.retain(|role| unused(before).any(|before| before.is_still(role)));
    leases.retain(|lease| possible.contains(lease.id.as_str()));
    match (roles.is_empty(), leases.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => roles.into_iter().map(Finding::OrphanRole).collect(),
        (false, false) => vec![Finding::Undecided { roles, leases }],
    }
}

impl Role {
    /// Whether it is the same as at a look before: a VALID UNTIL that moved is one that was
    /// renewed.
    fn is_still(&self, now: &Role) -> bool {
        self.name == now.name && self.valid_until.to_bits() == now.valid_until.to_bits()
    }
}

impl Finding {
    /// The role that was stopped, if that is what it is about.
    pub(super) fn stopped(&self) -> Option<&str> {
        match self {
            Finding::StoppedRole(role) => Some(&role.name),
            _ => None,
        }
    }

    /// Whether it is the same as at a look before, however many are logged in by now, and however
    /// long ago a lease has ended.
    fn is_still(&self, now: &Finding) -> bool {
        let roles = |a: &[Role], b: &[Role]| {
            let ends = |all: &[Role]| {
                all.iter().map(|r| (r.name.clone(), r.valid_until.to_bits())).collect::<Vec<_>>()
            };
            ends(a) == ends(b)
        };
        let leases = |a: &[Lease], b: &[Lease]| {
            let ends = |all: &[Lease]| {
                all.iter().map(|l| (l.id.clone(), l.expires.to_bits())).collect::<Vec<_>>()
            };
            ends(a) == ends(b)
        };
        use std::slice::from_ref;
        match (self, now) {
            (Finding::OrphanRole(a), Finding::OrphanRole(b)) => roles(from_ref(a), from_ref(b)),
            (Finding::RolelessLease(a), Finding::RolelessLease(b)) => {
                leases(from_ref(a), from_ref(b))
            }
            (
                Finding::OverdueLease(a) | Finding::IrrevocableLease(a),
                Finding::OverdueLease(b) | Finding::IrrevocableLease(b),
            ) => a.id == b.id,
            (Finding::Doubtful { roles: a, .. }, Finding::Doubtful { roles: b, .. }) => roles(a, b),
            (Finding::Surplus { leases: a, .. }, Finding::Surplus { leases: b, .. }) => {
                leases(a, b)
            }
            (Finding::StoppedRole(a), Finding::StoppedRole(b)) => {
                a.name == b.name && a.since.to_bits() == b.since.to_bits()
            }
            (Finding::UnknownToOpenBao { role: a }, Finding::UnknownToOpenBao { role: b }) => {
                a == b
            }
            (Finding::Cluster(a), Finding::Cluster(b)) => a == b,
            _ => false,
        }
    }
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
