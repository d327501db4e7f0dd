//! Databases that have lately reported that they have no connection left (53300).
//!
//! PostgreSQL reports this only after the startup packet, for some limits only after the password,
//! so after a credential was made. For a moment after such a report a tenant's sessions try one at
//! a time: those that are refused cost neither OpenBAO nor the full server a role each. For a
//! longer while there is no prewarm.

use std::collections::HashMap;
use std::time::Duration;

use pgsilo_core::registry::{ClusterKey, Tenant};
use pgsilo_core::tenant::TenantId;
use tokio::time::Instant;

use crate::lease::FullScope;

/// How long a report limits sessions, unless a session of the tenant ends meanwhile.
const FRESH: Duration = Duration::from_millis(500);
/// How often one session of a tenant may try meanwhile.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// What is full: a tenant's share, or a server for all its tenants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Backend {
    Tenant(TenantId),
    Server(ClusterKey),
}

#[derive(Debug)]
struct Report {
    at: Instant,
    /// A slot may have become free since then.
    is_outdated: bool,
    /// When a session of each tenant last tried: tenants do not limit each other.
    attempts: HashMap<TenantId, Instant>,
}

/// The reports, by what they are about.
#[derive(Debug, Default)]
pub(super) struct FullDatabases(HashMap<Backend, Report>);

impl FullDatabases {
    /// A tenant's database has reported that it is full. The report is kept for `retention`.
    pub(super) fn record_full(
        &mut self,
        tenant: &Tenant,
        scope: FullScope,
        now: Instant,
        retention: Duration,
    ) {
        let retention = retention.max(FRESH);
        self.0.retain(|_, report| now - report.at < retention);
        let backend = match scope {
            FullScope::Server => server_of(tenant),
            FullScope::Tenant => share_of(tenant),
        };
        let report = self.0.entry(backend).or_insert_with(|| Report {
            at: now,
            is_outdated: false,
            attempts: HashMap::new(),
        });
        (report.at, report.is_outdated) = (now, false);
        report.attempts.retain(|_, at| now - *at < RETRY_INTERVAL);
        report.attempts.insert(tenant.id().clone(), now);
    }

    /// Whether it was reported full within `period`.
    pub(super) fn was_full_within(&self, tenant: &Tenant, now: Instant, period: Duration) -> bool {
        let is_recent =
            |backend| self.0.get(&backend).is_some_and(|report| now - report.at < period);
        !self.0.is_empty() && (is_recent(share_of(tenant)) || is_recent(server_of(tenant)))
    }

    /// Whether a session may try: one of each tenant per interval while a report is fresh, else
    /// all.
    ///
    /// # Errors
    /// Not now: what is full.
    pub(super) fn may_connect(&mut self, tenant: &Tenant, now: Instant) -> Result<(), FullScope> {
        if self.0.is_empty() {
            return Ok(());
        }
        let backends =
            [(share_of(tenant), FullScope::Tenant), (server_of(tenant), FullScope::Server)];
        for (backend, scope) in &backends {
            let report = self.0.get(backend);
            let fresh = report.filter(|report| !report.is_outdated && now - report.at < FRESH);
            let last = fresh.and_then(|report| report.attempts.get(tenant.id()));
            if last.is_some_and(|at| now - *at < RETRY_INTERVAL) {
                return Err(*scope);
            }
        }
        for (backend, _) in &backends {
            if let Some(report) = self.0.get_mut(backend) {
                report.attempts.insert(tenant.id().clone(), now);
            }
        }
        Ok(())
    }

    /// A slot may have become free, perhaps only one: all sessions may try, prewarm does not.
    pub(super) fn record_free_slot(&mut self, tenant: &Tenant) {
        if !self.0.is_empty() {
            for backend in [share_of(tenant), server_of(tenant)] {
                if let Some(report) = self.0.get_mut(&backend) {
                    report.is_outdated = true;
                }
            }
        }
    }

    /// A session was given a connection without an eviction: the database is not full.
    pub(super) fn clear(&mut self, tenant: &Tenant) {
        if !self.0.is_empty() {
            self.0.remove(&share_of(tenant));
            self.0.remove(&server_of(tenant));
        }
    }
}

fn share_of(tenant: &Tenant) -> Backend {
    Backend::Tenant(tenant.id().clone())
}

fn server_of(tenant: &Tenant) -> Backend {
    Backend::Server(tenant.placement().cluster.key().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tests::{entry, read};

    const RETENTION: Duration = Duration::from_secs(10);

    /// Two tenants of one server and one of another.
    fn tenants() -> [std::sync::Arc<Tenant>; 3] {
        let on = |host: &str, id: &str| entry(id).replace("\"db\"", &format!("\"{host}\""));
        let snapshot = read(&(on("db1", "acme") + &on("DB1", "globex") + &on("db2", "initech")));
        ["acme", "globex", "initech"]
            .map(|id| snapshot.tenant(&TenantId::parse(id).expect("an id")).expect("there"))
    }

    #[test]
    fn sessions_are_limited_until_the_report_is_old_or_one_connects() {
        let ([acme, _, _], mut full, start) = (tenants(), FullDatabases::default(), Instant::now());
        assert_eq!(full.may_connect(&acme, start), Ok(()));
        full.record_full(&acme, FullScope::Tenant, start, RETENTION);
        let mut tried = 0;
        for millisecond in 0..500 {
            let now = start + Duration::from_millis(millisecond);
            tried += u32::from(full.may_connect(&acme, now).is_ok());
        }
        assert_eq!(tried, 4);
        let old = start + FRESH;
        assert!((0..10).all(|_| full.may_connect(&acme, old).is_ok()));
        assert!(full.was_full_within(&acme, old, RETENTION));
        assert!(!full.was_full_within(&acme, start + RETENTION, RETENTION));
        full.record_full(&acme, FullScope::Tenant, old, RETENTION);
        assert_eq!(full.may_connect(&acme, old), Err(FullScope::Tenant));
        full.clear(&acme);
        assert!(
            full.may_connect(&acme, old).is_ok() && !full.was_full_within(&acme, old, RETENTION)
        );
    }

    #[test]
    fn a_session_that_ends_allows_sessions_but_no_prewarm() {
        let ([acme, _, _], mut full, now) = (tenants(), FullDatabases::default(), Instant::now());
        full.record_full(&acme, FullScope::Server, now, RETENTION);
        assert_eq!(full.may_connect(&acme, now), Err(FullScope::Server));
        full.record_free_slot(&acme);
        assert!((0..10).all(|_| full.may_connect(&acme, now).is_ok()));
        assert!(full.was_full_within(&acme, now, RETENTION));
    }

    #[test]
    fn a_full_share_limits_one_tenant_and_a_full_server_all_of_its_tenants() {
        let ([acme, globex, initech], mut full, now) =
            (tenants(), FullDatabases::default(), Instant::now());
        full.record_full(&acme, FullScope::Tenant, now, RETENTION);
        assert!(full.may_connect(&acme, now).is_err() && full.may_connect(&globex, now).is_ok());
        assert!(!full.was_full_within(&globex, now, RETENTION));
        full.record_full(&acme, FullScope::Server, now, RETENTION);
        assert!(full.was_full_within(&globex, now, RETENTION));
        // The attempts of one tenant do not limit another.
        assert!(full.may_connect(&acme, now).is_err() && full.may_connect(&globex, now).is_ok());
        assert_eq!(full.may_connect(&globex, now), Err(FullScope::Server));
        assert!(full.may_connect(&initech, now).is_ok());
    }
}
