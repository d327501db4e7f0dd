//! pgsiloctl: the control plane's hand.
//!
//! Each command is a module of its own; this file only names them. They work with the
//! *provisioner* identity (see [`provision`]) and never with a tenant's credential. What a
//! script would read goes to stdout, progress and errors go to stderr. Exit codes: 0 done,
//! 1 failed, 2 wrong usage, 3 an audit found something that is still there.

mod bao;
mod duration;
mod leases;
mod postgres;
mod provision;
mod revocation;
mod sandbox;
mod say;
mod secret;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Provisions and tries out pgsilo, the proxy that gives every tenant its own database.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an audit found something that is still there."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What is leased, and whether it should still be.
    #[command(subcommand)]
    Leases(leases::Command),
    Sandbox(sandbox::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Leases(command) => leases::run(command),
        Command::Sandbox(arguments) => sandbox::run(arguments),
    };
    outcome.unwrap_or_else(|error| {
        say::progress(&format!("pgsiloctl: error: {error:#}"));
        ExitCode::FAILURE
    })
}
