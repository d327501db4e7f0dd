//! Leased: a credential for this tenant's placement, and a connection to log in on.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::registry::Tenant;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::client::Stop;
use super::routed::{Admission, Routed};
use crate::audit::Stage;
use crate::backend::{self, Attachment, Connection, DialError};
use crate::clusters::ClusterState;
use crate::lease::{Lease, LeaseError, Request};
use crate::proxy::Proxy;
use crate::refusal::{Reason, Refusal};

/// How much longer than for OpenBAO's answer the dial's is waited for, where that says more.
const TRUER: Duration = Duration::from_millis(250);
/// How often a login is begun again as its cluster fails over meanwhile.
const FAILOVERS: usize = 3;

/// Proves that OpenBAO granted a credential, which is this session's for as long as it lives.
#[derive(Debug)]
pub(super) struct Leased<'c> {
    admission: Admission<'c>,
    lease: Lease,
    connection: Connected,
}

/// How far the connection to the database has come.
#[derive(Debug)]
pub(super) enum Connected {
    /// The login, with the lease, is to come.
    Dialled(Connection),
    /// From the pool: logged in with the lease.
    LoggedIn(Attachment),
}

impl<'c> Leased<'c> {
    /// Takes an idle connection of the pool; if there is none, requests a credential, and dials the
    /// database meanwhile.
    pub(super) async fn lease(mut routed: Routed<'c>) -> Result<Leased<'c>, Stop> {
        let proxy = routed.client().proxy;
        let (lease, connection) = match proxy.pool.take(routed.resolved()).await {
            Some((lease, attachment)) => {
                let trail = &mut routed.client().trail;
                (trail.pooled, trail.reused) = (true, attachment.history.sessions > 0);
                (lease, Connected::LoggedIn(attachment))
            }
            None => {
                if !proxy.pool.may_connect(routed.resolved().tenant()) {
                    let cause = "the database said 53300 a moment ago, and others try";
                    return Err(Refusal::new(Reason::BackendFull, cause).into());
                }
                let (lease, connection) = anew(&mut routed, proxy).await?;
                (lease, Connected::Dialled(connection))
            }
        };
        routed.client().trail.role = Arc::clone(lease.credential().name());
        routed.client().reached(Stage::Leased);
        Ok(Leased { admission: routed.into_parts(), lease, connection })
    }

    pub(super) fn into_parts(self) -> (Admission<'c>, Lease, Connected) {
        (self.admission, self.lease, self.connection)
    }
}

/// A credential and a connection of its own. Where the cluster fails over meanwhile, both are for the
/// primary before, which may answer nothing any more: then it is done again.
async fn anew(
    routed: &mut Routed<'_>,
    proxy: &'static Proxy,
) -> Result<(Lease, Connection), Refusal> {
    let route = Arc::clone(routed.resolved());
    let tenant = route.tenant();
    let patience = proxy.limits().dead_peer_timeout;
    let connect = || backend::dial(&route, &proxy.clusters, patience);
    let Some(state) = proxy.cluster_watch.state(&tenant.placement().cluster).await else {
        return both(credential(routed, None), connect()).await;
    };
    for _ in 0..FAILOVERS {
        let until = state.until_failover();
        if let Some(told) = state.reconnected(tenant.id()) {
            told.get_or_init(|| reconnect(tenant, proxy)).await;
        }
        let asking = both(credential(routed, Some((&state, &until))), connect());
        // What is under way for the primary before is dropped.
        match until.run_until_cancelled(asking).await {
            None => {}
            Some(Err(_)) if until.is_cancelled() => {}
            Some(answer) => return answer,
        }
    }
    Err(Refusal::new(Reason::BackendNotReady, "the cluster fails over again and again"))
}

/// OpenBAO's connection to the tenant's database may lead to a server that is the primary no more, and
/// where that answers nothing, whatever OpenBAO does there waits for it.
async fn reconnect(tenant: &Tenant, proxy: &'static Proxy) {
    let lease = tenant.lease();
    let connection = lease.connection(tenant.id());
    if let Err(error) = proxy.lessor.reconnect(&lease.mount, &connection).await {
        tracing::warn!(
            tenant = %tenant.id(), %error,
            "OpenBAO does not make its connection to the tenant's database anew after a failover: \
             allow MOUNT/reset/*, as docker/openbao/pgsilo.hcl does"
        );
    }
}

/// A credential. If the database has no connection left for OpenBAO, an idle one of the pool is
/// evicted, and the request made once more; not under session authority, where that would be
/// another login.
async fn credential(
    routed: &mut Routed<'_>,
    cluster: Option<(&ClusterState, &CancellationToken)>,
) -> Result<Lease, LeaseError> {
    let proxy = routed.client().proxy;
    let mut freed = None;
    loop {
        let until = cluster.map(|(_, until)| until.clone());
        let request = Request { until, ..routed.request() };
        let error = match proxy.lessor.lease(request).await {
            Ok(lease) => return Ok(lease),
            Err(error) => error,
        };
        if let Some((state, _)) = cluster.filter(|_| error.is_unanswered()) {
            state.was_stuck(routed.resolved().tenant().id());
        }
        let Some(scope) = error.full_scope().filter(|_| freed.is_none()) else { return Err(error) };
        let tenant = routed.resolved().tenant();
        proxy.pool.record_full(tenant, scope);
        if proxy.lessor.own_authorization().is_none() {
            return Err(error);
        }
        freed = proxy.pool.free_slot(tenant, scope).await;
        if freed.is_none() {
            return Err(error);
        }
    }
}

/// A lease and a connection, had at once. Whatever fails first ends it; a credential that still
/// comes is revoked. OpenBAO meets the same database: where it may have failed at that, what the
/// dial finds is the truer answer, if it comes soon.
async fn both(
    lease: impl Future<Output = Result<Lease, LeaseError>>,
    dial: impl Future<Output = Result<Connection, DialError>>,
) -> Result<(Lease, Connection), Refusal> {
    let (mut lease, mut dial) = (pin!(lease), pin!(dial));
    tokio::select! {
        leased = &mut lease => match leased {
            Ok(lease) => Ok((lease, dial.await?)),
            Err(error) if error.may_be_the_databases() => match timeout(TRUER, dial).await {
                Ok(Err(unreached)) => Err(unreached.into()),
                Ok(Ok(_)) | Err(_) => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        },
        dialled = &mut dial => {
            let connection = dialled?;
            Ok((lease.await?, connection))
        }
    }
}
