//! TLS settings made from files: what clients see, and how databases are checked.
//!
//! One provider (aws-lc-rs), given explicitly: nothing depends on a process default.
//! TLS 1.2 and 1.3. A setting is either ready to use or an error that names its file.
//! Called by the configuration and the registry when they load; nothing here opens a
//! connection.
//!
//! What is believed of a certificate is decided in the modules below: `bound` limits how much of a
//! chain is looked at, `authorities` searches for a path and says which authority it leads to,
//! `lists` checks each revocation list's signature once for each key, and `verifiers` gives them to
//! rustls. `holder` reads whose a client's certificate is, `end_point` what a login is bound to,
//! and `validity` what of the files is in force and of no use. A session remembers its client's
//! authority as an [`AuthorityId`], a hash, and ends when the listener's files no longer have it.

mod authorities;
mod bound;
mod end_point;
mod holder;
mod lists;
mod validity;
mod verifiers;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, OtherError, ServerConfig, WantsVerifier,
};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};

use self::authorities::{Authorities, Peers};
pub use self::authorities::{AuthorityId, NoAuthority};
pub use self::end_point::server_end_point;
pub use self::holder::{Holder, HolderError, thumbprint};
use self::lists::Lists;
pub use self::validity::{Complaint, Validity};
use self::verifiers::{AnyCertificate, Client, Clients, Databases};
use crate::file::{self, MAX_PEM, MAX_REVOCATION_LIST};
use crate::stamp::{LastRead, Stamp};

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
    /// A certificate that is named as an authority's and is none.
    #[error("{path:?}: the certificate {subject:?} {reason}")]
    NoAuthority {
        /// Which file.
        path: PathBuf,
        /// Whose it is.
        subject: String,
        /// Why it is none.
        reason: NoAuthority,
    },
    /// PEM, but without a revocation list.
    #[error("{path:?} holds no revocation list; it must be PEM with an X509 CRL section")]
    NoRevocationList {
        /// Which file.
        path: PathBuf,
    },
    /// A revocation list that cannot be parsed or used.
    #[error("{path:?} holds a revocation list that cannot be used: {reason}")]
    BadRevocationList {
        /// Which file.
        path: PathBuf,
        /// What webpki said.
        reason: String,
    },
    /// A revocation list whose thisUpdate is to come.
    #[error("{path:?} holds a revocation list of the future; is a clock wrong?")]
    EarlyRevocationList {
        /// Which file.
        path: PathBuf,
        /// Its thisUpdate.
        from: UnixTime,
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
    /// Verification was asked for, and the system trusts no authority.
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
            | TlsError::EarlyRevocationList { path, .. }
            | TlsError::NoAuthority { path, .. }
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
    current: ArcSwap<Current>,
    /// Of the certificate that is shown, as far as it can be read.
    validity: ArcSwapOption<Validity>,
    read: Mutex<Read>,
}

/// When the files are to be read again.
#[derive(Debug)]
struct Read {
    last: LastRead<Vec<Stamp>>,
    /// When a revocation list of the future is none any more.
    early: Option<UnixTime>,
}

/// What the files of a listener came to.
#[derive(Debug)]
enum Current {
    /// Clients are asked for nothing.
    Shown(Arc<ServerConfig>),
    /// For a certificate.
    Asking {
        builder: ConfigBuilder<ServerConfig, WantsVerifier>,
        shown: Arc<dyn ResolvesServerCert>,
        clients: Arc<Clients>,
    },
}

/// One handshake with a client.
#[derive(Debug)]
pub struct Handshake {
    config: Arc<ServerConfig>,
    /// What its files were then.
    under: Arc<Current>,
    client: Option<Arc<Client>>,
}

impl Handshake {
    /// What the client is shown, and asked for. It is for this handshake only.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

impl Server {
    /// Reads the files.
    ///
    /// # Errors
    /// When they are not a chain and its key.
    pub fn open(files: ServerFiles) -> Result<Server, TlsError> {
        let read = Read { last: LastRead::new(files.stamps()), early: None };
        let Made { current, validity } = server(&files, Some(UnixTime::now()))?;
        let validity = ArcSwapOption::new(validity.map(Arc::new));
        Ok(Server {
            files,
            current: ArcSwap::from_pointee(current),
            validity,
            read: Mutex::new(read),
        })
    }

    /// From when to when the certificate that is shown is valid, as far as it can be read.
    pub fn validity(&self) -> Option<Validity> {
        self.validity.load().as_deref().copied()
    }

    /// What of its files is in force and should be mended.
    pub fn complaints(&self, now: UnixTime) -> Vec<Complaint> {
        let shown = self.validity().and_then(|shown| shown.complaint(&self.files.certificate, now));
        let current = self.current.load();
        let lists = current.clients().map(|clients| clients.complaints(now)).unwrap_or_default();
        shown.into_iter().chain(lists).collect()
    }

    /// What its TLS is made of.
    pub fn files(&self) -> &ServerFiles {
        &self.files
    }

    /// For a connection that comes now.
    pub fn handshake(&self) -> Handshake {
        let under = self.current.load_full();
        let (config, client) = match &*under {
            Current::Shown(config) => (Arc::clone(config), None),
            Current::Asking { builder, shown, clients } => {
                let client = Arc::new(Client::new(Arc::clone(clients)));
                let builder = builder.clone().with_client_cert_verifier(Arc::clone(&client) as _);
                (Arc::new(whole(builder.with_cert_resolver(Arc::clone(shown)))), Some(client))
            }
        };
        Handshake { config, under, client }
    }

    /// The authority that a client's chain, leaf first, leads to now. Its handshake has found that
    /// out; it is searched for again only if the files have changed since.
    ///
    /// # Errors
    /// When there is none, as where the authorities have changed.
    pub fn authority_of(
        &self,
        handshake: &Handshake,
        chain: &[CertificateDer<'_>],
    ) -> Result<AuthorityId, rustls::Error> {
        let current = self.current.load();
        let found = handshake.client.as_ref().and_then(|client| client.certified_by());
        match (found, current.clients(), chain) {
            (Some(found), Some(_), _) if Arc::ptr_eq(&current, &handshake.under) => Ok(found),
            (_, Some(clients), [leaf, beside @ ..]) => {
                clients.authority_of(leaf, beside, UnixTime::now())
            }
            _ => Err(rustls::Error::NoCertificatesPresented),
        }
    }

    /// Whether clients' certificates of that authority are still believed.
    pub fn believes(&self, authority: &AuthorityId) -> bool {
        self.current.load().clients().is_some_and(|clients| clients.believes(authority))
    }

    /// Whether clients are asked for a certificate.
    pub fn asks_clients(&self) -> bool {
        self.files.clients.is_some()
    }

    /// Reads the files again if one has changed, or in any case; whether that was so. After an
    /// error the old ones stay in force, and it is not tried again before another change, unless
    /// they could not even be read, or a revocation list's time has come. Blocks.
    ///
    /// # Errors
    /// When they are not a chain and its key, as while they are being replaced one by one.
    pub fn reload(&self, in_any_case: bool) -> Result<bool, TlsError> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let Read { last, early } = &mut *read;
        let has_come = early.is_some_and(|from| from <= UnixTime::now());
        let load = || {
            *early = None;
            let Made { current, validity } = again(&self.files, &self.current.load())?;
            self.current.store(Arc::new(current));
            self.validity.store(validity.map(Arc::new));
            Ok(())
        };
        // It may pass without a change.
        let unread = |error: &TlsError| matches!(error, TlsError::Unreadable { .. });
        let result = last.again(self.files.stamps(), in_any_case || has_come, load, unread);
        if let Err(TlsError::EarlyRevocationList { from, .. }) = &result {
            *early = Some(*from);
        }
        result
    }
}

impl Current {
    fn clients(&self) -> Option<&Arc<Clients>> {
        match self {
            Current::Shown(_) => None,
            Current::Asking { clients, .. } => Some(clients),
        }
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

    /// An authority that has expired is an error where `now` is given.
    fn verifier(&self, now: Option<UnixTime>) -> Result<Arc<Clients>, TlsError> {
        let pem = read(&self.ca)?;
        let authorities = Authorities::read(&self.ca, &pem, Peers::Clients, now)?;
        let lists = self.lists(&authorities)?;
        Ok(Arc::new(Clients::new(authorities, lists, self.required)))
    }

    /// A chain is checked against the lists of all its authorities, up to the root; a list that is
    /// out of date counts as none.
    fn lists(&self, authorities: &Authorities) -> Result<Lists, TlsError> {
        let mut lists = Lists::none();
        for path in &self.crls {
            let pem = read_up_to(path, MAX_REVOCATION_LIST)?;
            let mut holds_any = false;
            for list in CertificateRevocationListDer::pem_slice_iter(&pem) {
                let list = list.map_err(|_| TlsError::NotPem { path: path.clone() })?;
                lists.add(path, &list, authorities.anchors())?;
                holds_any = true;
            }
            if !holds_any {
                return Err(TlsError::NoRevocationList { path: path.clone() });
            }
        }
        Ok(lists)
    }
}

/// What the files of a listener were made into.
struct Made {
    current: Current,
    validity: Option<Validity>,
}

/// What a listener shows: the chain (leaf first) and its key. Offers ALPN `postgresql` and accepts
/// clients without ALPN. An authority that has expired is an error where `now` is given.
fn server(files: &ServerFiles, now: Option<UnixTime>) -> Result<Made, TlsError> {
    let ServerFiles { certificate, key, clients } = files;
    let chain = certificates(certificate, &read(certificate)?)?;
    let validity = chain.first().and_then(Validity::of);
    let secret = private_key(key)?;
    let builder = ServerConfig::builder_with_provider(crypto())
        .with_safe_default_protocol_versions()
        .map_err(unsupported)?;
    let clients = clients.as_ref().map(|clients| clients.verifier(now)).transpose()?;
    let config = builder.clone().with_no_client_auth().with_single_cert(chain, secret);
    let config = config.map_err(|source| match source {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::KeyMismatch { certificate: certificate.into(), key: key.into() }
        }
        rustls::Error::InvalidCertificate(_) => {
            TlsError::BadCertificate { path: certificate.into(), source }
        }
        source => TlsError::BadKey { path: key.into(), source },
    })?;
    let current = match clients {
        None => Current::Shown(Arc::new(whole(config))),
        Some(clients) => Current::Asking { builder, shown: config.cert_resolver, clients },
    };
    Ok(Made { current, validity })
}

/// The same while pgsilo runs. An authority that has expired meanwhile is believed as little as one
/// that is left out, and must not hold up the certificate that the listener shows.
fn again(files: &ServerFiles, before: &Current) -> Result<Made, TlsError> {
    server(files, Some(UnixTime::now())).or_else(|error| match &error {
        TlsError::NoAuthority { reason: NoAuthority::Expired, .. } => {
            let made = server(files, None)?;
            // One that comes expired is a mistake, and no reason to end anybody's session.
            let known = made.current.clients().zip(before.clients());
            if !known.is_some_and(|(new, old)| new.have_expired_since(old, UnixTime::now())) {
                return Err(error);
            }
            tracing::warn!(%error, "whom it certified is not believed; a start would be refused");
            Ok(made)
        }
        _ => Err(error),
    })
}

/// Each handshake is a whole one, as PostgreSQL's: a resumed session would bring a client's
/// certificate along that is not checked again.
fn whole(mut config: ServerConfig) -> ServerConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

/// A PEM file of roots, as it was when it was read. Equal ones make the same settings. It is looked
/// up for each tenant of a registry, so comparing clones and hashing do not read its contents.
#[derive(Debug, Clone, Eq)]
pub struct CaFile {
    path: PathBuf,
    pem: Arc<[u8]>,
}

impl PartialEq for CaFile {
    fn eq(&self, other: &CaFile) -> bool {
        self.path == other.path && (Arc::ptr_eq(&self.pem, &other.pem) || self.pem == other.pem)
    }
}

impl Hash for CaFile {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.path.hash(state);
    }
}

impl CaFile {
    /// Reads it, and looks at nothing in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<CaFile, TlsError> {
        Ok(CaFile { path: path.into(), pem: read(path)?.into() })
    }

    /// The same of a text; errors call it by the name.
    pub fn named(name: &str, pem: &str) -> CaFile {
        CaFile { path: name.into(), pem: pem.as_bytes().into() }
    }
}

/// How a database is checked. `ca` holds the roots, `None`: the system's. No ALPN: servers before
/// PostgreSQL 17 do not know it. The CA is not looked at for [`Mode::Require`].
///
/// # Errors
/// When a certificate of the CA cannot be used, or the system has none.
pub fn client(mode: Mode, ca: Option<&CaFile>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(crypto())
        .with_safe_default_protocol_versions()
        .map_err(unsupported)?;
    let of_authorities = |names| -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        Ok(Arc::new(Databases { authorities: of_databases(ca)?, names }))
    };
    let verifier = match mode {
        Mode::Require => Arc::new(AnyCertificate),
        Mode::VerifyCa => of_authorities(false)?,
        Mode::VerifyFull => of_authorities(true)?,
    };
    let config =
        builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    Ok(Arc::new(config))
}

fn unsupported(error: impl fmt::Display) -> TlsError {
    TlsError::Unsupported(error.to_string())
}

/// A peer's certificates are refused for a reason of ours.
fn refused(reason: impl fmt::Display) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(Told(reason.to_string())))).into()
}

/// rustls tells of another's error by its Debug.
#[derive(thiserror::Error)]
#[error("{0}")]
struct Told(String);

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
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
    read_up_to(path, MAX_PEM)
}

fn read_up_to(path: &Path, limit: u64) -> Result<Vec<u8>, TlsError> {
    file::read(path, limit).map_err(|source| TlsError::Unreadable { path: path.into(), source })
}

/// One that has expired is no error: a registry is one file for all tenants, and its other tenants
/// are served. A database that it certifies is not believed.
fn of_databases(ca: Option<&CaFile>) -> Result<Arc<Authorities>, TlsError> {
    match ca {
        Some(CaFile { path, pem }) => Authorities::read(path, pem, Peers::Servers, None),
        None => system_roots().ok_or(TlsError::NoSystemRoots),
    }
}

/// A CA file as it is, for a client of HTTPS, once every certificate in it is known to be an
/// authority's that has not expired.
pub fn roots_pem(path: &Path) -> Result<Vec<u8>, TlsError> {
    let pem = read(path)?;
    Authorities::read(path, &pem, Peers::Servers, Some(UnixTime::now()))?;
    Ok(pem)
}

/// The system's roots, read once for the life of the process: a hundred thousand
/// placements may share them. Single bad files there are the system's business, and so is
/// `SSL_CERT_FILE`, which stands in for the system's store as it does for OpenSSL.
fn system_roots() -> Option<Arc<Authorities>> {
    static ROOTS: OnceLock<Arc<Authorities>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        Authorities::among(&rustls_native_certs::load_native_certs().certs, Peers::Servers)
    });
    (!roots.is_empty()).then(|| Arc::clone(roots))
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;
