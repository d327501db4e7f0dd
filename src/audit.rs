//! The audit trail: what is known of a connection, and the events that tell of it.
//!
//! Every connection that gets past the probes leaves events with `target: "pgsilo::audit"`: one
//! `refused`, or one `started` and one `ended`, and between those what its lease went through. From
//! `Identified` on none goes without a last one: where nothing else is, that is `left`, written
//! when its trail is dropped. They carry the full context. Every credential has two events of its
//! own, `leased` and `revoked` or `unrevoked`, also where no session came to have it. No event ever
//! carries a token, a password or a cancel key. What a client sent (its user, its database) is
//! escaped and cut before it is written. Any part may write events; docs/operations.md has them
//! all.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::rand;
use pgsilo_core::tenant::{Access, TenantId};
use tracing::Level;

use crate::ending::Ending;
use crate::log::AUDIT;

/// How the audit trail is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditSettings {
    /// What is done when it cannot be.
    pub on_loss: OnLoss,
    /// Bytes of events that may wait to be written; more are lost.
    pub queue_bytes: usize,
}

/// What is done when events cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLoss {
    /// They are counted, and told of later.
    Count,
    /// That, and no session begins meanwhile.
    Refuse,
}

/// `tracing` wants the level of an event to be a constant.
macro_rules! at_level {
    ($level:expr, $($event:tt)+) => {
        match $level {
            Level::ERROR => tracing::error!($($event)+),
            Level::WARN => tracing::warn!($($event)+),
            Level::INFO => tracing::info!($($event)+),
            Level::DEBUG => tracing::debug!($($event)+),
            Level::TRACE => tracing::trace!($($event)+),
        }
    };
}

macro_rules! event {
    ($level:expr, $trail:expr, $($more:tt)+) => {
        at_level!(
            $level, target: AUDIT,
            session = %$trail.session, address = &*$trail.address, tls = $trail.tls,
            user = &*$trail.user, database = &*$trail.database,
            application = &*$trail.application, issuer = &*$trail.issuer,
            subject = &*$trail.subject, token_id = &*$trail.token_id,
            tenant = $trail.tenant(), access = $trail.access, placement = &*$trail.placement,
            role = &*$trail.role, backend_pid = $trail.backend_pid, $($more)+
        )
    };
}

/// How much of a name that a client sent is written, in characters.
const MAX_NAME: usize = 80;

/// Names one connection, in the client's DETAIL and in every event. Random, not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SessionId(u64);

impl SessionId {
    /// A new id. Without randomness, which is not worth a refusal, it is a number that is unique as
    /// well.
    pub(crate) fn new() -> SessionId {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let mut bytes = [0; 8];
        SessionId(match rand::fill(&mut bytes) {
            Ok(()) => u64::from_be_bytes(bytes),
            Err(_none) => NUMBER.fetch_add(1, Ordering::Relaxed),
        })
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How far a connection has come: the stages of the chain, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Accepted,
    Secured,
    Started,
    Identified,
    Routed,
    Leased,
    Attached,
    Spliced,
}

impl Stage {
    /// Every stage, in its order.
    pub(crate) const ALL: &[Stage] = &[
        Stage::Accepted,
        Stage::Secured,
        Stage::Started,
        Stage::Identified,
        Stage::Routed,
        Stage::Leased,
        Stage::Attached,
        Stage::Spliced,
    ];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Stage::Accepted => "accepted",
            Stage::Secured => "secured",
            Stage::Started => "started",
            Stage::Identified => "identified",
            Stage::Routed => "routed",
            Stage::Leased => "leased",
            Stage::Attached => "attached",
            Stage::Spliced => "spliced",
        }
    }
}

/// What has been learned of a connection so far. The stages write into it, events read it. Texts
/// are shared: each session holds one of these.
#[derive(Debug)]
pub(crate) struct Trail {
    pub(crate) session: SessionId,
    pub(crate) address: Arc<str>,
    pub(crate) tls: bool,
    pub(crate) user: Arc<str>,
    pub(crate) database: Arc<str>,
    pub(crate) application: Arc<str>,
    pub(crate) issuer: Arc<str>,
    pub(crate) subject: Arc<str>,
    pub(crate) token_id: Arc<str>,
    pub(crate) tenant: Option<TenantId>,
    pub(crate) access: &'static str,
    pub(crate) placement: Arc<str>,
    pub(crate) role: Arc<str>,
    pub(crate) backend_pid: u32,
    pub(crate) stage: Stage,
    /// Its last event was written.
    is_closed: AtomicBool,
    /// The connection to the database came from the pool.
    pub(crate) pooled: bool,
    /// Other sessions have used it, and its lease, before.
    pub(crate) reused: bool,
    /// Its login was bound to its TLS channel.
    pub(crate) channel_binding: bool,
}

impl Trail {
    pub(crate) fn new(address: Option<SocketAddr>) -> Trail {
        let none: Arc<str> = Arc::default();
        Trail {
            session: SessionId::new(),
            address: address.map_or_else(|| "unix".into(), |address| address.to_string().into()),
            tls: false,
            user: Arc::clone(&none),
            database: Arc::clone(&none),
            application: Arc::clone(&none),
            issuer: Arc::clone(&none),
            subject: Arc::clone(&none),
            token_id: Arc::clone(&none),
            tenant: None,
            access: "",
            placement: Arc::clone(&none),
            role: none,
            backend_pid: 0,
            stage: Stage::Accepted,
            is_closed: AtomicBool::new(false),
            pooled: false,
            reused: false,
            channel_binding: false,
        }
    }

    /// The client's address; `None`: a Unix socket.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        self.address.parse().ok().map(|address: SocketAddr| address.ip())
    }

    /// What a verified token says of itself.
    pub(crate) fn learn_claims(
        &mut self,
        (issuer, subject, token_id): (&Arc<str>, &Arc<str>, Option<&Arc<str>>),
        access: Access,
    ) {
        (self.issuer, self.subject) = (Arc::clone(issuer), Arc::clone(subject));
        self.token_id = token_id.cloned().unwrap_or_default();
        self.access = access.as_str();
    }

    /// Of a refused token, what may be believed.
    pub(crate) fn learn_rejected(&mut self, subject: Option<&str>, token_id: Option<&str>) {
        self.subject = subject.unwrap_or_default().into();
        self.token_id = token_id.unwrap_or_default().into();
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    fn tenant(&self) -> &str {
        self.tenant.as_ref().map_or("", TenantId::as_str)
    }
}

impl Drop for Trail {
    /// A session that was identified and has neither a refusal nor an ending has left.
    fn drop(&mut self) {
        if self.stage >= Stage::Identified && !*self.is_closed.get_mut() {
            let stage = self.stage.label();
            event!(Level::INFO, self, event = "left", stage, "left without a refusal or an ending");
        }
    }
}

/// What a client sent, for an event: escaped, so that it cannot pass for something else.
pub(crate) fn name(bytes: &[u8]) -> Arc<str> {
    if bytes.is_empty() {
        return Arc::default();
    }
    let text = String::from_utf8_lossy(bytes);
    text.chars().take(MAX_NAME).flat_map(char::escape_debug).collect::<String>().into()
}

/// What an event tells of a refusal.
pub(crate) struct Told<'r> {
    pub(crate) level: Level,
    pub(crate) reason: &'static str,
    pub(crate) sqlstate: &'static str,
    pub(crate) cause: &'r str,
}

/// A connection was refused.
pub(crate) fn refused(trail: &Trail, told: &Told<'_>) {
    let Told { level, reason, sqlstate, cause } = *told;
    trail.close();
    let stage = trail.stage.label();
    event!(level, trail, event = "refused", reason, sqlstate, stage, cause, "refused");
}

/// A session was spliced.
pub(crate) fn started(trail: &Trail, seconds: f64) {
    let Trail { pooled, reused, channel_binding, .. } = *trail;
    event!(
        Level::INFO,
        trail,
        event = "started",
        pooled,
        reused,
        channel_binding,
        seconds,
        "session started"
    );
}

/// The session's lease could not be renewed. It is tried again, unless its end is final.
pub(crate) fn renewal_failed(trail: &Trail, cause: &str, left: Duration, is_final: bool) {
    event!(
        Level::WARN,
        trail,
        event = "renewal_failed",
        cause,
        remaining_seconds = left.as_secs(),
        is_final,
        "the session's lease could not be renewed"
    );
}

/// After failures, the session's lease is renewed.
pub(crate) fn renewed_again(trail: &Trail, left: Duration) {
    event!(
        Level::INFO,
        trail,
        event = "renewed_again",
        remaining_seconds = left.as_secs(),
        "the session's lease is renewed again"
    );
}

/// A session has ended, with its cause where something broke, and with the bytes that client and
/// database have sent.
pub(crate) fn ended(
    trail: &Trail,
    ending: Ending,
    cause: Option<&str>,
    seconds: f64,
    (to_backend, to_frontend): (u64, u64),
) {
    let sqlstate = ending.told().map_or("", |(sqlstate, _)| sqlstate);
    trail.close();
    event!(
        ending.level(),
        trail,
        event = "ended",
        ending = ending.label(),
        sqlstate,
        cause,
        seconds,
        bytes_to_backend = to_backend,
        bytes_to_frontend = to_frontend,
        "session ended"
    );
}

/// A cancel request found its session, and went there. The trail is that of the request, with what
/// is known of the session: its tenant, its role.
pub(crate) fn cancelled(
    trail: &Trail,
    session: SessionId,
    pid: Option<u32>,
    failure: Option<&str>,
) {
    trail.close();
    match failure {
        None => event!(
            Level::INFO,
            trail,
            event = "cancelled",
            cancelled_session = %session,
            pid,
            "query cancelled on request"
        ),
        Some(cause) => event!(
            Level::WARN,
            trail,
            event = "cancel_failed",
            cancelled_session = %session,
            pid,
            cause,
            "a cancel request could not be forwarded"
        ),
    }
}

/// Cancel requests of one address that led nowhere, since the event before. No address: a Unix
/// socket, or more addresses than are kept account of.
pub(crate) fn cancels_refused(address: Option<IpAddr>, reason: &'static str, count: u64) {
    let address = address.map(|address| address.to_string()).unwrap_or_default();
    tracing::warn!(
        target: AUDIT, event = "cancel_refused", address, reason, count,
        "cancel requests led nowhere"
    );
}

/// A session may go on because of a grant.
pub(crate) fn granted(trail: &Trail, grant: &str, break_glass: bool) {
    let (session, subject) = (trail.session.to_string(), &*trail.subject);
    let tenant = trail.tenant.as_ref().map(TenantId::as_str).unwrap_or_default();
    if break_glass {
        tracing::error!(
            target: AUDIT, event = "granted", session, subject, tenant, grant, break_glass,
            "a break-glass grant is used"
        );
    } else {
        tracing::info!(
            target: AUDIT, event = "granted", session, subject, tenant, grant, break_glass,
            "a grant is used"
        );
    }
}

/// For whom a credential is asked.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    /// `None`: for pgsilo itself, which reads the registry with it.
    pub(crate) tenant: Option<TenantId>,
    pub(crate) access: Access,
    /// The session that asked; `None`: for a prewarmed connection.
    pub(crate) session: Option<SessionId>,
}

macro_rules! lease_event {
    ($level:expr, $asker:expr, $($more:tt)+) => {{
        let Asker { tenant, access, session } = $asker;
        let prewarm = session.is_none() && tenant.is_some();
        let tenant = tenant.as_ref().map(TenantId::as_str).unwrap_or_default();
        let session = session.map(|session| session.to_string()).unwrap_or_default();
        at_level!(
            $level, target: AUDIT, session, tenant, access = access.as_str(),
            prewarm, $($more)+
        )
    }};
}

/// OpenBAO has made a credential.
pub(crate) fn leased(asker: &Asker, role: &str, lease: &str) {
    lease_event!(Level::INFO, asker, role, lease, event = "leased", "credential leased");
}

/// OpenBAO has taken a revocation on: that of a lease, or of the token that had asked for it.
pub(crate) fn revoked(asker: &Asker, role: &str, lease: &str) {
    lease_event!(Level::INFO, asker, role, lease, event = "revoked", "credential revoked");
}

/// OpenBAO did not take a credential back before its own end.
pub(crate) fn unrevoked(asker: &Asker, role: &str, lease: &str, cause: &str) {
    lease_event!(
        Level::ERROR,
        asker,
        role,
        lease,
        event = "unrevoked",
        cause,
        "a credential was not revoked before its own end"
    );
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn what_a_client_sent_cannot_forge_a_line() {
        assert_eq!(&*name(b"a\nb\x1b[31m\xff\""), "a\\nb\\u{1b}[31m\u{fffd}\\\"");
        assert_eq!(name(&[b'x'; 500]).len(), 80);
    }
}
