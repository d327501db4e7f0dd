//! A login at OpenBAO: a token, and the knowledge of when it ends.
//!
//! Leases die with the token that asked for them. So each lease holds its login, a login is
//! renewed for as long as anything holds it, and its end, once it is final, is the end of
//! every session under it, which is announced to them.

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

/// The state of a login's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenState {
    /// It is renewed, or needs no renewal. Without a renewal it would end then, if ever.
    Valid(Option<BootTime>),
    /// It ends then, whatever is done: its maximum, or it cannot be renewed. From
    /// `replacement_due` on another login should be at hand.
    Expiring { at: BootTime, replacement_due: BootTime },
    /// OpenBAO does not know it any more, nor any lease that it asked for.
    Invalid,
}

/// A token in force.
#[derive(Debug)]
pub(super) struct Login {
    secret: Secret,
    state: watch::Sender<TokenState>,
    /// For those who only need to know that it expires.
    expiring: Notify,
}

impl Login {
    /// A token that was just obtained. It is renewed until it is dropped.
    pub(super) fn begin(token: Token, asked: BootTime, server: &Arc<Server>) -> Arc<Login> {
        let Token { secret, ttl, renewable, .. } = token;
        let state = match (ttl.is_zero(), renewable) {
            (true, _) => TokenState::Valid(None),
            (false, true) => TokenState::Valid(Some(asked + ttl)),
            (false, false) => {
                let at = asked + ttl;
                TokenState::Expiring { at, replacement_due: at.earlier(ttl / 3) }
            }
        };
        let (standing_now, expiring) = (watch::Sender::new(state), Notify::new());
        let login = Arc::new(Login { secret, state: standing_now, expiring });
        if matches!(state, TokenState::Valid(Some(_))) {
            tokio::spawn(renew_while_held(
                Arc::downgrade(&login),
                login.watch(),
                ttl,
                Arc::clone(server),
            ));
        }
        login
    }

    /// For a request's header, and nothing else.
    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(super) fn state(&self) -> TokenState {
        *self.state.borrow()
    }

    pub(super) fn watch(&self) -> watch::Receiver<TokenState> {
        self.state.subscribe()
    }

    /// Resolves when it is known to end sooner than was thought.
    pub(super) fn expiring(&self) -> Notified<'_> {
        self.expiring.notified()
    }

    /// OpenBAO has said that it does not know this token.
    pub(super) fn mark_invalid(&self) {
        self.set_state(TokenState::Invalid);
    }

    fn set_state(&self, state: TokenState) {
        self.state.send_replace(state);
        if !matches!(state, TokenState::Valid(_)) {
            self.expiring.notify_waiters();
        }
    }

    /// When to have another login at hand, if that is known.
    pub(super) fn replacement_due(&self) -> Option<BootTime> {
        match self.state() {
            TokenState::Valid(_) => None,
            TokenState::Expiring { replacement_due, .. } => Some(replacement_due),
            TokenState::Invalid => Some(BootTime::now()),
        }
    }
}

/// Renews a token until it is not held, not renewable or dead: from a quarter of its time on, so
/// that an OpenBAO that is silent for half of it costs no session.
async fn renew_while_held(
    login: Weak<Login>,
    mut state: watch::Receiver<TokenState>,
    mut ttl: Duration,
    server: Arc<Server>,
) {
    let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY.min(ttl / 12));
    let mut pause = Duration::ZERO;
    // Of attempts that OpenBAO was asked too often for.
    let mut waiting: Option<WaitingRenewal<'_>> = None;
    loop {
        let TokenState::Valid(Some(ends)) = *state.borrow_and_update() else { return };
        let due = ends.earlier(ttl * 3 / 4).max(BootTime::now() + pause);
        tokio::select! {
            () = due.arrives() => {}
            changed = state.changed() => match changed {
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
                let state = match capped {
                    true => TokenState::Expiring { at, replacement_due: BootTime::now() },
                    false => TokenState::Valid(Some(at)),
                };
                held.set_state(state);
            }
            Err(Error::Said { status: 403, words }) => {
                // Dead, or not allowed to renew itself: then it lives until its end.
                let looked_up = server.look_up_self(held.secret.clone()).await;
                if looked_up.is_err_and(|error| error.is_status(403)) {
                    tracing::warn!(words, "OpenBAO no longer knows a token of pgsilo");
                    held.mark_invalid();
                } else {
                    tracing::error!(
                        words,
                        "OpenBAO does not let a token of pgsilo renew itself: allow auth/token/renew-self"
                    );
                    let replacement_due = BootTime::now();
                    held.set_state(TokenState::Expiring { at: ends, replacement_due });
                }
                return;
            }
            Err(error) => {
                metrics::OPENBAO_RENEW_FAILURES.increment(1);
                tracing::warn!(%error, remaining_seconds = ends.remaining().as_secs(), "cannot renew a token at OpenBAO yet");
                if ends.remaining() < ttl / 6 {
                    // Its sessions have this long: they are told now, not when it is over.
                    let replacement_due = BootTime::now();
                    held.set_state(TokenState::Expiring { at: ends, replacement_due });
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
