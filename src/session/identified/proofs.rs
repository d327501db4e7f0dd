//! The ways to prove who asks, one function each. Whatever a token came by, it is verified in one
//! place; and a client with a certificate cannot use a token that is bound to another.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgsilo_core::secret::Secret;
use pgsilo_core::tls::{Holder, thumbprint};
use pgsilo_wire::message;
use pgsilo_wire::sasl::{self, InitialResponse, KVSEP, OAUTHBEARER};
use pgsilo_wire::startup::StartupError;
use tokio::time::timeout;

use super::super::client::{Client, Stop};
use crate::identity::Identity;
use crate::lease::Authorization;
use crate::refusal::{Reason, Refusal};
use crate::token::Source;

/// How long a client may take to answer that its bearer token was refused.
const ANSWER: Duration = Duration::from_secs(3);

/// What was proved, and as whom a lease is asked for after that.
pub(super) type Proved = (Identity, Authorization);

/// Whether the process at the other end of a Unix socket may be there.
pub(super) fn peer(client: &Client) -> Result<(), Refusal> {
    let Some(uids) = &client.listener.uids else { return Ok(()) };
    match client.frontend.peer_uid() {
        Some(uid) if uids.contains(&uid) => Ok(()),
        Some(uid) => {
            Err(Refusal::new(Reason::PeerForbidden, format!("user id {uid} is not in allow_uids")))
        }
        None => {
            Err(Refusal::new(Reason::PeerForbidden, "the system does not tell the peer's user"))
        }
    }
}

/// The token travels as the password.
pub(super) async fn password(client: &mut Client, greeting: &[u8]) -> Result<Proved, Stop> {
    client.frontend.send(greeting).await.map_err(|_lost| Stop::ClientLeft)?;
    // A token, and the NUL behind it.
    let max = client.proxy.limits().max_token_bytes + 1;
    let body = client.frontend.read_password(max).await?;
    let Some(password) = message::parse_password(&body) else {
        return Err(Refusal::from(StartupError::Layout).into());
    };
    Ok(verify(client, Secret::new(password)).await?)
}

/// The token travels as SASL OAUTHBEARER. Who has none, or none that is good, is told where to get
/// one, and has to answer before it is refused (RFC 7628, 3.2.3).
pub(super) async fn bearer(
    client: &mut Client,
    greeting: &[u8],
    challenge: &[u8],
) -> Result<Proved, Stop> {
    let malformed = |cause: &dyn std::fmt::Display| {
        Stop::from(Refusal::new(Reason::StartupMalformed, cause.to_string()))
    };
    client.frontend.send(greeting).await.map_err(|_lost| Stop::ClientLeft)?;
    let max = client.proxy.limits().max_token_bytes + sasl::MAX_AROUND_TOKEN;
    let mut body = client.frontend.read_password(max).await?;
    let initial = InitialResponse::parse(&body)
        .ok_or_else(|| malformed(&"a SASL response whose lengths do not fit"))?;
    if initial.mechanism != OAUTHBEARER {
        return Err(malformed(&"a SASL mechanism that was not offered"));
    }
    let said = match initial.response {
        Some(said) => said,
        None => {
            // It wants to be asked first.
            let mut empty = Vec::new();
            message::sasl_continue(&mut empty, b"");
            client.frontend.send(&empty).await.map_err(|_lost| Stop::ClientLeft)?;
            body = client.frontend.read_password(max).await?;
            &body
        }
    };
    let token = sasl::bearer(said).map_err(|error| malformed(&error))?;
    let refusal = match verify(client, Secret::new(token)).await {
        Ok(proved) => return Ok(proved),
        Err(refusal) => refusal,
    };
    let mut told = Vec::new();
    message::sasl_continue(&mut told, challenge);
    let told_and_answered = async {
        client.frontend.send(&told).await?;
        client.frontend.read_password(max).await
    };
    // Whatever comes of it: its token was refused, and that is what it is told, and audited.
    let answer = timeout(ANSWER, told_and_answered).await;
    tracing::debug!(
        session = %client.trail.session,
        polite = matches!(answer, Ok(Ok(answer)) if *answer == [KVSEP]),
        "a client was told where to get a token"
    );
    Err(refusal.into())
}

/// The certificate of the handshake. Its authorities are the listener's, and were asked there.
pub(super) fn certificate(client: &mut Client) -> Result<Proved, Refusal> {
    let Some(leaf) = client.frontend.certificate() else {
        let cause = "no certificate was shown in the TLS handshake";
        return Err(Refusal::new(Reason::CertificateMissing, cause));
    };
    let holder =
        Holder::of(leaf).map_err(|error| Refusal::new(Reason::CertificateMissing, error))?;
    client.trail.subject = Arc::clone(holder.name());
    // The handshake looked at it; the client may have taken its time since.
    if holder.expires_at() <= SystemTime::now() {
        let cause = "the certificate has expired since its handshake";
        return Err(Refusal::new(Reason::CertificateMissing, cause));
    }
    let authorization = client.proxy.lessor.own_authorization().ok_or_else(|| {
        let cause = "a certificate is no token to show to OpenBAO, which lease.authority = \"session\" needs";
        Refusal::new(Reason::TokenMissing, cause)
    })?;
    Ok((Identity::Certificate(holder), authorization))
}

/// pgsilo has the token itself.
pub(super) async fn sidecar(client: &mut Client, source: &Source) -> Result<Proved, Refusal> {
    let token = source.token().await.map_err(Refusal::from)?;
    let verified = verify(client, token).await;
    if let Err(refusal) = &verified {
        match refusal.reason() {
            // No other token would be taken either.
            Reason::KeysUnavailable | Reason::TokenUnbound => {}
            _ => source.forget().await,
        }
    }
    verified
}

async fn verify(client: &mut Client, token: Secret) -> Result<Proved, Refusal> {
    let claims = match client.proxy.verifier().identify(&token).await {
        Ok(claims) => claims,
        Err(rejected) => {
            client.trail.learn_rejected(rejected.subject.as_deref(), rejected.token_id.as_deref());
            return Err(Refusal::from(rejected));
        }
    };
    client.trail.learn_claims(claims.names(), claims.access());
    if let Some(bound) = claims.bound_to() {
        let shown = client.frontend.certificate().map(thumbprint);
        if shown.as_ref() != Some(bound) {
            let cause = "the token is bound to a certificate that was not shown (RFC 8705)";
            return Err(Refusal::new(Reason::TokenUnbound, cause)
                .hint("Connect with the client certificate that the token was issued for."));
        }
    }
    Ok((Identity::Token(claims), client.proxy.lessor.authorization(token)))
}
