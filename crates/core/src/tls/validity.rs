//! What of a listener's files is in force and yet of no use: a certificate that has expired or is
//! not valid yet, a revocation list that is out of date or that its authority has not signed.
//!
//! None of it is an error. A client that does not look at the certificate (`sslmode=require`) is
//! served all the same, and a restart must not make an outage of what was a warning before it; a
//! list that is no good turns away those whom it is about, as it does while pgsilo runs. All of it
//! is said: at the start, by `check`, and when the files are read again.

use std::fmt;
use std::path::{Path, PathBuf};

use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Something that should be mended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Which file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub what: &'static str,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.file, self.what)
    }
}

/// From when to when a certificate is valid, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    not_before: i64,
    not_after: i64,
}

impl Validity {
    /// What a certificate says of itself, if it can be read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Validity> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let validity = parsed.validity();
        let (not_before, not_after) =
            (validity.not_before.timestamp(), validity.not_after.timestamp());
        Some(Validity { not_before, not_after })
    }

    /// Its last second.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    pub(super) fn complaint(&self, file: &Path, now: UnixTime) -> Option<Complaint> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let what = if now > self.not_after {
            "the certificate has expired: clients that look at it are not served; renew it"
        } else if now < self.not_before {
            "the certificate is not valid yet: clients that look at it are not served; is a clock wrong?"
        } else {
            return None;
        };
        Some(Complaint { file: file.into(), what })
    }
}
