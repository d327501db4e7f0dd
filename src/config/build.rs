//! From the schema to ready objects: everything that the file names is read, everything
//! that it says is checked, and whatever is unwise becomes a warning. The first error
//! ends it.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Display;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroize::Zeroizing;

use super::raw::{
    Raw, RawAuth, RawFormat, RawIssuer, RawLevel, RawLimits, RawListener, RawListenerTls, RawLog,
    RawOpenbao, RawRuntime,
};
use super::{Config, FileError, Limits, Listener, Log, LogFormat};
use crate::lease;
use crate::registry::Registry;
use crate::tls;
use crate::token::{
    Algorithm, ClaimPath, Issuer, IssuerFault, Key, KeySet, MAX_TOKEN_BYTES, Verifier,
};
use crate::toml_file::TomlFile;

/// What fits into `sockaddr_un` on Linux, its NUL included.
const MAX_SOCKET_PATH: usize = 108;

/// More event loops than any machine has cores is a typing error.
const MAX_CORES: usize = 1024;

pub(super) fn load(path: &Path) -> Result<Config, FileError> {
    let file = TomlFile::read(path)?;
    let raw: Raw = file.parse()?;
    let mut build = Build {
        file: &file,
        warnings: Vec::new(),
    };
    let listeners = build.listeners(raw.listener)?;
    let verifier = build.verifier(raw.issuer)?;
    let openbao = build.openbao(raw.openbao)?;
    let limits = build.limits(&raw.limits)?;
    let regions = build.regions(raw.registry.regions)?;
    let cores = build.cores(&raw.runtime)?;
    let admin = raw.admin.map(|admin| admin.address.0);
    if admin.is_some_and(|address| !address.ip().is_loopback()) {
        build.warn(
            "admin.address",
            "not a loopback address: anybody who reaches it can read the metrics",
        );
    }
    // Last: it is the file that can be large.
    let registry = Registry::open(&file.resolve(&raw.registry.file)).map_err(|error| {
        // A registry that cannot be read is this file's error; one with errors is its own.
        match error.line() {
            None => file.wrong("registry.file", error),
            Some(_) => error,
        }
    })?;
    Ok(Config {
        listeners,
        verifier,
        registry,
        max_staleness: raw.registry.max_staleness.map(|staleness| staleness.0),
        regions,
        openbao,
        limits,
        admin,
        log: log(&raw.log),
        cores,
        warnings: build.warnings,
    })
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
        self.warnings
            .push(self.file.wrong(field.as_ref(), what).to_string());
    }

    fn listeners(&mut self, raw: Vec<RawListener>) -> Result<Vec<Listener>, FileError> {
        if raw.is_empty() {
            return self.wrong("listener", "there is none; add a [[listener]] table");
        }
        let mut listeners = Vec::with_capacity(raw.len());
        let mut places = HashSet::new();
        for (index, raw) in raw.into_iter().enumerate() {
            let at = format!("listener[{index}]");
            let listener = match (&raw.address, &raw.socket) {
                (Some(_), Some(_)) => {
                    return self.wrong(
                        at,
                        "both address and socket; give each its own [[listener]]",
                    );
                }
                (None, None) => return self.wrong(at, "neither address nor socket; add one"),
                (Some(_), None) => self.tcp(&at, raw)?,
                (None, Some(_)) => self.unix(&at, raw)?,
            };
            let (field, place, chosen) = match &listener {
                Listener::Tcp { address, .. } => {
                    ("address", address.to_string(), address.port() == 0)
                }
                Listener::Unix { path, .. } => ("socket", path.display().to_string(), false),
            };
            if !chosen && !places.insert(place) {
                return self.wrong(format!("{at}.{field}"), "another listener has it already");
            }
            listeners.push(listener);
        }
        Ok(listeners)
    }

    fn tcp(&mut self, at: &str, raw: RawListener) -> Result<Listener, FileError> {
        if raw.mode.is_some() {
            return self.wrong(
                format!("{at}.mode"),
                "only a Unix socket has a mode; remove it",
            );
        }
        let Some(address) = raw.address.map(|address| address.0) else {
            return self.wrong(at, "neither address nor socket; add one");
        };
        let (tls, require_tls) = match (raw.tls, raw.plaintext, raw.require_tls) {
            (Some(_), true, _) => return self.wrong(format!("{at}.plaintext"), "both tls and plaintext = true; keep one (require_tls = false lets clients choose)"),
            (None, false, _) => return self.wrong(at, "no tls; add tls = { certificate = FILE, key = FILE }, or plaintext = true if tokens may travel in clear"),
            (None, true, Some(_)) => return self.wrong(format!("{at}.require_tls"), "there is no tls to require; remove it"),
            (None, true, None) => (None, false),
            (Some(files), false, required) => {
                (Some(self.listener_tls(at, &files)?), required.unwrap_or(true))
            }
        };
        if !require_tls && !address.ip().is_loopback() {
            let field = if tls.is_some() {
                "require_tls"
            } else {
                "plaintext"
            };
            self.warn(
                format!("{at}.{field}"),
                "tokens may travel in clear over a network: anybody on the way can use them",
            );
        }
        Ok(Listener::Tcp {
            address,
            tls,
            require_tls,
        })
    }

    fn listener_tls(
        &mut self,
        at: &str,
        raw: &RawListenerTls,
    ) -> Result<std::sync::Arc<rustls::ServerConfig>, FileError> {
        let certificate = self.file.resolve(&raw.certificate);
        let key = self.file.resolve(&raw.key);
        let made = tls::server(&certificate, &key).or_else(|error| {
            let field = if error.file() == Some(&key) {
                "key"
            } else {
                "certificate"
            };
            self.wrong(format!("{at}.tls.{field}"), error)
        })?;
        self.mind_readers(&format!("{at}.tls.key"), &key);
        Ok(made)
    }

    fn unix(&mut self, at: &str, raw: RawListener) -> Result<Listener, FileError> {
        for (present, key) in [
            (raw.tls.is_some(), "tls"),
            (raw.require_tls.is_some(), "require_tls"),
            (raw.plaintext, "plaintext"),
        ] {
            if present {
                return self.wrong(
                    format!("{at}.{key}"),
                    "only a TCP listener has it; remove it",
                );
            }
        }
        let path = self.file.resolve(&raw.socket.unwrap_or_default());
        if path.as_os_str().len() >= MAX_SOCKET_PATH {
            return self.wrong(
                format!("{at}.socket"),
                format_args!(
                    "longer than a socket's path can be ({} bytes)",
                    MAX_SOCKET_PATH - 1
                ),
            );
        }
        Ok(Listener::Unix {
            path,
            mode: raw.mode.map_or(0o660, |mode| mode.0.0),
        })
    }

    fn verifier(&mut self, raw: Vec<RawIssuer>) -> Result<Verifier, FileError> {
        if raw.is_empty() {
            return self.wrong("issuer", "there is none; add an [[issuer]] table");
        }
        let mut issuers = Vec::with_capacity(raw.len());
        let mut sources = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            sources.push(if raw.jwks.is_some() { "jwks" } else { "keys" });
            issuers.push(self.issuer(&format!("issuer[{index}]"), raw)?);
        }
        Verifier::new(issuers).or_else(|error| {
            let field = match error.fault {
                IssuerFault::Unnamed | IssuerFault::Duplicate => "issuer",
                IssuerFault::NoAudience => "audience",
                IssuerFault::NoAlgorithms | IssuerFault::NoKey => "algorithms",
                IssuerFault::DuplicateKey(_) => sources[error.issuer],
                IssuerFault::Leeway => "leeway",
            };
            self.wrong(format!("issuer[{}].{field}", error.issuer), error)
        })
    }

    fn issuer(&mut self, at: &str, raw: RawIssuer) -> Result<Issuer, FileError> {
        let mut algorithms = Vec::with_capacity(raw.algorithms.len());
        for (index, name) in raw.algorithms.iter().enumerate() {
            algorithms.push(self.algorithm(&format!("{at}.algorithms[{index}]"), name)?);
        }
        let keys = self.keys(at, &raw)?;
        let source = if raw.jwks.is_some() { "jwks" } else { "keys" };
        for key in &keys {
            let id = key.id().unwrap_or_default();
            if key.id().is_none() && keys.len() > 1 {
                self.warn(
                    format!("{at}.{source}"),
                    "a key without kid beside others is never chosen",
                );
            } else if !key
                .algorithms()
                .iter()
                .any(|algorithm| algorithms.contains(algorithm))
            {
                self.warn(
                    format!("{at}.{source}"),
                    format_args!(
                        "the key with the kid {id:?} fits none of `algorithms` and is never used"
                    ),
                );
            }
        }
        let claim = |key: &str, text: &str| {
            let wrong = |error| {
                self.file
                    .wrong(&format!("{at}.{key}"), format_args!("{text:?} is {error}"))
            };
            ClaimPath::parse(text).map_err(wrong)
        };
        Ok(Issuer {
            tenant_claim: claim("tenant_claim", &raw.tenant_claim)?,
            access_claim: claim("access_claim", &raw.access_claim)?,
            default_access: raw.default_access.parse().or_else(|error| {
                self.wrong(
                    format!("{at}.default_access"),
                    format_args!("{:?} is not one: {error}", raw.default_access),
                )
            })?,
            issuer: raw.issuer,
            audience: raw.audience,
            algorithms,
            keys,
            leeway: raw.leeway.0,
        })
    }

    fn algorithm(&self, field: &str, name: &str) -> Result<Algorithm, FileError> {
        name.parse()
            .or_else(|error| self.wrong(field, format_args!("{name:?} is {error}")))
    }

    fn keys(&mut self, at: &str, raw: &RawIssuer) -> Result<Vec<Key>, FileError> {
        match (&raw.jwks, &raw.keys) {
            (Some(_), Some(_)) => self.wrong(format!("{at}.keys"), "both jwks and keys; keep one"),
            (None, None) => self.wrong(at, "no keys; add jwks = FILE, or keys = [...]"),
            (Some(path), None) => {
                let field = format!("{at}.jwks");
                let path = self.file.resolve(path);
                let set = KeySet::from_jwks(&self.read(&field, &path)?)
                    .or_else(|error| self.wrong(&field, format_args!("{path:?}: {error}")))?;
                for warning in set.warnings {
                    self.warn(&field, format_args!("{path:?}: {warning}"));
                }
                Ok(set.keys)
            }
            (None, Some(listed)) if listed.is_empty() => {
                self.wrong(format!("{at}.keys"), "empty; list at least one key")
            }
            (None, Some(listed)) => {
                let mut keys = Vec::with_capacity(listed.len());
                for (index, key) in listed.iter().enumerate() {
                    let at = format!("{at}.keys[{index}]");
                    if key.kid.is_empty() {
                        return self.wrong(
                            format!("{at}.kid"),
                            "empty; it must equal the token's `kid`",
                        );
                    }
                    let algorithm = self.algorithm(&format!("{at}.algorithm"), &key.algorithm)?;
                    let path = self.file.resolve(&key.pem);
                    let pem = self.read(&format!("{at}.pem"), &path)?;
                    let key = Key::from_pem(&key.kid, algorithm, &pem);
                    keys.push(key.or_else(|error| {
                        self.wrong(format!("{at}.pem"), format_args!("{path:?}: {error}"))
                    })?);
                }
                Ok(keys)
            }
        }
    }

    fn openbao(&mut self, raw: RawOpenbao) -> Result<lease::Settings, FileError> {
        let address = self.openbao_address(&raw.address)?;
        let ca = match raw.ca.map(|ca| self.file.resolve(&ca)) {
            Some(_) if address.starts_with("http:") => {
                return self.wrong(
                    "openbao.ca",
                    "http has no certificates; remove it or use https",
                );
            }
            Some(path) => {
                Some(tls::roots_pem(&path).or_else(|error| self.wrong("openbao.ca", error))?)
            }
            None => None,
        };
        if raw.timeout.0.is_zero() {
            return self.wrong(
                "openbao.timeout",
                "zero; a request needs some time, such as \"5s\"",
            );
        }
        if raw.max_concurrent_requests == 0 {
            return self.wrong(
                "openbao.max_concurrent_requests",
                "zero; no lease could be asked for",
            );
        }
        Ok(lease::Settings {
            address,
            ca,
            auth: self.openbao_auth(raw.auth)?,
            timeout: raw.timeout.0,
            max_concurrent_requests: raw.max_concurrent_requests,
        })
    }

    fn openbao_address(&self, text: &str) -> Result<String, FileError> {
        const FIELD: &str = "openbao.address";
        let Ok(url) = reqwest::Url::parse(text) else {
            return self.wrong(
                FIELD,
                format_args!("{text:?} is not a URL; write it like \"https://127.0.0.1:8200\""),
            );
        };
        // Not shown: it may hold a password.
        if !url.username().is_empty() || url.password().is_some() {
            return self.wrong(
                FIELD,
                "a URL with a user or a password; remove them and use openbao.auth",
            );
        }
        if url.query().is_some() || url.fragment().is_some() {
            return self.wrong(
                FIELD,
                format_args!("{text:?} has a query or a fragment; end it after the port"),
            );
        }
        let host = url.host_str().unwrap_or_default();
        match url.scheme() {
            "https" => {}
            "http" if is_loopback(host) => {}
            "http" => {
                return self.wrong(
                    FIELD,
                    format_args!(
                        "http to {host:?} would show credentials to the network; use https"
                    ),
                );
            }
            scheme => {
                return self.wrong(
                    FIELD,
                    format_args!("the scheme {scheme:?} is not supported; use https"),
                );
            }
        }
        Ok(text.trim_end_matches('/').to_owned())
    }

    fn openbao_auth(&mut self, raw: RawAuth) -> Result<lease::Auth, FileError> {
        match (raw.approle, raw.token_file) {
            (Some(_), Some(_)) => {
                self.wrong("openbao.auth", "both approle and token_file; keep one")
            }
            (None, None) => self.wrong("openbao.auth", "neither approle nor token_file; add one"),
            (Some(approle), None) => {
                if approle.role_id.is_empty() {
                    return self
                        .wrong("openbao.auth.approle.role_id", "empty; write the role's id");
                }
                let field = "openbao.auth.approle.secret_id_file";
                let secret_id_file = self.secret_file(field, &approle.secret_id_file)?;
                Ok(lease::Auth::AppRole {
                    role_id: approle.role_id,
                    secret_id_file,
                })
            }
            (None, Some(path)) => Ok(lease::Auth::TokenFile(
                self.secret_file("openbao.auth.token_file", &path)?,
            )),
        }
    }

    /// The file is read again at each login; that it cannot be read should be known now.
    fn secret_file(&mut self, field: &str, path: &Path) -> Result<PathBuf, FileError> {
        let path = self.file.resolve(path);
        let secret = Zeroizing::new(self.read(field, &path)?);
        if secret.trim_ascii().is_empty() {
            return self.wrong(
                field,
                format_args!("{path:?} is empty; it must hold the secret"),
            );
        }
        self.mind_readers(field, &path);
        Ok(path)
    }

    fn mind_readers(&mut self, field: &str, path: &Path) {
        let mode = std::fs::metadata(path).map(|file| file.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o004 != 0) {
            self.warn(
                field,
                format_args!("{path:?} can be read by every user; use chmod 600"),
            );
        }
    }

    fn read(&self, field: &str, path: &Path) -> Result<Vec<u8>, FileError> {
        std::fs::read(path)
            .or_else(|error| self.wrong(field, format_args!("cannot read {path:?}: {error}")))
    }

    fn limits(&self, raw: &RawLimits) -> Result<Limits, FileError> {
        if raw.login_timeout.0.is_zero() {
            return self.wrong(
                "limits.login_timeout",
                "zero; a login needs some time, such as \"10s\"",
            );
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
                format_args!(
                    "{} is out of range; use 1 to {MAX_TOKEN_BYTES}",
                    raw.max_token_bytes
                ),
            );
        }
        let bound = |limit: usize| (limit > 0).then_some(limit);
        Ok(Limits {
            login_timeout: raw.login_timeout.0,
            max_handshakes: raw.max_handshakes,
            max_sessions: raw.max_sessions,
            max_sessions_per_tenant: bound(raw.max_sessions_per_tenant),
            max_connections_per_address: bound(raw.max_connections_per_address),
            max_token_bytes: raw.max_token_bytes,
            idle_timeout: Some(raw.idle_timeout.0).filter(|idle| *idle > Duration::ZERO),
            drain_timeout: raw.drain_timeout.0,
        })
    }

    fn regions(&self, raw: Option<Vec<String>>) -> Result<Option<BTreeSet<String>>, FileError> {
        match raw {
            Some(regions) if regions.is_empty() || regions.iter().any(String::is_empty) => self
                .wrong(
                    "registry.regions",
                    "empty; name each region, or leave the key out for any",
                ),
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
}

/// By name only where the name cannot mean another machine.
fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn log(raw: &RawLog) -> Log {
    Log {
        format: match raw.format {
            RawFormat::Json => LogFormat::Json,
            RawFormat::Human => LogFormat::Human,
        },
        level: match raw.level {
            RawLevel::Error => tracing::Level::ERROR,
            RawLevel::Warn => tracing::Level::WARN,
            RawLevel::Info => tracing::Level::INFO,
            RawLevel::Debug => tracing::Level::DEBUG,
            RawLevel::Trace => tracing::Level::TRACE,
        },
    }
}
