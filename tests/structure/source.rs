//! Reads Rust sources just as far as the rules need it: without comments, literals and tests,
//! and as lists of the paths that they name.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

/// A file of `src/`.
#[derive(Clone)]
pub(crate) struct Source {
    /// With `/`, from the package's root: `src/session/routed.rs`.
    pub(crate) path: String,
    pub(crate) text: String,
    /// Read once: a rule is tried many times over.
    code: OnceLock<String>,
    squeezed: OnceLock<String>,
    paths: OnceLock<Vec<Vec<String>>>,
}

/// Every file of `src/`.
pub(crate) fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("sources") {
            let path = entry.expect("a source").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(root).expect("inside of the package");
                let name = inside.to_str().expect("UTF-8").replace('\\', "/");
                found.push(Source::new(name, fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 50, "src/ was not read: {} files", found.len());
    found
}

impl Source {
    pub(crate) fn new(path: String, text: String) -> Source {
        let (code, squeezed, paths) = Default::default();
        Source { path, text, code, squeezed, paths }
    }

    /// The module that the file is; `None` for the programs and for files of tests.
    pub(crate) fn module(&self) -> Option<Vec<&str>> {
        let inside = self.path.strip_prefix("src/")?.strip_suffix(".rs")?;
        let parts: Vec<_> = inside.split('/').collect();
        match parts.as_slice() {
            ["main"] | ["bin", ..] => None,
            parts if parts.contains(&"tests") => None,
            ["lib"] => Some(Vec::new()),
            _ => Some(parts),
        }
    }

    /// Without comments and tests; literals are empty.
    pub(crate) fn code(&self) -> &str {
        self.code.get_or_init(|| {
            let code = blank(&self.text);
            match tests_begin(&code) {
                Some(at) => code[..at].to_owned(),
                None => code,
            }
        })
    }

    /// The same without any space but between two words.
    pub(crate) fn squeezed(&self) -> &str {
        self.squeezed.get_or_init(|| {
            let mut squeezed = String::new();
            for word in self.code().split_whitespace() {
                let joins = |c: char| c.is_alphanumeric() || c == '_';
                if squeezed.ends_with(joins) && word.starts_with(joins) {
                    squeezed.push(' ');
                }
                squeezed += word;
            }
            squeezed
        })
    }

    /// Every path that is named, `use` trees spread out, `super` and `self` resolved: from
    /// `crate` for our own modules, from the crate's name for others.
    pub(crate) fn paths(&self) -> &[Vec<String>] {
        self.paths.get_or_init(|| self.read_paths())
    }

    fn read_paths(&self) -> Vec<Vec<String>> {
        let module = self.module().unwrap_or_default();
        let tokens = tokens(self.code());
        let mut paths = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            // Not behind another word's `::`; `::word` begins a path as well.
            let ends = |token: &String| is_word(token) || token == ">";
            let begins = at == 0 || tokens[at - 1] != "::" || at < 2 || !ends(&tokens[at - 2]);
            // `impl Trait + use<'a>` names what is captured, and no path.
            let captures = tokens.get(at + 1).is_some_and(|token| token == "<");
            if tokens[at] == "use" && !captures {
                at = use_tree(&tokens, at + 1, &[], &mut paths);
            } else if begins && is_word(&tokens[at]) {
                let mut path = vec![tokens[at].clone()];
                while tokens.get(at + 1).is_some_and(|token| token == "::")
                    && tokens.get(at + 2).is_some_and(|token| is_word(token))
                {
                    path.push(tokens[at + 2].clone());
                    at += 2;
                }
                if path.len() > 1 {
                    paths.push(path);
                }
                at += 1;
            } else {
                at += 1;
            }
        }
        paths.iter().map(|path| resolve(path, &module)).collect()
    }
}

/// Where the module of unit tests begins, at the bottom of a file.
pub(crate) fn tests_begin(code: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let at = from + found;
        let mut behind = &code[at..];
        while behind.starts_with('#') {
            let (_, rest) = behind.split_once(']').unwrap_or_default();
            behind = rest.trim_start();
        }
        if behind.starts_with("mod ") {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// Replaces comments by spaces and empties literals; line breaks stay.
pub(crate) fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word_before = out.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            comment(rest)
        } else if let Some(length) = raw_string(rest).filter(|_| !word_before) {
            out += "\"\"";
            length
        } else if first == '"' {
            out += "\"\"";
            string(rest)
        } else if let Some(length) = character(rest) {
            out += "''";
            length
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        out.extend(rest[..length].chars().filter(|c| *c == '\n'));
        out.push(' ');
        rest = &rest[length..];
    }
    out
}

/// Block comments nest.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// `r"..."`, `r#"..."#`, with or without `b` or `c` before it.
fn raw_string(text: &str) -> Option<usize> {
    let prefix = ["br", "cr", "r"].iter().find(|p| text.starts_with(**p))?;
    let hashes = text[prefix.len()..].bytes().take_while(|b| *b == b'#').count();
    let start = prefix.len() + hashes;
    text[start..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = text[start + 1..].find(&end)?;
    Some(start + 1 + length + end.len())
}

/// `'x'` and `'\n'`, but not the lifetime `'x`.
fn character(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    let first = inside.chars().next()?;
    if first == '\\' {
        let escaped = inside.chars().nth(1)?.len_utf8();
        return Some(inside[1 + escaped..].find('\'')? + 3 + escaped);
    }
    inside[first.len_utf8()..].starts_with('\'').then_some(2 + first.len_utf8())
}

/// Words, `::`, and every other character by itself.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        let length = if is_part(first) {
            rest.find(|c| !is_part(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(rest[..length].to_owned());
        rest = rest[length..].trim_start();
    }
    tokens
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads one tree behind `prefix`; answers with where it ends.
fn use_tree(
    tokens: &[String],
    mut at: usize,
    prefix: &[String],
    paths: &mut Vec<Vec<String>>,
) -> usize {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(at) {
        match token.as_str() {
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = use_tree(tokens, at, &path, paths);
                    if tokens.get(at).is_some_and(|token| token == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "as" => at += 2,
            "::" => at += 1,
            "," | "}" | ";" => break,
            word => {
                // `use a::{self}` names a.
                if word != "self" || path.is_empty() {
                    path.push(word.to_owned());
                }
                at += 1;
            }
        }
    }
    paths.push(path);
    at
}

fn resolve(path: &[String], module: &[&str]) -> Vec<String> {
    let supers = path.iter().take_while(|word| *word == "super").count();
    let first = path.first().map(String::as_str);
    if supers == 0 && first != Some("self") {
        return path.to_vec();
    }
    let skipped = supers.max(1);
    let kept = module.len().saturating_sub(supers);
    let own = module[..kept].iter().map(|word| (*word).to_owned());
    let crate_root = std::iter::once("crate".to_owned());
    crate_root.chain(own).chain(path[skipped..].iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source::new(path.into(), text.into())
    }

    #[test]
    fn comments_and_literals_are_blanked_and_lifetimes_are_not() {
        let text = "a // b\n/* c /* d */ e */ \"f \\\" g\" r#\"h \" i\"# 'j' '\\'' '\\u{1b}' &'k l b\"m\" br\"n\" for_r\n";
        let words: Vec<_> = blank(text).split_whitespace().map(str::to_owned).collect();
        let expected =
            ["a", "\"\"", "\"\"", "''", "''", "''", "&'k", "l", "b\"\"", "\"\"", "for_r"];
        assert_eq!(words, expected);
        assert_eq!(blank("\"a\nb\" /*\n*/").matches('\n').count(), 2);
    }

    #[test]
    fn paths_are_spread_out_and_resolved() {
        let text = "use a::{b, c::{self, d as e}, f::*};\nuse super::g; fn h(i: self::j::K) -> impl R + use<> { crate::l::m(n::O::<P>::q); }";
        let source = source("src/x/y.rs", text);
        let paths: Vec<_> = source.paths().iter().map(|path| path.join("::")).collect();
        let expected = [
            "a::b",
            "a::c",
            "a::c::d",
            "a::f::*",
            "crate::x::g",
            "crate::x::y::j::K",
            "crate::l::m",
            "n::O",
        ];
        assert_eq!(paths, expected);
    }

    #[test]
    fn tests_at_the_bottom_are_left_out_and_nothing_else() {
        let text = "fn a() {}\n#[cfg(test)]\nuse b;\nfn c() {}\n#[cfg(test)]\nmod tests { d }";
        assert!(source("src/a.rs", text).code().ends_with("fn c() {}\n"));
        let attributed = "fn a() {}\n#[cfg(test)]\n#[path = \"x.rs\"]\nmod tests;";
        assert_eq!(source("src/a.rs", attributed).code(), "fn a() {}\n");
    }
}
