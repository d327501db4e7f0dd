//! The socket below a TLS connection to a database, which can leave its event loop and come to
//! another: TLS itself knows nothing of that.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A TCP connection, wherever it is.
#[derive(Debug)]
pub(crate) enum Socket {
    /// On an event loop.
    Here(TcpStream),
    /// On none: nothing can be read or written.
    Detached(std::net::TcpStream),
    /// It could not be brought to an event loop, or away from one.
    Lost,
}

impl Socket {
    /// Leaves the event loop.
    pub(super) fn detach(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Socket::Lost) {
            Socket::Here(tcp) => *self = Socket::Detached(tcp.into_std()?),
            Socket::Detached(tcp) => *self = Socket::Detached(tcp),
            Socket::Lost => return Err(io::ErrorKind::NotConnected.into()),
        }
        Ok(())
    }

    /// Comes to the event loop that this runs on.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Socket::Lost) {
            Socket::Detached(tcp) => *self = Socket::Here(TcpStream::from_std(tcp)?),
            Socket::Here(tcp) => *self = Socket::Here(tcp),
            Socket::Lost => return Err(io::ErrorKind::NotConnected.into()),
        }
        Ok(())
    }

    fn here(self: Pin<&mut Self>) -> io::Result<Pin<&mut TcpStream>> {
        match self.get_mut() {
            Socket::Here(tcp) => Ok(Pin::new(tcp)),
            Socket::Detached(_) | Socket::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.here()?.poll_read(cx, into)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.here()?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.here()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.here()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.here()?.poll_shutdown(cx)
    }
}
