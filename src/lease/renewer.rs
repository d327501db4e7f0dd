//! Renews a lease for as long as it is held: at two thirds of its time, with jitter, until its
//! maximum; retries with growing pauses until its real end.
//!
//! There are as many leases as sessions and nearly all of them wait, so a lease has no task and no
//! timer of its own: its holder calls [`Renewer::poll_renewal`] when it is time to. What is learned
//! of its end is published to its holders, who must be done with it by then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgsilo_core::backoff::{Backoff, spread};
use pgsilo_core::clock::BootTime;
use pgsilo_openbao::Renewed;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::login::{Login, TokenState};
use super::precedence::WaitingRenewal;
use super::server::{Server, retry_after};
use crate::metrics;

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// When a lease ends, as far as is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseEnd {
    pub(crate) at: BootTime,
    /// Of the first grant; where its login ends sooner, what was left when that became known.
    pub(crate) duration: Duration,
    /// It will not be renewed any more.
    pub(crate) is_final: bool,
    /// The newest attempt to renew it, if that failed.
    pub(crate) failure: Option<RenewalFailure>,
}

/// An attempt to renew a lease that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RenewalFailure {
    /// Which of the lease's failures it is, from 1.
    pub(crate) number: u32,
    /// For the log only.
    pub(crate) cause: Arc<str>,
}

/// One lease, and what is known of it.
#[derive(Debug)]
pub(super) struct Renewer {
    server: Arc<Server>,
    /// What asked for the lease: the lease ends with it.
    login: Arc<Login>,
    lease_id: Box<str>,
    /// Where it is renewed.
    runtime: Handle,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    end: LeaseEnd,
    renewal: Renewal,
}

#[derive(Debug)]
enum Renewal {
    Due(BootTime),
    UnderWay(AbortHandle),
    /// Its end is final.
    Never,
}

impl Renewer {
    pub(super) fn new(
        server: Arc<Server>,
        login: Arc<Login>,
        lease_id: Box<str>,
        runtime: Handle,
        end: LeaseEnd,
    ) -> Arc<Renewer> {
        let state = Mutex::new(State { renewal: Renewal::after(&end), end });
        Arc::new(Renewer { server, login, lease_id, runtime, state, changed: Notify::new() })
    }

    pub(super) fn lease_id(&self) -> &str {
        &self.lease_id
    }

    pub(super) fn login(&self) -> &Arc<Login> {
        &self.login
    }

    /// When it ends, as far as is known now.
    pub(super) fn end(&self) -> LeaseEnd {
        self.lock().end.clone()
    }

    /// Renews the lease in the background if it is time to. Returns when it ends, and when to call
    /// this again if nothing [has changed](Renewer::changed) sooner.
    pub(super) fn poll_renewal(self: &Arc<Self>) -> (LeaseEnd, Option<BootTime>) {
        let mut state = self.lock();
        state.apply_token_state(self.login.state());
        let again = match state.renewal {
            Renewal::Due(at) if at.remaining().is_zero() => {
                let renewing = self.runtime.spawn(Arc::clone(self).renew(state.end.clone()));
                state.renewal = Renewal::UnderWay(renewing.abort_handle());
                None
            }
            Renewal::Due(at) => Some(at),
            Renewal::UnderWay(_) | Renewal::Never => None,
        };
        (state.end.clone(), again)
    }

    /// Resolve when [`Renewer::poll_renewal`] has something new to return, of the lease itself or
    /// of its login; created before that call, they miss nothing.
    pub(super) fn changed(&self) -> (Notified<'_>, Notified<'_>) {
        (self.changed.notified(), self.login.expiring())
    }

    /// The last holder has dropped it.
    pub(super) fn stop(&self) {
        self.lock().stop();
    }

    /// Renews, and tries again until it works or the end has come.
    async fn renew(self: Arc<Self>, end: LeaseEnd) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        // Of attempts that OpenBAO was asked too often for.
        let mut waiting: Option<WaitingRenewal<'_>> = None;
        loop {
            let asked = BootTime::now();
            let renewing = self.server.renew(self.login.secret(), &self.lease_id, end.duration);
            let error = match renewing.await {
                Ok(Renewed { duration, renewable }) => {
                    metrics::RENEWALS.increment(1);
                    if let Some(waiting) = waiting {
                        waiting.renewed();
                    }
                    self.publish(|state| {
                        state.end = renewed(&end, asked, duration, renewable);
                        state.renewal = Renewal::after(&state.end);
                    });
                    return;
                }
                Err(error) => error,
            };
            metrics::RENEWAL_FAILURES.increment(1);
            // 400: OpenBAO knows no such lease, or it is past its maximum.
            let hopeless = error.is_status(400);
            let left = end.at.remaining();
            let is_final = hopeless || left.is_zero();
            self.publish(|state| {
                let number = state.end.failure.as_ref().map_or(0, |failure| failure.number) + 1;
                state.end.failure =
                    Some(RenewalFailure { number, cause: error.to_string().into() });
                if is_final {
                    state.end.is_final = true;
                    state.renewal = Renewal::Never;
                }
            });
            if is_final {
                return;
            }
            let mut pause = retry.pause();
            if let Some(after) = retry_after(&error) {
                // What is left of a lease may be less than OpenBAO asks for.
                pause = pause.max(after.min(left / 4));
                waiting = Some(self.server.precedence().renewal_waits(waiting, pause.min(left)));
            }
            sleep(pause.min(left)).await;
        }
    }

    /// Writes down what a renewal came to, unless its login has made the end final meanwhile.
    fn publish(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        state.apply_token_state(self.login.state());
        if !state.end.is_final {
            change(&mut state);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A lease ends with the login that requested it, at the latest.
    fn apply_token_state(&mut self, state: TokenState) {
        let login_ends = match state {
            TokenState::Valid(_) => return,
            TokenState::Expiring { at, .. } => at,
            TokenState::Invalid => BootTime::now(),
        };
        if login_ends < self.end.at {
            self.end.at = login_ends;
            self.end.duration = self.end.duration.min(login_ends.remaining());
            self.end.is_final = true;
            self.stop();
        }
    }

    fn stop(&mut self) {
        if let Renewal::UnderWay(renewing) = &self.renewal {
            renewing.abort();
        }
        self.renewal = Renewal::Never;
    }
}

impl Renewal {
    fn after(end: &LeaseEnd) -> Renewal {
        match end.is_final {
            true => Renewal::Never,
            false => {
                let left = end.duration.mul_f64(1.0 - two_thirds_with_jitter());
                Renewal::Due(end.at.earlier(left))
            }
        }
    }
}

/// A grant that is shorter than the one before, by more than rounding, has met the maximum:
/// another renewal would only be shorter still.
fn renewed(end: &LeaseEnd, asked: BootTime, granted: Duration, renewable: bool) -> LeaseEnd {
    let at = asked + granted;
    let capped = granted + Duration::from_secs(2) < end.duration || at <= end.at;
    LeaseEnd { at, duration: end.duration, is_final: capped || !renewable, failure: None }
}

/// Many leases of one moment are not renewed in one moment: 0.6 to 0.73.
fn two_thirds_with_jitter() -> f64 {
    2.0 / 3.0 + (spread() - 0.5) * 0.13
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(duration: u64, left: u64) -> LeaseEnd {
        let at = BootTime::now() + Duration::from_secs(left);
        LeaseEnd { at, duration: Duration::from_secs(duration), is_final: false, failure: None }
    }

    #[test]
    fn a_full_grant_is_renewed_again_and_a_shorter_one_is_the_last() {
        let (old, now) = (&end(3600, 1200), BootTime::now());
        let seconds = Duration::from_secs;
        assert!(!renewed(old, now, seconds(3600), true).is_final);
        assert!(renewed(old, now, seconds(3600), false).is_final);
        assert!(renewed(old, now, seconds(1800), true).is_final);
        // An answer that took its time is no smaller grant.
        assert!(!renewed(old, now.earlier(seconds(4)), seconds(3600), true).is_final);
        // A lease of ten seconds that may live for ten: nothing is gained.
        assert!(renewed(&end(10, 4), now, seconds(3), true).is_final);
    }

    #[test]
    fn renewals_are_spread_around_two_thirds() {
        for _ in 0..1000 {
            assert!((0.6..0.74).contains(&two_thirds_with_jitter()));
        }
    }
}
