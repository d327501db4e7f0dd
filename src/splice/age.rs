//! How long a session has been in the middle of something: a transaction, or a request that is not
//! answered. For the relay alone. Bytes that pass cost it no clock reading beyond the relay's own.
//!
//! No session can make that look shorter than it is. It counts from the newest moment at which the
//! database was surely outside a transaction: when the session was idle, or told of by a
//! ReadyForQuery that was read as soon as it was sent. One that had to wait for the client to take
//! what was before it is as old as that may be.

use pgsilo_core::limits::TimeLimits;
use tokio::time::Instant;

use crate::ending::Ending;

/// What is known of the time.
#[derive(Debug)]
pub(super) struct Age {
    /// Not after what the session is in the middle of has begun.
    began: Instant,
    /// Since when what is read of the database may be older than the reading.
    behind: Option<Instant>,
}

/// What a session does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    /// Nothing, outside a transaction.
    Idle,
    /// Nothing since then, in a transaction.
    WaitingSince(Instant),
    /// Has something done, or has not taken an answer.
    Working,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing, until the session begins something.
    Rest,
    LookAt(Instant),
    Over(Ending),
}

impl Age {
    pub(super) fn begin(now: Instant) -> Age {
        Age { began: now, behind: None }
    }

    /// Bytes have passed. Before them the session was idle, or not; in them the database was seen
    /// outside a transaction, or not.
    pub(super) fn moved(&mut self, now: Instant, was_idle: bool, crossed: bool) {
        if was_idle {
            self.began = now;
        } else if crossed {
            self.began = self.began.max(self.behind.unwrap_or(now));
        }
    }

    /// How far the reading of the database is: whether the client has taken everything that was
    /// read, and whether everything there was has been read since it last had not.
    pub(super) fn read(&mut self, now: Instant, is_taken: bool, caught_up: bool) {
        if caught_up {
            self.behind = None;
        } else if !is_taken {
            self.behind.get_or_insert(now);
        }
    }

    pub(super) fn judge(&self, limits: &TimeLimits, phase: Phase, now: Instant) -> Verdict {
        let waits_since = match phase {
            Phase::Idle => return Verdict::Rest,
            Phase::WaitingSince(since) => since,
            // It may begin to wait at any time.
            Phase::Working => now,
        };
        let transaction = limits.transaction.map(|limit| self.began + limit);
        let waiting = limits.idle_in_transaction.map(|limit| waits_since + limit);
        let over = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if over(transaction) {
            return Verdict::Over(Ending::TransactionTimeout);
        }
        if over(waiting) {
            return Verdict::Over(Ending::IdleInTransaction);
        }
        let looks = [transaction, waiting].into_iter().flatten();
        looks.min().map_or(Verdict::Rest, Verdict::LookAt)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const LIMITS: TimeLimits = TimeLimits {
        idle: None,
        idle_in_transaction: Some(MINUTE),
        transaction: Some(Duration::from_secs(600)),
        session: None,
    };

    #[test]
    fn an_idle_session_is_not_ended() {
        let began = Instant::now();
        let age = Age::begin(began);
        let late = began + 100 * MINUTE;
        assert_eq!(age.judge(&LIMITS, Phase::Idle, late), Verdict::Rest);
        let none = TimeLimits::default();
        assert_eq!(age.judge(&none, Phase::Working, late), Verdict::Rest);
    }

    #[test]
    fn a_transaction_counts_from_the_last_moment_outside_of_one() {
        let began = Instant::now();
        let mut age = Age::begin(began);
        age.moved(began + MINUTE, true, false);
        age.moved(began + 2 * MINUTE, false, true);
        age.moved(began + 3 * MINUTE, false, false);
        let last = began + 12 * MINUTE;
        let before = last - Duration::from_secs(1);
        assert_eq!(age.judge(&LIMITS, Phase::Working, before), Verdict::LookAt(last));
        let over = Verdict::Over(Ending::TransactionTimeout);
        assert_eq!(age.judge(&LIMITS, Phase::Working, last), over);
        assert_eq!(age.judge(&LIMITS, Phase::WaitingSince(last), last), over);
    }

    #[test]
    fn a_client_that_waits_in_a_transaction_is_waited_for_so_long() {
        let began = Instant::now();
        let mut age = Age::begin(began);
        age.moved(began, true, false);
        let (since, now) = (began + 2 * MINUTE, began + 3 * MINUTE);
        let waits = Phase::WaitingSince(since);
        let early = now - Duration::from_secs(1);
        assert_eq!(age.judge(&LIMITS, waits, early), Verdict::LookAt(now));
        assert_eq!(age.judge(&LIMITS, waits, now), Verdict::Over(Ending::IdleInTransaction));
        let look = Verdict::LookAt(now + MINUTE);
        assert_eq!(age.judge(&LIMITS, Phase::Working, now), look, "it may wait from now on");
    }

    /// Many answers are in the way, in front of the one that says that the last transaction has
    /// begun.
    #[test]
    fn a_client_that_reads_slowly_does_not_make_its_transaction_look_younger() {
        let began = Instant::now();
        let mut age = Age::begin(began);
        age.moved(began, true, false);
        age.read(began, false, false);
        for minute in 1..10 {
            age.moved(began + minute * MINUTE, false, true);
            age.read(began + minute * MINUTE, minute % 2 == 0, false);
        }
        let over = Verdict::Over(Ending::TransactionTimeout);
        assert_eq!(age.judge(&LIMITS, Phase::Working, began + 10 * MINUTE), over);
        // Once everything has been read, what comes then is new.
        age.read(began + 10 * MINUTE, true, true);
        age.moved(began + 11 * MINUTE, false, true);
        let judged = age.judge(&LIMITS, Phase::Working, began + 11 * MINUTE);
        assert_eq!(judged, Verdict::LookAt(began + 12 * MINUTE));
    }
}
