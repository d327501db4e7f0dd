//! The programs under test: those that were built with the running test or benchmark.
//!
//! Cargo tells the place of a package's own programs only, and builds another package's only with
//! that one's own tests. So a program that is older than its sources is refused: a test of it would
//! say nothing of them.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The proxy.
pub fn pgsilo() -> PathBuf {
    program("pgsilo", &["src", "crates/core", "crates/wire"])
}

/// The control plane's.
pub fn pgsiloctl() -> PathBuf {
    program("pgsiloctl", &["crates/core", "crates/control"])
}

/// The sandbox.
pub fn sandbox() -> PathBuf {
    program("pgsilo-sandbox", &["crates/core", "crates/control", "crates/sandbox/src"])
}

/// Where the sources are.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the sources are there")
}

/// A folder for what tests write, beside what is built.
pub fn tmp() -> PathBuf {
    let target = built().parent().expect("a folder").to_path_buf();
    let tmp = target.join("tmp");
    std::fs::create_dir_all(&tmp).expect("a folder for what tests write");
    tmp
}

/// Where Cargo puts programs: tests and benchmarks run from the folder `deps` in it.
fn built() -> PathBuf {
    let own = std::env::current_exe().expect("a program knows where it is");
    let folder = own.parent().expect("a folder");
    let is_deps = folder.file_name().is_some_and(|name| name == "deps");
    let built = if is_deps { folder.parent().expect("a folder") } else { folder };
    built.to_path_buf()
}

fn program(name: &str, sources: &[&str]) -> PathBuf {
    let program = built().join(name);
    let made = modified(&program);
    let root = root();
    let newest = sources.iter().filter_map(|folder| newest(&root.join(folder))).max();
    let current = made.zip(newest.as_ref()).is_some_and(|(made, (changed, _))| made >= *changed);
    assert!(
        current,
        "{} is not there, or older than {:?}: run `cargo test --no-run` first (for benchmarks, \
         `cargo build --release --bins`)",
        program.display(),
        newest.map(|(_, path)| path),
    );
    program
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

/// The Rust source below a folder that changed last.
fn newest(folder: &Path) -> Option<(SystemTime, PathBuf)> {
    let entries = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let changed = entries.filter_map(|path| match path.is_dir() {
        true => newest(&path),
        false => {
            let is_source = path.extension().is_some_and(|extension| extension == "rs");
            is_source.then(|| Some((modified(&path)?, path.clone())))?
        }
    });
    changed.max()
}
