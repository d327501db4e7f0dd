//! Which databases have lately had no connection left, as they said themselves (53300).
//!
//! Nobody can know that beforehand: PostgreSQL says it to whoever has shown a name and a password, so after
//! a credential was made. But what was said a moment ago is still known when the next session comes. So for
//! a moment only some try, and a crowd that is turned away costs neither OpenBAO nor the full server a role each.
//! And for a while nothing is made ahead there.

use std::collections::HashMap;
use std::time::Duration;

use pgsilo_core::registry::{Host, Tenant};
use pgsilo_core::tenant::TenantId;
use tokio::time::Instant;

use crate::lease::Fullness;

/// How long a database that said so counts as full, if no session of the tenant's ends meanwhile.
const FRESH: Duration = Duration::from_millis(500);
/// Between two sessions of a tenant that try, as long as it does.
const BETWEEN: Duration = Duration::from_millis(100);

/// What is full: a tenant's share, or a server for all its tenants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    Of(TenantId),
    Server(Host),
}

#[derive(Debug)]
struct Said {
    at: Instant,
    /// A place may be free since then.
    is_outdated: bool,
    /// When a session of a tenant last tried: no tenant's tries are another's.
    tried: HashMap<TenantId, Instant>,
}

/// What was said, and when.
#[derive(Debug, Default)]
pub(super) struct FullDatabases(HashMap<Place, Said>);

impl FullDatabases {
    /// A tenant's database has said so. It is remembered for `pause`.
    pub(super) fn said(&mut self, tenant: &Tenant, whose: Fullness, now: Instant, pause: Duration) {
        let pause = pause.max(FRESH);
        self.0.retain(|_, said| now - said.at < pause);
        let place = match whose {
            Fullness::OfServer => server(tenant),
            Fullness::OfOne => of(tenant),
        };
        let said = self.0.entry(place).or_insert_with(|| Said {
            at: now,
            is_outdated: false,
            tried: HashMap::new(),
        });
        (said.at, said.is_outdated) = (now, false);
        said.tried.retain(|_, at| now - *at < BETWEEN);
        said.tried.insert(tenant.id().clone(), now);
    }

    /// Whether it was said within `pause`.
    pub(super) fn is_remembered(&self, tenant: &Tenant, now: Instant, pause: Duration) -> bool {
        let lately = |place| self.0.get(&place).is_some_and(|said| now - said.at < pause);
        !self.0.is_empty() && (lately(of(tenant)) || lately(server(tenant)))
    }

    /// Whether a session may try: of each tenant now and then one while it is fresh, and all of them then.
    ///
    /// # Errors
    /// Not now: whose connections are used up.
    pub(super) fn may_try(&mut self, tenant: &Tenant, now: Instant) -> Result<(), Fullness> {
        if self.0.is_empty() {
            return Ok(());
        }
        let places = [(of(tenant), Fullness::OfOne), (server(tenant), Fullness::OfServer)];
        for (place, whose) in &places {
            let known = self.0.get(place);
            let known = known.filter(|said| !said.is_outdated && now - said.at < FRESH);
            let tried = known.and_then(|said| said.tried.get(tenant.id()));
            if tried.is_some_and(|at| now - *at < BETWEEN) {
                return Err(*whose);
            }
        }
        for (place, _) in &places {
            if let Some(said) = self.0.get_mut(place) {
                said.tried.insert(tenant.id().clone(), now);
            }
        }
        Ok(())
    }

    /// A place may be free: whoever comes may try. It may be the only one.
    pub(super) fn has_a_place(&mut self, tenant: &Tenant) {
        if !self.0.is_empty() {
            for place in [of(tenant), server(tenant)] {
                if let Some(said) = self.0.get_mut(&place) {
                    said.is_outdated = true;
                }
            }
        }
    }

    /// A session got in where nobody made room for it.
    pub(super) fn is_over(&mut self, tenant: &Tenant) {
        if !self.0.is_empty() {
            self.0.remove(&of(tenant));
            self.0.remove(&server(tenant));
        }
    }
}

fn of(tenant: &Tenant) -> Place {
    Place::Of(tenant.id().clone())
}

fn server(tenant: &Tenant) -> Place {
    Place::Server(tenant.placement().host.comparable())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgsilo_core::registry::Snapshot;

    const PAUSE: Duration = Duration::from_secs(10);

    /// Two tenants of one server and one of another.
    fn tenants(test: &str) -> [std::sync::Arc<Tenant>; 3] {
        let entry = |id: &str, host: &str| {
            format!(
                "[[tenant]]\nid = \"{id}\"\n[tenant.placement]\nhost = \"{host}\"\n\
                 tls = {{ mode = \"require\" }}\ndbname = \"tenant_{id}\"\n\
                 [tenant.lease]\nroles = {{ read-only = \"{id}-ro\" }}\n"
            )
        };
        let name = format!("pgsilo-full-{test}-{}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        let text = entry("acme", "db1") + &entry("globex", "DB1") + &entry("initech", "db2");
        std::fs::write(&path, text).expect("written");
        let snapshot = Snapshot::read(&path, None).expect("a registry");
        std::fs::remove_file(&path).expect("removed");
        ["acme", "globex", "initech"]
            .map(|id| snapshot.tenant(&TenantId::parse(id).expect("an id")).expect("there"))
    }

    #[test]
    fn some_try_while_it_is_fresh_and_all_when_one_got_in_or_it_is_old() {
        let ([acme, _, _], mut full, start) =
            (tenants("fresh"), FullDatabases::default(), Instant::now());
        assert_eq!(full.may_try(&acme, start), Ok(()));
        full.said(&acme, Fullness::OfOne, start, PAUSE);
        let mut tried = 0;
        for millisecond in 0..500 {
            let now = start + Duration::from_millis(millisecond);
            tried += u32::from(full.may_try(&acme, now).is_ok());
        }
        assert_eq!(tried, 4);
        let old = start + FRESH;
        assert!((0..10).all(|_| full.may_try(&acme, old).is_ok()));
        assert!(full.is_remembered(&acme, old, PAUSE));
        assert!(!full.is_remembered(&acme, start + PAUSE, PAUSE));
        full.said(&acme, Fullness::OfOne, old, PAUSE);
        assert_eq!(full.may_try(&acme, old), Err(Fullness::OfOne));
        full.is_over(&acme);
        assert!(full.may_try(&acme, old).is_ok() && !full.is_remembered(&acme, old, PAUSE));
    }

    #[test]
    fn a_session_that_ends_lets_others_try_and_nothing_be_made_ahead() {
        let ([acme, _, _], mut full, now) =
            (tenants("ends"), FullDatabases::default(), Instant::now());
        full.said(&acme, Fullness::OfServer, now, PAUSE);
        assert_eq!(full.may_try(&acme, now), Err(Fullness::OfServer));
        full.has_a_place(&acme);
        assert!((0..10).all(|_| full.may_try(&acme, now).is_ok()));
        assert!(full.is_remembered(&acme, now, PAUSE));
    }

    #[test]
    fn one_tenants_share_is_no_neighbours_and_a_server_is_all_of_its_tenants() {
        let ([acme, globex, initech], mut full, now) =
            (tenants("share"), FullDatabases::default(), Instant::now());
        full.said(&acme, Fullness::OfOne, now, PAUSE);
        assert!(full.may_try(&acme, now).is_err() && full.may_try(&globex, now).is_ok());
        assert!(!full.is_remembered(&globex, now, PAUSE));
        full.said(&acme, Fullness::OfServer, now, PAUSE);
        assert!(full.is_remembered(&globex, now, PAUSE));
        // A busy neighbour takes nobody's tries.
        assert!(full.may_try(&acme, now).is_err() && full.may_try(&globex, now).is_ok());
        assert_eq!(full.may_try(&globex, now), Err(Fullness::OfServer));
        assert!(full.may_try(&initech, now).is_ok());
    }
}
