//! Pauses between attempts: each up to twice the one before, and no two callers in step. When
//! OpenBAO comes back, those who wait for it do not all come in one moment.

use std::time::Duration;

use aws_lc_rs::rand;

/// The pauses of one series of attempts.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses of about `first` to about `last`.
    pub fn new(first: Duration, last: Duration) -> Backoff {
        let first = first.min(last);
        Backoff { first, last, next: first }
    }

    /// The pause before the next attempt: half to all of what it may be.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(0.5 + spread() / 2.0);
        self.next = (self.next * 2).min(self.last);
        pause
    }

    /// An attempt has worked.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random number of 0 to 1; the middle where there is no randomness.
pub fn spread() -> f64 {
    let mut byte = [128];
    let _middle_then = rand::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_begin_again() {
        let milliseconds = Duration::from_millis;
        let mut backoff = Backoff::new(milliseconds(100), milliseconds(350));
        for bound in [100, 200, 350, 350] {
            let pause = backoff.pause();
            assert!((milliseconds(bound) / 2..=milliseconds(bound)).contains(&pause), "{pause:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= milliseconds(100));
    }

    #[test]
    fn no_pause_is_longer_than_the_longest() {
        let mut backoff = Backoff::new(Duration::from_secs(9), Duration::from_secs(1));
        assert!(backoff.pause() <= Duration::from_secs(1));
    }

    #[test]
    fn pauses_differ() {
        let pauses: Vec<_> = (0..100)
            .map(|_| Backoff::new(Duration::from_secs(1), Duration::from_secs(1)).pause())
            .collect();
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }
}
