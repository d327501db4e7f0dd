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
use crate::registry_database::RegistrySource;

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
    let denied = |hangup, said: &mut Said| look_at_denied(proxy, hangup, said);
    tokio::spawn(poll_files(hangups.clone(), pending, denied));
    let requested = || proxy.verifier().file_refresh_requested();
    let others = |hangup, said: &mut Said| look_at_others(proxy, hangup, said);
    tokio::spawn(poll_files(hangups.clone(), requested, others));
}

/// Polls periodically, when it is `asked`, and at each SIGHUP.
async fn poll_files<F: Future<Output = ()>>(
    mut hangups: watch::Receiver<u64>,
    asked: impl Fn() -> F,
    look: impl Fn(bool, &mut Said) + Copy + Send + 'static,
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
            look(hangup, &mut said);
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
    let file = match &proxy.sources.registry_source {
        RegistrySource::File(file) => file,
        RegistrySource::Database(database) => return database.compare_now(),
    };
    let result = match file.reload(proxy.registry()) {
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
    if !is_news(said, which, &outcome) {
        return;
    }
    let file = which.0;
    let result = match outcome {
        Outcome::Same => return,
        Outcome::Read => {
            tracing::info!(file = file.label(), "read again");
            metrics::Outcome::Ok
        }
        Outcome::Refused(error) => {
            tracing::error!(file = file.label(), %error, "not valid; the one before stays in force");
            metrics::Outcome::Error
        }
    };
    metrics::FILE_RELOADS.of((file, result)).increment(1);
}

/// Whether what became of a file is to be logged: an error is, until it changes.
fn is_news(said: &mut Said, which: (File, usize), outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Same => false,
        Outcome::Read => {
            said.remove(&which);
            true
        }
        Outcome::Refused(error) => said.insert(which, error.clone()).as_ref() != Some(error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::spawn;
    use tokio::sync::Notify;
    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
    use tokio::time::{Instant, timeout};

    use super::*;

    #[test]
    fn an_error_of_a_file_is_logged_once_until_it_changes() {
        let mut said = Said::default();
        let mut is_news = |number, outcome: &Outcome| {
            super::is_news(&mut said, (File::Certificate, number), outcome)
        };
        let refused = |error: &str| Outcome::Refused(error.to_owned());
        for (number, outcome, expected) in [
            (0, Outcome::Same, false),
            (0, refused("empty"), true),
            (0, refused("empty"), false),
            (0, Outcome::Same, false),
            (0, refused("empty"), false),
            (1, refused("empty"), true),
            (0, refused("no PEM"), true),
            (0, refused("empty"), true),
            (0, Outcome::Read, true),
            (0, Outcome::Read, true),
            (0, refused("empty"), true),
            (1, refused("empty"), false),
        ] {
            assert_eq!(is_news(number, &outcome), expected, "{number}");
        }
    }

    /// When a look was, and what there is to say of it.
    type Looks = (&'static UnboundedSender<(Instant, bool)>, UnboundedReceiver<(Instant, bool)>);

    fn looks() -> Looks {
        let (sender, receiver) = unbounded_channel();
        (Box::leak(Box::new(sender)), receiver)
    }

    async fn next(
        looks: &mut UnboundedReceiver<(Instant, bool)>,
        count: usize,
    ) -> Vec<(Instant, bool)> {
        let mut next = Vec::new();
        while next.len() < count {
            let look = timeout(2 * POLL_INTERVAL, looks.recv()).await;
            next.push(look.expect("in time").expect("another look"));
        }
        next
    }

    #[tokio::test(start_paused = true)]
    async fn files_are_polled_twice_a_second_and_on_request() {
        let (hangups, hung_up) = watch::channel(0);
        let (asks, (looked, mut looks)): (&'static Notify, _) =
            (Box::leak(Box::default()), looks());
        let look = |hangup, _: &mut Said| looked.send((Instant::now(), hangup)).expect("awaited");
        let began = Instant::now();
        spawn(poll_files(hung_up, || asks.notified(), look));
        let at = |number: u32, hangup| (began + number * POLL_INTERVAL, hangup);
        assert_eq!(next(&mut looks, 3).await, [at(0, false), at(1, false), at(2, false)]);

        asks.notify_one();
        assert_eq!(next(&mut looks, 1).await, [at(2, false)]);
        hangups.send_modify(|count| *count += 1);
        assert_eq!(next(&mut looks, 2).await, [at(2, true), at(3, false)]);

        // Nobody listens to signals any more.
        drop(hangups);
        assert_eq!(next(&mut looks, 2).await, [at(4, false), at(5, false)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_does_not_end_the_polling() {
        let (_hangups, hung_up) = watch::channel(0);
        let (looked, mut looks) = looks();
        // It panics whenever something was said before, which is forgotten with it.
        let look = |_, said: &mut Said| {
            let is_first = said.insert((File::Keys, 0), "said".to_owned()).is_none();
            looked.send((Instant::now(), is_first)).expect("awaited");
            assert!(is_first);
        };
        let began = Instant::now();
        spawn(poll_files(hung_up, pending::<()>, look));
        let expected = [true, false, true, false];
        let expected =
            (0..4).zip(expected).map(|(n, is_first)| (began + n * POLL_INTERVAL, is_first));
        assert_eq!(next(&mut looks, 4).await, expected.collect::<Vec<_>>());
    }
}
