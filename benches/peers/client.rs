//! A client of a few hundred bytes, for thousands of them: logs in as any client does, in clear or
//! under TLS, by SCRAM or with a token.

use std::net::SocketAddr;
use std::sync::Arc;

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::contenders::Contender;
use crate::ground::Ground;
use crate::support::raw::{Io, password, query, ssl_request, startup, tagged};

/// A session that has logged in.
pub(crate) struct Client(Box<dyn Io>);

/// How to reach a contender, again and again.
#[derive(Clone)]
pub(crate) struct Door {
    address: SocketAddr,
    tls: Option<Arc<rustls::ClientConfig>>,
    user: &'static str,
    dbname: &'static str,
    password: String,
}

impl Door {
    pub(crate) fn of(contender: &Contender, ground: &Ground) -> Door {
        Door {
            address: contender.address,
            tls: contender.tls.then(|| tls(ground)),
            user: contender.user(),
            dbname: contender.dbname(),
            password: contender.password(ground),
        }
    }

    pub(crate) async fn enter(&self) -> Client {
        let mut tcp = TcpStream::connect(self.address).await.expect("connected");
        tcp.set_nodelay(true).expect("set");
        let Some(tls) = &self.tls else { return Client(Box::new(tcp)).log_in(self).await };
        tcp.write_all(&ssl_request()).await.expect("sent");
        assert_eq!(tcp.read_u8().await.expect("an answer"), b'S');
        let name = ServerName::try_from("localhost").expect("a name");
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
        let tls = connector.connect(name, tcp).await.expect("TLS");
        Client(Box::new(tls)).log_in(self).await
    }
}

impl Client {
    async fn log_in(mut self, door: &Door) -> Client {
        self.send(&startup(&[("user", door.user), ("database", door.dbname)])).await;
        let mut scram = None;
        loop {
            let (tag, body) = self.message().await;
            match (tag, body.get(..4)) {
                (b'Z', _) => return self,
                (b'R', Some([0, 0, 0, 3])) => self.send(&password(&door.password)).await,
                (b'R', Some([0, 0, 0, 10])) => {
                    let begun =
                        ScramSha256::new(door.password.as_bytes(), ChannelBinding::unsupported());
                    let length = (begun.message().len() as u32).to_be_bytes();
                    let first = [b"SCRAM-SHA-256\0", &length[..], begun.message()].concat();
                    self.send(&tagged(b'p', &first)).await;
                    scram = Some(begun);
                }
                (b'R', Some([0, 0, 0, 11])) => {
                    let scram = scram.as_mut().expect("begun");
                    scram.update(&body[4..]).expect("a good challenge");
                    let proof = tagged(b'p', scram.message());
                    self.send(&proof).await;
                }
                (b'R', Some([0, 0, 0, 12])) => {
                    scram.as_mut().expect("begun").finish(&body[4..]).expect("the real server");
                }
                (b'E', _) => panic!("refused: {}", String::from_utf8_lossy(&body)),
                _ => {}
            }
        }
    }

    /// Asks for that many bytes and reads them.
    pub(crate) async fn take(&mut self, bytes: usize) {
        self.send(&query(&format!("SELECT repeat('x', {bytes})"))).await;
        let mut taken = 0;
        loop {
            match self.message().await {
                (b'D', body) => taken += body.len(),
                (b'Z', _) => break,
                _ => {}
            }
        }
        assert!(taken >= bytes, "{taken} of {bytes} bytes");
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("sent");
        self.0.flush().await.expect("flushed");
    }

    async fn message(&mut self) -> (u8, Vec<u8>) {
        let tag = self.0.read_u8().await.expect("a message");
        let length = self.0.read_u32().await.expect("a length");
        let mut body = vec![0; length as usize - 4];
        self.0.read_exact(&mut body).await.expect("a whole message");
        (tag, body)
    }
}

fn tls(ground: &Ground) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ground.ca()).expect("a CA")).expect("a good CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}
