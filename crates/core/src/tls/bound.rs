//! How much of a chain is looked at: bounded before any of it is verified.
//!
//! A search for a path tries the certificates that were shown in every order that fits, and checks
//! what each order ends with by the key of every authority that has the name of its issuer. Where
//! all have one name, the authority's, those are as many orders as there can be; and a client
//! that has proved nothing chooses them. So there may be few, and no choice among keys, of which one is
//! tried once in an order: then there are seven orders at most (the peer's own, two of a name
//! behind it, and behind each of those two of another). Asked by `authorities.rs` before each
//! search.

use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use webpki::EndEntityCert;

use super::refused;

/// The most certificates that may be shown beside a peer's own. Public authorities have one or two
/// between a root and a leaf, and one more where they cross-sign.
const MAX_INTERMEDIATES: usize = 4;

/// Whether a search among these is bearable.
///
/// # Errors
/// When it is not.
pub(super) fn look(intermediates: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
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

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn a_chain_that_is_too_long_is_refused_before_it_is_verified() {
        let leaf = CertificateDer::from(vec![0x30]);
        for count in 0..=MAX_INTERMEDIATES {
            look(&vec![leaf.clone(); count]).expect("it is looked at");
        }
        for count in [MAX_INTERMEDIATES + 1, 10, 1000] {
            let error = look(&vec![leaf.clone(); count]).expect_err("it is too long").to_string();
            let said = format!("{count} certificates were shown beside the peer's own");
            assert!(error.contains(&said), "{error}");
        }
    }

    /// One certificate of a subject, made with that key.
    fn of(subject: &str, key: &KeyPair) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, subject);
        params.self_signed(key).expect("signed").der().clone()
    }

    #[test]
    fn a_choice_among_keys_is_refused_before_it_is_verified() {
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
            let verdict = look(&shown);
            assert_eq!(verdict.is_ok(), good, "{verdict:?}");
        }
    }
}
