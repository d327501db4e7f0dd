//! From the schema to ready objects: everything that the file names is read, everything
//! that it says is checked, and whatever is unwise becomes a warning. The first error
//! ends it.

mod issuers;
mod listeners;
mod names;
mod openbao;
mod proofs;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Display;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::file::{self, MAX_CONFIGURATION, MAX_SECRET};
use pgsilo_core::host::is_loopback;
use pgsilo_core::limits::not_zero;
use pgsilo_core::registry::{Host, Placement, PlacementTls, Tenant};
use pgsilo_core::toml_file::TomlFile;
use zeroize::Zeroizing;

use self::proofs::Known;
use super::raw::{
    Raw, RawAudit, RawAuthority, RawBackend, RawFormat, RawLevel, RawLimits, RawLog, RawOnLoss,
    RawReuse, RawRuntime, RawWarm,
};
use super::{
    Audit, Config, FileError, LeaseRules, Limits, Listener, Log, LogFormat, OnLoss, Place,
    TimeLimits, Warm,
};
use crate::registry::{Denied, Registry};
use crate::token::MAX_TOKEN_BYTES;

/// More connections than any machine has ports and memory for are a typing error.
const MAX_BOUND: usize = 10_000_000;
/// More event loops than any machine has cores is a typing error.
const MAX_CORES: usize = 1024;

/// Of lines that wait to be written. Less is what the pipe behind it holds anyway; more is a typing error.
const QUEUE_BYTES: std::ops::RangeInclusive<usize> = 64 * 1024..=1024 * 1024 * 1024;
/// In less, a network that is rebuilt loses sessions.
const MIN_DEAD_PEER: Duration = Duration::from_secs(5);
/// No network outage that a session survives is longer.
const MAX_DEAD_PEER: Duration = Duration::from_secs(1800);

/// A connection that waits for less is never there when it is wanted.
const MIN_WARM: Duration = Duration::from_secs(1);
/// One that waits for longer was logged in before too much has changed.
const MAX_WARM: Duration = Duration::from_secs(600);

/// What makes words of tokens' own unwise where they are shown to OpenBAO.
const WORDS: &str = "tokens may call tenants by words of their own, and under session authority OpenBAO \
                     reads the tenant from the token itself: its role must know the same words";

pub(super) fn load(path: &Path) -> Result<Config, FileError> {
    let file = TomlFile::read(path, MAX_CONFIGURATION)?;
    let raw: Raw = file.parse()?;
    let mut build = Build { file: &file, warnings: Vec::new() };
    let known = Known {
        issuers: raw.issuer.iter().map(|issuer| issuer.issuer.clone()).collect(),
        needs_tokens: raw.lease.authority == RawAuthority::Session,
    };
    let listeners = build.listeners(raw.listener, &known)?;
    if known.needs_tokens {
        build.mind_words(&raw.issuer);
    }
    let tenants_of_issuers = names::tenants_of(&raw.issuer);
    let verifier = build.verifier(raw.issuer)?;
    let grace = raw.lease.grace.0;
    let end_at_expiry = raw.lease.end_at_expiry;
    let openbao = build.openbao(raw.openbao, raw.lease, raw.limits.max_sessions)?;
    let limits = build.limits(&raw.limits)?;
    let warm = build.warm(&raw.warm, &raw.backend)?;
    let regions = build.regions(raw.registry.regions)?;
    let cores = build.cores(&raw.runtime)?;
    let log = build.log(&raw.log)?;
    let audit = build.audit(&raw.audit)?;
    let admin = raw.admin.map(|admin| admin.address.0);
    build.check_admin(admin, &listeners)?;
    if admin.is_some_and(|address| !address.ip().is_loopback()) {
        build.warn(
            "admin.address",
            "not a loopback address: anybody who reaches it can read the metrics",
        );
    }
    let denied = build.denied(raw.registry.denied, known.issuers)?;
    // Last: it is the file that can be large.
    let registry = Registry::open(&file.resolve(&raw.registry.file)).map_err(|error| {
        // A registry that cannot be read is this file's error; one with errors is its own.
        match error.line() {
            None => file.wrong("registry.file", error),
            Some(_) => error,
        }
    })?;
    build.mind_shared_servers(&registry, &limits.times);
    build.mind_names(&registry);
    build.mind_lookalikes(&registry);
    build.mind_unknown_tenants(&registry, &tenants_of_issuers);
    build.mind_databases_in_clear(&registry);
    if known.needs_tokens && registry.snapshot().has_aliases() {
        build.warn("registry.file", WORDS);
    }
    build.mind_listeners(&registry, &listeners);
    Ok(Config {
        listeners,
        verifier,
        registry,
        denied,
        max_staleness: raw.registry.max_staleness.map(|staleness| staleness.0),
        regions,
        openbao,
        lease: LeaseRules { grace, end_at_expiry },
        limits,
        warm,
        admin,
        log,
        audit,
        cores,
        warnings: build.warnings,
    })
}

/// Whether both cannot be bound at once. An address that stands for all of them is none of IPv6 alone.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let all_of = |all: SocketAddr, single: SocketAddr| {
        all.ip().is_unspecified() && (all.is_ipv6() || single.is_ipv4())
    };
    let chosen_by_the_system = one.port() == 0;
    !chosen_by_the_system
        && one.port() == other.port()
        && (one.ip() == other.ip() || all_of(one, other) || all_of(other, one))
}

struct Build<'a> {
    file: &'a TomlFile,
    warnings: Vec<String>,
}

impl Build<'_> {
    fn wrong<T>(&self, field: impl AsRef<str>, what: impl Display) -> Result<T, FileError> {
        Err(self.file.wrong(field.as_ref(), what))
    }

    fn warn(&mut self, field: impl AsRef<str>, what: impl Display) {
        self.warnings.push(self.file.wrong(field.as_ref(), what).to_string());
    }

    /// The file is read again at each login; that it cannot be read should be known now.
    fn secret_file(&mut self, field: &str, path: &Path) -> Result<PathBuf, FileError> {
        let path = self.file.resolve(path);
        let secret = Zeroizing::new(self.read(field, &path, MAX_SECRET)?);
        if secret.trim_ascii().is_empty() {
            return self.wrong(field, format_args!("{path:?} is empty; it must hold the secret"));
        }
        self.mind_readers(field, &path);
        Ok(path)
    }

    fn mind_readers(&mut self, field: &str, path: &Path) {
        let mode = std::fs::metadata(path).map(|file| file.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o004 != 0) {
            self.warn(field, format_args!("{path:?} can be read by every user; use chmod 600"));
        }
    }

    fn read(&self, field: &str, path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
        file::read(path, limit)
            .or_else(|error| self.wrong(field, format_args!("cannot read {path:?}: {error}")))
    }

    fn denied(
        &self,
        raw: Option<PathBuf>,
        issuers: HashSet<String>,
    ) -> Result<Option<Denied>, FileError> {
        let Some(path) = raw.map(|path| self.file.resolve(&path)) else { return Ok(None) };
        Denied::open(&path, issuers).map(Some).map_err(|error| match error.line() {
            None => self.file.wrong("registry.denied", error),
            Some(_) => error,
        })
    }

    fn limits(&self, raw: &RawLimits) -> Result<Limits, FileError> {
        if raw.login_timeout.0.is_zero() {
            return self
                .wrong("limits.login_timeout", "zero; a login needs some time, such as \"10s\"");
        }
        if raw.startup_timeout.0.is_zero() {
            return self.wrong(
                "limits.startup_timeout",
                "zero; a startup packet needs some time, such as \"5s\"",
            );
        }
        for (key, bound) in
            [("max_handshakes", raw.max_handshakes), ("max_sessions", raw.max_sessions)]
        {
            self.check_bound(format!("limits.{key}"), bound)?;
        }
        if raw.max_handshakes == 0 {
            return self.wrong("limits.max_handshakes", "zero; nobody could log in");
        }
        if raw.max_sessions == 0 {
            return self.wrong("limits.max_sessions", "zero; nobody could log in");
        }
        if !(1..=MAX_TOKEN_BYTES).contains(&raw.max_token_bytes) {
            return self.wrong(
                "limits.max_token_bytes",
                format_args!("{} is out of range; use 1 to {MAX_TOKEN_BYTES}", raw.max_token_bytes),
            );
        }
        if !(MIN_DEAD_PEER..=MAX_DEAD_PEER).contains(&raw.dead_peer_timeout.0) {
            return self.wrong(
                "limits.dead_peer_timeout",
                format_args!("{:?} is out of range; use 5s to 30m", raw.dead_peer_timeout.0),
            );
        }
        let bound = |limit: usize| (limit > 0).then_some(limit);
        Ok(Limits {
            login_timeout: raw.login_timeout.0,
            startup_timeout: raw.startup_timeout.0,
            max_handshakes: raw.max_handshakes,
            max_sessions: raw.max_sessions,
            max_sessions_per_tenant: bound(raw.max_sessions_per_tenant),
            max_connections_per_address: bound(raw.max_connections_per_address),
            max_token_bytes: raw.max_token_bytes,
            times: TimeLimits {
                idle: not_zero(raw.idle_timeout.0),
                idle_in_transaction: not_zero(raw.idle_in_transaction_timeout.0),
                transaction: not_zero(raw.transaction_timeout.0),
                session: not_zero(raw.max_session_age.0),
            },
            drain_timeout: raw.drain_timeout.0,
            dead_peer_timeout: raw.dead_peer_timeout.0,
        })
    }

    /// A transaction can hold what is the whole server's, and only pgsilo's bound on it is not the
    /// session's to lift.
    fn mind_shared_servers(&mut self, registry: &Registry, times: &TimeLimits) {
        let mut servers = BTreeMap::<String, (usize, bool)>::new();
        for tenant in registry.snapshot().tenants() {
            let server =
                servers.entry(tenant.placement().host.comparable().to_string()).or_default();
            server.0 += 1;
            server.1 |= tenant.limits().times(times).transaction.is_none();
        }
        servers.retain(|_, (tenants, unbounded)| *tenants > 1 && *unbounded);
        if let Some((server, (tenants, _))) =
            servers.iter().max_by_key(|(_, (tenants, _))| *tenants)
        {
            let what = format!(
                "not set for every tenant, and tenants share servers ({tenants} share {server}): one \
                 tenant's transaction can hold what all need, for as long as its token lasts"
            );
            self.warn("limits.transaction_timeout", what);
        }
    }

    /// What a tenant's sessions ask and read can be read on the way to its database, and changed.
    fn mind_databases_in_clear(&mut self, registry: &Registry) {
        let in_clear = |tenant: &&Arc<Tenant>| {
            let Placement { host, tls, .. } = tenant.placement();
            matches!(tls, PlacementTls::Disable)
                && matches!(host, Host::Tcp { host, .. } if !is_loopback(host))
        };
        let snapshot = registry.snapshot();
        let count = snapshot.tenants().filter(in_clear).count();
        let first = snapshot.tenants().filter(in_clear).min_by_key(|tenant| tenant.id().as_str());
        if let Some(tenant) = first {
            let what = format!(
                "{count} of its tenants' databases are reached in clear over a network (tenant {:?} at \
                 {}): what passes can be read and changed on the way",
                tenant.id().as_str(),
                tenant.placement().host,
            );
            self.warn("registry.file", what);
        }
    }

    fn check_admin(
        &self,
        admin: Option<SocketAddr>,
        listeners: &[Listener],
    ) -> Result<(), FileError> {
        let taken = |listener: &&Listener| match (&listener.place, admin) {
            (Place::Tcp(address), Some(admin)) => collide(*address, admin),
            (Place::Tcp(_) | Place::Unix { .. }, _) => false,
        };
        match listeners.iter().find(taken) {
            Some(_) => self.wrong("admin.address", "a listener has it; choose another port"),
            None => Ok(()),
        }
    }

    fn check_bound(&self, field: String, bound: usize) -> Result<(), FileError> {
        match bound > MAX_BOUND {
            true => self.wrong(field, format_args!("{bound} is out of range; at most {MAX_BOUND}")),
            false => Ok(()),
        }
    }

    fn warm(&self, raw: &RawWarm, backend: &RawBackend) -> Result<Warm, FileError> {
        for (key, bound) in [("max", raw.max), ("max_per_tenant", raw.max_per_tenant)] {
            self.check_bound(format!("warm.{key}"), bound)?;
        }
        if raw.max_per_tenant == 0 {
            return self.wrong("warm.max_per_tenant", "zero; for none at all, set warm.max to 0");
        }
        if !(MIN_WARM..=MAX_WARM).contains(&raw.idle_timeout.0) {
            return self.wrong(
                "warm.idle_timeout",
                format_args!("{:?} is out of range; use 1s to 10m", raw.idle_timeout.0),
            );
        }
        let reuse = (backend.reuse == RawReuse::Reset).then_some(backend.max_age.0);
        if reuse.is_some() && raw.max == 0 {
            return self.wrong(
                "backend.reuse",
                "\"reset\", but warm.max is 0; give the connections a place to wait in",
            );
        }
        if reuse.is_some_and(|max_age| max_age.is_zero()) {
            return self.wrong("backend.max_age", "zero; nothing could be used again");
        }
        if raw.check_after.0 > raw.idle_timeout.0 {
            return self.wrong(
                "warm.check_after",
                format_args!("{:?} is longer than idle_timeout", raw.check_after.0),
            );
        }
        Ok(Warm {
            check_after: raw.check_after.0,
            max: raw.max,
            max_per_tenant: raw.max_per_tenant,
            idle_timeout: raw.idle_timeout.0,
            reuse,
        })
    }

    fn regions(&self, raw: Option<Vec<String>>) -> Result<Option<BTreeSet<String>>, FileError> {
        match raw {
            Some(regions) if regions.is_empty() || regions.iter().any(String::is_empty) => self
                .wrong("registry.regions", "empty; name each region, or leave the key out for any"),
            regions => Ok(regions.map(|regions| regions.into_iter().collect())),
        }
    }

    fn cores(&self, raw: &RawRuntime) -> Result<usize, FileError> {
        match raw.cores {
            0 => Ok(std::thread::available_parallelism().map_or(1, NonZeroUsize::get)),
            cores if cores <= MAX_CORES => Ok(cores),
            cores => self.wrong(
                "runtime.cores",
                format_args!("{cores} is out of range; use 0 to {MAX_CORES}"),
            ),
        }
    }

    fn log(&self, raw: &RawLog) -> Result<Log, FileError> {
        let format = match raw.format {
            RawFormat::Json => LogFormat::Json,
            RawFormat::Human => LogFormat::Human,
        };
        let level = match raw.level {
            RawLevel::Error => tracing::Level::ERROR,
            RawLevel::Warn => tracing::Level::WARN,
            RawLevel::Info => tracing::Level::INFO,
            RawLevel::Debug => tracing::Level::DEBUG,
            RawLevel::Trace => tracing::Level::TRACE,
        };
        self.check_queue("log.queue_bytes", raw.queue_bytes)?;
        Ok(Log { format, level, queue_bytes: raw.queue_bytes })
    }

    fn audit(&self, raw: &RawAudit) -> Result<Audit, FileError> {
        let on_loss = match raw.on_loss {
            RawOnLoss::Count => OnLoss::Count,
            RawOnLoss::Refuse => OnLoss::Refuse,
        };
        self.check_queue("audit.queue_bytes", raw.queue_bytes)?;
        Ok(Audit { on_loss, queue_bytes: raw.queue_bytes })
    }

    fn check_queue(&self, field: &str, bytes: usize) -> Result<(), FileError> {
        let (least, most) = (QUEUE_BYTES.start(), QUEUE_BYTES.end());
        match QUEUE_BYTES.contains(&bytes) {
            true => Ok(()),
            false => {
                self.wrong(field, format_args!("{bytes} is out of range; use {least} to {most}"))
            }
        }
    }
}
