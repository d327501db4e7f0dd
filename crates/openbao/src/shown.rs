//! Which of several clients a request is made with: the newest, or for a token of the certificate
//! method the one that it was got with. Each client shows one certificate, and OpenBAO renews such
//! a token for no other: without this, a certificate that is replaced would end every session
//! whose lease was asked for with the one before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use pgsilo_core::secret::Secret;

/// The clients that are in use.
#[derive(Debug)]
pub(crate) struct Shown<C> {
    newest: ArcSwap<C>,
    bound: Mutex<Vec<Bound<C>>>,
}

/// A token, and the client that it was got with.
#[derive(Debug)]
struct Bound<C> {
    token: [u8; 32],
    client: Arc<C>,
    renewed: Instant,
    ttl: Duration,
}

impl<C> Shown<C> {
    pub(crate) fn new(client: C) -> Shown<C> {
        Shown { newest: ArcSwap::from_pointee(client), bound: Mutex::default() }
    }

    /// From here on logins are made with this one.
    pub(crate) fn replace(&self, client: C) {
        self.newest.store(Arc::new(client));
    }

    /// For a login.
    pub(crate) fn newest(&self) -> Arc<C> {
        self.newest.load_full()
    }

    /// For a request with a token, or without one.
    pub(crate) fn of(&self, token: Option<&Secret>) -> Arc<C> {
        let bound = self.bound();
        let token = token.filter(|_| !bound.is_empty()).map(Secret::sha256);
        let found = token.and_then(|token| bound.iter().find(|one| one.token == token));
        found.map_or_else(|| self.newest(), |one| Arc::clone(&one.client))
    }

    /// A token was got with a client, and stays with it for as long as it is renewed.
    pub(crate) fn keep_for(&self, token: &Secret, ttl: Duration, client: Arc<C>) {
        let mut bound = self.bound();
        bound.retain(|one| one.renewed.elapsed() < one.ttl);
        bound.push(Bound { token: token.sha256(), client, renewed: Instant::now(), ttl });
    }

    /// A token was renewed.
    pub(crate) fn prolong(&self, token: &Secret, ttl: Duration) {
        let token = token.sha256();
        if let Some(one) = self.bound().iter_mut().find(|one| one.token == token) {
            (one.renewed, one.ttl) = (Instant::now(), ttl);
        }
    }

    fn bound(&self) -> MutexGuard<'_, Vec<Bound<C>>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_its_client_until_it_ends_unrenewed() {
        const HOUR: Duration = Duration::from_secs(3600);
        let tokens = ["a", "b", "c"].map(|token| Secret::new(token.as_bytes()));
        let shown = Shown::new(1);
        let of = |shown: &Shown<i32>, token: Option<usize>| *shown.of(token.map(|at| &tokens[at]));
        shown.keep_for(&tokens[0], Duration::ZERO, shown.newest());
        shown.keep_for(&tokens[1], HOUR, shown.newest());
        assert_eq!(shown.bound().len(), 1, "a has ended");
        shown.replace(2);
        assert_eq!([None, Some(0), Some(1)].map(|token| of(&shown, token)), [2, 2, 1]);
        shown.prolong(&tokens[1], Duration::ZERO);
        shown.keep_for(&tokens[2], HOUR, shown.newest());
        shown.replace(3);
        assert_eq!([None, Some(1), Some(2)].map(|token| of(&shown, token)), [3, 3, 2]);
    }
}
