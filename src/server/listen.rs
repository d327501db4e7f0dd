//! Listening sockets: bound with clear errors, accepted from without ever giving up.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::core::Cores;
use crate::limits::{Eviction, Slot, Slots};
use crate::listener::{ListenAddress, Listener};
use crate::log::Failures;
use crate::metrics;
use crate::proxy::Proxy;
use crate::session::Client;
use crate::stream::{Stream, out_of_resources, tune};

/// The most connections that the kernel may hold for us.
const MAX_BACKLOG: usize = 4096;
/// A pause after `accept(2)` failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A socket that cannot be listened on, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {on}: {error}{advice}")]
pub struct ListenError {
    on: String,
    error: io::Error,
    advice: &'static str,
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct Bound(Socket);

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// A connection on its way from its listener to its core.
#[derive(Debug)]
pub(super) struct Arrival {
    socket: Raw,
    address: Option<SocketAddr>,
    listener: &'static Listener,
    proxy: &'static Proxy,
    handshake: Option<(Slot, Eviction)>,
    permits: ConnectionPermits,
}

/// A connection's place among those that are open, and among those that are refused.
#[derive(Debug)]
pub(super) struct ConnectionPermits {
    _refusal: Option<OwnedSemaphorePermit>,
    _tracked: TaskTrackerToken,
}

/// A socket that belongs to no runtime yet.
#[derive(Debug)]
enum Raw {
    Tcp(std::net::TcpStream),
    Unix(unix::UnixStream),
}

/// Removes the socket's file when the listener goes.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _already_gone = fs::remove_file(&self.0);
    }
}

/// Binds every listener of the configuration, or none. Where strangers have all of `places`, the
/// kernel holds as many newcomers of each TCP listener's: those wait a second then, and others try
/// again. With more of them an honest client would wait for as many seconds as they are times the
/// places.
pub(super) fn bind_all(listeners: &[Listener], places: usize) -> Result<Vec<Bound>, ListenError> {
    listeners.iter().map(|listener| bind(listener, places.min(MAX_BACKLOG) as u32)).collect()
}

/// Binds the address of the HTTP endpoints.
#[expect(clippy::disallowed_methods, reason = "the HTTP endpoints' address")]
pub(super) async fn bind_admin(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|error| refused(address.to_string(), error))
}

fn bind(listener: &Listener, backlog: u32) -> Result<Bound, ListenError> {
    let socket = match &listener.place {
        ListenAddress::Tcp(address) => Socket::Tcp(
            bind_tcp(*address, backlog).map_err(|error| refused(address.to_string(), error))?,
        ),
        ListenAddress::Unix { path, mode } => {
            let socket = bind_unix(path, *mode)
                .map_err(|error| refused(path.display().to_string(), error))?;
            Socket::Unix(socket, SocketFile(path.clone()))
        }
    };
    Ok(Bound(socket))
}

#[expect(clippy::disallowed_methods, reason = "a listener's address")]
fn bind_tcp(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(backlog)
}

/// A stale socket file is replaced; one with a listener is not.
#[expect(
    clippy::disallowed_methods,
    reason = "a listener's address, and whether somebody listens there"
)]
fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        match unix::UnixStream::connect(path) {
            Ok(_living) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?;
            }
            Err(error) => return Err(error),
        }
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

fn refused(on: String, error: io::Error) -> ListenError {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => "; another process has it: stop that, or choose another",
        io::ErrorKind::PermissionDenied => {
            "; choose a port above 1023, or a folder that this user may write to"
        }
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        io::ErrorKind::NotFound => "; its folder does not exist",
        _ => "",
    };
    ListenError { on, error, advice }
}

impl Bound {
    /// For the log.
    pub(super) fn name(&self) -> String {
        match &self.0 {
            Socket::Tcp(tcp) => {
                tcp.local_addr().map_or_else(|error| error.to_string(), |a| a.to_string())
            }
            Socket::Unix(_, SocketFile(path)) => path.display().to_string(),
        }
    }

    /// Accepts for as long as it is let. `handshakes` are this listener's, and so is the bound on
    /// those who are told that there is no place: what comes in elsewhere takes nothing away here.
    pub(super) async fn accept_all(
        self,
        listener: &'static Listener,
        proxy: &'static Proxy,
        handshakes: &'static Slots,
        cores: Arc<Cores>,
        tasks: TaskTracker,
    ) {
        let refusing = Arc::new(Semaphore::new(proxy.limits().max_handshakes / 4 + 16));
        let mut failures = Failures::default();
        loop {
            let (socket, address) = match self.accept(proxy.limits().dead_peer_timeout).await {
                Ok(accepted) => accepted,
                Err(error) if !out_of_resources(&error) => {
                    tracing::debug!(%error, "a connection was gone before it was accepted");
                    continue;
                }
                Err(error) => {
                    failures.another(|failures| {
                        let listener = self.name();
                        tracing::warn!(%error, listener, failures, "cannot accept connections");
                    });
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            metrics::CONNECTIONS.increment(1);
            let handshake = handshakes.enter().await;
            let refusal = match handshake {
                Some(_) => None,
                // A refusal takes time as well: beyond this many at once, connections are closed
                // unheard.
                None => match Arc::clone(&refusing).try_acquire_owned() {
                    Ok(permit) => Some(permit),
                    Err(_full) => {
                        metrics::DROPPED.increment(1);
                        continue;
                    }
                },
            };
            cores.hand_over(Arrival {
                socket,
                address,
                listener,
                proxy,
                handshake,
                permits: ConnectionPermits { _refusal: refusal, _tracked: tasks.token() },
            });
        }
    }

    async fn accept(&self, dead_peer_timeout: Duration) -> io::Result<(Raw, Option<SocketAddr>)> {
        match &self.0 {
            Socket::Tcp(listener) => {
                let (tcp, address) = listener.accept().await?;
                tune(&tcp, dead_peer_timeout)?;
                Ok((Raw::Tcp(tcp.into_std()?), Some(address)))
            }
            Socket::Unix(listener, _) => {
                let (unix, _unnamed) = listener.accept().await?;
                Ok((Raw::Unix(unix.into_std()?), None))
            }
        }
    }
}

impl Arrival {
    /// Takes the connection to the core that this runs on, with what it holds on to until it ends.
    pub(super) fn open(self) -> Option<(Box<Client>, Option<Eviction>, ConnectionPermits)> {
        let Arrival { socket, address, listener, proxy, handshake, permits } = self;
        let stream = match socket {
            Raw::Tcp(tcp) => TcpStream::from_std(tcp).map(Stream::Tcp),
            Raw::Unix(unix) => UnixStream::from_std(unix).map(Stream::Unix),
        };
        let stream = stream
            .inspect_err(|error| tracing::error!(%error, "a core cannot take a connection"))
            .ok()?;
        let (slot, eviction) = handshake.unzip();
        let client = Client::new(stream, address, listener, proxy, slot);
        Some((Box::new(client), eviction, permits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where sockets of one test are; removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("pgsilo-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).expect("made");
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _left = fs::remove_dir_all(&self.0);
        }
    }

    fn said(path: &Path) -> String {
        match bind_unix(path, 0o600) {
            Ok(_) => "bound".to_owned(),
            Err(error) => refused("it".to_owned(), error).to_string(),
        }
    }

    #[tokio::test]
    async fn a_left_over_socket_file_is_replaced_and_no_other_file() {
        let folder = Folder::new("sockets");
        let path = folder.0.join("socket");
        let living = bind_unix(&path, 0o600).expect("bound");
        let taken = said(&path);
        assert!(taken.contains("another process has it"), "{taken}");
        drop(living);
        assert!(path.exists(), "it is left over");
        assert_eq!(said(&path), "bound");
        fs::remove_file(&path).expect("removed");
        fs::write(&path, "kept").expect("written");
        assert!(said(&path).contains("another process has it"));
        assert_eq!(fs::read_to_string(&path).expect("still there"), "kept");
        let nowhere = said(&folder.0.join("absent/socket"));
        assert!(nowhere.contains("its folder does not exist"), "{nowhere}");
    }

    #[tokio::test]
    async fn a_socket_file_has_its_mode_and_is_removed_with_its_listener() {
        let folder = Folder::new("socket-modes");
        for mode in [0o600, 0o660, 0o777] {
            let path = folder.0.join(format!("{mode:o}"));
            let socket = bind_unix(&path, mode).expect("bound");
            let bound = Bound(Socket::Unix(socket, SocketFile(path.clone())));
            let file = fs::metadata(&path).expect("there");
            assert_eq!(file.permissions().mode() & 0o777, mode);
            assert_eq!(bound.name(), path.display().to_string());
            drop(bound);
            assert!(!path.exists());
        }
    }

    #[tokio::test]
    async fn an_address_in_use_is_reported_with_advice() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let first = bind_admin(any).await.expect("bound");
        let address = first.local_addr().expect("an address");
        for error in [
            bind_admin(address).await.map(drop).expect_err("taken"),
            bind_tcp(address, 1)
                .map(drop)
                .map_err(|e| refused(address.to_string(), e))
                .expect_err("taken"),
        ] {
            let expected = format!(
                "cannot listen on {address}: Address already in use (os error 98); \
                 another process has it: stop that, or choose another"
            );
            assert_eq!(error.to_string(), expected);
        }
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 0));
        let error = bind_admin(elsewhere).await.expect_err("not here").to_string();
        assert!(error.contains("this machine does not have that address"), "{error}");
    }
}
