//! Cancel requests with unknown keys: guessed, or too late. Anybody can send them without
//! a token, so their events are bounded: the first one of an address is told of at once, those that
//! follow within a [`PERIOD`] together, with their number.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::audit;

/// Between two events of one address and cause.
const PERIOD: Duration = Duration::from_secs(60);
/// Addresses that are kept account of; all others count as one.
const REMEMBERED: usize = 4096;

/// Why a request led nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    /// No session has the key it showed.
    UnknownKey,
    /// Its address has shown too many, so this one was not looked at.
    TooMany,
}

impl Cause {
    fn label(self) -> &'static str {
        match self {
            Cause::UnknownKey => "unknown_key",
            Cause::TooMany => "too_many",
        }
    }
}

/// The account of them.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// How many of each address and cause no event has told of.
    untold: Mutex<HashMap<(Option<IpAddr>, Cause), u64>>,
}

impl Refused {
    pub(super) fn record(&self, from: Option<IpAddr>, cause: Cause) {
        let mut untold = self.lock();
        let is_known = untold.contains_key(&(from, cause));
        if !is_known && untold.len() < REMEMBERED {
            untold.insert((from, cause), 0);
            drop(untold);
            return audit::cancels_refused(from, cause.label(), 1);
        }
        let from = if is_known { from } else { None };
        *untold.entry((from, cause)).or_default() += 1;
    }

    pub(super) async fn report_periodically(&self) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tell();
        }
    }

    /// An event for each address and cause that has more; the others are forgotten.
    pub(super) fn tell(&self) {
        let mut more = Vec::new();
        self.lock().retain(|(from, cause), count| {
            let count = std::mem::take(count);
            if count > 0 {
                more.push((*from, *cause, count));
            }
            count > 0
        });
        for (from, cause, count) in more {
            audit::cancels_refused(from, cause.label(), count);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Option<IpAddr>, Cause), u64>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> Option<IpAddr> {
        Some(IpAddr::from(number.to_be_bytes()))
    }

    #[test]
    fn the_first_refused_cancel_is_reported_at_once_and_the_rest_counted() {
        let refused = Refused::default();
        for _ in 0..5 {
            refused.record(address(1), Cause::UnknownKey);
        }
        refused.record(address(1), Cause::TooMany);
        assert_eq!(refused.lock()[&(address(1), Cause::UnknownKey)], 4);
        assert_eq!(refused.lock()[&(address(1), Cause::TooMany)], 0);
        refused.tell();
        assert_eq!(refused.lock()[&(address(1), Cause::UnknownKey)], 0);
        assert!(!refused.lock().contains_key(&(address(1), Cause::TooMany)));
        refused.tell();
        assert!(refused.lock().is_empty());
    }

    #[test]
    fn addresses_beyond_those_that_are_remembered_count_as_one() {
        let refused = Refused::default();
        for number in 0..10_000 {
            refused.record(address(number), Cause::UnknownKey);
        }
        assert_eq!(refused.lock().len(), REMEMBERED + 1);
        assert_eq!(refused.lock()[&(None, Cause::UnknownKey)], 10_000 - REMEMBERED as u64);
    }
}
