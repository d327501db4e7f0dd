//! The recorder of the metrics, one for the process, and what is read off when it is asked.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::limits::Slots;
use crate::log::Kind;
use crate::metrics::{self, Activity};
use crate::proxy::Proxy;

/// Upper bounds of the histograms' buckets, in seconds: a stage takes microseconds to seconds.
const SECONDS: [f64; 16] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// Installs the recorder of the process.
pub(crate) fn install() -> Result<PrometheusHandle, String> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| error.to_string())?;
    metrics::register();
    Ok(handle)
}

/// Folds the histograms' samples together now and then: without it they would pile up for as
/// long as they are not scraped.
pub(crate) async fn tidy(handle: PrometheusHandle) {
    let mut ticks = tokio::time::interval(TIDY_INTERVAL);
    loop {
        ticks.tick().await;
        handle.run_upkeep();
    }
}

/// Sets the gauges that are read off rather than counted.
pub(crate) fn observe(proxy: &Proxy) {
    let stale = proxy.registry().stale_for();
    metrics::REGISTRY_STALE.set(stale.map_or(0.0, |age| age.as_secs_f64()));
    metrics::REGISTRY_TENANTS.set(proxy.registry().snapshot().len() as f64);
    metrics::OPENBAO_LOGGED_IN.set(if proxy.lessor.is_ready() { 1.0 } else { 0.0 });
    for (issuer, age) in proxy.verifier().ages() {
        metrics::KEYS_AGE.of([issuer]).set(age.as_secs_f64());
    }
    for listener in &proxy.sources.listeners {
        let validity = listener.tls.as_ref().and_then(|tls| tls.server.validity());
        if let Some(validity) = validity {
            let place = listener.place.to_string();
            metrics::CERTIFICATE_NOT_AFTER.of([&place]).set(validity.not_after() as f64);
        }
    }
    let census = proxy.sessions.census();
    for activity in Activity::ALL {
        metrics::SESSION_STATES.of(*activity).set(census.of(*activity) as f64);
    }
    metrics::SESSIONS_ENDING.set(census.ending as f64);
    metrics::POOL_IDLE_CONNECTIONS.set(proxy.pool.idle_count() as f64);
    for kind in Kind::ALL {
        metrics::LOG_LOST.of(*kind).absolute(proxy.log.lost(*kind));
    }
    let handshakes: usize = proxy.handshakes.iter().map(Slots::taken).sum();
    metrics::HANDSHAKES_ACTIVE.set(handshakes as f64);
}
