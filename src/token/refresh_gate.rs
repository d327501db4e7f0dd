//! Requests to refresh keys, and waiting for the refresh: however many request one, there is one,
//! and never sooner than a time after the last one that was requested. Strangers can request it.
//!
//! A [`super::Keyring`] has a gate where its keys may change. The keyring reports when a refresh
//! begins and ends; a request waits for a refresh that began after it, so it sees the key that it
//! needs if that was there. An earlier refresh does not answer it: a key can be published at any
//! moment.

use std::future::pending;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use tokio::sync::watch;
use tokio::time::timeout;

#[derive(Debug)]
pub(super) struct RefreshGate {
    state: watch::Sender<State>,
    /// Between the beginnings of two requested refreshes.
    apart: Duration,
    /// The longest that a request waits: more than `apart`.
    patience: Duration,
}

/// Refreshes are counted from 1.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    ended: u64,
    /// The last one that succeeded.
    saw: u64,
    /// When the last one ended, if it failed.
    failed: Option<BootTime>,
    /// The refresh that answers the latest request.
    asked: u64,
    /// When that one began.
    asked_began: Option<BootTime>,
}

impl RefreshGate {
    pub(super) fn new(apart: Duration, patience: Duration) -> RefreshGate {
        RefreshGate { state: watch::Sender::default(), apart, patience }
    }

    /// Requests a refresh, as soon as one is allowed, and waits for it. Returns whether it
    /// succeeded in time. A refresh that has just failed answers at once.
    pub(super) async fn request_refresh(&self) -> bool {
        let mut answer = None;
        self.state.send_if_modified(|state| {
            if state.failed.is_some_and(|at| at.elapsed() < self.apart) {
                return false;
            }
            let first = state.asked <= state.begun;
            if first {
                state.asked = state.begun + 1;
            }
            answer = Some(state.asked);
            first
        });
        let Some(answer) = answer else { return false };
        let mut state = self.state.subscribe();
        let answered = timeout(self.patience, state.wait_for(|state| state.ended >= answer)).await;
        answered.is_ok_and(|state| state.is_ok_and(|state| state.saw >= answer))
    }

    /// Resolves when a refresh is requested that has not begun and is allowed.
    pub(super) async fn requested(&self) {
        let mut state = self.state.subscribe();
        let asked = state.wait_for(|state| state.asked > state.begun).await;
        let Ok(began) = asked.map(|state| state.asked_began) else { return pending().await };
        if let Some(began) = began {
            (began + self.apart).arrives().await;
        }
    }

    /// A refresh begins: it sees what is there from now on.
    pub(super) fn begin(&self) {
        self.state.send_modify(|state| {
            if state.asked > state.begun {
                state.asked_began = Some(BootTime::now());
            }
            state.begun += 1;
        });
    }

    /// The refreshed keys are in force, if it succeeded.
    pub(super) fn end(&self, well: bool) {
        self.state.send_modify(|state| {
            state.ended = state.begun;
            state.failed = (!well).then(BootTime::now);
            if well {
                state.saw = state.begun;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;
    use futures_util::future::join_all;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn many_requests_cause_one_refresh() {
        let gate = Arc::new(RefreshGate::new(LONG, LONG));
        let asking = join_all((0..50).map(|_| gate.request_refresh()));
        let refreshing = async {
            gate.requested().await;
            gate.begin();
            assert!(gate.requested().now_or_never().is_none(), "no other is requested");
            gate.end(true);
        };
        let (answers, ()) = tokio::join!(asking, refreshing);
        assert!(answers.into_iter().all(|seen| seen));
        assert_eq!(gate.state.borrow().begun, 1);
    }

    #[tokio::test]
    async fn a_refresh_that_began_earlier_does_not_answer() {
        let gate = RefreshGate::new(LONG, LONG);
        gate.begin();
        let mut asking = Box::pin(gate.request_refresh());
        assert!(asking.as_mut().now_or_never().is_none());
        gate.end(true);
        assert!(asking.as_mut().now_or_never().is_none(), "that one may have read the old keys");
        gate.requested().await;
        gate.begin();
        gate.end(true);
        assert!(asking.await);
    }

    #[tokio::test]
    async fn a_request_waits_until_the_next_refresh_is_allowed() {
        let gate = RefreshGate::new(SHORT, LONG);
        for number in 1..=3 {
            let before = gate.state.borrow().asked_began;
            let mut asking = Box::pin(gate.request_refresh());
            assert!(asking.as_mut().now_or_never().is_none());
            gate.requested().await;
            assert!(before.is_none_or(|before| before.elapsed() >= SHORT));
            gate.begin();
            gate.end(true);
            assert!(asking.await);
            assert_eq!(gate.state.borrow().begun, number);
        }
    }

    #[tokio::test]
    async fn an_unrequested_refresh_answers_too() {
        let gate = RefreshGate::new(LONG, LONG);
        for _ in 0..2 {
            let mut asking = Box::pin(gate.request_refresh());
            assert!(asking.as_mut().now_or_never().is_none());
            gate.begin();
            gate.end(true);
            assert!(asking.await, "the second request, by a refresh that is not due");
        }
    }

    #[tokio::test]
    async fn a_failed_refresh_answers_for_a_while() {
        let gate = RefreshGate::new(SHORT, LONG);
        let mut asking = Box::pin(gate.request_refresh());
        assert!(asking.as_mut().now_or_never().is_none());
        gate.begin();
        gate.end(false);
        assert!(!asking.await, "the refresh failed");
        let failed = gate.state.borrow().failed.expect("failed");
        if let Some(seen) = gate.request_refresh().now_or_never() {
            assert!(!seen);
        }
        (failed + SHORT).arrives().await;
        let mut asking = Box::pin(gate.request_refresh());
        assert!(asking.as_mut().now_or_never().is_none(), "another refresh is allowed");
        gate.begin();
        gate.end(true);
        assert!(asking.await);
    }

    #[tokio::test]
    async fn a_request_waits_for_its_patience_at_most() {
        let gate = RefreshGate::new(LONG, Duration::from_millis(10));
        assert!(!gate.request_refresh().await);
        gate.begin();
        assert!(!gate.request_refresh().await);
        assert_eq!(gate.state.borrow().ended, 0);
    }
}
