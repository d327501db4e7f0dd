//! Who asks OpenBAO first when it says that it is asked too often (429): what keeps running
//! sessions alive goes before what begins new ones.
//!
//! New sessions wait for as long as a renewal does that was told so. A session that is told so has
//! those behind it, of the same role, wait for as long as OpenBAO says (`Retry-After`): a quota of
//! one tenant's must not hold others up. No wait is endless: neither for what OpenBAO says nor for
//! renewals of which none gets through.

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
    renewals: Option<Renewals>,
    /// Of those who ask for a role's credentials.
    roles: HashMap<String, Instant>,
}

/// Renewals that were told so and are not through.
#[derive(Debug)]
struct Renewals {
    /// How many; at least one.
    waiting: usize,
    /// When the last of them is tried again, and has its answer.
    until: Instant,
    /// Since when none of them got through.
    since: Instant,
}

/// A renewal that was told so: others give way to it until this is dropped.
#[derive(Debug)]
pub(super) struct WaitingRenewal<'a>(&'a Precedence);

impl WaitingRenewal<'_> {
    /// It got through.
    pub(super) fn renewed(self) {
        if let Some(renewals) = &mut self.0.lock().renewals {
            renewals.since = Instant::now();
        }
    }
}

impl Drop for WaitingRenewal<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.renewals = state.renewals.take().filter(|renewals| renewals.waiting > 1);
        if let Some(renewals) = &mut state.renewals {
            renewals.waiting -= 1;
        }
    }
}

impl Precedence {
    /// A renewal was told so, and is tried again after a pause. If it was told so before, `waiting`
    /// is what came of that.
    pub(super) fn renewal_waits<'a>(
        &'a self,
        waiting: Option<WaitingRenewal<'a>>,
        pause: Duration,
    ) -> WaitingRenewal<'a> {
        let now = Instant::now();
        let until = now + pause.min(LONGEST) + TO_RENEW;
        let mut state = self.lock();
        let renewals = state.renewals.get_or_insert(Renewals { waiting: 0, until, since: now });
        renewals.until = renewals.until.max(until);
        waiting.unwrap_or_else(|| {
            renewals.waiting += 1;
            WaitingRenewal(self)
        })
    }

    /// Who asked for a role's credentials was told to come again after a time.
    pub(super) fn role_waits(&self, path: &str, after: Duration) {
        let now = Instant::now();
        let mut state = self.lock();
        state.roles.retain(|_, until| now < *until);
        state.roles.insert(path.to_owned(), now + after.min(LONGEST));
    }

    /// How long who begins a session has to wait before it asks for a role's credentials, if at
    /// all.
    pub(super) fn wait(&self, path: &str) -> Option<Duration> {
        let state = self.lock();
        let renewals = state.renewals.as_ref();
        let renewals = renewals.map(|renewals| renewals.until.min(renewals.since + LONGEST));
        let until = renewals.max(state.roles.get(path).copied())?;
        Some(until.saturating_duration_since(Instant::now())).filter(|wait| !wait.is_zero())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn others_wait_until_the_last_renewal_got_through() {
        let precedence = Precedence::default();
        assert_eq!(precedence.wait("acme"), None);
        let first = precedence.renewal_waits(None, SECOND * 3);
        advance(SECOND).await;
        assert_eq!(precedence.wait("acme"), Some(SECOND * 2 + TO_RENEW));
        let second = precedence.renewal_waits(None, SECOND);
        assert_eq!(precedence.wait("acme"), Some(SECOND * 2 + TO_RENEW), "the later one counts");
        first.renewed();
        assert_eq!(precedence.wait("acme"), Some(SECOND * 2 + TO_RENEW), "one is left");
        let second = precedence.renewal_waits(Some(second), SECOND * 5);
        assert_eq!(precedence.wait("acme"), Some(SECOND * 5 + TO_RENEW));
        drop(second);
        assert_eq!(precedence.wait("acme"), None, "given up");
    }

    #[tokio::test(start_paused = true)]
    async fn failing_renewals_do_not_delay_logins_for_ever() {
        let (precedence, start) = (Precedence::default(), Instant::now());
        let mut waiting = None;
        for _ in 0..120 {
            waiting = Some(precedence.renewal_waits(waiting, SECOND * 3600));
            assert_eq!(precedence.wait("acme").is_some(), start.elapsed() < LONGEST);
            advance(SECOND).await;
        }
        let other = precedence.renewal_waits(None, SECOND);
        assert_eq!(precedence.wait("acme"), None, "it is one of them");
        other.renewed();
        assert!(precedence.wait("acme").is_some(), "they get through again");
        drop(waiting);
        let _another = precedence.renewal_waits(None, SECOND);
        assert!(precedence.wait("acme").is_some(), "it is another time");
    }

    #[tokio::test(start_paused = true)]
    async fn a_roles_wait_is_its_own_and_bounded() {
        let precedence = Precedence::default();
        precedence.role_waits("acme", SECOND * 3600);
        assert_eq!(precedence.wait("acme"), Some(LONGEST));
        assert_eq!(precedence.wait("globex"), None);
        precedence.role_waits("acme", Duration::ZERO);
        assert_eq!(precedence.wait("acme"), None);
    }
}
