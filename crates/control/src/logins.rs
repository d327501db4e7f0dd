//! Logins to OpenBAO that this process has made for itself. They are kept alive while it works and given
//! back when it ends, with all that was leased by them; one that is killed leaves them to their end, ten
//! minutes later.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use pgsilo_openbao::Client as Bao;

use crate::say;
use crate::settings::BaoLogin;

/// A third of the period that `pgsiloctl bootstrap` gives the tokens.
const RENEWED_EVERY: Duration = Duration::from_secs(200);

static HELD: Mutex<Vec<Bao>> = Mutex::new(Vec::new());

/// Logs in; what is made here is given back by [`give_back`].
pub(crate) async fn log_in(login: &BaoLogin, bao: &Bao) -> Result<Bao> {
    let made = login.log_in(bao).await?;
    Ok(if login.is_own() { hold(made) } else { made })
}

/// Keeps a login alive that is this process' own, and gives it back at the end.
pub(crate) fn hold(bao: Bao) -> Bao {
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(bao.clone());
    tokio::spawn(keep(bao.clone()));
    bao
}

async fn keep(bao: Bao) {
    loop {
        tokio::time::sleep(RENEWED_EVERY).await;
        if let Err(error) = bao.renew_own_token().await {
            say::progress(&format!("the login to OpenBAO could not be renewed: {error}"));
        }
    }
}

/// Ends what this process has logged in with.
async fn give_back() {
    let held = std::mem::take(&mut *HELD.lock().unwrap_or_else(PoisonError::into_inner));
    for bao in held {
        if let Err(error) = bao.log_out().await {
            say::progress(&format!("the login to OpenBAO ends by itself in ten minutes: {error}"));
        }
    }
}

/// Runs a command to its end, and gives back what it has logged in with.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let outcome = future.await;
        give_back().await;
        outcome
    })
}
