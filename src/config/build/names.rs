//! Names that are allowed and mean something else than they seem to, or nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::TenantId;

use super::super::raw::RawIssuer;
use super::Build;
use crate::config::Listener;
use crate::registry::Registry;
use crate::route::DatabaseNames;

/// Where issuers' settings name tenants, and which. What ids begin with may be of tenants to come.
pub(super) fn tenants_of(issuers: &[RawIssuer]) -> Vec<(String, TenantId)> {
    let of_one = |(index, issuer): (usize, &RawIssuer)| {
        let listed = issuer.tenants.iter().flatten().enumerate();
        let listed = listed.map(move |(number, text)| {
            (format!("issuer[{index}].tenants[{number}]"), text.clone())
        });
        let meant = issuer.tenant_values.iter().flatten();
        let meant = meant
            .map(move |(value, id)| (format!("issuer[{index}].tenant_values.{value}"), id.clone()));
        listed.chain(meant).collect::<Vec<_>>()
    };
    let texts = issuers.iter().enumerate().flat_map(of_one);
    texts.filter_map(|(field, text)| Some((field, TenantId::parse(&text).ok()?))).collect()
}

impl Build<'_> {
    /// Whoever names another tenant there lands in his own.
    pub(super) fn mind_listeners(&mut self, registry: &Registry, listeners: &[Listener]) {
        let snapshot = registry.snapshot();
        for (number, listener) in listeners.iter().enumerate() {
            let DatabaseNames::Only(names) = &listener.database_names else { continue };
            let is_tenants = |name: &&String| {
                snapshot.tenants().any(|tenant| {
                    tenant.id().as_str() == *name || *tenant.placement().dbname == **name
                })
            };
            if let Some(name) = names.iter().find(is_tenants) {
                let what = format!(
                    "{name:?} is a tenant's: clients of others that name it land in their own; remove it"
                );
                self.warn(format!("listener[{number}].database_names"), what);
            }
        }
    }

    /// A name that clients of one tenant may have written means another one as soon as their tokens
    /// are for both.
    pub(super) fn mind_names(&mut self, registry: &Registry) {
        let snapshot = registry.snapshot();
        let as_another = |tenant: &&Arc<Tenant>| {
            let name = &*tenant.placement().dbname;
            name != tenant.id().as_str()
                && TenantId::parse(name).is_ok_and(|id| snapshot.tenant(&id).is_some())
        };
        let first = snapshot.tenants().filter(as_another).min_by_key(|tenant| tenant.id().as_str());
        if let Some(tenant) = first {
            let what = format!(
                "tenant {:?} has a database called {:?}, which is another tenant's id: a token for \
                 both that names it is for the other one; name this one by its id",
                tenant.id().as_str(),
                tenant.placement().dbname,
            );
            self.warn("registry.file", what);
        }
    }

    /// A tenant that is not there yet may come with the next registry; a typing error stays.
    pub(super) fn mind_unknown_tenants(
        &mut self,
        registry: &Registry,
        named: &[(String, TenantId)],
    ) {
        let snapshot = registry.snapshot();
        for (field, _) in named.iter().filter(|(_, id)| snapshot.tenant(id).is_none()) {
            self.warn(field, "names no tenant of the registry as it is now");
        }
    }

    /// Two tenants whose names in tokens differ in their case or in slashes alone: who chooses one at the
    /// issuer, or writes it here, takes it for the other.
    pub(super) fn mind_lookalikes(&mut self, registry: &Registry) {
        let snapshot = registry.snapshot();
        let ids = snapshot.tenants().map(|tenant| (tenant.id().as_str(), tenant.id()));
        let mut words: Vec<(&str, &TenantId)> = ids.chain(snapshot.aliases()).collect();
        words.sort_unstable();
        let mut seen: BTreeMap<String, (&str, &TenantId)> = BTreeMap::new();
        for (word, tenant) in words {
            let folded = word.trim_matches('/').to_lowercase();
            let (other, owner) = *seen.entry(folded).or_insert((word, tenant));
            if owner != tenant {
                let what = format!(
                    "{other:?} means tenant {owner}, and {word:?} means tenant {tenant}: each is easily \
                     taken for the other"
                );
                return self.warn("registry.file", what);
            }
        }
    }
}
