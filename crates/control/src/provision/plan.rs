//! What a tenant is to be: settled once, before anything is made, and kept in the registry's journal until
//! all of it is there.

use std::io;

use clap::ValueEnum;
use pgsilo_core::names::Names;
use pgsilo_core::secret::random_hex;
use pgsilo_core::tenant::TenantId;
use serde::{Deserialize, Serialize};

/// A tenant as it is to be. Nothing of it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What tokens call it.
    pub id: TenantId,
    /// What PostgreSQL calls it.
    pub name: TenantId,
    /// For people.
    pub display_name: Option<String>,
    /// What else issuers call it.
    pub aliases: Vec<String>,
    /// Where it may live; `None`: anywhere.
    pub regions: Option<Vec<String>>,
    /// Where it is made.
    pub cluster: String,
    /// What its database says of itself.
    pub seal: String,
    /// The database that its own is a copy of.
    pub template: String,
    /// Connections to its database, those of its broker included.
    pub connections: u16,
    /// What its sessions may use of what is the whole cluster's; `None`: as it is.
    pub allow: Option<Vec<Allowance>>,
    /// Who makes the verifiers of its leased passwords.
    pub lease_hashing: LeaseHashing,
    /// Whether its database and its roles were there before.
    pub is_prepared: bool,
}

impl Plan {
    /// What its things are called.
    pub fn names(&self) -> Names {
        Names::called(&self.id, &self.name)
    }
}

/// A name that says nothing: 64 random bits.
pub fn opaque_name() -> io::Result<TenantId> {
    let text = random_hex::<8>()?;
    TenantId::parse(&text).map_err(io::Error::other)
}

/// A seal that nobody guesses: 128 random bits.
pub fn random_seal() -> io::Result<String> {
    random_hex::<16>()
}

/// What the template takes from everybody, and a tenant that writes may be given: applications need
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allowance {
    /// `pg_advisory_lock` and its kin, as migrations of many frameworks use them.
    AdvisoryLocks,
    /// `lo_create` and its kin.
    LargeObjects,
    /// `pg_logical_emit_message`.
    LogicalMessages,
}

impl Allowance {
    pub(super) const ALL: [Allowance; 3] =
        [Allowance::AdvisoryLocks, Allowance::LargeObjects, Allowance::LogicalMessages];

    /// Names of functions, as a regular expression.
    pub(super) fn functions(self) -> &'static str {
        match self {
            Allowance::AdvisoryLocks => "^pg_(try_)?advisory_(xact_)?lock",
            Allowance::LargeObjects => "^lo_(creat|create|from_bytea)$",
            Allowance::LogicalMessages => "^pg_logical_emit_message$",
        }
    }
}

/// Who makes the SCRAM verifier of a leased password.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseHashing {
    /// OpenBAO, in 4096 iterations: no password is ever in a statement.
    #[default]
    Openbao,
    /// PostgreSQL, in one iteration: two to three times as fast, and as safe, because the passwords are random. They
    /// are in statements then, which are kept out of the server's log.
    Postgres,
}
