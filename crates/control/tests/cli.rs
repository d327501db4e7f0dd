//! The command line of pgsiloctl, as a script meets it.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]
#![expect(clippy::disallowed_methods, reason = "the program is run")]

use std::process::{Command, Output};

fn pgsiloctl(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgsiloctl"));
    for name in [
        "PROVISIONER_DSN",
        "PROVISIONER_BAO_TOKEN",
        "BAO_ADDR",
        "PGSILO_REGISTRY",
        "PGSILO_REGISTRY_DSN",
    ] {
        command.env_remove(name);
    }
    command.args(arguments).output().expect("pgsiloctl runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn help_names_the_commands_and_the_exit_codes() {
    let help = pgsiloctl(&["--help"]);
    assert!(help.status.success());
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    for word in ["leases", "registry", "Exit codes", "3 an audit found"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_missing() {
    let output = pgsiloctl(&["tenant", "create"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("<ID>"), "{}", said(&output));
    // That may be said in several places.
    let output = pgsiloctl(&["leases", "audit", "--config", "/nowhere/pgsiloctl.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "write /nowhere/pgsiloctl.toml, or set BAO_ADDR and PROVISIONER_BAO_TOKEN";
    assert!(said(&output).contains(expected), "{}", said(&output));
    assert_eq!(pgsiloctl(&["sandbox"]).status.code(), Some(2), "it has a program of its own");
}

#[test]
fn shells_complete_what_there_is_and_each_command_has_a_page() {
    for (shell, check) in [("bash", Some("bash")), ("zsh", None), ("fish", None)] {
        let output = pgsiloctl(&["completions", shell]);
        assert!(output.status.success(), "{}", said(&output));
        let script = String::from_utf8(output.stdout).expect("text");
        for word in ["bootstrap", "undelete", "lease-hashing"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        let Some(check) = check else { continue };
        let parsed = Command::new(check).args(["-n", "-c", &script]).output().expect("it runs");
        assert!(parsed.status.success(), "{}", said(&parsed));
    }
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("manual");
    let output = pgsiloctl(&["manual", folder.to_str().expect("text")]);
    assert!(output.status.success(), "{}", said(&output));
    for (page, word) in [
        ("pgsiloctl.1", "bootstrap"),
        ("pgsiloctl-tenant-create.1", "journal"),
        ("pgsiloctl-bootstrap-cluster.1", "superuser"),
    ] {
        let text = std::fs::read_to_string(folder.join(page)).expect(page);
        assert!(text.contains(".TH") && text.contains(word), "{page}: {text}");
    }
}

#[test]
fn a_failed_command_exits_with_1_and_does_not_print_the_password() {
    let output = pgsiloctl(&[
        "leases",
        "audit",
        "--registry",
        "/nowhere/tenants.toml",
        "--provisioner",
        "postgresql://provisioner:hunter2@localhost/postgres",
        "--bao",
        "http://127.0.0.1:1",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.starts_with("pgsiloctl: error: "), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn a_registry_that_cannot_be_reached_or_would_be_in_clear_is_an_error_without_the_password() {
    let dsn = |rest: &str| format!("postgresql://admin:hunter2@{rest}");
    for (dsn, mode, expected) in [
        (dsn("127.0.0.1:1/registry"), "disable", "logging in to the registry as admin"),
        (dsn("192.0.2.1/registry"), "disable", "in clear to another machine"),
        (dsn("127.0.0.1"), "disable", "names no database"),
        ("postgresql://127.0.0.1/registry".to_owned(), "disable", "names no user"),
        ("hunter2 is no DSN".to_owned(), "verify-full", "is not a DSN"),
    ] {
        for command in ["init", "migrate", "status"] {
            let output = pgsiloctl(&["registry", command, "--dsn", &dsn, "--tls", mode]);
            let said = said(&output);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains(expected) && !said.contains("hunter2"), "{said}");
        }
    }
}
