//! A certificate authority of a test's own: certificates for clients, and which of them are
//! revoked.

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

/// An authority, its key in memory.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Pair {
    pub fn der(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes());
        (certificate.expect("a certificate"), key.expect("a key"))
    }

    /// The certificate, and those that are shown beside it.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        let chain = CertificateDer::pem_slice_iter(self.certificate.as_bytes());
        chain.map(|certificate| certificate.expect("a certificate")).collect()
    }

    /// RFC 8705's `x5t#S256`.
    pub fn thumbprint(&self) -> String {
        use base64::Engine;
        let (certificate, _) = self.der();
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &certificate);
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(hash)
    }
}

impl Authority {
    pub fn new() -> Authority {
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(authority_params(), key).expect("signed"))
    }

    /// One that is none: a self-signed certificate with CA:FALSE, whose key signs all the same.
    pub fn pretended() -> Authority {
        let mut params = authority_params();
        params.distinguished_name.push(DnType::CommonName, "a partner");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = Vec::new();
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("signed"))
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A client's certificate for a URI; `serial` is what a revocation names.
    pub fn client(&self, uri: &str, serial: u64) -> Pair {
        self.client_until(uri, serial, OffsetDateTime::now_utc() + Duration::hours(1))
    }

    pub fn client_until(&self, uri: &str, serial: u64, end: OffsetDateTime) -> Pair {
        self.client_of(uri, serial, (OffsetDateTime::now_utc() - Duration::hours(1), end))
    }

    pub fn client_since(&self, uri: &str, serial: u64, begin: OffsetDateTime) -> Pair {
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

    /// A certificate below so many authorities below this one, which are shown beside it.
    pub fn below(&self, uri: &str, depth: usize) -> Pair {
        let mut chain = Vec::new();
        let mut nearest: Option<CertifiedIssuer<'static, KeyPair>> = None;
        for level in 0..depth {
            let mut params = authority_params();
            params.distinguished_name.push(DnType::CommonName, format!("level {level}"));
            let key = KeyPair::generate().expect("a key");
            let issuer = match &nearest {
                None => CertifiedIssuer::signed_by(params, key, &self.0),
                Some(above) => CertifiedIssuer::signed_by(params, key, above),
            };
            let issuer = issuer.expect("signed");
            chain.insert(0, issuer.pem());
            nearest = Some(issuer);
        }
        let own = Authority(nearest.expect("at least one")).client(uri, 1);
        Pair { certificate: own.certificate + &chain.concat(), key: own.key }
    }

    /// What a stranger makes: a certificate, and so many of one subject, this authority's, each
    /// with a key of its own.
    pub fn self_made(names: &[&str], uri: &str, count: usize) -> Pair {
        let stranger = Authority::new();
        let mut params =
            CertificateParams::new(names.iter().map(|&name| name.into()).collect::<Vec<_>>())
                .expect("names");
        params.subject_alt_names.push(SanType::URI(Ia5String::try_from(uri).expect("ASCII")));
        let mut pair = stranger.sign(params);
        for _ in 0..count {
            pair.certificate += &stranger.sign(authority_params()).certificate;
        }
        pair
    }

    /// A server's certificate for loopback.
    pub fn server(&self) -> Pair {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        self.server_of(&names)
    }

    pub fn server_of(&self, names: &[String]) -> Pair {
        let mut params = CertificateParams::new(names.to_vec()).expect("names");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    /// A server's certificate for loopback, valid for a time.
    pub fn server_within(&self, begin: OffsetDateTime, end: OffsetDateTime) -> Pair {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
        (params.not_before, params.not_after) = (begin, end);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed").pem();
        Pair { certificate, key: key.serialize_pem() }
    }

    /// The list of those revoked, in force from now on.
    pub fn revoked(&self, serials: &[u64]) -> String {
        self.revoked_until(serials, OffsetDateTime::now_utc() + Duration::hours(1))
    }

    pub fn revoked_until(&self, serials: &[u64], next_update: OffsetDateTime) -> String {
        let this_update = OffsetDateTime::now_utc() - Duration::hours(2);
        self.revoked_within(serials, this_update, next_update)
    }

    pub fn revoked_within(
        &self,
        serials: &[u64],
        this_update: OffsetDateTime,
        next_update: OffsetDateTime,
    ) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).expect("signed").pem().expect("PEM")
    }
}

/// All authorities of these tests have one name, which strangers may use as well.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
