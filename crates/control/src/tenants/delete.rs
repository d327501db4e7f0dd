//! `pgsiloctl tenant delete | undelete | purge`.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use pgsilo_core::duration;
use pgsilo_core::tenant::TenantId;
use serde_json::{Map, Value, json};

use super::Which;
use crate::certificate::{self, Deletion};
use crate::context::Context;
use crate::provision::Making;
use crate::provision::journal::{self, Kind, Operation};
use crate::provision::plan::{LeaseHashing, Plan};
use crate::provision::removal::Removal;
use crate::registry::{Author, Server, in_force, take_turn};
use crate::say;

/// Delete a tenant: refuse it at once, and remove it when its grace is over.
///
/// Its sessions end, and its logins read 42501. Until the grace is over `tenant undelete` takes it back;
/// then `tenant purge`, which a timer runs, removes it: leases, what OpenBAO has of it, the database, the
/// roles, the registry's rows. A certificate says what was removed and what remains elsewhere. With --now
/// all of that is done at once.
#[derive(Debug, Args)]
pub struct Delete {
    #[command(flatten)]
    which: Which,
    /// How long it can be taken back.
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = duration::parse)]
    grace: Duration,
    /// Remove it at once.
    #[arg(long, conflicts_with = "grace")]
    now: bool,
    /// The tenant's id once more, for --now; asked for on a terminal.
    #[arg(long, value_name = "ID", requires = "now")]
    confirm: Option<String>,
    /// Print one JSON object: with --now, the certificate.
    #[arg(long)]
    json: bool,
}

/// Take back the deletion of a tenant whose grace is not over: it is as it was before.
#[derive(Debug, Args)]
pub struct Undelete {
    #[command(flatten)]
    which: Which,
}

/// Remove the tenants whose grace is over, and finish removals that were cut short.
///
/// For a timer. One that fails does not keep the others: exit code 1 says that there was one.
#[derive(Debug, Args)]
pub struct Purge {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    author: Author,
    /// Say which they are, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the certificates, one JSON object a line.
    #[arg(long)]
    json: bool,
}

impl Delete {
    pub(super) async fn run(self) -> Result<()> {
        let mut context = Context::open(&self.which.server).await?;
        journal::claim(&context.registry.client, &self.which.id).await?;
        let begun =
            journal::unfinished::<Plan>(&context.registry.client, Kind::Delete, &self.which.id);
        let begun = begun.await?;
        if !self.now && begun.is_some() {
            bail!(
                "the removal of {} has begun, and cannot be taken back: go on with --now, or by tenant purge",
                self.which.id
            );
        }
        if begun.is_none() {
            // What cannot be removed is told before anybody is refused.
            let plan = plan_of(&context, &self.which.id).await?;
            let cluster = context.cluster(&plan.cluster)?;
            Making::of(&plan, cluster, &context.identity, &context.bao)
                .ensure_this_tenants()
                .await?;
            let grace = if self.now { Duration::ZERO } else { self.grace };
            let until = self.refuse(&mut context, grace).await?;
            if !self.now {
                return self.tell(&until);
            }
        }
        let certificate = remove(&mut context, &self.which.author, &self.which.id).await?;
        told(&certificate, self.json)
    }

    /// Asks whether it is meant, where it cannot be taken back.
    pub(super) fn confirm(&self) -> Result<()> {
        if !self.now {
            return Ok(());
        }
        let question = format!(
            "All data of {} will be gone, and nothing brings it back. Type its id to go on:",
            self.which.id
        );
        let typed = match &self.confirm {
            Some(typed) => Some(typed.clone()),
            None => say::ask(&question).context("reading the answer")?,
        };
        let Some(typed) = typed else {
            bail!("--now needs --confirm {} where nobody can be asked", self.which.id)
        };
        ensure!(
            typed == self.which.id.as_str(),
            "{typed:?} is not {}: nothing was done",
            self.which.id
        );
        Ok(())
    }

    /// Makes it one that is being deleted. Returns until when that can be taken back.
    async fn refuse(&self, context: &mut Context, grace: Duration) -> Result<String> {
        let transaction = take_turn(&mut context.registry.client).await?;
        self.which.author.sign(&transaction).await?;
        // Sooner, if it was to be later: a second deletion gives no more time.
        let refuse = "UPDATE pgsilo.tenants SET state = 'deleting',
                delete_after = least(delete_after, now() + make_interval(secs => $2))
            WHERE id = $1::text";
        let seconds = grace.as_secs_f64();
        transaction
            .execute(refuse, &[&self.which.id.as_str(), &seconds])
            .await
            .context("writing the registry")?;
        let until =
            "SELECT to_char(delete_after AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
            (SELECT revision FROM pgsilo.revision) FROM pgsilo.tenants WHERE id = $1::text";
        let row = transaction.query_one(until, &[&self.which.id.as_str()]).await?;
        let (until, revision): (String, i64) = (row.get(0), row.get(1));
        transaction.commit().await?;
        in_force(&context.registry.client, revision).await?;
        Ok(until)
    }

    fn tell(&self, until: &str) -> Result<()> {
        match self.json {
            true => say::data(&json!({ "id": self.which.id, "delete_after": until }).to_string())?,
            false => say::result(&format!(
                "{id}  is refused, and removed from {until} on; until then: pgsiloctl tenant undelete {id}",
                id = self.which.id
            )),
        }
        Ok(())
    }
}

impl Undelete {
    pub(super) async fn run(self) -> Result<()> {
        let mut session = self.which.server.open().await?;
        journal::claim(&session.client, &self.which.id).await?;
        if journal::unfinished::<Plan>(&session.client, Kind::Delete, &self.which.id)
            .await?
            .is_some()
        {
            bail!("the removal of {} has begun, and cannot be taken back", self.which.id);
        }
        let transaction = take_turn(&mut session.client).await?;
        self.which.author.sign(&transaction).await?;
        let state = "SELECT state FROM pgsilo.tenants WHERE id = $1::text";
        let state = transaction.query_opt(state, &[&self.which.id.as_str()]).await?;
        match state.as_ref().map(|row| row.get::<_, &str>(0)) {
            None => bail!("the registry has no tenant {}", self.which.id),
            Some("deleting") => {}
            Some(other) => bail!("{} is {other}, and is not being deleted", self.which.id),
        }
        // One that was suspended is suspended again.
        let before = "SELECT before ->> 'state' FROM pgsilo.audit
            WHERE relation = 'tenants' AND key = $1 AND after ->> 'state' = 'deleting'
                AND before ->> 'state' <> 'deleting' ORDER BY number DESC LIMIT 1";
        let before = transaction.query_opt(before, &[&self.which.id.as_str()]).await?;
        let before = before.map_or("active".to_owned(), |row| row.get(0));
        let restore = "UPDATE pgsilo.tenants SET state = $2::text, delete_after = NULL WHERE id = $1::text RETURNING revision";
        let row = transaction.query_one(restore, &[&self.which.id.as_str(), &before]).await?;
        let revision = row.get(0);
        transaction.commit().await?;
        say::result(&format!("{}  is {before} again", self.which.id));
        in_force(&session.client, revision).await
    }
}

impl Purge {
    pub(super) async fn run(self) -> Result<()> {
        let mut context = Context::open(&self.server).await?;
        let due = "SELECT id::text FROM pgsilo.tenants WHERE state = 'deleting' AND delete_after <= now()
            UNION SELECT subject::text FROM pgsilo.operations WHERE kind = 'delete' AND ended_at IS NULL ORDER BY 1";
        let due = context.registry.client.query(due, &[]).await.context("reading the tenants")?;
        let due: Vec<TenantId> =
            due.iter().map(|row| TenantId::parse(row.get(0))).collect::<Result<_, _>>()?;
        if due.is_empty() {
            say::progress("no tenant's grace is over");
        }
        let mut failed = 0;
        for id in due {
            if self.dry_run {
                say::result(&format!("would remove {id}"));
                continue;
            }
            if let Err(error) = journal::claim(&context.registry.client, &id).await {
                say::progress(&format!("{id}: {error:#}"));
                continue;
            }
            let removed = async {
                match is_due(&context, &id).await? {
                    true => remove(&mut context, &self.author, &id).await.map(Some),
                    // Taken back since, or removed by another.
                    false => Ok(None),
                }
            };
            match removed.await {
                Ok(None) => say::progress(&format!("{id}  is not to be removed any more")),
                Ok(Some(certificate)) => told(&certificate, self.json)?,
                Err(error) => {
                    say::progress(&format!("{id}: {error:#}"));
                    failed += 1;
                }
            }
        }
        ensure!(failed == 0, "{failed} tenants could not be removed");
        Ok(())
    }
}

/// Whether a tenant's grace is over, or its removal has begun.
async fn is_due(context: &Context, id: &TenantId) -> Result<bool> {
    let due = "SELECT FROM pgsilo.tenants WHERE id = $1::text AND state = 'deleting' AND delete_after <= now()
        UNION ALL SELECT FROM pgsilo.operations WHERE subject = $1::text AND kind = 'delete' AND ended_at IS NULL LIMIT 1";
    let due = context.registry.client.query_opt(due, &[&id.as_str()]).await;
    Ok(due.context("reading the tenants")?.is_some())
}

fn told(certificate: &certificate::Signed, as_json: bool) -> Result<()> {
    match as_json {
        true => say::data(&certificate.file()?)?,
        false => say::result(&format!(
            "{tenant}  is removed. Its certificate: pgsiloctl certificate show {tenant}",
            tenant = certificate.tenant()?
        )),
    }
    Ok(())
}

/// Removes a tenant that is being deleted, and certifies that.
async fn remove(
    context: &mut Context,
    author: &Author,
    id: &TenantId,
) -> Result<certificate::Signed> {
    let begun = journal::unfinished::<Plan>(&context.registry.client, Kind::Delete, id).await?;
    let mut operation = match begun {
        Some(operation) => {
            // Whoever can write the journal alone has nobody removed.
            let due = "SELECT FROM pgsilo.tenants WHERE id = $1::text AND state = 'deleting' AND delete_after <= now()";
            let due = context.registry.client.query_opt(due, &[&id.as_str()]).await?;
            ensure!(
                due.is_some(),
                "the journal says that the removal of {id} has begun, and the registry that it is served"
            );
            operation
        }
        None => begin(context, author, id).await?,
    };
    let outcome = try_remove(context, author, &mut operation).await;
    if let Err(error) = &outcome {
        operation.failed(&context.registry.client, error).await;
    }
    outcome.with_context(|| format!("{id} is not removed yet; run this again"))
}

async fn begin(context: &mut Context, author: &Author, id: &TenantId) -> Result<Operation<Plan>> {
    let plan = plan_of(context, id).await?;
    let cluster = context.cluster(&plan.cluster)?.clone();
    Making::of(&plan, &cluster, &context.identity, &context.bao).ensure_this_tenants().await?;
    let transaction = take_turn(&mut context.registry.client).await?;
    let due = "SELECT FROM pgsilo.tenants WHERE id = $1::text AND state = 'deleting' AND delete_after <= now()";
    let is_due = transaction.query_opt(due, &[&id.as_str()]).await?.is_some();
    ensure!(is_due, "{id} is not to be removed now");
    author.sign(&transaction).await?;
    let operation = Operation::begin(&transaction, Kind::Delete, id, plan).await?;
    transaction.commit().await?;
    Ok(operation)
}

async fn try_remove(
    context: &mut Context,
    author: &Author,
    operation: &mut Operation<Plan>,
) -> Result<certificate::Signed> {
    let plan = operation.plan.clone();
    let cluster = context.cluster(&plan.cluster)?.clone();
    let making = Making::of(&plan, &cluster, &context.identity, &context.bao);
    let done = |step: &Removal| Some(step.name()) == operation.step.as_deref();
    let done = Removal::ALL.iter().position(done).map_or(0, |done| done + 1);
    for step in &Removal::ALL[done..] {
        let evidence = operation.evidence(&context.registry.client).await?;
        let removed = making.remove(*step, &evidence).await?;
        operation.removed(&context.registry.client, step.name(), &removed).await?;
        say::progress(&format!("  {}: {}", plan.id, step.name()));
    }
    let evidence = operation.evidence(&context.registry.client).await?;
    // Before the turn is taken: OpenBAO may be slow, and others write meanwhile.
    let signed = Deletion::of(&context.registry.client, author, &plan, &evidence)
        .await?
        .sign(&context.bao)
        .await?;
    let transaction = take_turn(&mut context.registry.client).await?;
    author.sign(&transaction).await?;
    operation.end(&transaction).await?;
    let delete = "DELETE FROM pgsilo.tenants WHERE id = $1::text";
    transaction.execute(delete, &[&plan.id.as_str()]).await.context("writing the registry")?;
    signed.keep(&transaction, &plan.id).await?;
    transaction.commit().await?;
    Ok(signed)
}

/// What a tenant was made by, as far as it matters for its removal.
pub(super) async fn plan_of(context: &Context, id: &TenantId) -> Result<Plan> {
    let there = "SELECT FROM pgsilo.tenants WHERE id = $1::text";
    if context.registry.client.query_opt(there, &[&id.as_str()]).await?.is_none() {
        bail!("the registry has no tenant {id}");
    }
    let placement = "SELECT p.cluster::text, p.dbname, p.seal::text, p.mount, p.connection, p.roles::text, t.name::text
        FROM pgsilo.tenants t JOIN pgsilo.placements p ON p.tenant = t.id WHERE t.id = $1::text";
    let row = context.registry.client.query_opt(placement, &[&id.as_str()]).await?;
    let row = row.with_context(|| format!("the registry says nowhere where {id} is"))?;
    let (dbname, mount): (String, String) = (row.get(1), row.get(3));
    let name = dbname.strip_prefix("tenant_").and_then(|name| TenantId::parse(name).ok());
    let plan = Plan {
        id: id.clone(),
        name: name.unwrap_or_else(|| id.clone()),
        display_name: row.get(6),
        aliases: Vec::new(),
        regions: None,
        cluster: row.get(0),
        seal: row.get(2),
        template: String::new(),
        connections: 0,
        allow: None,
        lease_hashing: LeaseHashing::default(),
        is_prepared: false,
    };
    let names = plan.names();
    let roles: Map<String, Value> = serde_json::from_str(row.get(5))?;
    let ours = ["rw", "ro", "migrate"].map(|kind| names.lease_role(kind));
    let is_ours =
        |role: &Value| role.as_str().is_some_and(|role| ours.iter().any(|one| one == role));
    let connection: Option<String> = row.get(4);
    if dbname != names.database()
        || mount != names.mount()
        || connection.is_some_and(|connection| connection != names.connection())
        || !roles.values().all(is_ours)
    {
        bail!(
            "{id} was not made by this program: its database is {dbname}, and it leases from {mount}. Remove it by hand, \
             then its entry by pgsiloctl apply --prune"
        );
    }
    Ok(plan)
}
