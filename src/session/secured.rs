//! Secured: TLS was negotiated, or the listener is a Unix socket, or it says plaintext.
//!
//! Source: `ProcessStartupPacket` in `backend_startup.c`; protocol chapter, "SSL Session
//! Encryption" and "GSSAPI Session Encryption".

use pgsilo_core::tls;
use pgsilo_wire::startup::{CancelRequest, InitialPacket, Startup};

use super::accepted::Accepted;
use super::client::{Client, Stop};
use crate::audit::Stage;
use crate::frontend::InitialBytes;
use crate::listener::ListenerTls;
use crate::metrics;
use crate::refusal::{Reason, Refusal};

/// Proves that a token may be asked for: it cannot be read on the wire. A cancel request
/// is let through in clear, as drivers send it so; it holds no token.
#[derive(Debug)]
pub(super) struct Secured<'c> {
    accepted: Accepted<'c>,
    request: Request,
}

/// The packet that ends the negotiation.
#[derive(Debug)]
pub(super) enum Request {
    Startup(Startup),
    Cancel(CancelRequest),
}

impl<'c> Secured<'c> {
    /// Answers requests for encryption, each at most once, up to the packet behind them.
    pub(super) async fn secure(mut accepted: Accepted<'c>) -> Result<Secured<'c>, Stop> {
        let client = accepted.client();
        let tls = client.listener.tls.as_ref();
        let (mut asked_tls, mut asked_gss) = (false, false);
        let request = loop {
            let may_begin_tls = tls.is_some() && !asked_tls && !client.frontend.stream.is_tls();
            match client.frontend.read_initial(may_begin_tls).await? {
                InitialBytes::Closed => return Err(Stop::ClientLeft),
                InitialBytes::TlsRecord => {
                    handshake(client, tls).await?;
                    if client.frontend.alpn() != Some(b"postgresql") {
                        let cause = "direct TLS without ALPN protocol \"postgresql\"";
                        return Err(Refusal::new(Reason::StartupMalformed, cause).into());
                    }
                }
                InitialBytes::Packet(InitialPacket::Ssl) if !asked_tls => {
                    asked_tls = true;
                    match tls.is_some() && !client.frontend.stream.is_tls() {
                        true => {
                            client.frontend.answer(b'S').await?;
                            handshake(client, tls).await?;
                        }
                        false => client.frontend.answer(b'N').await?,
                    }
                }
                InitialBytes::Packet(InitialPacket::Gss) if !asked_gss => {
                    asked_gss = true;
                    client.frontend.answer(b'N').await?;
                }
                InitialBytes::Packet(InitialPacket::Ssl | InitialPacket::Gss) => {
                    let cause = "encryption was asked for twice";
                    return Err(Refusal::new(Reason::StartupMalformed, cause).into());
                }
                InitialBytes::Packet(InitialPacket::Cancel(request)) => {
                    break Request::Cancel(request);
                }
                InitialBytes::Packet(InitialPacket::Startup(startup)) => {
                    break Request::Startup(startup);
                }
            }
        };
        let client = accepted.client();
        client.trail.tls = client.frontend.stream.is_tls();
        let wants_session = matches!(request, Request::Startup(_));
        if wants_session
            && !client.trail.tls
            && client.listener.tls.as_ref().is_some_and(|tls| tls.required)
        {
            return Err(Refusal::new(Reason::TlsRequired, "a session in clear")
                .hint("Connect with sslmode=require or stricter.")
                .into());
        }
        client.reached(Stage::Secured);
        Ok(Secured { accepted, request })
    }

    pub(super) fn into_parts(self) -> (Accepted<'c>, Request) {
        (self.accepted, self.request)
    }
}

async fn handshake(
    client: &mut Client,
    tls: Option<&ListenerTls<tls::Server>>,
) -> Result<(), Stop> {
    let Some(tls) = tls else {
        return Err(Stop::ClientLeft);
    };
    let failed = |client: &Client, error: &dyn std::fmt::Display| {
        metrics::TLS_FAILURES.increment(1);
        tracing::info!(address = &*client.trail.address, %error, "a client's TLS handshake failed");
        Stop::ClientLeft
    };
    let shaking = tls.server.handshake();
    if let Err(error) = client.frontend.accept_tls(shaking.config()).await {
        return Err(failed(client, &error));
    }
    let shown = client.frontend.certificates();
    if !shown.is_empty() {
        // The authorities may have changed meanwhile.
        match tls.server.authority_of(&shaking, shown) {
            Ok(authority) => client.authority = Some(authority),
            Err(error) => return Err(failed(client, &error)),
        }
    }
    Ok(())
}
