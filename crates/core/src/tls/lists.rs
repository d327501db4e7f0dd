//! Revocation lists of clients' authorities, each of whose signatures is checked once for each key.
//!
//! webpki checks a list's signature whenever it looks a certificate up, before anybody has shown
//! that the certificate is his: a hash of megabytes, as often as a stranger asks for it. So what it
//! checks signatures with is wrapped here ([`Remembering`]): of a long list the verdict is kept for
//! each key. It is known from the start for the listener's own authorities; for one that only
//! clients show, since the first handshake that does. All else is webpki's: which list is for which
//! certificate, whether it is out of date, who may sign it, what is on it.
//!
//! Invariant: a verdict is given again for the very bytes that it was given for. What is longer
//! than any certificate is a list of these, and no two of them have one signature. Made by
//! `tls.rs`, used by `authorities.rs`.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{
    AlgorithmIdentifier, CertificateRevocationListDer, InvalidSignature,
    SignatureVerificationAlgorithm, TrustAnchor, UnixTime,
};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::asn1_rs::{Any, BitString};
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::validity::Complaint;
use super::{TlsError, crypto};

/// The longest certificate that webpki reads (`TWO_BYTE_DER_SIZE` in its `der.rs`). To hash as much
/// takes no longer than another signature.
const LONGEST_CERTIFICATE: usize = 0xffff;
/// Of how many keys verdicts are kept for a list. Those of one name, which all have been certified,
/// are few.
const MOST_KEYS: usize = 16;

type Algorithms = &'static [&'static dyn SignatureVerificationAlgorithm];

/// Revocation lists. Where there is none, nothing is looked up.
#[derive(Debug)]
pub(super) struct Lists {
    algorithms: Algorithms,
    all: Vec<CertRevocationList<'static>>,
    long: Vec<Long>,
    read: Vec<Source>,
}

/// Where a list came from, for who has to mend it.
#[derive(Debug)]
struct Source {
    file: PathBuf,
    /// When the next one is due, in seconds since 1970, if it says so.
    next: Option<i64>,
    /// It has the name of an authority here, none of whose keys has signed it.
    is_forged: bool,
}

/// What is kept of a long list.
#[derive(Debug)]
struct Long {
    signature: Vec<u8>,
    /// Of what is signed.
    hash: Vec<u8>,
    verdicts: Mutex<Vec<Verdict>>,
}

#[derive(Debug)]
struct Verdict {
    /// Of the key: signatures of one kind are checked with keys of several.
    kind: AlgorithmIdentifier,
    key: Vec<u8>,
    signed: Result<(), InvalidSignature>,
}

impl Lists {
    /// No list at all.
    pub(super) fn none() -> Lists {
        Lists::of(crypto().signature_verification_algorithms.all)
    }

    fn of(algorithms: Algorithms) -> Lists {
        Lists { algorithms, all: Vec::new(), long: Vec::new(), read: Vec::new() }
    }

    /// One more, from that file. A signature of one of the `authorities` is checked now.
    ///
    /// # Errors
    /// When it cannot be used, or not yet.
    pub(super) fn add(
        &mut self,
        path: &Path,
        der: &CertificateRevocationListDer<'_>,
        authorities: &[TrustAnchor<'_>],
    ) -> Result<(), TlsError> {
        let bad = |reason: &dyn Display| TlsError::BadRevocationList {
            path: path.into(),
            reason: reason.to_string(),
        };
        let usable = OwnedCertRevocationList::from_der(der).map_err(|error| bad(&error))?;
        // webpki looks at nextUpdate only.
        let (_, parsed) = CertificateRevocationList::from_der(der).map_err(|error| bad(&error))?;
        let from = u64::try_from(parsed.last_update().timestamp()).unwrap_or(0);
        let from = UnixTime::since_unix_epoch(Duration::from_secs(from));
        if from > UnixTime::now() {
            return Err(TlsError::EarlyRevocationList { path: path.into(), from });
        }
        let usable = CertRevocationList::from(usable);
        let signed = parsed.tbs_cert_list.as_ref();
        let (_, whole) = Any::from_der(der).map_err(|error| bad(&error))?;
        let behind = whole.data.get(signed.len()..).unwrap_or_default();
        let (_, algorithm) = Any::from_der(behind).map_err(|error| bad(&error))?;
        if signed.len() > LONGEST_CERTIFICATE {
            let signature = parsed.signature_value.data.to_vec();
            let hash = digest(&SHA256, signed).as_ref().to_vec();
            match self.long.iter().find(|other| other.signature == signature) {
                Some(other) if other.hash == hash => return Ok(()),
                Some(_) => return Err(bad(&"its signature is another list's")),
                None => self.long.push(Long { signature, hash, verdicts: Mutex::default() }),
            }
        }
        let its = |authority: &&TrustAnchor<'_>| *authority.subject == *usable.issuer();
        // Each is asked: the verdicts are kept.
        let verdicts: Vec<bool> = authorities
            .iter()
            .filter(its)
            .map(|own| self.ask(signed, algorithm.data, &parsed.signature_value.data, own))
            .collect();
        let is_forged = !verdicts.is_empty() && !verdicts.contains(&true);
        let next = parsed.next_update().map(|next| next.timestamp());
        self.read.push(Source { file: path.into(), next, is_forged });
        self.all.push(usable);
        Ok(())
    }

    /// Whether an authority's key has signed it, if it is a key for such a signature. Of a long one
    /// the verdict is kept.
    fn ask(
        &self,
        signed: &[u8],
        kind: &[u8],
        signature: &[u8],
        authority: &TrustAnchor<'_>,
    ) -> bool {
        let Ok((key, of)) = Any::from_der(&authority.subject_public_key_info) else { return false };
        let Ok((_, key)) = BitString::from_der(key) else { return false };
        self.algorithms().iter().any(|algorithm| {
            *algorithm.signature_alg_id() == *kind
                && *algorithm.public_key_alg_id() == *of.data
                && algorithm.verify_signature(&key.data, signed, signature).is_ok()
        })
    }

    /// Which of them turn everybody away whom they are about.
    pub(super) fn complaints(&self, now: UnixTime) -> Vec<Complaint> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let complaint = |Source { file, next, is_forged }: &Source| {
            let what = if *is_forged {
                "its authority has not signed the revocation list: none of that authority's certificates is accepted"
            } else if next.is_some_and(|next| next < now) {
                "the revocation list is out of date: none of its authority's certificates is accepted; renew it"
            } else {
                return None;
            };
            Some(Complaint { file: file.clone(), what })
        };
        self.read.iter().filter_map(complaint).collect()
    }

    pub(super) fn all(&self) -> Vec<&CertRevocationList<'static>> {
        self.all.iter().collect()
    }

    /// What signatures are to be checked with where these lists are looked into.
    pub(super) fn algorithms(&self) -> Vec<Remembering<'_>> {
        let all = self.algorithms.iter();
        all.map(|&algorithm| Remembering { algorithm, long: &self.long }).collect()
    }
}

/// An algorithm that remembers what it has found of long lists.
#[derive(Debug)]
pub(super) struct Remembering<'l> {
    algorithm: &'static dyn SignatureVerificationAlgorithm,
    long: &'l [Long],
}

impl SignatureVerificationAlgorithm for Remembering<'_> {
    fn verify_signature(
        &self,
        key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        let verify = || self.algorithm.verify_signature(key, message, signature);
        if message.len() <= LONGEST_CERTIFICATE {
            return verify();
        }
        let Some(list) = self.long.iter().find(|list| list.signature == signature) else {
            return verify();
        };
        let kind = self.public_key_alg_id();
        let known = |verdicts: &Vec<Verdict>| {
            let is_it = |of: &&Verdict| *of.kind == *kind && of.key == key;
            verdicts.iter().find(is_it).map(|of| of.signed)
        };
        if let Some(signed) = known(&list.verdicts.lock().unwrap_or_else(PoisonError::into_inner)) {
            return signed;
        }
        // Lookups of other lists do not wait for this.
        let signed = verify();
        let mut verdicts = list.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        if verdicts.len() >= MOST_KEYS {
            verdicts.clear();
        }
        verdicts.push(Verdict { kind, key: key.to_vec(), signed });
        signed
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.signature_alg_id()
    }

    fn fips(&self) -> bool {
        self.algorithm.fips()
    }
}

#[cfg(test)]
#[path = "lists/tests.rs"]
mod tests;
