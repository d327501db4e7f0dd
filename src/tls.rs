//! TLS settings made from files: what clients see, and how databases are checked.
//!
//! One provider (aws-lc-rs), given explicitly: nothing depends on a process default.
//! TLS 1.2 and 1.3. A setting is either ready to use or an error that names its file.
//! Called by the configuration and the registry when they load; nothing here opens a
//! connection.

mod holder;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::signature_algorithm::SignatureAlgorithm;

pub use self::holder::{Holder, HolderError, thumbprint};
use crate::stamp::{LastRead, Stamp, read_file};

/// What PostgreSQL 17 registered; libpq's `sslnegotiation=direct` insists on it.
const ALPN: &[u8] = b"postgresql";

/// How much of a database's certificate is believed; the names are libpq's `sslmode`s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Encrypted, but to whomever answers: no certificate is checked.
    Require,
    /// The chain must end at a trusted root; the name in the certificate may differ.
    VerifyCa,
    /// The chain and the name.
    VerifyFull,
}

/// Why a TLS setting cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read {path:?}: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not PEM.
    #[error("{path:?} is not valid PEM")]
    NotPem {
        /// Which file.
        path: PathBuf,
    },
    /// PEM, but without a `CERTIFICATE` section.
    #[error("{path:?} holds no certificate; it must be PEM with a CERTIFICATE section")]
    NoCertificate {
        /// Which file.
        path: PathBuf,
    },
    /// A certificate that cannot be parsed or used.
    #[error("{path:?} holds a certificate that cannot be used: {source}")]
    BadCertificate {
        /// Which file.
        path: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
    /// PEM, but without a revocation list.
    #[error("{path:?} holds no revocation list; it must be PEM with an X509 CRL section")]
    NoRevocationList {
        /// Which file.
        path: PathBuf,
    },
    /// A revocation list that cannot be parsed or used.
    #[error("{path:?}, or another list with it, cannot be used: {reason}")]
    BadRevocationList {
        /// The first file.
        path: PathBuf,
        /// What rustls said.
        reason: String,
    },
    /// PEM, but without a private key.
    #[error(
        "{path:?} holds no private key; it must be PEM with an unencrypted PRIVATE KEY section"
    )]
    NoKey {
        /// Which file.
        path: PathBuf,
    },
    /// A private key of a kind that cannot sign here.
    #[error("{path:?} holds a private key that cannot be used: {source}")]
    BadKey {
        /// Which file.
        path: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
    /// Certificate and key are not a pair.
    #[error("the key in {key:?} does not belong to the first certificate in {certificate:?}")]
    KeyMismatch {
        /// The chain's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// Verification was asked for, and the system trusts nobody.
    #[error("the system has no trusted root certificates; name a ca file")]
    NoSystemRoots,
    /// The provider lacks what a setting needs; a bug of the build.
    #[error("cannot set up TLS: {0}")]
    Unsupported(String),
}

impl TlsError {
    /// The file to blame, if it is one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            TlsError::Unreadable { path, .. }
            | TlsError::NotPem { path }
            | TlsError::NoCertificate { path }
            | TlsError::BadCertificate { path, .. }
            | TlsError::NoRevocationList { path }
            | TlsError::BadRevocationList { path, .. }
            | TlsError::NoKey { path }
            | TlsError::BadKey { path, .. } => Some(path),
            TlsError::KeyMismatch { key, .. } => Some(key),
            TlsError::NoSystemRoots | TlsError::Unsupported(_) => None,
        }
    }
}

fn crypto() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(provider::default_provider())).clone()
}

/// The files that a listener's TLS is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFiles {
    /// PEM, leaf first.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
    /// Whose certificates clients may show; `None`: they are not asked for any.
    pub clients: Option<ClientAuthorities>,
}

/// What a file of [`ClientAuthorities`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfClients {
    /// Roots.
    Authorities,
    /// What of theirs is revoked.
    RevocationList,
}

/// Whose certificates are believed of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientAuthorities {
    /// PEM of the roots.
    pub ca: PathBuf,
    /// PEM, one for each authority that signs. With any, a certificate whose authority has none,
    /// or one that is out of date, is not believed.
    pub crls: Vec<PathBuf>,
    /// Whether a client without a certificate is turned away in the handshake.
    pub required: bool,
}

/// A listener's TLS, made anew when a file of it changes: connections that are open keep what
/// they have, those that come get the new one.
#[derive(Debug)]
pub struct Server {
    files: ServerFiles,
    current: ArcSwap<ServerConfig>,
    read: Mutex<LastRead<Vec<Stamp>>>,
}

impl Server {
    /// Reads the files.
    ///
    /// # Errors
    /// When they are not a chain and its key.
    pub fn open(files: ServerFiles) -> Result<Server, TlsError> {
        let read = LastRead::new(files.stamps());
        let current = ArcSwap::new(server(&files)?);
        Ok(Server { files, current, read: Mutex::new(read) })
    }

    /// What a connection that comes now is shown.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }

    /// Whether clients are asked for a certificate.
    pub fn asks_clients(&self) -> bool {
        self.files.clients.is_some()
    }

    /// Reads the files again if one has changed, or in any case; whether that was so. After an
    /// error the old ones stay in force, and it is not tried again before another change, unless
    /// they could not even be read. Blocks.
    ///
    /// # Errors
    /// When they are not a chain and its key, as while they are being replaced one by one.
    pub fn reload(&self, in_any_case: bool) -> Result<bool, TlsError> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let load = || {
            self.current.store(server(&self.files)?);
            Ok(())
        };
        let unread = |error: &TlsError| matches!(error, TlsError::Unreadable { .. });
        read.again(self.files.stamps(), in_any_case, load, unread)
    }
}

impl ServerFiles {
    /// Which of those that clients' certificates are checked with a file is, if it is one: the
    /// authorities, or a revocation list.
    pub fn of_clients(&self, file: &Path) -> Option<OfClients> {
        let clients = self.clients.as_ref()?;
        match (clients.ca == file, clients.crls.iter().any(|crl| crl == file)) {
            (true, _) => Some(OfClients::Authorities),
            (false, true) => Some(OfClients::RevocationList),
            (false, false) => None,
        }
    }

    fn stamps(&self) -> Vec<Stamp> {
        let clients = self.clients.iter().flat_map(ClientAuthorities::files);
        let own = [self.certificate.as_path(), self.key.as_path()].into_iter();
        own.chain(clients).map(Stamp::of).collect()
    }
}

impl ClientAuthorities {
    fn files(&self) -> impl Iterator<Item = &Path> {
        [self.ca.as_path()].into_iter().chain(self.crls.iter().map(PathBuf::as_path))
    }

    /// A chain is checked against the lists of all its authorities, up to the root; a list that is
    /// out of date counts as none.
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let roots = roots(Some(&self.ca))?;
        let mut crls = Vec::with_capacity(self.crls.len());
        for path in &self.crls {
            let pem = read(path)?;
            let before = crls.len();
            for crl in CertificateRevocationListDer::pem_slice_iter(&pem) {
                crls.push(crl.map_err(|_| TlsError::NotPem { path: path.clone() })?);
            }
            if crls.len() == before {
                return Err(TlsError::NoRevocationList { path: path.clone() });
            }
        }
        let checks = !crls.is_empty();
        let mut builder = WebPkiClientVerifier::builder_with_provider(roots, crypto());
        if checks {
            builder = builder.with_crls(crls).enforce_revocation_expiration();
        }
        if !self.required {
            builder = builder.allow_unauthenticated();
        }
        builder.build().map_err(|error| match error {
            VerifierBuilderError::InvalidCrl(_) if checks => TlsError::BadRevocationList {
                path: self.crls[0].clone(),
                reason: error.to_string(),
            },
            error => unsupported(error),
        })
    }
}

/// What a listener shows: the chain (leaf first) and its key. Offers ALPN `postgresql`
/// and accepts clients without ALPN.
fn server(files: &ServerFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let ServerFiles { certificate, key, clients } = files;
    let chain = certificates(certificate, &read(certificate)?)?;
    let secret = private_key(key)?;
    let builder = ServerConfig::builder_with_provider(crypto())
        .with_safe_default_protocol_versions()
        .map_err(unsupported)?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(clients) => builder.with_client_cert_verifier(clients.verifier()?),
    };
    let mut config = builder.with_single_cert(chain, secret).map_err(|source| match source {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::KeyMismatch { certificate: certificate.into(), key: key.into() }
        }
        rustls::Error::InvalidCertificate(_) => {
            TlsError::BadCertificate { path: certificate.into(), source }
        }
        source => TlsError::BadKey { path: key.into(), source },
    })?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Each handshake is a whole one, as PostgreSQL's: a resumed session would bring a client's
    // certificate along that nobody looks at again.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// How a database is checked. `ca` is a PEM file of roots, `None` the system's. No ALPN:
/// servers before PostgreSQL 17 do not know it. The CA is not read for [`Mode::Require`].
pub fn client(mode: Mode, ca: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(crypto())
        .with_safe_default_protocol_versions()
        .map_err(unsupported)?;
    let webpki = |roots| {
        WebPkiServerVerifier::builder_with_provider(roots, crypto()).build().map_err(unsupported)
    };
    let verifier: Arc<dyn ServerCertVerifier> = match mode {
        Mode::Require => Arc::new(AnyCertificate(crypto())),
        Mode::VerifyCa => Arc::new(AnyName(webpki(roots(ca)?)?)),
        Mode::VerifyFull => webpki(roots(ca)?)?,
    };
    let config =
        builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    Ok(Arc::new(config))
}

fn unsupported(error: impl fmt::Display) -> TlsError {
    TlsError::Unsupported(error.to_string())
}

/// Every certificate of a PEM file, at least one.
fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|_| TlsError::NotPem { path: path.into() })?;
    if found.is_empty() { Err(TlsError::NoCertificate { path: path.into() }) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = zeroize::Zeroizing::new(read(path)?);
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::NoKey { path: path.into() },
        _ => TlsError::NotPem { path: path.into() },
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    read_file(path).map_err(|source| TlsError::Unreadable { path: path.into(), source })
}

fn roots(ca: Option<&Path>) -> Result<Arc<RootCertStore>, TlsError> {
    let Some(path) = ca else {
        return system_roots().ok_or(TlsError::NoSystemRoots);
    };
    trusted(path, &read(path)?)
}

/// A CA file as it is, once every certificate in it is known to be usable as a root.
pub(crate) fn roots_pem(path: &Path) -> Result<Vec<u8>, TlsError> {
    let pem = read(path)?;
    trusted(path, &pem)?;
    Ok(pem)
}

fn trusted(path: &Path, pem: &[u8]) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        store
            .add(certificate)
            .map_err(|source| TlsError::BadCertificate { path: path.into(), source })?;
    }
    Ok(Arc::new(store))
}

/// The system's roots, read once for the life of the process: a hundred thousand
/// placements may share them. Single bad files there are the system's business, and so is
/// `SSL_CERT_FILE`, which stands in for the system's store as it does for OpenSSL.
fn system_roots() -> Option<Arc<RootCertStore>> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(store)
    });
    (!roots.is_empty()).then(|| roots.clone())
}

/// `sslmode=require`: believes any certificate, but its holder must still prove, by the
/// handshake's signature, to have the key: channel binding depends on it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

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

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `sslmode=verify-ca`: everything that webpki checks, but the name. webpki looks at the
/// name last, so a name error means that the chain was good.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

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
}

/// RFC 5929 `tls-server-end-point`: the leaf hashed with its own signature's hash, where
/// MD5 and SHA-1 become SHA-256. `None` where the RFC leaves it undefined (Ed25519), as
/// PostgreSQL's `X509_get_signature_nid` path does.
pub fn server_end_point(leaf: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (rest, certificate) = X509Certificate::from_der(leaf).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let identifier = &certificate.signature_algorithm;
    let hash = match identifier.algorithm.to_id_string().as_str() {
        // RSASSA-PSS says its hash in its parameters; none means SHA-1.
        "1.2.840.113549.1.1.10" => match SignatureAlgorithm::try_from(identifier).ok()? {
            SignatureAlgorithm::RSASSA_PSS(parameters) => {
                match parameters.hash_algorithm_oid().to_id_string().as_str() {
                    "1.2.840.113549.2.5" | "1.3.14.3.2.26" | "2.16.840.1.101.3.4.2.1" => {
                        &digest::SHA256
                    }
                    "2.16.840.1.101.3.4.2.2" => &digest::SHA384,
                    "2.16.840.1.101.3.4.2.3" => &digest::SHA512,
                    "2.16.840.1.101.3.4.2.4" => &digest::SHA224,
                    _ => return None,
                }
            }
            _ => return None,
        },
        // RSA with MD5, SHA-1, SHA-256; ECDSA with SHA-1, SHA-256; DSA with SHA-1, SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2"
        | "1.2.840.10040.4.3"
        | "2.16.840.1.101.3.4.3.2" => &digest::SHA256,
        "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" => &digest::SHA224,
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => &digest::SHA384,
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(hash, leaf).as_ref().to_vec())
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;
