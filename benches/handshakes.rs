//! `cargo bench --bench handshakes`: what a client's certificates cost the listener that looks at
//! them, from the client's last flight to the verdict. What a whole handshake costs without any is
//! beside it.

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "its clients connect")]

mod strangers;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use pgsilo_core::tls::{ClientAuthorities, Server, ServerFiles};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256,
    RevokedCertParams, RsaKeySize, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use strangers::Chain;

/// What the listener's authority signs with: that is what each candidate of a path is checked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    P256,
    P384,
    Rsa4096,
}

/// What a client shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presented {
    /// No certificate.
    Nothing,
    /// One that the authority signed.
    Signed,
    /// One of an authority below it, and that authority so often.
    Below(usize),
    /// What anybody can make.
    SelfMade(Chain),
}

impl fmt::Display for Presented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Presented::Nothing => f.write_str("nothing"),
            Presented::Signed => f.write_str("signed"),
            Presented::Below(count) => write!(f, "below, shown {count} times"),
            Presented::SelfMade(Chain::Keys(count)) => write!(f, "self-made + {count:02} keys"),
            Presented::SelfMade(Chain::Pairs) => f.write_str("self-made + 2 pairs"),
        }
    }
}

const PRESENTED: [Presented; 8] = [
    Presented::Nothing,
    Presented::Signed,
    Presented::Below(1),
    Presented::Below(4),
    Presented::SelfMade(Chain::Keys(0)),
    Presented::SelfMade(Chain::Pairs),
    Presented::SelfMade(Chain::Keys(4)),
    Presented::SelfMade(Chain::Keys(10)),
];

fn pair(key: Key) -> KeyPair {
    let pair = match key {
        Key::P256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
        Key::P384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
        Key::Rsa4096 => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_4096),
    };
    pair.expect("a key")
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// So many that are revoked make a list of about 5 MB.
const MANY: u64 = 130_000;

fn list(of: &CertifiedIssuer<'static, KeyPair>, count: u64) -> String {
    let revoked = |number: u64| RevokedCertParams {
        serial_number: SerialNumber::from((1 << 60) + number),
        revocation_time: date_time_ymd(2025, 1, 1),
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2025, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: (0..count).map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(of).expect("signed").pem().expect("PEM")
}

/// A listener that asks for certificates of an authority.
struct Listener {
    config: Arc<ServerConfig>,
    authority: CertifiedIssuer<'static, KeyPair>,
    below: CertifiedIssuer<'static, KeyPair>,
}

fn listener(key: Key, revoked: Option<u64>) -> &'static Listener {
    static ALL: Mutex<Vec<(Key, Option<u64>, &'static Listener)>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().expect("one at a time");
    if let Some((.., listener)) = all.iter().find(|of| (of.0, of.1) == (key, revoked)) {
        return listener;
    }
    let listener: &'static Listener = Box::leak(Box::new(Listener::new(key, revoked)));
    all.push((key, revoked, listener));
    listener
}

impl Listener {
    /// Where `revoked` is given, both authorities have a list of so many.
    fn new(key: Key, revoked: Option<u64>) -> Listener {
        let authority = CertifiedIssuer::self_signed(authority(), pair(key)).expect("signed");
        let mut params = self::authority();
        params.distinguished_name.push(DnType::CommonName, "below");
        let below = CertifiedIssuer::signed_by(params, pair(Key::P256), &authority);
        let below = below.expect("signed");
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
        let lists = |count| {
            [("ca.crl", &authority), ("below.crl", &below)]
                .map(|(name, of)| write(name, list(of, count)))
        };
        let crls = revoked.map(lists).into_iter().flatten().collect();
        let server = Server::open(ServerFiles {
            certificate: write("server.crt", certificate.pem()),
            key: write("server.key", own.serialize_pem()),
            clients: Some(ClientAuthorities { ca, crls, required: false }),
        });
        std::fs::remove_dir_all(&dir).expect("removed");
        let config = server.expect("a listener").handshake().config();
        Listener { config, authority, below }
    }

    /// A client that believes whatever it is shown.
    fn client(&self, presented: Presented) -> Arc<ClientConfig> {
        let signed = |by: &CertifiedIssuer<'static, KeyPair>| {
            let own = pair(Key::P256);
            let leaf = CertificateParams::new(vec!["client".to_owned()]).expect("a name");
            let leaf = leaf.signed_by(&own, by).expect("signed").der().clone();
            (vec![leaf], PrivateKeyDer::try_from(own.serialize_der()).expect("a key"))
        };
        let presented = match presented {
            Presented::Nothing => None,
            Presented::Signed => Some(signed(&self.authority)),
            Presented::Below(count) => {
                let (mut chain, key) = signed(&self.below);
                chain.extend(vec![self.below.der().clone(); count]);
                Some((chain, key))
            }
            Presented::SelfMade(chain) => Some(strangers::made(chain)),
        };
        Arc::new(strangers::client(presented))
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

/// The listener's half, from a client's last flight on.
fn verdict(bencher: divan::Bencher<'_, '_>, listener: &Listener, presented: Presented) {
    let client = listener.client(presented);
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

#[divan::bench(args = PRESENTED)]
fn authority_p256(bencher: divan::Bencher<'_, '_>, presented: Presented) {
    verdict(bencher, listener(Key::P256, None), presented);
}

#[divan::bench(args = PRESENTED)]
fn authority_p384(bencher: divan::Bencher<'_, '_>, presented: Presented) {
    verdict(bencher, listener(Key::P384, None), presented);
}

#[divan::bench(args = PRESENTED)]
fn authority_rsa4096(bencher: divan::Bencher<'_, '_>, presented: Presented) {
    verdict(bencher, listener(Key::Rsa4096, None), presented);
}

/// With two revocation lists of 5 MB.
#[divan::bench(args = PRESENTED)]
fn with_long_lists(bencher: divan::Bencher<'_, '_>, presented: Presented) {
    verdict(bencher, listener(Key::P256, Some(MANY)), presented);
}

/// The listener's half of a handshake up to its answer to a hello.
#[divan::bench]
fn answer_to_a_hello(bencher: divan::Bencher<'_, '_>) {
    let listener = listener(Key::P256, None);
    let client = listener.client(Presented::Nothing);
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
