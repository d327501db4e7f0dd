//! What things of a tenant are called where both planes, or a person, look for them.

use crate::tenant::TenantId;

/// The setting by which a tenant's database says whose it is: its seal.
pub const SEAL: &str = "pgsilo.tenant";

/// PostgreSQL cuts longer names, without an error that anybody sees.
const MAX_IDENTIFIER: usize = 63;

const _: () = assert!("tenant_".len() + TenantId::MAX_LENGTH + "_broker".len() == MAX_IDENTIFIER);

/// Names that are made of a tenant's id: of its database, its roles, and what OpenBAO has of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names(TenantId);

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
    pub fn of(id: &TenantId) -> Names {
        Names(id.clone())
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
    fn names_of_the_longest_id_are_not_truncated() {
        let longest = "x".repeat(TenantId::MAX_LENGTH);
        let names = Names::of(&TenantId::parse(&longest).unwrap());
        let roles = [Role::App, Role::ReadOnly, Role::Login, Role::Broker];
        let all = roles.map(|role| names.role(role));
        for name in all.iter().chain([&names.database()]) {
            assert!(name.len() <= MAX_IDENTIFIER && name.contains(&longest), "{name}");
        }
    }
}
