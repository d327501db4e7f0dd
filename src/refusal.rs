//! Refusals: a reason of the [table](crate::reason), and the cause, which goes to the log and the
//! audit event only.
//!
//! Parts have small errors of their own and know nothing of SQLSTATE: the conversions at the end of
//! this file turn each into a reason, exhaustively. Only the session's stages make refusals, and
//! only the session sends one.

use std::fmt::Display;

use pgsilo_wire::message;
use pgsilo_wire::startup::StartupError;

use crate::audit::Told;
use crate::backend::{BackendError, DialError};
use crate::lease::{DatabaseFault, LeaseError};
pub use crate::reason::Reason;
use crate::route::{Closed, RouteError};
use crate::token::{Rejected, SourceError, TokenError};

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
                    Closed::Deleting => (Reason::TenantDeleting, tenant),
                    Closed::Misplaced | Closed::OtherRegion | Closed::NoRegion => {
                        (Reason::ResidencyRefused, tenant)
                    }
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
            LeaseError::Overtaken => Reason::BackendNotReady,
            LeaseError::Denied(_) | LeaseError::Unfit(_) | LeaseError::NoRole(_) => {
                Reason::LeaseDenied
            }
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
            | DialError::Timeout { .. }
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
            // Starting or stopping; or an administrator has ended the login.
            BackendError::Said { sqlstate, .. }
                if matches!(sqlstate.as_str(), "57P01" | "57P02" | "57P03") =>
            {
                Reason::BackendNotReady
            }
            BackendError::Standby
            | BackendError::Behind { .. }
            | BackendError::OfNoUse(_)
            | BackendError::Overtaken(_)
            | BackendError::Silent => Reason::BackendNotReady,
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
