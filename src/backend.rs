//! The database's side: the one dial, TLS, and what a dialled connection may become.
//!
//! Invariant: a connection is opened to the placement of a [`Route`], which only a routed session
//! has, and nowhere else, and logs in with that route's settings; so tenant, placement and
//! credential cannot be crossed. A [`Redial`] remembers where a route led, for cancel requests, and
//! is made nowhere else. No other module connects a socket to a database; `login.rs` is all that
//! may speak first on a fresh connection.

mod binding;
mod error;
mod hashing;
mod idle;
mod login;
mod messages;
mod reset;
mod seal;
mod version;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgsilo_core::addresses::{self, Attempts, Unreached};
use pgsilo_core::registry::{Host, PlacementTls, Tenant};
use pgsilo_core::tenant::TenantId;
use pgsilo_core::tls;
use pgsilo_wire::startup::CancelRequest;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use binding::Channel;
pub(crate) use error::BackendError;
pub(crate) use idle::{Attachment, History, IdleBackend};
use version::ServerVersion;

use crate::clusters::{ClusterState, Clusters, Wanted};
use crate::route::Route;
use crate::stream::{Stream, out_of_resources, tune};

/// From the first packet of a dial to the end of its TLS handshake.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The same of one server of several, at least.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);
/// How long a database may take to act on a cancel request and close.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// A connection to a tenant's database, before any login.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    route: Arc<Route>,
    redial: Redial,
    /// The server's version, once it was reported.
    version: Option<ServerVersion>,
    /// What is known of its cluster's servers, where there are several.
    cluster: Option<Arc<ClusterState>>,
    /// Servers of the cluster that were not tried, by their numbers.
    untried: Vec<usize>,
    /// Its server was taken for a standby when it was dialled, and may be one.
    at_standby: bool,
    /// Received and not parsed yet: several messages arrive at once.
    unread: BytesMut,
    /// Bytes of messages that the database has sent so far, to us.
    heard: usize,
}

/// Where a route's database is: enough to send it a cancel request.
#[derive(Clone, Debug)]
pub(crate) struct Redial {
    tenant: Arc<Tenant>,
    /// Which of its cluster's endpoints it is.
    endpoint: usize,
    /// After what silence it counts as gone.
    dead_peer_timeout: Duration,
    /// Of its host's addresses, the one that was connected to: a cancel key is that server's.
    at: Option<SocketAddr>,
}

/// Why a database could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// This process or machine is out of descriptors, buffers or memory.
    #[error("no socket could be made: {0}")]
    Local(io::Error),
    /// The address does not resolve, or nothing answers there.
    #[error("cannot connect to {to}: {error}")]
    Connect { to: String, error: io::Error },
    /// Nothing came back in time.
    #[error("{to} did not answer within {} s", patience.as_secs_f32())]
    Timeout { to: String, patience: Duration },
    /// TLS is asked for and the server has none. Going on in clear is not an option.
    #[error("{0} does not offer TLS, which its placement asks for")]
    NoTls(String),
    /// An answer to SSLRequest that is neither `S` nor `N`.
    #[error("{to} answered the request for TLS with byte {byte:#04x}: is it a PostgreSQL server?")]
    NotPostgres { to: String, byte: u8 },
    /// The certificate or the handshake was not acceptable.
    #[error("TLS with {to} failed: {error}")]
    Tls { to: String, error: io::Error },
}

/// Opens a connection to the database of a route, under TLS where its placement asks for it. A
/// database that has answered nothing for `dead_peer_timeout` counts as gone. Of several servers the
/// first that answers, the primary before others as far as that is known.
pub(crate) async fn dial(
    route: &Arc<Route>,
    clusters: &Clusters,
    dead_peer_timeout: Duration,
) -> Result<Connection, DialError> {
    let route = Arc::clone(route);
    let cluster = &route.tenant().placement().cluster;
    let (cluster, untried) = match clusters.of(cluster) {
        None => (None, vec![0]),
        Some(state) => {
            let order = state.order(cluster, route.wants());
            (Some(state), order)
        }
    };
    Servers { route, cluster, untried, tried: None, dead_peer_timeout }.reach().await
}

/// Servers of a route's cluster that may be dialled.
#[derive(Debug)]
pub(crate) struct Servers {
    route: Arc<Route>,
    cluster: Option<Arc<ClusterState>>,
    /// By their numbers, the first to be tried first; not empty.
    untried: Vec<usize>,
    /// The one that was tried before them, if one was.
    tried: Option<usize>,
    dead_peer_timeout: Duration,
}

impl Servers {
    /// How many the cluster has; not 0.
    pub(crate) fn of_how_many(&self) -> u32 {
        let endpoints = &self.route.tenant().placement().cluster.endpoints;
        u32::try_from(endpoints.len()).unwrap_or(u32::MAX).max(1)
    }

    /// The server that was tried before these did not answer.
    pub(crate) fn tell_of_silence(&self) {
        let endpoints = &self.route.tenant().placement().cluster.endpoints;
        if let Some((state, tried)) = self.cluster.as_ref().zip(self.tried) {
            state.was_no_use(&endpoints[tried]);
            state.saw_nothing(&endpoints[tried]);
        }
    }

    /// Dials them one after the other, until one answers. One that does not leaves the others their time.
    ///
    /// # Errors
    /// When none does: what was wrong with the last.
    pub(crate) async fn reach(self) -> Result<Connection, DialError> {
        let patience = (DIAL_TIMEOUT / self.of_how_many()).max(LEAST_PATIENCE);
        let Servers { route, cluster, untried, dead_peer_timeout, .. } = self;
        let endpoints = &route.tenant().placement().cluster.endpoints;
        let mut untried = untried.into_iter();
        let mut last = None;
        while let Some(endpoint) = untried.next() {
            let tenant = Arc::clone(route.tenant());
            let mut redial = Redial { tenant, endpoint, dead_peer_timeout, at: None };
            let at_standby = route.wants() == Wanted::Standby
                && cluster.as_ref().is_some_and(|state| state.may_read(&endpoints[endpoint]));
            match redial.connect(patience).await {
                Ok(stream) => {
                    redial.at = stream.peer();
                    let mut connection = Connection::new(stream, &route, redial);
                    (connection.cluster, connection.untried) = (cluster, untried.collect());
                    connection.at_standby = at_standby;
                    return Ok(connection);
                }
                Err(error @ DialError::Local(_)) => return Err(error),
                Err(error) => {
                    if let Some(state) = &cluster {
                        state.was_no_use(&endpoints[endpoint]);
                        state.saw_nothing(&endpoints[endpoint]);
                    }
                    last = Some(error);
                }
            }
        }
        let none = || DialError::Local(io::ErrorKind::AddrNotAvailable.into());
        Err(last.unwrap_or_else(none))
    }
}

impl Redial {
    fn host(&self) -> &Host {
        &self.tenant.placement().cluster.endpoints[self.endpoint]
    }

    async fn connect(&self, patience: Duration) -> Result<Stream, DialError> {
        let attempts = Attempts::default();
        let connect = async {
            let stream = self.connect_in_clear(&attempts).await?;
            match &self.tenant.placement().cluster.tls {
                PlacementTls::Disable => Ok(stream),
                PlacementTls::Enabled { config, server_name, .. } => {
                    self.connect_tls(stream, Arc::clone(config), server_name.as_deref()).await
                }
            }
        };
        match timeout(patience, connect).await {
            Ok(result) => result,
            Err(_elapsed) => {
                let to = format!("{} ({attempts})", self.placement_text());
                Err(DialError::Timeout { to, patience })
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the place that dials: a route's placement")]
    async fn connect_in_clear(&self, attempts: &Attempts) -> Result<Stream, DialError> {
        let stream = match self.host() {
            Host::Tcp { host, port } => Stream::Tcp(self.connect_tcp(host, *port, attempts).await?),
            Host::Unix(path) => {
                let connected = UnixStream::connect(path).await;
                Stream::Unix(connected.map_err(|e| self.unconnected(out_of_resources(&e), e))?)
            }
        };
        if let Stream::Tcp(tcp) = &stream {
            tune(tcp, self.dead_peer_timeout).map_err(DialError::Local)?;
        }
        Ok(stream)
    }

    /// To the first of its addresses that answers; the error names each.
    async fn connect_tcp(
        &self,
        host: &str,
        port: u16,
        attempts: &Attempts,
    ) -> Result<TcpStream, DialError> {
        let all = match self.at {
            Some(address) => vec![address],
            None => {
                let found = addresses::resolve(host, port).await;
                found.map_err(|e| self.unconnected(out_of_resources(&e), e))?
            }
        };
        #[expect(clippy::disallowed_methods, reason = "the place that dials: a route's placement")]
        let connected = addresses::race(all, attempts, TcpStream::connect).await;
        connected.map_err(|Unreached { is_ours, error }| self.unconnected(is_ours, error))
    }

    fn unconnected(&self, is_ours: bool, error: io::Error) -> DialError {
        match is_ours {
            true => DialError::Local(error),
            false => DialError::Connect { to: self.placement_text(), error },
        }
    }

    /// SSLRequest, exactly one byte back, then the handshake: a byte more would have come from
    /// somebody in the middle (CVE-2021-23222).
    async fn connect_tls(
        &self,
        mut stream: Stream,
        config: Arc<rustls::ClientConfig>,
        server_name: Option<&str>,
    ) -> Result<Stream, DialError> {
        let lost = |error| DialError::Connect { to: self.placement_text(), error };
        stream.write_all(&SSL_REQUEST).await.map_err(lost)?;
        match stream.read_u8().await.map_err(lost)? {
            b'S' => {}
            b'N' => return Err(DialError::NoTls(self.placement_text())),
            byte => {
                return Err(DialError::NotPostgres { to: self.placement_text(), byte });
            }
        }
        let failed = |error| DialError::Tls { to: self.placement_text(), error };
        let name = match (self.host(), server_name) {
            (_, Some(name)) => name,
            (Host::Tcp { host, .. }, None) => host,
            (Host::Unix(_), None) => "localhost",
        };
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        stream.connect_tls(config, name).await.map_err(failed)
    }

    /// Sends a cancel request and waits until the database closes: until then the cancel may
    /// still hit, and its requester must not continue.
    ///
    /// # Errors
    /// When the database could not be reached.
    pub(crate) async fn cancel(&self, request: &CancelRequest) -> Result<(), DialError> {
        let mut stream = self.connect(DIAL_TIMEOUT).await?;
        let lost = |error| DialError::Connect { to: self.placement_text(), error };
        stream.write_all(&request.encode()).await.map_err(lost)?;
        stream.flush().await.map_err(lost)?;
        let mut sink = [0; 64];
        let closed = async { while let Ok(1..) = stream.read(&mut sink).await {} };
        match timeout(CANCEL_TIMEOUT, closed).await {
            Ok(()) => Ok(()),
            Err(_elapsed) => {
                let (to, patience) = (self.placement_text(), CANCEL_TIMEOUT);
                Err(DialError::Timeout { to, patience })
            }
        }
    }

    /// For logs and errors.
    fn placement_text(&self) -> String {
        format!("{}/{}", self.host(), self.tenant.placement().dbname)
    }
}

impl Connection {
    fn new(stream: Stream, route: &Arc<Route>, redial: Redial) -> Connection {
        let route = Arc::clone(route);
        let (cluster, untried) = (None, Vec::new());
        let (version, unread) = (None, BytesMut::new());
        let at_standby = false;
        Connection {
            stream,
            route,
            redial,
            cluster,
            untried,
            at_standby,
            version,
            unread,
            heard: 0,
        }
    }

    /// What is known of its cluster, if its server is a standby.
    fn at_standby(&self) -> Option<&Arc<ClusterState>> {
        self.cluster.as_ref().filter(|_| self.at_standby)
    }

    /// Another connection to the same server.
    async fn dialled_again(self) -> Result<Connection, DialError> {
        let stream = self.redial.connect(DIAL_TIMEOUT).await?;
        let mut again = Connection::new(stream, &self.route, self.redial);
        (again.cluster, again.untried) = (self.cluster, self.untried);
        again.at_standby = self.at_standby;
        Ok(again)
    }

    /// The servers of its cluster that were not tried before it, if there are any.
    pub(crate) fn others(&self) -> Option<Servers> {
        (!self.untried.is_empty()).then(|| Servers {
            route: Arc::clone(&self.route),
            cluster: self.cluster.clone(),
            untried: self.untried.clone(),
            tried: Some(self.redial.endpoint),
            dead_peer_timeout: self.redial.dead_peer_timeout,
        })
    }

    /// For a session, which would miss what was read ahead: [`Connection::ask`] leaves nothing.
    fn into_stream(self) -> Result<Stream, BackendError> {
        match self.unread.is_empty() {
            true => Ok(self.stream),
            false => Err(BackendError::Protocol("more than an answer")),
        }
    }

    /// Cancelled when another server of its cluster has become the primary; `None` where there is no
    /// other.
    pub(crate) fn until_failover(&self) -> Option<CancellationToken> {
        self.cluster.as_ref().map(|cluster| cluster.until_failover())
    }

    /// What a login can be bound to.
    fn channel(&self) -> Channel {
        let (Stream::Backend(tls), PlacementTls::Enabled { mode, channel_binding, .. }) =
            (&self.stream, &self.route.tenant().placement().cluster.tls)
        else {
            return Channel::Clear;
        };
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        Channel::Tls {
            end_point: chain.first().and_then(tls::server_end_point),
            verified_in_full: *mode == tls::Mode::VerifyFull,
            demand: *channel_binding,
        }
    }
}

/// What the database calls the session, and how to cancel what it runs, if it has said so: a server
/// that is like PostgreSQL may do without.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    key: Option<(u32, Bytes)>,
    redial: Redial,
}

#[cfg(test)]
impl Process {
    /// One that nothing is asked of.
    pub(crate) fn of(pid: Option<u32>) -> Process {
        let registry = crate::registry::tests::read(&crate::registry::tests::entry("acme"));
        let tenant = Arc::clone(registry.tenants().next().expect("a tenant"));
        let dead_peer_timeout = Duration::from_secs(60);
        let redial = Redial { tenant, endpoint: 0, dead_peer_timeout, at: None };
        Process { key: pid.map(|pid| (pid, Bytes::from_static(b"data"))), redial }
    }
}

impl Process {
    /// The process id, where there is one to cancel.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.key.as_ref().map(|(pid, _secret)| *pid)
    }

    /// Whose database it is of.
    pub(crate) fn tenant(&self) -> &TenantId {
        self.redial.tenant.id()
    }

    /// Cancels whatever runs there now, if that can be asked for.
    ///
    /// # Errors
    /// When the database could not be reached.
    pub(crate) async fn cancel(&self) -> Result<(), DialError> {
        let Some((pid, secret)) = &self.key else { return Ok(()) };
        self.redial.cancel(&CancelRequest { pid: *pid, secret: secret.clone() }).await
    }
}
