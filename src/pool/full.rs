//! Which databases have lately had no connection left, as they said themselves (53300).
//!
//! Nobody can know that beforehand: PostgreSQL says it to whoever has shown a name and a password, so after
//! a credential was made. But what was said a moment ago is still known when the next session comes. So for
//! a moment only some try, and a crowd that is turned away costs neither OpenBAO nor the full server a role each.
//! And for a while nothing is made ahead there.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::lease::Fullness;
use crate::registry::{Host, Tenant};
use crate::tenant::TenantId;

/// How long a database that said so counts as full.
const FRESH: Duration = Duration::from_millis(500);
/// Between two sessions that try, as long as it does.
const BETWEEN: Duration = Duration::from_millis(100);

/// What is full: a tenant's share, or a server for all its tenants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    Of(TenantId),
    Server(Host),
}

#[derive(Clone, Copy, Debug)]
struct Said {
    at: Instant,
    next_try: Instant,
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
        self.0.insert(place, Said { at: now, next_try: now + BETWEEN });
    }

    /// Whether it was said within `pause`.
    pub(super) fn is_remembered(&self, tenant: &Tenant, now: Instant, pause: Duration) -> bool {
        let lately = |place| self.0.get(&place).is_some_and(|said| now - said.at < pause);
        !self.0.is_empty() && (lately(of(tenant)) || lately(server(tenant)))
    }

    /// Whether a session may try: now and then one while it is fresh, and all of them then.
    pub(super) fn may_try(&mut self, tenant: &Tenant, now: Instant) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let places = [of(tenant), server(tenant)];
        let fresh = |said: &&Said| now - said.at < FRESH;
        let known = |place| self.0.get(place).filter(fresh);
        if places.iter().filter_map(known).any(|said| now < said.next_try) {
            return false;
        }
        for place in &places {
            if let Some(said) = self.0.get_mut(place) {
                said.next_try = now + BETWEEN;
            }
        }
        true
    }

    /// A session got in.
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
    use crate::registry::Registry;

    const PAUSE: Duration = Duration::from_secs(10);

    /// Two tenants of one server and one of another.
    fn tenants() -> [std::sync::Arc<Tenant>; 3] {
        let entry = |id: &str, host: &str| {
            format!(
                "[[tenant]]\nid = \"{id}\"\n[tenant.placement]\nhost = \"{host}\"\n\
                 tls = {{ mode = \"require\" }}\ndbname = \"tenant_{id}\"\n\
                 [tenant.lease]\nroles = {{ read-only = \"{id}-ro\" }}\n"
            )
        };
        let path = std::env::temp_dir().join(format!("pgsilo-full-{}.toml", std::process::id()));
        let text = entry("acme", "db1") + &entry("globex", "DB1") + &entry("initech", "db2");
        std::fs::write(&path, text).expect("written");
        let snapshot = Registry::open(&path).expect("a registry").snapshot();
        std::fs::remove_file(&path).expect("removed");
        ["acme", "globex", "initech"]
            .map(|id| snapshot.tenant(&TenantId::parse(id).expect("an id")).expect("there"))
    }

    #[test]
    fn some_try_while_it_is_fresh_and_all_when_one_got_in_or_it_is_old() {
        let ([acme, _, _], mut full, start) = (tenants(), FullDatabases::default(), Instant::now());
        assert!(full.may_try(&acme, start));
        full.said(&acme, Fullness::OfOne, start, PAUSE);
        let mut tried = 0;
        for millisecond in 0..500 {
            tried += u32::from(full.may_try(&acme, start + Duration::from_millis(millisecond)));
        }
        assert_eq!(tried, 4);
        let old = start + FRESH;
        assert!((0..10).all(|_| full.may_try(&acme, old)));
        assert!(full.is_remembered(&acme, old, PAUSE));
        assert!(!full.is_remembered(&acme, start + PAUSE, PAUSE));
        full.said(&acme, Fullness::OfOne, old, PAUSE);
        assert!(!full.may_try(&acme, old));
        full.is_over(&acme);
        assert!(full.may_try(&acme, old) && !full.is_remembered(&acme, old, PAUSE));
    }

    #[test]
    fn one_tenants_share_is_no_neighbours_and_a_server_is_all_of_its_tenants() {
        let ([acme, globex, initech], mut full, now) =
            (tenants(), FullDatabases::default(), Instant::now());
        full.said(&acme, Fullness::OfOne, now, PAUSE);
        assert!(!full.may_try(&acme, now) && full.may_try(&globex, now));
        assert!(!full.is_remembered(&globex, now, PAUSE));
        full.said(&acme, Fullness::OfServer, now, PAUSE);
        assert!(!full.may_try(&globex, now) && full.may_try(&initech, now));
        assert!(full.is_remembered(&globex, now, PAUSE));
    }
}
