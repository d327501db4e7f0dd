//! Why a database does not take a login, or a connection is of no use.

use std::io;

use pgsilo_core::timeline::Timeline;
use pgsilo_wire::message::ErrorFields;
use pgsilo_wire::startup::StartupError;

use super::hashing::HashError;
use super::version::ServerVersion;
use crate::lease::FullScope;

/// Why a login to a database failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    #[error("the database closed the connection during login: {0}")]
    Lost(#[from] io::Error),
    #[error("the database broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the leased name or a setting cannot be sent: {0}")]
    Unsendable(#[from] StartupError),
    #[error("the database asked for {0}, which the placement's `auth` does not allow")]
    MethodRefused(&'static str),
    #[error("the database asked for authentication method {0}, which is not supported")]
    MethodUnknown(u32),
    #[error("the database let the session in without a password: its pg_hba.conf says trust")]
    Trusting,
    #[error("the database asked for {0} SCRAM iterations; at most 100000 are done")]
    Iterations(u32),
    #[error(
        "SCRAM cannot be bound to the TLS channel, which the placement's `tls` asks for \
         (channel_binding): {0}"
    )]
    Unbound(&'static str),
    #[error("SCRAM failed: {0}")]
    Scram(io::Error),
    #[error("SCRAM cannot be computed here: {0}")]
    Hashing(#[from] HashError),
    #[error("the database said {sqlstate}: {text}")]
    Said { sqlstate: String, text: String },
    #[error("the database said 53300: {text}")]
    Full { scope: FullScope, text: String },
    #[error("the database refused a startup setting: {sqlstate}: {text}")]
    Setting { sqlstate: String, text: String },
    #[error(
        "PostgreSQL {is} does not keep the role that a leased role is set to become: {needs} is needed"
    )]
    Outdated { is: ServerVersion, needs: ServerVersion },
    #[error("the database has no seal; `ALTER DATABASE ... SET pgsilo.tenant = '{0}'` seals it")]
    Unsealed(String),
    #[error("the server did not answer the login in its share of the time")]
    Silent,
    #[error("the server replays the writes of another, and takes none")]
    Standby,
    #[error("the server replays timeline {on}, which is not known to be the primary's")]
    Behind { on: Timeline },
    #[error("the standby does not let the session in: {0}")]
    OfNoUse(Box<BackendError>),
    #[error("the server takes writes, and another was promoted after it, to timeline {0}")]
    Overtaken(Timeline),
    #[error("the database is sealed for tenant {found:?}, not for {expected}")]
    SealBroken { expected: String, found: String },
}

impl From<ErrorFields> for BackendError {
    fn from(ErrorFields { sqlstate, text, routine }: ErrorFields) -> BackendError {
        match sqlstate.as_str() {
            "53300" => BackendError::Full { scope: full_scope(&routine), text },
            _ => BackendError::Said { sqlstate, text },
        }
    }
}

/// A server with no connection left says so before it looks at the database (`InitProcess` in
/// `proc.c`, `ProcessStartupPacket` where even the processes are used up) or keeps the last ones
/// back (`InitPostgres` in `postinit.c`); limits of a database or a role are looked at elsewhere.
fn full_scope(routine: &str) -> FullScope {
    match routine {
        "InitProcess" | "InitPostgres" | "ProcessStartupPacket" | "BackendInitialize" => {
            FullScope::Server
        }
        _ => FullScope::Tenant,
    }
}

impl BackendError {
    /// Whether the database ended the session because it was idle.
    pub(crate) fn ended_for_idling(&self) -> bool {
        match self {
            BackendError::Said { sqlstate, .. } | BackendError::Setting { sqlstate, .. } => {
                sqlstate == "57P05"
            }
            _ => false,
        }
    }

    /// Whether the server does not know the role, or its password.
    pub(crate) fn is_unknown_role(&self) -> bool {
        matches!(self, BackendError::Said { sqlstate, .. } if sqlstate == "28P01")
    }

    /// Whether it says no more than that another server is the primary.
    pub(crate) fn is_of_another_primary(&self) -> bool {
        matches!(
            self,
            BackendError::Standby | BackendError::OfNoUse(_) | BackendError::Overtaken(_)
        )
    }

    /// Whether another server of the cluster may take the login: this one is not the primary, does
    /// not know the role, which was made at the primary, or is no good.
    pub(crate) fn may_be_the_servers(&self) -> bool {
        match self {
            BackendError::Standby
            | BackendError::Behind { .. }
            | BackendError::OfNoUse(_)
            | BackendError::Overtaken(_)
            | BackendError::Silent
            | BackendError::Lost(_) => true,
            BackendError::Said { sqlstate, .. } => {
                matches!(
                    sqlstate.as_str(),
                    "28000" | "28P01" | "3D000" | "57P03" | "57P01" | "57P02"
                )
            }
            _ => false,
        }
    }

    /// What has no connection left, if that is why.
    pub(crate) fn full_scope(&self) -> Option<FullScope> {
        match self {
            BackendError::Full { scope, .. } => Some(*scope),
            _ => None,
        }
    }
}
