//! Spliced: bytes both ways until the ending.

use std::sync::atomic::AtomicU32;
use std::time::SystemTime;

use super::attached::{Attached, Held, Kept};
use super::authority::Authority;
use super::client::{Client, OfSession};
use crate::audit::{self, Stage};
use crate::backend::Attachment;
use crate::metrics;
use crate::proxy::Proxy;
use crate::splice::{End, Relay};
use crate::stream::Stream;
use pgsilo_core::clock::BootTime;

/// Proves that every stage before it was passed: from here on bytes are opaque.
#[derive(Debug)]
pub(super) struct Spliced {
    held: Held,
    backend: Stream,
}

impl Spliced {
    /// Joins the two connections.
    pub(super) fn splice(attached: Attached<'_>) -> Spliced {
        let (client, held, backend) = attached.into_parts();
        client.trail.stage = Stage::Spliced;
        audit::started(&client.trail, client.seconds());
        metrics::SESSIONS.increment(1);
        Spliced { held, backend }
    }

    /// Relays until the session ends, then drops what it holds. Of the client, what only its login
    /// needed is freed first.
    pub(super) async fn run(mut self: Box<Self>, client: Box<Client>) {
        let Spliced { held, backend } = &mut *self;
        let OfSession { mut frontend, proxy, trail, listener, certified_by } =
            client.into_session();
        let session = proxy.sessions.begin(held.tenant.id(), trail);
        let process = held.cancel_key.process();
        let dead_peer_timeout = proxy.limits().dead_peer_timeout;
        let times = held.tenant.limits().times(&proxy.limits().times);
        let withholds = held.kept.is_some();
        let mut relay = Relay::new(
            &mut frontend,
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
            certified_by,
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
        let seconds = session.began.elapsed().as_secs_f64();
        audit::ended(&session.trail, ending, cause.as_deref(), seconds, session.progress.bytes());
        proxy.pool.has_left(&held.tenant);
        let left_whole = relay.left_whole();
        drop(session);
        if left_whole {
            Box::pin(self.give_back(proxy)).await;
        }
    }

    /// Lets the pool have the connection, for another session on an equal route.
    async fn give_back(self: Box<Self>, proxy: &'static Proxy) {
        let Spliced { held, backend } = *self;
        let Held { cancel_key, place, kept, lease, address, .. } = held;
        // A session that comes meanwhile is not refused for this one.
        drop((place, address));
        let Some((process, kept)) = cancel_key.withdraw().zip(kept) else { return };
        let Kept { route, greeting, past } = *kept;
        let attachment = Attachment { stream: backend, process, greeting, past };
        proxy.pool.give_back(&route, lease, attachment, proxy.registry()).await;
    }
}
