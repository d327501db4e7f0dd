//! Values that are written as text: durations, addresses, file modes.
//!
//! Each takes exactly the spellings that its error message lists, so that a file means
//! the same everywhere. For the schemas of such files.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::duration;

/// A value with its own grammar.
pub trait Spelled: Sized {
    /// What to write, for the error.
    const SPELLING: &'static str;

    /// Reads exactly one of the spellings.
    fn spelled(text: &str) -> Option<Self>;
}

/// Reads a [`Spelled`] value from a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text<T>(pub T);

impl<'de, T: Spelled> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);

        impl<T: Spelled> de::Visitor<'_> for Reader<T> {
            type Value = Text<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::SPELLING)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<T>, E> {
                let wrong = || E::custom(format!("{text:?} is not {}", T::SPELLING));
                T::spelled(text).map(Text).ok_or_else(wrong)
            }
        }

        deserializer.deserialize_str(Reader(PhantomData))
    }
}

impl Serialize for Text<Duration> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&duration::Written(self.0))
    }
}

impl Spelled for Duration {
    const SPELLING: &'static str = duration::SPELLING;

    fn spelled(text: &str) -> Option<Duration> {
        duration::parse(text).ok()
    }
}

impl Spelled for SocketAddr {
    const SPELLING: &'static str =
        "an IP address and a port such as \"127.0.0.1:6432\" or \"[::1]:6432\"";

    fn spelled(text: &str) -> Option<SocketAddr> {
        text.parse().ok()
    }
}

/// Permissions of a file.
#[derive(Debug, Clone, Copy)]
pub struct FileMode(pub u32);

impl Spelled for FileMode {
    const SPELLING: &'static str = "a file mode such as \"0660\"";

    fn spelled(text: &str) -> Option<FileMode> {
        let digits = text.strip_prefix('0').filter(|rest| rest.len() == 3).unwrap_or(text);
        let octal = digits.len() == 3 && digits.bytes().all(|b| matches!(b, b'0'..=b'7'));
        octal.then(|| u32::from_str_radix(digits, 8).ok().map(FileMode))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (text, mode) in [("0660", 0o660), ("777", 0o777), ("0600", 0o600), ("000", 0)] {
            assert_eq!(FileMode::spelled(text).map(|mode| mode.0), Some(mode), "{text}");
        }
        for bad in ["", "66", "0888", "0o660", "1777", "+660", "u+rw"] {
            assert!(FileMode::spelled(bad).is_none(), "{bad:?}");
        }
    }
}
