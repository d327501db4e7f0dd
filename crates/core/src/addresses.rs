//! The addresses of a host, and which of them is connected to: Happy Eyeballs (RFC 8305). One that
//! does not answer must not take the time of those that would.
//!
//! [`race`] connects to nothing by itself: its caller says how. The HTTP clients connect by
//! themselves, to each family at the same time and one after the other within it; they take their
//! [`Addresses`] from here, in the order of what is known of them.

mod lookups;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustix::io::Errno;
use tokio::time::sleep;

use lookups::LookUps;

/// How long one address is tried before the next one is tried as well (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// A host's addresses, in the order in which they are to be tried.
///
/// # Errors
/// When the name does not resolve.
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    static LOOK_UPS: LazyLock<LookUps> = LazyLock::new(LookUps::default);
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let ask = |host: &str| Ok((host, 0).to_socket_addrs()?.collect());
    let mut found = LOOK_UPS.of(host, ask).await?;
    for address in &mut found {
        address.set_port(port);
    }
    match found.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
        false => Ok(interleaved(&found)),
    }
}

/// The families in turn, beginning with the one that the system puts first (RFC 8305, section 4);
/// each address once.
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

/// What has become of each address that was tried, for the log: `10.0.0.7:5432: Connection
/// refused`.
#[derive(Debug, Default)]
pub struct Attempts(Mutex<Vec<(SocketAddr, String)>>);

impl Attempts {
    fn set(&self, address: SocketAddr, what: &dyn fmt::Display) {
        let mut attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attempts.retain(|(other, _)| *other != address);
        attempts.push((address, what.to_string()));
    }
}

/// None of a host's addresses lets itself be connected to.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unreached {
    /// Whether this process or machine has no more to give, and nothing was asked of a server.
    pub is_ours: bool,
    /// It names each address.
    pub error: io::Error,
}

impl Unreached {
    fn of(failed: &[io::Error], attempts: &Attempts) -> Unreached {
        // Of local ports as well, which may be used up; but also where a family of addresses is
        // off, and then the other one's errors count.
        let is_ours = failed.iter().any(is_scarce)
            || !failed.is_empty() && failed.iter().all(|error| is(error, Errno::ADDRNOTAVAIL));
        let kind = failed.first().map_or(io::ErrorKind::NotFound, io::Error::kind);
        Unreached { is_ours, error: io::Error::new(kind, attempts.to_string()) }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}

/// Whether this process or machine has no more memory, descriptors or buffers to give.
pub fn is_scarce(error: &io::Error) -> bool {
    let scarce = [Errno::NOMEM, Errno::NFILE, Errno::MFILE, Errno::NOBUFS];
    scarce.into_iter().any(|errno| is(error, errno))
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

/// Connects to the first of the addresses that lets itself be connected to. Each gets a head start
/// of a quarter of a second before the next one, none after it has failed; the others are given up
/// when one is there. How long all of it may take is the caller's to say.
///
/// # Errors
/// When all have failed.
pub async fn race<T, F>(
    addresses: Vec<SocketAddr>,
    attempts: &Attempts,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, Unreached>
where
    F: Future<Output = io::Result<T>>,
{
    let mut waiting = addresses.into_iter();
    let mut running = FuturesUnordered::new();
    let mut failed = Vec::new();
    loop {
        match waiting.next() {
            Some(address) => {
                attempts.set(address, &"no answer");
                let connecting = connect(address);
                running.push(async move { (address, connecting.await) });
            }
            None if running.is_empty() => {
                return Err(Unreached::of(&failed, attempts));
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
                failed.push(error);
            }
            None => {}
        }
    }
}

/// Where the HTTP client of one server gets its addresses from: the one that served last comes
/// first, and last the one that failed last. So of a server with several addresses, one that is
/// gone costs a request or two, and not a part of each connection's time.
#[derive(Clone, Debug, Default)]
pub struct Addresses(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    served: Option<IpAddr>,
    failed: Option<IpAddr>,
    /// As they were tried last.
    newest: Vec<IpAddr>,
}

impl Addresses {
    /// An answer came, from there.
    pub fn served(&self, from: Option<SocketAddr>) {
        let mut record = self.record();
        if let Some(from) = from.map(|from| from.ip()) {
            record.served = Some(from);
            record.failed = record.failed.filter(|failed| *failed != from);
        }
    }

    /// None came. Those that were tried, for the log: nothing, or ` (at 10.0.0.7, 10.0.0.8)`.
    pub fn failed(&self) -> String {
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
    async fn a_slow_address_wins_over_silent_ones() {
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
        let Unreached { error, is_ours } = race(all, &attempts, dial).await.expect_err("refused");
        assert_eq!((error.kind(), is_ours), (io::ErrorKind::ConnectionRefused, false));
        let each = "10.0.0.2:1: connection refused, [::2]:1: connection refused";
        assert_eq!((attempts.to_string(), error.to_string()), (each.to_owned(), each.to_owned()));
        assert!(race(Vec::new(), &attempts, dial).await.is_err());
    }

    /// Whatever comes first: a machine whose IPv6 is off says EADDRNOTAVAIL at once.
    #[tokio::test(start_paused = true)]
    async fn the_kind_of_a_failure_follows_from_all_attempts() {
        let (refused, unreachable) = (Errno::CONNREFUSED, Errno::HOSTUNREACH);
        let unavailable = Errno::ADDRNOTAVAIL;
        let (memory, of_all, of_ours) = (Errno::NOMEM, Errno::NFILE, Errno::MFILE);
        let buffers = Errno::NOBUFS;
        for (errors, ours) in [
            (&[refused, unreachable][..], false),
            (&[unavailable, unreachable], false),
            (&[unreachable, unavailable], false),
            (&[unavailable, refused, unavailable], false),
            (&[unavailable], true),
            (&[unavailable, unavailable], true),
            (&[refused, of_ours], true),
            (&[of_ours, refused], true),
            (&[refused, of_all], true),
            (&[unavailable, memory], true),
            (&[buffers, refused, unavailable], true),
            (&[], false),
        ] {
            let all = (0..errors.len()).map(|port| SocketAddr::from(([10, 0, 0, 1], port as u16)));
            let dial = async |to: SocketAddr| -> io::Result<()> {
                Err(errors[usize::from(to.port())].into())
            };
            let attempts = Attempts::default();
            let failed = race(all.collect(), &attempts, dial).await.expect_err("none");
            assert_eq!(failed.is_ours, ours, "{errors:?}");
            for (port, code) in errors.iter().enumerate() {
                let each = format!("10.0.0.1:{port}: {}", io::Error::from(*code));
                assert!(failed.to_string().contains(&each), "{failed}");
            }
        }
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
