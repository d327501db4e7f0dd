//! `pgsilo-sandbox`: everything that pgsilo needs, real, on loopback, in a few seconds.
//!
//! It starts a PostgreSQL and an OpenBAO of its own, has `pgsiloctl` make them ready and make two tenants,
//! makes a token issuer and certificates, and starts the proxy. What it writes for others lies
//! in one folder (`--dir`); what runs lies in a short temporary folder, removed at the end.
//! However it ends, nothing it started is left; `env` is there exactly while all is ready.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it runs and connects whatever it likes: it is never shipped"
)]

mod certificates;
mod control;
mod env;
mod files;
mod issuer;
mod login;
mod openbao;
mod ports;
mod postgres;
mod process;
mod proxy;
mod psql;
mod seed;
mod start;
mod stop;
pub mod testing;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use issuer::{Issuer, Options};
use pgsilo_core::duration;
use pgsilo_core::tenant::Access;
use pgsiloctl::provision::plan::Allowance;
use pgsiloctl::say;

/// Run a whole pgsilo on this machine: PostgreSQL, OpenBAO, two tenants, tokens, the proxy.
///
/// Starts everything on loopback and on free ports, prints psql lines to paste, and runs until
/// Ctrl-C (or SIGTERM). Nothing is left when it ends. While it runs, DIR/env is a file that a
/// shell can source; DIR also holds the proxy's configuration and every part's log.
///
/// The tenants `acme` and `globex` have different data in databases of their own. Any password
/// that is no valid token is refused; `pgsilo-sandbox token` mints more tokens.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, verbatim_doc_comment)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    start: Start,
}

#[derive(Debug, Subcommand)]
enum Command {
    Token(Token),
}

/// How to start.
#[derive(Debug, Args)]
struct Start {
    /// Where to write env, configuration, keys and logs; one sandbox at a time.
    #[arg(long, default_value = "target/sandbox")]
    dir: PathBuf,
    /// The proxy's port, for TCP and in its socket's name [default: a free one].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Stop when standard input ends: for a program that starts a sandbox.
    #[arg(long)]
    until_eof: bool,
    /// Start everything but the proxy, and write its configuration: to run it in a debugger.
    #[arg(long)]
    without_proxy: bool,
    /// PostgreSQL's max_connections. A tenant may have four fifths of them, so that one of them
    /// cannot shut the other out.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u16).range(20..=10000))]
    max_connections: u16,
    /// How many tenants: acme and globex, which have data, and tenant-001 and so on, which have none.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=500))]
    tenants: u16,
    /// What the tenants' applications may use that could use up the cluster for the other tenant:
    /// PostgreSQL allows it to everybody, the sandbox to no tenant.
    #[arg(long, value_name = "WHAT", value_enum, value_delimiter = ',')]
    allow: Vec<Allowance>,
    /// Let leased roles log in to PostgreSQL over TCP from anything on this machine, and have the
    /// proxy do so. By default pg_hba.conf admits them from the proxy only, by a socket of its own.
    #[arg(long)]
    leased_over_tcp: bool,
    /// Have the proxy read DIR/tenants.toml, as if that were written by hand, and not the registry's
    /// database: what `pgsiloctl` makes later is not served then.
    #[arg(long)]
    registry_file: bool,
    /// The folder of PostgreSQL's programs, 16 or newer [default: that of `postgres` on the PATH].
    #[arg(long, value_name = "DIR", env = "PGSILO_PG_BIN")]
    pg_bin: Option<PathBuf>,
    /// OpenBAO's program [default: `bao` on the PATH].
    #[arg(long, value_name = "PATH", env = "PGSILO_BAO")]
    bao: Option<PathBuf>,
    /// How much the proxy writes to DIR/pgsilo.log.
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
}

impl Start {
    /// Connections to the database of one tenant.
    fn share(&self) -> u16 {
        let for_all = self.max_connections.saturating_sub(postgres::RESERVED);
        (u32::from(for_all) * 4 / 5) as u16
    }
}

/// The proxy's log levels.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Mint a token with a running sandbox's issuer key, and print it.
///
/// Use it as the password:
///   PGPASSWORD=$(pgsilo-sandbox token acme) psql -h 127.0.0.1 -p "$PGSILO_PORT" acme
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
struct Token {
    /// The tenant it is for; several make a token with several memberships.
    #[arg(required = true, value_name = "TENANT")]
    tenants: Vec<String>,
    // Not a doc comment: rustdoc takes the bracket for a link.
    #[arg(
        long,
        help = "The kind of credential it may lease: read-only, read-write or migrate [default: no such claim, which is read-write]"
    )]
    access: Option<Access>,
    /// How long it is valid: 90s, 15m, 2h, 1d.
    #[arg(long, default_value = "15m", value_parser = duration::parse)]
    ttl: Duration,
    /// A token that ended an hour ago.
    #[arg(long)]
    expired: bool,
    // Not a doc comment: rustdoc takes the bracket for a link.
    #[arg(long, help = "Whose it is [default: alice@TENANT]")]
    subject: Option<String>,
    /// Set any claim to a JSON value, over the others; null takes it away. May be repeated.
    #[arg(long = "claim", value_name = "NAME=JSON", value_parser = parse_claim)]
    claims: Vec<(String, Value)>,
    /// The running sandbox's folder.
    #[arg(long, env = "PGSILO_SANDBOX_DIR", default_value = "target/sandbox")]
    dir: PathBuf,
}

/// Runs the command; a sandbox until it is told to stop.
pub fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Some(Command::Token(token)) => mint(token),
        None => start::run(arguments.start),
    }
}

fn mint(token: Token) -> Result<ExitCode> {
    ensure!(
        token.dir.join("env").exists(),
        "no sandbox runs in {} (start one with `pgsilo-sandbox`, or name its folder with --dir)",
        token.dir.display()
    );
    let subject = token.subject.unwrap_or_else(|| format!("alice@{}", token.tenants[0]));
    let minted = Issuer::open(&token.dir)?.mint(&Options {
        subject,
        tenants: token.tenants,
        access: token.access.map(Access::as_str),
        ttl: token.ttl,
        expired: token.expired,
        claims: token.claims,
    })?;
    say::result(&minted);
    Ok(ExitCode::SUCCESS)
}

/// `NAME=JSON`.
fn parse_claim(text: &str) -> Result<(String, Value)> {
    let (name, json) = text.split_once('=').context("write NAME=JSON")?;
    let value = serde_json::from_str(json)
        .with_context(|| format!("{json} is no JSON (a text needs its quotes)"))?;
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_a_name_and_json() {
        assert_eq!(parse_claim("aud=\"x=y\"").unwrap(), ("aud".to_owned(), Value::from("x=y")));
        assert_eq!(parse_claim("exp=null").unwrap().1, Value::Null);
        assert!(parse_claim("aud").is_err());
        assert!(parse_claim("aud=x").is_err());
    }
}
