//! Identified: a token was shown and verified.
//!
//! The token travels as the password, over TLS or a Unix socket: every driver can do that.

use super::client::{Client, Stop};
use super::started::Started;
use crate::refusal::Refusal;
use crate::secret::Secret;
use crate::token::{Claims, Token};
use crate::wire::message;

/// Proves who asks: claims that an issuer signed, for this audience, for now.
#[derive(Debug)]
pub struct Identified<'c> {
    started: Started<'c>,
    claims: Claims,
    /// Kept only where OpenBAO is to be shown it.
    token: Option<Secret>,
}

impl<'c> Identified<'c> {
    /// Asks for the token and verifies it.
    pub(super) async fn identify(mut started: Started<'c>) -> Result<Identified<'c>, Stop> {
        let question = question(&started);
        let client = started.client();
        client.frontend.send(&question).await.map_err(|_lost| Stop::Left)?;
        // A token, and the NUL behind it.
        let max = client.proxy.limits().max_token_bytes + 1;
        let body = client.frontend.read_password(max).await?;
        let password = password(&body)?;
        let kept = client.proxy.lessor.needs_token().then(|| Secret::new(password.as_slice()));
        let token = Token::new(password);
        let claims = match client.proxy.verifier().identify(&token).await {
            Ok(claims) => claims,
            Err(rejected) => {
                client.trail.learn_rejected(&rejected);
                return Err(Refusal::from(rejected).into());
            }
        };
        client.trail.learn_claims(&claims);
        client.reached("identified");
        Ok(Identified { started, claims, token: kept })
    }

    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    pub(super) fn started(&self) -> &Started<'c> {
        &self.started
    }

    pub(super) fn client(&mut self) -> &mut Client {
        self.started.client()
    }

    pub(super) fn into_parts(self) -> (Started<'c>, Claims, Option<Secret>) {
        (self.started, self.claims, self.token)
    }
}

/// What the client is sent: which protocol this is, if it did not ask for just that, and the
/// request for a password.
fn question(started: &Started<'_>) -> Vec<u8> {
    let mut question = Vec::new();
    let startup = started.startup();
    let served = started.version();
    if startup.version != served || startup.extensions().next().is_some() {
        message::negotiate(&mut question, served, startup.extensions());
    }
    message::ask_password(&mut question);
    question
}

fn password(body: &[u8]) -> Result<Vec<u8>, Stop> {
    match message::parse_password(body) {
        Some(password) => Ok(password.to_vec()),
        None => Err(Refusal::from(crate::wire::startup::StartupError::Layout).into()),
    }
}
