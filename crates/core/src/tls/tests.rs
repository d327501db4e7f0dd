//! Handshakes with fresh certificates over real sockets, and every error that names a file.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_lc_rs::digest;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    PKCS_RSA_SHA256, PKCS_RSA_SHA512, date_time_ymd,
};
use rustls_pki_types::ServerName;

use super::*;

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("pgsilo-tls-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Pki {
    folder: Folder,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

fn pki() -> Pki {
    let folder = Folder::new();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["db.example".into()])
        .unwrap()
        .signed_by(&leaf_key, &issuer)
        .unwrap();
    let ca = folder.write("ca.crt", &issuer.pem());
    let certificate = folder.write("server.crt", &leaf.pem());
    let key = folder.write("server.key", &leaf_key.serialize_pem());
    Pki { folder, ca, certificate, key }
}

/// One handshake and one byte each way; the client's verdict and the ALPN agreed on.
fn shake(
    server: &Arc<ServerConfig>,
    client: &Arc<ClientConfig>,
    name: &str,
) -> Result<Option<Vec<u8>>, io::Error> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = server.clone();
    let answering = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let connection = rustls::ServerConnection::new(server).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, socket);
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_ok() {
            let _ = stream.write_all(&byte);
        }
    });
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connection = rustls::ClientConnection::new(client.clone(), name).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, TcpStream::connect(address).unwrap());
    let mut byte = [7];
    let outcome = stream.write_all(&byte).and_then(|()| stream.read_exact(&mut byte));
    let agreed = stream.conn.alpn_protocol().map(<[u8]>::to_vec);
    drop(stream);
    answering.join().unwrap();
    outcome.map(|()| agreed)
}

fn of_file(mode: Mode, ca: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    client(mode, Some(&CaFile::read(ca)?))
}

fn shown(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let files = ServerFiles { certificate: certificate.into(), key: key.into(), clients: None };
    Server::open(files).map(|server| server.handshake().config())
}

#[test]
fn each_mode_checks_what_it_says() {
    let pki = pki();
    let stranger = self::pki();
    let server = shown(&pki.certificate, &pki.key).unwrap();
    let cases = [
        (Mode::VerifyFull, &pki.ca, "db.example", true),
        (Mode::VerifyFull, &pki.ca, "other.example", false),
        (Mode::VerifyFull, &stranger.ca, "db.example", false),
        (Mode::VerifyCa, &pki.ca, "other.example", true),
        (Mode::VerifyCa, &pki.ca, "127.0.0.1", true),
        (Mode::VerifyCa, &stranger.ca, "db.example", false),
        (Mode::Require, &stranger.ca, "other.example", true),
    ];
    for (mode, ca, name, good) in cases {
        let client = of_file(mode, ca).unwrap();
        let outcome = shake(&server, &client, name);
        assert_eq!(outcome.is_ok(), good, "{mode:?} {name}: {outcome:?}");
    }
}

#[test]
fn alpn_is_offered_and_not_required() {
    let pki = pki();
    let server = shown(&pki.certificate, &pki.key).unwrap();
    let plain = of_file(Mode::VerifyFull, &pki.ca).unwrap();
    assert_eq!(shake(&server, &plain, "db.example").unwrap(), None);
    let mut direct = (*plain).clone();
    direct.alpn_protocols = vec![ALPN.to_vec()];
    let agreed = shake(&server, &Arc::new(direct.clone()), "db.example").unwrap();
    assert_eq!(agreed.as_deref(), Some(ALPN));
    direct.alpn_protocols = vec![b"h2".to_vec()];
    assert!(shake(&server, &Arc::new(direct), "db.example").is_err());
}

#[test]
fn errors_name_the_file() {
    let pki = pki();
    let other = self::pki();
    let empty = pki.folder.write("empty", "");
    let broken =
        pki.folder.write("broken", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n");
    let absent = pki.folder.0.join("absent");
    let show = |error: TlsError| error.to_string().replace(pki.folder.0.to_str().unwrap(), "");
    assert!(matches!(shown(&pki.certificate, &other.key), Err(TlsError::KeyMismatch { .. })));
    assert_eq!(
        show(shown(&absent, &pki.key).unwrap_err()),
        "cannot read \"/absent\": No such file or directory (os error 2)"
    );
    assert!(matches!(shown(&empty, &pki.key), Err(TlsError::NoCertificate { .. })));
    assert!(matches!(shown(&pki.key, &pki.key), Err(TlsError::NoCertificate { .. })));
    assert!(matches!(shown(&pki.certificate, &empty), Err(TlsError::NoKey { .. })));
    assert!(matches!(shown(&pki.certificate, &pki.certificate), Err(TlsError::NoKey { .. })));
    assert!(matches!(shown(&broken, &pki.key), Err(TlsError::NotPem { .. })));
    assert!(matches!(of_file(Mode::VerifyCa, &empty), Err(TlsError::NoCertificate { .. })));
    assert!(matches!(of_file(Mode::VerifyCa, &absent), Err(TlsError::Unreadable { .. })));
}

#[test]
fn the_end_point_uses_the_signatures_own_hash() {
    let leaf = |algorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::new(vec!["db".into()]).unwrap().self_signed(&key).unwrap()
    };
    let cases = [
        (&PKCS_ECDSA_P256_SHA256, Some(&digest::SHA256)),
        (&PKCS_ECDSA_P384_SHA384, Some(&digest::SHA384)),
        (&PKCS_RSA_SHA256, Some(&digest::SHA256)),
        (&PKCS_RSA_SHA512, Some(&digest::SHA512)),
        (&PKCS_ED25519, None),
    ];
    for (algorithm, hash) in cases {
        let certificate = leaf(algorithm);
        let expected = hash.map(|hash| digest::digest(hash, certificate.der()).as_ref().to_vec());
        assert_eq!(server_end_point(certificate.der()), expected, "{algorithm:?}");
    }
    assert_eq!(server_end_point(&CertificateDer::from(vec![1, 2, 3])), None);
}

/// rcgen does not sign with these, so their identifiers are put into a real certificate;
/// the signature is then wrong, which the hash does not look at.
#[test]
fn old_hashes_become_sha256() {
    let key = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
    let certificate = CertificateParams::new(vec!["db".into()]).unwrap().self_signed(&key).unwrap();
    let sha256_rsa = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b];
    for (last, hash) in [
        (4, Some(&digest::SHA256)),
        (5, Some(&digest::SHA256)),
        (12, Some(&digest::SHA384)),
        (14, Some(&digest::SHA224)),
        (99, None),
    ] {
        let mut der = certificate.der().to_vec();
        let places: Vec<usize> =
            (0..der.len() - 9).filter(|at| der[*at..].starts_with(&sha256_rsa)).collect();
        assert_eq!(places.len(), 2);
        for at in places {
            der[at + 8] = last;
        }
        let expected = hash.map(|hash| digest::digest(hash, &der).as_ref().to_vec());
        assert_eq!(server_end_point(&CertificateDer::from(der)), expected, "{last}");
    }
}

/// Made by `openssl req -x509 -sha384 -sigopt rsa_padding_mode:pss`; rcgen cannot.
#[test]
fn rsa_pss_says_its_hash_in_its_parameters() {
    let pem = include_bytes!("rsa-pss-sha384.pem");
    let certificate = CertificateDer::from_pem_slice(pem).unwrap();
    let expected = digest::digest(&digest::SHA384, &certificate).as_ref().to_vec();
    assert_eq!(server_end_point(&certificate), Some(expected));
}

// --- Authorities -------------------------------------------------------------------------

pub(super) type Root = CertifiedIssuer<'static, KeyPair>;

/// An authority with what is changed of it.
pub(super) fn root(change: impl FnOnce(&mut CertificateParams)) -> Root {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    change(&mut params);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// An authority below another.
pub(super) fn below(above: &Root, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Root {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    change(&mut params);
    CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), above).unwrap()
}

/// What an authority signs for a peer called `db.example`.
pub(super) fn leaf(
    above: &Root,
    change: impl FnOnce(&mut CertificateParams),
) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
    change(&mut params);
    params.signed_by(&KeyPair::generate().unwrap(), above).unwrap().der().clone()
}

fn read_roots(pem: &str, peers: Peers) -> Result<Arc<Authorities>, NoAuthority> {
    let now = Some(UnixTime::now());
    match Authorities::read(Path::new("/ca"), pem.as_bytes(), peers, now) {
        Ok(all) => Ok(all),
        Err(TlsError::NoAuthority { reason, .. }) => Err(reason),
        Err(error) => panic!("{error}"),
    }
}

/// Made by `openssl x509 -req -signkey` without extensions: version 1.
const VERSION_1: &str = include_str!("version-1.pem");

#[test]
fn a_certificate_that_is_no_ca_is_refused_as_an_authority() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let cases: [(Root, Option<NoAuthority>, Option<NoAuthority>); 9] = [
        (root(|_| {}), None, None),
        (root(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))), None, None),
        // Nothing at all, and CA:FALSE.
        (
            root(|params| params.is_ca = IsCa::NoCa),
            Some(NoAuthority::Leaf),
            Some(NoAuthority::Leaf),
        ),
        (
            root(|params| params.is_ca = IsCa::ExplicitNoCa),
            Some(NoAuthority::Leaf),
            Some(NoAuthority::Leaf),
        ),
        (root(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]), None, None),
        (
            root(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]),
            Some(NoAuthority::MayNotSign),
            Some(NoAuthority::MayNotSign),
        ),
        (
            root(|params| params.extended_key_usages = vec![ClientAuth]),
            None,
            Some(NoAuthority::OtherPeers("servers")),
        ),
        (
            root(|params| params.extended_key_usages = vec![ServerAuth]),
            Some(NoAuthority::OtherPeers("clients")),
            None,
        ),
        (
            root(|params| params.not_after = date_time_ymd(2021, 1, 1)),
            Some(NoAuthority::Expired),
            Some(NoAuthority::Expired),
        ),
    ];
    let good = root(|_| {}).pem();
    for (root, of_clients, of_servers) in cases {
        // One that is none spoils the file.
        let pem = good.clone() + &root.pem();
        let what = root.pem();
        assert_eq!(read_roots(&pem, Peers::Clients).err(), of_clients, "{what}");
        assert_eq!(read_roots(&pem, Peers::Servers).err(), of_servers, "{what}");
        // Of the system's, it is left out.
        let found = Authorities::among(&[root.der().clone()], Peers::Servers);
        assert_eq!(found.is_empty(), of_servers.is_some(), "{what}");
    }
    assert_eq!(read_roots(VERSION_1, Peers::Clients).err(), Some(NoAuthority::Version1));
}

/// Whether a chain is believed by one who knows this authority only.
fn believed(root: &Root, chain: &[&CertificateDer<'static>], peers: Peers) -> Result<(), String> {
    let all = Authorities::read(Path::new("/ca"), root.pem().as_bytes(), peers, None).unwrap();
    let chain: Vec<_> = chain.iter().map(|&certificate| certificate.clone()).collect();
    let name = ServerName::try_from("db.example").unwrap();
    all.check(&chain[0], &chain[1..], &Lists::none(), Some(&name), UnixTime::now())
        .map(|id| assert!(all.has(&id)))
        .map_err(|error| error.to_string())
}

#[test]
fn a_root_says_how_long_a_chain_below_it_may_be() {
    for (path_length, depth, good) in [
        (None, 3, true),
        (Some(0), 0, true),
        (Some(0), 1, false),
        (Some(1), 1, true),
        (Some(1), 2, false),
    ] {
        let root = root(|params| {
            if let Some(most) = path_length {
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(most));
            }
        });
        let mut between: Vec<Root> = Vec::new();
        for level in 0..depth {
            let next = below(between.last().unwrap_or(&root), &format!("level {level}"), |_| {});
            between.push(next);
        }
        let own = leaf(between.last().unwrap_or(&root), |_| {});
        let mut chain = vec![&own];
        chain.extend(between.iter().rev().map(|issuer| issuer.der()));
        for peers in [Peers::Clients, Peers::Servers] {
            let verdict = believed(&root, &chain, peers);
            assert_eq!(verdict.is_ok(), good, "{path_length:?} {depth}: {verdict:?}");
        }
    }
}

#[test]
fn a_key_signs_what_it_is_for() {
    use KeyUsagePurpose::{CrlSign, DigitalSignature, KeyAgreement, KeyCertSign, KeyEncipherment};
    let root = root(|_| {});
    for (usages, good) in
        [(vec![], true), (vec![KeyCertSign], true), (vec![DigitalSignature, CrlSign], false)]
    {
        let issuer = below(&root, "below", |params| params.key_usages.clone_from(&usages));
        let own = leaf(&issuer, |_| {});
        for peers in [Peers::Clients, Peers::Servers] {
            let verdict = believed(&root, &[&own, issuer.der()], peers);
            assert_eq!(verdict.is_ok(), good, "{usages:?} {verdict:?}");
        }
    }
    for (usage, of_clients, of_servers) in [
        (DigitalSignature, true, true),
        (KeyAgreement, true, true),
        (KeyEncipherment, false, true),
        (CrlSign, false, false),
    ] {
        let own = leaf(&root, |params| params.key_usages = vec![usage]);
        assert_eq!(believed(&root, &[&own], Peers::Clients).is_ok(), of_clients, "{usage:?}");
        assert_eq!(believed(&root, &[&own], Peers::Servers).is_ok(), of_servers, "{usage:?}");
    }
}

#[test]
fn among_many_certificates_no_path_is_searched_for() {
    let root = root(|_| {});
    let own = leaf(&root, |_| {});
    for peers in [Peers::Clients, Peers::Servers] {
        believed(&root, &[&own, root.der(), root.der(), root.der(), root.der()], peers).unwrap();
        let said = believed(&root, &[&[&own][..], &[root.der(); 5]].concat(), peers).unwrap_err();
        assert!(said.contains("5 certificates were shown beside the peer's own"), "{said}");
        let two = [self::root(|_| {}), self::root(|_| {})];
        let said = believed(&root, &[&own, two[0].der(), two[1].der()], peers).unwrap_err();
        assert!(said.contains("of one subject and different keys"), "{said}");
    }
}

#[test]
fn certificates_of_an_expired_root_are_refused() {
    let good = root(|_| {});
    for root in [
        root(|params| params.not_after = date_time_ymd(2021, 1, 1)),
        root(|params| params.not_before = date_time_ymd(2090, 1, 1)),
    ] {
        let own = leaf(&root, |_| {});
        let said = believed(&root, &[&own], Peers::Servers).unwrap_err();
        assert!(said.contains("expired") || said.contains("not valid yet"), "{said}");
        // By another path it is.
        let pem = root.pem() + &good.pem();
        let all = Authorities::read(Path::new("/ca"), pem.as_bytes(), Peers::Servers, None);
        let other = leaf(&good, |_| {});
        all.unwrap().check(&other, &[], &Lists::none(), None, UnixTime::now()).unwrap();
    }
}

#[test]
fn a_recertified_authority_is_the_same_authority() {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "root");
    let key = KeyPair::generate().unwrap();
    let old = params.self_signed(&key).unwrap().pem();
    params.not_after = date_time_ymd(2090, 1, 1);
    let new = params.self_signed(&key).unwrap().pem();
    let other = params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
    assert_ne!(old, new);
    let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
    let own = leaf(&issuer, |_| {});
    let [old, new, other] = [old, new, other].map(|pem| read_roots(&pem, Peers::Clients).unwrap());
    let id = old.check(&own, &[], &Lists::none(), None, UnixTime::now()).unwrap();
    assert!(old.has(&id) && new.has(&id) && !other.has(&id));
}

// --- Handshakes --------------------------------------------------------------------------

/// A listener that asks for certificates of a file, with an own pair.
fn asking(pki: &Pki, clients: &str, crls: &[PathBuf]) -> Result<Server, TlsError> {
    let ca = pki.folder.write("clients.crt", clients);
    let clients = Some(ClientAuthorities { ca, crls: crls.into(), required: false });
    let (certificate, key) = (pki.certificate.clone(), pki.key.clone());
    Server::open(ServerFiles { certificate, key, clients })
}

#[test]
fn a_list_of_the_future_is_read_again_when_its_time_has_come_and_not_before() {
    let (pki, root) = (pki(), root(|_| {}));
    let list = |from, serial: u64| {
        let list = rcgen::CertificateRevocationListParams {
            this_update: from,
            next_update: date_time_ymd(2090, 1, 1),
            crl_number: serial.into(),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        pki.folder.write("crl", &list.signed_by(&root).unwrap().pem().unwrap())
    };
    let crl = list(date_time_ymd(2025, 1, 1), 1);
    let server = asking(&pki, &root.pem(), &[crl]).unwrap();
    list(date_time_ymd(2080, 1, 1), 2);
    let early = |result| matches!(result, Err(TlsError::EarlyRevocationList { .. }));
    assert!(early(server.reload(false)));
    for _ in 0..3 {
        assert!(!server.reload(false).unwrap());
    }
    // A clock that says that it has come, where the file says that it has not.
    server.read.lock().unwrap().early = Some(UnixTime::now());
    assert!(early(server.reload(false)));
    assert!(!server.reload(false).unwrap());
    assert!(early(server.reload(true)));
    list(date_time_ymd(2025, 1, 2), 3);
    assert!(server.reload(false).unwrap());
}

#[test]
fn an_authority_that_has_expired_does_not_hold_the_listeners_own_certificate_up() {
    let (old, new) = (pki(), pki());
    let good = root(|_| {});
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "expires");
    let key = KeyPair::generate().unwrap();
    let in_force = params.self_signed(&key).unwrap().pem();
    params.not_after = date_time_ymd(2021, 1, 1);
    let expired = CertifiedIssuer::self_signed(params, key).unwrap();
    let server = asking(&old, &(good.pem() + &in_force), &[]).unwrap();
    // One that was never in force is a mistake.
    let other = root(|params| params.not_after = date_time_ymd(2021, 1, 1));
    for mistake in [other.pem(), good.pem() + &other.pem()] {
        old.folder.write("clients.crt", &mistake);
        let refused = server.reload(true).unwrap_err();
        let expired = NoAuthority::Expired;
        assert!(matches!(refused, TlsError::NoAuthority { reason, .. } if reason == expired));
    }
    old.folder.write("clients.crt", &(good.pem() + &expired.pem()));
    for (name, from) in [("server.crt", &new.certificate), ("server.key", &new.key)] {
        old.folder.write(name, &std::fs::read_to_string(from).unwrap());
    }
    assert!(server.reload(false).unwrap());
    let client = |ca: &Path| of_file(Mode::VerifyFull, ca).unwrap();
    shake(&server.handshake().config(), &client(&new.ca), "db.example").unwrap();
    shake(&server.handshake().config(), &client(&old.ca), "db.example").unwrap_err();
    // Nor is what it has signed believed.
    for (root, is_good) in [(&good, true), (&expired, false)] {
        let found = server.authority_of(&server.handshake(), &[leaf(root, |_| {})]);
        assert_eq!(found.is_ok(), is_good, "{found:?}");
    }
    let ca = good.pem() + &expired.pem();
    let refused = asking(&new, &ca, &[]).unwrap_err();
    assert!(
        matches!(refused, TlsError::NoAuthority { reason: NoAuthority::Expired, .. }),
        "{refused}"
    );
}

#[test]
fn the_authority_of_a_client_is_searched_for_once_per_file_version() {
    let pki = pki();
    let (root, stranger) = (root(|_| {}), root(|_| {}));
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(Vec::new()).unwrap().signed_by(&key, &root).unwrap();
    let chain = [own.der().clone()];
    let server = asking(&pki, &root.pem(), &[]).unwrap();
    let client = |names: Option<&CertificateDer<'static>>| {
        let mut roots = rustls::RootCertStore::empty();
        let pem = std::fs::read(&pki.ca).unwrap();
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(crypto())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        Arc::new(match names {
            None => builder.with_no_client_auth(),
            Some(own) => builder.with_client_auth_cert(vec![own.clone()], key).unwrap(),
        })
    };
    let anonymous = server.handshake();
    shake(&anonymous.config(), &client(None), "db.example").unwrap();
    assert!(server.authority_of(&anonymous, &[]).is_err());
    let handshake = server.handshake();
    shake(&handshake.config(), &client(Some(&chain[0])), "db.example").unwrap();
    // What the handshake has found needs no chain.
    let found = server.authority_of(&handshake, &[]).unwrap();
    assert!(server.believes(&found));
    // Read again, and the same: a search, for which there is a chain.
    pki.folder.write("clients.crt", &(root.pem() + &stranger.pem()));
    assert!(server.reload(false).unwrap());
    assert!(server.authority_of(&handshake, &[]).is_err());
    assert_eq!(server.authority_of(&handshake, &chain).unwrap(), found);
    pki.folder.write("clients.crt", &stranger.pem());
    assert!(server.reload(true).unwrap());
    assert!(server.authority_of(&handshake, &chain).is_err() && !server.believes(&found));
    // Another handshake knows nothing of that one.
    assert!(server.authority_of(&server.handshake(), &[]).is_err());
}
