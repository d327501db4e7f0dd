//! What a package is built of, as Cargo resolves it. `deny.toml` says who may depend on what, but does
//! not tell a dependency from one of tests.

use std::collections::BTreeSet;
use std::process::Command;

/// What must not be in a plane's package: the other plane, what tests need, and of the proxy a client
/// of PostgreSQL's that could log in with anything but a lease.
const FORBIDDEN: [(&str, &[&str]); 2] = [
    ("pgsilo", &["pgsiloctl", "pgsilo-sandbox", "rcgen", "tokio-postgres"]),
    ("pgsiloctl", &["pgsilo", "pgsilo-wire", "pgsilo-sandbox", "rcgen"]),
];

/// The names of a package and of all that it depends on, by dependencies of these kinds.
fn packages(package: &str, kinds: &str) -> BTreeSet<String> {
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--prefix", "none", "-e", kinds, "-p", package]);
    let tree = tree.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let lines = String::from_utf8(tree.stdout).expect("text");
    let names = lines.lines().filter_map(|line| line.split(' ').next().map(str::to_owned));
    let names: BTreeSet<_> = names.collect();
    assert!(names.contains(package) && names.len() > 100, "{lines}");
    names
}

#[test]
fn neither_plane_is_built_of_the_other_or_of_what_tests_need() {
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
