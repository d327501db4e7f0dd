//! THE table of endings: every way an established session ends.
//!
//! Endings that the client is told of are one FATAL ErrorResponse at a server-message boundary.
//! They all say "terminating connection" where PostgreSQL would: client code matches the words.
//! None is 0A000: HikariCP evicts on it.

use pgsilo_wire::message;
use tracing::Level;

macro_rules! endings {
    ($($(#[$doc:meta])+ $ending:ident, $label:literal, $level:ident, $told:expr;)+) => {
        /// Why an established session ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Ending { $($(#[$doc])+ $ending,)+ }

        impl Ending {
            /// Every ending.
            pub const ALL: &[Ending] = &[$(Ending::$ending,)+];

            /// The `ending` label of `pgsilo_endings_total`, and of the audit event.
            pub fn label(self) -> &'static str {
                match self { $(Ending::$ending => $label,)+ }
            }

            /// How loud the audit event is.
            pub fn level(self) -> Level {
                match self { $(Ending::$ending => Level::$level,)+ }
            }

            /// The SQLSTATE and the text that the client gets; `None` where there is no client to
            /// tell, or the database has told.
            pub fn told(self) -> Option<(&'static str, &'static str)> {
                match self { $(Ending::$ending => $told,)+ }
            }
        }
    };
}

endings! {
    /// The client terminated or closed its connection; then its query was cancelled.
    ClientLeft, "client_left", INFO, None;
    /// The client's connection broke.
    ClientLost, "client_lost", INFO, None;
    /// The database closed the session, and had said why if it was not asked to.
    BackendLeft, "backend_left", INFO, None;
    /// The database's side broke without a word.
    BackendLost, "backend_lost", WARN,
        Some(("08006", "server closed the connection unexpectedly"));
    /// Neither side had sent anything for the time allowed.
    IdleTimeout, "idle_timeout", INFO,
        Some(("57P05", "terminating connection due to idle-session timeout"));
    /// The client was in a transaction, and asked for nothing for the time allowed.
    IdleInTransaction, "idle_in_transaction", INFO,
        Some(("25P03", "terminating connection due to idle-in-transaction timeout"));
    /// A transaction, or a request, took longer than it may.
    TransactionTimeout, "transaction_timeout", WARN,
        Some(("25P04", "terminating connection due to transaction timeout"));
    /// The session is as old as one may become.
    SessionAge, "session_age", INFO,
        Some(("57P01", "terminating connection because it has reached its maximum age"));
    /// The session token's time is over.
    TokenExpired, "token_expired", INFO,
        Some(("57P01", "terminating connection because its session token expired"));
    /// The client certificate's time is over.
    CertificateExpired, "certificate_expired", INFO,
        Some(("57P01", "terminating connection because its client certificate expired"));
    /// The token, its subject or the certificate was put on the list of those denied.
    IdentityRevoked, "identity_revoked", WARN,
        Some(("57P01", "terminating connection because its identity has been revoked"));
    /// The registry has come to have a lock on the tenant, the identity or the client's address.
    AccessLocked, "access_locked", WARN,
        Some(("57P01", "terminating connection because access is locked"));
    /// The registry's grant has lapsed or was withdrawn.
    GrantWithdrawn, "grant_withdrawn", WARN,
        Some(("57P01", "terminating connection because its grant has ended"));
    /// The listener no longer believes the authority that certified the client.
    AuthorityWithdrawn, "authority_withdrawn", WARN,
        Some(("57P01", "terminating connection because its client certificate is no longer trusted"));
    /// The credential's time is over, and it cannot be renewed any more.
    LeaseEnded, "lease_ended", INFO,
        Some(("57P01", "terminating connection because its database credential expired"));
    /// Another server of the database's cluster has become its primary.
    FailedOver, "failed_over", WARN,
        Some(("57P01", "terminating connection because the database has failed over"));
    /// The registry no longer serves the tenant: suspended, removed, or placed elsewhere.
    TenantWithdrawn, "tenant_withdrawn", WARN,
        Some(("57P01", "terminating connection due to administrator command"));
    /// The registry says that the tenant is paused.
    TenantPaused, "tenant_paused", INFO,
        Some(("57P01", "terminating connection because the tenant is paused"));
    /// The registry could not be read for so long that no session may go on.
    RegistryStale, "registry_stale", WARN,
        Some(("57P01", "terminating connection because the tenant registry is out of date"));
    /// pgsilo is stopping.
    Drained, "drained", INFO,
        Some(("57P01", "terminating connection due to administrator command"));
}

impl Ending {
    /// The ErrorResponse for the client, if it is to be told.
    pub fn message(self, session: impl std::fmt::Display) -> Option<Vec<u8>> {
        let (sqlstate, text) = self.told()?;
        Some(message::fatal(sqlstate, text, Some(&format!("Session {session}.")), None))
    }
}
