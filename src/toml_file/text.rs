//! Values that are written as text: durations, addresses, file modes.
//!
//! Each takes exactly the spellings that its error message lists, so that a file means
//! the same to whoever reads it. For the schemas of such files.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// A value with its own grammar.
pub(crate) trait Spelled: Sized {
    /// What to write, for the error.
    const SPELLING: &'static str;

    fn spelled(text: &str) -> Option<Self>;
}

/// Reads a [`Spelled`] value from a string.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<T>(pub(crate) T);

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

impl Spelled for Duration {
    const SPELLING: &'static str = "a duration such as \"500ms\", \"10s\", \"15m\" or \"2h\"";

    fn spelled(text: &str) -> Option<Duration> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let duration = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            _ => return None,
        };
        // A hundred years: adding it to a clock must not overflow.
        (duration <= Duration::from_secs(100 * 365 * 86_400)).then_some(duration)
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
pub(crate) struct FileMode(pub(crate) u32);

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
    fn durations_have_one_number_and_one_unit() {
        for (text, millis) in
            [("500ms", 500), ("10s", 10_000), ("15m", 900_000), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(Duration::spelled(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for bad in [
            "",
            "10",
            "s",
            "1.5s",
            "-1s",
            "+1s",
            "1 s",
            " 1s",
            "1S",
            "1d",
            "1m30s",
            "1us",
            "99999999999999999999s",
            "18446744073709551615h",
            "1000000h",
        ] {
            assert_eq!(Duration::spelled(bad), None, "{bad:?}");
        }
    }

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
