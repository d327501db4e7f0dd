//! Files that change while pgsilo runs: looked at twice a second, and when a token names a key
//! that its issuer's file did not have; read again when they have changed, and in any case at
//! SIGHUP. What is not valid changes nothing, and is said loudly.
//!
//! Reading blocks, so it is done on a thread that may; and one reading of a file at a time, so that
//! the newest wins.

use std::collections::HashMap;
use std::fmt::Display;
use std::future::pending;
use std::time::Duration;

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::metrics::{self, File};
use crate::proxy::Proxy;

const LOOK: Duration = Duration::from_millis(500);

/// What a look came to.
pub(super) enum Outcome {
    /// Nothing had changed.
    Same,
    /// The new one is in force.
    Read,
    /// The one before stays in force.
    Refused(String),
}

impl<E: Display> From<Result<bool, E>> for Outcome {
    fn from(result: Result<bool, E>) -> Outcome {
        match result {
            Ok(false) => Outcome::Same,
            Ok(true) => Outcome::Read,
            Err(error) => Outcome::Refused(error.to_string()),
        }
    }
}

/// Looks after all files, for as long as the process runs. `hangups` changes at each SIGHUP. The list
/// of those denied has a task of its own: whatever takes long beside it, it must be in force.
pub(super) fn files(proxy: &'static Proxy, hangups: &watch::Receiver<u64>) {
    // It cannot answer who asks for a key, and would look on and on until the other one has.
    tokio::spawn(tend(proxy, hangups.clone(), pending, look_at_denied));
    tokio::spawn(tend(proxy, hangups.clone(), || proxy.verifier().files_asked(), look_at_others));
}

/// Looks now and again, when it is `asked`, and at each SIGHUP.
async fn tend<F: Future<Output = ()>>(
    proxy: &'static Proxy,
    mut hangups: watch::Receiver<u64>,
    asked: impl Fn() -> F,
    look: fn(&Proxy, bool, &mut Said),
) {
    let mut ticks = interval(LOOK);
    let mut said = Said::default();
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let hangup = tokio::select! {
            _ = ticks.tick() => false,
            () = asked() => false,
            // None comes after the last one: nobody listens to signals any more.
            Ok(()) = hangups.changed() => true,
        };
        let looked = tokio::task::spawn_blocking(move || {
            look(proxy, hangup, &mut said);
            said
        });
        match looked.await {
            Ok(again) => said = again,
            // The runtime is going down.
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                tracing::error!(%error, "reading files again failed; what was before stays in force");
                said = Said::default();
            }
        }
    }
}

/// What was last said of each file that is not valid: it is not said twice a second.
type Said = HashMap<(File, usize), String>;

fn look_at_denied(proxy: &Proxy, in_any_case: bool, said: &mut Said) {
    if let Some(denied) = &proxy.sources.denied {
        tell(said, (File::Denied, 0), denied.reload(in_any_case).into());
    }
}

fn look_at_others(proxy: &Proxy, hangup: bool, said: &mut Said) {
    let listeners = proxy.sources.listeners.iter().enumerate();
    for (number, tls) in listeners.filter_map(|(n, listener)| Some((n, listener.tls.as_ref()?))) {
        let outcome = tls.server.reload(hangup).into();
        if matches!(outcome, Outcome::Read) {
            for complaint in tls.server.complaints(UnixTime::now()) {
                tracing::warn!(%complaint, "in force, and to be mended");
            }
        }
        if matches!(outcome, Outcome::Read) && tls.server.asks_clients() {
            proxy.authorities_changed();
        }
        tell(said, (File::Certificate, number), outcome);
    }
    for (number, outcome) in proxy.verifier().reload_files(hangup).into_iter().enumerate() {
        tell(said, (File::Keys, number), outcome.into());
    }
    // Last: it can be large. It is read when that is asked for, and not by itself.
    if hangup {
        registry(proxy);
    }
}

fn registry(proxy: &Proxy) {
    let result = match proxy.sources.registry_file.reload(proxy.registry()) {
        Ok(tenants) => {
            tracing::info!(tenants, "registry reloaded");
            metrics::Outcome::Ok
        }
        Err(error) => {
            tracing::error!(%error, "the registry is not valid; the one before stays in force");
            metrics::Outcome::Error
        }
    };
    metrics::REGISTRY_RELOADS.of(result).increment(1);
}

/// Says and counts what became of a file.
fn tell(said: &mut Said, which: (File, usize), outcome: Outcome) {
    let file = which.0;
    let result = match outcome {
        Outcome::Same => return,
        Outcome::Read => {
            said.remove(&which);
            tracing::info!(file = file.label(), "read again");
            metrics::Outcome::Ok
        }
        Outcome::Refused(error) => {
            if said.get(&which) == Some(&error) {
                return;
            }
            tracing::error!(file = file.label(), %error, "not valid; the one before stays in force");
            said.insert(which, error);
            metrics::Outcome::Error
        }
    };
    metrics::FILE_RELOADS.of((file, result)).increment(1);
}
