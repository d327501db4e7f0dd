//! Which of its tenants a session is for: a pure decision over what was proved, what the client
//! stated, and what the registry knows of the proved tenants.
//!
//! What a client states selects nothing by itself. It has to agree: a name that belongs to none of
//! the session's own tenants is refused, whosever it may be. One that is the id of one of them means
//! that one, whatever others call their databases; other names choose only where they are of exactly
//! one. Only the session's own tenants are
//! looked up, so no answer tells of another's existence. Called by the Routed stage; the
//! configuration makes [`DatabaseNames`].

use pgsilo_core::registry::Snapshot;
use pgsilo_core::tenant::TenantId;

/// Names of databases that a listener takes for no name at all, beside the user's: what tools open
/// first, or what an application cannot be told to change. The id of one of a session's own tenants
/// is a name all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseNames {
    /// These.
    Only(Vec<String>),
    /// Every name.
    Any,
}

impl Default for DatabaseNames {
    fn default() -> DatabaseNames {
        DatabaseNames::Only(Vec::new())
    }
}

impl DatabaseNames {
    fn contains(&self, name: &[u8]) -> bool {
        match self {
            DatabaseNames::Only(names) => names.iter().any(|allowed| allowed.as_bytes() == name),
            DatabaseNames::Any => true,
        }
    }
}

/// What a client states about its target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stated<'a> {
    /// The database of its startup packet. An empty one is none, as in PostgreSQL.
    pub(crate) database: Option<&'a [u8]>,
    /// Its user: the database's name where there is none, so one that equals it says nothing.
    pub(crate) user: &'a [u8],
    /// The tenant's part of the host in its TLS handshake, where the listener has a suffix for it.
    pub(crate) host: Option<&'a str>,
}

/// Why there is no one tenant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    /// Nothing was proved.
    #[error("the identity has no tenant")]
    NoTenant,
    /// Several are possible.
    #[error("the identity has {tenants} tenants, and what the client states does not say which")]
    Ambiguous {
        /// How many.
        tenants: usize,
        /// The database named is the id of one of them, and the user's name.
        as_user: bool,
    },
    /// The database stated is none of theirs.
    #[error("the database named belongs to none of: {}", listed(tenants))]
    DatabaseUnknown {
        /// What the client called it.
        named: String,
        /// Whose it could be.
        tenants: Vec<TenantId>,
    },
    /// The host stated is none of theirs.
    #[error("the host named in TLS belongs to none of: {}", listed(tenants))]
    HostUnknown {
        /// The tenant's part of its name.
        named: String,
        /// Whose it could be.
        tenants: Vec<TenantId>,
    },
}

/// A cause has room for a few.
fn listed(tenants: &[TenantId]) -> String {
    const FEW: usize = 5;
    let mut text: Vec<_> = tenants.iter().take(FEW).map(TenantId::as_str).collect();
    if tenants.len() > FEW {
        text.push("...");
    }
    text.join(", ")
}

/// The one of `tenants` that a session is for.
///
/// # Errors
/// When what the client states agrees with none of them, or with more than one.
pub(crate) fn choose<'t>(
    tenants: &'t [TenantId],
    stated: &Stated<'_>,
    allowed: &DatabaseNames,
    registry: &Snapshot,
) -> Result<&'t TenantId, RouteError> {
    let possible = match stated.host {
        None => tenants,
        Some(host) => match tenants.iter().find(|id| id.as_str() == host) {
            Some(id) => std::slice::from_ref(id),
            None => {
                let (named, tenants) = (host.to_owned(), tenants.to_vec());
                return Err(RouteError::HostUnknown { named, tenants });
            }
        },
    };
    let is_an_id = |name: &[u8]| tenants.iter().any(|id| id.as_str().as_bytes() == name);
    let says = |name: &&[u8]| {
        !name.is_empty() && *name != stated.user && (is_an_id(name) || !allowed.contains(name))
    };
    let named = stated.database.filter(says);
    if let Some(id) = possible.iter().find(|id| Some(id.as_str().as_bytes()) == named) {
        return Ok(id);
    }
    let agrees = |id: &&TenantId| named.is_none_or(|name| is_another_name(name, id, registry));
    let mut agreeing = possible.iter().filter(agrees);
    match (agreeing.next(), agreeing.next(), named) {
        (Some(one), None, _) => Ok(one),
        (Some(_), Some(_), _) => {
            let as_user = stated.database == Some(stated.user) && is_an_id(stated.user);
            Err(RouteError::Ambiguous { tenants: tenants.len(), as_user })
        }
        (None, _, Some(name)) => {
            let (named, tenants) = (String::from_utf8_lossy(name).into(), possible.to_vec());
            Err(RouteError::DatabaseUnknown { named, tenants })
        }
        (None, _, None) => Err(RouteError::NoTenant),
    }
}

/// Its database, or a name that the registry lists for it.
fn is_another_name(name: &[u8], id: &TenantId, registry: &Snapshot) -> bool {
    registry.tenant(id).is_some_and(|tenant| {
        let listed = tenant.database_names().iter().map(String::as_str);
        listed.chain([&*tenant.placement().dbname]).any(|own| own.as_bytes() == name)
    })
}

#[cfg(test)]
mod tests;
