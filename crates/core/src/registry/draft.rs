//! A snapshot in the making: what its tenants must agree on.
//!
//! A change costs what it changes: what is not changed is shared with the snapshot before, and
//! looked at through indexes only. Each tenant passes the same rules, in the same order, whether
//! all are new or one.

use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

use super::document::BindingEntry;
use super::entries::Wrong;
use super::{Binding, Cluster, ClusterKey, Host, Placement, Tenant};
use crate::shared_map::SharedMap as Map;
use crate::tenant::{Access, TenantId};
use crate::text::is_loggable;
use crate::tls;

/// What is wrong with one tenant, or with what is said of it.
pub(super) struct Conflict {
    /// Of which field: `id`, `aliases[1]`.
    pub(super) field: String,
    pub(super) what: String,
    /// Where that is so because of another tenant: which one, its field, and the rule.
    pub(super) because: Option<(TenantId, &'static str, &'static str)>,
}

impl From<Wrong> for Conflict {
    fn from(Wrong(field, what): Wrong) -> Conflict {
        Conflict { field: field.to_owned(), what, because: None }
    }
}

fn conflict<T>(field: impl fmt::Display, what: impl Into<String>) -> Result<T, Conflict> {
    Err(Conflict { field: field.to_string(), what: what.into(), because: None })
}

/// Whether a word is the id of a tenant that a source has, acceptable or not: no other's alias takes it.
pub(super) type IsId<'i> = &'i dyn Fn(&str) -> bool;

/// The tenants, and what leads to each.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    pub(super) tenants: Map<TenantId, Arc<Tenant>>,
    /// Those that have names.
    pub(super) clusters: Map<Arc<str>, Arc<Cluster>>,
    /// Of those: whose each server is.
    pub(super) servers: Map<Host, Arc<str>>,
    /// How many tenants are on each server that is in no such cluster.
    pub(super) lone_servers: Map<Host, usize>,
    /// What issuers call tenants instead of their ids. None is the id of a tenant.
    pub(super) aliases: Map<Arc<str>, TenantId>,
    /// By the name of the certificate's holder.
    pub(super) bindings: Map<Arc<str>, Binding>,
    /// Keys of the two maps above, of those who have any.
    words: Map<TenantId, Words>,
    /// Whose each database is.
    pub(super) places: Map<(ClusterKey, Arc<str>), TenantId>,
    /// Whose each seal is that is no tenant's id.
    pub(super) seals: Map<Arc<str>, TenantId>,
    /// Whose each of OpenBAO's roles is. Whether OpenBAO tells capitals from small letters there is
    /// its business.
    pub(super) roles: Map<(Arc<str>, Arc<str>), TenantId>,
    /// How many tenants call their databases so, of names that could be another's id.
    pub(super) names: Map<Arc<str>, usize>,
}

/// What is said of a tenant beside its entry.
#[derive(Clone, Debug, Default)]
struct Words {
    aliases: Vec<Arc<str>>,
    certificates: Vec<Arc<str>>,
}

impl Index {
    /// Takes a tenant away with all that is said of it.
    pub(super) fn remove(&mut self, id: &TenantId) -> Option<Arc<Tenant>> {
        let tenant = self.tenants.get(id).cloned()?;
        self.tenants.remove(id);
        self.places.remove(&place(&tenant));
        if let ClusterKey::Server(host) = tenant.placement.cluster.key() {
            count_down(&mut self.lone_servers, host.clone());
        }
        if let Some(seal) = &tenant.placement.seal
            && self.seals.get(seal) == Some(id)
        {
            self.seals.remove(seal);
        }
        for role in roles(&tenant) {
            // One that was refused for a role of another's has not taken it.
            if self.roles.get(&role) == Some(id) {
                self.roles.remove(&role);
            }
        }
        for name in names(&tenant) {
            count_down(&mut self.names, name.into());
        }
        if let Some(Words { aliases, certificates }) = self.words.get(id).cloned() {
            for alias in &aliases {
                self.aliases.remove(alias);
            }
            for certificate in &certificates {
                self.bindings.remove(certificate);
            }
            self.words.remove(id);
        }
        Some(tenant)
    }

    /// Whether the tenant of this id has all that leads to this one: its place, its roles, its names.
    /// It can be put in its place then.
    pub(super) fn leads_to_the_same(
        &self,
        tenant: &Tenant,
        aliases: &[String],
        bindings: &[BindingEntry],
    ) -> bool {
        let Some(there) = self.tenants.get(&tenant.id) else { return false };
        let bound: Option<Vec<(Arc<str>, Access)>> = bindings
            .iter()
            .filter(|entry| entry.tenant == tenant.id.as_str())
            .map(|entry| Some((entry.certificate.as_str().into(), entry.access.parse().ok()?)))
            .collect();
        let aliases = aliases.iter().map(|alias| alias.as_str().into()).collect();
        there.placement == tenant.placement
            && there.lease == tenant.lease
            && there.database_names == tenant.database_names
            && bound.is_some_and(|bound| {
                bound.len() == bindings.len() && sorted(aliases, bound) == self.said_of(&tenant.id)
            })
    }

    /// Adds a tenant. Ids are unique, and tenants never share a database.
    pub(super) fn add(&mut self, tenant: &Arc<Tenant>) -> Result<(), Conflict> {
        let id = &tenant.id;
        if self.tenants.contains_key(id) {
            let what = format!("{:?} is already the tenant", id.as_str());
            let because = Some((id.clone(), "id", "ids are unique"));
            return Err(Conflict { field: "id".to_owned(), what, because });
        }
        let place = place(tenant);
        if let Some(other) = self.places.get(&place) {
            let Placement { dbname, cluster, .. } = &tenant.placement;
            let what = format!("{dbname:?} on {cluster} is already the database");
            let because = Some((other.clone(), "placement.dbname", "tenants never share one"));
            return Err(Conflict { field: "placement.dbname".to_owned(), what, because });
        }
        self.places.insert(place, id.clone());
        if let ClusterKey::Server(host) = tenant.placement.cluster.key() {
            count_up(&mut self.lone_servers, host.clone());
        }
        for name in names(tenant) {
            count_up(&mut self.names, name.into());
        }
        self.tenants.insert(id.clone(), Arc::clone(tenant));
        Ok(())
    }

    /// A database that says it is one tenant's is not another's. One that says nothing else says its
    /// tenant's id.
    pub(super) fn add_seal(&mut self, tenant: &Tenant, is_id: IsId<'_>) -> Result<(), Conflict> {
        let Some(seal) = &tenant.placement.seal else { return Ok(()) };
        let what = if !is_loggable(seal) {
            "is not one: 1 to 256 characters, none of them controls or marks of direction"
                .to_owned()
        } else if let Some(other) = self.seals.get(seal) {
            format!("is already the seal of {other}; seals are unique")
        } else if self.is_tenant(seal, is_id) {
            "is a tenant's id: leave it out where it is its own, it is never another's".to_owned()
        } else {
            self.seals.insert(Arc::clone(seal), tenant.id.clone());
            return Ok(());
        };
        conflict("placement.seal", format!("{seal:?} {what}"))
    }

    /// The id of a tenant that is new is no seal of those before.
    pub(super) fn check_seals(&self, id: &TenantId) -> Result<(), Conflict> {
        match self.seals.get(id.as_str()) {
            Some(other) => conflict("id", format!("{:?} is the seal of {other}", id.as_str())),
            None => Ok(()),
        }
    }

    /// A cluster that has a name. No server is in two: then two tenants could have one database.
    pub(super) fn add_cluster(
        &mut self,
        name: &Arc<str>,
        cluster: Arc<Cluster>,
    ) -> Result<(), Conflict> {
        if self.clusters.contains_key(name) {
            return conflict("name", format!("{name:?} is already one; names are unique"));
        }
        for (number, host) in cluster.endpoints.iter().enumerate() {
            let host = host.comparable();
            let what = match self.servers.get(&host) {
                Some(other) if other == name => format!("{host} is listed twice"),
                Some(other) => {
                    format!("{host} is a server of cluster {other:?}; no server is in two")
                }
                None if self.lone_servers.contains_key(&host) => {
                    format!(
                        "{host} is the server of tenants that do not say that it is in a cluster"
                    )
                }
                None => {
                    self.servers.insert(host, Arc::clone(name));
                    continue;
                }
            };
            self.remove_servers(name, &cluster);
            return conflict(format_args!("endpoints[{number}]"), what);
        }
        self.clusters.insert(Arc::clone(name), cluster);
        Ok(())
    }

    pub(super) fn remove_cluster(&mut self, name: &str) {
        if let Some(cluster) = self.clusters.remove(name) {
            self.remove_servers(name, &cluster);
        }
    }

    fn remove_servers(&mut self, name: &str, cluster: &Cluster) {
        for host in cluster.endpoints.iter().map(Host::comparable) {
            if self.servers.get(&host).is_some_and(|of| **of == *name) {
                self.servers.remove(&host);
            }
        }
    }

    /// A server of a cluster is reached by the cluster's name only.
    pub(super) fn check_server(&self, tenant: &Tenant) -> Result<(), Conflict> {
        let ClusterKey::Server(host) = tenant.placement.cluster.key() else { return Ok(()) };
        match self.servers.get(host) {
            Some(name) => conflict(
                "placement",
                format!("{host} is a server of cluster {name:?}; write cluster = {name:?} instead"),
            ),
            None => Ok(()),
        }
    }

    /// A tenant's id always means it (`route.rs`), so as another's further name it would mean
    /// nothing to a token for both. What a database is called where it stands is not the registry's
    /// to choose.
    pub(super) fn check_names(&self, tenant: &Tenant, is_id: IsId<'_>) -> Result<(), Conflict> {
        let another = |name: &&str| self.is_tenant(name, is_id);
        match names(tenant).find(another) {
            Some(name) => conflict("database_names", format!("{name:?} is another tenant's id")),
            None => Ok(()),
        }
    }

    /// The same, from the other side: the id of a tenant that is new is no name of those before.
    pub(super) fn check_id(&self, id: &TenantId) -> Result<(), Conflict> {
        match self.names.contains_key(id.as_str()) {
            true => conflict(
                "id",
                format!("{:?} is what another tenant calls its database", id.as_str()),
            ),
            false => Ok(()),
        }
    }

    /// A word in a token means one tenant: so an alias is that of one, and the id of none, be it its
    /// own.
    pub(super) fn add_aliases(
        &mut self,
        owner: &TenantId,
        listed: Vec<String>,
        is_id: IsId<'_>,
    ) -> Result<(), Conflict> {
        for (number, alias) in listed.into_iter().enumerate() {
            let what = if !is_loggable(&alias) {
                "is not one: 1 to 256 characters, none of them controls or marks of direction"
                    .to_owned()
            } else if self.is_tenant(&alias, is_id) {
                "is a tenant's id, which means that tenant".to_owned()
            } else if let Some(other) = self.aliases.get(&*alias) {
                format!("is already an alias of {other}; aliases are unique")
            } else {
                let alias: Arc<str> = alias.into();
                self.aliases.insert(Arc::clone(&alias), owner.clone());
                self.words_of(owner, |words| words.aliases.push(alias));
                continue;
            };
            return conflict(format_args!("aliases[{number}]"), format!("{alias:?} {what}"));
        }
        Ok(())
    }

    /// The id of a tenant that is new is no alias of those before.
    pub(super) fn check_aliases(&self, id: &TenantId) -> Result<(), Conflict> {
        match self.aliases.get(id.as_str()) {
            Some(other) => conflict("id", format!("{:?} is an alias of {other}", id.as_str())),
            None => Ok(()),
        }
    }

    /// Several tenants may have one mount, and none has the roles of another: a credential for one
    /// would be one for the other.
    pub(super) fn add_roles(&mut self, tenant: &Tenant) -> Result<(), Conflict> {
        for access in Access::ALL {
            let Some(role) = tenant.lease.of(access) else { continue };
            let key = role_key(tenant, role);
            match self.roles.get(&key) {
                Some(owner) if *owner != tenant.id => {
                    let (mount, owner) = (&tenant.lease.mount, owner.as_str());
                    let what = format!(
                        "{role:?} of {mount:?} is tenant {owner:?}'s; tenants never share a role"
                    );
                    return conflict(format_args!("lease.roles.{access}"), what);
                }
                Some(_) => {}
                None => {
                    self.roles.insert(key, tenant.id.clone());
                }
            }
        }
        Ok(())
    }

    /// Each holder has one tenant, which is there.
    pub(super) fn bind(&mut self, entry: BindingEntry) -> Result<(), Conflict> {
        let BindingEntry { certificate, tenant, access } = entry;
        if !tls::Holder::may_be_named(&certificate) {
            return conflict(
                "certificate",
                format!("{certificate:?} is not a URI, nor \"dns:\" and a host in lower case"),
            );
        }
        let Some(tenant) = TenantId::parse(&tenant).ok().filter(|id| self.tenants.contains_key(id))
        else {
            return conflict("tenant", format!("{tenant:?} is not a tenant of this registry"));
        };
        let access = match access.parse() {
            Ok(access) => access,
            Err(error) => return conflict("access", format!("{access:?} is not one: {error}")),
        };
        if self.bindings.contains_key(&*certificate) {
            return conflict(
                "certificate",
                format!("{certificate:?} is bound already; one certificate is for one tenant"),
            );
        }
        let certificate: Arc<str> = certificate.into();
        self.words_of(&tenant, |words| words.certificates.push(Arc::clone(&certificate)));
        self.bindings.insert(certificate, Binding { tenant, access });
        Ok(())
    }

    /// Whether it is a tenant's id: of one that is here, or of one that the source has.
    fn is_tenant(&self, word: &str, is_id: IsId<'_>) -> bool {
        TenantId::parse(word).is_ok_and(|id| self.tenants.contains_key(&id)) || is_id(word)
    }

    fn words_of(&mut self, id: &TenantId, change: impl FnOnce(&mut Words)) {
        let mut words = self.words.get(id).cloned().unwrap_or_default();
        change(&mut words);
        self.words.insert(id.clone(), words);
    }

    /// Whether both say the same of a tenant beside its entry.
    pub(super) fn says_the_same(&self, other: &Index, id: &TenantId) -> bool {
        self.said_of(id) == other.said_of(id)
    }

    fn said_of(&self, id: &TenantId) -> Said {
        let Words { aliases, certificates } = self.words.get(id).cloned().unwrap_or_default();
        let bound = certificates.into_iter().filter_map(|certificate| {
            let access = self.bindings.get(&certificate)?.access;
            Some((certificate, access))
        });
        sorted(aliases, bound.collect())
    }
}

/// Aliases, and what certificates may, in one order.
type Said = (Vec<Arc<str>>, Vec<(Arc<str>, Access)>);

fn sorted(mut aliases: Vec<Arc<str>>, mut bound: Vec<(Arc<str>, Access)>) -> Said {
    aliases.sort();
    bound.sort_by(|(one, _), (other, _)| one.cmp(other));
    (aliases, bound)
}

fn count_up<K: Clone + Eq + Hash>(counts: &mut Map<K, usize>, key: K) {
    let count = counts.get(&key).copied().unwrap_or_default();
    counts.insert(key, count + 1);
}

fn count_down<K: Clone + Eq + Hash>(counts: &mut Map<K, usize>, key: K) {
    match counts.get(&key).copied().unwrap_or_default() {
        0 | 1 => {
            counts.remove(&key);
        }
        count => {
            counts.insert(key, count - 1);
        }
    }
}

fn place(tenant: &Tenant) -> (ClusterKey, Arc<str>) {
    (tenant.placement.cluster.key.clone(), Arc::clone(&tenant.placement.dbname))
}

fn role_key(tenant: &Tenant, role: &Arc<str>) -> (Arc<str>, Arc<str>) {
    let has_capitals = role.bytes().any(|byte| byte.is_ascii_uppercase());
    let folded = if has_capitals { role.to_ascii_lowercase().into() } else { Arc::clone(role) };
    (Arc::clone(&tenant.lease.mount), folded)
}

fn roles(tenant: &Tenant) -> impl Iterator<Item = (Arc<str>, Arc<str>)> {
    let roles = Access::ALL.into_iter().filter_map(|access| tenant.lease.of(access));
    roles.map(|role| role_key(tenant, role))
}

/// What it calls its database, of what could be another's id.
fn names(tenant: &Tenant) -> impl Iterator<Item = &str> {
    let names = tenant.database_names.iter().map(String::as_str);
    names.filter(|name| *name != tenant.id.as_str() && TenantId::parse(name).is_ok())
}
