//! End-to-end tests that need more than a fresh machine has: node-postgres, JDBC, pgx, databases
//! that speak TLS, an OpenID provider, pages that are pasted, and other projects' own tests. `make
//! test-all` installs that and runs them; plain `cargo test` does not.
//!
//! They stand on the same support as tests/e2e, and as there nothing is skipped: what is
//! missing fails.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why, and so do the functions that tests share"
)]

mod addresses;
mod backends;
mod cluster;
mod drivers;
mod machine;
mod middle;
mod oidc;
mod pools;
mod setup;
mod suites;

use pgsilo_sandbox::testing;
use tokio::process::Command;

/// A Java program of one file.
fn java(name: &str) -> Command {
    let mut command = Command::new("java");
    command.arg("-classpath").arg(var("PGSILO_JDBC"));
    // Java does not trust the locale of a bare container with anything but ASCII.
    command.args(["-Dfile.encoding=UTF-8", "--source", "17"]);
    command.arg(testing::driver::script("tests/more/jdbc").join(name));
    command
}

/// A variable that scripts/test-all.sh sets.
fn var(name: &str) -> std::path::PathBuf {
    match std::env::var_os(name) {
        Some(value) => value.into(),
        None => panic!("{name} is not set: run these tests with `make test-all`"),
    }
}
