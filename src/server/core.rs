//! The event loops: one thread a core, each with a single-threaded runtime of its own.
//!
//! An accepted socket goes to the core that has the fewest connections and stays there, so a relay
//! shares nothing with another core. `/livez` asks each loop for a sign of life: one that is stuck
//! is not hidden by those that turn (`admin.rs`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::listen::Arrival;
use crate::session;

/// All event loops.
#[derive(Debug)]
pub(super) struct Cores(Vec<Core>);

#[derive(Debug)]
struct Core {
    arrivals: mpsc::UnboundedSender<Arrival>,
    connections: Arc<AtomicUsize>,
    turns: Handle,
    thread: thread::JoinHandle<()>,
}

/// A connection of a core, counted until it ends, however it ends.
struct Counted(Arc<AtomicUsize>);

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
        let least = self.0.iter().min_by_key(|core| core.connections.load(Ordering::Relaxed));
        if let Some(core) = least {
            core.connections.fetch_add(1, Ordering::Relaxed);
            // A core's loop ends only with the process.
            let _gone = core.arrivals.send(arrival);
        }
    }
}

impl Core {
    fn start(number: usize) -> io::Result<Core> {
        let (arrivals, mut queue) = mpsc::unbounded_channel::<Arrival>();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let turns = runtime.handle().clone();
        let thread =
            thread::Builder::new().name(format!("pgsilo-core-{number}")).spawn(move || {
                runtime.block_on(async move {
                    while let Some(arrival) = queue.recv().await {
                        let counted = Counted(Arc::clone(&count));
                        let Some((client, eviction, permits)) = arrival.open() else { continue };
                        tokio::spawn(async move {
                            session::serve(client, eviction).await;
                            drop((permits, counted));
                        });
                    }
                });
                // Sessions that still run are dropped here; a file that is never read to its end is
                // not waited for.
                runtime.shutdown_background();
            })?;
        Ok(Core { arrivals, connections, turns, thread })
    }
}
