//! OpenBAO as leases are asked for there: the client, and what pgsilo makes of its answers. How it
//! is asked is in `pgsilo-openbao`; how often, in which order and until when is decided here.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::backoff::Backoff;
use pgsilo_openbao::{Error, OpenBao, Token};
use tokio::time::sleep;

use super::fitness::{Unfit, is_revocable};
use super::precedence::{LONGEST, Precedence};

/// Between attempts to give a token back that is not used.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// How often that is tried.
const GIVING_BACK: u32 = 5;
/// How often the client certificate is looked at under session authority.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Why there is no login.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginError {
    /// OpenBAO does not give one.
    #[error(transparent)]
    Asking(#[from] Error),
    /// A file of the login method.
    #[error("cannot read {path:?}: {error}")]
    File { path: PathBuf, error: std::io::Error },
    /// A token is to be followed, and its file has no other.
    #[error("the token file still holds the token that ends soon")]
    SameToken,
    /// OpenBAO let pgsilo in, with a token that breaks promises.
    #[error("{0}")]
    Unfit(#[from] Unfit),
}

impl LoginError {
    /// See [`retry_after`].
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            LoginError::Asking(error) => retry_after(error),
            LoginError::File { .. } | LoginError::SameToken | LoginError::Unfit(_) => None,
        }
    }
}

/// How long not to ask again, where OpenBAO says that it is asked too often.
pub(super) fn retry_after(error: &Error) -> Option<Duration> {
    error.retry_after().map(|after| after.min(LONGEST))
}

/// The server, and who asks it first.
#[derive(Debug)]
pub(super) struct Server {
    openbao: OpenBao,
    precedence: Precedence,
}

impl Deref for Server {
    type Target = OpenBao;

    fn deref(&self) -> &OpenBao {
        &self.openbao
    }
}

impl Server {
    pub(super) fn new(openbao: OpenBao) -> Server {
        Server { openbao, precedence: Precedence::default() }
    }

    /// Who asks first.
    pub(super) fn precedence(&self) -> &Precedence {
        &self.precedence
    }

    /// Presents the certificate again when it changes. Under session authority pgsilo itself does
    /// not log in, which does this otherwise.
    pub(super) async fn watch_certificate(self: Arc<Self>) {
        let mut read = self.certificate_stamp();
        loop {
            sleep(POLL_INTERVAL).await;
            let now = self.certificate_stamp();
            if now != read {
                match self.present_certificate().await {
                    Ok(()) => read = now,
                    Err(error) => tracing::warn!(%error, "the certificate before stays in use"),
                }
            }
        }
    }

    /// Gives back a token that nothing was leased with, as best it can: it is tried a few times,
    /// and after that the token lives until its own end, as one that cannot be revoked does.
    pub(super) async fn give_back(&self, token: &Token) {
        if !is_revocable(&token.nature) {
            return;
        }
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        for _ in 1..GIVING_BACK {
            if self.revoke_self(&token.secret).await.is_ok() {
                return;
            }
            sleep(retry.pause()).await;
        }
        if let Err(error) = self.revoke_self(&token.secret).await {
            tracing::warn!(%error, "a token that pgsilo does not use is left to its own end");
        }
    }
}
