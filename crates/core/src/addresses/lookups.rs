//! Names looked up, one look-up of a host at a time, which all who ask for it share.
//!
//! getaddrinfo(3) takes as long as the name's servers let it, and a thread meanwhile: nobody who
//! gives up waiting ends it. Those threads are the ones that files are read on, and a tenant's host
//! may be in a zone of its own. So the next look-up of a host begins when the one before has
//! returned, and a host has one thread at most. Called by `addresses.rs`.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

type Found = Result<Vec<SocketAddr>, Arc<io::Error>>;

/// The look-ups that are under way, by host.
#[derive(Debug, Default)]
pub(super) struct LookUps(Mutex<HashMap<String, watch::Receiver<Option<Found>>>>);

/// One of them, until it has returned.
struct UnderWay {
    all: &'static LookUps,
    host: String,
    found: watch::Sender<Option<Found>>,
}

impl LookUps {
    /// What `ask` finds of a host: this call's, or that of an earlier one that has no answer yet.
    ///
    /// # Errors
    /// Those of `ask`.
    pub(super) async fn of(
        &'static self,
        host: &str,
        ask: impl FnOnce(&str) -> io::Result<Vec<SocketAddr>> + Send + 'static,
    ) -> io::Result<Vec<SocketAddr>> {
        let mut answer = self.join(host, ask);
        match answer.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Ok(found))) => Ok(found.clone()),
            Ok(Some(Err(error))) => Err(match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(error.kind(), error.to_string()),
            }),
            Ok(None) | Err(_) => Err(io::Error::other("the look-up was given up")),
        }
    }

    fn join(
        &'static self,
        host: &str,
        ask: impl FnOnce(&str) -> io::Result<Vec<SocketAddr>> + Send + 'static,
    ) -> watch::Receiver<Option<Found>> {
        let mut under_way = self.under_way();
        if let Some(answer) = under_way.get(host) {
            return answer.clone();
        }
        let (found, answer) = watch::channel(None);
        under_way.insert(host.to_owned(), answer.clone());
        // Where the runtime is going down, what is spawned is dropped at once.
        drop(under_way);
        let begun = UnderWay { all: self, host: host.to_owned(), found };
        tokio::task::spawn_blocking(move || {
            let found = ask(&begun.host).map_err(Arc::new);
            begun.found.send_replace(Some(found));
        });
        answer
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Option<Found>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.all.under_way().remove(&self.host);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures_util::future::join_all;
    use rustix::io::Errno;
    use tokio::time::{Duration, timeout};

    use super::*;

    fn at(last: u8) -> Vec<SocketAddr> {
        vec![SocketAddr::from(([10, 0, 0, last], 0))]
    }

    fn look_ups() -> &'static LookUps {
        Box::leak(Box::default())
    }

    #[tokio::test]
    async fn concurrent_lookups_of_a_host_share_one_query() {
        let all = look_ups();
        let (begun, begins) = mpsc::channel();
        let (answer, answers) = mpsc::channel::<()>();
        let slow = {
            let begun = begun.clone();
            move |_: &str| {
                begun.send("slow").unwrap();
                answers.recv().unwrap_err();
                Ok(at(1))
            }
        };
        // It is given up before it is answered: nothing has been polled for long enough.
        timeout(Duration::ZERO, all.of("slow", slow)).await.unwrap_err();
        assert_eq!(begins.recv().unwrap(), "slow");
        let another = |host: &'static str, last| {
            let begun = begun.clone();
            all.of(host, move |_: &str| {
                begun.send(host).unwrap();
                Ok(at(last))
            })
        };
        for _ in 0..3 {
            timeout(Duration::ZERO, another("slow", 2)).await.unwrap_err();
        }
        // Others have nothing of that.
        assert_eq!(another("fast", 3).await.unwrap(), at(3));
        assert_eq!(begins.recv().unwrap(), "fast");
        let waiting = join_all((0..3).map(|_| another("slow", 2)));
        let (found, ()) = tokio::join!(waiting, async { drop(answer) });
        assert!(found.into_iter().all(|found| found.unwrap() == at(1)));
        assert!(begins.try_recv().is_err());
        // The one that has returned is not the next one's.
        while all.under_way().contains_key("slow") {
            tokio::task::yield_now().await;
        }
        assert_eq!(another("slow", 2).await.unwrap(), at(2));
    }

    #[tokio::test]
    async fn failures_and_panics_of_a_lookup_reach_all_waiters() {
        let all = look_ups();
        for (ask, kind, code) in [
            (
                (|_| Err(io::ErrorKind::NotFound.into())) as fn(&str) -> _,
                io::ErrorKind::NotFound,
                None,
            ),
            (
                |_| Err(Errno::CONNREFUSED.into()),
                io::ErrorKind::ConnectionRefused,
                Some(Errno::CONNREFUSED.raw_os_error()),
            ),
            (|_| panic!("of a test"), io::ErrorKind::Other, None),
        ] {
            for error in join_all([all.of("host", ask), all.of("host", ask)]).await {
                let error = error.unwrap_err();
                assert_eq!((error.kind(), error.raw_os_error()), (kind, code));
            }
            while !all.under_way().is_empty() {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(all.of("host", |_| Ok(at(1))).await.unwrap(), at(1));
    }
}
