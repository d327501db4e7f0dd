//! A login at OpenBAO: a token, and the knowledge of when it ends.
//!
//! Leases die with the token that asked for them. So each lease holds its login, a login is
//! renewed for as long as anything holds it, and its end, once it is final, is the end of
//! every session under it: announced ahead, never a surprise.

use std::sync::{Arc, Weak};
use std::time::Duration;

use pgsilo_core::backoff::Backoff;
use pgsilo_core::clock::BootTime;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Error, Token};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, watch};

use super::precedence::WaitingRenewal;
use super::server::{Server, retry_after};
use crate::metrics;

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// How a login stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is renewed, or needs no renewal. Without a renewal it would end then, if ever.
    Kept(Option<BootTime>),
    /// It ends then, whatever is done: its maximum, or it cannot be renewed. From
    /// `successor_due` on another login should be at hand.
    Ends { at: BootTime, successor_due: BootTime },
    /// OpenBAO does not know it any more, nor any lease that it asked for.
    Dead,
}

/// A token in force.
#[derive(Debug)]
pub(super) struct Login {
    secret: Secret,
    standing: watch::Sender<Standing>,
    /// For those who need to know only that it ends.
    threatened: Notify,
}

impl Login {
    /// A token that was just obtained. It keeps itself until nobody holds it any more.
    pub(super) fn begin(token: Token, asked: BootTime, server: &Arc<Server>) -> Arc<Login> {
        let Token { secret, ttl, renewable, .. } = token;
        let standing = match (ttl.is_zero(), renewable) {
            (true, _) => Standing::Kept(None),
            (false, true) => Standing::Kept(Some(asked + ttl)),
            (false, false) => {
                let at = asked + ttl;
                Standing::Ends { at, successor_due: at.earlier(ttl / 3) }
            }
        };
        let (standing_now, threatened) = (watch::Sender::new(standing), Notify::new());
        let login = Arc::new(Login { secret, standing: standing_now, threatened });
        if matches!(standing, Standing::Kept(Some(_))) {
            tokio::spawn(keep(Arc::downgrade(&login), login.watch(), ttl, Arc::clone(server)));
        }
        login
    }

    /// For a request's header, and nothing else.
    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(super) fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Resolves when it is known to end sooner than was thought.
    pub(super) fn threatened(&self) -> Notified<'_> {
        self.threatened.notified()
    }

    /// OpenBAO has said that it does not know this token.
    pub(super) fn declare_dead(&self) {
        self.stands(Standing::Dead);
    }

    fn stands(&self, standing: Standing) {
        self.standing.send_replace(standing);
        if !matches!(standing, Standing::Kept(_)) {
            self.threatened.notify_waiters();
        }
    }

    /// When to have another login at hand, if that is known.
    pub(super) fn successor_due(&self) -> Option<BootTime> {
        match self.standing() {
            Standing::Kept(_) => None,
            Standing::Ends { successor_due, .. } => Some(successor_due),
            Standing::Dead => Some(BootTime::now()),
        }
    }
}

/// Renews a token until it is not held, not renewable or dead: from a quarter of its time on, so
/// that an OpenBAO that is silent for half of it costs no session.
async fn keep(
    login: Weak<Login>,
    mut standing: watch::Receiver<Standing>,
    mut ttl: Duration,
    server: Arc<Server>,
) {
    let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY.min(ttl / 12));
    let mut pause = Duration::ZERO;
    // Of attempts that OpenBAO was asked too often for.
    let mut waiting: Option<WaitingRenewal<'_>> = None;
    loop {
        let Standing::Kept(Some(ends)) = *standing.borrow_and_update() else { return };
        let due = ends.earlier(ttl * 3 / 4).max(BootTime::now() + pause);
        tokio::select! {
            () = due.arrives() => {}
            changed = standing.changed() => match changed {
                Ok(()) => continue,
                Err(_nobody_holds_it) => return,
            },
        }
        let Some(held) = login.upgrade() else { return };
        let asked = BootTime::now();
        match server.renew_self(&held.secret).await {
            Ok(renewed) => {
                retry.reset();
                pause = Duration::ZERO;
                if let Some(waiting) = waiting.take() {
                    waiting.renewed();
                }
                let at = asked + renewed.ttl;
                // Nothing gained, or less by more than rounding: it has met its maximum.
                let shorter = renewed.ttl + Duration::from_secs(2) < ttl;
                let capped = shorter || at <= ends || !renewed.renewable;
                // A token of a file may have been near its end when it was read.
                if renewed.ttl > ttl {
                    ttl = renewed.ttl;
                    retry = Backoff::new(FIRST_RETRY, LAST_RETRY.min(ttl / 12));
                }
                let standing = match capped {
                    true => Standing::Ends { at, successor_due: BootTime::now() },
                    false => Standing::Kept(Some(at)),
                };
                held.stands(standing);
            }
            Err(Error::Said { status: 403, words }) => {
                // Dead, or not allowed to renew itself: then it lives until its end.
                let looked_up = server.look_up_self(held.secret.clone()).await;
                if looked_up.is_err_and(|error| error.is_status(403)) {
                    tracing::warn!(words, "OpenBAO no longer knows a token of pgsilo");
                    held.declare_dead();
                } else {
                    tracing::error!(
                        words,
                        "OpenBAO does not let a token of pgsilo renew itself: allow auth/token/renew-self"
                    );
                    let successor_due = BootTime::now();
                    held.stands(Standing::Ends { at: ends, successor_due });
                }
                return;
            }
            Err(error) => {
                metrics::OPENBAO_RENEW_FAILURES.increment(1);
                tracing::warn!(%error, remaining_seconds = ends.remaining().as_secs(), "cannot renew a token at OpenBAO yet");
                if ends.remaining() < ttl / 6 {
                    // Its sessions have this long: they are told now, not when it is over.
                    let successor_due = BootTime::now();
                    held.stands(Standing::Ends { at: ends, successor_due });
                    return;
                }
                pause = retry.pause();
                if let Some(after) = retry_after(&error) {
                    // A login has less time than OpenBAO may ask for.
                    pause = pause.max(after.min(ttl / 12));
                    waiting = Some(server.precedence().renewal_waits(waiting.take(), pause));
                }
            }
        }
    }
}
