//! pgsilo, the data plane: parses arguments, loads the configuration, serves.
//!
//! Exit codes: 0 stopped as asked, or the configuration is good; 1 could not serve; 2 usage;
//! 3 the configuration is not valid; 4 a listener cannot be bound.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pgsilo::config::{Config, LogFormat};
use pgsilo::server::{self, ServeError};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use tracing_subscriber::EnvFilter;

/// A PostgreSQL proxy that gives every tenant its own database.
///
/// Clients present a session token as their password. pgsilo verifies it, resolves the one
/// tenant it stands for, leases a fresh credential for that tenant from OpenBAO, logs in to the
/// tenant's own database and splices the connections. Where no tenant can be resolved it refuses.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 stopped as asked, 1 could not serve, 2 usage, \
                  3 invalid configuration, 4 a listener cannot be bound."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT; SIGHUP reads the registry, certificates and keys again.
    Serve(Place),
    /// Read the configuration and every file it names, say what is wrong, start nothing. URLs are
    /// read, and nothing is fetched.
    Check(Place),
}

#[derive(clap::Args)]
struct Place {
    /// The configuration file.
    #[arg(
        long,
        short,
        value_name = "FILE",
        env = "PGSILO_CONFIG",
        default_value = "/etc/pgsilo/pgsilo.toml"
    )]
    config: PathBuf,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(place) => serve(&place),
        Command::Check(place) => check(&place),
    }
}

fn serve(place: &Place) -> ExitCode {
    keep_memory_private();
    let config = match Config::load(&place.config) {
        Ok(config) => config,
        Err(error) => return fail(3, &error),
    };
    log(&config);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    match server::serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ ServeError::Listen(_)) => fail(4, &error),
        Err(error @ ServeError::Start(_)) => fail(1, &error),
    }
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the answer of a command")]
fn check(place: &Place) -> ExitCode {
    match Config::load(&place.config) {
        Ok(config) => {
            for warning in &config.warnings {
                eprintln!("warning: {warning}");
            }
            let (listeners, tenants) = (config.listeners.len(), config.registry.snapshot().len());
            println!("{}: ok, listeners: {listeners}, tenants: {tenants}", place.config.display());
            ExitCode::SUCCESS
        }
        Err(error) => fail(3, &error),
    }
}

#[expect(clippy::print_stderr, reason = "before there is a log")]
fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("pgsilo: {error}");
    ExitCode::from(code)
}

/// Tokens and passwords pass through this process: no core dumps, no reading of its memory by
/// others of the same user. Where the system refuses, it is no worse than before.
fn keep_memory_private() {
    let _refused = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let _refused = rustix::process::setrlimit(Resource::Core, none);
}

fn log(config: &Config) {
    let filter = EnvFilter::new(format!("warn,pgsilo={}", config.log.level));
    // Its own complaints about a log that cannot be written go to the same place, and panic there:
    // a full disk must not end anybody's session.
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    match config.log.format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Human => {
            log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
        }
    }
}
