//! Cancel keys: handed out to attached sessions, and looked up for requests that present them.
//!
//! A CancelRequest is the one packet that reaches a database without a token, so its key is the
//! proof: it was handed out by an attached session, leads to that session's database process and
//! nowhere else, and dies with the session. The client gets the database's real process id, which
//! drivers show and compare with the one in a NOTIFY, and a secret of ours: 4 bytes for protocol
//! 3.0, 32 for 3.2. A key is looked up by process id and its secret compared in constant time.
//!
//! A request goes to the very address that its session is connected to, as its key is that
//! server's. Of one key one request at a time is on its way; those that come meanwhile share the
//! next. The client's socket is held until the database has closed the forwarded request, because a
//! late cancel would hit the next query (`session/cancelling.rs`); it gets no other answer. How
//! many keys an address may show is limited, and requests that lead nowhere leave events whose
//! number is bounded (`refused.rs`).

mod refused;

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use aws_lc_rs::{constant_time, rand};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::TenantId;
use pgsilo_wire::startup::{CancelRequest, Version};
use tokio::sync::Mutex as AsyncMutex;

use crate::audit::SessionId;
use crate::backend::{DialError, Process};
use refused::{Cause, Refused};

/// Keys that one address may show in a second, right or wrong: a secret of a 3.0 client has 32
/// bits, so guessing one takes most of a year at this rate.
const SHOWN_A_SECOND: NonZeroU32 = NonZeroU32::new(100).unwrap();
/// How many addresses are remembered before the forgettable ones are forgotten.
const REMEMBERED: usize = 4096;

/// The keys of all attached sessions.
#[derive(Debug)]
pub(crate) struct CancelKeys {
    by_pid: Mutex<HashMap<u32, Vec<Arc<Key>>>>,
    shown: DefaultKeyedRateLimiter<IpAddr>,
    refused: Refused,
}

#[derive(Debug)]
struct Key {
    secret: Secret,
    process: Process,
    /// Which one it was handed out to.
    session: SessionId,
    /// Of most keys there are none.
    requests: OnceLock<Box<Requests>>,
}

/// The requests that have presented a key.
#[derive(Debug, Default)]
struct Requests {
    shown: AtomicU64,
    /// Locked by the request that is being forwarded for all of them.
    sent: AsyncMutex<Sent>,
    /// A cancel request may still be on its way although its sender was dropped.
    is_abandoned: AtomicBool,
}

/// The latest request that was forwarded to the database.
#[derive(Debug, Default)]
struct Sent {
    /// How many of the requests that have presented the key it was forwarded for.
    covers: u64,
    failure: Option<Arc<DialError>>,
}

/// A session's key, in force until this is dropped.
#[derive(Debug)]
pub(crate) struct CancelKey {
    keys: &'static CancelKeys,
    key: Arc<Key>,
}

impl CancelKeys {
    pub(crate) fn new() -> CancelKeys {
        let shown = RateLimiter::keyed(Quota::per_second(SHOWN_A_SECOND));
        CancelKeys { by_pid: Mutex::default(), shown, refused: Refused::default() }
    }

    /// Makes a key for a database process: 4 bytes for a client of protocol 3.0, 32 for one of
    /// protocol 3.2. `None` when the machine has no randomness to give.
    pub(crate) fn hand_out(
        &'static self,
        process: Process,
        version: Version,
        session: SessionId,
    ) -> Option<CancelKey> {
        let mut secret = [0; 32];
        rand::fill(&mut secret).ok()?;
        let length = if version >= Version::V3_2 { 32 } else { 4 };
        let key = Arc::new(Key {
            secret: Secret::new(&secret[..length]),
            process,
            session,
            requests: OnceLock::new(),
        });
        if let Some(pid) = key.process.pid() {
            // Servers count for themselves: few of theirs are the same.
            let mut by_pid = self.lock();
            by_pid.entry(pid).or_insert_with(|| Vec::with_capacity(1)).push(Arc::clone(&key));
        }
        Some(CancelKey { keys: self, key })
    }

    /// Where a request leads, if its key is one that was handed out and is still in force. If it is
    /// not, that is told of.
    pub(crate) fn find(&self, request: &CancelRequest, from: Option<IpAddr>) -> Option<Found> {
        let found = self.look_up(request, from);
        found.inspect_err(|cause| self.refused.record(from, *cause)).ok()
    }

    fn look_up(&self, request: &CancelRequest, from: Option<IpAddr>) -> Result<Found, Cause> {
        if let Some(from) = from {
            if self.shown.check_key(&from).is_err() {
                return Err(Cause::TooMany);
            }
            if self.shown.len() > REMEMBERED {
                self.shown.retain_recent();
            }
        }
        let by_pid = self.lock();
        let mut keys = by_pid.get(&request.pid).into_iter().flatten();
        let key = keys.find(|key| same(key.secret.expose(), &request.secret));
        key.map(|key| Found(Arc::clone(key))).ok_or(Cause::UnknownKey)
    }

    /// Tells of the requests that led nowhere, now and then, for as long as the process lives.
    pub(crate) async fn report_periodically(&self) {
        self.refused.report_periodically().await;
    }

    /// Tells of those that nothing has told of yet.
    pub(crate) fn tell(&self) {
        self.refused.tell();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Vec<Arc<Key>>>> {
        self.by_pid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key that was shown: as long as this is held, its process is not another session's.
#[derive(Debug)]
pub(crate) struct Found(Arc<Key>);

impl Found {
    /// What the database calls the process that it leads to.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.0.process.pid()
    }

    /// Which session that is.
    pub(crate) fn session(&self) -> SessionId {
        self.0.session
    }

    /// Whose it is.
    pub(crate) fn tenant(&self) -> &TenantId {
        self.0.process.tenant()
    }

    /// Cancels whatever runs there now. Of one key, one request at a time is on its way. It may
    /// have hit already when others come, and what runs then is another query: so the next one is
    /// sent for them, for all of them together.
    ///
    /// # Errors
    /// When the database could not be reached, or did not close in time: then the request may still
    /// hit.
    pub(crate) async fn cancel(&self) -> Result<(), Arc<DialError>> {
        let Key { process, requests, .. } = &*self.0;
        let Requests { shown, sent, is_abandoned } = &**requests.get_or_init(Box::default);
        let own = shown.fetch_add(1, Ordering::Relaxed) + 1;
        let mut sent = sent.lock().await;
        if sent.covers < own {
            let covers = shown.load(Ordering::Relaxed);
            // If this future is dropped, it stays so.
            let was_abandoned = is_abandoned.swap(true, Ordering::Relaxed);
            let failure = process.cancel().await.err().map(Arc::new);
            if failure.is_none() {
                is_abandoned.store(was_abandoned, Ordering::Relaxed);
            }
            *sent = Sent { covers, failure };
        }
        sent.failure.clone().map_or(Ok(()), Err)
    }
}

impl CancelKey {
    /// Withdraws the key. Returns the process, unless the key was presented and is being used to
    /// cancel what runs there: whatever runs there next would be hit as well.
    pub(crate) fn withdraw(self) -> Option<Process> {
        let key = Arc::clone(&self.key);
        drop(self);
        let Key { process, requests, .. } = Arc::into_inner(key)?;
        let is_abandoned =
            requests.get().is_some_and(|requests| requests.is_abandoned.load(Ordering::Relaxed));
        (!is_abandoned).then_some(process)
    }

    /// The process id that the client is told: the database's own. Where that has told none, there
    /// is nothing to tell: the session cannot be cancelled.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.key.process.pid()
    }

    /// The secret that the client is told.
    pub(crate) fn secret(&self) -> &[u8] {
        self.key.secret.expose()
    }

    /// The process that the key leads to.
    pub(crate) fn process(&self) -> &Process {
        &self.key.process
    }
}

impl Drop for CancelKey {
    fn drop(&mut self) {
        let Some(pid) = self.pid() else { return };
        let mut by_pid = self.keys.lock();
        if let Some(keys) = by_pid.get_mut(&pid) {
            keys.retain(|key| !Arc::ptr_eq(key, &self.key));
            if keys.is_empty() {
                by_pid.remove(&pid);
            }
        }
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use bytes::Bytes;

    use super::*;

    fn keys() -> &'static CancelKeys {
        Box::leak(Box::new(CancelKeys::new()))
    }

    fn hand_out(keys: &'static CancelKeys, pid: u32, version: Version) -> CancelKey {
        let process = Process::of(Some(pid));
        keys.hand_out(process, version, SessionId::new()).expect("randomness")
    }

    fn request(pid: u32, secret: &[u8]) -> CancelRequest {
        CancelRequest { pid, secret: Bytes::copy_from_slice(secret) }
    }

    #[test]
    fn a_key_is_found_by_its_process_and_its_whole_secret_only() {
        let keys = keys();
        for (pid, version, length) in [(11, Version::V3_0, 4), (12, Version::V3_2, 32)] {
            let key = hand_out(keys, pid, version);
            let secret = key.secret().to_vec();
            assert_eq!((key.pid(), secret.len()), (Some(pid), length));
            let found = keys.find(&request(pid, &secret), None).expect("its own");
            assert_eq!(found.pid(), Some(pid));
            let mut wrong = secret.clone();
            wrong[length - 1] ^= 1;
            for (pid, secret) in [
                (pid, &wrong[..]),
                (pid, &secret[..length - 1]),
                (pid, &[]),
                (pid, &[&secret[..], &[0]].concat()),
                (pid + 100, &secret),
            ] {
                assert!(keys.find(&request(pid, secret), None).is_none(), "{pid} {secret:?}");
            }
        }
    }

    /// Two databases may call their processes the same.
    #[test]
    fn two_processes_with_the_same_pid_have_separate_keys() {
        let keys = keys();
        let (one, other) = (hand_out(keys, 7, Version::V3_2), hand_out(keys, 7, Version::V3_2));
        for key in [&one, &other] {
            let found = keys.find(&request(7, key.secret()), None).expect("its own");
            assert_eq!(found.session(), key.key.session);
        }
        let secret = one.secret().to_vec();
        drop(one);
        assert!(keys.find(&request(7, &secret), None).is_none());
        assert!(keys.find(&request(7, other.secret()), None).is_some());
        drop(other);
        assert!(keys.lock().is_empty());
    }

    #[test]
    fn a_connection_whose_cancel_key_is_in_use_is_not_reused() {
        let keys = keys();
        let key = hand_out(keys, 7, Version::V3_0);
        let shown = keys.find(&request(7, key.secret()), None).expect("its own");
        assert!(key.withdraw().is_none());
        drop(shown);
        let key = hand_out(keys, 7, Version::V3_0);
        let secret = key.secret().to_vec();
        assert_eq!(key.withdraw().and_then(|process| process.pid()), Some(7));
        assert!(keys.find(&request(7, &secret), None).is_none());
    }

    #[test]
    fn a_database_that_tells_no_process_has_no_key_in_force() {
        let keys = keys();
        let handed_out = keys.hand_out(Process::of(None), Version::V3_0, SessionId::new());
        let key = handed_out.expect("randomness");
        assert_eq!(key.pid(), None);
        assert!(keys.lock().is_empty());
    }

    #[test]
    fn cancel_attempts_are_limited_per_address() {
        let keys = keys();
        let key = hand_out(keys, 7, Version::V3_2);
        let (guesser, other) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
        let show = |from: Ipv4Addr, secret: &[u8]| {
            keys.look_up(&request(7, secret), Some(from.into())).map(|found| found.pid())
        };
        let all = (0..10 * SHOWN_A_SECOND.get()).map(|_| show(guesser, b"guessed"));
        assert!(all.filter(|shown| matches!(shown, Err(Cause::TooMany))).count() > 0);
        assert!(matches!(show(other, key.secret()), Ok(Some(7))));
    }
}
