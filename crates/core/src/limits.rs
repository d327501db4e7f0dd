//! What may be bounded, for all tenants or for one.

use std::time::Duration;

/// How long a session, and what it is in the middle of, may last; `None`: for ever. A session may
/// set the database's own time-outs to 0, and not these; but a session that wants to can have
/// something to do, and is neither idle nor waiting then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeLimits {
    /// Without a byte, outside of a request.
    pub idle: Option<Duration>,
    /// Waiting for its client in a transaction.
    pub idle_in_transaction: Option<Duration>,
    /// In a transaction, or in a request that is not answered in full.
    pub transaction: Option<Duration>,
    /// In all.
    pub session: Option<Duration>,
}

impl TimeLimits {
    /// Whether any of them is about what a session is in the middle of.
    pub fn bound_transactions(&self) -> bool {
        self.idle_in_transaction.is_some() || self.transaction.is_some()
    }
}

/// What a tenant has in place of the limits for all: `None` where it has the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnLimits {
    /// Sessions at once; 0: no bound of its own.
    pub max_sessions: Option<usize>,
    /// New sessions a second; 0: no bound.
    pub max_session_rate: Option<u32>,
    /// Zero: for ever.
    pub idle: Option<Duration>,
    /// Zero: for ever.
    pub idle_in_transaction: Option<Duration>,
    /// Zero: for ever.
    pub transaction: Option<Duration>,
    /// Zero: for ever.
    pub session: Option<Duration>,
}

impl OwnLimits {
    /// Those for all.
    pub const NONE: OwnLimits = OwnLimits {
        max_sessions: None,
        max_session_rate: None,
        idle: None,
        idle_in_transaction: None,
        transaction: None,
        session: None,
    };

    /// The tenant's bounds on time, where these are for all.
    pub fn times(&self, all: &TimeLimits) -> TimeLimits {
        let either = |own: Option<Duration>, all| own.map_or(all, not_zero);
        TimeLimits {
            idle: either(self.idle, all.idle),
            idle_in_transaction: either(self.idle_in_transaction, all.idle_in_transaction),
            transaction: either(self.transaction, all.transaction),
            session: either(self.session, all.session),
        }
    }

    /// How many sessions the tenant may have, where this is for all.
    pub fn max_sessions(&self, all: Option<usize>) -> Option<usize> {
        self.max_sessions.map_or(all, |own| (own > 0).then_some(own))
    }

    /// How many sessions of the tenant may begin a second, where this is for all.
    pub fn max_session_rate(&self, all: Option<u32>) -> Option<u32> {
        self.max_session_rate.map_or(all, |own| (own > 0).then_some(own))
    }
}

/// A limit as it is written: zero is none.
pub fn not_zero(limit: Duration) -> Option<Duration> {
    Some(limit).filter(|limit| !limit.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenants_own_limits_override_and_zero_means_none() {
        let second = Some(Duration::from_secs(1));
        let all = TimeLimits { idle: second, transaction: second, ..TimeLimits::default() };
        let own = OwnLimits {
            max_sessions: Some(0),
            idle: Some(Duration::ZERO),
            session: Some(Duration::from_secs(2)),
            ..OwnLimits::default()
        };
        let times = own.times(&all);
        assert_eq!((times.idle, times.transaction), (None, second));
        assert_eq!(times.session, Some(Duration::from_secs(2)));
        assert_eq!(own.max_sessions(Some(5)), None);
        assert_eq!(OwnLimits::default().max_sessions(Some(5)), Some(5));
        assert_eq!(OwnLimits::default().times(&all), all);
    }
}
