//! What a stranger shows to a listener that asks for certificates: chains that anybody can make,
//! and that take long to be found wanting. Its authority has the name that rcgen gives where none
//! is said, as those of the tests and benchmarks do, which strangers may use as well.

use std::sync::Arc;

use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

/// A client's certificate, and certificates of authorities behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chain {
    /// So many authorities of the listener's name, each with a key of its own.
    Keys(usize),
    /// Two certificates of another name and one key, and two of the listener's name and one key,
    /// each of which may have signed either of the others. No four that are looked at have more
    /// orders.
    Pairs,
}

/// Leaf first, and the leaf's key.
pub(crate) fn made(chain: Chain) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let (listeners, between) = (None, Some("between"));
    let above = Issuer::new(authority(listeners), pair());
    let of = |name, key: &KeyPair| signed(&authority(name), key, &above);
    let (last, behind) = match chain {
        Chain::Keys(count) => (listeners, (0..count).map(|_| of(listeners, &pair())).collect()),
        Chain::Pairs => {
            let keys = [(between, pair()), (listeners, pair())];
            let twice = keys.iter().flat_map(|(name, key)| [of(*name, key), of(*name, key)]);
            (between, twice.collect::<Vec<_>>())
        }
    };
    let own = pair();
    let leaf = CertificateParams::new(vec!["client".to_owned()]).expect("a name");
    let leaf = signed(&leaf, &own, &Issuer::new(authority(last), pair()));
    let all = [leaf].into_iter().chain(behind).map(|certificate| certificate.der().clone());
    (all.collect(), PrivateKeyDer::try_from(own.serialize_der()).expect("a key"))
}

fn pair() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn authority(name: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    if let Some(name) = name {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn signed(params: &CertificateParams, key: &KeyPair, by: &Issuer<'_, KeyPair>) -> Certificate {
    params.signed_by(key, by).expect("signed")
}

/// A client that does not care whom it talks to, and shows what is given.
pub(crate) fn client(
    shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)));
    match shown {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).expect("a pair"),
    }
}

/// Accepts every certificate.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
