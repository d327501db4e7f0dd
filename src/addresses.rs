//! The addresses of a host, and which of them is connected to: Happy Eyeballs (RFC 8305). One that does
//! not answer must not take the time of those that would.
//!
//! [`race`] connects to nothing by itself: whoever may dial says how. The HTTP clients connect by
//! themselves, to each family at the same time and one after the other within it; they take their
//! [`Addresses`] from here, in the order of what is known of them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::net::lookup_host;
use tokio::time::sleep;

/// How long one address is tried before the next one is tried as well (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// A host's addresses, in the order in which they are to be tried.
///
/// # Errors
/// When the name does not resolve.
pub(crate) async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let found: Vec<_> = lookup_host((host, port)).await?.collect();
    match found.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
        false => Ok(interleaved(&found)),
    }
}

/// The families in turn, beginning with the one that the system puts first (RFC 8305, section 4); each
/// address once.
fn interleaved(found: &[SocketAddr]) -> Vec<SocketAddr> {
    let first = found.first().is_some_and(SocketAddr::is_ipv6);
    let (preferred, other): (Vec<_>, Vec<_>) =
        found.iter().partition(|address| address.is_ipv6() == first);
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    let mut all: Vec<SocketAddr> = Vec::with_capacity(found.len());
    loop {
        let pair = [preferred.next(), other.next()];
        if pair == [None, None] {
            return all;
        }
        for address in pair.into_iter().flatten() {
            if !all.contains(&address) {
                all.push(address);
            }
        }
    }
}

/// What has become of each address that was tried, for the log: `10.0.0.7:5432: Connection refused`.
#[derive(Debug, Default)]
pub(crate) struct Attempts(Mutex<Vec<(SocketAddr, String)>>);

impl Attempts {
    fn set(&self, address: SocketAddr, what: &dyn fmt::Display) {
        let mut attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attempts.retain(|(other, _)| *other != address);
        attempts.push((address, what.to_string()));
    }
}

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if attempts.is_empty() {
            return f.write_str("its name was not resolved");
        }
        for (number, (address, what)) in attempts.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{address}: {what}")?;
        }
        Ok(())
    }
}

/// Connects to the first of the addresses that lets itself be connected to. Each gets a head start of
/// [`STAGGER`] before the next one, none after it has failed; the others are given up when one is there.
/// How long all of it may take is the caller's to say.
///
/// # Errors
/// When all have failed: the first one's error. The rest is in `attempts`.
pub(crate) async fn race<T, F>(
    addresses: Vec<SocketAddr>,
    attempts: &Attempts,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let mut waiting = addresses.into_iter();
    let mut running = FuturesUnordered::new();
    let mut failed = None;
    loop {
        match waiting.next() {
            Some(address) => {
                attempts.set(address, &"no answer");
                let connecting = connect(address);
                running.push(async move { (address, connecting.await) });
            }
            None if running.is_empty() => {
                return Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()));
            }
            None => {}
        }
        let is_last = waiting.as_slice().is_empty();
        let ended = tokio::select! {
            ended = running.next() => ended,
            () = sleep(STAGGER), if !is_last => None,
        };
        match ended {
            Some((address, Ok(connected))) => {
                attempts.set(address, &"connected");
                return Ok(connected);
            }
            Some((address, Err(error))) => {
                attempts.set(address, &error);
                failed.get_or_insert(error);
            }
            None => {}
        }
    }
}

/// Where the HTTP client of one server gets its addresses from: the one that served last comes first, and
/// last the one that failed last. So of a server with several addresses, one that is gone costs a
/// request or two, and not a part of each connection's time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    served: Option<IpAddr>,
    failed: Option<IpAddr>,
    /// As they were tried last.
    newest: Vec<IpAddr>,
}

impl Addresses {
    /// An answer came, from there.
    pub(crate) fn served(&self, from: Option<SocketAddr>) {
        let mut record = self.record();
        if let Some(from) = from.map(|from| from.ip()) {
            record.served = Some(from);
            record.failed = record.failed.filter(|failed| *failed != from);
        }
    }

    /// None came. Those that were tried, for the log: nothing, or ` (at 10.0.0.7, 10.0.0.8)`.
    pub(crate) fn failed(&self) -> String {
        let mut record = self.record();
        let first = record.newest.first().copied();
        record.failed = record.served.take().or(first);
        let tried: Vec<_> = record.newest.iter().map(IpAddr::to_string).collect();
        if tried.is_empty() { String::new() } else { format!(" (at {})", tried.join(", ")) }
    }

    fn order(&self, found: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let mut record = self.record();
        let mut found = found;
        found.sort_by_key(|address| match Some(address.ip()) {
            ip if ip == record.served => 0,
            ip if ip == record.failed => 2,
            _ => 1,
        });
        record.newest = found.iter().map(SocketAddr::ip).collect();
        found
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolve for Addresses {
    fn resolve(&self, name: Name) -> Resolving {
        let addresses = self.clone();
        Box::pin(async move {
            // The client puts the port in.
            let found = addresses.order(resolve(name.as_str(), 0).await?);
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::Instant;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().copied().map(address).collect()
    }

    #[test]
    fn families_take_turns() {
        let found = addresses(&["[::1]:1", "[::2]:1", "[::1]:1", "10.0.0.1:1", "[::3]:1"]);
        let expected = addresses(&["[::1]:1", "10.0.0.1:1", "[::2]:1", "[::3]:1"]);
        assert_eq!(interleaved(&found), expected);
        assert_eq!(interleaved(&[]), []);
    }

    /// Each host does as its last byte says: 1 is silent, 3 is there, the others refuse.
    async fn dial(to: SocketAddr) -> io::Result<SocketAddr> {
        match to.ip().to_canonical() {
            IpAddr::V4(v4) if v4.octets()[3] == 3 => Ok(to),
            IpAddr::V4(v4) if v4.octets()[3] == 1 => pending().await,
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_addresses_take_a_quarter_of_a_second_each_and_those_that_refuse_none() {
        for (all, expected) in [
            (&["10.0.0.3:1"][..], 0),
            (&["10.0.0.1:1", "10.0.0.3:1"], 250),
            (&["10.0.0.1:1", "10.1.0.1:1", "10.2.0.1:1", "10.0.0.3:1"], 750),
            (&["10.0.0.2:1", "10.1.0.2:1", "10.0.0.3:1"], 0),
        ] {
            let (began, attempts) = (Instant::now(), Attempts::default());
            let connected = race(addresses(all), &attempts, dial).await.expect("connected");
            assert_eq!(connected, address("10.0.0.3:1"));
            assert_eq!(began.elapsed(), Duration::from_millis(expected), "{all:?}: {attempts}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_answers_late_still_wins_over_those_that_never_do() {
        let dial = async |to: SocketAddr| match to.port() {
            1 => {
                sleep(Duration::from_secs(2)).await;
                Ok(to)
            }
            _ => pending().await,
        };
        let attempts = Attempts::default();
        let all = addresses(&["10.0.0.1:1", "10.0.0.2:2"]);
        let dialled = race(all, &attempts, dial).await;
        assert_eq!(dialled.expect("connected"), address("10.0.0.1:1"));
        assert_eq!(attempts.to_string(), "10.0.0.2:2: no answer, 10.0.0.1:1: connected");
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_refuse_the_cause_names_each() {
        let attempts = Attempts::default();
        assert_eq!(attempts.to_string(), "its name was not resolved");
        let all = addresses(&["10.0.0.2:1", "[::2]:1"]);
        let error = race(all, &attempts, dial).await.expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let each = "10.0.0.2:1: connection refused, [::2]:1: connection refused";
        assert_eq!(attempts.to_string(), each);
        assert!(race(Vec::new(), &attempts, dial).await.is_err());
    }

    #[test]
    fn the_address_that_served_comes_first_and_the_one_that_failed_last() {
        let all = || addresses(&["10.0.0.1:0", "10.0.0.2:0", "10.0.0.3:0"]);
        let known = Addresses::default();
        let order = || known.order(all()).iter().map(|a| a.ip().to_string()).collect::<String>();
        assert_eq!(known.failed(), "");
        assert_eq!(order(), "10.0.0.110.0.0.210.0.0.3");
        known.served(Some(address("10.0.0.2:443")));
        assert_eq!(order(), "10.0.0.210.0.0.110.0.0.3");
        assert_eq!(known.failed(), " (at 10.0.0.2, 10.0.0.1, 10.0.0.3)");
        assert_eq!(order(), "10.0.0.110.0.0.310.0.0.2");
        // That one does not answer either, and it is not known for having served.
        assert_eq!(known.failed(), " (at 10.0.0.1, 10.0.0.3, 10.0.0.2)");
        assert_eq!(order(), "10.0.0.210.0.0.310.0.0.1");
        known.served(Some(address("10.0.0.1:443")));
        assert_eq!(order(), "10.0.0.110.0.0.210.0.0.3");
    }
}
