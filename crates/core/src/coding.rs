//! Answers over HTTP as they are: pgsilo asks for no coding (RFC 9110, 12.5.3), and takes none.
//! What is compressed all the same, as some gateways do, is said to be so, and not taken for
//! something that cannot be understood. Used by the two parts that have an HTTP client.

use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue};

/// How much of a coding's name is told, in characters.
const MAX_NAME: usize = 40;

/// What is sent with each question.
pub fn asks_for_none() -> HeaderMap {
    HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))])
}

/// The coding that an answer has all the same, for the log.
pub fn of(answer: &HeaderMap) -> Option<String> {
    let codings = answer.get_all(CONTENT_ENCODING).iter();
    let names = codings.map(|name| String::from_utf8_lossy(name.as_bytes()).trim().to_owned());
    let is_one = |name: &String| !name.is_empty() && !name.eq_ignore_ascii_case("identity");
    let name = names.filter(is_one).collect::<Vec<_>>().join(", ");
    let name: String = name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_codings_are_recognised_by_name() {
        let told = |lines: &[&'static str]| {
            let mut answer = HeaderMap::new();
            for &line in lines {
                answer.append(CONTENT_ENCODING, HeaderValue::from_static(line));
            }
            of(&answer)
        };
        assert_eq!(told(&[]), None);
        assert_eq!(told(&["identity"]), None);
        assert_eq!(told(&["", "Identity "]), None);
        assert_eq!(told(&["gzip"]).as_deref(), Some("gzip"));
        assert_eq!(told(&["deflate, gzip", "br"]).as_deref(), Some("deflate, gzip, br"));
    }
}
