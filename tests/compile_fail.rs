//! The forbidden shortcuts do not compile, each for its own reason.
//!
//! From outside the library: `compile_fail/outside/*.rs`, with the compiler's words beside
//! them. From inside it, where privacy stops less: `compile_fail/inside/PHASE/MODULE.rs` is
//! appended to that module of a copy of the library, which is then compiled. Each line that
//! must not compile ends in `//~` and the error's code; nothing else may be an error. The
//! compiler gives up after each of its phases, so each has its own copy: names, then types
//! and moves, then fields.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// File, line, code: of an error that the compiler found, or should find.
type Found = BTreeSet<(String, u64, String)>;

#[test]
fn shortcuts_from_outside_do_not_compile() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/compile_fail/pass.rs");
    cases.compile_fail("tests/compile_fail/outside/*.rs");
}

#[test]
fn shortcuts_from_inside_do_not_compile() {
    for phase in ["names", "types", "fields"] {
        let copy = Copy::make(phase);
        let expected = copy.append();
        assert!(!expected.is_empty(), "{phase}: nothing is expected to fail");
        let (found, words) = copy.compile();
        assert_eq!(found, expected, "{phase}: {words}");
    }
}

/// A package with the library's sources and nothing else.
struct Copy {
    phase: &'static str,
    package: PathBuf,
    /// Where dependencies are built already, for the profile of this test.
    target: PathBuf,
    release: bool,
}

impl Copy {
    fn make(phase: &'static str) -> Copy {
        let test = std::env::current_exe().expect("this test has a file");
        // TARGET/PROFILE/deps/compile_fail-HASH
        let built = test.ancestors().nth(2).expect("a profile's folder");
        let target = built.parent().expect("a target folder").to_owned();
        let package = target.join("tests").join("inside").join(phase);
        if package.exists() {
            fs::remove_dir_all(&package).expect("the last run's copy goes");
        }
        fs::create_dir_all(&package).expect("a folder");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        copy_all(&root.join("src"), &package.join("src"));
        for file in ["Cargo.lock", "rust-toolchain.toml"] {
            fs::copy(root.join(file), package.join(file)).expect(file);
        }
        let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("Cargo.toml");
        fs::write(package.join("Cargo.toml"), alone(&manifest)).expect("Cargo.toml");
        Copy { phase, package, target, release: built.ends_with("release") }
    }

    /// Appends each shortcut to its module; answers with the errors that this must lead to.
    fn append(&self) -> Found {
        let shortcuts = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/compile_fail/inside")
            .join(self.phase);
        let mut expected = Found::new();
        for entry in fs::read_dir(shortcuts).expect("shortcuts") {
            let shortcut = entry.expect("a shortcut").path();
            let name = shortcut.file_name().expect("a name");
            let module = self.package.join("src").join(name);
            let text = fs::read_to_string(&module).expect("the module of that name")
                + &fs::read_to_string(&shortcut).expect("a shortcut");
            fs::write(&module, &text).expect("the copy");
            let file = format!("src/{}", name.display());
            for (number, line) in (1..).zip(text.lines()) {
                if let Some((_, code)) = line.split_once("//~ ") {
                    expected.insert((file.clone(), number, code.trim().to_owned()));
                }
            }
        }
        expected
    }

    fn compile(&self) -> (Found, String) {
        let mut cargo = Command::new(env!("CARGO"));
        // As a test, so that features, and with them the built dependencies, are this test's.
        cargo
            .args(["test", "--lib", "--no-run", "--offline", "--locked"])
            .arg("--message-format=json")
            .arg("--target-dir")
            .arg(&self.target)
            .current_dir(&self.package);
        if self.release {
            cargo.arg("--release");
        }
        let output = cargo.output().expect("cargo");
        let mut found = Found::new();
        let mut words = String::from_utf8_lossy(&output.stderr).into_owned();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
                continue;
            };
            let message = &message["message"];
            let spans = message["spans"].as_array();
            let span = spans.and_then(|spans| spans.iter().find(|span| span["is_primary"] == true));
            let (Some(span), true) = (span, message["level"] == "error") else {
                continue;
            };
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            found.insert((
                text(&span["file_name"]),
                span["line_start"].as_u64().unwrap_or_default(),
                text(&message["code"]["code"]),
            ));
            words += &text(&message["rendered"]);
        }
        (found, words)
    }
}

/// The manifest of a package that has no programs and no tests, and is in nobody's workspace.
fn alone(manifest: &str) -> String {
    let mut kept = String::from("[workspace]\n");
    let mut keeps = true;
    for line in manifest.lines() {
        if line.starts_with('[') {
            keeps = !matches!(line, "[[bin]]" | "[[test]]" | "[[bench]]" | "[[example]]")
                && !line.starts_with("[workspace");
        }
        if keeps && !line.starts_with("default-run") {
            kept += line;
            kept.push('\n');
        }
    }
    kept.replacen("[package]\n", "[package]\nautobins = false\n", 1)
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("sources") {
        let entry = entry.expect("a source");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a kind").is_dir() {
            copy_all(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).expect("a source");
        }
    }
}
