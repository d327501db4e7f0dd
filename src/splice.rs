//! The relay: bytes both ways between a client and its database, until one of them, or a
//! termination, ends it.
//!
//! It copies, and looks at frame headers while it does: where messages begin and end, what kind
//! they are, how many ReadyForQuery the client is owed, and the status in the newest one. It looks
//! at nothing else of a session's bytes. That is enough to end a session between two messages, to
//! cancel the query of a client that vanished, and to bound transactions. A stream that stops
//! looking like frames claims no boundary any more: it is still copied, but nothing is written into
//! it.
//!
//! All sessions of a core share one scratch buffer (64 KiB): a session holds memory only for what
//! its peer would not take yet, at most one buffer's worth, and reads no more until that is gone.
//!
//! It also bounds what a session may keep a transaction open for, whatever the session sends: a
//! bound in the database itself is the session's to lift. For that a session has one timer, set
//! when it begins something, looked at when it is due, and gone when it finds the session idle: so
//! a session that has done something holds it for as long as the shorter of the two bounds, with
//! the defaults an hour.
//!
//! # How a session ends
//!
//! - A side closes, or its connection breaks. A client's query that still runs is cancelled.
//! - The session was idle for too long, or in a transaction (`age.rs`).
//! - A termination: why it has to end, and by which deadline (`session/authority.rs`). An earlier
//!   deadline replaces a later one. From then on a session that is idle outside a transaction ends
//!   at a moment at which the client is probably not using it (`moment.rs`).
//!
//! When the time is up, a running query is cancelled and its answer relayed for at most 2 s. The
//! client is told at a message boundary, a little behind the last answer: libpq makes a notice of
//! an error that it reads together with one. The database gets a Terminate and a close. The lease
//! is dropped last, when nothing uses its credential any more (`session/resources.rs`).
//!
//! A client's own Terminate is kept from the database if the connection may serve another session
//! (`pool.rs`): everything is answered, outside a transaction, and nothing follows.

mod age;
mod conversation;
mod moment;
mod watch;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use metrics::Counter;
use pgsilo_core::clock::BootTime;
use pgsilo_core::limits::TimeLimits;
use pgsilo_wire::frame::{FrameCounter, Header};
use pgsilo_wire::message::TERMINATE;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::backend::Process;
use crate::ending::Ending;
use crate::frontend::Frontend;
use crate::metrics::Direction::{self, ToBackend, ToFrontend};
use crate::metrics::{Activity, BYTES};
use crate::stream::Stream;
use age::{Age, Phase, Verdict};
use conversation::{Action, Conversation};
use moment::{Moment, Notice, Quiet};
use watch::{Gone, Watch};

/// Bytes that are read at once: TLS records have 16 KiB, a COPY fills all of it.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Chunks moved in one turn: far below the runtime's budget, so that terminations, timers and
/// the other direction of a busy session get their turn.
const MAX_CHUNKS_PER_TURN: usize = 8;
/// How long a cancelled query may take to reach a message boundary.
const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Between an answer and a last message, so that a client reads them one after the other.
const LAST_MESSAGE_DELAY: Duration = Duration::from_millis(25);
/// How long a database may take to close after a Terminate.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into());
}

/// A session is to end: why, and how long a transaction may still run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Termination {
    pub(crate) ending: Ending,
    pub(crate) deadline: BootTime,
}

/// What a session is terminated by.
pub(crate) trait Terminator {
    /// Resolves when the session must end sooner than its current termination says.
    fn next_before(&self, current: Option<Termination>) -> impl Future<Output = Termination>;
}

/// A client and its database, spliced.
pub(crate) struct Relay<'c> {
    frontend: &'c mut Frontend,
    backend: &'c mut Stream,
    process: &'c Process,
    progress: &'c Progress,
    up: Pipe,
    down: Pipe,
    conversation: Conversation,
    /// The client has sent a Terminate and closed its half; it still gets the answers on their way.
    half_closed: bool,
    /// The same half is closed towards the database.
    shut: bool,
    /// The client has terminated and the database was not told: its connection can be reused.
    is_reusable: bool,
    /// Why the database could not be written to any more.
    write_error: Option<io::Error>,
    last_bytes: Instant,
    /// The silence since then was looked at, and is not long enough yet.
    is_judged: bool,
    limits: &'c TimeLimits,
    age: Age,
    watch: Watch,
}

/// One direction.
struct Pipe {
    counter: FrameCounter,
    /// What the sink has not taken yet.
    pending_write: Option<Box<PendingWrite>>,
    unflushed: bool,
    source: Source,
    /// The sink is gone: what the source still says is dropped.
    discards: bool,
    /// A client's Terminate is not forwarded: the connection may be reused by another session.
    intercepts_terminate: bool,
    terminate_intercepted: bool,
    /// Everything that the source had said has been read.
    caught_up: bool,
    bytes: &'static Counter,
}

/// A chunk that was written up to `sent`.
struct PendingWrite {
    chunk: Box<[u8]>,
    sent: usize,
}

enum Event {
    FrontendEnded(Option<io::Error>),
    BackendEnded(Option<io::Error>),
    /// The client's Terminate was intercepted.
    ClientTerminated,
    /// Idle outside a transaction, nothing in flight: it may be a moment to end.
    Quiet,
    Late,
    Terminate(Termination),
    /// The silence may have become long enough.
    Look,
    IdleCheck,
    /// The session is not idle any more, and no timer is set for that.
    Began,
    AgeCheck,
}

/// Why the relay has stopped; [`Relay::finish`] does the rest.
pub(crate) enum Stopped {
    AtOnce(End),
    FrontendEnded(Option<io::Error>),
    /// A termination is due, and the session idle.
    Quiet(Ending),
    /// Time is up, whatever the session does.
    Late(Ending),
}

enum Moved {
    SourceEnded(Option<io::Error>),
    SinkBroken(io::Error),
}

/// Whether a source may still say something.
enum Source {
    Open,
    /// It has closed, or its connection has broken.
    Ended(Option<io::Error>),
}

/// A session's progress, and its termination if there is one, read from outside. Only the relay
/// writes it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    to_backend: AtomicU64,
    to_frontend: AtomicU64,
    /// An index of [`Activity::ALL`].
    activity: AtomicUsize,
    termination: Mutex<Option<Termination>>,
}

impl Progress {
    /// Bytes that the client has sent, and that the database has.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.to_backend.load(Ordering::Relaxed), self.to_frontend.load(Ordering::Relaxed))
    }

    pub(crate) fn activity(&self) -> Activity {
        Activity::ALL.get(self.activity.load(Ordering::Relaxed)).copied().unwrap_or(Activity::Idle)
    }

    /// Why it will end, and by when, if it must.
    pub(crate) fn termination(&self) -> Option<Termination> {
        *self.termination.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_termination(&self, termination: Termination) {
        *self.termination.lock().unwrap_or_else(PoisonError::into_inner) = Some(termination);
    }
}

/// How a session has ended.
pub(crate) struct End {
    pub(crate) ending: Ending,
    /// What broke, where something did.
    pub(crate) cause: Option<Cause>,
}

/// What has broken a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    #[error(transparent)]
    Io(io::Error),
    #[error("closed without a word")]
    Closed,
}

impl From<Ending> for End {
    fn from(ending: Ending) -> End {
        End { ending, cause: None }
    }
}

impl<'c> Relay<'c> {
    /// With `intercepts_terminate`, a Terminate is not forwarded if the database owes no answer.
    /// The session's age is its authority's to limit; all other limits are checked here. A side
    /// that has answered nothing for `dead_peer_timeout` has ended.
    pub(crate) fn new(
        frontend: &'c mut Frontend,
        backend: &'c mut Stream,
        process: &'c Process,
        progress: &'c Progress,
        intercepts_terminate: bool,
        dead_peer_timeout: Duration,
        limits: &'c TimeLimits,
    ) -> Relay<'c> {
        let pipe = |direction: Direction, intercepts_terminate| Pipe {
            counter: FrameCounter::default(),
            pending_write: None,
            unflushed: false,
            source: Source::Open,
            discards: false,
            intercepts_terminate,
            terminate_intercepted: false,
            caught_up: true,
            bytes: BYTES.of(direction),
        };
        let (up, down) = (pipe(ToBackend, intercepts_terminate), pipe(ToFrontend, false));
        let last_bytes = Instant::now();
        Relay {
            frontend,
            backend,
            process,
            progress,
            up,
            down,
            conversation: Conversation::begin(),
            half_closed: false,
            shut: false,
            is_reusable: false,
            write_error: None,
            last_bytes,
            is_judged: false,
            limits,
            age: Age::begin(last_bytes),
            watch: Watch::new(dead_peer_timeout),
        }
    }

    /// Relays until either side has ended, a termination is due, or a limit was reached. What
    /// follows is not a part of it, which every idle session waits in.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds its arguments twice")]
    pub(crate) fn run(&mut self, terminator: &impl Terminator) -> impl Future<Output = Stopped> {
        async move {
            let mut termination = pin!(terminator.next_before(None));
            let mut notice: Option<Box<Notice>> = None;
            let mut late: Option<Pin<Box<_>>> = None;
            // When to look again whether the silence is long enough.
            let mut look: Option<Pin<Box<Sleep>>> = None;
            let mut idle = self.limits.idle.map(|timeout| Box::pin(sleep(timeout)));
            let mut due: Option<Pin<Box<Sleep>>> = None;
            loop {
                let is_set = due.is_some();
                let event = tokio::select! {
                    biased;
                    event = poll_fn(|cx| self.poll(cx, notice.is_some(), is_set)) => event,
                    termination = &mut termination => Event::Terminate(termination),
                    () = set(&mut late) => Event::Late,
                    () = set(&mut look) => Event::Look,
                    () = set(&mut idle) => Event::IdleCheck,
                    () = set(&mut due) => Event::AgeCheck,
                };
                match (event, notice.as_deref()) {
                    (Event::Terminate(newer), _) => {
                        self.progress.set_termination(newer);
                        notice = Some(Box::new(Notice::begin(newer)));
                        late = Some(Box::pin(newer.deadline.arrives()));
                        self.is_judged = false;
                        termination.set(terminator.next_before(Some(newer)));
                    }
                    (Event::FrontendEnded(None), _) if self.may_half_close() => self.half_close(),
                    (Event::FrontendEnded(broken), _) => return Stopped::FrontendEnded(broken),
                    (Event::BackendEnded(broken), _) => {
                        return Stopped::AtOnce(self.backend_ended(broken));
                    }
                    (Event::ClientTerminated, _) => {
                        self.is_reusable = self.can_tell() && self.up.is_empty();
                        return Stopped::AtOnce(Ending::ClientLeft.into());
                    }
                    (Event::Quiet, Some(notice)) => match notice.judge(self.quiet()) {
                        Moment::Now => return Stopped::Quiet(notice.termination().ending),
                        Moment::In(time) => {
                            look = Some(Box::pin(sleep(time)));
                            self.is_judged = true;
                        }
                    },
                    (Event::Look, _) => (look, self.is_judged) = (None, false),
                    (Event::Late, Some(notice)) => {
                        return Stopped::Late(notice.termination().ending);
                    }
                    (Event::IdleCheck, _) => match self.idle_until() {
                        Some(until) => idle = Some(Box::pin(sleep_until(until))),
                        None => return Stopped::AtOnce(Ending::IdleTimeout.into()),
                    },
                    (Event::Began | Event::AgeCheck, _) => match self.judge() {
                        Verdict::Rest => due = None,
                        Verdict::LookAt(at) => due = Some(Box::pin(sleep_until(at))),
                        Verdict::Over(ending) => return Stopped::Late(ending),
                    },
                    (Event::Quiet | Event::Late, None) => {}
                }
            }
        }
    }

    /// Ends the session: cancels what runs where time is up, tells the client how it has ended, and
    /// closes the database's connection. It comes once in a session and is large, so it is boxed
    /// by whoever calls it: an idle session is as large as the largest that it may become.
    pub(crate) async fn finish(
        &mut self,
        stopped: Stopped,
        session: impl std::fmt::Display,
    ) -> End {
        let end = match stopped {
            Stopped::AtOnce(end) => end,
            Stopped::FrontendEnded(broken) => self.frontend_ended(broken).await,
            Stopped::Quiet(ending) => {
                self.delay_last_message().await;
                ending.into()
            }
            // Neither what it still says nor what it was asked is worth anything.
            Stopped::Late(Ending::FailedOver) => Ending::FailedOver.into(),
            Stopped::Late(ending) => {
                self.interrupt().await;
                self.delay_last_message().await;
                ending.into()
            }
        };
        self.close(end.ending, session).await;
        end
    }

    async fn close(&mut self, ending: Ending, session: impl std::fmt::Display) {
        let message = ending.message(session).filter(|_| self.can_tell()).unwrap_or_default();
        let Relay { frontend, backend, up, conversation, process, is_reusable, .. } = self;
        let tell = async {
            if *is_reusable {
                // It has terminated and reads no more: the next session need not wait for it.
                let _best_effort = timeout(CLOSE_TIMEOUT, frontend.stream.shutdown()).await;
            } else {
                frontend.send_last(&message).await;
            }
        };
        let gone = matches!(ending, Ending::BackendLeft | Ending::BackendLost);
        let close_backend = async {
            if ending == Ending::FailedOver {
                // What the client has sent last is not passed on.
                if conversation.may_be_busy() {
                    let _best_effort = timeout(INTERRUPT_TIMEOUT, process.cancel()).await;
                }
            } else if !gone && !*is_reusable {
                let _best_effort =
                    timeout(CLOSE_TIMEOUT, terminate_backend(backend, up, conversation)).await;
            }
        };
        tokio::join!(tell, close_backend);
    }

    /// Until when the session may be idle without a word, if it is; `None`: until now.
    fn idle_until(&self) -> Option<Instant> {
        let now = Instant::now();
        let timeout = self.limits.idle.unwrap_or_default();
        let waits = !self.conversation.is_busy() && self.can_tell();
        let until = if waits { self.last_bytes } else { now } + timeout;
        (until > now).then_some(until)
    }

    /// Whether the session has been in the middle of something for too long.
    fn judge(&self) -> Verdict {
        // Outside a transaction the client cannot be waiting in one, whatever else is uncertain.
        let waits =
            !self.conversation.is_busy() && !self.conversation.is_outside() && self.can_tell();
        let phase = match (self.is_idle(), waits) {
            (true, _) => Phase::Idle,
            (false, true) => Phase::WaitingSince(self.last_bytes),
            (false, false) => Phase::Working,
        };
        self.age.judge(self.limits, phase, Instant::now())
    }

    /// Moves what can be moved, answers first. With `wants_quiet` a silence is told of, but not one
    /// that was judged.
    fn poll(&mut self, cx: &mut Context<'_>, wants_quiet: bool, is_set: bool) -> Poll<Event> {
        let was_idle = self.is_idle();
        let Relay {
            frontend, backend, up, down, conversation, half_closed, shut, write_error, ..
        } = self;
        let before = (up.counter.passed(), down.counter.passed());
        let event = SCRATCH.with_borrow_mut(|scratch| {
            let client = &mut frontend.stream;
            let answered =
                down.poll(cx, backend, client, scratch, |header| conversation.answer(header));
            match answered {
                Poll::Ready(Moved::SourceEnded(broken)) => {
                    return Poll::Ready(Event::BackendEnded(broken));
                }
                Poll::Ready(Moved::SinkBroken(error)) => {
                    return Poll::Ready(Event::FrontendEnded(Some(error)));
                }
                Poll::Pending => {}
            }
            if *half_closed {
                // Its failure shows as the database's end.
                *shut = *shut || Pin::new(&mut *backend).poll_shutdown(cx).is_ready();
                return Poll::Pending;
            }
            match up.poll(cx, client, backend, scratch, |header| conversation.ask(header)) {
                Poll::Ready(Moved::SourceEnded(broken)) => {
                    return Poll::Ready(Event::FrontendEnded(broken));
                }
                Poll::Ready(Moved::SinkBroken(error)) => {
                    // The database may still have said why; its own end will come.
                    *write_error = Some(error);
                    up.discards = true;
                    cx.waker().wake_by_ref();
                }
                // It may still have answers to read.
                Poll::Pending if up.terminate_intercepted && up.is_empty() && down.is_empty() => {
                    return Poll::Ready(Event::ClientTerminated);
                }
                Poll::Pending => {}
            }
            Poll::Pending
        });
        if before != (self.up.counter.passed(), self.down.counter.passed()) {
            self.last_bytes = Instant::now();
            self.is_judged = false;
            self.tell_progress();
            self.age.moved(self.last_bytes, was_idle, self.conversation.take_crossed());
            self.watch.begin(self.last_bytes);
        }
        self.age.read(self.last_bytes, self.down.is_empty(), self.down.caught_up);
        match event {
            Poll::Pending
                if let Poll::Ready(gone) =
                    self.watch.poll(cx, &self.frontend.stream, self.backend) =>
            {
                let error = Some(io::ErrorKind::TimedOut.into());
                Poll::Ready(match gone {
                    Gone::Frontend => Event::FrontendEnded(error),
                    Gone::Backend => Event::BackendEnded(error),
                })
            }
            Poll::Pending if wants_quiet && !self.is_judged && self.is_quiet() => {
                Poll::Ready(Event::Quiet)
            }
            Poll::Pending if !is_set && self.limits.bound_transactions() && !self.is_idle() => {
                Poll::Ready(Event::Began)
            }
            event => event,
        }
    }

    /// Whether the database's connection is free for another session: between two messages, outside
    /// a transaction, and not told that this one is over.
    pub(crate) fn is_reusable(&self) -> bool {
        self.is_reusable
    }

    fn is_quiet(&self) -> bool {
        !self.conversation.is_busy() && self.conversation.is_outside() && self.can_tell()
    }

    fn quiet(&self) -> Quiet {
        Quiet {
            silent: self.last_bytes.elapsed(),
            behind_transaction: self.conversation.is_behind_transaction(),
        }
    }

    /// Whether the database surely does and holds nothing for the session, but for what lasts as
    /// long as a session does. What the client has not taken yet holds the database up, too: an
    /// answer, or a notification, that stands for all later ones of the cluster.
    fn is_idle(&self) -> bool {
        !self.conversation.may_be_busy() && self.conversation.is_outside() && self.can_tell()
    }

    fn tell_progress(&self) {
        let Progress { to_backend, to_frontend, activity, .. } = self.progress;
        to_backend.store(self.up.counter.passed(), Ordering::Relaxed);
        to_frontend.store(self.down.counter.passed(), Ordering::Relaxed);
        let now = match (self.conversation.may_be_busy(), self.conversation.is_outside()) {
            (true, _) => Activity::Active,
            (false, true) => Activity::Idle,
            (false, false) => Activity::IdleInTransaction,
        };
        activity.store(now as usize, Ordering::Relaxed);
    }

    /// Whether a message of ours would stand between two messages of the database.
    fn can_tell(&self) -> bool {
        self.down.counter.at_boundary() && self.down.is_empty()
    }

    fn may_half_close(&self) -> bool {
        matches!(self.up.source, Source::Ended(_))
            && self.conversation.terminated
            && !self.half_closed
    }

    /// Passes the client's close on. The database answers what it was asked, then closes.
    fn half_close(&mut self) {
        self.half_closed = true;
    }

    /// The client has closed without a Terminate, or its connection has broken.
    async fn frontend_ended(&mut self, broken: Option<io::Error>) -> End {
        if self.conversation.may_be_busy()
            && !self.conversation.terminated
            && let Err(error) = self.process.cancel().await
        {
            tracing::warn!(%error, "cannot cancel the query of a client that vanished");
        }
        // A client that has terminated may reset its connection.
        match broken.filter(|_| !self.conversation.terminated) {
            Some(error) => End { ending: Ending::ClientLost, cause: Some(Cause::Io(error)) },
            None => Ending::ClientLeft.into(),
        }
    }

    fn backend_ended(&mut self, broken: Option<io::Error>) -> End {
        if self.conversation.terminated {
            Ending::ClientLeft.into()
        } else if self.conversation.last_was_error && self.down.counter.at_boundary() {
            Ending::BackendLeft.into()
        } else {
            let broken = broken.or(self.write_error.take());
            let cause = broken.map_or(Cause::Closed, Cause::Io);
            End { ending: Ending::BackendLost, cause: Some(cause) }
        }
    }

    /// libpq takes an error that it reads together with an answer for a notice, and then knows only
    /// that the connection is gone. So the last message comes a little behind an answer: what the
    /// client asks meanwhile is not read any more, and the message is what it gets for it. Source:
    /// `pqParseInput3` in `fe-protocol3.c`.
    async fn delay_last_message(&self) {
        sleep_until(self.last_bytes + LAST_MESSAGE_DELAY).await;
    }

    /// Time is up: cancels what runs and relays answers, with bounded patience, up to a place
    /// where the client can be told.
    async fn interrupt(&mut self) {
        let process = self.process;
        let busy = self.conversation.may_be_busy();
        let cancel = async {
            if busy && process.cancel().await.is_err() {
                tracing::warn!("cannot cancel the query of a session that has to end");
            }
        };
        let drain = poll_fn(|cx| {
            let Relay { frontend, backend, down, conversation, .. } = &mut *self;
            let moved = SCRATCH.with_borrow_mut(|scratch| {
                let client = &mut frontend.stream;
                down.poll(cx, backend, client, scratch, |header| conversation.answer(header))
            });
            self.last_bytes = Instant::now();
            self.tell_progress();
            let told = self.can_tell() && self.conversation.owed == 0;
            if moved.is_ready() || told { Poll::Ready(()) } else { Poll::Pending }
        });
        let _bounded = timeout(INTERRUPT_TIMEOUT, async { tokio::join!(cancel, drain) }).await;
    }
}

/// Closes the database's connection: what the client sent last, a Terminate, and a close.
async fn terminate_backend(
    backend: &mut Stream,
    up: &mut Pipe,
    conversation: &Conversation,
) -> io::Result<()> {
    poll_fn(|cx| up.poll_pending_write(cx, backend)).await?;
    if up.counter.at_boundary() && (up.terminate_intercepted || !conversation.terminated) {
        backend.write_all(&TERMINATE).await?;
    }
    backend.shutdown().await
}

impl Pipe {
    /// Moves bytes until neither side can go on, or it is another's turn. Returns only when a side
    /// has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        scratch: &mut [u8],
        mut seen: impl FnMut(Header) -> Action,
    ) -> Poll<Moved> {
        for _ in 0..MAX_CHUNKS_PER_TURN {
            if let Err(error) = ready!(self.poll_pending_write(cx, sink)) {
                return Poll::Ready(Moved::SinkBroken(error));
            }
            if self.terminate_intercepted {
                // Nothing follows a Terminate.
                return self.poll_flush(cx, sink);
            }
            if let Source::Ended(broken) = &mut self.source {
                return Poll::Ready(Moved::SourceEnded(broken.take()));
            }
            let mut read = ReadBuf::new(scratch);
            match Pin::new(&mut *source).poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
                Poll::Ready(read) => {
                    self.source = Source::Ended(read.err().filter(|error| !is_close(error)));
                    continue;
                }
                Poll::Pending => {
                    self.caught_up = true;
                    return self.poll_flush(cx, sink);
                }
            }
            let mut chunk = read.filled();
            let mut newest = Action::Forward;
            self.counter.count(chunk, |header| newest = seen(header));
            self.bytes.increment(chunk.len() as u64);
            if self.intercepts_terminate
                && newest == Action::Intercept
                && self.counter.just_ended(TERMINATE)
            {
                // All of it is in this chunk, or its beginning has gone already.
                self.terminate_intercepted = chunk.len() >= TERMINATE.len();
                chunk = chunk.strip_suffix(&TERMINATE).unwrap_or(chunk);
            }
            if let Err(error) = self.poll_chunk(cx, sink, chunk) {
                return Poll::Ready(Moved::SinkBroken(error));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what the sink takes of a chunk and keeps the rest.
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Stream,
        mut chunk: &[u8],
    ) -> io::Result<()> {
        while !chunk.is_empty() && !self.discards {
            match Pin::new(&mut *sink).poll_write(cx, chunk) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => {
                    chunk = &chunk[n..];
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.pending_write =
                        Some(Box::new(PendingWrite { chunk: chunk.into(), sent: 0 }));
                    self.caught_up = false;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes the rest of an earlier chunk, and frees its memory.
    fn poll_pending_write(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Stream,
    ) -> Poll<io::Result<()>> {
        while let Some(PendingWrite { chunk, sent }) = self.pending_write.as_deref_mut()
            && *sent < chunk.len()
            && !self.discards
        {
            match ready!(Pin::new(&mut *sink).poll_write(cx, &chunk[*sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => *sent += n,
            }
            self.unflushed = true;
        }
        self.pending_write = None;
        Poll::Ready(Ok(()))
    }

    /// Only TLS has something to flush.
    fn poll_flush(&mut self, cx: &mut Context<'_>, sink: &mut Stream) -> Poll<Moved> {
        if self.unflushed && !self.discards {
            match ready!(Pin::new(sink).poll_flush(cx)) {
                Ok(()) => self.unflushed = false,
                Err(error) => return Poll::Ready(Moved::SinkBroken(error)),
            }
        }
        Poll::Pending
    }

    fn is_empty(&self) -> bool {
        self.pending_write.is_none()
    }
}

/// TLS that was not closed as it should be: who closes at once does without.
fn is_close(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
}

/// Waits for a future; for ever if there is none.
fn set<F: Future<Output = ()> + Unpin>(future: &mut Option<F>) -> impl Future<Output = ()> {
    poll_fn(|cx| match future {
        Some(future) => Pin::new(future).poll(cx),
        None => Poll::Pending,
    })
}

#[cfg(test)]
mod tests;
