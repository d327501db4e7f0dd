//! `cargo bench --bench handshakes`: what a client's certificates cost the listener that looks at
//! them, from the client's last flight to the verdict. What a whole handshake costs without any is
//! beside it.

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use pgsilo::tls::{ClientAuthorities, Server, ServerFiles};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, RsaKeySize,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

/// What the listener's authority signs with: that is what each candidate of a path is checked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    P256,
    P384,
    Rsa4096,
}

/// What a client shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// No certificate.
    Nothing,
    /// One that the authority signed.
    Signed,
    /// Its own, and so many more of the authority's name, each with a key of its own.
    SelfMade(usize),
    /// The same, of one key.
    Copies(usize),
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shown::Nothing => f.write_str("nothing"),
            Shown::Signed => f.write_str("signed"),
            Shown::SelfMade(count) => write!(f, "self-made + {count:02} keys"),
            Shown::Copies(count) => write!(f, "self-made + {count:02} of a key"),
        }
    }
}

const SHOWN: [Shown; 6] = [
    Shown::Nothing,
    Shown::Signed,
    Shown::SelfMade(0),
    Shown::Copies(4),
    Shown::SelfMade(4),
    Shown::SelfMade(10),
];

fn pair(key: Key) -> KeyPair {
    let pair = match key {
        Key::P256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
        Key::P384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
        Key::Rsa4096 => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_4096),
    };
    pair.expect("a key")
}

fn named(is_ca: bool) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.distinguished_name.push(DnType::CommonName, "authority");
    if is_ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    params
}

/// A listener that asks for certificates of an authority.
struct Listener {
    config: Arc<ServerConfig>,
    authority: CertifiedIssuer<'static, KeyPair>,
}

fn listener(key: Key) -> &'static Listener {
    static ALL: OnceLock<Vec<(Key, Listener)>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        [Key::P256, Key::P384, Key::Rsa4096].map(|key| (key, Listener::new(key))).into()
    });
    &all.iter().find(|(of, _)| *of == key).expect("one of ours").1
}

impl Listener {
    fn new(key: Key) -> Listener {
        let authority = CertifiedIssuer::self_signed(named(true), pair(key)).expect("signed");
        let own = pair(Key::P256);
        let names = CertificateParams::new(["localhost".to_owned()]).expect("a name");
        let certificate = names.self_signed(&own).expect("signed");
        let dir =
            std::env::temp_dir().join(format!("pgsilo-handshakes-{}-{key:?}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let write = |name: &str, text: String| -> PathBuf {
            let path = dir.join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        let ca = write("ca.crt", authority.pem());
        let server = Server::open(ServerFiles {
            certificate: write("server.crt", certificate.pem()),
            key: write("server.key", own.serialize_pem()),
            clients: Some(ClientAuthorities { ca, crls: Vec::new(), required: false }),
        });
        std::fs::remove_dir_all(&dir).expect("removed");
        Listener { config: server.expect("a listener").handshake().config(), authority }
    }

    /// A client that believes whatever it is shown.
    fn client(&self, shown: Shown) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .expect("versions");
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone()).expect("a root");
        let builder = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(believing::Anybody::default()));
        let own = pair(Key::P256);
        let key = PrivateKeyDer::from_pem_slice(own.serialize_pem().as_bytes()).expect("a key");
        let chain: Vec<CertificateDer<'static>> = match shown {
            Shown::Nothing => return Arc::new(builder.with_no_client_auth()),
            Shown::Signed => {
                let leaf = named(false).signed_by(&own, &self.authority).expect("signed");
                vec![leaf.der().clone()]
            }
            Shown::SelfMade(count) | Shown::Copies(count) => {
                let keys: Vec<KeyPair> = match shown {
                    Shown::Copies(_) => vec![pair(Key::P256)],
                    _ => (0..count).map(|_| pair(Key::P256)).collect(),
                };
                let signer = Issuer::new(named(true), pair(Key::P256));
                let leaf = named(false).signed_by(&own, &signer).expect("signed");
                let more =
                    keys.iter().cycle().take(count).map(|key| {
                        named(true).signed_by(key, &signer).expect("signed").der().clone()
                    });
                std::iter::once(leaf.der().clone()).chain(more).collect()
            }
        };
        Arc::new(builder.with_client_auth_cert(chain, key).expect("a pair"))
    }

    /// A handshake up to the client's last flight: the connection, and that flight.
    fn begun(&self, client: &Arc<ClientConfig>) -> (ServerConnection, Vec<u8>) {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut client = ClientConnection::new(Arc::clone(client), name).expect("a client");
        let mut server = ServerConnection::new(Arc::clone(&self.config)).expect("a server");
        let mut flight = Vec::new();
        client.write_tls(&mut flight).expect("a hello");
        server.read_tls(&mut &flight[..]).expect("read");
        server.process_new_packets().expect("a hello");
        flight.clear();
        while server.wants_write() {
            server.write_tls(&mut flight).expect("a flight");
        }
        let mut unread = &flight[..];
        while !unread.is_empty() {
            client.read_tls(&mut unread).expect("read");
            client.process_new_packets().expect("a flight");
        }
        let mut last = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut last).expect("a last flight");
        }
        (server, last)
    }
}

mod believing {
    //! A client that has nothing to lose.

    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::CryptoProvider;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub(crate) struct Anybody(Arc<CryptoProvider>);

    impl Default for Anybody {
        fn default() -> Anybody {
            Anybody(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        }
    }

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}

/// The listener's half, from a client's last flight on.
fn verdict(bencher: divan::Bencher<'_, '_>, key: Key, shown: Shown) {
    let listener = listener(key);
    let client = listener.client(shown);
    bencher.with_inputs(|| listener.begun(&client)).bench_values(|(mut server, last)| {
        let mut unread = &last[..];
        while !unread.is_empty() {
            server.read_tls(&mut unread).expect("read");
            if server.process_new_packets().is_err() {
                break;
            }
        }
        server
    });
}

#[divan::bench(args = SHOWN)]
fn authority_p256(bencher: divan::Bencher<'_, '_>, shown: Shown) {
    verdict(bencher, Key::P256, shown);
}

#[divan::bench(args = SHOWN)]
fn authority_p384(bencher: divan::Bencher<'_, '_>, shown: Shown) {
    verdict(bencher, Key::P384, shown);
}

#[divan::bench(args = SHOWN)]
fn authority_rsa4096(bencher: divan::Bencher<'_, '_>, shown: Shown) {
    verdict(bencher, Key::Rsa4096, shown);
}

/// The listener's half of a handshake up to its answer to a hello.
#[divan::bench]
fn answer_to_a_hello(bencher: divan::Bencher<'_, '_>) {
    let listener = listener(Key::P256);
    let client = listener.client(Shown::Nothing);
    let hello = || {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut client = ClientConnection::new(Arc::clone(&client), name).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("a hello");
        hello
    };
    bencher.with_inputs(hello).bench_values(|hello| {
        let mut server = ServerConnection::new(Arc::clone(&listener.config)).expect("a server");
        server.read_tls(&mut &hello[..]).expect("read");
        server.process_new_packets().expect("a hello");
        server
    });
}

fn main() {
    divan::main();
}
