//! A real OpenBAO server with what pgsilo needs of it, and nothing of the dev mode.
//!
//! It is initialized, unsealed and set up over its API like any server: the dev mode would
//! start a little sooner but keep a well-known shape (a chosen root token, its own mounts) that
//! no real deployment has. Its storage is memory, because nothing in it must survive. What is in it
//! `pgsiloctl` makes, but for the logins of sessions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::files;
use crate::issuer::ISSUER;
use crate::ports::on_free_port;
use crate::process::{Part, Plan, Process, Processes};
use pgsilo_core::secret::Secret;
use pgsilo_openbao::requests::{CreateOrphanTokenRequest, EnableAuthRequest, SetPolicy};
use pgsilo_openbao::{Client, Settings};

/// What a session's own JWT must say to log in, for each kind of access.
const SESSION_ROLE: &str = include_str!("../../../docker/openbao/pgsilo-session-role.json");
/// The policy of a session's own token, for each kind of access.
const SESSION_POLICY: &str = include_str!("../../../docker/openbao/pgsilo-session.hcl");

/// What to run and where.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) program: Option<PathBuf>,
    pub(super) runtime: PathBuf,
    pub(super) log: PathBuf,
}

/// A server that runs, unsealed and set up.
#[derive(Debug)]
pub(super) struct OpenBao {
    pub(super) process: Arc<Process>,
    pub(super) version: String,
    pub(super) address: String,
    pub(super) root_token: Secret,
    pub(super) unseal_key: Secret,
    /// The server as its root.
    pub(super) root: Client,
}

impl OpenBao {
    pub(super) async fn start(processes: &Processes, options: &Options) -> Result<Self> {
        let program = find_program(options.program.as_deref())?;
        let (process, bao, port) = on_free_port(None, async |port| {
            let process = serve(processes, &program, options, port)?;
            let bao = Client::new(Settings::for_control(&address(port)))?;
            let ready = process.meanwhile(answering(&bao)).await;
            Ok((process, ready.map(|()| bao)))
        })
        .await?;
        process.meanwhile(set_up(Arc::clone(&process), &bao, address(port))).await
    }
}

impl OpenBao {
    /// Lets sessions ask for leases with their own tokens (`lease.authority = "session"`): the JWT
    /// method, with a role and a policy for each access. A token that says no access gets none: a
    /// client that reaches OpenBAO could name any role. A login works from this machine only, and
    /// not for longer than the token that it was made with.
    pub(super) async fn admit_sessions(&self, issuer_pem: &str) -> Result<()> {
        let root = &self.root;
        enable_login(root, "jwt").await?;
        let keys = json!({ "jwt_validation_pubkeys": [issuer_pem], "bound_issuer": ISSUER });
        root.write("auth/jwt/config", keys).await?;
        let methods = root.read("sys/auth").await?;
        let accessor = text(&methods, "/data/jwt~1/accessor")?;
        for (kind, access) in [("rw", "read-write"), ("ro", "read-only"), ("migrate", "migrate")] {
            let name = format!("pgsilo-session-{kind}");
            let policy = SESSION_POLICY.replace("ACCESSOR", accessor).replace("KIND", kind);
            root.run(&SetPolicy { name: name.clone(), policy, expiration: None }).await?;
            let role = SESSION_ROLE.replace("ACCESS", access).replace("KIND", kind);
            let role = serde_json::from_str(&role.replace("PROXIES", "127.0.0.1/32"))?;
            root.write(&format!("auth/jwt/cel/role/{name}"), role).await?;
        }
        let quota = json!({ "path": "auth/jwt", "rate": 200 });
        root.write("sys/quotas/rate-limit/pgsilo-session", quota).await?;
        Ok(())
    }

    /// A token as the provisioner's logins have it, which lasts: for a person who looks around, and for
    /// tests.
    pub(super) async fn provisioner_token(&self) -> Result<Secret> {
        let options = CreateOrphanTokenRequest {
            display_name: Some("provisioner".to_owned()),
            policies: Some(vec!["pgsilo-provisioner".to_owned()]),
            no_default_policy: Some(true),
            period: Some("768h".to_owned()),
            ..CreateOrphanTokenRequest::default()
        };
        Ok(self.root.new_token(&options).await?.secret)
    }
}

fn address(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn serve(
    processes: &Processes,
    program: &Path,
    options: &Options,
    port: u16,
) -> Result<Arc<Process>> {
    let config = options.runtime.join("openbao.hcl");
    files::write_private(
        &config,
        &format!(
            "storage \"inmem\" {{}}\n\
             listener \"tcp\" {{\n  address = \"127.0.0.1:{port}\"\n  tls_disable = true\n}}\n\
             api_addr = \"{}\"\n",
            address(port)
        ),
    )?;
    let mut command = Command::new(program);
    command.arg("server").arg("-config").arg(&config).current_dir(&options.runtime);
    processes.start(Plan {
        part: Part::OpenBao,
        name: "OpenBAO",
        command,
        log: options.log.clone(),
        stop: Signal::TERM,
        patience: Duration::from_secs(5),
    })
}

/// Waits until somebody answers at all.
async fn answering(bao: &Client) -> Result<()> {
    let poll = async {
        while bao.openbao().health(false).await.is_err() {
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), poll).await.context("no answer after 60 s")
}

async fn set_up(process: Arc<Process>, bao: &Client, address: String) -> Result<OpenBao> {
    let shares = json!({ "secret_shares": 1, "secret_threshold": 1 });
    let init_response = bao.write("sys/init", shares).await?;
    let unseal_key = Secret::new(text(&init_response, "/keys_base64/0")?.to_owned());
    let root_token = Secret::new(text(&init_response, "/root_token")?.to_owned());
    let unsealed = bao.write("sys/unseal", json!({ "key": unseal_key.expose_text()? })).await?;
    ensure!(unsealed["sealed"] == json!(false), "OpenBAO stays sealed");
    let version = text(&unsealed, "/version")?.to_owned();
    let active = async {
        while bao.openbao().health(false).await? != 200 {
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), active)
        .await
        .context("not active after 30 s")??;

    let root = bao.as_token(root_token.clone());
    Ok(OpenBao { process, version, address, root_token, unseal_key, root })
}

/// Mounts a login method where its name says.
async fn enable_login(root: &Client, method: &str) -> Result<()> {
    let (path, engine_type) = (method.to_owned(), Some(method.to_owned()));
    Ok(root.run(&EnableAuthRequest { path, engine_type, ..Default::default() }).await?)
}

/// A text that an answer must have.
fn text<'a>(answer: &'a Value, pointer: &str) -> Result<&'a str> {
    let text = answer.pointer(pointer).and_then(Value::as_str);
    text.with_context(|| format!("OpenBAO's answer has no {pointer}"))
}

fn find_program(options: Option<&Path>) -> Result<PathBuf> {
    let program = match options {
        Some(program) => program.to_owned(),
        None => files::on_path("bao").context(
            "no OpenBAO: run scripts/tools.py and set PGSILO_BAO to what it prints, or pass --bao",
        )?,
    };
    ensure!(files::is_program(&program), "{} is no program", program.display());
    Ok(program.canonicalize()?)
}
