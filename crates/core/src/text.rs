//! Which characters may stand in a line of the log.
//!
//! Control characters act on a terminal, format characters change how the text around them looks:
//! a line that has either may show something else than it says. Names are refused for it, and what
//! others wrote is escaped as the line is written.

use std::borrow::Cow;
use std::fmt::Write;

/// Of a name, in characters.
const MAX_NAME: usize = 256;

/// Whether a name may be written to the log as it is: not empty, not long, and nothing in it that
/// changes how the text around it looks.
pub fn is_loggable(name: &str) -> bool {
    !name.is_empty() && name.chars().count() <= MAX_NAME && !name.chars().any(deceives)
}

/// Controls, line separators, and what reorders text (Unicode Standard Annex 9, 2.1 to 2.6).
fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}')
}

/// What has no width or changes how others look (Unicode's categories Cf, Zl and Zp, and Cc above
/// ASCII).
fn is_unseen(c: char) -> bool {
    deceives(c)
        || matches!(c, '\u{ad}' | '\u{600}'..='\u{605}' | '\u{6dd}' | '\u{70f}' | '\u{180e}')
        || matches!(c, '\u{890}' | '\u{891}' | '\u{8e2}' | '\u{200b}'..='\u{200d}')
        || matches!(c, '\u{2060}'..='\u{2064}' | '\u{206a}'..='\u{206f}' | '\u{feff}')
        || matches!(c, '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}')
        || matches!(c, '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}')
        || matches!(c, '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}')
}

/// A line with every such character written as JSON escapes it, which is where they are most: a
/// reader of JSON gets them back. ASCII's controls are the formatter's affair, which has escaped
/// them and ends the line with one.
pub fn escaped(line: &[u8]) -> Cow<'_, [u8]> {
    let is_plain = |byte: &u8| *byte < 0x7f;
    let Some(text) = (!line.iter().all(is_plain)).then(|| String::from_utf8_lossy(line)) else {
        return Cow::Borrowed(line);
    };
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c >= '\u{7f}' && is_unseen(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _never_fails = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_deceptive_characters_are_refused() {
        for good in ["alice", "älice@例え", "a b", &"é".repeat(256)] {
            assert!(is_loggable(good), "{good:?}");
        }
        let reordered = ["a\u{202e}b", "a\u{2066}b", "\u{61c}a", "a\u{200f}"];
        let controls = ["", "a\n", "a\u{85}b", "a\u{7f}", "\u{9b}31m", "a\u{2028}b"];
        for bad in reordered.into_iter().chain(controls).chain([&*"é".repeat(257)]) {
            assert!(!is_loggable(bad), "{bad:?}");
        }
    }

    #[test]
    fn invisible_characters_are_escaped_and_restored_by_json() {
        for hidden in
            ["\u{202e}", "\u{61c}", "\u{200b}", "\u{9b}", "\u{7f}", "\u{e0041}", "\u{feff}"]
        {
            let line =
                serde_json::json!({"cause": format!("a{hidden}b \\ \"é\"")}).to_string() + "\n";
            let out = escaped(line.as_bytes());
            let out = std::str::from_utf8(&out).expect("text");
            assert!(!out.contains(hidden) && out.contains('é') && out.ends_with("}\n"), "{out}");
            let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
            assert_eq!(read(out), read(&line));
        }
        assert_eq!(*escaped(b"{\"cause\":\"\xff\"}\n"), *"{\"cause\":\"\u{fffd}\"}\n".as_bytes());
        assert!(matches!(escaped(b"plain\n"), Cow::Borrowed(b"plain\n")));
    }
}
