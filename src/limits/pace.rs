//! How often something may be done: so many times a second, and a burst of them at once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// When it is worth while to forget who has not come for long.
const MANY: usize = 1024;

/// For each key, when its turns are. Those who come too often wait for theirs, in the order in which
/// they came (the generic cell rate algorithm of ITU-T I.371, without its tolerance for who waits).
#[derive(Debug)]
pub(crate) struct Pace<K>(Mutex<HashMap<K, Instant>>);

/// So many a second, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Not zero.
    pub(crate) a_second: u32,
    /// Not zero.
    pub(crate) burst: u32,
}

impl<K: Clone + Eq + Hash> Pace<K> {
    pub(crate) fn new() -> Pace<K> {
        Pace(Mutex::default())
    }

    /// When the next turn of a key is, now or later; it is taken. `None`, and it is not: that would be
    /// after `patience`.
    pub(crate) fn turn(
        &self,
        key: &K,
        rate: Rate,
        now: Instant,
        patience: Duration,
    ) -> Option<Instant> {
        let interval = Duration::from_secs(1) / rate.a_second;
        let ahead = interval * (rate.burst - 1);
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.len() > MANY && !turns.contains_key(key) {
            turns.retain(|_, next| *next > now);
        }
        // When the next turn would be if they came evenly.
        let even = turns.get(key).map_or(now, |next| (*next).max(now));
        let turn = even.checked_sub(ahead).map_or(now, |turn| turn.max(now));
        if turn > now + patience {
            return None;
        }
        turns.insert(key.clone(), even + interval);
        Some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { a_second: 10, burst: 3 };
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_burst_passes_at_once_and_others_wait_for_their_turns() {
        let (pace, now) = (Pace::new(), Instant::now());
        let turns: Vec<_> = (0..6).map(|_| pace.turn(&"acme", RATE, now, MINUTE)).collect();
        let after = |tenths| Some(now + Duration::from_millis(100) * tenths);
        assert_eq!(turns, [0, 0, 0, 1, 2, 3].map(after));
        assert_eq!(pace.turn(&"globex", RATE, now, MINUTE), Some(now), "others have their own");
        // Four turns have passed, of which it has had all.
        let later = now + Duration::from_millis(400);
        assert_eq!(pace.turn(&"acme", RATE, later, MINUTE), Some(later));
    }

    #[test]
    fn who_would_wait_too_long_takes_no_turn() {
        let (pace, now) = (Pace::new(), Instant::now());
        let patience = Duration::from_millis(150);
        let turn = || pace.turn(&"acme", RATE, now, patience);
        assert_eq!((0..4).filter_map(|_| turn()).count(), 4);
        assert_eq!((turn(), turn()), (None, None));
        let later = now + Duration::from_millis(100);
        assert_eq!(
            pace.turn(&"acme", RATE, later, patience),
            Some(later + Duration::from_millis(100))
        );
    }

    #[test]
    fn a_rest_is_worth_a_burst_and_no_more() {
        let (pace, now) = (Pace::new(), Instant::now());
        (0..3).for_each(|_| assert_eq!(pace.turn(&"acme", RATE, now, MINUTE), Some(now)));
        let later = now + MINUTE;
        let turns: Vec<_> = (0..4).map(|_| pace.turn(&"acme", RATE, later, MINUTE)).collect();
        assert_eq!(turns[2..], [Some(later), Some(later + Duration::from_millis(100))]);
    }

    #[test]
    fn who_has_not_come_for_long_takes_no_memory() {
        let (pace, now) = (Pace::new(), Instant::now());
        for key in 0..=MANY {
            pace.turn(&key, RATE, now, MINUTE);
        }
        pace.turn(&usize::MAX, RATE, now + MINUTE, MINUTE);
        assert_eq!(pace.0.lock().expect("not poisoned").len(), 1);
    }
}
