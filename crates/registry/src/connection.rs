//! Connections to PostgreSQL servers: TLS by our own stack, and a login bound to it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, poll_fn};
use futures_util::stream::FuturesUnordered;
use pgsilo_core::host::is_loopback;
use pgsilo_core::registry::{Cluster, Host, PlacementTls};
use pgsilo_core::secret::Secret;
use pgsilo_core::timeline::{Standing, Timeline};
use pgsilo_core::tls::server_end_point;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::config::{ChannelBinding, SslMode, TargetSessionAttrs};
use tokio_postgres::tls::{self, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls};
use tokio_rustls::TlsConnector;

/// From the dial to the end of the login.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long others are waited for once a server has said why it does not let in.
const BEHIND_ANSWER: Duration = Duration::from_secs(2);
/// Until a server that does not answer, not even to the kernel's probes, is given up.
const SILENCE: Duration = Duration::from_secs(30);

/// A database on a server, which is alone or several of one cluster.
#[derive(Clone, Debug)]
pub struct Database {
    /// Not empty. All are tried at once.
    pub hosts: Vec<Host>,
    /// Its name.
    pub name: String,
    /// `None`: in clear, to this machine alone.
    pub tls: Option<Tls>,
    /// Whether the login must be bound to the connection: then it is SCRAM or nothing.
    pub channel_binding: bool,
}

impl Database {
    /// One of a cluster.
    pub fn of(cluster: &Cluster, name: &str) -> Database {
        let tls = match &cluster.tls {
            PlacementTls::Disable => None,
            PlacementTls::Enabled { config, server_name, .. } => {
                Some(Tls { config: Arc::clone(config), server_name: server_name.clone() })
            }
        };
        // A server that has been taken over would ask for the password itself: bound to the channel
        // it is SCRAM or nothing. A cluster that asks for that allows neither.
        let channel_binding = tls.is_some() && !cluster.auth.password && !cluster.auth.md5;
        let hosts = cluster.endpoints.to_vec();
        Database { hosts, name: name.to_owned(), tls, channel_binding }
    }
}

impl Database {
    /// The server that takes writes, on this timeline at least, where there are several.
    pub fn writer(&self, least: Option<Timeline>) -> Server {
        match self.hosts.len() {
            1 => Server::Any,
            _ => Server::Primary(least),
        }
    }
}

/// A role that logs in by password.
#[derive(Clone, Debug)]
pub struct Login {
    /// Its name.
    pub user: String,
    /// Its password.
    pub password: Secret,
}

/// What a session is for.
#[derive(Clone, Debug)]
pub struct Purpose {
    /// As the server's other users see it.
    pub application_name: String,
    /// Settings for the session, as libpq's `options` has them.
    pub options: &'static str,
    /// Which server will do.
    pub server: Server,
}

/// Which of a database's servers will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Any.
    Any,
    /// One that takes writes, on this timeline at least, if one is known: one on a lower was overtaken by
    /// another, and lives on.
    Primary(Option<Timeline>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Its placement has no TLS and it is not on this machine.
    #[error("in clear to another machine, which anybody on the way could read: give it TLS")]
    InClear,
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    /// Another server was promoted after it.
    #[error(
        "it takes writes on timeline {on}, and another was promoted after it, to timeline {newest}"
    )]
    Overtaken {
        /// Its own.
        on: Timeline,
        /// The highest that was seen.
        newest: Timeline,
    },
    /// It was let in as one that takes writes, and takes none.
    #[error("it has become a standby")]
    Demoted,
    /// It says of itself what no server says.
    #[error("it calls itself {0:?}")]
    Unknown(String),
    /// PostgreSQL's or the network's.
    #[error("{}", pgsilo_core::cause::root_cause(.0))]
    Postgres(#[from] tokio_postgres::Error),
}

impl ConnectError {
    /// Whether it is what a server has said.
    fn is_answer(&self) -> bool {
        matches!(self, ConnectError::Postgres(error) if error.as_db_error().is_some())
    }
}

/// A connection; it closes when the client is dropped.
#[derive(Debug)]
pub struct Session {
    /// To ask on.
    pub client: Client,
    /// Told whenever a channel that it listens to is notified, and when the connection is lost.
    pub notified: Arc<Notify>,
    /// On which timeline the server takes writes, if it is one of several that was asked.
    pub timeline: Option<Timeline>,
}

/// Connects and logs in: to the host that is the first to let it in, and takes writes where that is
/// asked for. All are asked at once: one that does not answer costs no time.
///
/// # Errors
/// When no host does; what the last one said.
pub async fn connect(
    database: &Database,
    login: &Login,
    purpose: &Purpose,
) -> Result<Session, ConnectError> {
    if database.tls.is_none() && !database.hosts.iter().all(is_local) {
        return Err(ConnectError::InClear);
    }
    let connecting = database.hosts.iter().map(|host| async move {
        match timeout(PATIENCE, connect_to(host, database, login, purpose)).await {
            Ok(connected) => connected,
            Err(_elapsed) => Err(ConnectError::Timeout(PATIENCE)),
        }
    });
    let mut connecting: FuturesUnordered<_> = connecting.collect();
    let mut answer = None;
    let mut until = Instant::now() + PATIENCE;
    let mut last = ConnectError::Timeout(PATIENCE);
    while let Ok(Some(connected)) = timeout_at(until, connecting.next()).await {
        match connected {
            Ok(session) => return Ok(session),
            // What a server says tells more than that another one is silent, which is not waited for.
            Err(error) if error.is_answer() => {
                answer.get_or_insert(error);
                until = until.min(Instant::now() + BEHIND_ANSWER);
            }
            Err(error) => last = error,
        }
    }
    Err(answer.unwrap_or(last))
}

async fn connect_to(
    host: &Host,
    database: &Database,
    login: &Login,
    purpose: &Purpose,
) -> Result<Session, ConnectError> {
    let mut config = Config::new();
    config
        .user(&login.user)
        .password(login.password.expose())
        .dbname(&database.name)
        .application_name(&purpose.application_name)
        .tcp_user_timeout(SILENCE)
        .keepalives_idle(SILENCE / 3)
        .keepalives_interval(SILENCE / 3)
        .keepalives_retries(2)
        .options(purpose.options);
    if matches!(purpose.server, Server::Primary(_)) {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    locate(&mut config, host);
    if database.channel_binding {
        config.channel_binding(ChannelBinding::Require);
    }
    let notified = Arc::new(Notify::new());
    let client = match &database.tls {
        None => {
            let (client, connection) = config.ssl_mode(SslMode::Disable).connect(NoTls).await?;
            tokio::spawn(drive(connection, Arc::clone(&notified)));
            client
        }
        Some(tls) => {
            let tls = tls.clone();
            let (client, connection) = config.ssl_mode(SslMode::Require).connect(tls).await?;
            tokio::spawn(drive(connection, Arc::clone(&notified)));
            client
        }
    };
    let timeline = match purpose.server {
        Server::Primary(least) if database.hosts.len() > 1 => Some(timeline(&client, least).await?),
        Server::Any | Server::Primary(_) => None,
    };
    Ok(Session { client, notified, timeline })
}

/// On which timeline a server takes writes, which must be no lower than that.
async fn timeline(client: &Client, least: Option<Timeline>) -> Result<Timeline, ConnectError> {
    match (standing(client).await?, least) {
        (Standing::Primary(on), Some(newest)) if on < newest => {
            Err(ConnectError::Overtaken { on, newest })
        }
        (Standing::Primary(on), _) => Ok(on),
        (Standing::Standby, _) => Err(ConnectError::Demoted),
    }
}

/// What a server says that it is.
pub(crate) async fn standing(client: &Client) -> Result<Standing, ConnectError> {
    let asked = format!("SELECT {}", Standing::SQL);
    let said: String = client.query_typed_one(&asked, &[]).await?.try_get(0)?;
    Standing::parse(&said).ok_or(ConnectError::Unknown(said))
}

/// Moves a connection's bytes until it ends. What is said while nothing is asked is a reason to
/// look, however much it is.
async fn drive<S, T>(mut connection: Connection<S, T>, notified: Arc<Notify>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
        match message {
            Ok(AsyncMessage::Notification(_)) => notified.notify_one(),
            Ok(_notice) => {}
            // Its error is also the error of whatever statement was under way.
            Err(_lost) => break,
        }
    }
    notified.notify_one();
}

/// Whether nothing but this machine is on the way.
fn is_local(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp { host, .. } => is_loopback(host),
    }
}

fn locate(config: &mut Config, host: &Host) {
    match host {
        Host::Tcp { host, port } => {
            config.host(host).port(*port);
        }
        Host::Unix(path) => {
            // libpq, and this client, are told the folder and the port in the file's name.
            let port = path.extension().and_then(|port| port.to_str()?.parse().ok());
            config.host_path(path.parent().unwrap_or(path)).port(port.unwrap_or(5432));
        }
    }
}

/// How a server's certificate is checked.
#[derive(Clone, Debug)]
pub struct Tls {
    /// By what.
    pub config: Arc<ClientConfig>,
    /// What the certificate must name, if not the host.
    pub server_name: Option<String>,
}

/// TLS with one host.
#[expect(missing_debug_implementations, reason = "one step of a connect")]
pub struct TlsWith {
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// A connection under TLS.
#[derive(Debug)]
pub struct Secured<S>(tokio_rustls::client::TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Tls {
    type Stream = Secured<S>;
    type TlsConnect = TlsWith;
    type Error = rustls_pki_types::InvalidDnsNameError;

    fn make_tls_connect(&mut self, host: &str) -> Result<TlsWith, Self::Error> {
        let name = self.server_name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name)?;
        Ok(TlsWith { connector: TlsConnector::from(Arc::clone(&self.config)), name })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for TlsWith {
    type Stream = Secured<S>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Secured<S>>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move { self.connector.connect(self.name, stream).await.map(Secured) })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Secured<S> {
    fn channel_binding(&self) -> tls::ChannelBinding {
        let (_, connection) = self.0.get_ref();
        let leaf = connection.peer_certificates().and_then(|chain| chain.first());
        match leaf.and_then(server_end_point) {
            Some(hash) => tls::ChannelBinding::tls_server_end_point(hash),
            None => tls::ChannelBinding::none(),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secured<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secured<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
