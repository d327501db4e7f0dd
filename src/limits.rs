//! Bounds on what may be open at once: connections that are not logged in, sessions in all, of one
//! tenant, connections of one address; and on how often sessions begin. Each is a permit, given back when it is dropped; that of a
//! connection which has proved nothing may be another's before that. And bounds on time, which the
//! relay and a session's authority keep.

mod pace;
mod slots;

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pgsilo_core::limits::TimeLimits;

pub(crate) use pace::{Pace, Rate};
pub(crate) use slots::{Eviction, Slot, Slots};

/// Bounds on what clients may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From accept to login; not zero.
    pub login_timeout: Duration,
    /// From accept to a whole startup packet, TLS included; not zero.
    pub startup_timeout: Duration,
    /// Connections of each listener that are not logged in yet; at least one.
    pub max_handshakes: usize,
    /// At least one.
    pub max_sessions: usize,
    /// `None`: no bound of its own.
    pub max_sessions_per_tenant: Option<usize>,
    /// New sessions of one tenant a second; `None`: no bound.
    pub max_session_rate_per_tenant: Option<u32>,
    /// `None`: no bound of its own.
    pub max_connections_per_address: Option<usize>,
    /// Of a token, 1 to 65536.
    pub max_token_bytes: usize,
    /// How long sessions, and what they are in the middle of, may last.
    pub times: TimeLimits,
    /// What transactions get to finish in at SIGTERM.
    pub drain_timeout: Duration,
    /// What those of a tenant get that is paused.
    pub pause_timeout: Duration,
    /// A peer, client or database, that has answered nothing for so long counts as gone.
    pub dead_peer_timeout: Duration,
}

/// Counts per key, with one bound for all keys, or none.
#[derive(Debug)]
pub(crate) struct Tally<K> {
    counts: Mutex<HashMap<K, usize>>,
    bound: Option<usize>,
}

/// One counted use of a key.
pub(crate) struct TallyPermit<K: Eq + Hash + 'static> {
    tally: &'static Tally<K>,
    key: K,
}

impl<K: Clone + Eq + Hash> Tally<K> {
    pub(crate) fn new(bound: Option<usize>) -> Tally<K> {
        Tally { counts: Mutex::default(), bound }
    }

    /// Counts one more for a key; `None` when it has as many as it may.
    pub(crate) fn count(&'static self, key: &K) -> Option<TallyPermit<K>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let used = counts.get(key).copied().unwrap_or_default();
        if self.bound.is_some_and(|bound| used >= bound) {
            return None;
        }
        let count = counts.entry(key.clone()).or_default();
        *count += 1;
        Some(TallyPermit { tally: self, key: key.clone() })
    }
}

impl<K: Eq + Hash> Drop for TallyPermit<K> {
    fn drop(&mut self) {
        let mut counts = self.tally.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

impl<K: Eq + Hash + fmt::Debug> fmt::Debug for TallyPermit<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TallyPermit").field(&self.key).finish()
    }
}

/// The network that one customer has: an IPv6 address counts as its /64, of which anybody has
/// 2^64 addresses.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(((u128::from(v6) >> 64) << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::{Tally, network};

    #[test]
    fn an_ipv6_address_counts_as_its_network() {
        let of = |text: &str| network(text.parse().expect("an address")).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
    }

    #[test]
    fn a_key_has_as_many_as_its_bound_and_gets_them_back() {
        let tally: &'static Tally<&str> = Box::leak(Box::new(Tally::new(Some(2))));
        let first = tally.count(&"acme").expect("one");
        let _second = tally.count(&"acme").expect("two");
        assert!(tally.count(&"acme").is_none());
        assert!(tally.count(&"globex").is_some());
        drop(first);
        assert!(tally.count(&"acme").is_some());
    }

    #[test]
    fn a_key_that_may_have_none_leaves_no_trace() {
        let tally: &'static Tally<&str> = Box::leak(Box::new(Tally::new(Some(0))));
        assert!(tally.count(&"acme").is_none());
        assert!(tally.counts.lock().expect("not poisoned").is_empty());
    }

    #[test]
    fn without_a_bound_all_are_counted_and_forgotten_keys_take_no_memory() {
        let tally: &'static Tally<u32> = Box::leak(Box::new(Tally::new(None)));
        let permits: Vec<_> = (0..100).filter_map(|key| tally.count(&(key % 3))).collect();
        assert_eq!(permits.len(), 100);
        drop(permits);
        assert!(tally.counts.lock().expect("not poisoned").is_empty());
    }
}
