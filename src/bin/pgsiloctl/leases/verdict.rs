//! Which roles a lease explains, and which leases a session explains: from names and times alone.
//!
//! OpenBAO does not say which role a lease made. But it gives a role VALID UNTIL the lease's end
//! and five seconds more, when it makes it and when it renews it. So a role and a lease belong
//! together only if their ends do. Where several fit, it is not known which belongs to which: what
//! is said then is true for either, and what cannot be said is called doubtful, never guessed.

use std::ops::Range;

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
    /// For how long it should have been gone, in seconds; not positive while it is in force.
    pub(super) overdue: i64,
}

/// What is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Finding {
    /// No lease can explain the role.
    OrphanRole {
        /// Its name.
        role: String,
        /// How many are logged in as it.
        sessions: i64,
    },
    /// Nobody is logged in as the role. The leases are those that may be its own; `exact` if all
    /// of them are nobody's.
    IdleRole {
        /// Its name.
        role: String,
        /// At least one.
        leases: Vec<String>,
        /// Whether revoking them touches nobody else.
        exact: bool,
    },
    /// The role that the lease made is gone.
    RolelessLease(String),
    /// The lease has ended, and OpenBAO could not revoke it.
    OverdueLease(String),
    /// More of these roles, all of them in use, than there are leases: some are not explained.
    Doubtful {
        /// Their names.
        roles: Vec<String>,
        /// How many are too many.
        unexplained: usize,
    },
    /// More of these leases than there are roles, all of those in use.
    Surplus {
        /// Their ids.
        leases: Vec<String>,
        /// How many have no role.
        roleless: usize,
    },
}

/// What VALID UNTIL has over the lease's end at the most: five seconds, and rounding.
const OVER: f64 = 6.0;
/// What it may be behind: as long as OpenBAO may have taken for the statements between the two.
const BEHIND: f64 = 26.0;
/// OpenBAO revokes what has ended within seconds.
const OVERDUE_SECONDS: i64 = 60;

/// Roles and leases that belong together or may: all leases of a range, in the order of their ends.
#[derive(Debug)]
struct Company<'a> {
    roles: Vec<&'a Role>,
    leases: Range<usize>,
}

/// Judges the roles and the leases that go by one name.
pub(super) fn judge(mut roles: Vec<Role>, leases: Vec<Lease>) -> Vec<Finding> {
    let (overdue, mut leases): (Vec<_>, Vec<_>) =
        leases.into_iter().partition(|lease| lease.overdue > OVERDUE_SECONDS);
    let fits = |role: &Role, lease: &Lease| {
        (role.valid_until - OVER..=role.valid_until + BEHIND).contains(&lease.expires)
    };
    // A role whose lease OpenBAO still tries to revoke is explained, by that.
    roles.retain(|role| role.sessions > 0 || !overdue.iter().any(|lease| fits(role, lease)));
    roles.sort_by(|a, b| a.valid_until.total_cmp(&b.valid_until));
    leases.sort_by(|a, b| a.expires.total_cmp(&b.expires));

    let mut findings: Vec<_> =
        overdue.into_iter().map(|lease| Finding::OverdueLease(lease.id)).collect();
    let mut explained = 0;
    for company in companies(&roles, &leases) {
        let range = company.leases.clone();
        findings.extend(leases[explained..range.start.max(explained)].iter().map(roleless));
        explained = explained.max(range.end);
        findings.extend(of_company(&company, &leases));
    }
    findings.extend(leases[explained..].iter().map(roleless));
    findings
}

fn roleless(lease: &Lease) -> Finding {
    Finding::RolelessLease(lease.id.clone())
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
    let ids: Vec<_> = leases[company.leases.clone()].iter().map(|lease| lease.id.clone()).collect();
    if ids.is_empty() {
        let orphan =
            |role: &&Role| Finding::OrphanRole { role: role.name.clone(), sessions: role.sessions };
        return company.roles.iter().map(orphan).collect();
    }
    let (busy, idle): (Vec<&Role>, Vec<&Role>) =
        company.roles.iter().partition(|role| role.sessions > 0);
    let exact = busy.is_empty();
    let mut findings: Vec<_> = idle
        .iter()
        .map(|role| Finding::IdleRole { role: role.name.clone(), leases: ids.clone(), exact })
        .collect();
    let unexplained = unmatched(&busy, leases);
    if unexplained > 0 {
        let roles = busy.iter().map(|role| role.name.clone()).collect();
        findings.push(Finding::Doubtful { roles, unexplained });
    }
    if idle.is_empty() && ids.len() > busy.len() {
        let roleless = ids.len() - busy.len();
        findings.push(Finding::Surplus { leases: ids, roleless });
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn role(name: &str, valid_until: f64, sessions: i64) -> Role {
        Role { name: name.to_owned(), valid_until, sessions }
    }

    fn lease(id: &str, expires: f64) -> Lease {
        Lease { id: id.to_owned(), expires, overdue: -10 }
    }

    fn idle(role: &str, leases: &[&str], exact: bool) -> Finding {
        let leases = leases.iter().map(|id| (*id).to_owned()).collect();
        Finding::IdleRole { role: role.to_owned(), leases, exact }
    }

    #[test]
    fn a_role_in_use_with_its_lease_is_as_it_should_be() {
        let roles = vec![role("a", 1005.0, 1), role("b", 2004.0, 3)];
        assert_eq!(judge(roles, vec![lease("2", 2000.0), lease("1", 1000.4)]), []);
    }

    #[test]
    fn a_role_without_a_lease_is_an_orphan_in_use_or_not() {
        let roles = vec![role("a", 1005.0, 0), role("b", 2005.0, 2), role("c", 3005.0, 1)];
        let orphan = |role: &str, sessions| Finding::OrphanRole { role: role.into(), sessions };
        let leases = vec![lease("1", 3000.0)];
        assert_eq!(judge(roles, leases), [orphan("a", 0), orphan("b", 2)]);
    }

    #[test]
    fn a_lease_without_a_role_is_found_before_between_and_behind_others() {
        let roles = vec![role("a", 2005.0, 1)];
        let leases = vec![lease("1", 1000.0), lease("2", 2000.0), lease("3", 3000.0)];
        let roleless = |id: &str| Finding::RolelessLease(id.into());
        assert_eq!(judge(roles, leases), [roleless("1"), roleless("3")]);
        assert_eq!(judge(vec![], vec![lease("1", 5.0)]), [roleless("1")]);
    }

    #[test]
    fn a_role_that_nobody_uses_is_found_with_its_lease() {
        let roles = vec![role("a", 1005.0, 0), role("b", 2005.0, 1)];
        let leases = vec![lease("1", 1000.0), lease("2", 2000.0)];
        assert_eq!(judge(roles, leases), [idle("a", &["1"], true)]);
    }

    #[test]
    fn which_lease_is_an_idle_roles_is_not_guessed_among_others_in_use() {
        let roles = vec![role("a", 1005.0, 0), role("b", 1005.0, 1)];
        let leases = vec![lease("1", 1000.2), lease("2", 1000.3)];
        assert_eq!(judge(roles, leases), [idle("a", &["1", "2"], false)]);
    }

    #[test]
    fn roles_in_use_of_one_moment_with_too_few_leases_are_doubtful() {
        let roles = vec![role("a", 1005.0, 1), role("b", 1005.0, 1)];
        let doubtful = Finding::Doubtful { roles: vec!["a".into(), "b".into()], unexplained: 1 };
        assert_eq!(judge(roles, vec![lease("1", 1000.2)]), [doubtful]);
    }

    #[test]
    fn leases_of_one_moment_with_too_few_roles_are_a_surplus() {
        let leases = vec![lease("1", 1000.2), lease("2", 1000.3)];
        let surplus = Finding::Surplus { leases: vec!["1".into(), "2".into()], roleless: 1 };
        assert_eq!(judge(vec![role("a", 1005.0, 1)], leases), [surplus]);
    }

    #[test]
    fn a_lease_that_cannot_be_revoked_explains_its_role() {
        let overdue = Lease { id: "1".into(), expires: 1000.0, overdue: 61 };
        let findings = judge(vec![role("a", 1005.0, 0)], vec![overdue]);
        assert_eq!(findings, [Finding::OverdueLease("1".into())]);
        // But not that somebody still uses it.
        let overdue = Lease { id: "1".into(), expires: 1000.0, overdue: 61 };
        let findings = judge(vec![role("a", 1005.0, 1)], vec![overdue]);
        assert_eq!(findings.len(), 2);
    }

    proptest! {
        /// However close together they were made: what has all that it needs is never accused,
        /// and what is accused by name is never one of those.
        #[test]
        fn nobody_in_order_is_accused(
            born in prop::collection::vec((0.0..100.0_f64, 0.0..20.0_f64), 0..40),
            orphans in prop::collection::vec(0.0..100.0_f64, 0..4),
        ) {
            let mut roles = Vec::new();
            let mut leases = Vec::new();
            for (number, (made, took)) in born.iter().enumerate() {
                roles.push(role(&format!("good-{number}"), (made + 3605.0).floor(), 1));
                leases.push(lease(&format!("{number}"), made + took + 3600.0));
            }
            prop_assert_eq!(judge(roles.clone(), leases.clone()), vec![]);
            for (number, made) in orphans.iter().enumerate() {
                roles.push(role(&format!("orphan-{number}"), (made + 3605.0).floor(), 0));
            }
            for finding in judge(roles, leases) {
                match finding {
                    Finding::OrphanRole { role, .. } | Finding::IdleRole { role, exact: false, .. } => {
                        prop_assert!(role.starts_with("orphan"));
                    }
                    // Fewer leases than roles, all in use: only orphans are idle here.
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }
    }
}
