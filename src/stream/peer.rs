//! Whether the other end of a TCP connection is still there.
//!
//! No socket option says that. Where bytes are unacknowledged Linux sends no keepalives, and gives
//! up after a quarter of an hour, or after TCP_USER_TIMEOUT. But that counts a window that stays
//! closed as well: a reader that pauses would be lost with those that are gone, although its
//! machine answers every probe. So TCP_USER_TIMEOUT is set to `dead_peer_timeout`. While a peer
//! owes acknowledgements, the relay asks the kernel (sock_diag, as `ss` does) when it last
//! answered, eight times in that time, and puts TCP_USER_TIMEOUT off for one that does
//! ([`Peer::look`]). A connection that owes nothing is left to keepalives. Source:
//! `tcp_keepalive_timer`, `tcp_probe_timer` and `tcp_write_timeout` in the kernel's
//! `net/ipv4/tcp_timer.c`.
//!
//! Called by who accepts or dials ([`tune`]), and by the relay.

use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Stream;
use super::diag::{self, Known};

/// How long a client may pause in its reading.
const MAX_PAUSE: Duration = Duration::from_secs(30 * 60);
/// Probes or repetitions without an answer, for a peer to be taken for gone: one may be lost.
const UNANSWERED: u8 = 2;
/// Keepalive probes that may stay unanswered, where TCP_USER_TIMEOUT does not say it.
const KEEPALIVE_RETRIES: u32 = 6;
/// The kernel counts these in seconds, and from one on.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// Whether the kernel can be asked, found out at the start. Where it cannot, a peer that is idle is
/// noticed in time all the same, by keepalives, and one that bytes are on their way to when the
/// kernel gives up.
static CAN_BE_ASKED: LazyLock<bool> = LazyLock::new(|| {
    let answer = diag::ask(([127, 0, 0, 1], 0).into(), ([127, 0, 0, 1], 0).into());
    let works = answer.inspect_err(|error| {
        tracing::warn!(
            %error,
            "the kernel cannot be asked about TCP connections (AF_NETLINK, NETLINK_SOCK_DIAG): a peer that \
             vanishes with bytes on their way to it is noticed after a quarter of an hour"
        );
    });
    works.is_ok()
});

/// Finds out whether the kernel can be asked about connections, and warns if not.
pub(crate) fn check_kernel() {
    LazyLock::force(&CAN_BE_ASKED);
}

/// Sets what every TCP connection has, on either side: no delay for small messages, and notice of a
/// peer that has answered nothing for `dead_peer_timeout`.
///
/// # Errors
/// Those of `setsockopt(2)`.
pub(crate) fn tune(tcp: &TcpStream, dead_peer_timeout: Duration) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time((dead_peer_timeout / 2).max(SHORTEST_INTERVAL))
        .with_interval((dead_peer_timeout / (2 * KEEPALIVE_RETRIES)).max(SHORTEST_INTERVAL))
        .with_retries(KEEPALIVE_RETRIES);
    let socket = SockRef::from(tcp);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(CAN_BE_ASKED.then_some(dead_peer_timeout))
}

/// A peer that was sent something, from then until it has acknowledged all of it.
#[derive(Debug)]
pub(crate) struct Peer {
    /// It owed no acknowledgement then.
    since: Instant,
    /// When it was last seen to have taken something.
    moved: Instant,
    acknowledged: Option<u64>,
    /// How long it may take nothing although it answers.
    max_pause: Option<Duration>,
}

/// What a look has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It has acknowledged everything; from here on the kernel's keepalives will do.
    Settled,
    /// It has not: look again.
    Owes,
    /// It answers nothing, or takes nothing for longer than a client may pause.
    Gone,
}

impl Peer {
    /// A client that is written to now.
    pub(crate) fn frontend(now: Instant) -> Peer {
        Peer::new(now, Some(MAX_PAUSE))
    }

    /// A database that is written to now. It reads nothing while it works, for as long as that
    /// takes.
    pub(crate) fn backend(now: Instant) -> Peer {
        Peer::new(now, None)
    }

    fn new(now: Instant, max_pause: Option<Duration>) -> Peer {
        Peer { since: now, moved: now, acknowledged: None, max_pause }
    }

    /// How often to look at a connection that owes something.
    pub(crate) fn interval(dead_peer_timeout: Duration) -> Duration {
        dead_peer_timeout / 8
    }

    /// Looks, and puts the kernel's end of the connection off until well behind the next look; but
    /// not far behind it, since the kernel asks a peer with a closed window more and more rarely,
    /// down to once in two minutes, and once more just before that end.
    pub(crate) fn look(&mut self, stream: &Stream, dead_peer_timeout: Duration) -> Look {
        let Some(tcp) = stream.tcp() else { return Look::Settled };
        let known = match ask(tcp) {
            Ok(Some(known)) => known,
            // It has ended, which shows when it is read from.
            Ok(None) => return Look::Settled,
            // For want of memory, perhaps: the next look may be answered.
            Err(_) if *CAN_BE_ASKED => return Look::Owes,
            Err(_) => return Look::Settled,
        };
        let now = Instant::now();
        let (look, end) = self.judge(known, dead_peer_timeout, now);
        // That fails on a connection only that has ended, which shows when it is read from.
        let _ended = SockRef::from(tcp).set_tcp_user_timeout(Some(end));
        look
    }

    fn judge(
        &mut self,
        known: Known,
        dead_peer_timeout: Duration,
        now: Instant,
    ) -> (Look, Duration) {
        if !known.owes {
            *self = Peer::new(now, self.max_pause);
            return (Look::Settled, dead_peer_timeout);
        }
        if self.acknowledged.replace(known.acknowledged) != Some(known.acknowledged) {
            self.moved = now;
        }
        let is_silent = known.silent >= dead_peer_timeout && known.unanswered >= UNANSWERED;
        // The kernel counts from some time behind `since`, even if something was taken meanwhile.
        let end = now - self.since + 3 * Peer::interval(dead_peer_timeout);
        let is_over = self.max_pause.is_some_and(|max_pause| now - self.moved >= max_pause);
        match is_silent || is_over {
            true => (Look::Gone, dead_peer_timeout),
            false => (Look::Owes, end.max(dead_peer_timeout)),
        }
    }
}

fn ask(tcp: &TcpStream) -> io::Result<Option<Known>> {
    diag::ask(tcp.local_addr()?, tcp.peer_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: Duration = Duration::from_secs(120);

    fn owes(acknowledged: u64, silent: u64, unanswered: u8) -> Known {
        Known { owes: true, acknowledged, silent: Duration::from_secs(silent), unanswered }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_paused_reader_is_tolerated_for_half_an_hour_while_it_answers() {
        let began = Instant::now();
        let mut peer = Peer::frontend(began);
        for at in (15..1800).step_by(15) {
            let (look, end) = peer.judge(owes(7, at % 60, (at % 2) as u8), D, began + seconds(at));
            assert_eq!(look, Look::Owes, "{at}");
            // Behind the next look, and close to it.
            assert_eq!(end, D.max(seconds(at + 45)), "{at}");
        }
        // It was first looked at after 15 s.
        let last = peer.judge(owes(7, 1, 0), D, began + seconds(1815));
        assert_eq!(last.0, Look::Gone);
    }

    #[test]
    fn a_database_that_works_may_read_nothing_for_as_long_as_that_takes() {
        let began = Instant::now();
        let mut peer = Peer::backend(began);
        for at in (15..100_000).step_by(15) {
            let (look, _) = peer.judge(owes(7, at % 120, (at % 2) as u8), D, began + seconds(at));
            assert_eq!(look, Look::Owes, "{at}");
        }
        assert_eq!(peer.judge(owes(7, 120, 2), D, began + seconds(100_000)).0, Look::Gone);
    }

    #[test]
    fn a_slow_reader_is_tolerated_while_it_makes_progress() {
        let began = Instant::now();
        let mut peer = Peer::frontend(began);
        for at in (15..10_000).step_by(15) {
            let (look, _) = peer.judge(owes(at / 900, 1, 0), D, began + seconds(at));
            assert_eq!(look, Look::Owes, "{at}");
        }
    }

    #[test]
    fn a_silent_peer_is_gone_in_time_but_one_lost_answer_is_tolerated() {
        let began = Instant::now();
        let mut peer = Peer::frontend(began);
        assert_eq!(peer.judge(owes(7, 119, 9), D, began + seconds(15)).0, Look::Owes);
        assert_eq!(peer.judge(owes(7, 120, 1), D, began + seconds(30)).0, Look::Owes);
        assert_eq!(peer.judge(owes(7, 120, 2), D, began + seconds(30)).0, Look::Gone);
    }

    #[test]
    fn a_peer_that_acknowledged_everything_is_left_to_keepalives() {
        let began = Instant::now();
        let mut peer = Peer::frontend(began);
        assert_eq!(peer.judge(owes(7, 1, 0), D, began + seconds(600)).1, seconds(645));
        let settled = Known { owes: false, ..owes(9, 600, 0) };
        assert_eq!(peer.judge(settled, D, began + seconds(615)), (Look::Settled, D));
        assert_eq!(peer.judge(owes(9, 1, 0), D, began + seconds(630)).1, D);
    }
}
