//! THE table of refusals: every way a connection is turned away before its splice.
//!
//! One reason has one SQLSTATE, one metrics label, one log level and one text. Texts go to the
//! client from this table only.

use tracing::Level;

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

            /// What the client reads; `{}` stands for what the refusal is about.
            pub fn text(self) -> &'static str {
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
    /// A listener that wants a certificate got none, or one without a name.
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
    /// The keys of the issuer that the token names were not fetched, or too long ago, or the key
    /// that it names may be a new one that cannot be fetched: another attempt may succeed.
    KeysUnavailable, "57P03", "keys_unavailable", ERROR,
        "session tokens cannot be verified at the moment";
    /// The token is bound to a certificate that this client did not present.
    TokenUnbound, "28P01", "token_unbound", WARN,
        "the session token is bound to another client certificate";
    /// The token, its subject or the certificate is on the list of those denied.
    IdentityRevoked, "28P01", "identity_revoked", WARN, "the identity shown has been revoked";
    /// The registry has a lock on the tenant, the identity or the client's address; its message.
    AccessLocked, "42501", "access_locked", WARN, "access is locked{}";
    /// No tenant claim, or several tenants and none chosen.
    TenantUnresolved, "28000", "tenant_unresolved", WARN,
        "the session token does not resolve to one tenant";
    /// The token asks for a tenant or an access that its issuer may not grant or that it does not
    /// name clearly, or the tenant has no role for the access.
    TenantForbidden, "28000", "tenant_forbidden", WARN,
        "the session token does not allow this tenant or access";
    /// Its issuer's word is not enough, and the registry has no grant.
    GrantMissing, "42501", "grant_missing", WARN, "access to tenant \"{}\" was not granted";
    /// The client named a database or a host that belongs to none of its own tenants; PostgreSQL's
    /// words, the same whether it is another tenant's or unknown.
    DatabaseUnknown, "3D000", "database_unknown", WARN, "database \"{}\" does not exist";
    /// The claim names a tenant that the registry does not know.
    TenantUnknown, "3D000", "tenant_unknown", WARN, "tenant \"{}\" does not exist";
    /// Like a revoked CONNECT; not 55000, which Npgsql retries.
    TenantSuspended, "42501", "tenant_suspended", INFO, "tenant \"{}\" is suspended";
    /// Migrating or restoring: transient, libpq tries the next host.
    TenantPaused, "57P03", "tenant_paused", INFO, "tenant \"{}\" is paused for a moment";
    /// Like a suspended one: it may be undone.
    TenantDeleting, "42501", "tenant_deleting", INFO, "tenant \"{}\" is being deleted";
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
    /// OpenBAO gets no connection to the tenant's database, where it would make the credential:
    /// another attempt may succeed.
    LeaseBackendAway, "57P03", "lease_backend_away", ERROR,
        "the tenant's database is not available at the moment";
    /// OpenBAO says no, or the database refuses it: a policy, a role or its statements are wrong,
    /// an operator must act.
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
}
