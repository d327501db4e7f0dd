//! Files that change while pgsilo runs: looked at twice a second, and when a token names a key
//! that its issuer's file did not have; read again when they have changed, and in any case at
//! SIGHUP. What is not valid changes nothing, and is said loudly.
//!
//! Reading blocks, so it is done on a thread that may; and one reading at a time, so that the
//! newest wins.

use std::fmt::Display;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::Config;
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

/// Looks after all files, for as long as the process runs. Each message on `hangups` is a SIGHUP.
pub(super) async fn files(proxy: &'static Proxy, mut hangups: mpsc::Receiver<()>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let hangup = tokio::select! {
            _ = ticks.tick() => false,
            () = proxy.verifier().files_asked() => false,
            // None comes after the last one: nobody listens to signals any more.
            Some(()) = hangups.recv() => true,
        };
        let looked = tokio::task::spawn_blocking(move || {
            if hangup {
                registry(proxy);
            }
            others(proxy.config, hangup);
            for outcome in proxy.verifier().reload_files(hangup) {
                tell("keys", outcome.into());
            }
        });
        match looked.await {
            Ok(()) => {}
            // The runtime is going down.
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                tracing::error!(%error, "reading files again failed; what was before stays in force");
            }
        }
    }
}

fn registry(proxy: &Proxy) {
    let result = match proxy.registry().reload() {
        Ok(tenants) => {
            tracing::info!(tenants, "registry reloaded");
            "ok"
        }
        Err(error) => {
            tracing::error!(%error, "the registry is not valid; the one before stays in force");
            "error"
        }
    };
    metrics::counter!("pgsilo_registry_reloads_total", "result" => result).increment(1);
}

fn others(config: &Config, in_any_case: bool) {
    if let Some(denied) = &config.denied {
        tell("denied", denied.reload(in_any_case).into());
    }
    for tls in config.listeners.iter().filter_map(|listener| listener.tls.as_ref()) {
        tell("certificate", tls.server.reload(in_any_case).into());
    }
}

/// Says and counts what became of a file.
fn tell(file: &'static str, outcome: Outcome) {
    let result = match outcome {
        Outcome::Same => return,
        Outcome::Read => {
            tracing::info!(file, "read again");
            "ok"
        }
        Outcome::Refused(error) => {
            tracing::error!(file, %error, "not valid; the one before stays in force");
            "error"
        }
    };
    metrics::counter!("pgsilo_file_reloads_total", "file" => file, "result" => result).increment(1);
}
