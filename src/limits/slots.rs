//! Slots for connections that are not authenticated yet.
//!
//! A stranger can always open as many connections as there are slots. So when all are taken, the
//! oldest unproved connection is closed and a new one gets its slot, similar to sshd's MaxStartups;
//! but not before the old one had `grace` to prove something: until then the new one waits, so that
//! many honest clients at once do not evict each other. Neither silence nor slowness keeps others
//! out. A proved connection keeps its slot, for as long as something else bounds how many of them
//! there may be: from `Routed` on a client is counted among its tenant's sessions. A refusal gives
//! that up before it is told, and a cancel request never has it. Each listener has slots of its
//! own, and so has the admin endpoint.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

/// All slots, and the connections that have them.
#[derive(Debug)]
pub(crate) struct Slots {
    max: usize,
    grace: Duration,
    state: Mutex<State>,
    /// A slot was released, or can no longer be taken over.
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By number, so the oldest first.
    unproved: BTreeMap<u64, Taken>,
    proved: HashMap<u64, Taken>,
    /// Evicted connections that are not closed yet.
    evicted: usize,
}

#[derive(Debug)]
struct Taken {
    since: Instant,
    evict: oneshot::Sender<()>,
}

/// A connection's slot, released when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: &'static Slots,
    number: u64,
}

/// How a connection learns that it is evicted.
#[derive(Debug)]
pub(crate) struct Eviction(Option<oneshot::Receiver<()>>);

/// What an attempt to take a slot came to.
enum Look {
    Entered(Slot, Eviction),
    /// One can be evicted then.
    Wait(Instant),
    Full,
}

impl Slots {
    /// `max` slots; none is evicted before `grace` has passed.
    pub(crate) fn new(max: usize, grace: Duration) -> Slots {
        Slots { max, grace, state: Mutex::default(), freed: Notify::new() }
    }

    /// Takes a slot, a free one or that of an evicted connection, after `grace` at most. `None`
    /// when all connections are proved, or evicted ones do not close.
    pub(crate) async fn enter(&'static self) -> Option<(Slot, Eviction)> {
        loop {
            // Subscribed first: no slot that is released after this line is missed.
            let freed = self.freed.notified();
            match self.look(Instant::now()) {
                Look::Entered(slot, eviction) => return Some((slot, eviction)),
                Look::Full => return None,
                Look::Wait(until) => tokio::select! {
                    () = sleep_until(until) => {}
                    () = freed => {}
                },
            }
        }
    }

    /// The number of slots that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.lock().taken()
    }

    fn look(&'static self, now: Instant) -> Look {
        let mut state = self.lock();
        if state.taken() >= self.max {
            let Some(oldest) = state.unproved.first_entry() else { return Look::Full };
            let until = oldest.get().since + self.grace;
            if until > now {
                return Look::Wait(until);
            }
            if state.evicted >= self.max {
                return Look::Full;
            }
            if let Some((_, oldest)) = state.unproved.pop_first() {
                let _gone_already = oldest.evict.send(());
                state.evicted += 1;
            }
        }
        let number = state.next;
        state.next += 1;
        let (evict, told) = oneshot::channel();
        state.unproved.insert(number, Taken { since: now, evict });
        Look::Entered(Slot { slots: self, number }, Eviction(Some(told)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn taken(&self) -> usize {
        self.unproved.len() + self.proved.len()
    }
}

impl Slot {
    /// Its connection is proved: it is not evicted from now on, unless that has just happened.
    pub(crate) fn prove(&mut self) {
        let mut state = self.slots.lock();
        if let Some(taken) = state.unproved.remove(&self.number) {
            state.proved.insert(self.number, taken);
            drop(state);
            // None may be left to evict.
            self.slots.freed.notify_one();
        }
    }

    /// Its connection is not proved any more: it may be evicted.
    pub(crate) fn unprove(&mut self) {
        let mut state = self.slots.lock();
        if let Some(taken) = state.proved.remove(&self.number) {
            state.unproved.insert(self.number, taken);
            drop(state);
            self.slots.freed.notify_one();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        let taken = state.unproved.remove(&self.number);
        if taken.or_else(|| state.proved.remove(&self.number)).is_none() {
            state.evicted -= 1;
        }
        drop(state);
        self.slots.freed.notify_one();
    }
}

impl Eviction {
    /// Resolves on eviction; never, if the slot is released before that.
    pub(crate) async fn told(&mut self) {
        let told = match &mut self.0 {
            Some(told) => told.await,
            None => std::future::pending().await,
        };
        // A receiver answers once.
        self.0 = None;
        if told.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::timeout;

    use super::*;

    const GRACE: Duration = Duration::from_millis(50);

    fn slots(max: usize, grace: Duration) -> &'static Slots {
        Box::leak(Box::new(Slots::new(max, grace)))
    }

    #[tokio::test]
    async fn the_oldest_unproven_connection_is_evicted() {
        let slots = slots(3, Duration::ZERO);
        let (mut first, _eviction) = slots.enter().await.expect("free");
        first.prove();
        let (second, mut evicted) = slots.enter().await.expect("free");
        let (_third, mut stays) = slots.enter().await.expect("free");
        let (fourth, _eviction) = slots.enter().await.expect("the second's");
        evicted.told().await;
        assert!(stays.told().now_or_never().is_none());
        assert_eq!(slots.taken(), 3);
        // It goes when it goes: its place is another's already.
        drop(second);
        assert_eq!(slots.taken(), 3);
        drop((first, fourth));
        assert_eq!(slots.taken(), 1);
    }

    #[tokio::test]
    async fn a_proven_connection_is_not_evicted() {
        let slots = slots(2, Duration::ZERO);
        let (mut first, mut first_eviction) = slots.enter().await.expect("free");
        let (mut second, _eviction) = slots.enter().await.expect("free");
        first.prove();
        second.prove();
        assert!(slots.enter().await.is_none());
        assert!(first_eviction.told().now_or_never().is_none());
        drop(first);
        assert!(slots.enter().await.is_some());
    }

    #[tokio::test]
    async fn a_slot_whose_proof_was_withdrawn_can_be_evicted_again() {
        let slots = slots(1, Duration::ZERO);
        let (mut first, mut evicted) = slots.enter().await.expect("free");
        first.prove();
        assert!(slots.enter().await.is_none());
        first.unprove();
        let (_second, mut stays) = slots.enter().await.expect("the first's");
        evicted.told().await;
        assert!(stays.told().now_or_never().is_none());
        // What is another's is not made one's own again.
        first.prove();
        first.unprove();
        drop(first);
        assert_eq!(slots.taken(), 1);
    }

    #[tokio::test]
    async fn an_evicted_connection_cannot_become_proven() {
        let slots = slots(1, Duration::ZERO);
        let (mut first, mut evicted) = slots.enter().await.expect("free");
        let (second, _eviction) = slots.enter().await.expect("the first's");
        first.prove();
        evicted.told().await;
        drop(first);
        assert_eq!(slots.taken(), 1);
        drop(second);
        assert_eq!(slots.taken(), 0);
    }

    #[tokio::test]
    async fn evicted_connections_that_linger_are_bounded() {
        let slots = slots(1, Duration::ZERO);
        let mut stuck = vec![slots.enter().await.expect("free")];
        stuck.push(slots.enter().await.expect("the first's"));
        assert!(slots.enter().await.is_none());
        stuck.remove(0);
        assert!(slots.enter().await.is_some());
    }

    #[tokio::test]
    async fn a_newcomer_waits_for_the_others_grace() {
        let slots = slots(1, GRACE);
        let began = Instant::now();
        let (_first, mut evicted) = slots.enter().await.expect("free");
        let (_second, _eviction) = slots.enter().await.expect("the first's");
        evicted.told().await;
        assert!(began.elapsed() >= GRACE);
    }

    #[tokio::test]
    async fn a_newcomer_waits_for_a_place() {
        let slots = slots(1, Duration::from_secs(3600));
        let (first, _eviction) = slots.enter().await.expect("free");
        let leaves = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let (second, ()) = tokio::join!(slots.enter(), leaves);
        assert!(second.is_some());
    }

    #[tokio::test]
    async fn a_newcomer_does_not_wait_for_slots_that_became_permanent() {
        let slots = slots(1, Duration::from_secs(3600));
        let (mut first, _eviction) = slots.enter().await.expect("free");
        let proves = async {
            tokio::task::yield_now().await;
            first.prove();
        };
        let both = async { tokio::join!(slots.enter(), proves) };
        let (second, ()) = timeout(Duration::from_secs(30), both).await.expect("told at once");
        assert!(second.is_none());
    }
}
