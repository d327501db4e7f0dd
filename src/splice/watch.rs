//! Looks at whether a session's two peers still take what they are sent, as [`Peer`] has it: from
//! the first bytes on until all are acknowledged. A session that is idle is not looked at, has no
//! timer for it and no memory; the kernel's keepalives look after it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::stream::{Look, Peer, Stream};

/// What is looked at, if anything is.
pub(super) struct Watch {
    dead_peer_timeout: Duration,
    next: Option<Box<Next>>,
}

struct Next {
    timer: Pin<Box<Sleep>>,
    frontend: Peer,
    backend: Peer,
}

/// Which of the two is gone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Gone {
    Frontend,
    Backend,
}

impl Watch {
    pub(super) fn new(dead_peer_timeout: Duration) -> Watch {
        Watch { dead_peer_timeout, next: None }
    }

    /// Something was written to one of the two.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.next.is_none() {
            let timer = Box::pin(sleep(Peer::interval(self.dead_peer_timeout)));
            let (frontend, backend) = (Peer::frontend(now), Peer::backend(now));
            self.next = Some(Box::new(Next { timer, frontend, backend }));
        }
    }

    /// Looks when it is time to. Resolves when one of the two is gone.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        frontend: &Stream,
        backend: &Stream,
    ) -> Poll<Gone> {
        while let Some(next) = &mut self.next {
            std::task::ready!(next.timer.as_mut().poll(cx));
            let looks = (
                next.frontend.look(frontend, self.dead_peer_timeout),
                next.backend.look(backend, self.dead_peer_timeout),
            );
            match looks {
                (Look::Gone, _) => return Poll::Ready(Gone::Frontend),
                (_, Look::Gone) => return Poll::Ready(Gone::Backend),
                (Look::Settled, Look::Settled) => self.next = None,
                _ => {
                    let again = Instant::now() + Peer::interval(self.dead_peer_timeout);
                    next.timer.as_mut().reset(again);
                }
            }
        }
        Poll::Pending
    }
}
