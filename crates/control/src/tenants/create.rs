//! `pgsiloctl tenant create`.

use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use pgsilo_core::tenant::TenantId;
use pgsilo_core::text::is_loggable;
use serde_json::json;
use tokio_postgres::Transaction;
use tokio_postgres::types::Json;

use super::Which;
use crate::cluster::KnownCluster;
use crate::context::Context;
use crate::provision::journal::{self, Kind, Operation};
use crate::provision::plan::{Allowance, LeaseHashing, Plan, opaque_name, random_seal};
use crate::provision::{Making, Step};
use crate::registry::{in_force, take_turn};
use crate::say;

/// Make a tenant: its database, its roles, what OpenBAO leases for it; then it is served.
///
/// What is made is settled first and kept in the registry's journal: if this is cut short, run it again
/// with the id alone, and it goes on; with --undo it is taken back. Names in PostgreSQL are random unless
/// --name chooses, as every tenant of a cluster can read them: they say nothing of who the tenant is.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    which: Which,
    /// In this cluster [default: the one with the fewest tenants, of those in its region].
    #[arg(long, value_name = "CLUSTER")]
    on: Option<String>,
    /// Where it may live. May be repeated [default: anywhere].
    #[arg(long = "region", value_name = "NAME")]
    regions: Vec<String>,
    /// What its database and its roles are called: tenant_NAME, tenant_NAME_app ...
    #[arg(long, value_name = "NAME", value_parser = TenantId::parse)]
    name: Option<TenantId>,
    /// What people call it.
    #[arg(long, value_name = "TEXT")]
    display_name: Option<String>,
    /// What else issuers call it. May be repeated.
    #[arg(long = "alias", value_name = "WORD")]
    aliases: Vec<String>,
    /// What its database is a copy of [default: provision.template of the settings].
    #[arg(long, value_name = "DATABASE")]
    template: Option<String>,
    /// Connections to its database [default: provision.connections of the settings].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(4..))]
    connections: Option<u16>,
    /// Let its sessions use this of what is the whole cluster's. May be repeated [default:
    /// provision.allow of the settings].
    #[arg(long = "allow", value_name = "WHAT", value_enum)]
    allow: Vec<Allowance>,
    /// Who makes the verifiers of its leased passwords [default: provision.lease_hashing of the
    /// settings].
    #[arg(long, value_name = "WHO", value_enum)]
    lease_hashing: Option<LeaseHashing>,
    /// Take back what was begun.
    #[arg(long)]
    undo: bool,
    /// Say what would be made, and make nothing.
    #[arg(long, conflicts_with = "undo")]
    dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Create {
    pub(super) async fn run(self) -> Result<()> {
        let began = Instant::now();
        let mut context = Context::open(&self.which.server).await?;
        journal::claim(&context.registry.client, &self.which.id).await?;
        let unfinished =
            journal::unfinished::<Plan>(&context.registry.client, Kind::Create, &self.which.id)
                .await?;
        let operation = match (unfinished, self.undo) {
            (Some(operation), true) => return self.take_back(&mut context, operation).await,
            (None, true) => bail!("no creation of {} was begun and has not ended", self.which.id),
            (Some(operation), false) => {
                self.ensure_the_same(&operation)?;
                if self.dry_run {
                    say::result(&format!(
                        "would go on with {}, behind {}:",
                        self.which.id,
                        operation.step.as_deref().unwrap_or("nothing")
                    ));
                    return self.tell(&operation.plan, true);
                }
                say::progress(&format!(
                    "going on with {}, behind {}",
                    self.which.id,
                    operation.step.as_deref().unwrap_or("nothing")
                ));
                operation
            }
            (None, false) => match self.begin(&mut context).await? {
                Some(operation) => operation,
                None => return Ok(()),
            },
        };
        let plan = operation.plan.clone();
        let revision = self.make(&mut context, operation).await?;
        let names = plan.names();
        if self.json {
            let made = json!({
                "id": plan.id, "cluster": plan.cluster, "database": names.database(),
                "mount": names.mount(), "seconds": began.elapsed().as_secs_f64(),
            });
            say::data(&made.to_string())?;
        } else {
            say::result(&format!(
                "{}  is made, in {:.1} s: database {} on {}, leases from {}",
                plan.id,
                began.elapsed().as_secs_f64(),
                names.database(),
                plan.cluster,
                names.mount()
            ));
        }
        in_force(&context.registry.client, revision).await
    }

    /// What was begun is what is asked for now, as far as that says something.
    fn ensure_the_same(&self, operation: &Operation<Plan>) -> Result<()> {
        if operation.is_undoing {
            bail!("the creation of {} is being taken back: go on with --undo", self.which.id);
        }
        let plan = &operation.plan;
        let differs = self.on.as_ref().is_some_and(|on| *on != plan.cluster)
            || self.name.as_ref().is_some_and(|name| *name != plan.name)
            || self.template.as_ref().is_some_and(|template| *template != plan.template)
            || self.connections.is_some_and(|connections| connections != plan.connections)
            || self.lease_hashing.is_some_and(|hashing| hashing != plan.lease_hashing)
            || self.display_name.is_some() && self.display_name != plan.display_name
            || !self.regions.is_empty() && Some(&self.regions) != plan.regions.as_ref()
            || !self.aliases.is_empty() && self.aliases != plan.aliases
            || !self.allow.is_empty() && Some(&self.allow) != plan.allow.as_ref();
        ensure!(
            !differs,
            "a creation of {} with other options has not ended: finish it with the id alone, or take it back \
             with --undo",
            self.which.id
        );
        Ok(())
    }

    /// Settles what is to be made, and writes that down. `None`: it was only said.
    async fn begin(&self, context: &mut Context) -> Result<Option<Operation<Plan>>> {
        let there = "SELECT state FROM pgsilo.tenants WHERE id = $1::text";
        if let Some(row) =
            context.registry.client.query_opt(there, &[&self.which.id.as_str()]).await?
        {
            bail!(
                "there is a tenant {} already, and it is {}",
                self.which.id,
                row.get::<_, &str>(0)
            );
        }
        let cluster = choose(context, self.on.as_deref(), &self.regions).await?.clone();
        let provision = &context.settings.provision;
        let template = self.template.as_ref().unwrap_or(&provision.template).clone();
        let or_set = |said: &[Allowance]| match said {
            [] => provision.allow.clone(),
            said => said.to_vec(),
        };
        let mut plan = Plan {
            id: self.which.id.clone(),
            name: match &self.name {
                Some(name) => name.clone(),
                None => opaque_name()?,
            },
            display_name: self.display_name.clone(),
            aliases: self.aliases.clone(),
            regions: (!self.regions.is_empty()).then(|| self.regions.clone()),
            cluster: cluster.name.clone(),
            seal: random_seal()?,
            template,
            connections: self.connections.unwrap_or(provision.connections),
            allow: Some(or_set(&self.allow)),
            lease_hashing: self.lease_hashing.unwrap_or(provision.lease_hashing),
            is_prepared: false,
        };
        ensure!(
            !self.which.id.as_str().ends_with('-'),
            "{}: OpenBAO takes no name that ends in \"-\"",
            self.which.id
        );
        for alias in &self.aliases {
            ensure!(is_loggable(alias), "--alias {alias:?} is not one line of 1 to 256 characters");
        }
        if let Some(name) = plan.display_name.as_ref().filter(|name| !is_loggable(name)) {
            bail!("{name:?} is not one line of 1 to 256 characters");
        }
        self.ensure_registrable(context, &plan).await?;
        let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
        making.ensure_no_mount().await?;
        if !self.dry_run && self.name.is_none() {
            let transaction = take_turn(&mut context.registry.client).await?;
            if let Some(name) = take_prepared(&transaction, &plan).await? {
                (plan.name, plan.is_prepared) = (name, true);
                let operation = self.write_down(&transaction, plan).await?;
                transaction.commit().await?;
                return Ok(Some(operation));
            }
        }
        let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
        making.ensure_no_database().await?;
        if self.dry_run {
            self.tell(&plan, self.name.is_some())?;
            return Ok(None);
        }
        let transaction = take_turn(&mut context.registry.client).await?;
        let operation = self.write_down(&transaction, plan).await?;
        transaction.commit().await?;
        Ok(Some(operation))
    }

    fn tell(&self, plan: &Plan, is_named: bool) -> Result<()> {
        let names = plan.names();
        // Another run would draw another.
        let name = match is_named {
            true => names.database(),
            false => "tenant_ and a random name".to_owned(),
        };
        if self.json {
            let mut told = serde_json::to_value(plan)?;
            if !is_named {
                told["name"] = json!(null);
            }
            told["seal"] = json!(null);
            say::data(&told.to_string())?;
            return Ok(());
        }
        say::result(&format!("would make {} on {}:", plan.id, plan.cluster));
        let allowed = plan.allow.iter().flatten().filter_map(ValueEnum::to_possible_value);
        let allowed: Vec<_> = allowed.map(|one| one.get_name().to_owned()).collect();
        say::result(&format!(
            "  database {name}, a copy of {}, {} connections{}",
            plan.template,
            plan.connections,
            if allowed.is_empty() {
                String::new()
            } else {
                format!(", with {}", allowed.join(", "))
            }
        ));
        say::result("  its roles: app, ro, login, broker");
        say::result(&format!("  OpenBAO's mount {}, with rw, ro and migrate", names.mount()));
        Ok(())
    }

    async fn write_down(
        &self,
        transaction: &Transaction<'_>,
        plan: Plan,
    ) -> Result<Operation<Plan>> {
        self.which.author.sign(transaction).await?;
        Operation::begin(transaction, Kind::Create, &self.which.id, plan).await
    }

    /// Tries the registry's rows, and takes them back: what it would refuse at the end it refuses now.
    async fn ensure_registrable(&self, context: &mut Context, plan: &Plan) -> Result<()> {
        let transaction = take_turn(&mut context.registry.client).await?;
        register(&transaction, plan).await?;
        transaction.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await.map_err(refused)?;
        Ok(transaction.rollback().await?)
    }

    /// Does what is left to do. Returns the registry's revision.
    async fn make(&self, context: &mut Context, mut operation: Operation<Plan>) -> Result<i64> {
        let outcome = self.try_make(context, &mut operation).await;
        if let Err(error) = &outcome {
            operation.failed(&context.registry.client, error).await;
            say::progress(&format!(
                "{id} is not made yet: run pgsiloctl tenant create {id} again to go on, with --undo to take it back",
                id = self.which.id
            ));
        }
        outcome
    }

    async fn try_make(
        &self,
        context: &mut Context,
        operation: &mut Operation<Plan>,
    ) -> Result<i64> {
        let plan = operation.plan.clone();
        let cluster = context.cluster(&plan.cluster)?.clone();
        let (identity, bao) = (context.identity.clone(), context.bao.clone());
        let making = Making::of(&plan, &cluster, &identity, &bao);
        let of_prepared = if plan.is_prepared { Step::PREPARED.len() } else { 0 };
        let steps = &Step::ALL[of_prepared..];
        let done = steps.iter().position(|step| Some(step.name()) == operation.step.as_deref());
        for step in &steps[done.map_or(0, |done| done + 1)..] {
            making.make(*step).await?;
            operation.passed(&context.registry.client, step.name()).await?;
        }
        let wrong = making.verify().await.context("looking at what was made")?;
        ensure!(wrong.is_empty(), "what was made is not as it should be: {}", wrong.join("; "));
        let transaction = take_turn(&mut context.registry.client).await?;
        self.which.author.sign(&transaction).await?;
        register(&transaction, &plan).await?;
        operation.end(&transaction).await?;
        transaction.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await.map_err(refused)?;
        let revision = "SELECT revision FROM pgsilo.revision";
        let revision = transaction.query_one(revision, &[]).await?.get(0);
        transaction.commit().await.context("writing the registry")?;
        Ok(revision)
    }

    async fn take_back(&self, context: &mut Context, mut operation: Operation<Plan>) -> Result<()> {
        let plan = operation.plan.clone();
        let cluster = context.cluster(&plan.cluster)?.clone();
        let others =
            "SELECT tenant::text FROM pgsilo.placements WHERE cluster = $1::text AND dbname = $2";
        let database = plan.names().database();
        let others = context.registry.client.query_opt(others, &[&plan.cluster, &database]).await?;
        if let Some(row) = others {
            bail!("{database} is {}'s by now: it is not dropped", row.get::<_, &str>(0));
        }
        if !operation.is_undoing {
            operation.turn_back(&context.registry.client).await?;
        }
        let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
        for step in Step::BACK {
            if let Err(error) = making.unmake(step).await {
                operation.failed(&context.registry.client, &error).await;
                return Err(error.context(format!("{} is not taken back yet", self.which.id)));
            }
            operation.passed(&context.registry.client, step.name()).await?;
        }
        let transaction = take_turn(&mut context.registry.client).await?;
        self.which.author.sign(&transaction).await?;
        operation.end(&transaction).await?;
        transaction.commit().await?;
        match self.json {
            true => say::data(&json!({ "id": self.which.id, "undone": true }).to_string())?,
            false => {
                say::result(&format!("{}  is taken back: nothing of it is left", self.which.id));
            }
        }
        Ok(())
    }
}

/// The cluster for a tenant that may live in these regions.
pub(super) async fn choose<'c>(
    context: &'c Context,
    on: Option<&str>,
    regions: &[String],
) -> Result<&'c KnownCluster> {
    let fits = |cluster: &&KnownCluster| {
        let region = cluster.cluster.region.as_ref();
        regions.is_empty() || region.is_some_and(|region| regions.contains(region))
    };
    if let Some(on) = on {
        let cluster = context.cluster(on)?;
        ensure!(
            fits(&cluster),
            "cluster {on} is in {}, and the tenant may live in {} only",
            cluster.cluster.region.as_deref().unwrap_or("no region"),
            regions.join(", ")
        );
        return Ok(cluster);
    }
    let counts = "SELECT cluster::text, count(*) FROM pgsilo.placements GROUP BY cluster";
    let counts = context.registry.client.query(counts, &[]).await.context("counting tenants")?;
    let count = |cluster: &&KnownCluster| {
        let row = counts.iter().find(|row| row.get::<_, &str>(0) == cluster.name);
        row.map_or(0, |row| row.get::<_, i64>(1))
    };
    let by_count = context.clusters.iter().filter(fits).min_by_key(count);
    by_count.with_context(|| match regions {
        [] => "the registry has no cluster: run pgsiloctl bootstrap cluster".to_owned(),
        regions => format!("the registry has no cluster in {}", regions.join(", ")),
    })
}

/// A database that was prepared for whoever comes, from a template of that name.
async fn take_prepared(transaction: &Transaction<'_>, plan: &Plan) -> Result<Option<TenantId>> {
    let take = "DELETE FROM pgsilo.prepared WHERE name = (
            SELECT name FROM pgsilo.prepared WHERE cluster = $1::text AND template = $2 ORDER BY prepared_at LIMIT 1)
        RETURNING name::text";
    let taken = transaction.query_opt(take, &[&plan.cluster, &plan.template]).await?;
    taken.map(|row| Ok(TenantId::parse(row.get(0))?)).transpose()
}

/// The registry's rows of a tenant.
async fn register(transaction: &Transaction<'_>, plan: &Plan) -> Result<()> {
    let Plan { id, display_name, regions, cluster, seal, aliases, .. } = plan;
    let (id, names) = (id.as_str(), plan.names());
    let tenant = "INSERT INTO pgsilo.tenants (id, name, regions) VALUES ($1::text, $2::text, $3)";
    transaction.execute(tenant, &[&id, display_name, regions]).await.map_err(refused)?;
    let roles = json!({
        "read-write": names.lease_role("rw"), "read-only": names.lease_role("ro"),
        "migrate": names.lease_role("migrate"),
    });
    let placement = "INSERT INTO pgsilo.placements (tenant, cluster, dbname, seal, mount, roles)
        VALUES ($1::text, $2::text, $3, $4::text, $5, $6)";
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&id, cluster, &names.database(), seal, &names.mount(), &Json(roles)];
    transaction.execute(placement, &values).await.map_err(refused)?;
    for alias in aliases {
        let insert = "INSERT INTO pgsilo.aliases (alias, tenant) VALUES ($1::text, $2::text)";
        transaction.execute(insert, &[alias, &id]).await.map_err(refused)?;
    }
    Ok(())
}

/// What the registry says of rows that it does not take.
fn refused(error: tokio_postgres::Error) -> anyhow::Error {
    let Some(said) = error.as_db_error() else { return error.into() };
    let detail = said.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
    anyhow::anyhow!("the registry refuses it: {}{detail}", said.message())
}
