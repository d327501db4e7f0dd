//! The control plane: `pgsiloctl` of the same build, run as an operator runs it, with a file of settings in
//! the sandbox's folder.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use pgsilo_core::names::Names;
use pgsilo_core::secret::Secret;
use pgsiloctl::provision::plan::Allowance;
use tokio::process::Command;

use crate::files;
use crate::login::Login;

/// What the sandbox's cluster is called in its registry.
pub(super) const CLUSTER: &str = "sandbox";
/// The registry's database, beside the tenants'.
pub(super) const REGISTRY: &str = "pgsilo_registry";

/// How `pgsiloctl` is run.
#[derive(Debug)]
pub(super) struct Control {
    program: PathBuf,
    dir: PathBuf,
    root_token: Secret,
    superuser: Option<Login>,
}

/// What its file of settings says.
#[derive(Debug)]
pub(super) struct Settings<'a> {
    pub(super) openbao: &'a str,
    /// Connections to the database of one tenant.
    pub(super) share: u16,
    pub(super) allow: &'a [Allowance],
}

impl Control {
    /// Makes OpenBAO ready.
    pub(super) async fn of_openbao(
        dir: &Path,
        root_token: &Secret,
        openbao: &str,
    ) -> Result<Control> {
        let program = std::env::current_exe().context("where this program is")?;
        let program = program.with_file_name("pgsiloctl");
        ensure!(
            files::is_program(&program),
            "{} is not there: build all programs (`cargo build --bins`)",
            program.display()
        );
        let control = Control {
            program,
            dir: dir.to_owned(),
            root_token: root_token.clone(),
            superuser: None,
        };
        for secret_id in ["secret-id", "provisioner.secret-id", "operator.secret-id"] {
            // Of another OpenBAO.
            files::remove(&dir.join(secret_id))?;
        }
        // Where the registry is going to be is not known yet, and not asked for.
        control.write_settings(&Settings { openbao, share: 90, allow: &[] }, 1)?;
        let secret_id = dir.join("secret-id");
        control
            .run(&["bootstrap", "openbao", "--proxy-secret-id", &secret_id.to_string_lossy()], &[])
            .await
            .context("making OpenBAO ready")?;
        Ok(control)
    }

    /// Makes the registry, and the cluster ready for tenants. `endpoint` is where leased roles are let in.
    pub(super) async fn of_cluster(
        &mut self,
        superuser: &Login,
        endpoint: &str,
        settings: &Settings<'_>,
    ) -> Result<()> {
        self.superuser = Some(superuser.clone());
        self.write_settings(settings, superuser.port)?;
        self.run(&["bootstrap", "registry"], &[]).await.context("making the registry")?;
        let openbao_endpoint = format!("{}:{}", superuser.host, superuser.port);
        let by_socket = ["--openbao-endpoint", &openbao_endpoint];
        let by_tcp = ["--tls", "disable"];
        let how = if endpoint.starts_with('/') { by_socket } else { by_tcp };
        self.run(&["bootstrap", "cluster", CLUSTER, "--endpoint", endpoint], &how)
            .await
            .context("making the cluster ready")
    }

    /// Makes a tenant that PostgreSQL calls by its id.
    pub(super) async fn create_tenant(&self, tenant: &Names) -> Result<()> {
        let id = tenant.id().as_str();
        self.run(&["tenant", "create", id, "--name", id], &["--reason", "the sandbox's"]).await
    }

    /// What the registry says, as a file.
    pub(super) async fn export(&self) -> Result<String> {
        self.ask(&["registry", "export"], &[]).await
    }

    fn write_settings(&self, settings: &Settings<'_>, port: u16) -> Result<()> {
        let Settings { openbao, share, allow } = settings;
        let allow: Vec<_> = allow
            .iter()
            .filter_map(|allowance| {
                Some(format!("{:?}", allowance.to_possible_value()?.get_name()))
            })
            .collect();
        let text = format!(
            r#"# Written by `pgsilo-sandbox` at each start. config/pgsiloctl.toml explains every key.

[openbao]
address = "{openbao}"
provisioner = {{ role_id = "pgsilo-provisioner", secret_id_file = "provisioner.secret-id" }}
operator = {{ role_id = "pgsilo-operator", secret_id_file = "operator.secret-id" }}

[registry]
endpoints = ["127.0.0.1:{port}"]
dbname = "{REGISTRY}"
tls = {{ mode = "disable" }}   # loopback, and the packaged server has no TLS
lease = {{ mount = "pgsilo-registry", role = "control" }}

[provision]
connections = {share}
allow = [{}]
"#,
            allow.join(", ")
        );
        files::write(&self.dir.join("pgsiloctl.toml"), &text)
    }

    async fn run(&self, arguments: &[&str], more: &[&str]) -> Result<()> {
        self.ask(arguments, more).await.map(drop)
    }

    /// What it says on stdout.
    async fn ask(&self, arguments: &[&str], more: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(more).stdin(Stdio::null()).kill_on_drop(true);
        for variable in ["PGSILO_REGISTRY_DSN", "PROVISIONER_DSN", "PROVISIONER_BAO_TOKEN"] {
            command.env_remove(variable);
        }
        command.env("PGSILOCTL_CONFIG", self.dir.join("pgsiloctl.toml"));
        command.env("BAO_TOKEN", self.root_token.expose_text()?);
        if let Some(Login { user, password, .. }) = &self.superuser {
            let dsn = format!("postgresql://{user}:{}@any", password.expose_text()?);
            command.env("PGSILO_ADMIN_DSN", dsn);
        }
        let output = command.output().await.context("running pgsiloctl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("pgsiloctl {} failed: {}", arguments.join(" "), said.trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
