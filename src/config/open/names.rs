//! What of the registry, as the rest of the configuration has it, is allowed and unwise: names that
//! mean something else than they seem to, or nothing; databases that are reached or shared without
//! care.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgsilo_core::host::is_loopback;
use pgsilo_core::limits::TimeLimits;
use pgsilo_core::registry::{Cluster, ClusterKey, Host, PlacementTls, Snapshot, Tenant};
use pgsilo_core::tenant::{TenantId, TenantPattern};

use super::super::build::Build;
use crate::listener::Listener;
use crate::route::DatabaseNames;
use crate::token::{Issuer, KeySource};

/// Where issuers' settings name tenants, and which. What ids begin with may be of tenants to come.
pub(super) fn tenants_of(issuers: &[Issuer<KeySource>]) -> Vec<(String, TenantId)> {
    let of_one = |(index, issuer): (usize, &Issuer<KeySource>)| {
        let listed = issuer.tenants.as_deref().unwrap_or_default().iter().enumerate();
        let listed = listed.filter_map(move |(number, pattern)| match pattern {
            TenantPattern::Exactly(id) => {
                Some((format!("issuer[{index}].tenants[{number}]"), id.clone()))
            }
            TenantPattern::Prefix(_) => None,
        });
        let meant = issuer.tenant_values.iter().flatten();
        let meant = meant
            .map(move |(value, id)| (format!("issuer[{index}].tenant_values.{value}"), id.clone()));
        listed.chain(meant).collect::<Vec<_>>()
    };
    issuers.iter().enumerate().flat_map(of_one).collect()
}

impl Build<'_> {
    /// A client that names another tenant there gets its own.
    pub(super) fn mind_listeners(&mut self, snapshot: &Snapshot, listeners: &[Listener]) {
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
    pub(super) fn mind_names(&mut self, snapshot: &Snapshot) {
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
        snapshot: &Snapshot,
        named: &[(String, TenantId)],
    ) {
        for (field, _) in named.iter().filter(|(_, id)| snapshot.tenant(id).is_none()) {
            self.warn(field, "names no tenant of the registry as it is now");
        }
    }

    /// Two tenants whose names in tokens differ in their case or in slashes alone: who chooses one
    /// at the issuer, or writes it here, takes it for the other.
    pub(super) fn mind_lookalikes(&mut self, snapshot: &Snapshot) {
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

    /// A transaction can hold what is the whole server's, and only pgsilo's bound on it is not the
    /// session's to lift.
    pub(super) fn mind_shared_servers(&mut self, snapshot: &Snapshot, times: &TimeLimits) {
        let mut servers = BTreeMap::<&ClusterKey, (usize, bool)>::new();
        for tenant in snapshot.tenants() {
            let server = servers.entry(tenant.placement().cluster.key()).or_default();
            server.0 += 1;
            server.1 |= tenant.limits().times(times).transaction.is_none();
        }
        servers.retain(|_, (tenants, unbounded)| *tenants > 1 && *unbounded);
        if let Some((server, (tenants, _))) =
            servers.iter().max_by_key(|(_, (tenants, _))| *tenants)
        {
            let what = format!(
                "not set for every tenant, and tenants share servers ({tenants} share {server}): one \
                 tenant's transaction can hold what all need, for as long as its token lasts"
            );
            self.warn("limits.transaction_timeout", what);
        }
    }

    /// What a tenant's sessions ask and read can be read on the way to its database, and changed.
    pub(super) fn mind_databases_in_clear(&mut self, snapshot: &Snapshot) {
        let in_clear = |tenant: &&Arc<Tenant>| {
            let Cluster { endpoints, tls, .. } = &*tenant.placement().cluster;
            let is_remote =
                |host: &Host| matches!(host, Host::Tcp { host, .. } if !is_loopback(host));
            matches!(tls, PlacementTls::Disable) && endpoints.iter().any(is_remote)
        };
        let count = snapshot.tenants().filter(in_clear).count();
        let first = snapshot.tenants().filter(in_clear).min_by_key(|tenant| tenant.id().as_str());
        if let Some(tenant) = first {
            let what = format!(
                "{count} of its tenants' databases are reached in clear over a network (tenant {:?} at \
                 {}): what passes can be read and changed on the way",
                tenant.id().as_str(),
                tenant.placement().cluster,
            );
            self.warn("registry.file", what);
        }
    }

    /// Of a cluster of several servers, a primary that was overtaken tells nobody.
    pub(super) fn mind_unwatched_clusters(&mut self, snapshot: &Snapshot, is_sessions: bool) {
        let clusters = snapshot.tenants().map(|tenant| Arc::clone(&tenant.placement().cluster));
        let unwatched = clusters
            .filter(|cluster| cluster.has_several() && (is_sessions || cluster.monitor.is_none()));
        if let Some(cluster) = unwatched.min_by_key(|cluster| cluster.key().clone()) {
            let why = match is_sessions {
                true => "[lease] authority is \"session\"",
                false => "it has no monitor",
            };
            let what = format!(
                "the servers of cluster {cluster} are not watched, as {why}: a primary that lives on after \
                 another was promoted keeps its sessions until a login reaches the new one"
            );
            self.warn("registry.file", what);
        }
    }
}
