//! Which of several clients a request is made with: the newest, or for a token of the certificate
//! method the one that it was obtained with. Each client presents one certificate, and OpenBAO
//! renews such a token for no other: without this, replacing a certificate would end every session
//! whose lease was requested with the one before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use pgsilo_core::secret::Secret;

/// The clients that are in use.
#[derive(Debug)]
pub(crate) struct ClientsByToken<C> {
    newest: ArcSwap<C>,
    bound: Mutex<Vec<Bound<C>>>,
}

/// A token, and the client that it was obtained with.
#[derive(Debug)]
struct Bound<C> {
    token: [u8; 32],
    client: Arc<C>,
    renewed: Instant,
    ttl: Duration,
}

impl<C> ClientsByToken<C> {
    pub(crate) fn new(client: C) -> ClientsByToken<C> {
        ClientsByToken { newest: ArcSwap::from_pointee(client), bound: Mutex::default() }
    }

    /// Logins are made with this one from now on.
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

    /// Binds a token to the client that it was obtained with, for as long as it is renewed.
    pub(crate) fn bind(&self, token: &Secret, ttl: Duration, client: Arc<C>) {
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
        let clients = ClientsByToken::new(1);
        let of = |clients: &ClientsByToken<i32>, token: Option<usize>| {
            *clients.of(token.map(|at| &tokens[at]))
        };
        clients.bind(&tokens[0], Duration::ZERO, clients.newest());
        clients.bind(&tokens[1], HOUR, clients.newest());
        assert_eq!(clients.bound().len(), 1, "a has ended");
        clients.replace(2);
        assert_eq!([None, Some(0), Some(1)].map(|token| of(&clients, token)), [2, 2, 1]);
        clients.prolong(&tokens[1], Duration::ZERO);
        clients.bind(&tokens[2], HOUR, clients.newest());
        clients.replace(3);
        assert_eq!([None, Some(1), Some(2)].map(|token| of(&clients, token)), [3, 3, 2]);
    }
}
