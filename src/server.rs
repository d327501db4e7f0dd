//! Listeners and event loops: accepts connections, hands each to a core, and stops in order.
//!
//! Each core runs one single-threaded runtime; a connection lives on one core from its accept to
//! its ending (`core.rs`). Accepting, OpenBAO, signals, files that change (`watched_files.rs`) and
//! the HTTP endpoints have a runtime of their own, so that slow work never holds up a relay.
//!
//! # Stopping
//!
//! At SIGTERM or SIGINT:
//!
//! 1. Listeners go on accepting, to refuse with 57P03 before a token is asked for: so clients try
//!    their next host, and health checks see it.
//! 2. The pool is closed. Sessions end when they have been idle outside a transaction for a second;
//!    after `drain_timeout` those that are left are ended.
//! 3. The listeners close, and the files of Unix sockets go.
//! 4. pgsilo gives up its own logins: one request for each, with which OpenBAO revokes every lease
//!    that is left. A login that came from a token file is left to its owner, and its leases are
//!    revoked one by one; so are those of session authority.
//!
//! A second signal cuts the waiting short: sessions that still run are dropped, their leases
//! revoked.

mod core;
mod listen;
mod watched_files;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use self::core::Cores;
use crate::admin;
use crate::config::Opened;
use crate::log::LogQueue;
use crate::proxy::Proxy;
use crate::stream;

pub use listen::ListenError;

/// How long a stopping pgsilo waits for OpenBAO to take the last leases back.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// The same after a second signal.
const HURRIED: Duration = Duration::from_millis(600);
/// What a drained session may take beyond the drain's end to be told and closed.
const LAST_WORDS: Duration = Duration::from_secs(8);

/// Why pgsilo could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket could not be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refused a thread, a signal handler, ...
    #[error("cannot start: {0}")]
    Start(String),
}

/// The control runtime, before there is anything to control. From here on no signal ends the
/// process by itself: one that comes while the configuration is read is heeded once pgsilo serves.
#[derive(Debug)]
pub struct Control {
    runtime: Runtime,
    signals: Signals,
}

impl Control {
    /// The first thing to do.
    ///
    /// # Errors
    /// When the system refuses a thread or a signal handler.
    pub fn start() -> Result<Control, ServeError> {
        let failed = |error: std::io::Error| ServeError::Start(error.to_string());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("pgsilo-control")
            .enable_all()
            .build()
            .map_err(failed)?;
        let signals = {
            let _entered = runtime.enter();
            Signals::new().map_err(failed)?
        };
        Ok(Control { runtime, signals })
    }

    /// Serves until SIGTERM or SIGINT has come and every session has ended. `log` is where
    /// `tracing` puts the lines of this process.
    ///
    /// # Errors
    /// When a listener cannot be bound or the process cannot be set up; not later.
    pub fn serve(self, opened: Opened, log: LogQueue) -> Result<(), ServeError> {
        let result = self.runtime.block_on(run(opened, log, self.signals));
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        result
    }
}

async fn run(opened: Opened, log: LogQueue, mut signals: Signals) -> Result<(), ServeError> {
    let failed = |error: std::io::Error| ServeError::Start(error.to_string());
    let metrics = admin::metrics::install().map_err(ServeError::Start)?;
    let Opened { sources, settings, openbao, admin, cores, .. } = opened;
    let tenants = sources.registry.snapshot().len();
    let bound = listen::bind_all(&sources.listeners, settings.limits.max_handshakes)?;
    let admin = match admin {
        Some(address) => Some(listen::bind_admin(address).await?),
        None => None,
    };
    stream::check_kernel();
    tokio::spawn(admin::metrics::tidy(metrics.clone()));
    let runtime = tokio::runtime::Handle::current();
    let proxy = Proxy::start(settings, openbao, sources, runtime, log);
    let (hangups, hung_up) = watch::channel(0);
    watched_files::watch(proxy, &hung_up);
    let tasks = TaskTracker::new();
    let loops = Arc::new(Cores::start(cores).map_err(failed)?);
    if let Some(admin) = admin {
        tracing::info!(admin = %admin.local_addr().map_err(failed)?, "serving metrics and health");
        tokio::spawn(admin::serve(admin, metrics, proxy, loops.loops()));
    }
    let mut accepting = Vec::new();
    let places = proxy.sources.listeners.iter().zip(&proxy.handshakes);
    for (bound, (listener, handshakes)) in bound.into_iter().zip(places) {
        tracing::info!(listener = %bound.name(), "listening");
        let loops = Arc::clone(&loops);
        let accept = bound.accept_all(listener, proxy, handshakes, loops, tasks.clone());
        accepting.push(tokio::spawn(accept));
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), tenants, cores, "pgsilo serves");

    signals.serve(hangups).await;
    let hurried = drain(proxy, &tasks, &mut signals).await;
    for accept in accepting {
        accept.abort();
        let _aborted = accept.await;
    }
    if let Some(loops) = Arc::into_inner(loops) {
        let _stopped = tokio::task::spawn_blocking(|| loops.stop()).await;
    }
    proxy.cancel_keys.tell();
    close(proxy, hurried, &mut signals).await;
    tracing::info!("stopped");
    Ok(())
}

/// Ends every session: the idle after a second of silence, transactions within the time they have.
/// Connections that still come are told that pgsilo is shutting down. A second signal cuts it
/// short: whether one came.
async fn drain(proxy: &'static Proxy, tasks: &TaskTracker, signals: &mut Signals) -> bool {
    let patience = proxy.limits().drain_timeout;
    let (connections, busy) = (tasks.len(), proxy.sessions.census().busy());
    tracing::info!(patience_seconds = patience.as_secs(), connections, busy, "draining");
    proxy.drain(patience);
    tasks.close();
    let hurried = tokio::select! {
        () = tasks.wait() => return false,
        () = tokio::time::sleep(patience + LAST_WORDS) => false,
        () = signals.stop() => true,
    };
    let (connections, busy) = (tasks.len(), proxy.sessions.census().busy());
    tracing::warn!(connections, busy, "stopping with connections open");
    hurried
}

/// Gives back what is left, databases' connections first. A second signal leaves it little time for
/// that, whenever it comes.
async fn close(proxy: &'static Proxy, hurried: bool, signals: &mut Signals) {
    proxy.stop_following().await;
    let give_back = async |patience| {
        proxy.pool.closed(patience).await;
        proxy.lessor.close(patience).await;
    };
    if !hurried {
        tokio::select! {
            () = give_back(CLOSE_PATIENCE) => return,
            () = signals.stop() => {}
        }
    }
    give_back(HURRIED).await;
}

#[derive(Debug)]
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Has files read again at each SIGHUP; returns when it is time to stop.
    async fn serve(&mut self, hangups: watch::Sender<u64>) {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => {
                    hangups.send_modify(|count| *count += 1);
                }
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
            }
        }
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
