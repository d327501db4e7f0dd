//! What a login is bound to: the hash of a server's certificate.

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::signature_algorithm::SignatureAlgorithm;

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
