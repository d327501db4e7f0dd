//! Whether OpenBAO could make credentials now, as far as it says itself, for who routes sessions to
//! pgsilo.
//!
//! A sealed OpenBAO answers, and a login of pgsilo's lives on in it: so it is asked for its health
//! (`sys/health`, which needs no token), whether or not sessions come. Only what lasts is told: one
//! answer that fails must not take every pgsilo out of a balancer at once. What is well again is so
//! at once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgsilo_core::backoff::spread;
use pgsilo_openbao::Error;
use tokio::time::{Instant, sleep};

use super::server::Server;
use crate::metrics;

/// Between two looks, a little less or more.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// The same while it is not well.
const TROUBLE_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long it must have been so before it is told.
const LASTING: Duration = Duration::from_secs(10);

/// Why OpenBAO makes no credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It is sealed, or was never initialized.
    Sealed,
    /// It does not answer.
    Away,
}

/// What is known of it. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Health(Arc<Mutex<Option<Unwell>>>);

#[derive(Clone, Copy, Debug)]
struct Unwell {
    since: Instant,
    trouble: Trouble,
}

impl Health {
    /// Looks now and again, for as long as the process runs.
    pub(super) async fn watch(self, server: Arc<Server>) {
        loop {
            let trouble = trouble(&server.health(true).await);
            metrics::OPENBAO_AVAILABLE.set(f64::from(u8::from(trouble.is_none())));
            self.note(trouble, Instant::now());
            let pause = if trouble.is_some() { TROUBLE_POLL_INTERVAL } else { POLL_INTERVAL };
            sleep(pause.mul_f64(0.9 + spread() / 5.0)).await;
        }
    }

    /// Its trouble, if that lasts.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.lasting(Instant::now())
    }

    fn note(&self, trouble: Option<Trouble>, now: Instant) {
        let mut unwell = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *unwell = trouble.map(|trouble| {
            let since = unwell.map_or(now, |before| before.since);
            Unwell { since, trouble }
        });
    }

    fn lasting(&self, now: Instant) -> Option<Trouble> {
        let unwell = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unwell.filter(|unwell| now - unwell.since >= LASTING).map(|unwell| unwell.trouble)
    }
}

/// What an answer says. A gateway may not let the question through: that says nothing.
fn trouble(answer: &Result<u16, Error>) -> Option<Trouble> {
    match answer {
        Ok(501 | 503) => Some(Trouble::Sealed),
        Ok(_) => None,
        Err(Error::Unreachable(_) | Error::Timeout(_)) => Some(Trouble::Away),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lasting_trouble_is_reported_and_its_end_at_once() {
        let (health, start) = (Health::default(), Instant::now());
        health.note(Some(Trouble::Away), start);
        assert_eq!(health.lasting(start + LASTING / 2), None);
        health.note(None, start + LASTING / 2);
        assert_eq!(health.lasting(start + LASTING), None, "one that failed is no outage");
        let again = start + LASTING;
        health.note(Some(Trouble::Away), again);
        health.note(Some(Trouble::Sealed), again + LASTING);
        assert_eq!(health.lasting(again + LASTING), Some(Trouble::Sealed), "it came back sealed");
        health.note(None, again + LASTING * 2);
        assert_eq!(health.lasting(again + LASTING * 2), None);
    }

    #[test]
    fn standbys_and_gateways_are_no_trouble() {
        for (status, expected) in [
            (200, None),
            (429, None),
            (473, None),
            (403, None),
            (404, None),
            (501, Some(Trouble::Sealed)),
            (503, Some(Trouble::Sealed)),
        ] {
            assert_eq!(trouble(&Ok(status)), expected, "{status}");
        }
        let late = Err(Error::Timeout(String::new()));
        assert_eq!(trouble(&late), Some(Trouble::Away));
    }
}
