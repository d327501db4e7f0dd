//! What fails again and again in one moment, as an accept without a descriptor does, and of which
//! the log tells now and then.

use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// Failures of one kind, and when they were told of.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// One more. It is told of at once, or with the next one that comes late enough: `tell` is
    /// given how many it is to tell of. The last ones of a storm may be told of by nothing.
    pub(crate) fn another(&mut self, tell: impl FnOnce(u64)) {
        self.another_at(Instant::now(), tell);
    }

    fn another_at(&mut self, now: Instant, tell: impl FnOnce(u64)) {
        self.untold += 1;
        if self.told.is_none_or(|told| now.duration_since(told) >= PAUSE) {
            tell(std::mem::take(&mut self.untold));
            self.told = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_reported_at_once_and_the_rest_together() {
        let (mut failures, start, mut told) = (Failures::default(), Instant::now(), Vec::new());
        for number in 0..401 {
            let now = start + Duration::from_millis(50) * number;
            failures.another_at(now, |count| told.push(count));
        }
        assert_eq!(told, [1, 200, 200]);
    }
}
