//! Text that must not be seen: passwords, OpenBAO tokens, unseal keys.
//!
//! No Display, a Debug that says nothing, zeroed when dropped. `expose` is the one way out, so
//! that each place where a secret leaves this type can be found by its name.

use std::fmt;

use anyhow::{Context, Result};
use zeroize::Zeroizing;

/// A secret text.
#[derive(Clone)]
pub(crate) struct Secret(Zeroizing<String>);

impl Secret {
    pub(crate) fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// 192 random bits as hexadecimal digits: safe in SQL, URLs, shells and files as it is.
    pub(crate) fn random() -> Result<Self> {
        random_hex::<24>().map(Self::new)
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(..)")
    }
}

/// Takes an argument for a secret.
///
/// # Errors
/// None.
pub(crate) fn parse(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_owned()))
}

/// `BYTES` random bytes as hexadecimal digits.
pub(crate) fn random_hex<const BYTES: usize>() -> Result<String> {
    let mut bytes = [0_u8; BYTES];
    aws_lc_rs::rand::fill(&mut bytes).ok().context("the system gave no random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing_and_two_are_never_equal() {
        let (first, second) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert_eq!(format!("{first:?}"), "Secret(..)");
        assert_eq!(first.expose().len(), 48);
        assert_ne!(first.expose(), second.expose());
    }
}
