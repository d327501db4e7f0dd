//! A TOML file whose every error is one line: `FILE:LINE: FIELD: what is wrong`.
//!
//! Line numbers are looked up only once something is wrong, by parsing again into a tree
//! with positions: the good path stays fast and the schema types stay plain. Used by the
//! configuration, the registry and the list of those denied.

pub mod text;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::file;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use toml::de::{DeTable, DeValue};

/// Keys nearer than this to a known one are taken for typing errors.
const TYPO_DISTANCE: usize = 3;

/// What is wrong with a file, in one line for its operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    file: PathBuf,
    line: Option<usize>,
    field: Option<String>,
    what: String,
}

impl FileError {
    /// The file's line, counted from 1.
    pub fn line(&self) -> Option<usize> {
        self.line
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ": {field}")?;
        }
        // One line, whatever a file or the system put into the text.
        write!(f, ": {}", self.what.trim().replace(|c: char| c.is_control(), " "))
    }
}

impl std::error::Error for FileError {}

/// A file's text and the place it came from.
#[derive(Debug)]
pub struct TomlFile {
    path: PathBuf,
    text: String,
}

impl TomlFile {
    /// A file that is read once, at the start; of at most `limit` bytes.
    pub fn read(path: &Path, limit: u64) -> Result<TomlFile, FileError> {
        TomlFile::of(path, file::read_once(path, limit))
    }

    /// The same, of a file that is read again and again: never of a pipe.
    pub fn read_regular(path: &Path, limit: u64) -> Result<TomlFile, FileError> {
        TomlFile::of(path, file::read(path, limit))
    }

    fn of(path: &Path, bytes: std::io::Result<Vec<u8>>) -> Result<TomlFile, FileError> {
        let wrong = |what: String| FileError { file: path.into(), line: None, field: None, what };
        let bytes = bytes.map_err(|error| wrong(format!("cannot read the file: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + before.iter().filter(|b| **b == b'\n').count();
            FileError { line: Some(line), ..wrong("not UTF-8; save the file as UTF-8".into()) }
        })?;
        Ok(TomlFile { path: path.into(), text })
    }

    /// The schema's part: syntax, unknown keys, missing keys, types.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FileError> {
        let syntax = |error: toml::de::Error| FileError {
            file: self.path.clone(),
            line: error.span().map(|span| self.line_at(span.start)),
            field: None,
            what: error.message().to_owned(),
        };
        let deserializer = toml::Deserializer::parse(&self.text).map_err(syntax)?;
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let field = field_of(error.path());
            let what = reword(error.inner().message());
            let mut wrong = self.wrong(&field, what);
            if let Some(span) = error.inner().span() {
                wrong.line = Some(self.line_at(span.start));
            }
            wrong
        })
    }

    /// The meaning's part: an error about `field`, written `listener[0].tls.key`. A field
    /// that the file leaves out is reported on the line of the table it belongs to.
    pub fn wrong(&self, field: &str, what: impl fmt::Display) -> FileError {
        FileError {
            file: self.path.clone(),
            line: self.line_of(field),
            field: (!field.is_empty()).then(|| field.to_owned()),
            what: what.to_string(),
        }
    }

    /// Where the deepest part of `field` that exists is written.
    pub fn line_of(&self, field: &str) -> Option<usize> {
        let (root, _) = DeTable::parse_recoverable(&self.text);
        let root = DeValue::Table(root.into_inner());
        let (mut here, mut line) = (&root, None);
        for step in field.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match here {
                // The key's place, not the value's: a table's own can be elsewhere.
                DeValue::Table(table) => {
                    table.get_key_value(step).map(|(key, value)| (key.span(), value))
                }
                DeValue::Array(array) => {
                    let index = step.trim_end_matches(']').parse::<usize>().ok();
                    index.and_then(|i| array.get(i)).map(|value| (value.span(), value))
                }
                _ => None,
            };
            let Some((span, value)) = next else { break };
            line = Some(self.line_at(span.start));
            here = value.get_ref();
        }
        line
    }

    /// Relative to the file's folder, not to wherever the process was started.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        match self.path.parent() {
            Some(folder) => folder.join(path),
            None => path.into(),
        }
    }

    fn line_at(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().iter().take(offset);
        1 + before.filter(|b| **b == b'\n').count()
    }
}

fn field_of(path: &serde_path_to_error::Path) -> String {
    let mut field = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => field.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !field.is_empty() {
                    field.push('.');
                }
                field.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    field
}

/// serde's words, made an operator's.
fn reword(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field") {
        let unknown = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let hint = nearest(unknown, &known);
        return format!("unknown key{hint}; allowed here: {}", known.join(", "));
    }
    if message.starts_with("unknown variant") {
        let unknown = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let hint = nearest(unknown, &known);
        return format!("{unknown:?} is not known here{hint}; use one of: {}", known.join(", "));
    }
    if message.starts_with("missing field") {
        return format!("the key {:?} is missing; add it", quoted.next().unwrap_or_default());
    }
    let Some((found, expected)) = message.rsplit_once(", expected ") else {
        return message.to_owned();
    };
    let expected = match expected {
        "usize" => "a whole number, 0 or more",
        "u16" => "a port, 1 to 65535",
        "a boolean" => "true or false",
        "a sequence" => "an array, [...]",
        schema if schema.starts_with("struct ") => "a table",
        plain => plain,
    };
    let found = found.replace(": sequence", ": array").replace(": map", ": table");
    format!("{found}, expected {expected}")
}

fn nearest(unknown: &str, known: &[&str]) -> String {
    let best = known.iter().map(|name| (distance(unknown, name), name)).min();
    match best {
        Some((typos, name)) if typos < TYPO_DISTANCE && typos < name.len() => {
            format!(" (did you mean {name:?}?)")
        }
        _ => String::new(),
    }
}

/// Levenshtein's, one row at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_path() {
        let file = TomlFile {
            path: "x".into(),
            text: "a = 1\n[[t]]\nid = 1\n\n[[t]]\nid = 2\n[t.p]\nq = { r = [1,\n2] }\n".into(),
        };
        assert_eq!(file.line_of("a"), Some(1));
        assert_eq!(file.line_of("t[0].id"), Some(3));
        assert_eq!(file.line_of("t[1].id"), Some(6));
        assert_eq!(file.line_of("t[1].p.q.r[1]"), Some(9));
        assert_eq!(file.line_of("t[1].p.missing"), Some(7));
        assert_eq!(file.line_of("t[1].missing"), Some(5));
        assert_eq!(file.line_of("missing"), None);
    }

    #[test]
    fn did_you_mean_suggests_similar_names() {
        assert_eq!(distance("listner", "listener"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(nearest("timeot", &["address", "timeout"]), " (did you mean \"timeout\"?)");
        assert_eq!(nearest("zzz", &["address", "timeout"]), "");
    }
}
