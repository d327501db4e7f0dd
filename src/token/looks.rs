//! Asking for another look at where keys come from, and waiting for it: however many ask, one
//! looks, and never sooner than a time after the last look that was asked for. Strangers can ask.
//!
//! A [`super::Keyring`] has one where its keys may change. Whoever looks says when it begins and
//! when it has ended; whoever asked waits for a look that began after that.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::clock::BootTime;

#[derive(Debug)]
pub(super) struct Looks {
    state: watch::Sender<State>,
    /// Between the beginnings of two looks that were asked for.
    apart: Duration,
    /// The longest that anybody waits.
    patience: Duration,
}

/// Looks are counted from 1.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    ended: u64,
    /// The look that answers the newest question.
    asked: u64,
    /// When that one began.
    asked_began: Option<BootTime>,
}

impl Looks {
    pub(super) fn new(apart: Duration, patience: Duration) -> Looks {
        Looks { state: watch::Sender::default(), apart, patience }
    }

    /// Asks for a look unless that was done lately, and waits for the one that answers.
    pub(super) async fn again(&self) {
        let mut answer = 0;
        self.state.send_if_modified(|state| {
            let awaited = state.asked > state.begun;
            let lately = state.asked_began.is_some_and(|at| at.elapsed() < self.apart);
            if !awaited && !lately {
                state.asked = state.begun + 1;
            }
            answer = state.asked;
            !awaited && !lately
        });
        let mut state = self.state.subscribe();
        let _late = timeout(self.patience, state.wait_for(|state| state.ended >= answer)).await;
    }

    /// Resolves when a look is asked for that has not begun.
    pub(super) async fn asked(&self) {
        let mut state = self.state.subscribe();
        if state.wait_for(|state| state.asked > state.begun).await.is_err() {
            std::future::pending::<()>().await;
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

    /// What the look saw is in force.
    pub(super) fn end(&self) {
        self.state.send_modify(|state| state.ended = state.begun);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;
    use futures_util::future::join_all;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn many_who_ask_get_one_look() {
        let looks = Arc::new(Looks::new(LONG, LONG));
        let asking = join_all((0..50).map(|_| looks.again()));
        let looking = async {
            looks.asked().await;
            looks.begin();
            assert!(looks.asked().now_or_never().is_none(), "nobody asks for another");
            looks.end();
        };
        tokio::join!(asking, looking);
        // Lately: answered by the look that was.
        looks.again().await;
        assert_eq!(looks.state.borrow().begun, 1);
    }

    #[tokio::test]
    async fn a_look_that_began_before_is_no_answer() {
        let looks = Looks::new(LONG, LONG);
        looks.begin();
        let mut asking = Box::pin(looks.again());
        assert!(asking.as_mut().now_or_never().is_none());
        looks.end();
        assert!(asking.as_mut().now_or_never().is_none(), "that one may have seen the old");
        looks.asked().await;
        looks.begin();
        looks.end();
        asking.await;
    }

    #[tokio::test]
    async fn after_its_time_another_may_be_asked_for() {
        let looks = Looks::new(Duration::from_millis(20), LONG);
        for number in 1..=2 {
            let mut asking = Box::pin(looks.again());
            assert!(asking.as_mut().now_or_never().is_none());
            looks.asked().await;
            looks.begin();
            looks.end();
            asking.await;
            assert_eq!(looks.state.borrow().begun, number);
            let at = looks.state.borrow().asked_began.expect("asked for");
            (at + Duration::from_millis(20)).arrives().await;
        }
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_patience() {
        let looks = Looks::new(LONG, Duration::from_millis(10));
        looks.again().await;
        looks.begin();
        looks.again().await;
        assert_eq!(looks.state.borrow().ended, 0);
    }
}
