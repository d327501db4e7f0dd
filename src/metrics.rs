//! THE table of metrics: whatever pgsilo counts or measures of itself is a row here.
//!
//! A row is a static, which is how the rest of the code names its metric: `LEASES.increment(1)`, or
//! `REFUSALS.of(reason).increment(1)` where it has labels. `admin/metrics.rs` installs the recorder
//! before anything is counted; a handle is registered when it is first used, and kept.

mod instruments;

use ::metrics::{Counter, Gauge, Histogram};

use crate::audit::Stage;
use crate::ending::Ending;
use crate::log::Kind;
use crate::reason::Reason;
use instruments::{About, Described, Labels, Metric, Open, UpDown};

macro_rules! metrics {
    ($($metric:ident, $instrument:ident $labels:tt, $name:literal, $text:literal;)+) => {
        $(
            #[doc = $text]
            pub(crate) static $metric: metric_type!($instrument $labels) =
                metric!($labels, About { name: $name, text: $text });
        )+

        static ALL: &[&(dyn Described + Sync)] = &[$(&$metric),+];
    };
}

/// Labels in parentheses are a type that has all their values. Of those in brackets only the names
/// are known: their values are in the configuration.
macro_rules! metric_type {
    ($instrument:ident [$($label:literal),+]) => { Open<$instrument, { [$($label),+].len() }> };
    ($instrument:ident ()) => { Metric<$instrument, (), 1> };
    ($instrument:ident ($labels:ty)) => { Metric<$instrument, $labels, { <$labels>::COUNT }> };
    ($instrument:ident ($a:ty, $b:ty)) => { Metric<$instrument, ($a, $b), { <($a, $b)>::COUNT }> };
}

macro_rules! metric {
    ([$($label:literal),+], $about:expr) => { Open::new($about, [$($label),+]) };
    ($labels:tt, $about:expr) => { Metric::new($about) };
}

metrics! {
    CONNECTIONS, Counter(), "pgsilo_connections_total", "Connections accepted";
    ABANDONED, Counter(), "pgsilo_abandoned_total",
        "Connections whose client left during login: probes too";
    DROPPED, Counter(), "pgsilo_dropped_total",
        "Connections closed unheard, as too many were being refused";
    EVICTED, Counter(), "pgsilo_evicted_total",
        "Connections closed unheard that had proved nothing, to make room for newer ones";
    REFUSALS, Counter(Reason), "pgsilo_refusals_total", "Connections refused, by reason";
    SESSIONS, Counter(), "pgsilo_sessions_total", "Sessions that were spliced";
    SESSIONS_ACTIVE, UpDown(), "pgsilo_sessions_active", "Sessions that run now";
    SESSION_STATES, Gauge(Activity), "pgsilo_session_states",
        "Sessions that run now, by state, as pg_stat_activity names them";
    SESSIONS_ENDING, Gauge(), "pgsilo_sessions_ending",
        "Sessions that have to end, and wait for a good moment to";
    HANDSHAKES_ACTIVE, Gauge(), "pgsilo_handshakes_active", "Connections that are logging in now";
    ENDINGS, Counter(Ending), "pgsilo_endings_total", "Sessions that ended, by ending";
    BYTES, Counter(Direction), "pgsilo_bytes_total", "Bytes relayed, by direction";
    CANCEL_REQUESTS, Counter(Cancelled), "pgsilo_cancel_requests_total",
        "Cancel requests, by result";
    CERTIFICATE_NOT_AFTER, Gauge["listener"],
        "pgsilo_certificate_not_after_timestamp_seconds",
        "When the certificate that a listener shows expires, in Unix time";
    TLS_FAILURES, Counter(), "pgsilo_tls_failures_total",
        "TLS handshakes of clients that failed";
    STAGE_TIME, Histogram(Stage), "pgsilo_stage_seconds",
        "Time that each stage of a login took";
    FAILOVERS, Counter(), "pgsilo_failovers_total",
        "Clusters of which another server has become the primary";
    LEASE_TIME, Histogram(), "pgsilo_lease_seconds",
        "Time that OpenBAO took for a credential";
    POOL_IDLE_CONNECTIONS, Gauge(), "pgsilo_pool_idle_connections",
        "Idle connections to databases in the pool";
    POOL_REQUESTS, Counter(PoolRequest), "pgsilo_pool_requests_total",
        "Logins that asked the pool for an idle connection, by result";
    POOL_PREWARMS, Counter(Outcome), "pgsilo_pool_prewarms_total",
        "Connections opened for the pool before a session asked for them, by result";
    POOL_RESETS, Counter(Outcome), "pgsilo_pool_resets_total",
        "Connections that sessions left and that were reset for reuse, by result";
    POOL_CLOSED, Counter(PoolClose), "pgsilo_pool_closed_total",
        "Connections of the pool closed instead of given to a session, by reason";
    LEASES, Counter(), "pgsilo_leases_total", "Credentials that OpenBAO granted";
    RENEWALS, Counter(), "pgsilo_renewals_total", "Leases renewed";
    RENEWAL_FAILURES, Counter(), "pgsilo_renewal_failures_total",
        "Renewals that failed, to be tried again";
    REVOCATIONS, Counter(), "pgsilo_revocations_total", "Leases revoked";
    REVOCATION_FAILURES, Counter(), "pgsilo_revocation_failures_total",
        "Revocations that had to be tried again";
    REVOCATIONS_PENDING, UpDown(), "pgsilo_revocations_pending",
        "Leases that are being revoked now";
    OPENBAO_LOGGED_IN, Gauge(), "pgsilo_openbao_logged_in",
        "Whether pgsilo can ask for leases: it has an OpenBAO token, or needs none; 1 or 0";
    OPENBAO_AVAILABLE, Gauge(), "pgsilo_openbao_available",
        "Whether OpenBAO answered when it was last asked, about every 5 s, and was not sealed; 1 or 0";
    OPENBAO_LOGINS, Counter(Outcome), "pgsilo_openbao_logins_total", "Logins to OpenBAO, by result";
    OPENBAO_RENEW_FAILURES, Counter(), "pgsilo_openbao_renew_failures_total",
        "Renewals of tokens at OpenBAO that failed";
    LOG_LOST, Counter(Kind), "pgsilo_log_lost_total",
        "Lines of the log that could not be written, by kind";
    OPENBAO_IRREVOCABLE_LEASES, Gauge(), "pgsilo_openbao_irrevocable_leases",
        "Leases that OpenBAO has given up on revoking, as it said a minute ago at most; NaN while it does not say";
    REGISTRY_TENANTS, Gauge(), "pgsilo_registry_tenants", "Tenants in the registry's snapshot";
    REGISTRY_STALE, Gauge(), "pgsilo_registry_stale_seconds",
        "Time since the registry could first not be reloaded; 0 while it is fresh";
    REGISTRY_REVISION, Gauge(), "pgsilo_registry_revision",
        "Revision of the registry's database up to which it was read; 0 where it is a file";
    REGISTRY_REJECTED, Gauge(), "pgsilo_registry_rejected",
        "Entries of the registry's database that cannot be, and are not served";
    REGISTRY_COMPARISONS, Counter(Outcome), "pgsilo_registry_comparisons_total",
        "Comparisons of all that was read of the registry's database with its digest, by result";
    REGISTRY_RELOADS, Counter(Outcome), "pgsilo_registry_reloads_total",
        "Reloads of the registry, by result";
    FILE_RELOADS, Counter(File, Outcome), "pgsilo_file_reloads_total",
        "Files that changed while pgsilo runs, by file and result";
    KEYS_AGE, Gauge["issuer"], "pgsilo_keys_age_seconds",
        "Time since an issuer's keys were last fetched, or its file could first not be read; 0 while that is good";
    KEYS_FETCHES, Counter["issuer", "result"], "pgsilo_keys_fetches_total",
        "Fetches of an issuer's keys, by issuer and result";
}

macro_rules! labels {
    ($($(#[$doc:meta])+ $labels:ident, $name:literal: $($value:ident $label:literal),+;)+) => {
        $(
            $(#[$doc])+
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub(crate) enum $labels { $($value),+ }

            impl $labels {
                pub(crate) const ALL: &[$labels] = &[$($labels::$value),+];

                pub(crate) fn label(self) -> &'static str {
                    match self { $($labels::$value => $label),+ }
                }
            }

            label!($labels, $name);
        )+
    };
}

macro_rules! label {
    ($labels:ident, $name:literal) => {
        impl Labels for $labels {
            const COUNT: usize = $labels::ALL.len();

            fn index(self) -> usize {
                self as usize
            }

            fn texts(index: usize) -> Vec<(&'static str, &'static str)> {
                vec![($name, $labels::ALL[index].label())]
            }
        }
    };
}

labels! {
    /// Which way bytes were relayed.
    Direction, "direction": ToBackend "to_backend", ToFrontend "to_frontend";
    /// What a session does, as `pg_stat_activity` has it.
    Activity, "state": Idle "idle", IdleInTransaction "idle_in_transaction", Active "active";
    /// What became of a cancel request.
    Cancelled, "result": Forwarded "forwarded", UnknownKey "unknown_key", Failed "failed";
    /// Whether the pool had an idle connection for a login.
    PoolRequest, "result": Hit "hit", Miss "miss";
    /// Why the pool closed a connection.
    PoolClose, "reason": Expired "expired", Evicted "evicted", BackendFull "backend_full",
        CheckFailed "check_failed", TenantChanged "tenant_changed", FailedOver "failed_over",
        Shutdown "shutdown";
    /// Whether it went well.
    Outcome, "result": Ok "ok", Error "error";
    /// What may be read again while pgsilo runs, but for the registry.
    File, "file": Certificate "certificate", Keys "keys", Denied "denied";
}

label!(Reason, "reason");
label!(Ending, "ending");
label!(Stage, "stage");
label!(Kind, "kind");

/// A row, as the manual has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What it is called on `/metrics`.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The names of its labels, each with the values that it may have, as far as they are known.
    pub labels: Vec<(&'static str, Vec<&'static str>)>,
    /// What it is.
    pub text: &'static str,
}

/// The whole table, in its order.
pub fn descriptions() -> Vec<Description> {
    ALL.iter().map(|metric| metric.description()).collect()
}

/// Describes every row to the recorder that was just installed. What counts from zero is there from
/// the start, so that an alert on a rate works from the first event.
pub(crate) fn register() {
    for metric in ALL {
        metric.register();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_say_what_they_are_of() {
        let descriptions = descriptions();
        let names: HashSet<_> = descriptions.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), descriptions.len());
        for Description { name, kind, .. } in descriptions {
            assert!(name.starts_with("pgsilo_"), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            assert!(kind != "histogram" || name.ends_with("_seconds"), "{name}: its buckets");
        }
    }

    #[test]
    fn each_set_of_labels_has_a_handle_of_its_own() {
        let mut seen = HashSet::new();
        for file in File::ALL {
            for outcome in Outcome::ALL {
                let index = (*file, *outcome).index();
                let expected = [("file", file.label()), ("result", outcome.label())];
                assert_eq!(<(File, Outcome)>::texts(index), expected);
                assert!(seen.insert(index));
            }
        }
        assert_eq!(seen.len(), <(File, Outcome)>::COUNT);
        assert!(Stage::ALL.iter().enumerate().all(|(at, stage)| stage.index() == at));
        assert!(Kind::ALL.iter().enumerate().all(|(at, kind)| kind.index() == at));
    }
}
