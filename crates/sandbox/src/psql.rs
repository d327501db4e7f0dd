//! The `psql` that the printed lines name: the PATH's, or the one beside the server.
//!
//! A psql built without TLS refuses `sslmode=verify-full` before it connects anywhere; it is
//! asked once, so that every line we print works as pasted.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::files;

/// A psql, and what it can do.
#[derive(Debug)]
pub(super) struct Psql {
    /// As a person would type it: a bare name where the PATH leads to it.
    pub(super) program: String,
    pub(super) tls: bool,
}

impl Psql {
    pub(super) async fn find(postgres_programs: &Path) -> Self {
        let beside = postgres_programs.join("psql");
        let program = match files::on_path("psql") {
            None if files::is_program(&beside) => beside.to_string_lossy().into_owned(),
            _ => "psql".to_owned(),
        };
        // The socket's folder does not exist: it fails either way, and says why.
        let output = Command::new(&program)
            .args(["-X", "-w", "host=/nonexistent dbname=x user=x sslmode=verify-full"])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .await;
        let tls = output.is_ok_and(|output| {
            !output.status.success()
                && !String::from_utf8_lossy(&output.stderr).contains("not compiled in")
        });
        Self { program, tls }
    }
}
