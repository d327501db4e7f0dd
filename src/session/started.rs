//! Started: a well-formed startup packet of a protocol that is spoken here, asking for a
//! session that may exist.
//!
//! Of the packet's parameters only `user`, `database`, `replication` and names that begin with
//! `_pq_.` are acted on; `application_name` is also written to the audit trail. Everything else,
//! `options` included, is forwarded unparsed.

use pgsilo_wire::startup::{Startup, Version};

use super::accepted::Accepted;
use super::cancelling::Cancelling;
use super::client::{Client, Stop};
use super::secured::{Request, Secured};
use crate::audit::{self, Stage};
use crate::refusal::{Reason, Refusal};

/// Proves that a session was asked for, in a protocol that both sides understand.
#[derive(Debug)]
pub(super) struct Started<'c> {
    accepted: Accepted<'c>,
    startup: Startup,
}

/// What the first packet starts: a session, or the one fork that needs no token.
#[derive(Debug)]
pub(super) enum StartOutcome<'c> {
    /// A session, to be identified.
    Session(Started<'c>),
    /// A cancel request, to be forwarded.
    Cancel(Cancelling<'c>),
}

impl<'c> Started<'c> {
    /// Looks at the startup packet; a cancel request goes its own way.
    pub(super) fn start(secured: Secured<'c>) -> Result<StartOutcome<'c>, Stop> {
        let (mut accepted, request) = secured.into_parts();
        let startup = match request {
            Request::Cancel(request) => {
                return Ok(StartOutcome::Cancel(Cancelling::new(accepted, request)));
            }
            Request::Startup(startup) => startup,
        };
        let client = accepted.client();
        client.trail.user = audit::name(startup.user());
        client.trail.database = audit::name(startup.database().unwrap_or_default());
        client.trail.application =
            audit::name(startup.parameter(b"application_name").map_or(b"", |name| name));
        if client.proxy.is_draining() {
            return Err(Refusal::new(Reason::ShuttingDown, "pgsilo is stopping").into());
        }
        if startup.wants_replication() {
            return Err(
                Refusal::new(Reason::ReplicationRefused, "replication was asked for").into()
            );
        }
        client.trail.stage = Stage::Started;
        Ok(StartOutcome::Session(Started { accepted, startup }))
    }

    /// The version that the client is served with.
    pub(super) fn version(&self) -> Version {
        self.startup.version.served()
    }

    pub(super) fn startup(&self) -> &Startup {
        &self.startup
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.accepted.client()
    }

    pub(super) fn into_parts(self) -> (Accepted<'c>, Startup) {
        (self.accepted, self.startup)
    }
}
