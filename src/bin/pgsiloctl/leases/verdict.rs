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

/// A lease, as OpenBAO has it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Lease {
    pub(super) id: String,
    /// In seconds since 1970.
    pub(super) expires: f64,
    /// For how long it should have been gone, in seconds; negative while it is in force.
    pub(super) overdue: i64,
}

/// What is not as it should be. Two of two looks are equal only if nothing of it has moved: a
/// VALID UNTIL that did is one that a lease has renewed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Finding {
    /// No lease can explain the role.
    OrphanRole(Role),
    /// Nobody is logged in as these roles, which may be those of these leases.
    IdleRoles {
        roles: Vec<Role>,
        leases: Vec<Lease>,
        /// No role in use may be any of the leases'.
        exact: bool,
    },
    /// The role that the lease made is gone.
    RolelessLease(Lease),
    /// The lease has ended, and OpenBAO could not revoke it.
    OverdueLease(Lease),
    /// More of these roles, all of them in use, than there are leases: some are not explained.
    Doubtful { roles: Vec<Role>, unexplained: usize },
    /// More of these leases than there are roles, all of those in use.
    Surplus { leases: Vec<Lease>, roleless: usize },
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
         does OpenBAO cut leases to the life of the token (batch tokens), or its clock jump?",
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
        // Which of them are its own, OpenBAO knows.
        findings
            .retain(|finding| !matches!(finding, Finding::OrphanRole(role) if role.sessions == 0));
    }
    let overdue = ended.into_iter().filter(|lease| lease.overdue > OVERDUE_SECONDS);
    findings.extend(overdue.map(Finding::OverdueLease));
    Ok(findings)
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
    let mut idle_before = Vec::new();
    let mut leases_before = BTreeSet::new();
    for finding in before {
        if let Finding::IdleRoles { roles, leases, exact } = finding {
            idle_before.extend(roles);
            if *exact {
                leases_before.extend(leases.iter().map(|lease| lease.id.as_str()));
            }
        }
    }
    let same = |role: &Role| {
        idle_before.iter().any(|b| b.name == role.name && b.valid_until == role.valid_until)
    };
    let mut confirmed = Vec::new();
    for finding in now {
        match finding {
            Finding::IdleRoles { mut roles, leases, exact } => {
                roles.retain(same);
                let known = leases.iter().all(|lease| leases_before.contains(lease.id.as_str()));
                if !roles.is_empty() {
                    confirmed.push(Finding::IdleRoles { roles, leases, exact: exact && known });
                }
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

impl Finding {
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
            (Finding::OverdueLease(a), Finding::OverdueLease(b)) => a.id == b.id,
            (Finding::Doubtful { roles: a, .. }, Finding::Doubtful { roles: b, .. }) => roles(a, b),
            (Finding::Surplus { leases: a, .. }, Finding::Surplus { leases: b, .. }) => {
                leases(a, b)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
