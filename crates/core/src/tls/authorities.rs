//! Whose signatures are believed, and which chains lead to them.
//!
//! webpki searches for a path and checks everything in it but its end: of a trust anchor it knows a
//! name and a key, and nothing of what the certificate says that it was taken from. That is looked
//! at here, as OpenSSL does (`check_ca`, `check_chain` and `check_purpose` in `crypto/x509`): that
//! it is an authority at all when it is read, and of each path until when it is one, how long the
//! path may be, and what the certificates in it may sign. Made by `tls.rs`, asked by the verifiers.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use rustls::{CertRevocationListError, CertificateError, DistinguishedName};
use rustls_pki_types::{
    CertificateDer, ServerName, SignatureVerificationAlgorithm, TrustAnchor, UnixTime,
};
use webpki::{EndEntityCert, ExpirationPolicy, RevocationOptionsBuilder, VerifiedPath};
use x509_parser::extensions::KeyUsage;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use super::bound::look;
use super::lists::Lists;
use super::{TlsError, certificates, refused};

/// Whom certificates are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peers {
    Clients,
    Servers,
}

/// Authorities, of one kind of peers.
#[derive(Debug)]
pub(super) struct Authorities {
    peers: Peers,
    anchors: Vec<TrustAnchor<'static>>,
    /// Of each anchor, by its place.
    says: Vec<Says>,
}

/// What an authority's certificate says that a trust anchor does not.
#[derive(Debug)]
struct Says {
    from: UnixTime,
    until: UnixTime,
    /// How many authorities may stand between it and a peer's certificate.
    path_length: Option<u32>,
    id: AuthorityId,
}

/// An authority: a hash of its name, its key and the names that it may sign for. A certificate that
/// is made anew for the same key is the same authority's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthorityId([u8; 32]);

/// Why a certificate is no authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoAuthority {
    /// It cannot be read.
    #[error("cannot be read")]
    Unreadable,
    /// CA:FALSE, or nothing of the kind.
    #[error(
        "is no authority's (basicConstraints CA:TRUE is missing): its key could sign \
         for anybody; name the authority that signed it"
    )]
    Leaf,
    /// Before version 3 nothing said what a certificate is.
    #[error(
        "is of X.509 version 1, which does not say that it is an authority's; have it made anew, \
         with the same key, as version 3 with basicConstraints CA:TRUE"
    )]
    Version1,
    /// A keyUsage without keyCertSign.
    #[error("may not sign certificates (its keyUsage is without keyCertSign)")]
    MayNotSign,
    /// An extendedKeyUsage without what it is named for.
    #[error("is not for the certificates of {0} (its extendedKeyUsage is without them)")]
    OtherPeers(&'static str),
    /// notAfter has passed.
    #[error("has expired; remove it, or put its successor in its place")]
    Expired,
}

/// Why a path that leads to an authority is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Unfit {
    #[error("an authority of the chain cannot be read")]
    Unreadable,
    #[error("an authority of the chain may not sign certificates (keyUsage)")]
    MayNotSign,
    #[error("the certificate is for other uses of its key (keyUsage)")]
    OtherUse,
    #[error("more authorities between the root and the certificate than the root allows")]
    TooLong,
}

impl Authorities {
    /// Every certificate of a PEM file, each of which must be an authority's. One that has expired
    /// is an error where `now` is given; else no chain that leads to it is believed.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub(super) fn read(
        path: &Path,
        pem: &[u8],
        peers: Peers,
        now: Option<UnixTime>,
    ) -> Result<Arc<Authorities>, TlsError> {
        let mut all = Authorities { peers, anchors: Vec::new(), says: Vec::new() };
        for certificate in certificates(path, pem)? {
            all.add(&certificate, now).map_err(|reason| TlsError::NoAuthority {
                path: path.into(),
                subject: subject(&certificate),
                reason,
            })?;
        }
        Ok(Arc::new(all))
    }

    /// Those of these certificates that are authorities'; what else is among them is left out.
    pub(super) fn among(found: &[CertificateDer<'_>], peers: Peers) -> Arc<Authorities> {
        let mut all = Authorities { peers, anchors: Vec::new(), says: Vec::new() };
        for certificate in found {
            let _left_out = all.add(certificate, Some(UnixTime::now()));
        }
        Arc::new(all)
    }

    fn add(
        &mut self,
        certificate: &CertificateDer<'_>,
        now: Option<UnixTime>,
    ) -> Result<(), NoAuthority> {
        let anchor = webpki::anchor_from_trusted_cert(certificate);
        let anchor = anchor.map_err(|_error| NoAuthority::Unreadable)?.to_owned();
        let says = Says::of(certificate, &anchor, self.peers)?;
        if now.is_some_and(|now| says.until < now) {
            return Err(NoAuthority::Expired);
        }
        self.anchors.push(anchor);
        self.says.push(says);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// As webpki has them.
    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// Those of these that have expired.
    pub(super) fn expired(&self, now: UnixTime) -> impl Iterator<Item = &AuthorityId> {
        self.says.iter().filter(move |says| says.until < now).map(|says| &says.id)
    }

    /// Whether it is one of these.
    pub(super) fn has(&self, id: &AuthorityId) -> bool {
        self.says.iter().any(|says| says.id == *id)
    }

    /// Their names, for a client to choose among its certificates.
    pub(super) fn names(&self) -> Vec<DistinguishedName> {
        let names = self.anchors.iter();
        names.map(|anchor| DistinguishedName::in_sequence(&anchor.subject)).collect()
    }

    /// Searches for a path from a certificate to one of these authorities, and says to which. With
    /// any of `lists`, each certificate of the path must be on none of them, and its authority have
    /// one that is not out of date; with a `name`, the certificate must be for it.
    ///
    /// # Errors
    /// Why there is no path that is good, or why none is searched for.
    pub(super) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        lists: &Lists,
        name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<AuthorityId, rustls::Error> {
        look(intermediates)?;
        let certificate = EndEntityCert::try_from(leaf).map_err(told)?;
        let usage = match self.peers {
            Peers::Clients => webpki::KeyUsage::client_auth(),
            Peers::Servers => webpki::KeyUsage::server_auth(),
        };
        let all = lists.all();
        let revocation = RevocationOptionsBuilder::new(&all).ok();
        let revocation =
            revocation.map(|all| all.with_expiration_policy(ExpirationPolicy::Enforce).build());
        let unfit = Cell::new(None);
        let fits = |path: &VerifiedPath<'_>| {
            self.fits(path, now).inspect_err(|(reason, _)| unfit.set(*reason)).map_err(|(_, e)| e)
        };
        let algorithms = lists.algorithms();
        let algorithms: Vec<&dyn SignatureVerificationAlgorithm> =
            algorithms.iter().map(|algorithm| algorithm as _).collect();
        let path = certificate
            .verify_for_usage(
                &algorithms,
                &self.anchors,
                intermediates,
                now,
                usage,
                revocation,
                Some(&fits),
            )
            .map_err(|error| match unfit.get() {
                Some(reason) => refused(reason),
                None => told(error),
            })?;
        if let Some(name) = name {
            certificate.verify_is_valid_for_subject_name(name).map_err(told)?;
        }
        match self.end_of(&path) {
            Some(says) => Ok(says.id),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    /// The authority that a path leads to.
    fn end_of(&self, path: &VerifiedPath<'_>) -> Option<&Says> {
        let place = self.anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()))?;
        self.says.get(place)
    }

    /// What webpki does not ask of a path whose signatures are good.
    fn fits(
        &self,
        path: &VerifiedPath<'_>,
        now: UnixTime,
    ) -> Result<(), (Option<Unfit>, webpki::Error)> {
        let unfit = |reason| (Some(reason), webpki::Error::UnknownIssuer);
        let Some(end) = self.end_of(path) else {
            return Err((None, webpki::Error::UnknownIssuer));
        };
        let Says { from, until, path_length, .. } = *end;
        if now < from {
            return Err((None, webpki::Error::CertNotValidYet { time: now, not_before: from }));
        }
        if until < now {
            return Err((None, webpki::Error::CertExpired { time: now, not_after: until }));
        }
        let mut between = 0;
        for certificate in path.intermediate_certificates() {
            // RFC 5280, 4.2.1.9: an authority that has signed itself a new certificate does not
            // count.
            between += u32::from(certificate.subject() != certificate.issuer());
            let usage = key_usage(&certificate.der()).map_err(unfit)?;
            if usage.is_some_and(|usage| !usage.key_cert_sign()) {
                return Err(unfit(Unfit::MayNotSign));
            }
        }
        if path_length.is_some_and(|most| between > most) {
            return Err(unfit(Unfit::TooLong));
        }
        let usage = key_usage(&path.end_entity().der()).map_err(unfit)?;
        let shakes_hands = |usage: KeyUsage| {
            let encrypts = self.peers == Peers::Servers && usage.key_encipherment();
            usage.digital_signature() || usage.key_agreement() || encrypts
        };
        match usage.is_none_or(shakes_hands) {
            true => Ok(()),
            false => Err(unfit(Unfit::OtherUse)),
        }
    }
}

impl Says {
    fn of(
        certificate: &CertificateDer<'_>,
        anchor: &TrustAnchor<'_>,
        peers: Peers,
    ) -> Result<Says, NoAuthority> {
        let unreadable = |_error| NoAuthority::Unreadable;
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|_error| NoAuthority::Unreadable)?;
        if parsed.version() != X509Version::V3 {
            return Err(NoAuthority::Version1);
        }
        let constraints = parsed.basic_constraints().map_err(unreadable)?;
        let Some(constraints) = constraints.map(|of| of.value).filter(|of| of.ca) else {
            return Err(NoAuthority::Leaf);
        };
        let usage = parsed.key_usage().map_err(unreadable)?;
        if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err(NoAuthority::MayNotSign);
        }
        if let Some(purposes) = parsed.extended_key_usage().map_err(unreadable)? {
            let (serves, whom) = match peers {
                Peers::Clients => (purposes.value.client_auth, "clients"),
                Peers::Servers => (purposes.value.server_auth, "servers"),
            };
            if !serves {
                return Err(NoAuthority::OtherPeers(whom));
            }
        }
        let moment = |seconds| {
            let seconds = u64::try_from(seconds).unwrap_or(0);
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds))
        };
        Ok(Says {
            from: moment(parsed.validity().not_before.timestamp()),
            until: moment(parsed.validity().not_after.timestamp()),
            path_length: constraints.path_len_constraint,
            id: AuthorityId::of(anchor),
        })
    }
}

impl AuthorityId {
    fn of(anchor: &TrustAnchor<'_>) -> AuthorityId {
        let mut hash = Context::new(&SHA256);
        let constraints = anchor.name_constraints.as_ref().map(AsRef::as_ref).unwrap_or_default();
        let key: &[u8] = &anchor.subject_public_key_info;
        for part in [&anchor.subject, key, constraints] {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut id = [0; 32];
        id.copy_from_slice(hash.finish().as_ref());
        AuthorityId(id)
    }
}

fn key_usage(certificate: &CertificateDer<'_>) -> Result<Option<KeyUsage>, Unfit> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_error| Unfit::Unreadable)?;
    let usage = parsed.key_usage().map_err(|_error| Unfit::Unreadable)?;
    Ok(usage.map(|usage| *usage.value))
}

/// Whose a certificate is, for an operator.
fn subject(certificate: &CertificateDer<'_>) -> String {
    match X509Certificate::from_der(certificate) {
        Ok((_, parsed)) => parsed.subject().to_string(),
        Err(_error) => "?".to_owned(),
    }
}

/// As rustls' own verifiers tell it: the alert that a peer gets follows from this.
fn told(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    let told = match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::InvalidCertValidity => CertificateError::Expired,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::CertNotValidForName(names) => CertificateError::NotValidForNameContext {
            expected: names.expected,
            presented: names.presented,
        },
        E::CertRevoked => CertificateError::Revoked,
        E::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        E::CrlExpired { time, next_update } => {
            CertificateError::ExpiredRevocationListContext { time, next_update }
        }
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::UnsupportedSignatureAlgorithmContext(of) => {
            CertificateError::UnsupportedSignatureAlgorithmContext {
                signature_algorithm_id: of.signature_algorithm_id,
                supported_algorithms: of.supported_algorithms,
            }
        }
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        E::IssuerNotCrlSigner => {
            return CertRevocationListError::IssuerInvalidForCrl.into();
        }
        E::InvalidCrlSignatureForPublicKey => {
            return CertRevocationListError::BadSignature.into();
        }
        error => return refused(error),
    };
    told.into()
}
