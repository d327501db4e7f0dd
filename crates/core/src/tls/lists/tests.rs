//! What is believed is what webpki believes, and long lists are hashed as often as they must be.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{
    CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, KeyIdMethod,
    KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::{CertRevocationListError, CertificateError};
use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

use super::*;
use crate::tls::authorities::{Authorities, Peers};
use crate::tls::tests::{Root, below, leaf, root};

/// Counts what a long list costs.
#[derive(Debug)]
struct Counting {
    algorithm: &'static dyn SignatureVerificationAlgorithm,
    hashed: Arc<AtomicUsize>,
}

impl SignatureVerificationAlgorithm for Counting {
    fn verify_signature(
        &self,
        key: &[u8],
        message: &[u8],
        sign: &[u8],
    ) -> Result<(), InvalidSignature> {
        if message.len() > LONGEST_CERTIFICATE {
            self.hashed.fetch_add(1, Ordering::Relaxed);
        }
        self.algorithm.verify_signature(key, message, sign)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.signature_alg_id()
    }
}

/// No list yet, and how often a long one has been hashed.
fn counted() -> (Lists, Arc<AtomicUsize>) {
    let hashed = Arc::<AtomicUsize>::default();
    let all = crypto().signature_verification_algorithms.all.iter().map(|&algorithm| {
        let counting = Counting { algorithm, hashed: Arc::clone(&hashed) };
        Box::leak(Box::new(counting)) as &dyn SignatureVerificationAlgorithm
    });
    (Lists::of(Vec::leak(all.collect())), hashed)
}

const REVOKED: u64 = 7;
const GOOD: u64 = 8;
/// So many more are on a long list.
const MORE: u64 = 4000;

fn list(of: &Root, more: u64) -> CertificateRevocationListDer<'static> {
    let revoked = |serial: u64| RevokedCertParams {
        serial_number: SerialNumber::from(serial),
        revocation_time: date_time_ymd(2025, 1, 1),
        reason_code: None,
        invalidity_date: None,
    };
    let others = (0..more).map(|serial| 1_000_000 + serial);
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2025, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: [REVOKED].into_iter().chain(others).map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(of).unwrap().der().clone()
}

fn known(roots: &[&Root]) -> Arc<Authorities> {
    let pem: String = roots.iter().map(|root| root.pem()).collect();
    Authorities::read(Path::new("/ca"), pem.as_bytes(), Peers::Clients, None).unwrap()
}

fn numbered(above: &Root, serial: u64) -> CertificateDer<'static> {
    leaf(above, |params| params.serial_number = Some(SerialNumber::from(serial)))
}

/// What is found of chains, leaf first.
fn verdict(
    known: &Authorities,
    lists: &Lists,
    chain: &[&CertificateDer<'static>],
) -> Result<(), rustls::Error> {
    let behind: Vec<_> = chain[1..].iter().map(|&of| of.clone()).collect();
    known.check(chain[0], &behind, lists, None, UnixTime::now()).map(drop)
}

#[test]
fn a_long_list_is_hashed_when_it_is_read_and_never_again() {
    let root = root(|_| {});
    let known = known(&[&root]);
    let (mut lists, hashed) = counted();
    let long = list(&root, MORE);
    lists.add(Path::new("/crl"), &long, known.anchors()).unwrap();
    assert!(long.len() > LONGEST_CERTIFICATE);
    assert_eq!(hashed.load(Ordering::Relaxed), 1);
    for _ in 0..3 {
        verdict(&known, &lists, &[&numbered(&root, GOOD)]).unwrap();
        let revoked = verdict(&known, &lists, &[&numbered(&root, REVOKED)]).unwrap_err();
        assert_eq!(revoked, CertificateError::Revoked.into());
    }
    assert_eq!(hashed.load(Ordering::Relaxed), 1);
    // The same list once more says nothing new.
    lists.add(Path::new("/again"), &long, known.anchors()).unwrap();
    verdict(&known, &lists, &[&numbered(&root, GOOD)]).unwrap();
    assert_eq!(hashed.load(Ordering::Relaxed), 1);
}

/// A client that presents a public certificate, and its authority four times, has proved no key.
#[test]
fn the_list_of_an_authority_that_only_clients_show_is_hashed_once() {
    let root = root(|_| {});
    let between = below(&root, "between", |_| {});
    let known = known(&[&root]);
    let (mut lists, hashed) = counted();
    lists.add(Path::new("/root"), &list(&root, 0), known.anchors()).unwrap();
    lists.add(Path::new("/between"), &list(&between, MORE), known.anchors()).unwrap();
    assert_eq!(hashed.load(Ordering::Relaxed), 0);
    let (good, revoked) = (numbered(&between, GOOD), numbered(&between, REVOKED));
    let four = [between.der(); 4];
    for _ in 0..3 {
        verdict(&known, &lists, &[&[&good][..], &four].concat()).unwrap();
        let revoked = verdict(&known, &lists, &[&[&revoked][..], &four].concat()).unwrap_err();
        assert_eq!(revoked, CertificateError::Revoked.into());
    }
    assert_eq!(hashed.load(Ordering::Relaxed), 1);
}

#[test]
fn a_revocation_list_counts_for_its_signer_only_not_for_its_name() {
    let (one, other) = (root(|_| {}), root(|_| {}));
    for more in [0, MORE] {
        let known = known(&[&one, &other]);
        let (mut lists, hashed) = counted();
        lists.add(Path::new("/crl"), &list(&one, more), known.anchors()).unwrap();
        for _ in 0..3 {
            verdict(&known, &lists, &[&numbered(&one, GOOD)]).unwrap();
            verdict(&known, &lists, &[&numbered(&other, GOOD)]).unwrap_err();
        }
        assert_eq!(hashed.load(Ordering::Relaxed), if more == 0 { 0 } else { 2 });
    }
}

#[test]
fn a_list_that_was_changed_after_signing_is_refused() {
    let root = root(|_| {});
    let known = known(&[&root]);
    let good = list(&root, MORE);
    let mut changed = good.to_vec();
    // The number of the one that is revoked.
    let number = [0x02, 0x01, 7, 0x17];
    let at = changed.windows(4).position(|bytes| bytes == number).unwrap();
    changed[at + 2] = 9;
    let changed = CertificateRevocationListDer::from(changed);
    let mut alone = counted().0;
    alone.add(Path::new("/changed"), &changed, known.anchors()).unwrap();
    for serial in [REVOKED, GOOD] {
        let error = verdict(&known, &alone, &[&numbered(&root, serial)]).unwrap_err();
        assert_eq!(error, CertRevocationListError::BadSignature.into());
    }
    for (first, second) in [(&good, &changed), (&changed, &good)] {
        let mut both = counted().0;
        both.add(Path::new("/first"), first, known.anchors()).unwrap();
        let error = both.add(Path::new("/second"), second, known.anchors()).unwrap_err();
        assert_eq!(error.file().map(Path::to_owned), Some(PathBuf::from("/second")));
        assert!(error.to_string().ends_with("its signature is another list's"), "{error}");
    }
}

#[test]
fn keys_are_forgotten_when_there_are_many() {
    let signer = root(|_| {});
    let (mut lists, hashed) = counted();
    lists.add(Path::new("/crl"), &list(&signer, MORE), &[]).unwrap();
    for _ in 0..=MOST_KEYS {
        let other = root(|_| {});
        let known = known(&[&other]);
        verdict(&known, &lists, &[&numbered(&other, GOOD)]).unwrap_err();
        assert!(lists.long[0].verdicts.lock().unwrap().len() <= MOST_KEYS);
    }
    assert_eq!(hashed.load(Ordering::Relaxed), MOST_KEYS + 1);
    verdict(&known(&[&signer]), &lists, &[&numbered(&signer, GOOD)]).unwrap();
}

/// Else one that is as long as a list could be taken for one.
#[test]
fn no_certificate_is_as_long_as_a_long_list() {
    for (length, good) in [(60_000, true), (LONGEST_CERTIFICATE, false)] {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "long");
        let more = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; length]);
        params.custom_extensions.push(more);
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(EndEntityCert::try_from(made.der()).is_ok(), good, "{length}");
    }
}
