//! The programs under test: those that were built with the running test or benchmark.
//!
//! Cargo tells the place of a package's own programs only, and builds another package's only with
//! that one's own tests. So a program that is older than what it was built of is refused: a test of
//! it would say nothing of that.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Each program with the folders and files that it is built of. tests/structure/packages.rs
/// compares them with what Cargo and the sources say.
pub const SOURCES: [(&str, &[&str]); 3] = [
    (
        "pgsilo",
        &["src", "crates/core/src", "crates/openbao/src", "crates/registry/src", "crates/wire/src"],
    ),
    (
        "pgsiloctl",
        &[
            "crates/control/src",
            "crates/core/src",
            "crates/openbao/src",
            "crates/registry/src",
            "docker/openbao/create.sql",
            "docker/openbao/drop.sql",
            "docker/openbao/login.sql",
            "docker/openbao/logout.sql",
            "docker/postgresql/adopt.sql",
            "docker/openbao/operator.hcl",
            "docker/openbao/pgsilo.hcl",
            "docker/openbao/provisioner-login.sql",
            "docker/openbao/provisioner.hcl",
            "docker/openbao/stop.sql",
            "docker/postgresql/cluster.sql",
            "docker/postgresql/database.sql",
            "docker/postgresql/hashing.sql",
            "docker/postgresql/roles.sql",
            "docker/postgresql/template.sql",
        ],
    ),
    (
        "pgsilo-sandbox",
        &[
            "crates/control/src",
            "crates/core/src",
            "crates/openbao/src",
            "crates/registry/src",
            "crates/sandbox/src",
            "docker/openbao",
            "docker/postgresql",
        ],
    ),
];

/// The proxy.
pub fn pgsilo() -> PathBuf {
    program("pgsilo")
}

/// The control plane's.
pub fn pgsiloctl() -> PathBuf {
    program("pgsiloctl")
}

/// The sandbox.
pub fn sandbox() -> PathBuf {
    program("pgsilo-sandbox")
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

fn program(name: &str) -> PathBuf {
    let program = built().join(name);
    let (_, sources) = SOURCES.iter().find(|(of, _)| *of == name).expect("a program");
    let sources: Vec<_> = sources.iter().map(|source| root().join(source)).collect();
    if let Err(why) = current(&program, &sources) {
        panic!(
            "{} {why}: run `cargo test --no-run` first (benchmarks: `make soak`, `make bench`)",
            program.display()
        );
    }
    program
}

/// Whether a program is no older than any of its sources.
fn current(program: &Path, sources: &[PathBuf]) -> Result<(), String> {
    let made = modified(program).ok_or("is not there")?;
    let newest = sources.iter().filter_map(|source| newest(source)).max();
    match newest.filter(|(changed, _)| *changed > made) {
        Some((_, path)) => Err(format!("is older than {}", path.display())),
        None => Ok(()),
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

/// The file there that changed last, but for those of unit tests, of which no program is built.
fn newest(path: &Path) -> Option<(SystemTime, PathBuf)> {
    if path.file_stem().is_some_and(|name| name == "tests") {
        return None;
    }
    match std::fs::read_dir(path) {
        Ok(entries) => entries.filter_map(|entry| newest(&entry.ok()?.path())).max(),
        Err(_is_a_file) => Some((modified(path)?, path.to_owned())),
    }
}

#[test]
fn a_program_older_than_what_it_is_built_of_is_refused() {
    let dir = tmp().join(format!("programs-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("src/part/tests")).expect("folders");
    let program = dir.join("program");
    let sources = [dir.join("src"), dir.join("included.sql")];
    let refused = || current(&program, &sources).expect_err("refused");
    let at = |name: &str, seconds: u64| {
        let file = std::fs::File::create(dir.join(name)).expect("a file");
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        file.set_modified(time).expect("a time");
    };
    assert_eq!(refused(), "is not there");
    for (name, seconds) in [
        ("program", 20),
        ("src/main.rs", 20),
        ("included.sql", 10),
        ("src/part/tests.rs", 30),
        ("src/part/tests/more.rs", 30),
        ("another.sql", 30),
    ] {
        at(name, seconds);
    }
    assert_eq!(current(&program, &sources), Ok(()));
    for name in ["src/part/new.rs", "included.sql"] {
        at(name, 21);
        assert_eq!(refused(), format!("is older than {}", dir.join(name).display()));
        at(name, 20);
    }
    std::fs::remove_dir_all(dir).expect("removed");
}
