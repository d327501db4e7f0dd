//! A connected socket of any kind that pgsilo speaks through, in clear or under TLS.
//!
//! One enum rather than a trait object: the relay polls it for every chunk. It holds no buffer of
//! its own, so what was not asked for stays with the kernel (or inside rustls). Opening a
//! connection is not done here: the listener accepts, `backend.rs` dials. A connection to a
//! database can be detached: taken from one event loop and resumed on another.

mod diag;
mod peer;
mod socket;

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::unix::net as unix;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pgsilo_core::addresses::is_scarce;
use rustix::io::Errno;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

pub(crate) use peer::{Look, Peer, check_kernel, tune};
use socket::Socket;

/// A connection to a client or to a database.
#[derive(Debug)]
pub(crate) enum Stream {
    /// TCP in clear.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS with a client.
    Frontend(Box<server::TlsStream<TcpStream>>),
    /// TLS with a database.
    Backend(Box<client::TlsStream<Socket>>),
    /// A TLS handshake is under way, or failed: there is nothing to speak through.
    Gone,
}

impl Stream {
    /// Turns a client's TCP connection into TLS.
    ///
    /// While this runs, and after an error, the stream is [`Stream::Gone`]: in the middle of a
    /// handshake nothing that could be written would be understood.
    pub(crate) async fn accept_tls(&mut self, tls: Arc<rustls::ServerConfig>) -> io::Result<()> {
        match std::mem::replace(self, Stream::Gone) {
            Stream::Tcp(tcp) => {
                let stream = TlsAcceptor::from(tls).accept(tcp).await?;
                *self = Stream::Frontend(Box::new(stream));
                Ok(())
            }
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Turns a TCP connection to a database into TLS.
    pub(crate) async fn connect_tls(
        self,
        tls: Arc<rustls::ClientConfig>,
        name: ServerName<'static>,
    ) -> io::Result<Stream> {
        match self {
            Stream::Tcp(tcp) => {
                let stream = TlsConnector::from(tls).connect(name, Socket::Here(tcp)).await?;
                Ok(Stream::Backend(Box::new(stream)))
            }
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Leaves its event loop. Only connections to databases can.
    pub(crate) fn detach(self) -> io::Result<DetachedStream> {
        match self {
            Stream::Tcp(tcp) => tcp.into_std().map(DetachedStream::Tcp),
            Stream::Unix(unix) => unix.into_std().map(DetachedStream::Unix),
            Stream::Backend(mut tls) => {
                tls.get_mut().0.detach()?;
                Ok(DetachedStream::Backend(tls))
            }
            Stream::Frontend(_) | Stream::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Whether bytes have arrived that were not read yet. Of a TLS stream: false.
    pub(crate) fn has_unread(&self) -> bool {
        let mut byte = [0; 1];
        let read = match self {
            Stream::Tcp(tcp) => tcp.try_read(&mut byte),
            Stream::Unix(unix) => unix.try_read(&mut byte),
            Stream::Frontend(_) | Stream::Backend(_) | Stream::Gone => return false,
        };
        matches!(read, Ok(1))
    }

    /// The TCP connection, if it is one that is on an event loop.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(tcp) => Some(tcp),
            Stream::Frontend(tls) => Some(tls.get_ref().0),
            Stream::Backend(tls) => match tls.get_ref().0 {
                Socket::Here(tcp) => Some(tcp),
                Socket::Detached(_) | Socket::Lost => None,
            },
            Stream::Unix(_) | Stream::Gone => None,
        }
    }

    /// The other end's address, of a TCP connection.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.tcp()?.peer_addr().ok()
    }

    /// Whether TLS protects it.
    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Stream::Frontend(_) | Stream::Backend(_))
    }
}

/// A connection to a database that is on no event loop.
#[derive(Debug)]
pub(crate) enum DetachedStream {
    Tcp(std::net::TcpStream),
    Unix(unix::UnixStream),
    Backend(Box<client::TlsStream<Socket>>),
}

impl DetachedStream {
    /// Whether it is open and no unread bytes have arrived, as far as this machine knows.
    pub(crate) fn is_silent(&self) -> bool {
        let socket = match self {
            DetachedStream::Tcp(tcp) => SockRef::from(tcp),
            DetachedStream::Unix(unix) => SockRef::from(unix),
            DetachedStream::Backend(tls) => match tls.get_ref() {
                // With something left inside, or told of an end, TLS wants to read no more.
                (Socket::Detached(tcp), tls) if tls.wants_read() => SockRef::from(tcp),
                _ => return false,
            },
        };
        let peeked = socket.peek(&mut [MaybeUninit::uninit(); 1]);
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Brings it to the event loop that this runs on.
    pub(crate) fn resume(self) -> io::Result<Stream> {
        match self {
            DetachedStream::Tcp(tcp) => TcpStream::from_std(tcp).map(Stream::Tcp),
            DetachedStream::Unix(unix) => UnixStream::from_std(unix).map(Stream::Unix),
            DetachedStream::Backend(mut tls) => {
                tls.get_mut().0.resume()?;
                Ok(Stream::Backend(tls))
            }
        }
    }
}

/// Calls the same method on whichever stream is inside.
macro_rules! on_each {
    ($stream:expr, $io:ident => $call:expr) => {
        match $stream.get_mut() {
            Stream::Tcp(tcp) => {
                let $io = Pin::new(tcp);
                $call
            }
            Stream::Unix(unix) => {
                let $io = Pin::new(unix);
                $call
            }
            Stream::Frontend(tls) => {
                let $io = Pin::new(tls);
                $call
            }
            Stream::Backend(tls) => {
                let $io = Pin::new(tls);
                $call
            }
            Stream::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_each!(self, stream => stream.poll_read(cx, into))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_each!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_each!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_each!(self, stream => stream.poll_shutdown(cx))
    }
}

/// Whether it is this process or machine that has no more to give, local ports included. Ours to
/// mend, not the peer's.
pub(crate) fn out_of_resources(error: &io::Error) -> bool {
    is_scarce(error) || Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL)
}

#[cfg(test)]
mod tests;
