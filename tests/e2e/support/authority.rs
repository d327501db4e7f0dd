//! A certificate authority of a test's own: certificates for clients, and which of them are
//! revoked.

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

/// An authority, its key in memory.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Pair {
    pub(crate) fn der(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes());
        (certificate.expect("a certificate"), key.expect("a key"))
    }

    /// RFC 8705's `x5t#S256`.
    pub(crate) fn thumbprint(&self) -> String {
        use base64::Engine;
        let (certificate, _) = self.der();
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &certificate);
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(hash)
    }
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("signed"))
    }

    /// Its own certificate.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A client's certificate for a URI; `serial` is what a revocation names.
    pub(crate) fn client(&self, uri: &str, serial: u64) -> Pair {
        self.client_until(uri, serial, OffsetDateTime::now_utc() + Duration::hours(1))
    }

    pub(crate) fn client_until(&self, uri: &str, serial: u64, end: OffsetDateTime) -> Pair {
        self.client_of(uri, serial, (OffsetDateTime::now_utc() - Duration::hours(1), end))
    }

    pub(crate) fn client_since(&self, uri: &str, serial: u64, begin: OffsetDateTime) -> Pair {
        self.client_of(uri, serial, (begin, OffsetDateTime::now_utc() + Duration::hours(1)))
    }

    fn client_of(
        &self,
        uri: &str,
        serial: u64,
        (begin, end): (OffsetDateTime, OffsetDateTime),
    ) -> Pair {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri).expect("ASCII"))];
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_before = begin;
        params.not_after = end;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    /// A server's certificate for loopback.
    pub(crate) fn server(&self) -> Pair {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        self.server_of(&names)
    }

    pub(crate) fn server_of(&self, names: &[String]) -> Pair {
        let mut params = CertificateParams::new(names.to_vec()).expect("names");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed").pem();
        Pair { certificate, key: key.serialize_pem() }
    }

    /// The list of those revoked, in force from now on.
    pub(crate) fn revoked(&self, serials: &[u64]) -> String {
        self.revoked_until(serials, OffsetDateTime::now_utc() + Duration::hours(1))
    }

    pub(crate) fn revoked_until(&self, serials: &[u64], next_update: OffsetDateTime) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now - Duration::hours(2),
            next_update,
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).expect("signed").pem().expect("PEM")
    }
}
