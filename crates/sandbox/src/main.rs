//! A whole pgsilo on this machine, to try it out: see [`pgsilo_sandbox`]. Never shipped.

use std::process::ExitCode;

use clap::Parser;
use pgsilo_sandbox::{Arguments, run};
use pgsiloctl::say;

fn main() -> ExitCode {
    run(Arguments::parse()).unwrap_or_else(|error| {
        say::progress(&format!("pgsilo-sandbox: error: {error:#}"));
        ExitCode::FAILURE
    })
}
