//! What the tests stand on: the sandbox, a pgsilo under test, raw clients, tokens.

pub(crate) mod acme;
pub(crate) mod agent;
pub(crate) mod authority;
pub(crate) mod bao;
pub(crate) mod certificates;
pub(crate) mod driver;
pub(crate) mod fake;
pub(crate) mod gateway;
pub(crate) mod issuer;
pub(crate) mod mint;
pub(crate) mod pool;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod slow;
pub(crate) mod ways;
pub(crate) mod world;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};

/// The longest that anything is waited for. Nothing takes this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The machine at this end of a connection vanishes: whatever arrives is dropped before TCP sees it,
/// so nothing is answered, and nobody is told. Of a listening socket: it answers no one.
pub(crate) fn vanish(socket: &impl AsFd) {
    // BPF_RET | BPF_K: not a byte of it.
    let nothing = [SockFilter::new(0x06, 0, 0, 0)];
    SockRef::from(socket).attach_filter(&nothing).expect("attached");
}

/// Asks again until there is an answer; for what can only be asked, not awaited.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
