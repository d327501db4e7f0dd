//! Leased: a credential for this tenant's placement, and a connection to log in on.

use std::sync::Arc;

use super::client::Stop;
use super::routed::Routed;
use crate::backend::{self, Connection};
use crate::lease::Lease;
use crate::refusal::Refusal;

/// Proves that OpenBAO granted a credential for just this session.
#[derive(Debug)]
pub struct Leased<'c> {
    routed: Routed<'c>,
    lease: Lease,
    connection: Connection,
}

impl<'c> Leased<'c> {
    /// Asks for a credential, and dials the database meanwhile. Whatever fails first ends it;
    /// a credential that still comes is revoked.
    pub(super) async fn lease(mut routed: Routed<'c>) -> Result<Leased<'c>, Stop> {
        let lessor = &routed.client().proxy.lessor;
        let token = routed.take_token();
        let lease = async { lessor.lease(routed.request(token)).await.map_err(Refusal::from) };
        let dial = async { backend::dial(&routed).await.map_err(Refusal::from) };
        let (lease, connection) = tokio::try_join!(lease, dial)?;
        routed.client().trail.role = Arc::clone(lease.credential().name());
        routed.client().reached("leased");
        Ok(Leased { routed, lease, connection })
    }

    pub(super) fn into_parts(self) -> (Routed<'c>, Lease, Connection) {
        (self.routed, self.lease, self.connection)
    }
}
