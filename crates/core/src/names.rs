//! What things of a tenant are called where both planes, or a person, look for them.

use crate::tenant::TenantId;

/// The setting by which a tenant's database says whose it is: its seal.
pub const SEAL: &str = "pgsilo.tenant";

/// PostgreSQL cuts longer names, without an error that anybody sees.
const MAX_IDENTIFIER: usize = 63;
/// `tenant_` and the longest suffix, `_broker`.
const MAX_DERIVED: usize = MAX_IDENTIFIER - 14;

/// Names that are made of a tenant's id: of its database, its roles, and what OpenBAO has of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names(TenantId);

/// An id of which no such names can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("names of databases and roles are made of ids of at most {MAX_DERIVED} characters")]
pub struct NamesError;

/// A tenant's roles in PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Owns what the tenant makes; cannot log in.
    App,
    /// May read that; cannot log in.
    ReadOnly,
    /// May connect, nothing else: every leased role is in it.
    Login,
    /// What OpenBAO logs in as, to make and drop leased roles.
    Broker,
}

impl Names {
    /// The names of one tenant's things.
    ///
    /// # Errors
    /// When the id is too long for them.
    pub fn of(id: &TenantId) -> Result<Names, NamesError> {
        match id.as_str().len() <= MAX_DERIVED {
            true => Ok(Names(id.clone())),
            false => Err(NamesError),
        }
    }

    /// Whose they are.
    pub fn id(&self) -> &TenantId {
        &self.0
    }

    /// Its database.
    pub fn database(&self) -> String {
        format!("tenant_{}", self.0)
    }

    /// One of its roles.
    pub fn role(&self, role: Role) -> String {
        let suffix = match role {
            Role::App => "app",
            Role::ReadOnly => "ro",
            Role::Login => "login",
            Role::Broker => "broker",
        };
        format!("tenant_{}_{suffix}", self.0)
    }

    /// Where OpenBAO's database secrets engine for this tenant is mounted. It shares its workers
    /// between mounts: one tenant's revocations that are stuck do not hold another's up.
    pub fn mount(&self) -> String {
        format!("pgsilo/{}", self.0)
    }

    /// The connection to its database, in that engine.
    pub fn connection(&self) -> String {
        format!("tenant-{}", self.0)
    }

    /// The OpenBAO role to lease from: `rw`, `ro`, `migrate`.
    pub fn lease_role(&self, kind: &str) -> String {
        format!("tenant-{}-{kind}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_truncated_are_refused() {
        let names = |length: usize| Names::of(&TenantId::parse(&"x".repeat(length)).unwrap());
        for role in [Role::App, Role::ReadOnly, Role::Login, Role::Broker] {
            assert!(names(MAX_DERIVED).unwrap().role(role).len() <= MAX_IDENTIFIER);
        }
        assert_eq!(names(MAX_DERIVED + 1), Err(NamesError));
    }
}
