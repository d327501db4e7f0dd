//! Accepted: a socket with its slot among the connections that are not logged in yet.

use super::client::{Client, Stop};
use crate::limits::TallyPermit;
use crate::refusal::{Reason, Refusal};
use std::net::IpAddr;

/// Proves that every bound on connections was kept.
#[derive(Debug)]
pub(super) struct Accepted<'c> {
    client: &'c mut Client,
    address: Option<TallyPermit<IpAddr>>,
}

impl<'c> Accepted<'c> {
    /// Accepts a connection if the limits allow it, once the client's address is known.
    pub(super) async fn accept(client: &'c mut Client) -> Result<Accepted<'c>, Stop> {
        if let Some(peer) = client.peer
            && client.listener.balancers.iter().any(|trusted| trusted.contains(&peer))
            && let Some(behind) = client.frontend.read_balancer().await?
        {
            client.comes_from(behind);
        }
        if client.handshake.is_none() {
            let cause = "as many connections as [limits] max_handshakes are logging in";
            return Err(Refusal::new(Reason::TooManyConnections, cause).into());
        }
        let Some(ip) = client.address else {
            return Ok(Accepted { client, address: None });
        };
        let Some(address) = client.proxy.addresses.count(&ip) else {
            let cause = "[limits] max_connections_per_address is reached";
            return Err(Refusal::new(Reason::TooManyConnections, cause)
                .about(" from this address")
                .into());
        };
        Ok(Accepted { client, address: Some(address) })
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.client
    }

    pub(super) fn into_parts(self) -> (&'c mut Client, Option<TallyPermit<IpAddr>>) {
        (self.client, self.address)
    }
}
