//! `pgsiloctl tenant repair`.

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use pgsilo_core::tenant::TenantId;
use serde_json::json;

use super::delete::plan_of;
use crate::context::Context;
use crate::provision::Making;
use crate::provision::journal;
use crate::provision::plan::LeaseHashing;
use crate::registry::Server;
use crate::say;

/// Have what tenants have be what this version makes, where the registry says that they are.
///
/// For each: its roles, the functions in its database, its seal, and how OpenBAO reaches it and leases for it.
/// Run it after an update, after a cluster's servers or authorities have changed (`bootstrap cluster` says when), and for
/// what `registry check` finds. Sessions go on. OpenBAO's login is made anew only where it is described otherwise. One
/// that fails does not keep the others: exit code 1 says that there was one.
#[derive(Debug, Args)]
pub struct Repair {
    #[command(flatten)]
    server: Server,
    /// These.
    #[arg(value_name = "ID", value_parser = TenantId::parse)]
    ids: Vec<TenantId>,
    /// All of this cluster.
    #[arg(long, value_name = "CLUSTER", conflicts_with = "ids")]
    on: Option<String>,
    /// All.
    #[arg(long, conflicts_with_all = ["ids", "on"])]
    all: bool,
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

impl Repair {
    pub(super) async fn run(self) -> Result<()> {
        let context = Context::open(&self.server).await?;
        if let Some(name) = &self.on {
            context.cluster(name)?;
        }
        let ids = match (self.all, &self.on, self.ids.is_empty()) {
            (false, None, true) => bail!("say which: their ids, --on CLUSTER or --all"),
            (false, None, false) => self.ids.clone(),
            (_, on, _) => {
                let all = "SELECT tenant::text FROM pgsilo.placements WHERE $1::text IS NULL OR cluster = $1 ORDER BY tenant";
                let rows = context
                    .registry
                    .client
                    .query(all, &[on])
                    .await
                    .context("reading the tenants")?;
                rows.iter().map(|row| TenantId::parse(row.get(0))).collect::<Result<_, _>>()?
            }
        };
        let mut failed = 0;
        for id in &ids {
            match repair(&context, id).await {
                Ok(()) if self.json => {
                    say::data(&json!({ "id": id, "repaired": true }).to_string())?;
                }
                Ok(()) => say::result(&format!("{id}  is as it should be")),
                Err(error) => {
                    failed += 1;
                    if self.json {
                        let told =
                            json!({ "id": id, "repaired": false, "why": format!("{error:#}") });
                        say::data(&told.to_string())?;
                    } else {
                        say::progress(&format!("{id}: {error:#}"));
                    }
                }
            }
        }
        ensure!(failed == 0, "{failed} of {} could not be repaired", ids.len());
        Ok(())
    }
}

async fn repair(context: &Context, id: &TenantId) -> Result<()> {
    journal::claim(&context.registry.client, id).await?;
    let begun = "SELECT kind FROM pgsilo.operations WHERE subject = $1::text AND ended_at IS NULL";
    if let Some(row) = context.registry.client.query_opt(begun, &[&id.as_str()]).await? {
        bail!("a {} of it has not ended", row.get::<_, &str>(0));
    }
    let mut plan = plan_of(context, id).await?;
    let cluster = context.cluster(&plan.cluster)?;
    let making = Making::of(&plan, cluster, &context.identity, &context.bao);
    let (connections, hashes) = making.as_it_is().await?;
    plan.connections = connections;
    plan.lease_hashing = if hashes { LeaseHashing::Postgres } else { LeaseHashing::Openbao };
    let making = Making::of(&plan, cluster, &context.identity, &context.bao);
    making.repair().await?;
    let wrong = making.verify().await?;
    ensure!(wrong.is_empty(), "it is still not as it should be: {}", wrong.join("; "));
    Ok(())
}
