//! Who pgsilo is to OpenBAO: its own token, obtained, renewed at two thirds of its time, and
//! obtained anew when it is dead.
//!
//! Leases die with the token that asked for them, so a living token is never dropped for a new
//! one. Logins are single-flight: however many sessions find the token dead, one asks.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::sleep;

use super::Auth;
use super::openbao::{BaoToken, OpenBao, OpenBaoError};
use crate::secret::Secret;

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// How often a token file is read again when its token cannot be renewed.
const RELOOK: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Identity {
    openbao: Arc<OpenBao>,
    auth: &'static Auth,
    /// The token, or why there is none.
    token: RwLock<Result<BaoToken, String>>,
    login: Mutex<()>,
}

impl Identity {
    pub(super) fn new(openbao: Arc<OpenBao>, auth: &'static Auth) -> Identity {
        let token = RwLock::new(Err("the first login is under way".to_owned()));
        Identity { openbao, auth, token, login: Mutex::new(()) }
    }

    /// The token to present, or why there is none.
    pub(super) fn token(&self) -> Result<Secret, String> {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner);
        token.as_ref().map(|token| token.secret.clone()).map_err(Clone::clone)
    }

    fn set(&self, token: Result<BaoToken, String>) {
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// Keeps a living token for as long as the process runs.
    pub(super) async fn keep(self: Arc<Self>) {
        let mut retry = FIRST_RETRY;
        loop {
            let known = self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
            let Ok(token) = known else {
                match self.log_in().await {
                    Ok(()) => retry = FIRST_RETRY,
                    Err(error) => {
                        tracing::error!(%error, "cannot log in to OpenBAO: {}", advice(&error));
                        sleep(retry).await;
                        retry = (retry * 2).min(LAST_RETRY);
                    }
                }
                continue;
            };
            sleep(pause(&token)).await;
            self.prolong(&token).await;
        }
    }

    /// Logs in, once however many ask at the same time.
    async fn log_in(&self) -> Result<(), OpenBaoError> {
        let _one_at_a_time = self.login.lock().await;
        if self.token().is_ok() {
            return Ok(());
        }
        let token = self.authenticate().await;
        metrics::counter!("pgsilo_openbao_logins_total", "result" => if token.is_ok() { "ok" } else { "error" })
            .increment(1);
        match token {
            Ok(token) => {
                tracing::info!(ttl_seconds = token.ttl.as_secs(), "logged in to OpenBAO");
                self.set(Ok(token));
                Ok(())
            }
            Err(error) => {
                self.set(Err(error.to_string()));
                Err(error)
            }
        }
    }

    async fn authenticate(&self) -> Result<BaoToken, OpenBaoError> {
        match self.auth {
            Auth::AppRole { role_id, secret_id_file } => {
                let secret_id = read_line(secret_id_file).await?;
                self.openbao.log_in_approle(role_id, &secret_id).await
            }
            Auth::TokenFile(path) => {
                let token = read_line(path).await?;
                self.openbao.look_up_self(Secret::new(token.as_bytes())).await
            }
        }
    }

    /// Renews the token, or reads a token file again; a token that OpenBAO no longer knows is
    /// forgotten, so that the next round logs in.
    async fn prolong(&self, token: &BaoToken) {
        let renewed = match (self.auth, token.renewable) {
            (Auth::TokenFile(_), false) => self.authenticate().await,
            (_, true) => self.openbao.renew_self(&token.secret).await,
            (Auth::AppRole { .. }, false) => self.authenticate().await,
        };
        match renewed {
            Ok(token) => self.set(Ok(token)),
            Err(OpenBaoError::Said { status: 403, words }) => {
                tracing::warn!(words, "OpenBAO no longer knows pgsilo's token: logging in again");
                self.set(Err("its token has died".to_owned()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot renew pgsilo's OpenBAO token");
                metrics::counter!("pgsilo_openbao_renew_failures_total").increment(1);
                let ttl = token.ttl / 2;
                self.set(Ok(BaoToken { ttl: ttl.max(Duration::from_secs(1)), ..token.clone() }));
            }
        }
    }

    /// After a 403: whether the token was dead and there is another one now.
    pub(super) async fn replace_if_dead(&self, used: &Secret) -> bool {
        let Ok(current) = self.token() else {
            return self.log_in().await.is_ok();
        };
        if current.expose() != used.expose() {
            return true;
        }
        match self.openbao.look_up_self(current).await {
            Err(OpenBaoError::Said { status: 403, .. }) => {
                self.set(Err("its token has died".to_owned()));
                self.log_in().await.is_ok()
            }
            _ => false,
        }
    }

    /// Revokes a token that pgsilo logged in for itself, and every lease with it.
    pub(super) async fn give_up(&self) {
        if let (Auth::AppRole { .. }, Ok(token)) = (self.auth, self.token()) {
            let _best_effort = self.openbao.revoke_self(&token).await;
        }
    }
}

/// Two thirds of what is left.
fn pause(token: &BaoToken) -> Duration {
    match token.ttl.is_zero() {
        true => RELOOK,
        false => (token.ttl * 2 / 3).max(Duration::from_millis(500)),
    }
}

async fn read_line(path: &std::path::Path) -> Result<zeroize::Zeroizing<String>, OpenBaoError> {
    let failed = |error| OpenBaoError::File { path: path.to_owned(), error };
    let text = zeroize::Zeroizing::new(tokio::fs::read_to_string(path).await.map_err(failed)?);
    Ok(zeroize::Zeroizing::new(text.trim().to_owned()))
}

/// What an operator can do about it.
fn advice(error: &OpenBaoError) -> &'static str {
    match error {
        OpenBaoError::Said { status: 400 | 403, .. } => {
            "check the role id, the secret id or the token that [openbao] auth names"
        }
        OpenBaoError::Said { status: 404, .. } => "is the auth method enabled there?",
        OpenBaoError::Said { status: 503, .. } => "unseal it",
        OpenBaoError::Said { .. } => "see its log",
        OpenBaoError::Unreachable(_) | OpenBaoError::Timeout => {
            "check [openbao] address and ca, and that it runs"
        }
        OpenBaoError::NotJson | OpenBaoError::TooLong => "is [openbao] address an OpenBAO server?",
        OpenBaoError::File { .. } => "check the file that [openbao] auth names",
        OpenBaoError::Client(_) => "check [openbao] ca",
    }
}
