//! Leased: a credential for this tenant's placement, and a connection to log in on.

use std::sync::Arc;

use super::client::Stop;
use super::routed::Routed;
use crate::audit::Stage;
use crate::backend::{self, Attachment, Connection};
use crate::lease::Lease;
use crate::refusal::Refusal;

/// Proves that OpenBAO granted a credential, which is this session's for as long as it lives.
#[derive(Debug)]
pub struct Leased<'c> {
    routed: Routed<'c>,
    lease: Lease,
    connection: Connected,
}

/// How far the connection to the database has come.
#[derive(Debug)]
pub(super) enum Connected {
    /// To be logged in on, with the lease.
    Dialled(Connection),
    /// It was logged in on with the lease before anybody came for it.
    LoggedIn(Attachment),
}

impl<'c> Leased<'c> {
    /// Takes what the pool has made ready for such a session; else asks for a credential, and dials
    /// the database meanwhile. Whatever fails first ends it; a credential that still comes is
    /// revoked.
    pub(super) async fn lease(mut routed: Routed<'c>) -> Result<Leased<'c>, Stop> {
        let proxy = routed.client().proxy;
        let (lease, connection) = match proxy.pool.take(routed.resolved()).await {
            Some((lease, attachment)) => {
                let trail = &mut routed.client().trail;
                (trail.warm, trail.reused) = (true, attachment.past.sessions > 0);
                (lease, Connected::LoggedIn(attachment))
            }
            None => {
                let route = Arc::clone(routed.resolved());
                let patience = proxy.limits().dead_peer_timeout;
                let request = routed.request();
                let lease = async { proxy.lessor.lease(request).await.map_err(Refusal::from) };
                let dial = async { backend::dial(&route, patience).await.map_err(Refusal::from) };
                let (lease, connection) = tokio::try_join!(lease, dial)?;
                (lease, Connected::Dialled(connection))
            }
        };
        routed.client().trail.role = Arc::clone(lease.credential().name());
        routed.client().reached(Stage::Leased);
        Ok(Leased { routed, lease, connection })
    }

    pub(super) fn into_parts(self) -> (Routed<'c>, Lease, Connected) {
        (self.routed, self.lease, self.connection)
    }
}
