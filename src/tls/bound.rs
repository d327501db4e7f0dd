//! How much of a chain is looked at: bounded before any of it is verified.
//!
//! A search for a path tries the certificates that were shown in every order that fits, and checks
//! each order with the authority's key. Where all have one name, the authority's, that are as many
//! orders as there can be; and whoever has not proved anything chooses them. So there may be few, and
//! no choice among keys: then a search tries six orders at most. Every verifier that searches is put
//! into a [`Bounded`] by `tls.rs`.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use webpki::EndEntityCert;

use super::refused;

/// The most certificates that may be shown beside a peer's own. Public authorities have one or two
/// between a root and a leaf, and one more where they cross-sign.
pub(super) const MAX_INTERMEDIATES: usize = 4;

/// A verifier that is asked about bearable chains only.
#[derive(Debug)]
pub(super) struct Bounded<V>(pub(super) Arc<V>);

fn look(intermediates: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(refused(format_args!(
            "{} certificates were shown beside the peer's own; {MAX_INTERMEDIATES} may be",
            intermediates.len()
        )));
    }
    // One that cannot be read is part of no path.
    let read = intermediates.iter().filter_map(|der| EndEntityCert::try_from(der).ok());
    let read: Vec<_> =
        read.map(|of| (of.subject().to_owned(), of.subject_public_key_info())).collect();
    let differ = |(at, (subject, key)): (usize, &(Vec<u8>, SubjectPublicKeyInfoDer<'_>))| {
        read[..at].iter().any(|(other, others)| subject == other && key != others)
    };
    match read.iter().enumerate().any(differ) {
        true => Err(refused("certificates of one subject and different keys were shown")),
        false => Ok(()),
    }
}

/// The methods that both kinds of verifier have in common; they are not about chains.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.0.verify_tls12_signature(message, cert, dss)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.0.verify_tls13_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.supported_verify_schemes()
        }
    };
}

impl<V: ClientCertVerifier> ClientCertVerifier for Bounded<V> {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        look(intermediates)?;
        self.0.verify_client_cert(end_entity, intermediates, now)
    }

    signatures!();
}

impl<V: ServerCertVerifier> ServerCertVerifier for Bounded<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        look(intermediates)?;
        self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    signatures!();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    /// Believes everybody, and counts.
    #[derive(Debug, Default)]
    struct Asked(AtomicUsize);

    impl Asked {
        fn verdict<T>(&self, verdict: T) -> Result<T, rustls::Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(verdict)
        }
    }

    impl ClientCertVerifier for Asked {
        fn offer_client_auth(&self) -> bool {
            false
        }

        fn client_auth_mandatory(&self) -> bool {
            false
        }

        fn root_hint_subjects(&self) -> &[DistinguishedName] {
            &[]
        }

        fn verify_client_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: UnixTime,
        ) -> Result<ClientCertVerified, rustls::Error> {
            self.verdict(ClientCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            Vec::new()
        }
    }

    impl ServerCertVerifier for Asked {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            self.verdict(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            Vec::new()
        }
    }

    #[test]
    fn a_chain_that_is_too_long_is_refused_before_it_is_verified() {
        let bounded = Bounded(Arc::<Asked>::default());
        let asked = &bounded.0.0;
        let leaf = CertificateDer::from(vec![0x30]);
        let name = ServerName::try_from("localhost").expect("a name");
        let now = UnixTime::now();
        let ask = |count: usize| {
            let more = vec![leaf.clone(); count];
            let client = bounded.verify_client_cert(&leaf, &more, now).map(drop);
            let server = bounded.verify_server_cert(&leaf, &more, &name, &[], now).map(drop);
            assert_eq!(client.is_ok(), server.is_ok());
            client
        };
        for count in 0..=MAX_INTERMEDIATES {
            ask(count).expect("it is looked at");
        }
        let before = asked.load(Ordering::Relaxed);
        assert_eq!(before, 2 * (MAX_INTERMEDIATES + 1));
        for count in [MAX_INTERMEDIATES + 1, 10, 1000] {
            let error = ask(count).expect_err("it is too long").to_string();
            let said = format!("{count} certificates were shown beside the peer's own");
            assert!(error.contains(&said), "{error}");
        }
        assert_eq!(asked.load(Ordering::Relaxed), before, "nobody was asked about those");
    }

    /// One certificate of a subject, made with that key.
    fn of(subject: &str, key: &KeyPair) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, subject);
        params.self_signed(key).expect("signed").der().clone()
    }

    #[test]
    fn a_choice_among_keys_is_refused_before_it_is_verified() {
        let bounded = Bounded(Arc::<Asked>::default());
        let leaf = CertificateDer::from(vec![0x30]);
        let [one, other] = [(); 2].map(|()| KeyPair::generate().expect("a key"));
        for (shown, good) in [
            (vec![of("a", &one), of("b", &other)], true),
            (vec![of("a", &one), of("b", &one)], true),
            // Cross-signed: one key, and several who vouch for it.
            (vec![of("a", &one), of("a", &one), of("b", &other)], true),
            (vec![leaf.clone(), leaf.clone()], true),
            (vec![of("a", &one), of("a", &other)], false),
            (vec![of("a", &one), of("b", &one), of("a", &other)], false),
            (vec![of("a", &one), leaf.clone(), of("a", &one), of("a", &other)], false),
        ] {
            let before = bounded.0.0.load(Ordering::Relaxed);
            let verdict = bounded.verify_client_cert(&leaf, &shown, UnixTime::now());
            assert_eq!(verdict.is_ok(), good, "{verdict:?}");
            assert_eq!(bounded.0.0.load(Ordering::Relaxed) - before, usize::from(good));
        }
    }
}
