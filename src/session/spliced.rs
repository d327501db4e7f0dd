//! Spliced: bytes both ways until the ending.
//!
//! Most sessions are idle, so an idle one is small: one task that waits for two sockets, a timer
//! and three notifications (and for a while the relay's timer, see `splice.rs`). What comes once in
//! a session (its login, a cancel request, its last words) is boxed, so that its memory is held
//! neither before nor after.

use std::sync::atomic::AtomicU32;
use std::time::SystemTime;

use pgsilo_core::limits::TimeLimits;
use pgsilo_core::registry::Tenant;

use super::attached::Attached;
use super::authority::Authority;
use super::client::{Client, OfSession};
use super::resources::{Reusable, SessionResources};
use crate::audit::{self, Stage};
use crate::backend::Attachment;
use crate::metrics;
use crate::proxy::Proxy;
use crate::splice::{End, Relay};
use crate::stream::Stream;

/// Proves that every stage before it was passed: from here on bytes are opaque.
#[derive(Debug)]
pub(super) struct Spliced {
    /// Closed before the lease that it was opened with is dropped.
    backend: Stream,
    resources: SessionResources,
}

impl Spliced {
    /// Joins the two connections.
    pub(super) fn splice(attached: Attached<'_>) -> Spliced {
        let (client, resources, backend) = attached.into_parts();
        client.trail.stage = Stage::Spliced;
        audit::started(&client.trail, client.seconds());
        metrics::SESSIONS.increment(1);
        Spliced { backend, resources }
    }

    /// Relays until the session ends, then drops what it holds. Of the client, what only its login
    /// needed is freed first.
    pub(super) async fn run(mut self: Box<Self>, client: Box<Client>) {
        let (resources, backend) = (&self.resources, &mut self.backend);
        let OfSession { mut frontend, proxy, trail, listener, certified_by } =
            client.into_session();
        let session = resources.permit.begin(trail);
        let process = resources.cancel_key.process();
        let dead_peer_timeout = proxy.limits().dead_peer_timeout;
        let own = own_times(&resources.tenant, &proxy.limits().times);
        let times = own.as_deref().unwrap_or(&proxy.limits().times);
        let intercepts_terminate = resources.reusable.is_some();
        let mut relay = Relay::new(
            &mut frontend,
            backend,
            process,
            &session.progress,
            intercepts_terminate,
            dead_peer_timeout,
            times,
        );
        // On the clock that authority is measured in: one that is set later neither lengthens nor
        // shortens the session. Read after the session began: rather too early an end than too late.
        let left =
            resources.identity.expires_at().duration_since(SystemTime::now()).unwrap_or_default();
        let authority = Authority {
            proxy,
            resources,
            listener,
            certified_by,
            expires: session.began + left,
            max_age: times.session,
            session: &session,
            told: AtomicU32::new(0),
        };
        let stopped = relay.run(&authority).await;
        let End { ending, cause } = Box::pin(relay.finish(stopped, session.trail.session)).await;
        metrics::ENDINGS.of(ending).increment(1);
        let cause = cause.map(|cause| cause.to_string());
        let seconds = session.began.elapsed().as_secs_f64();
        audit::ended(&session.trail, ending, cause.as_deref(), seconds, session.progress.bytes());
        // Not `resources`: what is used from here on every idle session would hold.
        proxy.pool.record_session_end(&self.resources.tenant);
        let is_reusable = relay.is_reusable();
        drop(session);
        if is_reusable {
            Box::pin(self.release(proxy)).await;
        }
    }

    /// Returns the connection to the pool, for another session on an equal route.
    async fn release(self: Box<Self>, proxy: &'static Proxy) {
        let Spliced { backend, resources } = *self;
        let SessionResources { cancel_key, permit, reusable, lease, address, reign, .. } =
            resources;
        // They do not count against a session that begins meanwhile.
        drop((permit, address));
        let Some((process, reusable)) = cancel_key.withdraw().zip(reusable) else {
            // Before its lease.
            drop(backend);
            return;
        };
        let Reusable { route, greeting, history } = *reusable;
        let attachment = Attachment { stream: backend, process, greeting, history, reign };
        proxy.pool.release(&route, lease, attachment, proxy.registry()).await;
    }
}

/// A tenant's limits, where they are not those for all.
fn own_times(tenant: &Tenant, all: &TimeLimits) -> Option<Box<TimeLimits>> {
    let own = tenant.limits().times(all);
    (own != *all).then(|| Box::new(own))
}
