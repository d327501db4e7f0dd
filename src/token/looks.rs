//! Asking for another look at where keys come from, and waiting for it: however many ask, one
//! looks, and never sooner than a time after the last look that was asked for. Strangers can ask.
//!
//! A [`super::Keyring`] has one where its keys may change. Whoever looks says when it begins and
//! when it has ended; whoever asked waits for a look that began after that, so what it asked for is
//! either seen or was not there. Nobody is answered by a look that was made for somebody else before:
//! a key can be published at any moment.

use std::future::pending;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use tokio::sync::watch;
use tokio::time::timeout;

#[derive(Debug)]
pub(super) struct Looks {
    state: watch::Sender<State>,
    /// Between the beginnings of two looks that were asked for.
    apart: Duration,
    /// The longest that anybody waits: more than `apart`.
    patience: Duration,
}

/// Looks are counted from 1.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    ended: u64,
    /// The newest one that ended well.
    saw: u64,
    /// When the last one ended, if that was not well.
    failed: Option<BootTime>,
    /// The look that answers the newest question.
    asked: u64,
    /// When that one began.
    asked_began: Option<BootTime>,
}

impl Looks {
    pub(super) fn new(apart: Duration, patience: Duration) -> Looks {
        Looks { state: watch::Sender::default(), apart, patience }
    }

    /// Asks for a look, as soon as one may be made, and waits for it; whether it ended well, and in time.
    /// While looks fail, one that has just failed answers.
    pub(super) async fn again(&self) -> bool {
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

    /// Resolves when a look is asked for that has not begun, and may.
    pub(super) async fn asked(&self) {
        let mut state = self.state.subscribe();
        let asked = state.wait_for(|state| state.asked > state.begun).await;
        let Ok(began) = asked.map(|state| state.asked_began) else { return pending().await };
        if let Some(began) = began {
            (began + self.apart).arrives().await;
        }
    }

    /// A look begins: it sees what is there from now on.
    pub(super) fn begin(&self) {
        self.state.send_modify(|state| {
            if state.asked > state.begun {
                state.asked_began = Some(BootTime::now());
            }
            state.begun += 1;
        });
    }

    /// What the look saw is in force, unless it did not end well.
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
    async fn many_who_ask_get_one_look() {
        let looks = Arc::new(Looks::new(LONG, LONG));
        let asking = join_all((0..50).map(|_| looks.again()));
        let looking = async {
            looks.asked().await;
            looks.begin();
            assert!(looks.asked().now_or_never().is_none(), "nobody asks for another");
            looks.end(true);
        };
        let (answers, ()) = tokio::join!(asking, looking);
        assert!(answers.into_iter().all(|seen| seen));
        assert_eq!(looks.state.borrow().begun, 1);
    }

    #[tokio::test]
    async fn a_look_that_began_before_is_no_answer() {
        let looks = Looks::new(LONG, LONG);
        looks.begin();
        let mut asking = Box::pin(looks.again());
        assert!(asking.as_mut().now_or_never().is_none());
        looks.end(true);
        assert!(asking.as_mut().now_or_never().is_none(), "that one may have seen the old");
        looks.asked().await;
        looks.begin();
        looks.end(true);
        assert!(asking.await);
    }

    #[tokio::test]
    async fn who_asks_lately_waits_for_its_time() {
        let looks = Looks::new(SHORT, LONG);
        for number in 1..=3 {
            let before = looks.state.borrow().asked_began;
            let mut asking = Box::pin(looks.again());
            assert!(asking.as_mut().now_or_never().is_none());
            looks.asked().await;
            assert!(before.is_none_or(|before| before.elapsed() >= SHORT));
            looks.begin();
            looks.end(true);
            assert!(asking.await);
            assert_eq!(looks.state.borrow().begun, number);
        }
    }

    #[tokio::test]
    async fn a_look_that_nobody_asked_for_answers_too() {
        let looks = Looks::new(LONG, LONG);
        for _ in 0..2 {
            let mut asking = Box::pin(looks.again());
            assert!(asking.as_mut().now_or_never().is_none());
            looks.begin();
            looks.end(true);
            assert!(asking.await, "of the second, by one that is not due");
        }
    }

    #[tokio::test]
    async fn a_look_that_failed_answers_for_a_while() {
        let looks = Looks::new(SHORT, LONG);
        let mut asking = Box::pin(looks.again());
        assert!(asking.as_mut().now_or_never().is_none());
        looks.begin();
        looks.end(false);
        assert!(!asking.await, "it was looked, and nothing seen");
        let failed = looks.state.borrow().failed.expect("failed");
        if let Some(seen) = looks.again().now_or_never() {
            assert!(!seen);
        }
        (failed + SHORT).arrives().await;
        let mut asking = Box::pin(looks.again());
        assert!(asking.as_mut().now_or_never().is_none(), "worth another");
        looks.begin();
        looks.end(true);
        assert!(asking.await);
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_patience() {
        let looks = Looks::new(LONG, Duration::from_millis(10));
        assert!(!looks.again().await);
        looks.begin();
        assert!(!looks.again().await);
        assert_eq!(looks.state.borrow().ended, 0);
    }
}
