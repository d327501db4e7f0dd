//! How long, as people write it in files and on command lines. One grammar for both.

use std::fmt;
use std::time::Duration;

/// What to write, for an error.
pub const SPELLING: &str = "a duration such as \"500ms\", \"10s\", \"15m\", \"2h\" or \"1d\"";

/// A hundred years: adding it to a clock must not overflow.
const MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A number and its unit.
///
/// # Errors
/// When it is anything else, or more than a hundred years. Says what to write.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number = number.parse::<u64>().ok();
    let seconds = |each: u64| number?.checked_mul(each).map(Duration::from_secs);
    let duration = match unit {
        "ms" => number.map(Duration::from_millis),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86_400),
        _ => None,
    };
    let believable = duration.filter(|duration| *duration <= MAX);
    believable.ok_or_else(|| format!("{text:?} is not {SPELLING}"))
}

/// A duration as [`parse`] reads it, in the largest unit that it is a whole number of.
#[derive(Clone, Copy, Debug)]
pub struct Written(pub Duration);

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")];
        let whole = |(each, _): &&(u128, &str)| millis > 0 && millis.is_multiple_of(*each);
        match units.iter().find(whole) {
            Some((each, unit)) => write!(f, "{}{unit}", millis / each),
            None if millis == 0 => f.write_str("0s"),
            None => write!(f, "{millis}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_number_and_one_unit() {
        for (text, millis) in [
            ("500ms", 500),
            ("10s", 10_000),
            ("15m", 900_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0s", 0),
        ] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(text), Ok(duration), "{text}");
            assert_eq!(Written(duration).to_string(), text);
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
            "1w",
            "1é",
            "1m30s",
            "1us",
            "99999999999999999999s",
            "18446744073709551615h",
            "1000000h",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
