//! Spliced: bytes both ways until the ending.

use std::sync::atomic::AtomicU32;
use std::time::SystemTime;

use super::attached::{Attached, Held, Kept};
use super::authority::Authority;
use super::client::Client;
use crate::audit::{self, Stage};
use crate::backend::Attachment;
use crate::metrics;
use crate::proxy::Proxy;
use crate::splice::{End, Relay};
use crate::stream::Stream;
use pgsilo_core::clock::BootTime;
use tokio::time::Instant;

/// Proves that every stage before it was passed: from here on bytes are opaque.
#[derive(Debug)]
pub(super) struct Spliced<'c> {
    client: &'c mut Client,
    held: Held,
    backend: Stream,
}

impl<'c> Spliced<'c> {
    /// Joins the two connections.
    pub(super) fn splice(attached: Attached<'c>) -> Spliced<'c> {
        let (client, held, backend) = attached.into_parts();
        Spliced { client, held, backend }
    }

    /// Relays until the session ends, then lets everything go that it held.
    pub(super) async fn run(mut self: Box<Self>) {
        let Spliced { client, held, backend } = &mut *self;
        let began = Instant::now();
        client.trail.stage = Stage::Spliced;
        audit::started(&client.trail, client.seconds());
        let Client { frontend, proxy, trail, listener, authority: certified_by, .. } = client;
        let proxy: &'static Proxy = proxy;
        metrics::SESSIONS.increment(1);
        let session = proxy.sessions.begin(held.tenant.id(), trail.take());
        let process = held.cancel_key.process();
        let dead_peer_timeout = proxy.limits().dead_peer_timeout;
        let times = held.tenant.limits().times(&proxy.limits().times);
        let withholds = held.kept.is_some();
        let mut relay = Relay::new(
            frontend,
            backend,
            process,
            &session.progress,
            withholds,
            dead_peer_timeout,
            times,
        );
        // On the clock that authority is measured in: one that is set later neither lengthens nor
        // shortens the session.
        let left = held.identity.expires_at().duration_since(SystemTime::now()).unwrap_or_default();
        let authority = Authority {
            proxy,
            tenant: &held.tenant,
            lease: &held.lease,
            identity: &held.identity,
            access: held.access,
            listener,
            certified_by: *certified_by,
            expires: BootTime::now() + left,
            left,
            aged: times.session.map(|age| (BootTime::now() + age, age)),
            session: &session,
            told: AtomicU32::new(0),
        };
        let End { ending, cause } = relay.run(&authority).await;
        Box::pin(relay.end(ending, session.trail.session)).await;
        metrics::ENDINGS.of(ending).increment(1);
        let cause = cause.map(|cause| cause.to_string());
        let seconds = began.elapsed().as_secs_f64();
        audit::ended(&session.trail, ending, cause.as_deref(), seconds, session.progress.bytes());
        proxy.pool.has_left(&held.tenant);
        let left_whole = relay.left_whole();
        drop(session);
        if left_whole {
            Box::pin(self.give_back()).await;
        }
    }

    /// Lets the pool have the connection, for another session on an equal route.
    async fn give_back(self: Box<Self>) {
        let Spliced { client, held, backend } = *self;
        let Held { cancel_key, place, kept, lease, address, .. } = held;
        // A session that comes meanwhile is not refused for this one.
        drop((place, address));
        let proxy = client.proxy;
        let Some((process, kept)) = cancel_key.withdraw().zip(kept) else { return };
        let Kept { route, greeting, past } = *kept;
        let attachment = Attachment { stream: backend, process, greeting, past };
        proxy.pool.give_back(&route, lease, attachment, proxy.registry()).await;
    }
}
