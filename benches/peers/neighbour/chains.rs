//! A stranger shows a chain of certificates that takes long to be found wanting.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::{Attack, Held, again};

/// Self-made certificates in a chain.
const LENGTH: usize = 10;

pub(super) const ATTACK: Attack = Attack {
    name: "certificate chains",
    what: "a stranger shows 10 self-made certificates of one subject, each with a key of its own, 16 times a second",
    begin: |arena| {
        Box::pin(async move {
            let (address, config) = (arena.asking(), Arc::new(config()));
            let mut tasks = JoinSet::new();
            again(&mut tasks, 16, move || {
                let config = Arc::clone(&config);
                async move {
                    let Ok(tcp) = TcpStream::connect(address).await else { return };
                    let name = ServerName::try_from("localhost").expect("a name");
                    let shaken = TlsConnector::from(config).connect(name, tcp).await;
                    // Under TLS 1.3 the refusal is read behind the client's half.
                    let Ok(mut tls) = shaken else { return };
                    let _closed = tls.read_to_end(&mut Vec::new()).await;
                }
            });
            Held::by(tasks)
        })
    },
};

fn config() -> ClientConfig {
    let (chain, key) = chain();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Whoever))
        .with_client_auth_cert(chain, key)
        .expect("a chain");
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    config
}

/// A leaf, and authorities of one name that may all have signed it, and each other.
fn chain() -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let authority = || {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, "one of many");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed")
    };
    let authorities: Vec<_> = (0..LENGTH).map(|_| authority()).collect();
    let key = KeyPair::generate().expect("a key");
    let leaf = CertificateParams::new(vec!["client".to_owned()]).expect("a name");
    let leaf = leaf.signed_by(&key, &authorities[0]).expect("signed");
    let mut chain = vec![leaf.der().clone()];
    // The signer comes last, so that all others are tried before it.
    chain.extend(authorities.iter().rev().map(|authority| authority.der().clone()));
    (chain, PrivateKeyDer::try_from(key.serialize_der()).expect("a key"))
}

/// An attacker does not care whom it talks to.
#[derive(Debug)]
struct Whoever;

impl ServerCertVerifier for Whoever {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
