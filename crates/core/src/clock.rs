//! Time that authority is measured in: CLOCK_BOOTTIME, which goes on while the machine is
//! suspended and does not jump when somebody sets the clock.
//!
//! The runtime's timers stand still in a suspended machine. So a sleep until some time is made
//! of short ones: after a resume it is late by one of these at most. Whoever has many of them
//! sleeps at a stretch, and is woken by the one task that waits for [`resumed`].

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::sleep;

/// The longest sleep at once.
const NAP: Duration = Duration::from_secs(5);
/// A suspension that makes a difference.
const NOTABLE: Duration = Duration::from_millis(500);

/// A point in time, as a duration since the machine was booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// Now.
    pub fn now() -> BootTime {
        let now = clock_gettime(ClockId::Boottime);
        BootTime(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32))
    }

    /// How long until then; zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_sub(BootTime::now().0)
    }

    /// How long ago that was; zero if it is still to come.
    pub fn elapsed(self) -> Duration {
        BootTime::now().0.saturating_sub(self.0)
    }

    /// This much earlier.
    pub fn earlier(self, by: Duration) -> BootTime {
        BootTime(self.0.saturating_sub(by))
    }

    /// Sleeps until then.
    pub async fn arrives(self) {
        loop {
            let remaining = self.remaining();
            if remaining.is_zero() {
                return;
            }
            sleep(remaining.min(NAP)).await;
        }
    }
}

/// How long the machine has been suspended since it was booted.
fn suspended() -> Duration {
    let monotonic = clock_gettime(ClockId::Monotonic);
    let monotonic = Duration::new(monotonic.tv_sec.unsigned_abs(), monotonic.tv_nsec as u32);
    BootTime::now().0.saturating_sub(monotonic)
}

/// Resolves soon after the machine was suspended and goes on.
pub async fn resumed() {
    let before = suspended();
    while suspended() < before + NOTABLE {
        sleep(NAP).await;
    }
}

impl Add<Duration> for BootTime {
    type Output = BootTime;

    fn add(self, duration: Duration) -> BootTime {
        BootTime(self.0.saturating_add(duration))
    }
}

#[cfg(test)]
mod tests {
    use super::BootTime;
    use std::time::Duration;

    #[tokio::test]
    async fn a_time_that_has_passed_has_arrived() {
        let now = BootTime::now();
        now.arrives().await;
        now.earlier(Duration::from_secs(5)).arrives().await;
        assert_eq!(now.remaining(), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_time_to_come_is_waited_for() {
        let then = BootTime::now() + Duration::from_millis(30);
        assert!(then.remaining() > Duration::ZERO);
        then.arrives().await;
        assert!(BootTime::now() >= then);
    }

    #[test]
    fn no_duration_overflows_it() {
        let forever = BootTime::now() + Duration::MAX;
        assert!(forever > BootTime::now() && forever + Duration::MAX >= forever);
    }
}
