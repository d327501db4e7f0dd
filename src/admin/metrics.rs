//! The metrics: one recorder for the process, every name described, every label of the two
//! tables there from the start at zero, so that an alert on a rate works from the first event.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::ending::Ending;
use crate::limits::Slots;
use crate::log::Kind;
use crate::proxy::Proxy;
use crate::refusal::Reason;

/// Upper bounds of the histograms' buckets, in seconds: a stage takes microseconds to seconds.
const SECONDS: [f64; 16] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// What may be read again while pgsilo runs, but for the registry.
const FILES: [&str; 3] = ["certificate", "keys", "denied"];

const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// Installs the recorder of the process.
pub(crate) fn install() -> Result<PrometheusHandle, String> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| error.to_string())?;
    describe();
    for reason in Reason::ALL {
        counter!("pgsilo_refusals_total", "reason" => reason.label()).absolute(0);
    }
    for ending in Ending::ALL {
        counter!("pgsilo_endings_total", "ending" => ending.label()).absolute(0);
    }
    for direction in ["to_backend", "to_frontend"] {
        counter!("pgsilo_bytes_total", "direction" => direction).absolute(0);
    }
    for result in ["ok", "error"] {
        counter!("pgsilo_openbao_logins_total", "result" => result).absolute(0);
        counter!("pgsilo_registry_reloads_total", "result" => result).absolute(0);
    }
    for file in FILES {
        for result in ["ok", "error"] {
            counter!("pgsilo_file_reloads_total", "file" => file, "result" => result).absolute(0);
        }
    }
    for result in ["forwarded", "unknown_key", "failed"] {
        counter!("pgsilo_cancel_requests_total", "result" => result).absolute(0);
    }
    for result in ["used", "missed", "lost", "expired", "withdrawn", "yielded", "failed", "unclean"]
    {
        counter!("pgsilo_warm_total", "result" => result).absolute(0);
    }
    for name in [
        "pgsilo_connections_total",
        "pgsilo_abandoned_total",
        "pgsilo_dropped_total",
        "pgsilo_evicted_total",
        "pgsilo_sessions_total",
        "pgsilo_leases_total",
        "pgsilo_renewals_total",
        "pgsilo_renewal_failures_total",
        "pgsilo_revocations_total",
        "pgsilo_revocation_failures_total",
        "pgsilo_openbao_renew_failures_total",
        "pgsilo_tls_failures_total",
    ] {
        counter!(name).absolute(0);
    }
    gauge!("pgsilo_sessions_active").set(0);
    gauge!("pgsilo_revocations_pending").set(0);
    Ok(handle)
}

/// Folds the histograms' samples together now and then: without it they would pile up for as
/// long as nobody scrapes.
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
    gauge!("pgsilo_registry_stale_seconds").set(stale.map_or(0.0, |age| age.as_secs_f64()));
    gauge!("pgsilo_registry_tenants").set(proxy.registry().snapshot().len() as f64);
    gauge!("pgsilo_openbao_logged_in").set(if proxy.lessor.is_ready() { 1.0 } else { 0.0 });
    for (issuer, age) in proxy.verifier().ages() {
        gauge!("pgsilo_keys_age_seconds", "issuer" => issuer.to_owned()).set(age.as_secs_f64());
    }
    for listener in &proxy.sources.listeners {
        let validity = listener.tls.as_ref().and_then(|tls| tls.server.validity());
        if let Some(validity) = validity {
            gauge!("pgsilo_certificate_not_after_timestamp_seconds", "listener" => listener.place.to_string())
                .set(validity.not_after() as f64);
        }
    }
    gauge!("pgsilo_warm_connections").set(proxy.pool.waiting() as f64);
    for (kind, label) in [(Kind::Log, "log"), (Kind::Audit, "audit")] {
        counter!("pgsilo_log_lost_total", "kind" => label).absolute(proxy.log.lost(kind));
    }
    let handshakes: usize = proxy.handshakes.iter().map(Slots::taken).sum();
    gauge!("pgsilo_handshakes_active").set(handshakes as f64);
}

fn describe() {
    describe_counter!("pgsilo_connections_total", "Connections accepted");
    describe_counter!(
        "pgsilo_abandoned_total",
        "Connections whose client left during login: probes too"
    );
    describe_counter!(
        "pgsilo_dropped_total",
        "Connections closed unheard, as too many were being refused"
    );
    describe_counter!(
        "pgsilo_evicted_total",
        "Connections closed unheard that had proved nothing, to make room for newer ones"
    );
    describe_counter!("pgsilo_refusals_total", "Connections refused, by reason");
    describe_counter!("pgsilo_sessions_total", "Sessions that were spliced");
    describe_gauge!("pgsilo_sessions_active", "Sessions that run now");
    describe_gauge!("pgsilo_handshakes_active", "Connections that are logging in now");
    describe_counter!("pgsilo_endings_total", "Sessions that ended, by ending");
    describe_counter!("pgsilo_bytes_total", Unit::Bytes, "Bytes relayed, by direction");
    describe_counter!("pgsilo_cancel_requests_total", "Cancel requests, by result");
    describe_gauge!(
        "pgsilo_certificate_not_after_timestamp_seconds",
        Unit::Seconds,
        "When the certificate that a listener shows expires, in Unix time"
    );
    describe_counter!("pgsilo_tls_failures_total", "TLS handshakes of clients that failed");
    describe_histogram!(
        "pgsilo_stage_seconds",
        Unit::Seconds,
        "Time that each stage of a login took"
    );
    describe_histogram!(
        "pgsilo_lease_seconds",
        Unit::Seconds,
        "Time that OpenBAO took for a credential"
    );
    describe_gauge!("pgsilo_warm_connections", "Connections to databases that wait for a session");
    describe_counter!(
        "pgsilo_warm_total",
        "Sessions that took a waiting connection, or came when none was ready; connections that died waiting, waited in vain, were of a tenant that the registry changed, made room at a full database, could not be made, or could not be reset"
    );
    describe_counter!("pgsilo_leases_total", "Credentials that OpenBAO granted");
    describe_counter!("pgsilo_renewals_total", "Leases renewed");
    describe_counter!("pgsilo_renewal_failures_total", "Renewals that failed, to be tried again");
    describe_counter!("pgsilo_revocations_total", "Leases revoked");
    describe_counter!("pgsilo_revocation_failures_total", "Revocations that had to be tried again");
    describe_gauge!("pgsilo_revocations_pending", "Leases that are being revoked now");
    describe_gauge!(
        "pgsilo_openbao_logged_in",
        "Whether pgsilo can ask for leases: it has an OpenBAO token, or needs none; 1 or 0"
    );
    describe_gauge!(
        "pgsilo_openbao_available",
        "Whether OpenBAO answered when it was last asked, about every 5 s, and was not sealed; 1 or 0"
    );
    describe_counter!("pgsilo_openbao_logins_total", "Logins to OpenBAO, by result");
    describe_counter!(
        "pgsilo_openbao_renew_failures_total",
        "Renewals of tokens at OpenBAO that failed"
    );
    describe_counter!(
        "pgsilo_log_lost_total",
        "Lines of the log that could not be written, by kind"
    );
    describe_gauge!(
        "pgsilo_openbao_irrevocable_leases",
        "Leases that OpenBAO has given up on revoking, as it said a minute ago at most; NaN while it does not say"
    );
    describe_gauge!("pgsilo_registry_tenants", "Tenants in the registry's snapshot");
    describe_gauge!(
        "pgsilo_registry_stale_seconds",
        Unit::Seconds,
        "Time since the registry could first not be reloaded; 0 while it is fresh"
    );
    describe_counter!("pgsilo_registry_reloads_total", "Reloads of the registry, by result");
    describe_counter!(
        "pgsilo_file_reloads_total",
        "Files that changed while pgsilo runs, by file and result"
    );
    describe_gauge!(
        "pgsilo_keys_age_seconds",
        Unit::Seconds,
        "Time since an issuer's keys were last fetched, or its file could first not be read; 0 while that is good"
    );
    describe_counter!(
        "pgsilo_keys_fetches_total",
        "Fetches of an issuer's keys, by issuer and result"
    );
}
