//! The ways to ask a sandbox to stop: SIGINT, SIGTERM, SIGHUP, or the end of standard input.

use std::io::Read;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Listens from the first moment on, so that a stop during the start is heard too.
#[derive(Debug)]
pub(super) struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Answers at the end of standard input; never when that does not matter.
    eof: oneshot::Receiver<()>,
    /// Keeps `eof` unanswered when nothing is read.
    _silent: Option<oneshot::Sender<()>>,
}

impl Stop {
    pub(super) fn listen(until_eof: bool) -> Result<Self> {
        let listen = |kind| signal(kind).context("listening to signals");
        let (tell, eof) = oneshot::channel();
        let silent = if until_eof {
            // A thread of its own: nothing can interrupt a read of standard input.
            std::thread::spawn(move || {
                let mut scratch = [0; 512];
                while std::io::stdin().read(&mut scratch).is_ok_and(|count| count > 0) {}
                let _ = tell.send(());
            });
            None
        } else {
            Some(tell)
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            eof,
            _silent: silent,
        })
    }

    /// Waits until somebody asks, once.
    pub(super) async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
            _ = &mut self.eof => {}
        }
    }

    /// Waits for a Ctrl-C: after `asked`, somebody is out of patience.
    pub(super) async fn asked_again(&mut self) {
        self.interrupt.recv().await;
    }
}
