//! From the schema to values: everything that the file says is checked, and what is unwise becomes
//! a warning. The first error ends it.

mod issuers;
mod listeners;
mod openbao;
mod proofs;
mod registry;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgsilo_core::file::{self, MAX_CONFIGURATION, MAX_SECRET};
use pgsilo_core::limits::not_zero;
use pgsilo_core::toml_file::TomlFile;
use zeroize::Zeroizing;

use self::proofs::Known;
use super::raw::{
    Raw, RawAudit, RawAuthority, RawFormat, RawLevel, RawLimits, RawLog, RawOnLoss, RawPool,
    RawReuse, RawRuntime, RawStaleSessions,
};
use super::{
    AuditSettings, Config, EndingRules, FileError, Limits, ListenAddress, ListenerSettings,
    LogFormat, LogSettings, OnLoss, PoolSettings, ProxySettings, RegistrySettings, TimeLimits,
};
use crate::token::MAX_TOKEN_BYTES;

/// More connections than any machine has ports and memory for are a typing error.
const MAX_BOUND: usize = 10_000_000;
/// More event loops than any machine has cores is a typing error.
const MAX_CORES: usize = 1024;

/// Of lines that wait to be written. Less is what the pipe behind it holds anyway; more is a typing
/// error.
const QUEUE_BYTES: std::ops::RangeInclusive<usize> = 64 * 1024..=1024 * 1024 * 1024;
/// In less, a network that is rebuilt loses sessions.
const MIN_DEAD_PEER: Duration = Duration::from_secs(5);
/// No network outage that a session survives is longer.
const MAX_DEAD_PEER: Duration = Duration::from_secs(1800);

/// With less, idle connections are closed before the next session arrives.
const MIN_POOL_IDLE: Duration = Duration::from_secs(1);
/// With more, too much may have changed since an idle connection's login.
const MAX_POOL_IDLE: Duration = Duration::from_secs(600);

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
    let issuers = build.issuers(raw.issuer)?;
    let grace = raw.lease.grace.0;
    let end_at_expiry = raw.lease.end_at_expiry;
    let end_when_stale = raw.registry.stale_sessions == RawStaleSessions::End;
    if end_when_stale && raw.registry.max_staleness.is_none() {
        let what = "\"end\", and nothing says when the registry is too old; add max_staleness";
        return build.wrong("registry.stale_sessions", what);
    }
    if end_when_stale && raw.registry.max_staleness.as_ref().is_some_and(|max| max.0 < A_FAILOVER) {
        let what = "shorter than a failover of the registry's database may take, and \"end\": all sessions end with it";
        build.warn("registry.max_staleness", what);
    }
    let (openbao, lease) = build.openbao(raw.openbao, raw.lease, raw.limits.max_sessions)?;
    let limits = build.limits(&raw.limits)?;
    let pool = build.pool(&raw.pool)?;
    if pool.reuse.is_some() && lease.window.is_some() {
        return build.wrong("pool.reuse", WINDOWS);
    }
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
    let registry = build.registry(raw.registry.file, raw.registry.postgres, &lease)?;
    if let RegistrySettings::File(_) = registry
        && let Some(index) = issuers.iter().position(|issuer| issuer.needs_grant)
    {
        let what = "\"grant\", and a file has no grants: it needs [registry] postgres";
        return build.wrong(format!("issuer[{index}].authorization"), what);
    }
    let denied = raw.registry.denied.map(|path| file.resolve(&path));
    let warnings = build.warnings;
    Ok(Config {
        listeners,
        issuers,
        registry,
        denied,
        proxy: ProxySettings {
            limits,
            endings: EndingRules { grace, end_at_expiry, end_when_stale },
            regions,
            max_staleness: raw.registry.max_staleness.map(|staleness| staleness.0),
            audit,
            pool,
            lease,
        },
        openbao,
        admin,
        log,
        cores,
        warnings,
        file,
    })
}

/// What a failover of a database may well take.
const A_FAILOVER: Duration = Duration::from_secs(60);

/// A window's credential is one subject's.
const WINDOWS: &str = "\"reset\" would give the credential of one subject's window to others; keep this or \
                       lease.scope = \"window\"";

/// Whether both cannot be bound at once, as far as names tell.
fn collide(one: &ListenAddress, other: &ListenAddress) -> bool {
    match (one, other) {
        (ListenAddress::Tcp(one), ListenAddress::Tcp(other)) => addresses_collide(*one, *other),
        // Neither `//` nor `/./` is another folder.
        (ListenAddress::Unix { path: one, .. }, ListenAddress::Unix { path: other, .. }) => {
            one.components().eq(other.components())
        }
        (ListenAddress::Tcp(_), ListenAddress::Unix { .. })
        | (ListenAddress::Unix { .. }, ListenAddress::Tcp(_)) => false,
    }
}

/// Whether both cannot be bound at once. An address that stands for all of them is none of IPv6
/// alone.
fn addresses_collide(one: SocketAddr, other: SocketAddr) -> bool {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (one, other) = (canonical(one), canonical(other));
    let all_of = |all: SocketAddr, single: SocketAddr| {
        all.ip().is_unspecified() && (all.is_ipv6() || single.is_ipv4())
    };
    let chosen_by_the_system = one.port() == 0;
    !chosen_by_the_system
        && one.port() == other.port()
        && (one.ip() == other.ip() || all_of(one, other) || all_of(other, one))
}

pub(super) struct Build<'a> {
    pub(super) file: &'a TomlFile,
    pub(super) warnings: Vec<String>,
}

impl Build<'_> {
    pub(super) fn wrong<T>(
        &self,
        field: impl AsRef<str>,
        what: impl Display,
    ) -> Result<T, FileError> {
        Err(self.file.wrong(field.as_ref(), what))
    }

    pub(super) fn warn(&mut self, field: impl AsRef<str>, what: impl Display) {
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

    pub(super) fn mind_readers(&mut self, field: &str, path: &Path) {
        let mode = std::fs::metadata(path).map(|file| file.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o004 != 0) {
            self.warn(field, format_args!("{path:?} can be read by every user; use chmod 600"));
        }
    }

    fn read(&self, field: &str, path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
        file::read(path, limit)
            .or_else(|error| self.wrong(field, format_args!("cannot read {path:?}: {error}")))
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
            return self.wrong("limits.max_handshakes", "zero; no client could log in");
        }
        if raw.max_sessions == 0 {
            return self.wrong("limits.max_sessions", "zero; no client could log in");
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
        let rate = raw.max_session_rate_per_tenant;
        Ok(Limits {
            login_timeout: raw.login_timeout.0,
            startup_timeout: raw.startup_timeout.0,
            max_handshakes: raw.max_handshakes,
            max_sessions: raw.max_sessions,
            max_sessions_per_tenant: bound(raw.max_sessions_per_tenant),
            max_session_rate_per_tenant: (rate > 0).then_some(rate),
            max_connections_per_address: bound(raw.max_connections_per_address),
            max_token_bytes: raw.max_token_bytes,
            times: TimeLimits {
                idle: not_zero(raw.idle_timeout.0),
                idle_in_transaction: not_zero(raw.idle_in_transaction_timeout.0),
                transaction: not_zero(raw.transaction_timeout.0),
                session: not_zero(raw.max_session_age.0),
            },
            drain_timeout: raw.drain_timeout.0,
            pause_timeout: raw.pause_timeout.0,
            dead_peer_timeout: raw.dead_peer_timeout.0,
        })
    }

    fn check_admin(
        &self,
        admin: Option<SocketAddr>,
        listeners: &[ListenerSettings],
    ) -> Result<(), FileError> {
        let admin = admin.map(ListenAddress::Tcp);
        let taken = |listener: &ListenerSettings| {
            admin.as_ref().is_some_and(|admin| collide(&listener.place, admin))
        };
        match listeners.iter().any(taken) {
            true => self.wrong("admin.address", "a listener has it; choose another port"),
            false => Ok(()),
        }
    }

    fn check_bound(&self, field: String, bound: usize) -> Result<(), FileError> {
        match bound > MAX_BOUND {
            true => self.wrong(field, format_args!("{bound} is out of range; at most {MAX_BOUND}")),
            false => Ok(()),
        }
    }

    fn pool(&self, raw: &RawPool) -> Result<PoolSettings, FileError> {
        let limits = [("max_idle", raw.max_idle), ("max_idle_per_tenant", raw.max_idle_per_tenant)];
        for (key, bound) in limits {
            self.check_bound(format!("pool.{key}"), bound)?;
        }
        if raw.max_idle_per_tenant == 0 {
            return self.wrong(
                "pool.max_idle_per_tenant",
                "zero; for no pool at all, set pool.max_idle to 0",
            );
        }
        if !(MIN_POOL_IDLE..=MAX_POOL_IDLE).contains(&raw.idle_timeout.0) {
            return self.wrong(
                "pool.idle_timeout",
                format_args!("{:?} is out of range; use 1s to 10m", raw.idle_timeout.0),
            );
        }
        let reuse = (raw.reuse == RawReuse::Reset).then_some(raw.max_lifetime.0);
        if reuse.is_some() && raw.max_idle == 0 {
            return self.wrong(
                "pool.reuse",
                "\"reset\", but pool.max_idle is 0; no connection could be kept",
            );
        }
        if reuse.is_some_and(|max_lifetime| max_lifetime.is_zero()) {
            return self.wrong("pool.max_lifetime", "zero; no connection could be reused");
        }
        if raw.check_delay.0 > raw.idle_timeout.0 {
            return self.wrong(
                "pool.check_delay",
                format_args!("{:?} is longer than idle_timeout", raw.check_delay.0),
            );
        }
        Ok(PoolSettings {
            max_idle: raw.max_idle,
            max_idle_per_tenant: raw.max_idle_per_tenant,
            idle_timeout: raw.idle_timeout.0,
            check_delay: raw.check_delay.0,
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

    fn log(&self, raw: &RawLog) -> Result<LogSettings, FileError> {
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
        Ok(LogSettings { format, level, queue_bytes: raw.queue_bytes })
    }

    fn audit(&self, raw: &RawAudit) -> Result<AuditSettings, FileError> {
        let on_loss = match raw.on_loss {
            RawOnLoss::Count => OnLoss::Count,
            RawOnLoss::Refuse => OnLoss::Refuse,
        };
        self.check_queue("audit.queue_bytes", raw.queue_bytes)?;
        Ok(AuditSettings { on_loss, queue_bytes: raw.queue_bytes })
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
