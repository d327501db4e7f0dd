//! The one type for bytes that must not be seen: no Display, a Debug that says nothing,
//! zeroized on drop. Reading it is spelled `expose`, so that every place is found by a search.

use std::str::Utf8Error;
use std::{fmt, io};

use aws_lc_rs::{digest, rand};
use zeroize::Zeroizing;

/// A password, a token, a secret id.
///
/// ```compile_fail,E0277
/// format!("{}", pgsilo_core::secret::Secret::new("hunter2"));
/// ```
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes the bytes over.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Secret {
        Secret(Zeroizing::new(bytes.into()))
    }

    /// 192 random bits as hexadecimal digits: safe in SQL, URLs, shells and files as it is.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> io::Result<Secret> {
        random_hex::<24>().map(Secret::new)
    }

    /// A fingerprint, to tell secrets apart without keeping them.
    pub fn sha256(&self) -> [u8; 32] {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &self.0).as_ref());
        hash
    }

    /// The bytes, for the one who must send or compare them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The same, for who can send text only.
    ///
    /// # Errors
    /// When it is no text. The error holds none of it.
    pub fn expose_text(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.0)
    }
}

/// `BYTES` random bytes as hexadecimal digits.
///
/// # Errors
/// When the system gives no random bytes.
pub fn random_hex<const BYTES: usize>() -> io::Result<String> {
    let mut bytes = [0; BYTES];
    rand::fill(&mut bytes).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<'de> serde::Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        String::deserialize(deserializer).map(Secret::new)
    }
}

#[cfg(test)]
mod tests {
    use super::Secret;

    #[test]
    fn debug_output_of_a_secret_is_redacted() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(..)");
    }

    #[test]
    fn random_ones_are_long_and_never_equal() {
        let [first, second] = [Secret::random().unwrap(), Secret::random().unwrap()];
        assert_eq!(first.expose_text().unwrap().len(), 48);
        assert_ne!(first.expose(), second.expose());
    }
}
