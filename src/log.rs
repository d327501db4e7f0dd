//! The queue between all writers of log lines and the one thread that writes them out.
//!
//! Nothing waits for the log: a reader that has stopped must not stop a session, a login or the end
//! of the process, which waits a second for it at most. So a line is put into a bounded queue and
//! written by a thread of its own, which alone may block. Lines of the log and events of the audit
//! trail keep their order, and each kind has a bound of its own, so that neither displaces the
//! other. What finds no room, or cannot be written, is lost: it is counted, and the log tells of it
//! as soon as it can be written again. The program makes the one queue and gives it standard error;
//! the lines come from `tracing`.

mod failures;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

pub(crate) use failures::Failures;

/// When what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// When a destination that takes nothing now (`O_NONBLOCK`, set by who shares it) is tried again.
const BUSY: Duration = Duration::from_millis(10);

/// The target of the audit trail's events.
pub const AUDIT: &str = "pgsilo::audit";

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A line for operators.
    Log,
    /// An event of the audit trail.
    Audit,
}

impl Kind {
    pub(crate) const ALL: &[Kind] = &[Kind::Log, Kind::Audit];

    /// The `kind` label of `pgsilo_log_lost_total`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Kind::Log => "log",
            Kind::Audit => "audit",
        }
    }
}

/// How many bytes of each kind may wait to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Of the log.
    pub log: usize,
    /// Of the audit trail.
    pub audit: usize,
}

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSettings {
    /// For whom.
    pub format: LogFormat,
    /// How much.
    pub level: tracing::Level,
    /// Bytes of lines that may wait to be written; more are lost.
    pub queue_bytes: usize,
}

/// For whom the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Machines: one JSON object a line.
    Json,
    /// People.
    Human,
}

/// The lines that wait to be written. Cheap to clone.
#[derive(Clone)]
pub struct LogQueue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// A line has come.
    filled: Condvar,
    /// All lines were written, and what was lost has been told.
    emptied: Condvar,
}

struct State {
    lines: VecDeque<Line>,
    log: Share,
    audit: Share,
    /// Its lines tell of losses: they always have room.
    writer: Option<ThreadId>,
}

struct Line {
    kind: Kind,
    bytes: Box<[u8]>,
    /// How many lost lines it tells of.
    tells_of: u64,
}

/// What is known of one kind of lines.
struct Share {
    bound: usize,
    /// Bytes that are not written yet, those of the line that is being written among them.
    waiting: usize,
    /// Lines, since the start.
    lost: u64,
    /// Of those, how many no line tells of.
    untold: u64,
    /// How many a line is to tell of that is not written yet.
    telling: u64,
    /// That line waits to be written.
    is_telling: bool,
    /// The last one could not be written.
    fails: bool,
    /// See [`LogQueue::audit_keeps_up`].
    behind: bool,
}

impl LogQueue {
    /// Starts the thread that writes. `tell` is called on it when lines of a kind were lost and the
    /// next may be written: it must log how many, as a line of that kind.
    ///
    /// # Errors
    /// When the system refuses the thread.
    pub fn start(
        out: impl Write + Send + 'static,
        bounds: Bounds,
        tell: impl Fn(Kind, u64) + Send + 'static,
    ) -> io::Result<LogQueue> {
        let queue = LogQueue::new(bounds);
        let own = queue.clone();
        let mut out = Out { out, is_cut: false };
        thread::Builder::new().name("pgsilo-log".to_owned()).spawn(move || {
            own.lock().writer = Some(thread::current().id());
            loop {
                let tries_again = own.write_all_of(&mut out);
                own.tell_of_losses(tries_again, &tell);
            }
        })?;
        Ok(queue)
    }

    fn new(bounds: Bounds) -> LogQueue {
        let state = State {
            lines: VecDeque::new(),
            log: Share::new(bounds.log),
            audit: Share::new(bounds.audit),
            writer: None,
        };
        let (filled, emptied) = (Condvar::new(), Condvar::new());
        LogQueue(Arc::new(Shared { state: Mutex::new(state), filled, emptied }))
    }

    /// Where lines of a kind are written to: each `write` is one whole line. It never waits.
    pub fn lines(&self, kind: Kind) -> Lines {
        Lines { queue: self.clone(), kind }
    }

    /// Waits until everything is written, what was lost has been told, and not longer than
    /// `patience`.
    pub fn close(&self, patience: Duration) {
        let waits = |state: &mut State| !state.is_done();
        let state = self.lock();
        let _late = self.0.emptied.wait_timeout_while(state, patience, waits);
    }

    /// Lines of a kind that were lost since the start.
    pub(crate) fn lost(&self, kind: Kind) -> u64 {
        self.lock().share(kind).lost
    }

    /// Whether the audit trail is written as fast as events come. It is not from the moment at
    /// which three quarters of its bound are taken or an event was lost, until no more than half of
    /// it is taken and an event that tells of the losses was written.
    pub(crate) fn audit_keeps_up(&self) -> bool {
        !self.lock().audit.behind
    }

    fn push(&self, kind: Kind, bytes: &[u8]) {
        // Copied before the lock is taken, which all event loops share.
        let line: Box<[u8]> = bytes.into();
        let mut state = self.lock();
        let from_writer = state.writer == Some(thread::current().id());
        let share = state.share(kind);
        if share.waiting + bytes.len() > share.bound && !from_writer {
            return share.lose();
        }
        share.waiting += bytes.len();
        share.behind |= share.waiting > share.bound / 4 * 3;
        // Only `tell` speaks on that thread.
        let tells_of = if from_writer && !share.is_telling { share.telling } else { 0 };
        share.is_telling |= tells_of > 0;
        state.lines.push_back(Line { kind, bytes: line, tells_of });
        drop(state);
        self.0.filled.notify_one();
    }

    /// Writes what waits, or waits for it. Whether nothing came, for so long that a destination
    /// which took nothing is worth another try.
    fn write_all_of(&self, out: &mut Out<impl Write>) -> bool {
        let state = self.lock();
        let empty = |state: &mut State| state.lines.is_empty();
        let mut state = match state.log.untold + state.audit.untold {
            0 => self.0.filled.wait_while(state, empty).unwrap_or_else(PoisonError::into_inner),
            _ => {
                let waited = self.0.filled.wait_timeout_while(state, RETRY, empty);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        let lines = std::mem::take(&mut state.lines);
        drop(state);
        let tries_again = lines.is_empty();
        for line in lines {
            let written = out.write_line(&line.bytes).is_ok();
            let mut state = self.lock();
            state.share(line.kind).done(&line, written);
            if state.is_done() {
                self.0.emptied.notify_all();
            }
        }
        tries_again
    }

    fn tell_of_losses(&self, tries_again: bool, tell: &impl Fn(Kind, u64)) {
        for kind in [Kind::Log, Kind::Audit] {
            let telling = match self.lock().share(kind) {
                share if share.is_telling || (share.fails && !tries_again) => 0,
                share => {
                    share.telling = std::mem::take(&mut share.untold);
                    share.telling
                }
            };
            if telling > 0 {
                tell(kind, telling);
                self.lock().share(kind).check_telling();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells of lost lines, as a line of the same kind; for [`LogQueue::start`].
pub fn tell_of_losses(kind: Kind, lost: u64) {
    match kind {
        Kind::Log => {
            tracing::error!(lost, "lines of the log were lost: they were not read in time");
        }
        Kind::Audit => {
            tracing::error!(target: AUDIT, event = "events_lost", lost, "audit events were lost");
        }
    }
}

impl fmt::Debug for LogQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogQueue")
    }
}

impl State {
    /// Whether nothing is left to be written.
    fn is_done(&self) -> bool {
        let left = |share: &Share| share.waiting > 0 || share.untold + share.telling > 0;
        !left(&self.log) && !left(&self.audit)
    }

    fn share(&mut self, kind: Kind) -> &mut Share {
        match kind {
            Kind::Log => &mut self.log,
            Kind::Audit => &mut self.audit,
        }
    }
}

impl Share {
    fn new(bound: usize) -> Share {
        Share {
            bound,
            waiting: 0,
            lost: 0,
            untold: 0,
            telling: 0,
            is_telling: false,
            fails: false,
            behind: false,
        }
    }

    fn lose(&mut self) {
        self.lost += 1;
        self.untold += 1;
        self.behind = true;
    }

    /// If it was not logged after all, it is not reported.
    fn check_telling(&mut self) {
        if !self.is_telling {
            self.untold += std::mem::take(&mut self.telling);
        }
    }

    fn done(&mut self, line: &Line, written: bool) {
        self.waiting -= line.bytes.len();
        self.fails = !written;
        match (line.tells_of, written) {
            (0, true) => {}
            (0, false) => self.lose(),
            (_, true) => (self.telling, self.is_telling) = (0, false),
            (_, false) => {
                self.is_telling = false;
                self.check_telling();
            }
        }
        if self.waiting <= self.bound / 2 && self.untold + self.telling == 0 {
            self.behind = false;
        }
    }
}

/// Writes lines of one kind; see [`LogQueue::lines`].
#[derive(Debug)]
pub struct Lines {
    queue: LogQueue,
    kind: Kind,
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(self.kind, &pgsilo_core::text::escaped(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The destination, and whether the last line stopped in its middle.
struct Out<W> {
    out: W,
    is_cut: bool,
}

impl<W: Write> Out<W> {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_cut {
            self.write_bytes(b"\n")?;
            self.is_cut = false;
        }
        self.write_bytes(line)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "it runs on the thread that writes the log, and on no other"
    )]
    fn write_bytes(&mut self, mut rest: &[u8]) -> io::Result<()> {
        let all = rest.len();
        while !rest.is_empty() {
            let error = match self.out.write(rest) {
                Ok(0) => ErrorKind::WriteZero.into(),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    continue;
                }
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => thread::sleep(BUSY),
                _ => {
                    self.is_cut |= rest.len() < all;
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;

    const BOUNDS: Bounds = Bounds { log: 64, audit: 64 };

    /// A reader that reads when it is told to; `false` breaks the pipe for one write.
    struct Pipe {
        allowed: Receiver<bool>,
        read: Sender<String>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.allowed.recv() {
                Ok(true) => {}
                _ => return Err(ErrorKind::BrokenPipe.into()),
            }
            let _gone = self.read.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start() -> (LogQueue, Sender<bool>, Receiver<String>) {
        start_telling(|| ())
    }

    /// The same; before it tells of a loss it does that.
    fn start_telling(
        before: impl Fn() + Send + 'static,
    ) -> (LogQueue, Sender<bool>, Receiver<String>) {
        let ((allow, allowed), (read, lines)) = (channel(), channel());
        let (give, given) = channel::<LogQueue>();
        let own = Mutex::new((given, None::<LogQueue>));
        let tell = move |kind, lost| {
            before();
            let mut own = own.lock().expect("not poisoned");
            if own.1.is_none() {
                own.1 = own.0.recv().ok();
            }
            let queue = own.1.as_ref().expect("given");
            push(queue, kind, &format!("{kind:?} lost {lost}\n"));
        };
        let queue = LogQueue::start(Pipe { allowed, read }, BOUNDS, tell).expect("started");
        give.send(queue.clone()).expect("taken");
        (queue, allow, lines)
    }

    fn push(queue: &LogQueue, kind: Kind, line: &str) {
        queue.lines(kind).write_all(line.as_bytes()).expect("never fails");
    }

    #[test]
    fn each_kind_has_its_own_bound_and_what_was_lost_is_told_when_it_can_be() {
        let (queue, allow, lines) = start();
        for n in 0..10 {
            push(&queue, Kind::Log, &format!("log line {n:06}\n"));
        }
        // Of 16 bytes each, four fit.
        assert_eq!((queue.lost(Kind::Log), queue.lost(Kind::Audit)), (6, 0));
        assert!(queue.audit_keeps_up());
        for n in 0..5 {
            push(&queue, Kind::Audit, &format!("an event {n:06}\n"));
        }
        assert_eq!(queue.lost(Kind::Audit), 1);
        assert!(!queue.audit_keeps_up());
        for _ in 0..8 {
            allow.send(true).expect("it writes");
        }
        let written: Vec<_> = (0..8).map(|_| lines.recv().expect("a line")).collect();
        assert_eq!(written[0], "log line 000000\n");
        assert_eq!(written[4..], (0..4).map(|n| format!("an event {n:06}\n")).collect::<Vec<_>>());
        assert!(!queue.audit_keeps_up(), "nothing has told of the loss");
        for told in ["Log lost 6\n", "Audit lost 1\n"] {
            allow.send(true).expect("it writes");
            assert_eq!(lines.recv().expect("a line"), told);
        }
        queue.close(Duration::from_secs(30));
        assert!(queue.audit_keeps_up());
    }

    #[test]
    fn a_line_that_cannot_be_written_is_lost_and_told_of_by_itself() {
        let (queue, allow, lines) = start();
        push(&queue, Kind::Audit, "never read\n");
        // The event, and the first that tells of it.
        allow.send(false).expect("it writes");
        allow.send(false).expect("it writes");
        allow.send(true).expect("it writes");
        assert_eq!(lines.recv().expect("a line"), "Audit lost 1\n");
        queue.close(Duration::from_secs(30));
        assert_eq!(queue.lost(Kind::Audit), 1);
        assert!(queue.audit_keeps_up());
    }

    #[test]
    fn the_audit_is_behind_before_anything_is_lost() {
        let (queue, allow, lines) = start();
        push(&queue, Kind::Audit, &"x".repeat(48));
        assert!(queue.audit_keeps_up(), "three quarters");
        push(&queue, Kind::Audit, "y");
        assert!(!queue.audit_keeps_up());
        allow.send(true).expect("it writes");
        assert_eq!(lines.recv().expect("a line").len(), 48);
        allow.send(true).expect("it writes");
        lines.recv().expect("a line");
        queue.close(Duration::from_secs(30));
        assert!(queue.audit_keeps_up());
        assert_eq!(queue.lost(Kind::Audit), 0);
    }

    #[test]
    fn closing_does_not_wait_for_a_reader_that_has_stopped() {
        let (queue, _allow, _lines) = start();
        push(&queue, Kind::Log, "never read\n");
        queue.close(Duration::from_millis(1));
    }

    #[test]
    fn closing_waits_until_losses_are_told() {
        let (begin, begun) = channel();
        let (queue, allow, lines) = start_telling(move || begun.recv().expect("released"));
        for n in 0..10 {
            push(&queue, Kind::Log, &format!("log line {n:06}\n"));
        }
        for _ in 0..5 {
            allow.send(true).expect("it writes");
        }
        let patience = Duration::from_millis(50);
        let began = Instant::now();
        queue.close(patience);
        assert!(began.elapsed() >= patience, "nothing has told of the loss");
        begin.send(()).expect("awaited");
        queue.close(Duration::from_secs(30));
        // The telling may begin before all of them are written: they came in two portions then.
        let written: Vec<_> = lines.try_iter().collect();
        assert_eq!(written.len(), 5, "four fit, and one tells: {written:?}");
        assert_eq!(written[4], "Log lost 6\n");
    }

    #[test]
    fn control_characters_in_log_lines_are_escaped() {
        let (queue, allow, lines) = start();
        push(&queue, Kind::Audit, "{\"cause\":\"a\u{202e}b é\"}\n");
        allow.send(true).expect("it writes");
        assert_eq!(lines.recv().expect("a line"), "{\"cause\":\"a\\u202eb é\"}\n");
    }

    #[test]
    fn a_line_that_was_cut_off_is_ended_before_the_next_one() {
        struct Full {
            room: usize,
            taken: Vec<u8>,
        }
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let fits = self.room.min(bytes.len());
                if fits == 0 {
                    return Err(ErrorKind::StorageFull.into());
                }
                self.room -= fits;
                self.taken.extend_from_slice(&bytes[..fits]);
                Ok(fits)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut out = Out { out: Full { room: 4, taken: Vec::new() }, is_cut: false };
        out.write_line(b"first\n").expect_err("no room");
        out.write_line(b"second\n").expect_err("no room");
        out.out.room = 100;
        out.write_line(b"third\n").expect("room");
        assert_eq!(out.out.taken, b"firs\nthird\n");
    }
}
