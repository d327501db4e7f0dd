//! What the stages of one connection hand on: its socket, its permits, its audit trail.
//!
//! A client proves nothing: the stages around it do. It outlives them, so that a refusal can
//! still be told when a stage is gone.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant as Clock;

use pgsilo_core::tls::AuthorityId;
use tokio::time::Instant;

use crate::audit::{Stage, Trail};
use crate::frontend::{Frontend, FrontendError};
use crate::limits::{Slot, network};
use crate::listener::Listener;
use crate::metrics;
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};
use crate::stream::Stream;

/// A connection that came in, whatever it may want.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) frontend: Frontend,
    pub(crate) proxy: &'static Proxy,
    pub(crate) trail: Trail,
    pub(super) listener: &'static Listener,
    /// Who connected: a balancer, or the client itself.
    pub(super) peer: Option<IpAddr>,
    /// What limits per address count: the client's network.
    pub(super) address: Option<IpAddr>,
    pub(super) handshake: Option<Slot>,
    /// Who certified the client, if it showed a certificate.
    pub(super) authority: Option<AuthorityId>,
    stage_began: Clock,
    accepted: Clock,
    deadline: Instant,
    startup_deadline: Instant,
}

/// What a session needs of its client.
pub(super) struct OfSession {
    pub(super) frontend: Frontend,
    pub(super) proxy: &'static Proxy,
    pub(super) trail: Trail,
    pub(super) listener: &'static Listener,
    pub(super) certified_by: Option<Box<AuthorityId>>,
}

/// Why a login stops.
#[derive(Debug)]
pub(super) enum Stop {
    /// The client is told.
    Refused(Box<Refusal>),
    /// The client has gone: a probe, a client that changed its mind, a broken connection.
    ClientLeft,
    /// It had proved nothing, and was evicted for another connection.
    Evicted,
}

impl Client {
    /// A connection that was just accepted. `handshake` is its slot among those that are not
    /// logged in; without one it will be refused.
    pub(crate) fn new(
        stream: Stream,
        address: Option<SocketAddr>,
        listener: &'static Listener,
        proxy: &'static Proxy,
        handshake: Option<Slot>,
    ) -> Client {
        let (now, limits) = (Clock::now(), proxy.limits());
        Client {
            frontend: Frontend::new(stream),
            proxy,
            trail: Trail::new(address),
            listener,
            peer: address.map(|address| address.ip().to_canonical()),
            address: address.map(|address| network(address.ip())),
            handshake,
            authority: None,
            stage_began: now,
            accepted: now,
            deadline: Instant::now() + limits.login_timeout,
            startup_deadline: Instant::now() + limits.startup_timeout,
        }
    }

    /// The address that a balancer has sent.
    pub(super) fn comes_from(&mut self, address: SocketAddr) {
        self.address = Some(network(address.ip()));
        self.trail.address = address.to_string().into();
    }

    /// When the login must be over.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// When its startup packet must be there.
    pub(super) fn startup_deadline(&self) -> Instant {
        self.startup_deadline
    }

    /// It is identified and counted by its tenant's bound: it is not evicted any more.
    pub(super) fn prove(&mut self) {
        if let Some(slot) = &mut self.handshake {
            slot.prove();
        }
    }

    /// Only the bound on slots counts it: it may be evicted again.
    pub(super) fn unprove(&mut self) {
        if let Some(slot) = &mut self.handshake {
            slot.unprove();
        }
    }

    /// A stage is done: records how long it took.
    pub(super) fn reached(&mut self, stage: Stage) {
        let now = Clock::now();
        self.trail.stage = stage;
        metrics::STAGE_TIME.of(stage).record(now - self.stage_began);
        self.stage_began = now;
    }

    /// Seconds since the connection was accepted.
    pub(super) fn seconds(&self) -> f64 {
        self.accepted.elapsed().as_secs_f64()
    }

    /// The login is over: its memory is freed when this returns. A box that is moved out of is freed
    /// at the end of its owner's scope, so this takes the box.
    pub(super) fn into_session(self: Box<Self>) -> OfSession {
        let Client { frontend, proxy, trail, listener, authority, .. } = *self;
        OfSession { frontend, proxy, trail, listener, certified_by: authority.map(Box::new) }
    }

    /// Closed without a message: with many such connections each message would take time.
    pub(super) fn evict(self) {
        metrics::EVICTED.increment(1);
        tracing::debug!(
            session = %self.trail.session, address = &*self.trail.address,
            "a connection that had proved nothing was evicted"
        );
    }

    /// The client has gone.
    pub(super) fn abandon(self) {
        metrics::ABANDONED.increment(1);
        tracing::debug!(
            session = %self.trail.session, address = &*self.trail.address,
            "the client left during login"
        );
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Refused(Box::new(refusal))
    }
}

impl From<FrontendError> for Stop {
    fn from(error: FrontendError) -> Stop {
        match error {
            FrontendError::Io(_) => Stop::ClientLeft,
            FrontendError::Startup(error) => Refusal::from(error).into(),
            FrontendError::Balancer(_)
            | FrontendError::Smuggled
            | FrontendError::NotAPassword(_) => {
                Refusal::new(Reason::StartupMalformed, error).into()
            }
            FrontendError::TooLong(_) => Refusal::new(Reason::TokenInvalid, error)
                .detail("The token is longer than this server takes.")
                .into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use pgsilo_wire::startup::StartupError;

    use super::*;
    use crate::proxy_protocol::NoHeader;

    #[test]
    fn a_lost_client_is_not_refused_and_others_are() {
        let left = FrontendError::Io(io::ErrorKind::UnexpectedEof.into());
        assert!(matches!(Stop::from(left), Stop::ClientLeft));
        for (error, expected) in [
            (FrontendError::Startup(StartupError::Length(3)), Reason::StartupMalformed),
            (FrontendError::Startup(StartupError::NoUser), Reason::UserMissing),
            (FrontendError::Balancer(NoHeader), Reason::StartupMalformed),
            (FrontendError::Smuggled, Reason::StartupMalformed),
            (FrontendError::NotAPassword('Q'), Reason::StartupMalformed),
            (FrontendError::TooLong(70_000), Reason::TokenInvalid),
        ] {
            let cause = error.to_string();
            let Stop::Refused(refusal) = Stop::from(error) else { panic!("{cause}") };
            assert_eq!((refusal.reason(), refusal.cause()), (expected, &*cause));
        }
    }
}
