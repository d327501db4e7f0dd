//! Who asks OpenBAO first when it says that it is asked too often (429): what keeps running sessions alive
//! goes before what begins new ones.
//!
//! A renewal that is told so has new sessions wait until it has been tried again. A session that is told so
//! has those behind it, of the same role, wait for as long as OpenBAO says (`Retry-After`): a quota of one tenant's
//! must not hold others up. Nobody is held up for ever: neither by what OpenBAO says nor by a quota that lets no
//! renewal through.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What is heeded of a `Retry-After`, and how long renewals hold others up.
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// What a renewal that is tried again may take.
const TO_RENEW: Duration = Duration::from_secs(1);

/// Who has to wait, and until when.
#[derive(Debug, Default)]
pub(super) struct Precedence(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of all: the next attempt of a renewal.
    renewals: Option<Instant>,
    /// Since when renewals have been told so, and none got through.
    since: Option<Instant>,
    /// Of those who ask for a role's credentials.
    roles: HashMap<String, Instant>,
}

impl Precedence {
    /// A renewal was told so, and is tried again after a pause.
    pub(super) fn renewal_waits(&self, pause: Duration) {
        self.renewal_waits_at(Instant::now(), pause);
    }

    /// A renewal got through.
    pub(super) fn renewed(&self) {
        let mut state = self.lock();
        if state.since.is_some() {
            state.since = None;
        }
    }

    /// Who asked for a role's credentials was told to come again after a time.
    pub(super) fn role_waits(&self, path: &str, after: Duration) {
        let now = Instant::now();
        let mut state = self.lock();
        state.roles.retain(|_, until| now < *until);
        state.roles.insert(path.to_owned(), now + after.min(LONGEST));
    }

    /// How long who begins a session has to wait before it asks for a role's credentials, if at all.
    pub(super) fn wait(&self, path: &str) -> Option<Duration> {
        self.wait_at(Instant::now(), path)
    }

    fn renewal_waits_at(&self, now: Instant, pause: Duration) {
        let mut state = self.lock();
        state.since.get_or_insert(now);
        let until = now + pause.min(LONGEST) + TO_RENEW;
        state.renewals = Some(state.renewals.map_or(until, |before| before.max(until)));
    }

    fn wait_at(&self, now: Instant, path: &str) -> Option<Duration> {
        let state = self.lock();
        let renewals = state.renewals.zip(state.since);
        let renewals = renewals.map(|(until, since)| until.min(since + LONGEST));
        let role = state.roles.get(path).copied();
        let until = renewals.max(role)?;
        Some(until.saturating_duration_since(now)).filter(|wait| !wait.is_zero())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_renewal_has_others_wait_until_it_got_through() {
        let (precedence, now) = (Precedence::default(), Instant::now());
        assert_eq!(precedence.wait_at(now, "acme"), None);
        precedence.renewal_waits_at(now, SECOND * 3);
        assert_eq!(precedence.wait_at(now + SECOND, "acme"), Some(SECOND * 2 + TO_RENEW));
        precedence.renewal_waits_at(now + SECOND, SECOND);
        assert_eq!(precedence.wait_at(now + SECOND, "acme"), Some(SECOND * 2 + TO_RENEW));
        precedence.renewed();
        assert_eq!(precedence.wait_at(now + SECOND, "acme"), None);
    }

    #[test]
    fn renewals_that_never_get_through_hold_nobody_up_for_ever() {
        let (precedence, start) = (Precedence::default(), Instant::now());
        for second in 0..120 {
            let now = start + SECOND * second;
            precedence.renewal_waits_at(now, SECOND * 3600);
            assert_eq!(precedence.wait_at(now, "acme").is_some(), now < start + LONGEST);
        }
        precedence.renewed();
        precedence.renewal_waits_at(start + SECOND * 120, SECOND);
        assert!(precedence.wait_at(start + SECOND * 120, "acme").is_some(), "it is another time");
    }

    #[test]
    fn a_roles_wait_is_its_own_and_bounded() {
        let precedence = Precedence::default();
        precedence.role_waits("acme", SECOND * 3600);
        let wait = precedence.wait("acme").expect("it waits");
        assert!(wait <= LONGEST && wait > LONGEST - SECOND * 5, "{wait:?}");
        assert_eq!(precedence.wait("globex"), None);
        precedence.role_waits("acme", Duration::ZERO);
        assert_eq!(precedence.wait("acme"), None);
    }
}
