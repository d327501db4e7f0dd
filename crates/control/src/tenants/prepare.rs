//! `pgsiloctl tenant prepare`.

use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::cluster::KnownCluster;
use crate::context::Context;
use crate::provision::journal::{self, Kind, Operation};
use crate::provision::plan::{Plan, opaque_name};
use crate::provision::{Making, Step};
use crate::registry::{Author, Server, take_turn};
use crate::say;

/// Keep databases ready for tenants that come, so that `tenant create` has nothing to copy.
///
/// As many on each cluster as provision.standby of the settings says: closed, unsealed, nobody's. Run it by
/// a timer. What an earlier run has begun and not ended is finished first.
#[derive(Debug, Args)]
pub struct Prepare {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    author: Author,
    /// On this cluster only.
    #[arg(long, value_name = "CLUSTER")]
    on: Option<String>,
    /// As many as this [default: provision.standby of the settings].
    #[arg(long, value_name = "NUMBER")]
    standby: Option<u16>,
}

impl Prepare {
    pub(super) async fn run(self) -> Result<()> {
        let mut context = Context::open(&self.server).await?;
        let unfinished = "SELECT subject::text FROM pgsilo.operations
            WHERE kind = 'prepare' AND ended_at IS NULL ORDER BY began_at";
        let unfinished = context.registry.client.query(unfinished, &[]).await?;
        for row in unfinished {
            let name = pgsilo_core::tenant::TenantId::parse(row.get(0))?;
            journal::claim(&context.registry.client, &name).await?;
            let found = journal::unfinished::<Plan>(&context.registry.client, Kind::Prepare, &name);
            if let Some(operation) = found.await? {
                self.make(&mut context, operation).await?;
            }
        }
        let wanted = i64::from(self.standby.unwrap_or(context.settings.provision.standby));
        let clusters = match &self.on {
            Some(name) => vec![context.cluster(name)?.clone()],
            None => context.clusters.clone(),
        };
        for cluster in clusters {
            self.fill(&mut context, &cluster, wanted).await?;
        }
        Ok(())
    }

    async fn fill(&self, context: &mut Context, cluster: &KnownCluster, wanted: i64) -> Result<()> {
        let template = context.settings.provision.template.clone();
        let ready =
            "SELECT count(*) FROM pgsilo.prepared WHERE cluster = $1::text AND template = $2";
        let ready = context.registry.client.query_one(ready, &[&cluster.name, &template]).await?;
        let ready: i64 = ready.get(0);
        for _ in ready..wanted {
            let name = opaque_name()?;
            let provision = &context.settings.provision;
            let plan = Plan {
                id: name.clone(),
                name: name.clone(),
                display_name: None,
                aliases: Vec::new(),
                regions: None,
                cluster: cluster.name.clone(),
                seal: String::new(),
                template: template.clone(),
                connections: provision.connections,
                allow: Vec::new(),
                lease_hashing: provision.lease_hashing,
                is_prepared: false,
            };
            Making::of(&plan, cluster, &context.identity, &context.bao).ensure_room().await?;
            journal::claim(&context.registry.client, &name).await?;
            let transaction = take_turn(&mut context.registry.client).await?;
            self.author.sign(&transaction).await?;
            let operation = Operation::begin(&transaction, Kind::Prepare, &name, plan).await?;
            transaction.commit().await?;
            self.make(context, operation).await?;
        }
        say::result(&format!("{}  has {} databases ready", cluster.name, ready.max(wanted)));
        Ok(())
    }

    async fn make(&self, context: &mut Context, mut operation: Operation<Plan>) -> Result<()> {
        let began = Instant::now();
        let plan = operation.plan.clone();
        let cluster = context.cluster(&plan.cluster)?.clone();
        let outcome = async {
            let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
            for step in Step::PREPARED {
                making.make(step).await?;
                operation.passed(&context.registry.client, step.name()).await?;
            }
            anyhow::Ok(())
        };
        if let Err(error) = outcome.await {
            operation.failed(&context.registry.client, &error).await;
            return Err(error.context(format!("preparing {}", plan.names().database())));
        }
        let transaction = take_turn(&mut context.registry.client).await?;
        self.author.sign(&transaction).await?;
        let ready =
            "INSERT INTO pgsilo.prepared (name, cluster, template) VALUES ($1::text, $2::text, $3)";
        let (name, Plan { cluster, template, .. }) = (plan.name.as_str(), &plan);
        let ready = transaction.execute(ready, &[&name, cluster, template]).await;
        ready.context("writing the registry")?;
        operation.end(&transaction).await?;
        transaction.commit().await?;
        say::step(&format!("{} on {}", plan.names().database(), plan.cluster), began.elapsed());
        Ok(())
    }
}
