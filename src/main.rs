//! pgsilo, the data plane: parses arguments, loads the configuration, serves.
//!
//! Exit codes: 0 stopped as asked, or the configuration is good; 1 could not serve; 2 usage;
//! 3 the configuration is not valid; 4 a listener cannot be bound.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use pgsilo::config::{AuditSettings, Config, LogFormat, LogSettings};
use pgsilo::log::{AUDIT, Bounds, Kind, LogQueue, tell_of_losses};
use pgsilo::server::{Control, ServeError};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How long the end of the process waits for the last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

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
    Serve(ConfigFile),
    /// Read the configuration and every file it names, say what is wrong, start nothing. URLs are
    /// read, and nothing is fetched.
    Check(ConfigFile),
}

#[derive(clap::Args)]
struct ConfigFile {
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
        Command::Serve(file) => serve(&file),
        Command::Check(file) => check(&file),
    }
}

fn serve(file: &ConfigFile) -> ExitCode {
    keep_memory_private();
    let control = match Control::start() {
        Ok(control) => control,
        Err(error) => return fail(1, &error),
    };
    let config = match Config::load(&file.config) {
        Ok(config) => config,
        Err(error) => return fail(3, &error),
    };
    let (settings, audit, too_few) = (config.log, config.proxy.audit, too_few_descriptors(&config));
    let opened = match config.open() {
        Ok(opened) => opened,
        Err(error) => return fail(3, &error),
    };
    let queue = match log(settings, audit) {
        Ok(queue) => queue,
        Err(error) => return fail(1, &format_args!("cannot start: {error}")),
    };
    for warning in opened.warnings.iter().chain(&too_few) {
        tracing::warn!("{warning}");
    }
    let result = control.serve(opened, queue.clone());
    if let Err(error) = &result {
        let _queued = queue.lines(Kind::Log).write_all(format!("pgsilo: {error}\n").as_bytes());
    }
    queue.close(LAST_LINES);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(ServeError::Listen(_)) => ExitCode::from(4),
        Err(ServeError::Start(_)) => ExitCode::from(1),
    }
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the answer of a command")]
fn check(file: &ConfigFile) -> ExitCode {
    let read = Config::load(&file.config).and_then(|config| {
        let (too_few, listeners) = (too_few_descriptors(&config), config.listeners.len());
        Ok((config.open()?, too_few, listeners))
    });
    match read {
        Ok((opened, too_few, listeners)) => {
            for warning in opened.warnings.iter().chain(&too_few) {
                eprintln!("warning: {warning}");
            }
            let registry = opened.registry();
            let tenants = match registry.is_read() {
                true => registry.snapshot().len().to_string(),
                false => "in a database, which was not asked".to_owned(),
            };
            println!("{}: ok, listeners: {listeners}, tenants: {tenants}", file.config.display());
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

/// What is to be said where this process may have fewer descriptors than the bounds allow
/// connections.
fn too_few_descriptors(config: &Config) -> Option<String> {
    let needed = config.descriptors();
    let allowed = rustix::process::getrlimit(Resource::Nofile).current?;
    (allowed < needed).then(|| {
        format!(
            "the bounds of [limits] need {needed} descriptors, and this process may have {allowed}: \
             raise LimitNOFILE (ulimit -n), or lower the bounds"
        )
    })
}

/// What the log is made of: a queue that never blocks, and the two kinds of lines that `tracing`
/// puts there. Events of the audit trail are written whatever the level of the log is.
///
/// # Errors
/// When the system refuses the thread that writes.
#[expect(clippy::disallowed_methods, reason = "the log is standard error")]
fn log(settings: LogSettings, audit: AuditSettings) -> io::Result<LogQueue> {
    let bounds = Bounds { log: settings.queue_bytes, audit: audit.queue_bytes };
    let queue = LogQueue::start(io::stderr(), bounds, tell_of_losses)?;
    let own = format!("warn,pgsilo={},{}=off", settings.level, AUDIT);
    let own = lines(settings.format, &queue, Kind::Log).with_filter(EnvFilter::new(own));
    let audit = Targets::new().with_target(AUDIT, LevelFilter::TRACE);
    let audit = lines(settings.format, &queue, Kind::Audit).with_filter(audit);
    tracing_subscriber::registry().with(own).with(audit).init();
    std::panic::set_hook(Box::new(log_panic));
    Ok(queue)
}

#[expect(clippy::disallowed_methods, reason = "the log is standard error")]
fn lines<S>(format: LogFormat, queue: &LogQueue, kind: Kind) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let queue = queue.clone();
    // Complaints of its own would go to standard error, past the queue.
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(move || queue.lines(kind))
        .log_internal_errors(false);
    match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Human => layer.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
    }
}

/// As the standard library says it, but through the queue: who panics does not wait for a log
/// either.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => backtrace.to_string(),
        _ => String::new(),
    };
    let thread = thread.name().unwrap_or_default();
    tracing::error!(%panic, thread, backtrace, "a thread panicked");
}
