//! What a session owns from its login to its end.

use std::net::IpAddr;
use std::sync::Arc;

use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::Access;

use crate::backend::History;
use crate::cancel::CancelKey;
use crate::clusters::Reign;
use crate::identity::Identity;
use crate::lease::Lease;
use crate::limits::TallyPermit;
use crate::route::Route;
use crate::sessions::SessionPermit;

/// In the order in which it is dropped, behind the connection to the database: the lease last, when
/// nothing uses its credential any more.
#[derive(Debug)]
pub(super) struct SessionResources {
    pub(super) cancel_key: CancelKey,
    pub(super) tenant: Arc<Tenant>,
    pub(super) identity: Box<Identity>,
    pub(super) access: Access,
    pub(super) permit: SessionPermit,
    pub(super) address: Option<TallyPermit<IpAddr>>,
    /// For reuse of the connection by another session, if that is configured.
    pub(super) reusable: Option<Box<Reusable>>,
    /// The server, where it is one of several.
    pub(super) reign: Option<Reign>,
    pub(super) lease: Lease,
}

/// What the pool needs to know of a connection that a session returns.
#[derive(Debug)]
pub(super) struct Reusable {
    pub(super) route: Arc<Route>,
    pub(super) greeting: Vec<u8>,
    pub(super) history: History,
}
