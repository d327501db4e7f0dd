//! Time that authority is measured in: CLOCK_BOOTTIME, which goes on while the machine is
//! suspended and does not jump when somebody sets the clock.
//!
//! The runtime's timers stand still in a suspended machine. So a sleep until some time is made
//! of short ones: after a resume it is late by one of these at most. A caller with many of them
//! sleeps at a stretch, and is woken by the one task that waits for [`Suspensions`].

use std::ops::Add;
use std::time::{Duration, SystemTime};

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
        self.since(BootTime::now())
    }

    /// How long ago that was; zero if it is still to come.
    pub fn elapsed(self) -> Duration {
        BootTime::now().since(self)
    }

    /// How much later than that it is; zero if it is not.
    pub fn since(self, earlier: BootTime) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// This much earlier.
    pub fn earlier(self, by: Duration) -> BootTime {
        BootTime(self.0.saturating_sub(by))
    }

    /// That moment of the wall clock, as it is set now.
    pub fn at(moment: SystemTime) -> BootTime {
        let now = BootTime::now();
        match moment.duration_since(SystemTime::now()) {
            Ok(left) => now + left,
            Err(past) => now.earlier(past.duration()),
        }
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

/// The suspensions of this machine, from now on.
#[derive(Debug)]
pub struct Suspensions<C = fn() -> Duration> {
    /// How long it has been suspended in all.
    suspended: C,
    /// What of that has been told.
    told: Duration,
}

impl Suspensions {
    /// Those that begin from now on.
    pub fn watch() -> Suspensions {
        Suspensions { suspended, told: suspended() }
    }
}

impl<C: Fn() -> Duration> Suspensions<C> {
    /// Resolves within 5 s of the machine's resuming after one. It may be dropped and asked for
    /// again as often as one likes: a suspension is told of once, whenever it was.
    pub async fn next(&mut self) {
        loop {
            let suspended = (self.suspended)();
            if suspended >= self.told + NOTABLE {
                self.told = suspended;
                return;
            }
            sleep(NAP).await;
        }
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
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

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

    #[tokio::test(start_paused = true)]
    async fn a_suspension_is_told_once_however_often_one_stops_waiting() {
        let in_all = Cell::new(Duration::from_secs(100));
        let mut suspensions = Suspensions { suspended: || in_all.get(), told: in_all.get() };
        let mut told = async || {
            tokio::select! {
                biased;
                () = suspensions.next() => true,
                () = sleep(Duration::from_millis(10)) => false,
            }
        };
        assert!(!told().await);
        // While nobody waits, or while somebody does who will not wait for long.
        in_all.set(Duration::from_secs(160));
        assert!(told().await);
        assert!(!told().await);
        in_all.set(in_all.get() + NOTABLE / 2);
        assert!(!told().await, "clocks are not read at the very same time");
        in_all.set(in_all.get() + NOTABLE);
        assert!(told().await);
    }

    #[test]
    fn no_duration_overflows_it() {
        let forever = BootTime::now() + Duration::MAX;
        assert!(forever > BootTime::now() && forever + Duration::MAX >= forever);
    }
}
