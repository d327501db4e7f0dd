//! The command line of the sandbox. That it starts, serves and leaves nothing behind is what all
//! end-to-end tests stand on.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]
#![expect(clippy::disallowed_methods, reason = "the program is run")]

use std::process::{Command, Output};

fn sandbox(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgsilo-sandbox"));
    command.args(arguments).env_remove("PGSILO_SANDBOX_DIR").output().expect("the sandbox runs")
}

#[test]
fn help_says_what_it_starts() {
    let help = sandbox(&["--help"]);
    assert!(help.status.success());
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    for word in ["token", "--without-proxy", "--dir"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_token_needs_a_running_sandbox_and_an_access_that_there_is() {
    let output = sandbox(&["token", "acme", "--dir", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no sandbox runs in /nowhere"), "{said}");
    let output = sandbox(&["token", "acme", "--access", "all"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("read-only"), "{said}");
}
