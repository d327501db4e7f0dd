//! Leases: a fresh database credential from OpenBAO for one session, revoked when it ends.
//!
//! Invariant: a credential that OpenBAO gave out is owned by exactly one [`Lease`], and
//! dropping that hands its id to the revoker, whatever became of the session in between: the
//! request runs on a task of its own, so a session that ends while it is under way leaves no
//! lease behind. Only the session's `Leased` stage asks for one.

mod identity;
mod keeper;
mod openbao;
mod revoker;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

pub(crate) use keeper::LeaseEnd;
pub(crate) use openbao::OpenBaoError;

use crate::clock::BootTime;
use crate::secret::Secret;
use identity::Identity;
use keeper::Keeper;
use openbao::OpenBao;
use revoker::{Revocation, Revoker};

/// How to reach OpenBAO and as whom; made by [`crate::config`].
#[derive(Debug)]
pub struct Settings {
    /// Base URL, without a trailing slash: `https://127.0.0.1:8200`.
    pub address: String,
    /// PEM of the authorities that OpenBAO's certificate must chain to; `None`: the system's.
    pub ca: Option<Vec<u8>>,
    /// Who pgsilo is to OpenBAO.
    pub auth: Auth,
    /// Of one HTTP request, connect included.
    pub timeout: Duration,
    /// Leases asked for at once.
    pub max_concurrent_requests: usize,
}

/// A login method. Files are read at each login, so that they may be replaced.
#[derive(Debug)]
pub enum Auth {
    /// `auth/approle/login`.
    AppRole {
        /// The role's public id.
        role_id: String,
        /// A file that holds the secret id.
        secret_id_file: PathBuf,
    },
    /// A file that holds an OpenBAO token, as `bao agent` writes it.
    TokenFile(PathBuf),
}

/// A database role's name and password, as OpenBAO made them for one session.
#[derive(Debug)]
pub(crate) struct Credential {
    pub(crate) username: String,
    pub(crate) password: Secret,
}

/// A credential that is in force until this is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    credential: Credential,
    end: watch::Receiver<LeaseEnd>,
    keeper: AbortHandle,
    revocation: Option<Revocation>,
    revoker: Revoker,
}

/// Why no credential could be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// Another attempt may succeed.
    #[error("OpenBAO: {0}")]
    Unavailable(OpenBaoError),
    /// An operator must act.
    #[error("OpenBAO: {0}")]
    Denied(OpenBaoError),
    /// pgsilo itself has no OpenBAO token.
    #[error("not logged in to OpenBAO: {0}")]
    NotLoggedIn(String),
    /// The task that asked was cancelled: the runtime is going down.
    #[error("the request to OpenBAO was abandoned")]
    Abandoned,
}

/// Where leases come from. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lessor {
    openbao: Arc<OpenBao>,
    identity: Arc<Identity>,
    revoker: Revoker,
    slots: Arc<Semaphore>,
    runtime: Handle,
}

impl Lessor {
    /// Prepares the client and starts its tasks (login, revocation) on `runtime`. It talks to
    /// OpenBAO in the background: that OpenBAO is down is no reason not to start.
    ///
    /// # Errors
    /// When the HTTP client cannot be made of the settings.
    pub(crate) fn start(
        settings: &'static Settings,
        runtime: Handle,
    ) -> Result<Lessor, OpenBaoError> {
        let openbao = Arc::new(OpenBao::new(settings)?);
        let identity = Arc::new(Identity::new(Arc::clone(&openbao), &settings.auth));
        let revoker = Revoker::start(Arc::clone(&openbao), Arc::clone(&identity), &runtime);
        runtime.spawn(Arc::clone(&identity).keep());
        let slots = Arc::new(Semaphore::new(settings.max_concurrent_requests));
        Ok(Lessor { openbao, identity, revoker, slots, runtime })
    }

    /// Whether pgsilo is logged in to OpenBAO, as far as it knows.
    pub(crate) fn is_ready(&self) -> bool {
        self.identity.token().is_ok()
    }

    /// Asks for a credential: `GET {mount}/creds/{role}`. Waiting in line is bounded by the
    /// login's deadline; once the request is under way it is seen to its end, whoever waits.
    pub(crate) async fn lease(&self, mount: &str, role: &str) -> Result<Lease, LeaseError> {
        let slot = Arc::clone(&self.slots).acquire_owned().await;
        let slot = slot.map_err(|_closed| LeaseError::Abandoned)?;
        let path = format!("{mount}/creds/{role}");
        let lessor = self.clone();
        let asking = self.runtime.spawn(async move {
            let lease = lessor.ask(&path).await;
            drop(slot);
            lease
        });
        asking.await.unwrap_or(Err(LeaseError::Abandoned))
    }

    async fn ask(self, path: &str) -> Result<Lease, LeaseError> {
        let (began, asked) = (Instant::now(), BootTime::now());
        let result = self.ask_twice(path).await;
        metrics::histogram!("pgsilo_lease_seconds").record(began.elapsed());
        let granted = result?;
        metrics::counter!("pgsilo_leases_total").increment(1);
        let duration = granted.duration;
        let end = LeaseEnd { at: asked + duration, duration, is_final: !granted.renewable };
        let (publish, end) = watch::channel(end);
        let keeper = Keeper {
            openbao: Arc::clone(&self.openbao),
            identity: Arc::clone(&self.identity),
            lease_id: granted.lease_id.clone(),
            username: granted.username.clone(),
            end: publish,
        };
        Ok(Lease {
            credential: Credential { username: granted.username, password: granted.password },
            keeper: self.runtime.spawn(keeper.keep()).abort_handle(),
            revocation: Some(Revocation::new(granted.lease_id, end.clone())),
            end,
            revoker: self.revoker,
        })
    }

    /// A 403 means a dead token or a forbidden path. Only the former is worth a second try.
    async fn ask_twice(&self, path: &str) -> Result<openbao::Granted, LeaseError> {
        let token = self.identity.token().map_err(LeaseError::NotLoggedIn)?;
        let error = match self.openbao.creds(&token, path).await {
            Err(error @ OpenBaoError::Said { status: 403, .. }) => error,
            other => return other.map_err(LeaseError::from),
        };
        if !self.identity.replace_if_dead(&token).await {
            return Err(LeaseError::Denied(error));
        }
        let token = self.identity.token().map_err(LeaseError::NotLoggedIn)?;
        self.openbao.creds(&token, path).await.map_err(LeaseError::from)
    }

    /// Waits until every lease that was handed back is revoked, then gives up pgsilo's own
    /// token where it was pgsilo that logged in for it. `patience` bounds it all.
    pub(crate) async fn close(&self, patience: Duration) {
        let all = async {
            self.revoker.idle().await;
            self.identity.give_up().await;
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!(
                pending = self.revoker.pending(),
                "stopping with leases not revoked yet: OpenBAO ends them with pgsilo's token or at their own end"
            );
        }
    }
}

impl From<OpenBaoError> for LeaseError {
    fn from(error: OpenBaoError) -> LeaseError {
        match error {
            OpenBaoError::Said { status: 400..=428 | 430..=499, .. } => LeaseError::Denied(error),
            OpenBaoError::Said { .. }
            | OpenBaoError::Unreachable(_)
            | OpenBaoError::Timeout
            | OpenBaoError::NotJson
            | OpenBaoError::TooLong => LeaseError::Unavailable(error),
            OpenBaoError::File { .. } | OpenBaoError::Client(_) => LeaseError::Denied(error),
        }
    }
}

impl Lease {
    /// For the login, and nothing else.
    pub(crate) fn credential(&self) -> &Credential {
        &self.credential
    }

    /// When it ends; changes with each renewal.
    pub(crate) fn end(&self) -> watch::Receiver<LeaseEnd> {
        self.end.clone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.abort();
        if let Some(revocation) = self.revocation.take() {
            self.revoker.revoke(revocation);
        }
    }
}
