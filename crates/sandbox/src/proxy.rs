//! The proxy as a child: its configuration, the registry, the start, and the wait for `readyz`.
//!
//! It gets what any proxy gets, written in the same files: the public half of the issuer's key,
//! where the registry is, and an AppRole. It is the `pgsilo` beside the running `pgsiloctl`, so
//! that both come from one build.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgsilo_core::names::Names;
use rustix::process::Signal;
use tokio::process::Command;

use crate::control::REGISTRY;
use crate::issuer::{AUDIENCE, ISSUER};
use crate::ports::{free_port, on_free_port};
use crate::process::{Part, Plan, Process, Processes};
use crate::{LogLevel, files};

/// What the proxy is told.
#[derive(Debug)]
pub(super) struct Options<'a> {
    pub(super) dir: &'a Path,
    /// Where its Unix socket goes; a short path, for `sun_path` holds about 100 bytes.
    pub(super) socket_dir: &'a Path,
    pub(super) port: Option<u16>,
    pub(super) log_level: LogLevel,
    /// Connections to a tenant's database.
    pub(super) share: u16,
    pub(super) openbao: &'a str,
    /// Where the registry's database is; `None`: it reads `tenants.toml`.
    pub(super) registry_port: Option<u16>,
}

/// Where the proxy is, or would be.
#[derive(Debug)]
pub(super) struct Proxy {
    /// `None`: told not to start it.
    pub(super) process: Option<Arc<Process>>,
    pub(super) port: u16,
    pub(super) admin: String,
}

impl Proxy {
    /// Writes its files and starts it.
    pub(super) async fn start(processes: &Processes, options: &Options<'_>) -> Result<Self> {
        let program = program()?;
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
        let (process, admin, port) = on_free_port(options.port, async |port| {
            let admin = write_config(options, port)?;
            let mut command = Command::new(&program);
            command.args(["serve", "--config"]).arg(options.dir.join("pgsilo.toml"));
            let process = processes.start(Plan {
                part: Part::Proxy,
                name: "pgsilo",
                command,
                log: options.dir.join("pgsilo.log"),
                stop: Signal::TERM,
                patience: Duration::from_secs(5),
            })?;
            let ready = process.meanwhile(ready(&http, &admin)).await;
            Ok((process, ready.map(|()| admin)))
        })
        .await?;
        Ok(Self { process: Some(process), port, admin })
    }

    /// Writes its files only, for somebody else to start it.
    pub(super) fn prepare(options: &Options<'_>) -> Result<Self> {
        let port = options.port.map_or_else(free_port, Ok)?;
        Ok(Self { process: None, port, admin: write_config(options, port)? })
    }
}

/// The `pgsilo` of the same build.
fn program() -> Result<PathBuf> {
    let program =
        std::env::current_exe().context("where this program is")?.with_file_name("pgsilo");
    ensure!(
        files::is_program(&program),
        "{} is not there: build both programs (`cargo build --bins`), or pass --without-proxy",
        program.display()
    );
    Ok(program)
}

/// Waits until `readyz` answers 200.
async fn ready(http: &reqwest::Client, admin: &str) -> Result<()> {
    let url = format!("http://{admin}/readyz");
    let poll = async {
        while !http.get(&url).send().await.is_ok_and(|answer| answer.status() == 200) {
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), poll)
        .await
        .with_context(|| format!("{url} did not answer 200 in 20 s"))
}

/// Writes `pgsilo.toml`; gives the address of its metrics and health.
fn write_config(options: &Options<'_>, port: u16) -> Result<String> {
    let admin = format!("127.0.0.1:{}", free_port()?);
    let text = config_text(options, port, &admin);
    files::write(&options.dir.join("pgsilo.toml"), &text)?;
    Ok(admin)
}

/// A tenant's sessions: what its database takes, less idle connections (`[pool]
/// max_idle_per_tenant`), those of its broker (OpenBAO's `max_open_connections`) and the audit.
fn sessions(share: u16) -> u16 {
    share.saturating_sub(4 + 4 + 2).max(1)
}

fn config_text(options: &Options<'_>, port: u16, admin: &str) -> String {
    let socket = options.socket_dir.join(format!(".s.PGSQL.{port}"));
    format!(
        r#"# Written by `pgsilo-sandbox` at each start. config/pgsilo.toml explains every key.

[[listener]]
address = "127.0.0.1:{port}"
tls = {{ certificate = "server.crt", key = "server.key" }}

[[listener]]
socket = {socket}
mode = "0600"

[[issuer]]
issuer = "{ISSUER}"
audience = ["{AUDIENCE}"]
algorithms = ["ES256"]
jwks = "jwks.json"
tenant_claim = "tenant"
access_claim = "access"
default_access = "read-write"

{registry}

[openbao]
address = "{openbao}"
auth = {{ approle = {{ role_id = "pgsilo", secret_id_file = "secret-id" }} }}

[limits]
max_sessions_per_tenant = {sessions}
transaction_timeout = "1h"
drain_timeout = "2s"

[admin]
address = "{admin}"

[log]
format = "json"
level = "{level}"
"#,
        socket = toml_text(&socket.to_string_lossy()),
        registry = registry_text(options.registry_port),
        openbao = options.openbao,
        sessions = sessions(options.share),
        level = options.log_level.as_str(),
    )
}

/// A `tenants.toml` as somebody writes it by hand.
pub(super) fn tenants_text(tenants: &[Names], postgres_host: &str, postgres_port: u16) -> String {
    let mut text = "# Written by `pgsilo-sandbox` at each start.\n".to_owned();
    let place = match postgres_host.starts_with('/') {
        true => {
            let socket = toml_text(&format!("{postgres_host}/.s.PGSQL.{postgres_port}"));
            format!("socket = {socket}   # pg_hba.conf admits leased roles here only")
        }
        false => format!(
            "host = \"{postgres_host}\"\nport = {postgres_port}\n\
             tls = {{ mode = \"disable\" }}   # loopback, and the packaged server has no TLS"
        ),
    };
    for tenant in tenants {
        text += &format!(
            r#"
[[tenant]]
id = "{id}"

[tenant.placement]
dbname = "{database}"
{place}

[tenant.lease]
mount = "{mount}"
roles = {{ read-write = "{rw}", read-only = "{ro}", migrate = "{migrate}" }}
"#,
            id = tenant.id().as_str(),
            database = tenant.database(),
            mount = tenant.mount(),
            rw = tenant.lease_role("rw"),
            ro = tenant.lease_role("ro"),
            migrate = tenant.lease_role("migrate"),
        );
    }
    text
}

fn registry_text(port: Option<u16>) -> String {
    match port {
        None => "[registry]\nfile = \"tenants.toml\"".to_owned(),
        Some(port) => format!(
            "[registry.postgres]\nendpoints = [\"127.0.0.1:{port}\"]\ndbname = \"{REGISTRY}\"\n\
             tls = {{ mode = \"disable\" }}   # loopback, and the packaged server has no TLS\n\
             lease = {{ mount = \"pgsilo-registry\", role = \"proxy\" }}"
        ),
    }
}

/// A TOML text with its quotes.
fn toml_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use pgsilo_core::tenant::TenantId;

    use super::*;

    #[test]
    fn the_files_are_toml_whatever_the_paths() {
        let options = Options {
            dir: Path::new("/x"),
            socket_dir: Path::new("/tmp/a \"b\\c"),
            port: None,
            log_level: LogLevel::Info,
            share: 7,
            openbao: "http://127.0.0.1:8200",
            registry_port: None,
        };
        let config: toml::Table = config_text(&options, 6432, "127.0.0.1:9").parse().unwrap();
        let socket = config["listener"][1]["socket"].as_str();
        assert_eq!(socket, Some("/tmp/a \"b\\c/.s.PGSQL.6432"));
        assert_eq!(config["registry"]["file"].as_str(), Some("tenants.toml"));
        let options = Options { registry_port: Some(5432), ..options };
        let config: toml::Table = config_text(&options, 6432, "127.0.0.1:9").parse().unwrap();
        assert_eq!(config["registry"]["postgres"]["dbname"].as_str(), Some(REGISTRY));
        let tenants = [Names::of(&TenantId::parse("acme").unwrap())];
        let registry: toml::Table = tenants_text(&tenants, "/a \"b", 5432).parse().unwrap();
        let socket = registry["tenant"][0]["placement"]["socket"].as_str();
        assert_eq!(socket, Some("/a \"b/.s.PGSQL.5432"));
        let registry: toml::Table = tenants_text(&tenants, "127.0.0.1", 5432).parse().unwrap();
        assert_eq!(registry["tenant"][0]["placement"]["dbname"].as_str(), Some("tenant_acme"));
        assert_eq!(
            registry["tenant"][0]["lease"]["roles"]["migrate"].as_str(),
            Some("tenant-acme-migrate")
        );
    }
}
