//! Logins that this process has made for itself: to OpenBAO, and by OpenBAO to databases. They are kept alive
//! while it works and given back when it ends; one that is killed leaves them to their end, a quarter of an
//! hour later.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures_util::future::join_all;
use pgsilo_openbao::{Client as Bao, Credential};
use tokio::signal::unix::{SignalKind, signal};

use crate::say;
use crate::settings::BaoLogin;

/// A third of the period that `pgsiloctl bootstrap` gives the tokens, and less of what it gives leases.
const RENEWED_EVERY: Duration = Duration::from_secs(200);

/// What is to be given back.
#[derive(Debug, Default)]
struct Held {
    logins: Vec<Bao>,
    /// With whose token, and the lease's id.
    leases: Vec<(Bao, String)>,
    is_kept: bool,
}

static HELD: Mutex<Held> =
    Mutex::new(Held { logins: Vec::new(), leases: Vec::new(), is_kept: false });

fn held() -> MutexGuard<'static, Held> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Logs in; what is made here is given back by [`give_back`].
pub(crate) async fn log_in(login: &BaoLogin, bao: &Bao) -> Result<Bao> {
    let made = login.log_in(bao).await?;
    Ok(if login.is_own() { hold(made) } else { made })
}

/// Keeps a login alive that is this process' own, and gives it back at the end.
pub(crate) fn hold(bao: Bao) -> Bao {
    held().logins.push(bao.clone());
    keep();
    bao
}

/// A login at a database, which is kept alive and given back, too: a token that lasts longer would not end
/// it.
pub(crate) async fn lease(bao: &Bao, mount: &str, role: &str) -> Result<Credential> {
    let made = bao.credential(mount, role).await?;
    held().leases.push((bao.clone(), made.lease_id.clone()));
    keep();
    Ok(made)
}

/// From the first of them on.
fn keep() {
    if std::mem::replace(&mut held().is_kept, true) {
        return;
    }
    tokio::spawn(async {
        loop {
            tokio::time::sleep(RENEWED_EVERY).await;
            let (logins, leases) = {
                let held = held();
                (held.logins.clone(), held.leases.clone())
            };
            for login in logins {
                complain(login.renew_own_token().await);
            }
            for (bao, lease) in leases {
                complain(bao.renew_lease(&lease).await);
            }
        }
    });
}

fn complain(renewed: Result<(), pgsilo_openbao::Failure>) {
    if let Err(error) = renewed {
        say::progress(&format!("a login could not be renewed: {error}"));
    }
}

/// Ends what this process has logged in with.
async fn give_back() {
    let Held { logins, leases, .. } = std::mem::take(&mut *held());
    let ends = leases.iter().map(|(bao, lease)| bao.revoke_lease(lease));
    for ended in join_all(ends).await {
        if let Err(error) = ended {
            say::progress(&format!("a login ends by itself in a quarter of an hour: {error}"));
        }
    }
    for bao in logins {
        if let Err(error) = bao.log_out().await {
            say::progress(&format!("a login to OpenBAO ends by itself in ten minutes: {error}"));
        }
    }
}

/// Runs a command to its end, and gives back what it has logged in with.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let outcome = tokio::select! {
            outcome = future => outcome,
            _ = tokio::signal::ctrl_c() => Err(interrupted()),
            _ = terminate.recv() => Err(interrupted()),
        };
        give_back().await;
        outcome
    })
}

fn interrupted() -> anyhow::Error {
    anyhow!(
        "interrupted: what was begun is in the registry's journal; the same command goes on with it"
    )
}
