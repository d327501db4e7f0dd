//! Who is believed in a TLS handshake: clients that an authority certified, and databases as far as
//! their placement says. All of them have a peer prove, by the handshake's signature, that it holds
//! its certificate's key. Made by `tls.rs` only.

use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::authorities::{Authorities, AuthorityId};
use super::crypto;
use super::lists::Lists;
use super::validity::Complaint;

/// `sslmode=require`: believes any certificate, but its holder must still have the key: channel
/// binding depends on it.
#[derive(Debug)]
pub(super) struct AnyCertificate;

/// `sslmode=verify-ca` and `verify-full`.
#[derive(Debug)]
pub(super) struct Databases {
    pub(super) authorities: Arc<Authorities>,
    /// Whether the certificate must be for the host.
    pub(super) names: bool,
}

/// Whose certificates clients may show.
#[derive(Debug)]
pub(super) struct Clients {
    authorities: Arc<Authorities>,
    names: Vec<DistinguishedName>,
    lists: Lists,
    required: bool,
}

/// One client's certificate, and what became of it.
#[derive(Debug)]
pub(super) struct Client {
    clients: Arc<Clients>,
    certified_by: OnceLock<AuthorityId>,
}

impl Client {
    pub(super) fn new(clients: Arc<Clients>) -> Client {
        Client { clients, certified_by: OnceLock::new() }
    }

    /// The authority that its chain leads to, once that has been found.
    pub(super) fn certified_by(&self) -> Option<AuthorityId> {
        self.certified_by.get().copied()
    }
}

impl Clients {
    /// With any `lists`, a certificate whose authority has none there, or one that is out of date,
    /// is not believed. `required`: whether a client without a certificate is turned away.
    pub(super) fn new(authorities: Arc<Authorities>, lists: Lists, required: bool) -> Clients {
        Clients { names: authorities.names(), authorities, lists, required }
    }

    /// Whether each authority that has expired is one of those of before.
    pub(super) fn have_expired_since(&self, before: &Clients, now: UnixTime) -> bool {
        self.authorities.expired(now).all(|id| before.authorities.has(id))
    }

    /// The authority that a chain leads to.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn authority_of(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<AuthorityId, rustls::Error> {
        self.authorities.check(end_entity, intermediates, &self.lists, None, now)
    }

    /// What is wrong with the revocation lists.
    pub(super) fn complaints(&self, now: UnixTime) -> Vec<Complaint> {
        self.lists.complaints(now)
    }

    /// Whether it is one of those that chains may lead to.
    pub(super) fn believes(&self, authority: &AuthorityId) -> bool {
        self.authorities.has(authority)
    }
}

/// The methods that all verifiers have in common.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &crypto().signature_verification_algorithms;
            verify_tls12_signature(message, cert, dss, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &crypto().signature_verification_algorithms;
            verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            crypto().signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl ServerCertVerifier for Databases {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let name = self.names.then_some(server_name);
        self.authorities.check(end_entity, intermediates, &Lists::none(), name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for Client {
    fn client_auth_mandatory(&self) -> bool {
        self.clients.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.clients.names
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let authority = self.clients.authority_of(end_entity, intermediates, now)?;
        // A handshake asks once.
        self.certified_by.get_or_init(|| authority);
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}
