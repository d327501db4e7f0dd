//! A client that sends just the bytes it is told to, and reads messages strictly.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::PATIENCE;
use super::authority::Pair;
use super::world::{World, world};

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A connection to a pgsilo.
pub struct Raw(Box<dyn Io>);

/// One tagged message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
}

impl Message {
    /// A field of an ErrorResponse.
    pub fn field(&self, kind: u8) -> Option<String> {
        assert_eq!(self.tag, b'E', "{self:?}");
        let mut fields = self.body.split(|byte| *byte == 0);
        let value = fields.find_map(|field| field.strip_prefix(&[kind]))?;
        Some(String::from_utf8(value.to_vec()).expect("UTF-8"))
    }

    pub fn sqlstate(&self) -> String {
        self.field(b'C').expect("an SQLSTATE")
    }
}

/// `length code rest`
pub fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
    let length = rest.len() as u32 + 8;
    [&length.to_be_bytes()[..], &code.to_be_bytes(), rest].concat()
}

/// `tag length body`
pub fn tagged(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// A StartupMessage of protocol 3.0.
pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    startup_of(0x0003_0000, parameters)
}

/// A StartupMessage.
pub fn startup_of(code: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut rest = Vec::new();
    for (name, value) in parameters {
        rest.extend_from_slice(name.as_bytes());
        rest.push(0);
        rest.extend_from_slice(value.as_bytes());
        rest.push(0);
    }
    rest.push(0);
    packet(code, &rest)
}

pub fn ssl_request() -> Vec<u8> {
    packet(80_877_103, b"")
}

pub fn gssenc_request() -> Vec<u8> {
    packet(80_877_104, b"")
}

pub fn password(token: &str) -> Vec<u8> {
    tagged(b'p', &[token.as_bytes(), &[0]].concat())
}

pub fn query(sql: &str) -> Vec<u8> {
    tagged(b'Q', &[sql.as_bytes(), &[0]].concat())
}

fn client_config(
    world: &World,
    alpn: &[&[u8]],
    own: Option<&Pair>,
    more_roots: &[u8],
) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(world.dir().join("ca.crt")).expect("a CA");
    roots.add(ca).expect("a good CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    for ca in CertificateDer::pem_slice_iter(more_roots) {
        roots.add(ca.expect("PEM")).expect("a good CA");
    }
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => builder.with_client_auth_cert(own.chain(), own.der().1).expect("a pair"),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

async fn connect(
    config: rustls::ClientConfig,
    host: &str,
    tcp: TcpStream,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(host.to_owned()).expect("a name");
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

impl Raw {
    pub async fn tcp(address: SocketAddr) -> Raw {
        let tcp = TcpStream::connect(address).await.expect("connected");
        tcp.set_nodelay(true).expect("set");
        Raw(Box::new(tcp))
    }

    /// Over a connection that is there.
    pub fn over(tcp: TcpStream) -> Raw {
        Raw(Box::new(tcp))
    }

    pub async fn unix(path: &Path) -> Raw {
        Raw(Box::new(UnixStream::connect(path).await.expect("connected")))
    }

    /// TLS after an SSLRequest, as most clients do it.
    pub async fn tls(address: SocketAddr) -> Raw {
        Raw::tls_of(world(), address).await
    }

    /// The same, of another sandbox.
    pub async fn tls_of(world: &World, address: SocketAddr) -> Raw {
        let mut tcp = TcpStream::connect(address).await.expect("connected");
        tcp.write_all(&ssl_request()).await.expect("sent");
        assert_eq!(tcp.read_u8().await.expect("an answer"), b'S');
        let config = client_config(world, &[b"postgresql"], None, b"");
        Raw(Box::new(connect(config, "localhost", tcp).await.expect("TLS")))
    }

    /// TLS from the first byte.
    pub async fn direct_tls(address: SocketAddr, alpn: &[&[u8]]) -> std::io::Result<Raw> {
        Raw::handshake(TcpStream::connect(address).await.expect("connected"), alpn).await
    }

    pub async fn handshake(tcp: TcpStream, alpn: &[&[u8]]) -> std::io::Result<Raw> {
        let tls = Raw::shake_hands(tcp, alpn, "localhost", None, &[]).await?;
        Ok(Raw(Box::new(tls)))
    }

    /// TLS from the first byte, showing a certificate.
    pub async fn certified(address: SocketAddr, own: &Pair) -> std::io::Result<Raw> {
        let tcp = TcpStream::connect(address).await.expect("connected");
        let tls = Raw::shake_hands(tcp, &[b"postgresql"], "localhost", Some(own), &[]).await?;
        Ok(Raw(Box::new(tls)))
    }

    /// TLS from the first byte to a host of that name, with more authorities than the sandbox's.
    pub async fn named(address: SocketAddr, host: &str, ca: &[u8]) -> std::io::Result<Raw> {
        let tcp = TcpStream::connect(address).await.expect("connected");
        Ok(Raw(Box::new(Raw::shake_hands(tcp, &[b"postgresql"], host, None, ca).await?)))
    }

    /// What the handshakes of a client are that remembers the ones before.
    pub async fn handshakes_of_one_client(
        address: SocketAddr,
        own: &Pair,
        count: usize,
    ) -> Vec<rustls::HandshakeKind> {
        let config = Arc::new(client_config(world(), &[b"postgresql"], Some(own), b""));
        let mut kinds = Vec::new();
        for _ in 0..count {
            let tcp = TcpStream::connect(address).await.expect("connected");
            let name = ServerName::try_from("localhost").expect("a name");
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
            let mut tls = connector.connect(name, tcp).await.expect("TLS");
            kinds.push(tls.get_ref().1.handshake_kind().expect("it is over"));
            // Tickets come behind the handshake: an answer is read, so they are as well.
            tls.write_all(&startup(&[("user", "app")])).await.expect("sent");
            tls.read_u8().await.expect("an answer");
        }
        kinds
    }

    pub async fn shake_hands(
        tcp: TcpStream,
        alpn: &[&[u8]],
        host: &str,
        own: Option<&Pair>,
        more_roots: &[u8],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        connect(client_config(world(), alpn, own, more_roots), host, tcp).await
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("sent");
        self.0.flush().await.expect("flushed");
    }

    /// Sends what may be refused in the middle.
    pub async fn send_anyway(&mut self, bytes: &[u8]) {
        let _refused = self.0.write_all(bytes).await;
        let _refused = self.0.flush().await;
    }

    /// Closes this side's half.
    pub async fn shutdown(&mut self) {
        self.0.shutdown().await.expect("shut down");
    }

    pub async fn byte(&mut self) -> u8 {
        timeout(PATIENCE, self.0.read_u8()).await.expect("in time").expect("a byte")
    }

    /// The first byte that is said, or why there is none.
    pub async fn first_byte(&mut self) -> std::io::Result<u8> {
        timeout(PATIENCE, self.0.read_u8()).await.expect("in time")
    }

    /// How many bytes came: so many, whatever they are, and fewer only at an end of any kind.
    pub async fn bytes(&mut self, count: usize) -> usize {
        let mut bytes = Vec::new();
        let mut some = (&mut self.0).take(count as u64);
        let _end = timeout(PATIENCE, some.read_to_end(&mut bytes)).await.expect("in time");
        bytes.len()
    }

    /// The next message; `None` at a clean end between messages. Anything else fails.
    pub async fn next(&mut self) -> Option<Message> {
        let read = async {
            let tag = match self.0.read_u8().await {
                Ok(tag) => tag,
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return None,
                Err(error) => panic!("the connection broke: {error}"),
            };
            let length = self.0.read_u32().await.expect("a length");
            let mut body = vec![0; length.checked_sub(4).expect("a possible length") as usize];
            self.0.read_exact(&mut body).await.expect("a whole message");
            Some(Message { tag, body })
        };
        timeout(PATIENCE, read).await.expect("a message in time")
    }

    pub async fn message(&mut self) -> Message {
        self.next().await.expect("a message, not the end")
    }

    /// Reads up to and including a message with this tag; everything read.
    pub async fn until(&mut self, tag: u8) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.message().await;
            let last = message.tag == tag;
            messages.push(message);
            if last {
                return messages;
            }
        }
    }

    /// One ErrorResponse with severity FATAL, then the end.
    pub async fn fatal(&mut self) -> Message {
        let error = self.message().await;
        assert_eq!(error.tag, b'E', "{error:?}");
        assert_eq!(error.field(b'S').as_deref(), Some("FATAL"));
        assert_eq!(error.field(b'V').as_deref(), Some("FATAL"));
        assert_eq!(self.next().await, None, "nothing follows a refusal");
        error
    }

    /// The end, without a byte before it.
    pub async fn silence(&mut self) {
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, self.0.read_to_end(&mut rest)).await.expect("in time");
        assert!(read.is_ok() || rest.is_empty(), "{read:?}");
        assert_eq!(rest, b"", "nothing is said");
    }

    /// Logs in with a token and reads up to ReadyForQuery.
    pub async fn log_in(&mut self, token: &str, dbname: &str) -> Vec<Message> {
        self.send(&startup(&[("user", "app"), ("database", dbname)])).await;
        self.send_password(token).await;
        self.until(b'Z').await
    }

    /// Waits to be asked for a password and sends it.
    pub async fn send_password(&mut self, token: &str) {
        let asked = self.message().await;
        assert_eq!((asked.tag, asked.body.as_slice()), (b'R', &[0, 0, 0, 3][..]));
        self.send(&password(token)).await;
    }

    /// Runs a query of one text column and row.
    pub async fn ask(&mut self, sql: &str) -> String {
        self.send(&query(sql)).await;
        let messages = self.until(b'Z').await;
        let row = messages.iter().find(|message| message.tag == b'D');
        let row = row.unwrap_or_else(|| panic!("no row: {messages:?}"));
        String::from_utf8(row.body[6..].to_vec()).expect("UTF-8")
    }

    pub fn into_inner(self) -> Box<dyn Io> {
        self.0
    }
}
