//! Connections to the databases that a registry names, protected as their placements say.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_util::future::BoxFuture;
use pgsilo_core::host::is_loopback;
use pgsilo_core::registry::{Host, Placement, PlacementTls};
use pgsilo_core::secret::Secret;
use pgsilo_core::tls::server_end_point;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding, SslMode};
use tokio_postgres::tls::{self, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{Client, Config, NoTls};
use tokio_rustls::TlsConnector;

/// From the dial to the end of the login.
const PATIENCE: Duration = Duration::from_secs(15);
/// Until a server that does not answer, not even to the kernel's probes, is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// A session works inside databases where tenants may make things, some of it as their brokers:
/// nothing of theirs is found by an unqualified name, and nothing is waited for without end.
pub(crate) const SETTINGS: &str = "-c search_path=pg_catalog,pg_temp -c statement_timeout=30s";

/// A role that logs in by password, whatever the server.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) user: String,
    pub(crate) password: Secret,
}

impl Identity {
    /// A connection to a placement's database; it closes when the client is dropped.
    pub(crate) async fn connect(&self, placement: &Placement) -> Result<Client> {
        let mut config = Config::new();
        config
            .user(&self.user)
            .password(self.password.expose())
            .dbname(&placement.dbname)
            .application_name("pgsiloctl")
            .tcp_user_timeout(SILENCE)
            .keepalives_idle(SILENCE / 3)
            .keepalives_interval(SILENCE / 3)
            .keepalives_retries(2)
            .options(SETTINGS);
        locate(&mut config, &placement.host);
        let connecting = connect(config, placement);
        let connected = match timeout(PATIENCE, connecting).await {
            Ok(connected) => connected,
            Err(_elapsed) => Err(anyhow!("no answer after {} s", PATIENCE.as_secs())),
        };
        connected.with_context(|| format!("logging in to {placement} as {}", self.user))
    }
}

async fn connect(mut config: Config, placement: &Placement) -> Result<Client> {
    match &placement.tls {
        PlacementTls::Disable => {
            ensure!(
                is_local(&placement.host),
                "its placement has no TLS, and this identity is not for a network to read"
            );
            config.ssl_mode(SslMode::Disable);
            let (client, connection) = config.connect(NoTls).await?;
            tokio::spawn(connection);
            Ok(client)
        }
        PlacementTls::Enabled { config: tls, server_name, .. } => {
            // A server that has been taken over would ask for the password itself: bound to the
            // channel it is SCRAM or nothing. A placement that asks for that allows neither.
            if !placement.auth.password && !placement.auth.md5 {
                config.channel_binding(ChannelBinding::Require);
            }
            config.ssl_mode(SslMode::Require);
            let tls = Tls { config: Arc::clone(tls), server_name: server_name.clone() };
            let (client, connection) = config.connect(tls).await?;
            tokio::spawn(connection);
            Ok(client)
        }
    }
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

/// TLS as a placement has it.
#[derive(Clone)]
struct Tls {
    config: Arc<ClientConfig>,
    server_name: Option<String>,
}

/// TLS with one host.
struct TlsWith {
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// A connection under TLS.
struct Secured<S>(tokio_rustls::client::TlsStream<S>);

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
