//! What tests and benchmarks stand on: the sandbox, a pgsilo under test, raw clients, tokens.

#![expect(
    clippy::expect_used,
    clippy::needless_pass_by_value,
    clippy::new_without_default,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_debug_implementations,
    missing_docs,
    reason = "a test fails by panicking and says why, and so does what tests stand on"
)]

pub mod acme;
pub mod agent;
pub mod authority;
pub mod bao;
pub mod certificates;
pub mod driver;
pub mod fake;
pub mod gateway;
pub mod issuer;
pub mod mint;
pub mod passwords;
pub mod pool;
pub mod programs;
pub mod proxy;
pub mod raw;
pub mod slow;
pub mod standby;
pub mod ways;
pub mod world;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};

/// The longest that anything is waited for. Nothing takes this long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The machine at this end of a connection vanishes: whatever arrives is dropped before TCP sees
/// it, so nothing is answered, and no peer is told. Of a listening socket: it accepts none.
pub fn vanish(socket: &impl AsFd) {
    // BPF_RET | BPF_K: not a byte of it.
    let nothing = [SockFilter::new(0x06, 0, 0, 0)];
    SockRef::from(socket).attach_filter(&nothing).expect("attached");
}

/// Asks again until there is an answer; for what can only be asked, not awaited.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "no sign of {what} within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
