//! The event loops: one thread a core, each with a single-threaded runtime of its own.
//!
//! An accepted socket goes to the core that has the fewest connections and stays there, so a relay
//! shares nothing with another core. `/livez` asks each loop for a sign of life: one that is stuck
//! is not hidden by those that turn (`admin.rs`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use futures_util::FutureExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::listen::{Arrival, ConnectionPermits};
use crate::limits::Eviction;
use crate::session::{self, Client};

/// All event loops.
#[derive(Debug)]
pub(super) struct Cores(Vec<Core>);

#[derive(Debug)]
struct Core {
    arrivals: mpsc::UnboundedSender<(Arrival, Counted)>,
    connections: Arc<AtomicUsize>,
    turns: Handle,
    thread: thread::JoinHandle<()>,
}

/// A connection of a core, counted until it ends, however it ends.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn among(connections: &Arc<AtomicUsize>) -> Counted {
        connections.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(connections))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Cores {
    /// Starts `count` threads.
    pub(super) fn start(count: usize) -> io::Result<Cores> {
        (0..count).map(Core::start).collect::<io::Result<_>>().map(Cores)
    }

    /// The loops, in their order, to see that each still turns.
    pub(super) fn loops(&self) -> Vec<Handle> {
        self.0.iter().map(|core| core.turns.clone()).collect()
    }

    /// Stops every loop. Sessions that still run are dropped, which gives their leases back.
    pub(super) fn stop(self) {
        for Core { arrivals, thread, .. } in self.0 {
            drop(arrivals);
            let _panicked = thread.join();
        }
    }

    /// Hands a connection to the core that has the fewest. The queue needs no bound of its own:
    /// every arrival holds a permit.
    pub(super) fn hand_over(&self, arrival: Arrival) {
        if let Some(core) = self.least() {
            let counted = Counted::among(&core.connections);
            // A core's loop ends only with the process.
            let _gone = core.arrivals.send((arrival, counted));
        }
    }

    fn least(&self) -> Option<&Core> {
        self.0.iter().min_by_key(|core| core.connections.load(Ordering::Relaxed))
    }
}

impl Core {
    fn start(number: usize) -> io::Result<Core> {
        let (arrivals, mut queue) = mpsc::unbounded_channel::<(Arrival, Counted)>();
        let connections = Arc::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let turns = runtime.handle().clone();
        let thread =
            thread::Builder::new().name(format!("pgsilo-core-{number}")).spawn(move || {
                runtime.block_on(async move {
                    while let Some((arrival, counted)) = queue.recv().await {
                        let Some((client, eviction, permits)) = arrival.open() else { continue };
                        tokio::spawn(serve(client, eviction, permits, counted));
                    }
                });
                // Sessions that still run are dropped here; a file that is never read to its end is
                // not waited for.
                runtime.shutdown_background();
            })?;
        Ok(Core { arrivals, connections, turns, thread })
    }
}

/// Serves a connection. What it holds goes last: a stop waits for it. An async block would hold it
/// twice.
fn serve(
    client: Box<Client>,
    eviction: Option<Eviction>,
    permits: ConnectionPermits,
    counted: Counted,
) -> impl Future<Output = ()> + Send {
    session::serve(client, eviction).map(|()| drop((permits, counted)))
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn each_loop_has_its_thread_and_drops_its_tasks_when_stopped() {
        let cores = Cores::start(3).expect("started");
        let (told, name) = std::sync::mpsc::channel();
        let mut left = Vec::new();
        for turns in cores.loops() {
            let (holds, held) = oneshot::channel::<()>();
            left.push(held);
            let told = told.clone();
            turns.spawn(async move {
                let name = thread::current().name().map(str::to_owned);
                told.send(name).expect("awaited");
                // As a session does that nobody ends.
                std::future::pending::<()>().await;
                drop(holds);
            });
        }
        let names = (0..3).map(|_| name.recv().expect("it turns").expect("a name"));
        let mut names: Vec<_> = names.collect();
        names.sort();
        assert_eq!(names, ["pgsilo-core-0", "pgsilo-core-1", "pgsilo-core-2"]);
        cores.stop();
        for mut held in left {
            assert_eq!(held.try_recv(), Err(oneshot::error::TryRecvError::Closed), "dropped");
        }
    }

    /// What each session holds for as long as it lives, most of them idle. The runtime adds 96 bytes
    /// and rounds up to a multiple of 128.
    #[test]
    fn a_task_is_small() {
        fn size_of_answer<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let size = size_of_answer(serve);
        assert!(size <= 1056, "{size} bytes");
    }

    #[test]
    fn a_connection_goes_to_the_loop_with_the_fewest() {
        let cores = Cores::start(3).expect("started");
        let another = || Counted::among(&cores.least().expect("three").connections);
        let mut all: Vec<_> = (0..8).map(|_| another()).collect();
        let counts = || {
            cores.0.iter().map(|core| core.connections.load(Ordering::Relaxed)).collect::<Vec<_>>()
        };
        assert_eq!(counts(), [3, 3, 2]);
        // However they end: here with the first loop.
        let first = Arc::clone(&cores.0[0].connections);
        all.retain(|Counted(of)| !Arc::ptr_eq(of, &first));
        assert_eq!(counts(), [0, 3, 2]);
        all.extend((0..2).map(|_| another()));
        assert_eq!(counts(), [2, 3, 2]);
        cores.stop();
    }
}
