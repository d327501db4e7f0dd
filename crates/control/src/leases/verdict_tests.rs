//! Times are in seconds; a role's is its lease's and five.

use std::slice::from_ref;

use proptest::prelude::*;

use super::*;

fn role(name: &str, valid_until: f64, sessions: i64) -> Role {
    Role { name: name.to_owned(), valid_until, sessions }
}

fn lease(id: &str, expires: f64) -> Lease {
    Lease { id: id.to_owned(), expires, overdue: -10, given_up: None }
}

fn ended(id: &str, overdue: i64) -> Lease {
    Lease { id: id.to_owned(), expires: 1.0, overdue, given_up: None }
}

fn judged(roles: &[Role], leases: &[Lease]) -> Vec<Finding> {
    judge(roles.to_vec(), leases.to_vec()).expect("roles and leases of one world")
}

fn idle(roles: &[Role], leases: &[Lease], exact: bool) -> Finding {
    Finding::IdleRoles { roles: roles.to_vec(), leases: leases.to_vec(), exact }
}

#[test]
fn a_role_in_use_with_its_lease_is_no_finding() {
    let roles = [role("a", 1005.0, 1), role("b", 2004.0, 3)];
    assert_eq!(judged(&roles, &[lease("2", 2000.0), lease("1", 1000.4)]), []);
}

#[test]
fn a_role_without_a_lease_is_an_orphan_in_use_or_not() {
    let roles = [role("a", 1005.0, 0), role("b", 2005.0, 2), role("c", 3005.0, 1)];
    let orphans = [&roles[0], &roles[1]].map(|role| Finding::OrphanRole(role.clone()));
    assert_eq!(judged(&roles, &[lease("1", 3000.0)]), orphans);
    assert_eq!(judged(&roles[..1], &[]), orphans[..1]);
}

#[test]
fn a_lease_without_a_role_is_found_at_any_position() {
    let leases = [lease("1", 1000.0), lease("2", 2000.0), lease("3", 3000.0)];
    let roleless = [&leases[0], &leases[2]].map(|lease| Finding::RolelessLease(lease.clone()));
    assert_eq!(judged(&[role("a", 2005.0, 1)], &leases), roleless);
    assert_eq!(judged(&[], &leases[..1]), roleless[..1]);
}

#[test]
fn idle_roles_are_reported_with_their_leases() {
    let roles = [role("a", 1005.0, 0), role("b", 1006.0, 0), role("c", 2005.0, 1)];
    let leases = [lease("1", 1000.0), lease("2", 1001.0), lease("3", 2000.0)];
    assert_eq!(judged(&roles, &leases), [idle(&roles[..2], &leases[..2], true)]);
}

#[test]
fn the_lease_of_an_idle_role_is_not_guessed_among_leases_in_use() {
    let roles = [role("a", 1005.0, 0), role("b", 1005.0, 1)];
    let leases = [lease("1", 1000.2), lease("2", 1000.3)];
    assert_eq!(judged(&roles, &leases), [idle(&roles[..1], &leases, false)]);
}

#[test]
fn more_roles_in_use_than_leases_of_one_moment_are_doubtful() {
    let roles = [role("a", 1005.0, 1), role("b", 1005.0, 1)];
    let doubtful = Finding::Doubtful { roles: roles.to_vec(), unexplained: 1 };
    assert_eq!(judged(&roles, &[lease("1", 1000.2)]), [doubtful]);
}

#[test]
fn more_leases_than_roles_of_one_moment_are_a_surplus() {
    let leases = [lease("1", 1000.2), lease("2", 1000.3)];
    let surplus = Finding::Surplus { leases: leases.to_vec(), roleless: 1 };
    assert_eq!(judged(&[role("a", 1005.0, 1)], &leases), [surplus]);
}

fn undecided(roles: &[Role], leases: &[Lease]) -> Finding {
    Finding::Undecided { roles: roles.to_vec(), leases: leases.to_vec() }
}

#[test]
fn a_lease_being_revoked_may_explain_an_idle_role() {
    let unused = role("a", 1005.0, 0);
    let ending = ended("1", 0);
    let judgement = [undecided(from_ref(&unused), from_ref(&ending))];
    assert_eq!(judged(from_ref(&unused), from_ref(&ending)), judgement);
    assert_eq!(judged(&[], &[ended("1", 60)]), []);
    // But not that somebody still uses one.
    let used = role("a", 1005.0, 1);
    assert_eq!(judged(from_ref(&used), &[ended("1", 5)]), [Finding::OrphanRole(used)]);
    let stuck = ended("1", 61);
    assert_eq!(
        judged(from_ref(&unused), from_ref(&stuck)),
        [undecided(from_ref(&unused), from_ref(&stuck)), Finding::OverdueLease(stuck)]
    );
}

#[test]
fn irrevocable_leases_are_reported_as_such() {
    let given_up = Lease { given_up: Some("out of retries".to_owned()), ..ended("1", 61) };
    assert_eq!(judged(&[], from_ref(&given_up)), [Finding::IrrevocableLease(given_up.clone())]);
    // It was not yet at the look before.
    let irrevocable = vec![Finding::IrrevocableLease(given_up)];
    assert_eq!(confirmed(&judged(&[], &[ended("1", 61)]), irrevocable.clone()), irrevocable);
}

#[test]
fn a_revocation_under_way_does_not_hide_a_role_without_a_lease() {
    let lost = role("a", 1005.0, 0);
    let orphan = [Finding::OrphanRole(lost.clone())];
    let look = |ended: &[Lease]| judged(from_ref(&lost), ended);
    // Whose lease it could be is gone, or was in force at the look before and did not explain it.
    assert_eq!(confirmed(&look(&[ended("1", 1)]), look(&[ended("2", 1)])), orphan);
    assert_eq!(confirmed(&look(&[]), look(&[ended("2", 1)])), orphan);
    assert_eq!(confirmed(&look(&[ended("1", 1)]), look(&[])), orphan);
    // It is still at it: that is said, and nothing done.
    let stuck = [ended("1", 1), ended("2", 3)];
    let judgement = [undecided(from_ref(&lost), &stuck[..1])];
    assert_eq!(confirmed(&look(&stuck[..1]), look(&stuck)), judgement);
    // Sessions of the same moment come and go: once theirs could be its, once they are being
    // revoked.
    let busy = || judged(&[lost.clone(), role("b", 1005.0, 1)], &[lease("b", 1000.0)]);
    assert_eq!(confirmed(&busy(), look(&[ended("c", 1)])), orphan);
    assert_eq!(confirmed(&busy(), look(&[])), orphan);
    let idle = [idle(from_ref(&lost), &[lease("b", 1000.0)], false)];
    assert_eq!(confirmed(&look(&[ended("c", 1)]), busy()), idle);
    assert_eq!(confirmed(&look(&[]), busy()), idle);
    // That very lease has ended, and may be its.
    let ending = ended("b", 1);
    let judgement = [undecided(from_ref(&lost), from_ref(&ending))];
    assert_eq!(confirmed(&busy(), look(from_ref(&ending))), judgement);
    // A role that is gone or renewed is no finding.
    assert_eq!(confirmed(&look(&stuck), judged(&[role("a", 1006.0, 0)], &stuck)), []);
}

#[test]
fn an_audit_fails_when_no_role_matches_a_lease() {
    let roles = [role("a", 9005.0, 1), role("b", 9010.0, 1)];
    let error = judge(roles.to_vec(), vec![lease("1", 1000.0)]).expect_err("no verdict");
    assert!(error.to_string().contains("batch tokens"), "{error}");
}

#[test]
fn changes_between_two_audits_are_no_findings() {
    let orphan = |valid_until, sessions| Finding::OrphanRole(role("a", valid_until, sessions));
    assert_eq!(confirmed(&[orphan(1.0, 1)], vec![orphan(1.0, 2)]), [orphan(1.0, 2)]);
    assert_eq!(confirmed(&[orphan(1.0, 1)], vec![orphan(2.0, 1)]), [], "it was renewed");
    assert_eq!(confirmed(&[], vec![orphan(1.0, 1)]), []);
    let roleless = |expires| Finding::RolelessLease(lease("1", expires));
    assert_eq!(confirmed(&[roleless(1.0)], vec![roleless(1.0)]), [roleless(1.0)]);
    assert_eq!(confirmed(&[roleless(1.0)], vec![roleless(2.0)]), []);
}

#[test]
fn a_lease_made_between_two_audits_makes_an_idle_finding_inexact() {
    let (unused, old, new) = (role("a", 1005.0, 0), lease("1", 1000.0), lease("2", 1000.5));
    let before = [idle(from_ref(&unused), from_ref(&old), true)];
    // A session began: its lease is seen, its role not yet.
    let now = vec![idle(from_ref(&unused), &[old.clone(), new.clone()], true)];
    let careful = idle(from_ref(&unused), &[old.clone(), new], false);
    assert_eq!(confirmed(&before, now), [careful]);
    // Not exact before, so not exact.
    let before = [idle(from_ref(&unused), from_ref(&old), false)];
    let now = vec![idle(from_ref(&unused), from_ref(&old), true)];
    assert_eq!(confirmed(&before, now), [idle(from_ref(&unused), from_ref(&old), false)]);
    // In use before, so in use: no finding then.
    assert_eq!(confirmed(&[], vec![idle(&[unused], &[old], true)]), []);
}

proptest! {
    /// However close together they were made: what has all that it needs is never accused, and
    /// what is accused by name is never one of those.
    #[test]
    fn healthy_roles_are_never_reported(
        born in prop::collection::vec((0.0..300.0_f64, 0.0..100.0_f64), 1..40),
        orphans in prop::collection::vec(0.0..300.0_f64, 0..4),
    ) {
        let mut roles = Vec::new();
        let mut leases = Vec::new();
        for (number, (made, took)) in born.iter().enumerate() {
            roles.push(role(&format!("good-{number}"), (made + 3605.0).floor(), 1));
            leases.push(lease(&format!("{number}"), made + took + 3600.0));
        }
        prop_assert_eq!(judged(&roles, &leases), vec![]);
        for (number, made) in orphans.iter().enumerate() {
            roles.push(role(&format!("orphan-{number}"), (made + 3605.0).floor(), 0));
        }
        for finding in judged(&roles, &leases) {
            match finding {
                Finding::OrphanRole(role) => prop_assert!(role.name.starts_with("orphan")),
                Finding::IdleRoles { roles, exact: false, .. } => {
                    prop_assert!(roles.iter().all(|role| role.name.starts_with("orphan")));
                }
                // Fewer leases than roles, all in use: only orphans are idle here.
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    /// Sessions that began between the reading of roles and the reading of leases, at both looks:
    /// none of their leases is ever named for revocation.
    #[test]
    fn the_lease_of_a_session_that_begins_is_never_reported(
        unused in prop::collection::vec(0.0..60.0_f64, 1..4),
        first in prop::collection::vec(0.0..60.0_f64, 0..4),
        second in prop::collection::vec(60.0..120.0_f64, 0..4),
    ) {
        let old_roles: Vec<_> = unused.iter().enumerate()
            .map(|(n, made)| role(&format!("unused-{n}"), (made + 3605.0).floor(), 0)).collect();
        let old: Vec<_> = unused.iter().enumerate()
            .map(|(n, made)| lease(&format!("old-{n}"), made + 3600.0)).collect();
        let new = |name: &str, made: &[f64]| made.iter().enumerate()
            .map(|(n, made)| lease(&format!("{name}-{n}"), made + 3600.0)).collect::<Vec<_>>();
        let before = judged(&old_roles, &[old.clone(), new("first", &first)].concat());
        // By the second look those of the first are seen whole, and others begin.
        let begun: Vec<_> = first.iter().enumerate()
            .map(|(n, made)| role(&format!("begun-{n}"), (made + 3605.0).floor(), 1)).collect();
        let leases = [old, new("first", &first), new("second", &second)].concat();
        let now = judged(&[old_roles, begun].concat(), &leases);
        for finding in confirmed(&before, now) {
            if let Finding::IdleRoles { leases, exact: true, .. } = finding {
                prop_assert!(leases.iter().all(|lease| !lease.id.starts_with("second")));
                prop_assert!(first.is_empty() || leases.iter().all(|l| !l.id.starts_with("first")));
            }
        }
    }
}
