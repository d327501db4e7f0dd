//! A registry's file: a document as TOML, and their mistakes told by line.

use std::path::Path;

use super::{Document, Snapshot};
use crate::file::MAX_REGISTRY;
use crate::toml_file::{FileError, TomlFile};

/// Reads a registry. What it says of a tenant as `before` did is that one's.
pub(super) fn load(path: &Path, before: Option<&Snapshot>) -> Result<Snapshot, FileError> {
    let file = TomlFile::read_regular(path, MAX_REGISTRY)?;
    let document: Document = file.parse()?;
    Snapshot::of(document, before, &|named| file.resolve(named)).map_err(|error| {
        let what = match error.because {
            Some((other, rule)) => {
                let line = file.line_of(&other).unwrap_or_default();
                format!("{} on line {line}; {rule}", error.what)
            }
            None => error.what,
        };
        file.wrong(&error.field, what)
    })
}
