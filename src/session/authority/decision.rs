//! Whether a session is to be terminated: a function of the time and the facts.
//!
//! Several facts may terminate it at once; the earliest deadline counts. Each gives notice: from
//! then on the session may end at a good moment, and by the deadline it must.

use std::time::Duration;

use pgsilo_core::clock::BootTime;

use crate::ending::Ending;
use crate::lease::LeaseEnd;
use crate::splice::Termination;

/// What is left for the last words before an authority is really over.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// When to check again if nothing is known to come.
const FAR: Duration = Duration::from_secs(24 * 60 * 60);

/// The facts about one session.
#[derive(Debug)]
pub(super) struct Facts<'f> {
    /// By when a stopping pgsilo wants to be done.
    pub(super) drained_by: Option<BootTime>,
    /// The registry does not serve the session's tenant there, or not for this identity.
    pub(super) withdrawn: bool,
    /// The identity is on the list of those denied.
    pub(super) revoked: bool,
    /// The registry has a lock on it.
    pub(super) locked: bool,
    /// It needs a grant, and there is none.
    pub(super) ungranted: bool,
    /// The authority that certified the client is not believed any more.
    pub(super) uncertified: bool,
    /// Another server of its cluster has become the primary.
    pub(super) overtaken: bool,
    /// The registry is too old, and that ends sessions.
    pub(super) stale: bool,
    /// Its tenant is paused: for how long a transaction may go on.
    pub(super) paused: Option<Duration>,
    pub(super) lease: &'f LeaseEnd,
    /// When its identity ends, if that ends the session; what was left of that when the session
    /// began; and what the session ends with.
    pub(super) expires: Option<(BootTime, Duration, Ending)>,
    /// When its grant lapses, if it needs one that does, and what was left of that when the session
    /// began.
    pub(super) granted: Option<(BootTime, Duration)>,
    /// When it is as old as it may become, and how old that is.
    pub(super) aged: Option<(BootTime, Duration)>,
    /// The longest notice.
    pub(super) grace: Duration,
}

/// What follows from the facts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Decision {
    Terminate(Termination),
    /// Nothing yet. Time alone changes nothing before then.
    Recheck(BootTime),
}

/// A termination that may not be due yet.
struct PendingTermination {
    /// When it becomes due.
    from: BootTime,
    termination: Termination,
}

impl Facts<'_> {
    /// The due termination with the earliest deadline, if that is before the one of `current`.
    pub(super) fn decide(&self, now: BootTime, current: Option<Termination>) -> Decision {
        let from_now = |ending, deadline| PendingTermination {
            from: now,
            termination: Termination { ending, deadline },
        };
        let at_once = |is_so: bool, ending| is_so.then(|| from_now(ending, now));
        let candidates = [
            self.drained_by.map(|deadline| from_now(Ending::Drained, deadline)),
            at_once(self.withdrawn, Ending::TenantWithdrawn),
            at_once(self.revoked, Ending::IdentityRevoked),
            at_once(self.locked, Ending::AccessLocked),
            at_once(self.ungranted, Ending::GrantWithdrawn),
            at_once(self.uncertified, Ending::AuthorityWithdrawn),
            at_once(self.overtaken, Ending::FailedOver),
            at_once(self.stale, Ending::RegistryStale),
            self.paused.map(|patience| from_now(Ending::TenantPaused, now + patience)),
            Some(self.lease_ends()),
            // A session that came with a token near its end still gets most of what is left.
            self.expires.map(|(at, left, ending)| ends(ending, at, self.grace.min(left / 3))),
            self.granted
                .map(|(at, left)| ends(Ending::GrantWithdrawn, at, self.grace.min(left / 3))),
            // A transaction gets until the end itself, as where a token expires.
            self.aged.map(|(at, age)| ends(Ending::SessionAge, at, self.grace.min(age / 3))),
        ];
        let matters = |pending: &PendingTermination| {
            current.is_none_or(|current| pending.termination.deadline < current.deadline)
        };
        let (mut due, mut wake) = (None::<Termination>, now + FAR);
        for pending in candidates.into_iter().flatten().filter(matters) {
            if pending.from > now {
                wake = wake.min(pending.from);
            } else if due.is_none_or(|due| pending.termination.deadline < due.deadline) {
                due = Some(pending.termination);
            }
        }
        due.map_or(Decision::Recheck(wake), Decision::Terminate)
    }

    /// While the lease is still renewed, only what is left after the renewals have failed for
    /// long is a notice; the whole grace is, once its end is final.
    fn lease_ends(&self) -> PendingTermination {
        let LeaseEnd { at, duration, is_final, .. } = *self.lease;
        ends(Ending::LeaseEnded, at, self.grace.min(duration / if is_final { 3 } else { 6 }))
    }
}

/// It ends a little before the end itself, so that the client can still be told in time.
fn ends(ending: Ending, at: BootTime, notice: Duration) -> PendingTermination {
    let deadline = at.earlier(LAST_WORDS.min(notice / 2));
    PendingTermination { from: at.earlier(notice), termination: Termination { ending, deadline } }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn lease(at: BootTime, duration: Duration, is_final: bool) -> LeaseEnd {
        LeaseEnd { at, duration, is_final, failure: None }
    }

    fn facts(lease: &LeaseEnd) -> Facts<'_> {
        Facts {
            drained_by: None,
            withdrawn: false,
            revoked: false,
            locked: false,
            ungranted: false,
            uncertified: false,
            overtaken: false,
            stale: false,
            paused: None,
            lease,
            expires: None,
            granted: None,
            aged: None,
            grace: MINUTE,
        }
    }

    fn terminated(next: Decision) -> (Ending, BootTime) {
        match next {
            Decision::Terminate(Termination { ending, deadline }) => (ending, deadline),
            Decision::Recheck(_) => panic!("{next:?}"),
        }
    }

    fn rechecked(next: Decision) -> BootTime {
        match next {
            Decision::Recheck(at) => at,
            Decision::Terminate(_) => panic!("{next:?}"),
        }
    }

    #[test]
    fn a_lease_that_is_renewed_gives_notice_late_and_one_that_is_not_gives_all_of_it() {
        let now = BootTime::now();
        let hour = MINUTE * 60;
        let renewed = lease(now + hour, MINUTE * 3, false);
        // A sixth of three minutes before its end.
        assert_eq!(rechecked(facts(&renewed).decide(now, None)), (now + hour).earlier(MINUTE / 2));
        let ends = lease(now + hour, hour, true);
        assert_eq!(rechecked(facts(&ends).decide(now, None)), (now + hour).earlier(MINUTE));
        let soon = lease(now + MINUTE / 2, hour, true);
        let deadline = (now + MINUTE / 2).earlier(LAST_WORDS);
        assert_eq!(terminated(facts(&soon).decide(now, None)), (Ending::LeaseEnded, deadline));
    }

    #[test]
    fn the_earliest_deadline_counts() {
        let now = BootTime::now();
        let lease = lease(now + MINUTE / 2, MINUTE * 60, true);
        let mut facts = facts(&lease);
        facts.drained_by = Some(now + MINUTE);
        assert_eq!(terminated(facts.decide(now, None)).0, Ending::LeaseEnded);
        facts.drained_by = Some(now + Duration::from_secs(1));
        assert_eq!(terminated(facts.decide(now, None)).0, Ending::Drained);
        facts.withdrawn = true;
        assert_eq!(terminated(facts.decide(now, None)), (Ending::TenantWithdrawn, now));
    }

    #[test]
    fn a_termination_is_only_replaced_by_one_with_an_earlier_deadline() {
        let now = BootTime::now();
        let lease = lease(now + MINUTE * 60, MINUTE * 60, false);
        let mut facts = facts(&lease);
        facts.aged = Some((now + MINUTE / 6, MINUTE));
        let (ending, deadline) = terminated(facts.decide(now, None));
        assert_eq!(ending, Ending::SessionAge);
        let given = Some(Termination { ending, deadline });
        rechecked(facts.decide(now, given));
        facts.revoked = true;
        assert_eq!(terminated(facts.decide(now, given)), (Ending::IdentityRevoked, now));
    }

    #[test]
    fn a_pause_gives_its_time_once() {
        let now = BootTime::now();
        let lease = lease(now + MINUTE * 60, MINUTE * 60, false);
        let mut facts = facts(&lease);
        facts.paused = Some(MINUTE);
        let (ending, deadline) = terminated(facts.decide(now, None));
        assert_eq!((ending, deadline), (Ending::TenantPaused, now + MINUTE));
        // It is looked at again, later.
        rechecked(facts.decide(now + MINUTE / 2, Some(Termination { ending, deadline })));
    }

    #[test]
    fn notice_is_a_third_of_what_there_was_at_most() {
        let now = BootTime::now();
        let lease = lease(now + MINUTE * 60, MINUTE * 60, false);
        for (left, notice) in
            [(MINUTE * 10, MINUTE), (MINUTE, MINUTE / 3), (MINUTE / 20, MINUTE / 60)]
        {
            let mut facts = facts(&lease);
            facts.expires = Some((now + MINUTE * 30, left, Ending::TokenExpired));
            let at = (now + MINUTE * 30).earlier(notice);
            assert_eq!(rechecked(facts.decide(now, None)), at, "{left:?}");
            let (ending, deadline) = terminated(facts.decide(at, None));
            assert_eq!(ending, Ending::TokenExpired);
            assert!(at <= deadline && deadline < now + MINUTE * 30);
        }
    }

    #[test]
    fn each_withdrawal_has_its_ending() {
        let now = BootTime::now();
        let lease = lease(now + MINUTE * 60, MINUTE * 60, false);
        let ending = |change: fn(&mut Facts<'_>)| {
            let mut facts = facts(&lease);
            change(&mut facts);
            terminated(facts.decide(now, None))
        };
        assert_eq!(ending(|facts| facts.withdrawn = true), (Ending::TenantWithdrawn, now));
        assert_eq!(ending(|facts| facts.revoked = true), (Ending::IdentityRevoked, now));
        assert_eq!(ending(|facts| facts.locked = true), (Ending::AccessLocked, now));
        assert_eq!(ending(|facts| facts.ungranted = true), (Ending::GrantWithdrawn, now));
        assert_eq!(ending(|facts| facts.uncertified = true), (Ending::AuthorityWithdrawn, now));
        assert_eq!(ending(|facts| facts.overtaken = true), (Ending::FailedOver, now));
        assert_eq!(ending(|facts| facts.stale = true), (Ending::RegistryStale, now));
    }
}
