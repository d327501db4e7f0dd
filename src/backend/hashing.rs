//! SCRAM's hashing, off the event loops: how much of it a login takes is the database's to say (up
//! to 100,000 rounds are accepted), and that may be a tenant's own.
//!
//! It has threads of its own, one for each processor and two at least, which step back where an
//! event loop has something to do. A tenant has half of them at most: whatever its database asks
//! for, the logins of others go on. Called by `login.rs`.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::thread::available_parallelism;

use pgsilo_core::tenant::TenantId;
use rustix::process::setpriority_process;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{AcquireError, Semaphore};
use tokio::task::JoinError;

/// How far the threads step back: nice(1) has 0 to 19.
const NICE: i32 = 10;

/// The threads, or why there are none.
static HASHERS: LazyLock<io::Result<Hashers>> = LazyLock::new(Hashers::start);

/// Why nothing was hashed: not the database's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HashError {
    #[error("no threads could be started: {0}")]
    Threads(String),
    #[error("the hashing was given up: {0}")]
    Thread(#[from] JoinError),
    #[error("hashing has ended: {0}")]
    Ended(#[from] AcquireError),
}

#[derive(Debug)]
struct Hashers {
    threads: Runtime,
    of_a_tenant: usize,
    lines: Mutex<HashMap<TenantId, Weak<Semaphore>>>,
}

/// Does what takes its time for a tenant. Once begun it is done to its end, whether or not anybody
/// still waits for it.
pub(super) async fn hash<T: Send + 'static>(
    tenant: &TenantId,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HashError> {
    match &*HASHERS {
        Ok(hashers) => hashers.hash(tenant, work).await,
        Err(error) => Err(HashError::Threads(error.to_string())),
    }
}

impl Hashers {
    fn start() -> io::Result<Hashers> {
        let count = available_parallelism().map_or(1, NonZeroUsize::get).max(2);
        let threads = Builder::new_multi_thread()
            .worker_threads(count)
            .thread_name("pgsilo-hash")
            .on_thread_start(|| {
                // Of the calling thread, on Linux. Without it hashing is as good as other work.
                let _best_effort = setpriority_process(None, NICE);
            })
            .build()?;
        Ok(Hashers { threads, of_a_tenant: count / 2, lines: Mutex::default() })
    }

    async fn hash<T: Send + 'static>(
        &self,
        tenant: &TenantId,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, HashError> {
        let place = self.line_of(tenant).acquire_owned().await?;
        let worked = self.threads.spawn(async move {
            let worked = work();
            drop(place);
            worked
        });
        Ok(worked.await?)
    }

    fn line_of(&self, tenant: &TenantId) -> Arc<Semaphore> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(tenant).and_then(Weak::upgrade) {
            return line;
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(Semaphore::new(self.of_a_tenant));
        lines.insert(tenant.clone(), Arc::downgrade(&line));
        line
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn nothing_is_hashed_on_an_event_loop() {
        let acme = TenantId::parse("acme").unwrap();
        let name = hash(&acme, || thread::current().name().map(str::to_owned)).await.unwrap();
        assert_eq!(name.as_deref(), Some("pgsilo-hash"));
    }

    #[tokio::test]
    async fn one_tenant_cannot_occupy_all_hashing_threads() {
        let hashers: &'static Hashers = Box::leak(Box::new(Hashers::start().unwrap()));
        let (acme, globex) = ["acme", "globex"].map(|id| TenantId::parse(id).unwrap()).into();
        let (begun, begins) = mpsc::channel();
        let mut release = Vec::new();
        let works: Vec<_> = (0..4 * hashers.of_a_tenant)
            .map(|number| {
                let (go_on, goes_on) = mpsc::channel::<()>();
                release.push(go_on);
                let (begun, acme) = (begun.clone(), acme.clone());
                tokio::spawn(async move {
                    let work = move || {
                        begun.send(number).unwrap();
                        goes_on.recv().unwrap_err();
                    };
                    hashers.hash(&acme, work).await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        // As many as may have begun; none of them ends.
        let first: Vec<_> = begins.iter().take(hashers.of_a_tenant).collect();
        assert_eq!(first, (0..hashers.of_a_tenant).collect::<Vec<_>>());
        assert_eq!(hashers.hash(&globex, || 7).await.unwrap(), 7);
        assert!(begins.try_recv().is_err());
        drop(release);
        assert!(join_all(works).await.into_iter().all(|work| work.unwrap().is_ok()));
    }

    #[tokio::test]
    async fn a_panic_is_reported_and_releases_its_permit() {
        let acme = TenantId::parse("acme").unwrap();
        for _ in 0..64 {
            let broken: Result<(), HashError> = hash(&acme, || panic!("of a test")).await;
            assert!(matches!(broken, Err(HashError::Thread(_))), "{broken:?}");
        }
        assert_eq!(hash(&acme, || 7).await.unwrap(), 7);
    }
}
