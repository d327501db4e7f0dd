//! `pgsiloctl tenant check`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use pgsilo_core::names::SEAL;
use pgsilo_core::registry::{State, Tenant};
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_openbao::Client as Bao;
use serde_json::json;
use tokio::time::sleep;

use crate::context::Context;
use crate::logins;
use crate::postgres::Identity;
use crate::registry::check::look_at;
use crate::registry::{Server, apply};
use crate::say;

/// How long a role may take to go whose lease was revoked.
const GONE: Duration = Duration::from_secs(5);

/// Look whether a tenant can be used: the registry, OpenBAO, a login with a credential of its own.
///
/// What `registry check` looks at, and then, for each access: a credential is leased as the operator, logs in
/// as a session would, finds the seal, works as the role that it should, and is gone when it was given back. A
/// line for each, with what to do for what fails. Exit code 3 if anything does.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    server: Server,
    /// The tenant.
    #[arg(value_parser = TenantId::parse)]
    id: TenantId,
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(super) async fn run(self) -> Result<ExitCode> {
        let context = Context::open(&self.server).await?;
        let snapshot = apply::snapshot_of(&context.registry.client, &self.id).await?;
        let tenant = snapshot.tenant(&self.id);
        let tenant = tenant
            .with_context(|| format!("the registry has no tenant {} with a placement", self.id))?;
        let mut failed = false;
        let began = Instant::now();
        let findings = look_at(&tenant, &context.identity, &context.bao).await;
        match findings.is_empty() {
            true => self.tell(
                "registry",
                began,
                Ok(format!("{} at {}", state(&tenant), tenant.placement())),
            )?,
            false => {
                failed = true;
                for (what, mend) in findings {
                    self.tell("registry", began, Err((what, mend)))?;
                }
            }
        }
        let operator = context.settings.operator.as_ref();
        let operator = operator.context(
            "openbao.operator is not in the file of settings: no credential is leased to try a login with",
        )?;
        let bao = logins::log_in(operator, &context.settings.bao()?).await?;
        for access in Access::ALL {
            let Some(role) = tenant.lease().role(access) else { continue };
            let began = Instant::now();
            match try_login(&tenant, role, &bao, &context.identity).await {
                Ok(told) => self.tell(access.as_str(), began, Ok(told))?,
                Err(error) => {
                    failed = true;
                    let mend = format!("pgsiloctl tenant repair {}", self.id);
                    self.tell(access.as_str(), began, Err((format!("{error:#}"), mend)))?;
                }
            }
        }
        Ok(if failed { ExitCode::from(3) } else { ExitCode::SUCCESS })
    }

    fn tell(
        &self,
        what: &str,
        began: Instant,
        outcome: Result<String, (String, String)>,
    ) -> Result<()> {
        let ms = began.elapsed().as_millis() as u64;
        if self.json {
            let line = match outcome {
                Ok(told) => json!({ "check": what, "ok": true, "told": told, "ms": ms }),
                Err((failure, mend)) => {
                    json!({ "check": what, "ok": false, "told": failure, "mend": mend, "ms": ms })
                }
            };
            say::data(&line.to_string())?;
            return Ok(());
        }
        match outcome {
            Ok(told) => say::result(&format!("ok      {what:<12}{told} ({ms} ms)")),
            Err((failure, mend)) => {
                say::result(&format!("FAILED  {what:<12}{failure}; mend it: {mend}"));
            }
        }
        Ok(())
    }
}

fn state(tenant: &Tenant) -> &'static str {
    match tenant.state() {
        State::Active => "active",
        State::Suspended => "suspended",
        State::Paused => "paused",
        State::Deleting => "being deleted",
    }
}

/// A login as a session's, and its end.
async fn try_login(
    tenant: &Tenant,
    role: &str,
    bao: &Bao,
    provisioner: &Identity,
) -> Result<String> {
    let leased = bao.credential(&tenant.lease().mount, role).await?;
    let user = leased.username.clone();
    let identity = Identity::Password { user: user.clone(), password: leased.password };
    let session = identity.connect(tenant.placement()).await;
    let looked = async {
        let session = session?;
        let asked = "SELECT current_user::text, current_setting($1, true)";
        let row = session.query_one(asked, &[&SEAL]).await.context("asking who it is")?;
        let (works_as, seal): (String, Option<String>) = (row.get(0), row.get(1));
        if seal.as_deref() != Some(tenant.seal()) {
            bail!("the database reached is sealed for {}", seal.as_deref().unwrap_or("nobody"));
        }
        ensure!(works_as != user, "it works as itself, and not as a role of the tenant");
        anyhow::Ok((session, works_as))
    };
    let looked = looked.await;
    // Whatever it has found.
    bao.revoke_own_lease(&leased.lease_id).await.context("giving the credential back")?;
    let (session, works_as) = looked?;
    let cluster = provisioner.connect(&tenant.placement().beside("postgres")).await?;
    let began = Instant::now();
    let usable = "SELECT FROM pg_roles WHERE rolname = $1 AND rolcanlogin";
    while cluster.query_opt(usable, &[&user]).await?.is_some()
        || session.query_opt("SELECT", &[]).await.is_ok()
    {
        ensure!(
            began.elapsed() < GONE,
            "{user} can still be used, {} s after its lease was revoked",
            GONE.as_secs()
        );
        sleep(Duration::from_millis(20)).await;
    }
    Ok(format!("{user} logged in, worked as {works_as}, and is gone"))
}
