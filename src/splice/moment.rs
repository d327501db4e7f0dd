//! When to end a session that has to end and is idle outside a transaction. For the relay alone.
//!
//! An application keeps its connections in a pool, takes one out, may have it answer a ping, and
//! then uses it. From outside, a connection in the pool looks like one that was just taken out, and
//! if that one ends, what the application does next fails. So an ending waits for a silence, and is
//! put off when the client asks for something, which is done. Behind a transaction a second is
//! enough: the connection was probably put back. Behind any other answer, which may be a ping's, it
//! is half of the time that was left; a second where pgsilo is stopping or the tenant is paused.
//!
//! A pool that is never silent has its connection ended when time grows short: in the last half
//! behind a transaction, in the last eighth behind any answer. What it asks next (its ping, if it
//! has one) is answered with the ending, and not done.

use std::time::Duration;

use super::Termination;
use crate::ending::Ending;

/// The silence that is enough behind a transaction, or when somebody waits for the session to end.
const SILENCE: Duration = Duration::from_secs(1);

/// The time between a termination and its deadline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notice {
    termination: Termination,
    whole: Duration,
}

/// An idle session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quiet {
    /// How long neither side has sent anything.
    pub(super) silent: Duration,
    /// The last message ended a transaction.
    pub(super) behind_transaction: bool,
}

/// Whether to end the session now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Now,
    /// Not before this time has passed in silence.
    In(Duration),
}

impl Notice {
    pub(super) fn begin(termination: Termination) -> Notice {
        Notice { termination, whole: termination.deadline.remaining() }
    }

    pub(super) fn termination(self) -> Termination {
        self.termination
    }

    pub(super) fn judge(self, quiet: Quiet) -> Moment {
        // A stop waits for its sessions, which are served nothing new meanwhile, and so does who pauses
        // a tenant.
        let most = match self.termination.ending {
            Ending::Drained | Ending::TenantPaused => SILENCE,
            _ => Duration::MAX,
        };
        judge(self.whole, self.termination.deadline.remaining(), most, quiet)
    }
}

/// With `left` of the `whole` notice left, and `most` as the longest silence to wait for.
fn judge(whole: Duration, left: Duration, most: Duration, quiet: Quiet) -> Moment {
    let Quiet { silent, behind_transaction } = quiet;
    // Behind that every such moment is the last.
    let last = if behind_transaction { whole / 2 } else { whole / 8 };
    let most = if behind_transaction { most.min(SILENCE) } else { most };
    let enough = (left.saturating_add(silent) / 2).min(most);
    if left <= last || silent >= enough {
        Moment::Now
    } else {
        Moment::In((enough - silent).min(left - last))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Moment, Quiet, judge};

    const WHOLE: Duration = Duration::from_secs(32);
    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn judged(left: Duration, silent: Duration, behind_transaction: bool) -> Moment {
        judge(WHOLE, left, Duration::MAX, Quiet { silent, behind_transaction })
    }

    #[test]
    fn a_second_of_silence_after_a_transaction_is_enough() {
        assert_eq!(judged(WHOLE, Duration::ZERO, true), Moment::In(seconds(1)));
        assert_eq!(judged(seconds(20), seconds(1), true), Moment::Now);
    }

    #[test]
    fn after_any_other_answer_silence_of_half_the_remaining_time_is_enough() {
        assert_eq!(judged(WHOLE, Duration::ZERO, false), Moment::In(seconds(16)));
        assert_eq!(judged(seconds(24), seconds(8), false), Moment::In(seconds(8)));
        assert_eq!(judged(seconds(16), seconds(16), false), Moment::Now);
        assert_eq!(judged(WHOLE, seconds(600), false), Moment::Now, "it was silent long before");
    }

    #[test]
    fn when_time_is_short_there_is_no_waiting_for_silence() {
        assert_eq!(judged(seconds(16), Duration::ZERO, true), Moment::Now);
        assert_eq!(judged(seconds(16), Duration::ZERO, false), Moment::In(seconds(8)));
        assert_eq!(judged(seconds(5), Duration::ZERO, false), Moment::In(seconds(1)));
        assert_eq!(judged(seconds(4), Duration::ZERO, false), Moment::Now);
        let soon = Duration::from_millis(16_500);
        assert_eq!(judged(soon, Duration::ZERO, true), Moment::In(Duration::from_millis(500)));
        assert_eq!(judge(Duration::ZERO, Duration::ZERO, Duration::MAX, JUST_NOW), Moment::Now);
    }

    #[test]
    fn a_stop_waits_for_a_second_of_silence() {
        let judged = |left| judge(WHOLE, left, seconds(1), JUST_NOW);
        assert_eq!(judged(WHOLE), Moment::In(seconds(1)));
        assert_eq!(judged(seconds(2)), Moment::Now);
    }

    const JUST_NOW: Quiet = Quiet { silent: Duration::ZERO, behind_transaction: false };
}
