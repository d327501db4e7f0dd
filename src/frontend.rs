//! The client's side of the handshake: framed reads with bounds, and the close after a refusal.
//!
//! Reads take exactly the bytes of one packet, never more: what a client sends behind it stays in
//! the kernel (or in rustls), so nothing can survive a change to TLS, and bytes pipelined behind
//! the password wait for the splice in constant memory. What is sent in clear behind a request for
//! encryption is fatal (CVE-2021-43766).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgsilo_wire::startup::{InitialPacket, MAX_BODY, MIN_BODY, StartupError};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use crate::proxy_protocol::{self, NoHeader};
use crate::stream::Stream;

/// How long a client may take to read a refusal before its socket is closed.
const LINGER: Duration = Duration::from_secs(1);
/// How many unread bytes are taken from a refused client, so that closing sends no reset that
/// would overtake the refusal.
const LINGER_BYTES: usize = 128 * 1024;

/// A client's connection during its login.
#[derive(Debug)]
pub(crate) struct Frontend {
    pub(crate) stream: Stream,
}

/// What a client sends on a connection that has not started yet.
#[derive(Debug)]
pub(crate) enum InitialBytes {
    Packet(InitialPacket),
    /// A TLS record: the client negotiates directly (`sslnegotiation=direct`).
    TlsRecord,
    /// Nothing but a close: a probe of a load balancer, or a client that changed its mind.
    Closed,
}

/// Why a client's packet could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrontendError {
    #[error("the connection was lost: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Startup(#[from] StartupError),
    #[error(transparent)]
    Balancer(#[from] NoHeader),
    #[error("bytes were sent behind a request for encryption")]
    Smuggled,
    #[error("expected a password message, got {0:?}")]
    NotAPassword(char),
    #[error("a password message of {0} bytes")]
    TooLong(usize),
}

impl Frontend {
    pub(crate) fn new(stream: Stream) -> Frontend {
        Frontend { stream }
    }

    /// Reads the header that a balancer sends first: the client's address, or `None` where the
    /// balancer speaks for itself.
    pub(crate) async fn read_balancer(&mut self) -> Result<Option<SocketAddr>, FrontendError> {
        let mut header = vec![0; proxy_protocol::FIXED];
        self.stream.read_exact(&mut header[..1]).await?;
        match header[0] {
            proxy_protocol::VERSION_1 => {
                header.truncate(1);
                while header.len() < proxy_protocol::MAX_LINE && !header.ends_with(b"\n") {
                    header.push(self.stream.read_u8().await?);
                }
            }
            proxy_protocol::VERSION_2 => {
                let mut fixed = [0; proxy_protocol::FIXED];
                fixed[0] = header[0];
                self.stream.read_exact(&mut fixed[1..]).await?;
                header.copy_from_slice(&fixed);
                header.resize(proxy_protocol::FIXED + proxy_protocol::length_behind(&fixed)?, 0);
                self.stream.read_exact(&mut header[proxy_protocol::FIXED..]).await?;
            }
            _ => return Err(NoHeader.into()),
        }
        Ok(proxy_protocol::parse(&header)?)
    }

    /// Reads one untagged packet. `tls` says whether a TLS record may come instead of one.
    pub(crate) async fn read_initial(&mut self, tls: bool) -> Result<InitialBytes, FrontendError> {
        if let (true, Stream::Tcp(tcp)) = (tls, &self.stream) {
            let mut byte = [0; 1];
            if tcp.peek(&mut byte).await? == 1 && byte[0] == 0x16 {
                return Ok(InitialBytes::TlsRecord);
            }
        }
        let mut length = [0; 4];
        if self.stream.read(&mut length[..1]).await? == 0 {
            return Ok(InitialBytes::Closed);
        }
        self.stream.read_exact(&mut length[1..]).await?;
        let body = (u32::from_be_bytes(length) as usize).wrapping_sub(4);
        if !(MIN_BODY..=MAX_BODY).contains(&body) {
            return Err(StartupError::Length(body.wrapping_add(4)).into());
        }
        let mut packet = vec![0; body];
        self.stream.read_exact(&mut packet).await?;
        Ok(InitialBytes::Packet(InitialPacket::parse(&Bytes::from(packet))?))
    }

    /// Answers a request for encryption with one byte. Bytes that were sent behind the request
    /// were sent in clear by somebody who did not wait: CVE-2021-3935, CVE-2021-43766.
    pub(crate) async fn answer(&mut self, byte: u8) -> Result<(), FrontendError> {
        if self.stream.has_unread() {
            return Err(FrontendError::Smuggled);
        }
        self.send(&[byte]).await?;
        Ok(())
    }

    /// The server's half of a TLS handshake.
    pub(crate) async fn accept_tls(&mut self, tls: Arc<rustls::ServerConfig>) -> io::Result<()> {
        self.stream.accept_tls(tls).await
    }

    /// The ALPN protocol agreed on, if any.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match &self.stream {
            Stream::Frontend(tls) => tls.get_ref().1.alpn_protocol(),
            _ => None,
        }
    }

    /// The certificate that the client showed in TLS, if any: its authorities are the listener's.
    pub(crate) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.certificates().first()
    }

    /// The same, and what it showed beside it.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        match &self.stream {
            Stream::Frontend(tls) => tls.get_ref().1.peer_certificates().unwrap_or_default(),
            _ => &[],
        }
    }

    /// The host that the client named in TLS (SNI), in lower case.
    pub(crate) fn server_name(&self) -> Option<&str> {
        match &self.stream {
            Stream::Frontend(tls) => tls.get_ref().1.server_name(),
            _ => None,
        }
    }

    /// Who is at the other end of a Unix socket.
    pub(crate) fn peer_uid(&self) -> Option<u32> {
        match &self.stream {
            Stream::Unix(unix) => unix.peer_cred().ok().map(|peer| peer.uid()),
            _ => None,
        }
    }

    /// Reads the body of a `p` message of at most `max` bytes, its final NUL included.
    pub(crate) async fn read_password(
        &mut self,
        max: usize,
    ) -> Result<Zeroizing<Vec<u8>>, FrontendError> {
        let mut header = [0; 5];
        self.stream.read_exact(&mut header).await?;
        let [tag, length @ ..] = header;
        let body = (u32::from_be_bytes(length) as usize).saturating_sub(4);
        if tag != b'p' {
            return Err(FrontendError::NotAPassword(char::from(tag)));
        }
        if body > max {
            return Err(FrontendError::TooLong(body));
        }
        let mut password = Zeroizing::new(vec![0; body]);
        self.stream.read_exact(&mut password).await?;
        Ok(password)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Sends the last message and closes, so that the client gets to read it.
    pub(crate) async fn send_last(&mut self, bytes: &[u8]) {
        let until = Instant::now() + LINGER;
        let _lost_or_late = timeout_at(until, async {
            self.send(bytes).await?;
            self.stream.shutdown().await?;
            let mut sink = [0; 1024];
            let mut taken = 0;
            while taken < LINGER_BYTES {
                match self.stream.read(&mut sink).await? {
                    0 => break,
                    n => taken += n,
                }
            }
            io::Result::Ok(())
        })
        .await;
    }
}

#[cfg(test)]
mod tests;
