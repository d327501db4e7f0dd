//! `pgsiloctl tenant prepare`.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use pgsilo_core::tenant::TenantId;
use serde_json::json;

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
/// a timer. What an earlier run has begun and not ended is finished first; what there is too much of is
/// removed. They are copies of the template as it was: after that has changed, run this with --standby 0,
/// and then as usual. One that fails does not keep the others: exit code 1 says that there was one.
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
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

impl Prepare {
    pub(super) async fn run(self) -> Result<()> {
        let mut context = Context::open(&self.server).await?;
        // Two would make twice as many.
        journal::claim(&context.registry.client, "databases to be ready").await?;
        if let Some(name) = &self.on {
            context.cluster(name)?;
        }
        let mut failed = self.finish(&mut context).await?;
        let wanted = usize::from(self.standby.unwrap_or(context.settings.provision.standby));
        for cluster in context.clusters.clone() {
            if self.on.as_ref().is_some_and(|on| *on != cluster.name) {
                continue;
            }
            if let Err(error) = self.fill(&mut context, &cluster, wanted).await {
                say::progress(&format!("{}: {error:#}", cluster.name));
                failed += 1;
            }
        }
        ensure!(failed == 0, "{failed} of them failed");
        Ok(())
    }

    /// Finishes what was begun. How many could not be.
    async fn finish(&self, context: &mut Context) -> Result<usize> {
        let unfinished = "SELECT subject::text FROM pgsilo.operations
            WHERE kind = 'prepare' AND ended_at IS NULL ORDER BY began_at";
        let unfinished = context.registry.client.query(unfinished, &[]).await;
        let mut failed = 0;
        for row in unfinished.context("reading the journal")? {
            let name = TenantId::parse(row.get(0))?;
            let found = journal::unfinished::<Plan>(&context.registry.client, Kind::Prepare, &name);
            let Some(operation) = found.await? else { continue };
            let ended = match operation.is_undoing {
                true => self.take_back(context, operation).await,
                false => self.make(context, operation).await,
            };
            if let Err(error) = ended {
                say::progress(&format!("{error:#}"));
                failed += 1;
            }
        }
        Ok(failed)
    }

    async fn fill(
        &self,
        context: &mut Context,
        cluster: &KnownCluster,
        wanted: usize,
    ) -> Result<()> {
        let template = context.settings.provision.template.clone();
        // Those of another template are nobody's to be any more.
        let ready = "SELECT name::text, template = $2 FROM pgsilo.prepared WHERE cluster = $1::text
            ORDER BY template = $2 DESC, prepared_at DESC";
        let ready = context.registry.client.query(ready, &[&cluster.name, &template]).await?;
        let usable = ready.iter().filter(|row| row.get(1)).count().min(wanted);
        for row in &ready[usable..] {
            let name = TenantId::parse(row.get(0))?;
            self.remove(context, plan_of(context, cluster, name)).await?;
        }
        for _ in usable..wanted {
            let plan = plan_of(context, cluster, opaque_name()?);
            Making::of(&plan, cluster, &context.identity, &context.bao)
                .ensure_no_database()
                .await?;
            let name = plan.name.clone();
            let transaction = take_turn(&mut context.registry.client).await?;
            self.author.sign(&transaction).await?;
            let operation = Operation::begin(&transaction, Kind::Prepare, &name, plan).await?;
            transaction.commit().await?;
            self.make(context, operation).await?;
        }
        match self.json {
            true => {
                let told = json!({ "cluster": cluster.name, "ready": wanted });
                say::data(&told.to_string())?;
            }
            false => say::result(&format!("{}  has {wanted} databases ready", cluster.name)),
        }
        Ok(())
    }

    async fn make(&self, context: &mut Context, mut operation: Operation<Plan>) -> Result<()> {
        let began = Instant::now();
        let plan = operation.plan.clone();
        let database = plan.names().database();
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
            return Err(error.context(format!("preparing {database}")));
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
        say::step(&format!("{database} on {cluster}"), began.elapsed());
        Ok(())
    }

    /// One that is not wanted any more.
    async fn remove(&self, context: &mut Context, plan: Plan) -> Result<()> {
        let transaction = take_turn(&mut context.registry.client).await?;
        self.author.sign(&transaction).await?;
        let name = plan.name.clone();
        let taken = "DELETE FROM pgsilo.prepared WHERE name = $1::text";
        if transaction.execute(taken, &[&name.as_str()]).await? == 0 {
            // A tenant has it by now.
            return Ok(());
        }
        let mut operation = Operation::begin(&transaction, Kind::Prepare, &name, plan).await?;
        operation.turn_back(&transaction).await?;
        transaction.commit().await?;
        self.take_back(context, operation).await
    }

    async fn take_back(&self, context: &mut Context, mut operation: Operation<Plan>) -> Result<()> {
        let plan = operation.plan.clone();
        let database = plan.names().database();
        let cluster = context.cluster(&plan.cluster)?.clone();
        for step in [Step::Database, Step::Roles] {
            let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
            if let Err(error) = making.unmake(step).await {
                operation.failed(&context.registry.client, &error).await;
                return Err(error.context(format!("removing {database}")));
            }
            operation.passed(&context.registry.client, step.name()).await?;
        }
        let transaction = take_turn(&mut context.registry.client).await?;
        self.author.sign(&transaction).await?;
        operation.end(&transaction).await?;
        transaction.commit().await?;
        say::progress(&format!("  {database} on {} is removed", plan.cluster));
        Ok(())
    }
}

fn plan_of(context: &Context, cluster: &KnownCluster, name: TenantId) -> Plan {
    let provision = &context.settings.provision;
    Plan {
        id: name.clone(),
        name,
        display_name: None,
        aliases: Vec::new(),
        regions: None,
        cluster: cluster.name.clone(),
        seal: String::new(),
        template: provision.template.clone(),
        connections: provision.connections,
        allow: None,
        lease_hashing: provision.lease_hashing,
        is_prepared: false,
    }
}
