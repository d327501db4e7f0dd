//! Attached: logged in to the tenant's own database, its seal read back, the client told.
//!
//! AuthenticationOk is held back until the seal was read: a client is never told that it is in, and
//! then that it is not.

use std::sync::Arc;

use pgsilo_wire::message;
use tokio::time::timeout;

use super::client::{Client, Stop};
use super::leased::{Connected, Leased};
use super::resources::{Reusable, SessionResources};
use super::routed::Admission;
use crate::audit::Stage;
use crate::backend::{self, Attachment, BackendError, Connection};
use crate::lease::Lease;
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};
use crate::route::Route;
use crate::stream::Stream;

/// Proves that the database is the tenant's, and that the client knows it is let in.
#[derive(Debug)]
pub(super) struct Attached<'c> {
    client: &'c mut Client,
    backend: Stream,
    resources: SessionResources,
}

impl<'c> Attached<'c> {
    /// Logs in with the leased credential. Only then does the client read AuthenticationOk.
    pub(super) async fn attach(leased: Leased<'c>) -> Result<Attached<'c>, Stop> {
        let (mut admission, lease, connection) = leased.into_parts();
        let attachment = match connection {
            Connected::LoggedIn(attachment) => attachment,
            Connected::Dialled(connection) => {
                let proxy = admission.started.client().proxy;
                log_in(connection, &lease, &admission.route, proxy).await?
            }
        };

        let Admission { started, route, identity, permit } = admission;
        let version = started.version();
        let (accepted, _startup) = started.into_parts();
        let (client, address) = accepted.into_parts();
        let Attachment { stream, process, greeting, history, reign } = attachment;
        let key = client.proxy.cancel_keys.hand_out(process, version, client.trail.session);
        let cancel_key = key.ok_or_else(|| Refusal::new(Reason::Internal, "no randomness"))?;
        client.trail.backend_pid = cancel_key.pid().unwrap_or_default();
        client.trail.channel_binding = history.is_bound;

        let mut welcome = Vec::with_capacity(greeting.len() + 64);
        message::authentication_ok(&mut welcome);
        welcome.extend_from_slice(&greeting);
        if let Some(pid) = cancel_key.pid() {
            message::backend_key_data(&mut welcome, pid, cancel_key.secret());
        }
        message::ready_for_query(&mut welcome);
        client.frontend.send(&welcome).await.map_err(|_lost| Stop::ClientLeft)?;
        client.handshake = None;
        client.reached(Stage::Attached);
        let proxy = client.proxy;
        proxy.pool.prewarm(&route, proxy.registry());
        let resources = SessionResources {
            cancel_key,
            tenant: Arc::clone(route.tenant()),
            identity,
            access: route.access(),
            permit,
            address,
            reusable: proxy.pool.reuses().then(|| Box::new(Reusable { route, greeting, history })),
            reign,
            lease,
        };
        Ok(Attached { client, backend: stream, resources })
    }

    pub(super) fn into_parts(self) -> (&'c mut Client, SessionResources, Stream) {
        (self.client, self.resources, self.backend)
    }
}

/// A login with the leased credential. If the database has no connection left, an idle one of the
/// pool is evicted, and the login tried once more. Of several servers the next is tried where one is
/// not the primary.
async fn log_in(
    mut connection: Connection,
    lease: &Lease,
    route: &Arc<Route>,
    proxy: &'static Proxy,
) -> Result<Attachment, Refusal> {
    let (mut freed, mut before) = (None, None);
    loop {
        let (others, until) = (connection.others(), connection.until_failover());
        let log_in = connection.log_in(lease.credential());
        let logged_in = match (until, &others) {
            (None, _) => Some(log_in.await),
            (Some(until), None) => until.run_until_cancelled_owned(log_in).await,
            // One that does not answer leaves the others their time.
            (Some(until), Some(others)) => {
                let patience = proxy.limits().login_timeout / others.of_how_many();
                let bounded = timeout(patience, until.run_until_cancelled_owned(log_in));
                bounded.await.unwrap_or_else(|_elapsed| {
                    others.tell_of_silence();
                    Some(Err(BackendError::Silent))
                })
            }
        };
        let error = match logged_in {
            Some(Ok(attachment)) => {
                proxy.pool.record_connect(route.tenant(), freed.is_some());
                return Ok(attachment);
            }
            Some(Err(error)) => error,
            None => {
                let cause = "the cluster has failed over during the login";
                return Err(Refusal::new(Reason::BackendNotReady, cause));
            }
        };
        if let Some(others) = others.filter(|_| error.may_be_the_servers()) {
            let error = more_telling(before.take(), error);
            match others.reach().await {
                Ok(another) => (connection, before) = (another, Some(error)),
                Err(_unreached) => return Err(error.into()),
            }
            continue;
        }
        let error = more_telling(before.take(), error);
        let Some(scope) = error.full_scope().filter(|_| freed.is_none()) else {
            return Err(error.into());
        };
        proxy.pool.record_full(route.tenant(), scope);
        freed = proxy.pool.free_slot(route.tenant(), scope).await;
        if freed.is_none() {
            return Err(error.into());
        }
        let patience = proxy.limits().dead_peer_timeout;
        connection = backend::dial(route, &proxy.clusters, patience).await?;
    }
}

/// Of what two servers of a cluster have said: that one is not the primary says nothing of why the
/// other, which may be, does not let the session in.
fn more_telling(before: Option<BackendError>, error: BackendError) -> BackendError {
    match before {
        Some(before) if error.is_of_another_primary() => before,
        Some(_) | None => error,
    }
}
