//! What packages are built of, as Cargo resolves them. `deny.toml` says who may depend on what, but
//! does not tell a dependency from one of tests; and a test that runs a program must know if that
//! is stale.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use pgsilo_sandbox::testing::programs::SOURCES;

use crate::source::sources;

/// What must not be in a plane's package: the other plane, and what tests need.
const FORBIDDEN: [(&str, &[&str]); 2] = [
    ("pgsilo", &["pgsiloctl", "pgsilo-sandbox", "rcgen"]),
    ("pgsiloctl", &["pgsilo", "pgsilo-wire", "pgsilo-sandbox", "rcgen"]),
];

/// A package and all that it depends on, by dependencies of these kinds: lines that begin with a
/// name.
fn tree(package: &str, kinds: &str) -> String {
    tree_of(package, kinds, &[])
}

fn tree_of(package: &str, kinds: &str, more: &[&str]) -> String {
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--prefix", "none", "-e", kinds, "-p", package]);
    tree.args(more);
    let tree = tree.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    String::from_utf8(tree.stdout).expect("text")
}

/// The names in that.
fn packages(package: &str, kinds: &str) -> BTreeSet<String> {
    let lines = tree(package, kinds);
    let names = lines.lines().filter_map(|line| line.split(' ').next().map(str::to_owned));
    let names: BTreeSet<_> = names.collect();
    assert!(names.contains(package) && names.len() > 100, "{lines}");
    names
}

#[test]
fn each_plane_depends_on_neither_the_other_nor_test_code() {
    // The proxy's tests have all of them: so they are called so, and would be seen.
    let of_tests = packages("pgsilo", "normal,build,dev");
    for (package, forbidden) in FORBIDDEN {
        let built_of = packages(package, "normal,build");
        for other in forbidden {
            assert!(of_tests.contains(*other), "{other} is no package");
            assert!(!built_of.contains(*other), "{package} is built of {other}");
        }
    }
}

/// The proxy reads its registry with a client of PostgreSQL's, which cannot be had for anything else:
/// for tenants' databases there is the one dial, with a lease.
#[test]
fn the_proxy_has_no_client_of_postgresqls_but_the_registrys() {
    let kinds = "normal,build";
    let own = tree_of("pgsilo", kinds, &["--depth", "1"]);
    assert!(own.contains("pgsilo-registry ") && !own.contains("tokio-postgres "), "{own}");
    assert!(tree("pgsilo", kinds).contains("tokio-postgres "), "by the registry's package");
}

/// From the workspace's root, without `..`.
fn plain(path: &Path) -> String {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => assert!(plain.pop(), "{}", path.display()),
            part => plain.push(part),
        }
    }
    plain.display().to_string()
}

#[test]
fn every_source_of_a_program_makes_it_stale() {
    let sources = sources();
    let mut included = 0;
    for (program, listed) in SOURCES {
        // Packages of this workspace have their folder behind their version.
        let tree = tree(program, "normal,build");
        let folders = tree.lines().filter_map(|line| line.split_once(" (/")?.1.split_once(')'));
        let folders = folders.map(|(folder, _)| PathBuf::from(format!("/{folder}")));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folders = folders.map(|folder| plain(folder.strip_prefix(root).expect("inside")));
        let mut expected: BTreeSet<String> =
            folders.map(|of| plain(&Path::new(&of).join("src"))).collect();
        assert!(expected.len() > 2, "{tree}");
        let folders = expected.clone();
        for source in &sources {
            let path = Path::new(&source.path);
            let is_inside = folders.iter().any(|folder| path.starts_with(folder));
            for rest in source.code().split("include_str!(\"").skip(1).filter(|_| is_inside) {
                let (name, _) = rest.split_once('"').expect("a name");
                let of = plain(&path.parent().expect("a folder").join(name));
                // A folder that is listed stands for all in it.
                let folder = listed.iter().find(|folder| Path::new(&of).starts_with(folder));
                expected.insert(folder.map_or(of, |folder| (*folder).to_owned()));
                included += 1;
            }
        }
        assert_eq!(BTreeSet::from_iter(listed.iter().map(|listed| (*listed).to_owned())), expected);
    }
    assert!(included > 10, "{included}");
}
