//! What a client's certificate says of its holder, once its chain was verified.
//!
//! One name and no choice: the one URI (as SPIFFE has it), or where there is none the one DNS name.
//! A certificate of several names is refused: which of them is meant, would be the client's to say.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The longest name, in bytes: that of a SPIFFE ID.
const MAX_NAME: usize = 2048;

/// Who holds a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    name: Arc<str>,
    issued_at: SystemTime,
    expires_at: SystemTime,
}

/// Why a certificate has no holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HolderError {
    /// It cannot be read at all.
    #[error("the client's certificate cannot be read")]
    Unreadable,
    /// No URI and no DNS name.
    #[error("the client's certificate has no URI and no DNS name")]
    Nameless,
    /// Several.
    #[error("the client's certificate has several URIs or DNS names")]
    Ambiguous,
    /// A name that cannot be written in a registry.
    #[error("the name in the client's certificate is no plain text")]
    Unfit,
}

impl Holder {
    /// Reads a leaf.
    ///
    /// # Errors
    /// When it does not name exactly one.
    pub fn of(leaf: &CertificateDer<'_>) -> Result<Holder, HolderError> {
        let (_, certificate) =
            X509Certificate::from_der(leaf).map_err(|_error| HolderError::Unreadable)?;
        let names =
            certificate.subject_alternative_name().map_err(|_twice| HolderError::Ambiguous)?;
        let names = names.map(|extension| &extension.value.general_names[..]).unwrap_or_default();
        let uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        let hosts = names.iter().filter_map(|name| match name {
            GeneralName::DNSName(host) => Some(format!("dns:{}", host.to_ascii_lowercase())),
            _ => None,
        });
        let (uris, hosts): (Vec<_>, Vec<_>) = (uris.collect(), hosts.collect());
        let name = match (&uris[..], &hosts[..]) {
            // It would pass for a host, which an authority checks otherwise.
            ([uri], _) if uri.starts_with("dns:") => return Err(HolderError::Unfit),
            ([uri], _) => uri.clone(),
            ([], [host]) => host.clone(),
            ([], []) => return Err(HolderError::Nameless),
            _ => return Err(HolderError::Ambiguous),
        };
        if !is_plain(&name) || name.starts_with("dns:*") {
            return Err(HolderError::Unfit);
        }
        let moment =
            |seconds| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let validity = certificate.validity();
        Ok(Holder {
            name: name.into(),
            issued_at: moment(validity.not_before.timestamp()),
            expires_at: moment(validity.not_after.timestamp()),
        })
    }

    /// Whether a registry may name a holder so: a URI, or `dns:` and a host in lower case.
    pub fn may_be_named(name: &str) -> bool {
        let of_a_host =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        match name.split_once(':') {
            Some(("dns", host)) => !host.is_empty() && host.bytes().all(of_a_host),
            Some((scheme, rest)) => {
                let scheme_is_one =
                    scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
                !scheme.is_empty() && scheme_is_one && !rest.is_empty() && is_plain(name)
            }
            None => false,
        }
    }

    /// A URI, or `dns:` and a host in lower case.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The certificate's notBefore.
    pub fn issued_at(&self) -> SystemTime {
        self.issued_at
    }

    /// The certificate's notAfter.
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }
}

/// Whether a name may stand in a registry and in a log.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// RFC 8705's `x5t#S256`: SHA-256 of the certificate.
pub fn thumbprint(leaf: &CertificateDer<'_>) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, leaf).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use rcgen::string::Ia5String;
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn holder(names: Vec<SanType>) -> Result<Holder, HolderError> {
        let mut params = CertificateParams::default();
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        params.subject_alt_names = names;
        let key = KeyPair::generate().expect("a key");
        Holder::of(params.self_signed(&key).expect("signed").der())
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(Ia5String::try_from(text).expect("ASCII"))
    }

    fn host(text: &str) -> SanType {
        SanType::DnsName(Ia5String::try_from(text).expect("ASCII"))
    }

    #[test]
    fn a_certificate_with_one_name_identifies_it() {
        let spiffe = "spiffe://example.org/ns/app/sa/billing";
        let one = holder(vec![uri(spiffe)]).expect("one");
        assert_eq!(&**one.name(), spiffe);
        assert_eq!(one.expires_at(), UNIX_EPOCH + Duration::from_secs(1_893_456_000));
        // A workload's host names come and go; its URI is who it is.
        let both = vec![host("a.example"), host("b.example"), uri(spiffe)];
        assert_eq!(&**holder(both).expect("one").name(), spiffe);
        assert_eq!(&**holder(vec![host("App.Example")]).expect("one").name(), "dns:app.example");
    }

    #[test]
    fn a_certificate_without_exactly_one_name_is_refused() {
        use HolderError::{Ambiguous, Nameless, Unfit};
        let address = SanType::IpAddress([127, 0, 0, 1].into());
        for (names, error) in [
            (vec![], Nameless),
            (vec![address], Nameless),
            (vec![uri("spiffe://a/b"), uri("spiffe://a/c")], Ambiguous),
            (vec![host("a.example"), host("b.example")], Ambiguous),
            (vec![uri("dns:app.example")], Unfit),
            (vec![uri("spiffe://a/b c")], Unfit),
            (vec![uri("spiffe://a/\u{7}")], Unfit),
            (vec![host("*.example")], Unfit),
            (vec![uri(&format!("spiffe://a/{}", "x".repeat(2048)))], Unfit),
        ] {
            assert_eq!(holder(names.clone()), Err(error), "{names:?}");
        }
        for good in ["spiffe://a/b", "urn:x:y", "dns:app.example"] {
            assert!(Holder::may_be_named(good), "{good}");
        }
        for bad in [
            "",
            "app.example",
            "dns:",
            "dns:App.example",
            "dns:*.x",
            ":x",
            "a b:c",
            "spiffe:",
            "x:a b",
        ] {
            assert!(!Holder::may_be_named(bad), "{bad}");
        }
        let garbage = CertificateDer::from(vec![0x30, 0x82]);
        assert_eq!(Holder::of(&garbage), Err(HolderError::Unreadable));
    }
}
