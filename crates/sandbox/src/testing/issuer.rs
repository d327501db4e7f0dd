//! An issuer of the test's own: an HTTPS server on loopback, with the sandbox's certificate, that
//! publishes the keys it is told to, and answers wrongly where it is told to.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::LOCATION;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::mint;
use super::world::world;

/// Where the OpenID configuration is.
pub const CONFIGURATION: &str = "/.well-known/openid-configuration";
/// Where the key set is.
pub const JWKS: &str = "/jwks";

/// What a path answers instead of what it should.
#[derive(Debug, Clone)]
pub enum Wrong {
    /// This status, nothing else.
    Status(u16),
    /// A redirect to there.
    Redirect(String),
    /// This body.
    Body(String),
    /// Nothing, ever.
    Silence,
}

#[derive(Debug, Default)]
struct State {
    keys: Vec<(String, KeyPair)>,
    wrong: Vec<(&'static str, Wrong)>,
    /// The paths that were asked for.
    asked: Vec<String>,
}

/// A running issuer, until it is stopped or dropped.
#[derive(Debug)]
pub struct Issuer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    /// Keys that were made, published or not.
    signing: Vec<(String, String)>,
    serving: JoinHandle<()>,
}

impl Issuer {
    /// Starts one on a free port, without keys.
    pub async fn start() -> Issuer {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let state = Arc::default();
        let serving = tokio::spawn(serve(listener, address, Arc::clone(&state)));
        Issuer { address, state, signing: Vec::new(), serving }
    }

    /// Stops answering: connections are refused.
    pub async fn stop(&mut self) {
        self.serving.abort();
        let stopped = (&mut self.serving).await;
        assert!(stopped.expect_err("it ran").is_cancelled());
    }

    /// Answers again, on the same port.
    pub async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("bound again");
        self.serving = tokio::spawn(serve(listener, self.address, Arc::clone(&self.state)));
    }

    /// Its name, which is its address.
    pub fn name(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Makes a key and publishes it beside the others.
    pub fn publish(&mut self, kid: &str) {
        let key = KeyPair::generate().expect("a key");
        self.signing.push((kid.to_owned(), key.serialize_pem()));
        self.state().keys.push((kid.to_owned(), key));
    }

    /// Publishes a key no more. It can still sign.
    pub fn withdraw(&mut self, kid: &str) {
        self.state().keys.retain(|(other, _)| other != kid);
    }

    /// From now on these paths answer so, and all others as they should.
    pub fn answer(&self, wrong: &[(&'static str, Wrong)]) {
        self.state().wrong = wrong.to_vec();
    }

    /// How often a path was asked for.
    pub fn asked(&self, path: &str) -> usize {
        self.state().asked.iter().filter(|asked| *asked == path).count()
    }

    /// The key set that it publishes.
    pub fn jwks(&self) -> Value {
        self.state().jwks()
    }

    /// A token for acme, signed with one of its keys.
    pub fn token(&self, kid: &str) -> String {
        let (_, pem) = self.signing.iter().find(|(made, _)| made == kid).expect("a key");
        self.token_naming(kid, pem)
    }

    /// A token for acme that names a key that was never made.
    pub fn forged(&self, kid: &str) -> String {
        let (_, pem) = self.signing.first().expect("a key");
        self.token_naming(kid, pem)
    }

    fn token_naming(&self, kid: &str, pem: &str) -> String {
        let mut claims = mint::claims("acme");
        claims["iss"] = self.name().into();
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::ES256) };
        let key = EncodingKey::from_ec_pem(pem.as_bytes()).expect("a key");
        jsonwebtoken::encode(&header, &claims, &key).expect("signed")
    }

    /// An `[[issuer]]` that fetches its key set, and more keys of the table.
    pub fn with_jwks_url(&self, more: &str) -> String {
        self.table(&format!("jwks_url = \"{}{JWKS}\"\nca = \"ca.crt\"\n{more}", self.name()))
    }

    /// An `[[issuer]]` that discovers it, and more keys of the table.
    pub fn with_discovery(&self, more: &str) -> String {
        self.table(&format!("discovery = true\nca = \"ca.crt\"\n{more}"))
    }

    /// An `[[issuer]]` whose keys are in a file, written by [`Issuer::write`].
    pub fn with_file(&self, path: &Path) -> String {
        self.table(&format!("jwks = \"{}\"\n", path.display()))
    }

    /// Replaces a key set's file as it should be done.
    pub fn write(&self, path: &Path) {
        let new = path.with_extension("new");
        std::fs::write(&new, self.jwks().to_string()).expect("written");
        std::fs::rename(new, path).expect("renamed");
    }

    fn table(&self, more: &str) -> String {
        let mut table = format!("[[issuer]]\nissuer = \"{}\"\n", self.name());
        write!(table, "audience = [\"pgsilo\"]\nalgorithms = [\"ES256\"]\n{more}\n").expect("text");
        table
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the issuer's state")
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl State {
    fn jwks(&self) -> Value {
        let keys = self.keys.iter().map(|(kid, key)| {
            let point = key.public_key_raw();
            let part = |range| URL_SAFE_NO_PAD.encode(&point[range]);
            json!({ "kty": "EC", "crv": "P-256", "kid": kid, "x": part(1..33), "y": part(33..65) })
        });
        json!({ "keys": keys.collect::<Vec<_>>() })
    }
}

/// The sandbox's certificate is good for loopback.
fn acceptor() -> TlsAcceptor {
    let dir = world().dir();
    let chain = CertificateDer::pem_file_iter(dir.join("server.crt")).expect("a file");
    let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
    let key = PrivateKeyDer::from_pem_file(dir.join("server.key")).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a pair");
    TlsAcceptor::from(Arc::new(config))
}

/// Connections end with the task: a stopped issuer does not answer.
async fn serve(listener: TcpListener, address: SocketAddr, state: Arc<Mutex<State>>) {
    let acceptor = acceptor();
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((tcp, _from)) = listener.accept().await {
        connections.spawn(connection(acceptor.clone(), tcp, address, Arc::clone(&state)));
    }
}

async fn connection(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    address: SocketAddr,
    state: Arc<Mutex<State>>,
) {
    let Ok(tls) = acceptor.accept(tcp).await else { return };
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let path = request.uri().path().to_owned();
        let answer = answer(&path, address, &state);
        async move {
            match answer {
                Some(answer) => Ok::<_, Infallible>(answer),
                None => std::future::pending().await,
            }
        }
    });
    let _gone = http1::Builder::new().serve_connection(TokioIo::new(tls), service).await;
}

/// `None`: never.
fn answer(path: &str, address: SocketAddr, state: &Mutex<State>) -> Option<Response<Full<Bytes>>> {
    let mut state = state.lock().expect("the issuer's state");
    state.asked.push(path.to_owned());
    let mut response = Response::new(Full::new(Bytes::new()));
    let wrong = state.wrong.iter().find(|(wrong, _)| *wrong == path).map(|(_, wrong)| wrong);
    match (wrong, path) {
        (Some(Wrong::Silence), _) => return None,
        (Some(Wrong::Status(status)), _) => {
            *response.status_mut() = StatusCode::from_u16(*status).expect("a status");
        }
        (Some(Wrong::Redirect(to)), _) => {
            *response.status_mut() = StatusCode::FOUND;
            response.headers_mut().insert(LOCATION, to.parse().expect("a header"));
        }
        (Some(Wrong::Body(body)), _) => *response.body_mut() = Full::new(body.clone().into()),
        (None, JWKS) => *response.body_mut() = Full::new(state.jwks().to_string().into()),
        (None, CONFIGURATION) => {
            let name = format!("https://{address}");
            let body = json!({ "issuer": name, "jwks_uri": format!("{name}{JWKS}") });
            *response.body_mut() = Full::new(body.to_string().into());
        }
        (None, _) => *response.status_mut() = StatusCode::NOT_FOUND,
    }
    Some(response)
}
