//! The command line of pgsiloctl; this file only names the commands.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use pgsiloctl::{bootstrap, certificate, leases, manual, registry, say, tenants};

/// Provisions pgsilo, the proxy that gives every tenant its own database.
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
    Apply(registry::apply::Command),
    /// Make OpenBAO, the registry and clusters ready, with an administrator's logins that are not kept.
    #[command(subcommand)]
    Bootstrap(bootstrap::Command),
    /// What certifies that tenants were removed.
    #[command(subcommand)]
    Certificate(certificate::Command),
    /// Let somebody use a tenant, where their issuer's word is not enough.
    #[command(subcommand)]
    Grant(registry::grants::Command),
    /// Keep somebody out at once, running sessions included.
    #[command(subcommand)]
    Lock(registry::locks::Command),
    /// What is leased, and whether it should still be.
    #[command(subcommand)]
    Leases(leases::Command),
    /// The registry in PostgreSQL: which tenants there are, and where.
    #[command(subcommand)]
    Registry(registry::Command),
    /// Make tenants, and say which there are and whether they are served.
    #[command(subcommand)]
    Tenant(tenants::Command),
    /// Print what a shell completes: pgsiloctl completions bash > /etc/bash_completion.d/pgsiloctl
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Write the manual pages, one for each command, into a folder.
    Manual {
        /// It is made if it is not there.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Apply(command) => registry::run_apply(command),
        Command::Bootstrap(command) => bootstrap::run(command),
        Command::Certificate(command) => certificate::run(command),
        Command::Grant(command) => registry::run_grant(command),
        Command::Lock(command) => registry::run_lock(command),
        Command::Leases(command) => leases::run(command),
        Command::Registry(command) => registry::run(command),
        Command::Tenant(command) => tenants::run(command),
        Command::Completions { shell } => {
            manual::completions(Arguments::command(), shell).map(|()| ExitCode::SUCCESS)
        }
        Command::Manual { folder } => {
            manual::pages(Arguments::command(), &folder).map(|()| ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        say::progress(&format!("pgsiloctl: error: {error:#}"));
        ExitCode::FAILURE
    })
}
