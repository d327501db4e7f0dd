//! Files that change while pgsilo runs (certificates, authorities, revocation lists, keys, the list
//! of those denied): polled twice a second, by their stamps, and when a token names a key that its
//! issuer's file did not have; read again when they have changed, and always at SIGHUP. The
//! registry is read at SIGHUP only. Each part reads its own file, and takes a new one in place of
//! the old as a whole or not at all: a file that is not valid changes nothing, and is logged as an
//! error.
//!
//! Reading blocks, so it is done on a thread that may; and one reading of a file at a time, so that
//! the newest wins. The list of those denied has a task of its own, so that nothing delays it.

use std::collections::HashMap;
use std::fmt::Display;
use std::future::pending;
use std::time::Duration;

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::metrics::{self, File};
use crate::proxy::Proxy;

const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// What polling a file came to.
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

/// Polls all files, for as long as the process runs. `hangups` changes at each SIGHUP. The list of
/// those denied has a task of its own, so that slow reading of others does not delay it.
pub(super) fn watch(proxy: &'static Proxy, hangups: &watch::Receiver<u64>) {
    // The list has no keys: a request for one would have this task poll until the other has
    // answered.
    tokio::spawn(poll_files(proxy, hangups.clone(), pending, look_at_denied));
    tokio::spawn(poll_files(
        proxy,
        hangups.clone(),
        || proxy.verifier().file_refresh_requested(),
        look_at_others,
    ));
}

/// Polls periodically, when it is `asked`, and at each SIGHUP.
async fn poll_files<F: Future<Output = ()>>(
    proxy: &'static Proxy,
    mut hangups: watch::Receiver<u64>,
    asked: impl Fn() -> F,
    look: fn(&Proxy, bool, &mut Said),
) {
    let mut ticks = interval(POLL_INTERVAL);
    let mut said = Said::default();
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let hangup = tokio::select! {
            _ = ticks.tick() => false,
            () = asked() => false,
            // Fails when signals are no longer handled.
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

/// The last error of each file that is not valid, so that it is logged once.
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

/// Logs and counts what became of a file.
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
