//! THE table of refusals: every way a connection is turned away before its splice.
//!
//! One reason has one SQLSTATE, one metrics label, one log level and one text. Texts go to the
//! client from this table only; the cause goes to the log and the audit event only. Parts have
//! small errors of their own and know nothing of SQLSTATE: the conversions at the end of this
//! file turn each into a reason, exhaustively. Only the session's stages make refusals, and
//! only `session.rs` sends one.

use std::fmt::Display;

use pgsilo_wire::message;
use pgsilo_wire::startup::StartupError;
use tracing::Level;

use crate::audit::Told;
use crate::backend::{BackendError, DialError};
use crate::lease::{DatabaseFault, LeaseError};
use crate::route::{Closed, RouteError};
use crate::token::{Rejected, SourceError, TokenError};

macro_rules! reasons {
    ($($(#[$doc:meta])+ $reason:ident, $sqlstate:literal, $label:literal, $level:ident, $text:literal;)+) => {
        /// Why a connection is refused. `{}` in a text stands for what the refusal is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])+ $reason,)+ }

        impl Reason {
            /// Every reason, in the order of a login.
            pub const ALL: &[Reason] = &[$(Reason::$reason,)+];

            /// The SQLSTATE that the client gets.
            pub fn sqlstate(self) -> &'static str {
                match self { $(Reason::$reason => $sqlstate,)+ }
            }

            /// The `reason` label of `pgsilo_refusals_total`, and of the audit event.
            pub fn label(self) -> &'static str {
                match self { $(Reason::$reason => $label,)+ }
            }

            /// How loud the audit event is.
            pub fn level(self) -> Level {
                match self { $(Reason::$reason => Level::$level,)+ }
            }

            fn text(self) -> &'static str {
                match self { $(Reason::$reason => $text,)+ }
            }
        }
    };
}

reasons! {
    /// The first packet is not one that PostgreSQL would take.
    StartupMalformed, "08P01", "startup_malformed", INFO, "invalid startup packet";
    /// A major protocol version other than 3.
    ProtocolUnsupported, "0A000", "protocol_unsupported", INFO,
        "unsupported frontend protocol {}: server supports 3.0 to 3.2";
    /// No user in the startup packet, as PostgreSQL has it.
    UserMissing, "28000", "user_missing", INFO, "no user name specified in startup packet";
    /// Physical replication streams the whole cluster, so every tenant.
    ReplicationRefused, "0A000", "replication_refused", WARN,
        "replication connections are not supported";
    /// A session in clear where TLS is required; said before a token is asked for.
    TlsRequired, "28000", "tls_required", INFO, "TLS is required";
    /// SIGTERM came; said before a token is asked for.
    ShuttingDown, "57P03", "shutting_down", INFO, "the proxy is shutting down";
    /// A bound on connections or sessions is reached.
    TooManyConnections, "53300", "too_many_connections", WARN, "too many connections{}";
    /// The one deadline from accept to login has passed.
    LoginTimeout, "57014", "login_timeout", INFO, "canceling authentication due to timeout";
    /// The process at the other end of the Unix socket is not one that may be there.
    PeerForbidden, "28000", "peer_forbidden", WARN, "peer authentication failed";
    /// A listener that wants a certificate got none, or one that names nobody.
    CertificateMissing, "28000", "certificate_missing", INFO,
        "connection requires a valid client certificate";
    /// The registry binds the certificate's holder to no tenant.
    CertificateUnbound, "28000", "certificate_unbound", WARN,
        "the client certificate is bound to no tenant";
    /// A sidecar's token cannot be read.
    TokenUnavailable, "57P03", "token_unavailable", ERROR,
        "the session token is not available at the moment";
    /// The password is empty.
    TokenMissing, "28P01", "token_missing", INFO, "session token authentication failed";
    /// The password is not a token that verifies.
    TokenInvalid, "28P01", "token_invalid", WARN, "session token authentication failed";
    /// The token was good once.
    TokenExpired, "28P01", "token_expired", INFO, "session token has expired";
    /// The keys of the issuer that the token names were not fetched, or too long ago, or the key that it
    /// names may be a new one that cannot be fetched: another attempt may succeed.
    KeysUnavailable, "57P03", "keys_unavailable", ERROR,
        "session tokens cannot be verified at the moment";
    /// The token is for whoever holds a certificate, which this client did not show.
    TokenUnbound, "28P01", "token_unbound", WARN,
        "the session token is bound to another client certificate";
    /// The token, its subject or the certificate is on the list of those denied.
    IdentityRevoked, "28P01", "identity_revoked", WARN, "the identity shown has been revoked";
    /// No tenant claim, or several tenants and none chosen.
    TenantUnresolved, "28000", "tenant_unresolved", WARN,
        "the session token does not resolve to one tenant";
    /// The token asks for a tenant or an access that its issuer may not grant or that it does not
    /// name clearly, or the tenant has no role for the access.
    TenantForbidden, "28000", "tenant_forbidden", WARN,
        "the session token does not allow this tenant or access";
    /// The client named a database or a host that belongs to none of its own tenants; PostgreSQL's
    /// words, the same whether it is another tenant's or nobody's.
    DatabaseUnknown, "3D000", "database_unknown", WARN, "database \"{}\" does not exist";
    /// The claim names a tenant that the registry does not know.
    TenantUnknown, "3D000", "tenant_unknown", WARN, "tenant \"{}\" does not exist";
    /// Like a revoked CONNECT; not 55000, which Npgsql retries.
    TenantSuspended, "42501", "tenant_suspended", INFO, "tenant \"{}\" is suspended";
    /// Migrating or restoring: transient, libpq tries the next host.
    TenantPaused, "57P03", "tenant_paused", INFO, "tenant \"{}\" is paused for a moment";
    /// The placement's region is not one that this proxy may serve.
    ResidencyRefused, "42501", "residency_refused", WARN,
        "tenant \"{}\" may not be served from here";
    /// The registry's snapshot is older than allowed.
    RegistryStale, "57P03", "registry_stale", ERROR, "the tenant registry is out of date";
    /// Events cannot be written, and the operator wants no session without its events.
    AuditUnavailable, "57P03", "audit_unavailable", ERROR,
        "sessions cannot be audited at the moment";
    /// OpenBAO unreachable, sealed or overloaded: another attempt may succeed.
    LeaseUnavailable, "57P03", "lease_unavailable", ERROR,
        "database credentials are not available at the moment";
    /// OpenBAO gets no connection to the tenant's database, where it would make the credential: another
    /// attempt may succeed.
    LeaseBackendAway, "57P03", "lease_backend_away", ERROR,
        "the tenant's database is not available at the moment";
    /// OpenBAO says no, or the database refuses it: a policy, a role or its statements are wrong, an
    /// operator must act.
    LeaseDenied, "58000", "lease_denied", ERROR, "database credentials were denied";
    /// No connection to the tenant's database, or no TLS with it.
    BackendUnreachable, "08001", "backend_unreachable", ERROR,
        "could not connect to the tenant's database";
    /// The database's own 53300, its words kept back.
    BackendFull, "53300", "backend_full", WARN, "the tenant's database has too many connections";
    /// The database's own 57P03, its words kept back.
    BackendNotReady, "57P03", "backend_not_ready", WARN,
        "the tenant's database is not accepting connections";
    /// The database refused a setting of the client's startup packet; its words are of nothing
    /// but that, so the client reads them.
    SettingRejected, "22023", "setting_rejected", INFO, "{}";
    /// The database refused the lease. Its 28xxx is not relayed: the client would blame its token.
    BackendRejected, "58000", "backend_rejected", ERROR,
        "the tenant's database did not accept the session";
    /// The database is not the tenant's: a misroute. The loudest event there is.
    SealBroken, "XX000", "seal_broken", ERROR, "the database reached is not the tenant's";
    /// A fault of pgsilo or of its machine.
    Internal, "XX000", "internal", ERROR, "internal error";
}

/// A reason, what it is about, and the cause that only operators read.
#[derive(Debug)]
pub struct Refusal {
    reason: Reason,
    about: String,
    detail: Option<String>,
    hint: Option<&'static str>,
    cause: String,
}

impl Refusal {
    /// A refusal whose cause goes to the log, never to the client.
    pub(crate) fn new(reason: Reason, cause: impl Display) -> Refusal {
        let cause = cause.to_string();
        Refusal { reason, about: String::new(), detail: None, hint: None, cause }
    }

    /// What stands for `{}` in the reason's text. It must be something the client may know.
    pub(crate) fn about(mut self, about: impl Display) -> Refusal {
        self.about = about.to_string();
        self
    }

    /// A DETAIL for the client, beside the session's id.
    pub(crate) fn detail(mut self, detail: impl Display) -> Refusal {
        self.detail = Some(detail.to_string());
        self
    }

    /// A HINT for the client.
    pub(crate) fn hint(mut self, hint: &'static str) -> Refusal {
        self.hint = Some(hint);
        self
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// For the log and the audit event only.
    pub fn cause(&self) -> &str {
        &self.cause
    }

    /// For the audit event.
    pub(crate) fn told(&self) -> Told<'_> {
        let reason = self.reason;
        let (level, sqlstate) = (reason.level(), reason.sqlstate());
        Told { level, reason: reason.label(), sqlstate, cause: &self.cause }
    }

    /// The ErrorResponse. Its DETAIL ends with the session's id, for an operator to find the event.
    pub fn message(&self, session: impl Display) -> Vec<u8> {
        let text = self.reason.text().replace("{}", &self.about);
        let detail = match &self.detail {
            Some(detail) => format!("{detail} Session {session}."),
            None => format!("Session {session}."),
        };
        message::fatal(self.reason.sqlstate(), &text, Some(&detail), self.hint)
    }
}

impl From<StartupError> for Refusal {
    fn from(error: StartupError) -> Refusal {
        match &error {
            StartupError::Length(_) | StartupError::Cancel(_) | StartupError::Layout => {
                Refusal::new(Reason::StartupMalformed, error)
            }
            StartupError::NoUser => Refusal::new(Reason::UserMissing, error),
            StartupError::Version(version) => {
                Refusal::new(Reason::ProtocolUnsupported, &error).about(version)
            }
        }
    }
}

impl From<Rejected> for Refusal {
    fn from(rejected: Rejected) -> Refusal {
        let reason = match &rejected.error {
            TokenError::Missing => Reason::TokenMissing,
            TokenError::Expired { .. } => Reason::TokenExpired,
            TokenError::KeysUnavailable | TokenError::KeyUnchecked => Reason::KeysUnavailable,
            TokenError::TenantAbsent | TokenError::TenantMalformed => Reason::TenantUnresolved,
            TokenError::AccessUnknown
            | TokenError::AccessAbsent
            | TokenError::AccessBeyond { .. }
            | TokenError::TenantBeyond => Reason::TenantForbidden,
            TokenError::Malformed
            | TokenError::HeaderRefused { .. }
            | TokenError::AlgorithmRefused
            | TokenError::IssuerUnknown
            | TokenError::KeyUnknown
            | TokenError::SignatureInvalid
            | TokenError::AudienceWrong
            | TokenError::NotYetValid
            | TokenError::LifetimeBeyond { .. }
            | TokenError::ClaimInvalid { .. } => Reason::TokenInvalid,
        };
        let refusal = Refusal::new(reason, &rejected);
        match rejected.error {
            TokenError::Expired { since } if rejected.verified => refusal
                .detail(format_args!("The token expired {} s ago.", since.as_secs()))
                .hint("Get a new token and connect again."),
            _ => refusal,
        }
    }
}

impl From<SourceError> for Refusal {
    fn from(error: SourceError) -> Refusal {
        match &error {
            SourceError::File { .. }
            | SourceError::Command { .. }
            | SourceError::Failed { .. }
            | SourceError::Late(_)
            | SourceError::Shared(_)
            | SourceError::TooLong => Refusal::new(Reason::TokenUnavailable, error),
        }
    }
}

impl From<RouteError> for Refusal {
    fn from(error: RouteError) -> Refusal {
        const CHOOSE: &str = "Name the tenant as the database.";
        const NOT_AS_USER: &str = "Name the tenant as the database, and not as the user as well.";
        match &error {
            RouteError::NoTenant => Refusal::new(Reason::TenantUnresolved, error),
            RouteError::Ambiguous { as_user, .. } => {
                let hint = if *as_user { NOT_AS_USER } else { CHOOSE };
                Refusal::new(Reason::TenantUnresolved, error).hint(hint)
            }
            RouteError::DatabaseUnknown { named, .. } => {
                Refusal::new(Reason::DatabaseUnknown, &error).about(named).hint(CHOOSE)
            }
            RouteError::HostUnknown { named, .. } => Refusal::new(Reason::DatabaseUnknown, &error)
                .about(named)
                .hint("Connect to the tenant's own host."),
            RouteError::Token(rejected) => rejected.clone().into(),
            RouteError::Unbound { .. } => Refusal::new(Reason::CertificateUnbound, error),
            RouteError::Closed { tenant, why, .. } => {
                let (reason, about): (_, &dyn Display) = match why {
                    Closed::Unknown => (Reason::TenantUnknown, tenant),
                    Closed::Suspended => (Reason::TenantSuspended, tenant),
                    Closed::Paused => (Reason::TenantPaused, tenant),
                    Closed::OtherRegion | Closed::NoRegion => (Reason::ResidencyRefused, tenant),
                    Closed::NoRole(_) => (Reason::TenantForbidden, tenant),
                    Closed::SettingsTooLong { .. } => (Reason::SettingRejected, &error),
                };
                Refusal::new(reason, &error).about(about)
            }
        }
    }
}

impl From<LeaseError> for Refusal {
    fn from(error: LeaseError) -> Refusal {
        let reason = match error.at_bottom() {
            LeaseError::Unavailable(_)
            | LeaseError::NotLoggedIn(_)
            | LeaseError::Crowded
            | LeaseError::Held(_)
            | LeaseError::Unrevoked(_)
            | LeaseError::Abandoned => Reason::LeaseUnavailable,
            LeaseError::Database { fault, .. } => match fault {
                DatabaseFault::Away => Reason::LeaseBackendAway,
                DatabaseFault::NotReady => Reason::BackendNotReady,
                DatabaseFault::Full(_) => Reason::BackendFull,
                DatabaseFault::Refused => Reason::LeaseDenied,
            },
            LeaseError::Denied(_) | LeaseError::NoRole(_) => Reason::LeaseDenied,
            LeaseError::Shared(_) => Reason::Internal,
        };
        Refusal::new(reason, error)
    }
}

impl From<DialError> for Refusal {
    fn from(error: DialError) -> Refusal {
        let reason = match &error {
            DialError::Local(_) => Reason::Internal,
            DialError::Connect { .. }
            | DialError::Timeout(_)
            | DialError::NoTls(_)
            | DialError::NotPostgres { .. }
            | DialError::Tls { .. } => Reason::BackendUnreachable,
        };
        Refusal::new(reason, error)
    }
}

impl From<BackendError> for Refusal {
    fn from(error: BackendError) -> Refusal {
        let reason = match &error {
            BackendError::Full { .. } => Reason::BackendFull,
            // Starting or stopping; or somebody who may has ended what was logging in.
            BackendError::Said { sqlstate, .. }
                if matches!(sqlstate.as_str(), "57P01" | "57P02" | "57P03") =>
            {
                Reason::BackendNotReady
            }
            BackendError::Setting { .. } => Reason::SettingRejected,
            BackendError::Unsealed(_) | BackendError::SealBroken { .. } => Reason::SealBroken,
            BackendError::Hashing(_) => Reason::Internal,
            BackendError::Lost(_)
            | BackendError::Protocol(_)
            | BackendError::Unsendable(_)
            | BackendError::MethodRefused(_)
            | BackendError::MethodUnknown(_)
            | BackendError::Trusting
            | BackendError::Iterations(_)
            | BackendError::Unbound(_)
            | BackendError::Scram(_)
            | BackendError::Outdated { .. }
            | BackendError::Said { .. } => Reason::BackendRejected,
        };
        let refusal = Refusal::new(reason, &error);
        match error {
            BackendError::Setting { text, .. } => refusal.about(text),
            _ => refusal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn labels_are_unique_and_fit_for_metrics() {
        let labels: HashSet<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
        assert!(labels.iter().all(|l| l.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
    }

    #[test]
    fn every_sqlstate_is_five_capitals_or_digits() {
        for reason in Reason::ALL {
            let code = reason.sqlstate();
            assert!(
                code.len() == 5
                    && code.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
            );
        }
    }

    #[test]
    fn the_cause_never_reaches_the_client() {
        for reason in Reason::ALL {
            let message = Refusal::new(*reason, "s3cret cause").about("acme").message("id");
            let text = String::from_utf8(message).expect("ASCII");
            assert!(!text.contains("s3cret") && text.contains("Session id."), "{text}");
            assert!(!text.contains("{}"), "{text}");
        }
    }

    #[test]
    fn missing_and_invalid_tokens_read_the_same() {
        let words = |reason| Refusal::new(reason, "").message("id");
        assert_eq!(words(Reason::TokenMissing), words(Reason::TokenInvalid));
    }
}
