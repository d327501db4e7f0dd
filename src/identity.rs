//! Who a session is, however that was proved: by a token or by a certificate.
//!
//! Made by the Identified stage from what was verified; the Routed stage finds the tenant for it,
//! and a running session is ended when it ends or is withdrawn.

use std::time::SystemTime;

use pgsilo_core::tenant::TenantId;
use pgsilo_core::tls::Holder;

use crate::ending::Ending;
use crate::registry::{Denied, PresentedCredential};
use crate::token::Claims;

/// Who a session is.
#[derive(Debug)]
pub(crate) enum Identity {
    /// What an issuer signed.
    Token(Claims),
    /// Whom a listener's authority certified.
    Certificate(Holder),
}

impl Identity {
    /// Its issuer, if it has one, and its name.
    pub(crate) fn subject(&self) -> (Option<&str>, &str) {
        match self {
            Identity::Token(claims) => (Some(claims.issuer()), claims.subject()),
            Identity::Certificate(holder) => (None, holder.name()),
        }
    }

    /// It is that tenant's session: what only the choice needed is forgotten.
    pub(crate) fn settle_on(&mut self, tenant: &TenantId) {
        if let Identity::Token(claims) = self {
            claims.settle_on(tenant);
        }
    }

    /// When it expires.
    pub(crate) fn expires_at(&self) -> SystemTime {
        match self {
            Identity::Token(claims) => claims.expires_at(),
            Identity::Certificate(holder) => holder.expires_at(),
        }
    }

    /// What a session ends with then.
    pub(crate) fn ending(&self) -> Ending {
        match self {
            Identity::Token(_) => Ending::TokenExpired,
            Identity::Certificate(_) => Ending::CertificateExpired,
        }
    }

    /// Whether it is on the list of those withdrawn, where there is one.
    pub(crate) fn is_denied(&self, denied: Option<&Denied>) -> bool {
        denied.is_some_and(|denied| denied.denies(self.credential()))
    }

    /// As far as it can be withdrawn.
    pub(crate) fn credential(&self) -> PresentedCredential<'_> {
        match self {
            Identity::Token(claims) => PresentedCredential {
                issuer: Some(claims.issuer()),
                subject: claims.subject(),
                token_id: claims.token_id(),
                issued_at: claims.issued_at(),
            },
            Identity::Certificate(holder) => {
                let issued_at = Some(holder.issued_at());
                PresentedCredential {
                    issuer: None,
                    subject: holder.name(),
                    token_id: None,
                    issued_at,
                }
            }
        }
    }
}
