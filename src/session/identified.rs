//! Identified: a token was shown and verified, or a certificate was.
//!
//! How that is done is the listener's to say (`listener::Proof`): the token is the password, which
//! every driver can send, or SASL OAUTHBEARER; the certificate is that of the TLS handshake; a
//! sidecar's token is pgsilo's own to read. Either way it is over TLS, a Unix socket or loopback,
//! and what comes of it is an `Identity`.

mod proofs;

use pgsilo_wire::message;

use super::client::{Client, Stop};
use super::started::Started;
use crate::audit::Stage;
use crate::identity::Identity;
use crate::lease::Authorization;
use crate::listener::Proof;

/// Proves who asks: what an issuer or an authority signed, for this service, for now.
#[derive(Debug)]
pub(super) struct Identified<'c> {
    started: Started<'c>,
    identity: Box<Identity>,
    authorization: Authorization,
}

impl<'c> Identified<'c> {
    /// Has it proved who asks, in the listener's way.
    pub(super) async fn identify(mut started: Started<'c>) -> Result<Identified<'c>, Stop> {
        let mut greeting = negotiation(&started);
        let client = started.client();
        proofs::peer(client)?;
        let proved = match &client.listener.proof {
            Proof::Password => {
                message::ask_password(&mut greeting);
                proofs::password(client, &greeting).await?
            }
            Proof::Bearer { challenge } => {
                message::ask_bearer(&mut greeting);
                proofs::bearer(client, &greeting, challenge).await?
            }
            Proof::Certificate => {
                client.frontend.send(&greeting).await.map_err(|_lost| Stop::ClientLeft)?;
                proofs::certificate(client)?
            }
            Proof::Sidecar(source) => {
                client.frontend.send(&greeting).await.map_err(|_lost| Stop::ClientLeft)?;
                proofs::sidecar(client, source).await?
            }
        };
        client.reached(Stage::Identified);
        let (identity, authorization) = proved;
        Ok(Identified { started, identity: Box::new(identity), authorization })
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn authorization(&self) -> &Authorization {
        &self.authorization
    }

    pub(super) fn started(&self) -> &Started<'c> {
        &self.started
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.started.client()
    }

    pub(super) fn into_parts(self) -> (Started<'c>, Box<Identity>, Authorization) {
        (self.started, self.identity, self.authorization)
    }
}

/// Which protocol this is, if the client did not ask for just that.
fn negotiation(started: &Started<'_>) -> Vec<u8> {
    let mut greeting = Vec::new();
    let startup = started.startup();
    let served = started.version();
    if startup.version != served || startup.extensions().next().is_some() {
        message::negotiate(&mut greeting, served, startup.extensions());
    }
    greeting
}
