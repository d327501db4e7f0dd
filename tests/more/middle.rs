//! Somebody in the middle: ends the TLS of one side, begins another with the server, and reads
//! and changes what passes between them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use pgsilo_sandbox::testing::fake;
use pgsilo_sandbox::testing::raw::ssl_request;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cluster::Certificate;

/// What is done with what the server says first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tampering {
    None,
    /// Takes SCRAM-SHA-256-PLUS out of the mechanisms on offer.
    StripPlus,
}

/// One who listens in the middle.
pub(crate) struct Middle {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<u8>>>,
    finished: Arc<Mutex<Vec<bool>>>,
}

impl Middle {
    /// Presents `certificate` to its clients, and leads to the server on `port`, whose
    /// certificate it believes.
    pub(crate) async fn start(
        certificate: &Certificate,
        server: &Certificate,
        port: u16,
        tampering: Tampering,
    ) -> Middle {
        let acceptor = acceptor(certificate);
        let connector = connector(server);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let finished = Arc::new(Mutex::new(Vec::new()));
        let (sink, ends) = (Arc::clone(&seen), Arc::clone(&finished));
        let address = fake::serves(move |mut tcp| {
            let (acceptor, connector) = (acceptor.clone(), connector.clone());
            let (sink, ends) = (Arc::clone(&sink), Arc::clone(&ends));
            async move {
                let mut request = [0; 8];
                tcp.read_exact(&mut request).await.expect("an SSLRequest");
                assert_eq!(request[..], ssl_request());
                tcp.write_all(b"S").await.expect("answered");
                let client = acceptor.accept(tcp).await;
                ends.lock().expect("ends").push(client.is_ok());
                let Ok(client) = client else { return };
                let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.expect("connected");
                tcp.write_all(&ssl_request()).await.expect("sent");
                assert_eq!(tcp.read_u8().await.expect("an answer"), b'S');
                let name = ServerName::try_from("localhost").expect("a name");
                let server = connector.connect(name, tcp).await.expect("TLS");
                relay(client, server, &sink, tampering).await;
            }
        })
        .await;
        Middle { address, seen, finished }
    }

    /// What clients have said inside TLS.
    pub(crate) fn seen(&self) -> Vec<u8> {
        self.seen.lock().expect("seen").clone()
    }

    /// Whether each handshake with a client came to its end.
    pub(crate) fn handshakes(&self) -> Vec<bool> {
        self.finished.lock().expect("ends").clone()
    }
}

async fn relay(
    client: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    seen: &Mutex<Vec<u8>>,
    tampering: Tampering,
) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let up = async {
        let mut bytes = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = from_client.read(&mut bytes).await {
            seen.lock().expect("seen").extend_from_slice(&bytes[..n]);
            if to_server.write_all(&bytes[..n]).await.is_err() {
                break;
            }
        }
        let _closed = to_server.shutdown().await;
    };
    let down = async {
        if tampering == Tampering::StripPlus {
            let offer = message(&mut from_server).await;
            let plus: &[u8] = b"SCRAM-SHA-256-PLUS\0";
            let at = offer.windows(plus.len()).position(|window| window == plus);
            let at = at.expect("the server offers PLUS");
            let mut stripped = [&offer[..at], &offer[at + plus.len()..]].concat();
            let length = stripped.len() as u32 - 1;
            stripped[1..5].copy_from_slice(&length.to_be_bytes());
            to_client.write_all(&stripped).await.expect("sent");
        }
        let _copied = tokio::io::copy(&mut from_server, &mut to_client).await;
        let _closed = to_client.shutdown().await;
    };
    tokio::join!(up, down);
}

async fn message(source: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut message = vec![0; 5];
    source.read_exact(&mut message).await.expect("a header");
    let length = u32::from_be_bytes([message[1], message[2], message[3], message[4]]);
    message.resize(length as usize + 1, 0);
    source.read_exact(&mut message[5..]).await.expect("a body");
    message
}

fn acceptor(certificate: &Certificate) -> tokio_rustls::TlsAcceptor {
    let chain = CertificateDer::from_pem_slice(certificate.chain.as_bytes()).expect("PEM");
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).expect("PEM");
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .expect("a pair");
    Arc::new(config).into()
}

fn connector(server: &Certificate) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(server.ca.as_bytes()).expect("PEM");
    roots.add(ca).expect("a root");
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config).into()
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
