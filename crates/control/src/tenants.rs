//! `pgsiloctl tenant`: which tenants there are, and whether they are served; how they are made.

mod check;
mod create;
mod delete;
mod prepare;
mod repair;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use pgsilo_core::tenant::TenantId;
use serde_json::{Value, json};
use tokio_postgres::{Client, IsolationLevel};

use crate::logins::block_on;
use crate::registry::{Author, Server, in_force, take_turn};
use crate::say;

/// How many changes `show` tells.
const CHANGES: i64 = 5;
/// What it tells, in this order.
const FIELDS: [&str; 18] = [
    "id",
    "name",
    "state",
    "delete_after",
    "cluster",
    "region",
    "regions",
    "database",
    "database_names",
    "seal",
    "mount",
    "roles",
    "aliases",
    "certificates",
    "limits",
    "grants",
    "locks",
    "revision",
];

/// Which tenants there are, and whether they are served.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say which tenants there are, one a line.
    List {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// In this cluster only.
        #[arg(long, value_name = "NAME")]
        cluster: Option<String>,
        /// In this state only: active, suspended, paused or deleting.
        #[arg(long, value_name = "STATE", value_parser = ["active", "suspended", "paused", "deleting"])]
        state: Option<String>,
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Say all that the registry has of a tenant, and who has changed it last.
    Show {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// The tenant.
        #[arg(value_parser = TenantId::parse)]
        id: TenantId,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Refuse a tenant's logins and end its sessions at once, until it is resumed.
    ///
    /// Clients read 42501, which is not tried again.
    Suspend(Which),
    /// Serve a tenant again that is suspended or paused.
    Resume(Which),
    /// Refuse a tenant's logins for a while and let its transactions finish.
    ///
    /// Clients read 57P03, which they try again. Its sessions end when they are idle, and transactions
    /// after the proxies' `[limits] pause_timeout`.
    Pause(Which),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Create(create::Create),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Prepare(prepare::Prepare),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Check(check::Check),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Repair(repair::Repair),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Delete(delete::Delete),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Undelete(delete::Undelete),
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Purge(delete::Purge),
}

/// A tenant that is changed, and by whom.
#[derive(Debug, Args)]
pub struct Which {
    /// The registry's.
    #[command(flatten)]
    server: Server,
    /// Who does it, and why.
    #[command(flatten)]
    author: Author,
    /// The tenant.
    #[arg(value_parser = TenantId::parse)]
    id: TenantId,
}

/// Runs the command to its end.
pub fn run(command: Command) -> Result<ExitCode> {
    if let Command::Delete(delete) = &command {
        delete.confirm()?;
    }
    block_on(async {
        match command {
            Command::Check(check) => return check.run().await,
            Command::List { server, cluster, state, json } => {
                list(&server, cluster, state, json).await
            }
            Command::Show { server, id, json } => show(&server, &id, json).await,
            Command::Suspend(which) => change(which, "suspended").await,
            Command::Resume(which) => change(which, "active").await,
            Command::Pause(which) => change(which, "paused").await,
            Command::Create(create) => create.run().await,
            Command::Prepare(prepare) => prepare.run().await,
            Command::Repair(repair) => repair.run().await,
            Command::Delete(delete) => delete.run().await,
            Command::Undelete(undelete) => undelete.run().await,
            Command::Purge(purge) => purge.run().await,
        }?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Whether a tenant may come from one state to another by these commands.
fn may_become(id: &TenantId, before: &str, after: &str) -> Result<()> {
    match (before, after) {
        ("deleting", _) => {
            bail!("{id} is being deleted; until it is removed: pgsiloctl tenant undelete {id}")
        }
        // Who resumes it behind a move would have lifted the suspension.
        ("suspended", "paused") => bail!("{id} is suspended, which keeps out more than a pause"),
        _ => Ok(()),
    }
}

async fn change(which: Which, state: &str) -> Result<()> {
    let Which { server, author, id } = which;
    let mut session = server.open().await?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let before = "SELECT state FROM pgsilo.tenants WHERE id = $1::text";
    let Some(row) = transaction.query_opt(before, &[&id.as_str()]).await? else {
        bail!("the registry has no tenant {id}");
    };
    let before: String = row.get(0);
    may_become(&id, &before, state)?;
    if before == state {
        say::result(&format!("{id}  is {state} already"));
        return Ok(());
    }
    let change =
        "UPDATE pgsilo.tenants SET state = $2::text WHERE id = $1::text RETURNING revision";
    let changed = transaction.query_one(change, &[&id.as_str(), &state]).await;
    let revision = changed.with_context(|| format!("making {id} {state}"))?.get(0);
    transaction.commit().await?;
    say::result(&format!("{id}  is {state}; it was {before}"));
    in_force(&session.client, revision).await
}

async fn list(
    server: &Server,
    cluster: Option<String>,
    state: Option<String>,
    as_json: bool,
) -> Result<()> {
    let session = server.open().await?;
    let tenants = "SELECT t.id::text, t.state, p.cluster::text, c.region::text, p.dbname, t.name::text
        FROM pgsilo.tenants t LEFT JOIN pgsilo.placements p ON p.tenant = t.id
            LEFT JOIN pgsilo.clusters c ON c.name = p.cluster
        WHERE ($1::text IS NULL OR p.cluster = $1) AND ($2::text IS NULL OR t.state = $2) ORDER BY t.id";
    let rows = session.client.query(tenants, &[&cluster, &state]).await;
    let rows = rows.context("reading the tenants")?;
    const COLUMNS: [&str; 6] = ["id", "state", "cluster", "region", "database", "name"];
    let tenants = rows.iter().map(|row| std::array::from_fn(|column| row.get(column)));
    let tenants: Vec<[Option<String>; 6]> = tenants.collect();
    if as_json {
        for tenant in tenants {
            let tenant: BTreeMap<_, _> = COLUMNS.into_iter().zip(tenant).collect();
            say::data(&serde_json::to_string(&tenant)?)?;
        }
        return Ok(());
    }
    if tenants.is_empty() {
        say::result("there are no such tenants");
        return Ok(());
    }
    let shown =
        tenants.into_iter().map(|tenant| tenant.map(|text| text.unwrap_or_else(|| "-".to_owned())));
    say::table(COLUMNS, &shown.collect::<Vec<_>>())?;
    Ok(())
}

async fn show(server: &Server, id: &TenantId, as_json: bool) -> Result<()> {
    let mut session = server.open().await?;
    let Some(tenant) = of_one_moment(&mut session.client, id).await? else {
        bail!("the registry has no tenant {id}");
    };
    if as_json {
        say::data(&tenant.to_string())?;
        return Ok(());
    }
    for field in FIELDS {
        let text = shown(&tenant[field]);
        if !text.is_empty() {
            say::result(&format!("{field:<16}{text}"));
        }
    }
    for change in tenant["changes"].as_array().into_iter().flatten() {
        let [at, by, what, why] =
            ["at", "by", "what", "why"].map(|field| change[field].as_str().unwrap_or_default());
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        say::result(&format!("changed         {at} by {by}, {what}{why}"));
    }
    Ok(())
}

/// A value for a person; nothing where there is none.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(shown).collect::<Vec<_>>().join(", "),
        Value::Object(all) => {
            let one = |(key, value): (&String, &Value)| format!("{key} = {}", shown(value));
            all.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        value => value.to_string(),
    }
}

/// All that there is of a tenant, as an object.
async fn of_one_moment(client: &mut Client, id: &TenantId) -> Result<Option<Value>> {
    let of_one_moment = client.build_transaction().read_only(true);
    let transaction = of_one_moment.isolation_level(IsolationLevel::RepeatableRead).start().await?;
    let tenant = "SELECT json_build_object(
            'id', t.id, 'name', t.name, 'state', t.state, 'delete_after', t.delete_after,
            'cluster', p.cluster, 'region', c.region, 'regions', t.regions, 'database', p.dbname,
            'seal', p.seal, 'mount', p.mount, 'roles', p.roles, 'database_names', t.database_names,
            'aliases', (SELECT coalesce(json_agg(alias ORDER BY alias), '[]') FROM pgsilo.aliases WHERE tenant = t.id),
            'certificates', (SELECT coalesce(json_agg(certificate ORDER BY certificate), '[]')
                FROM pgsilo.bindings WHERE tenant = t.id),
            'limits', t.limits,
            'grants', (SELECT count(*) FROM pgsilo.grants
                WHERE tenant = t.id AND granted_by IS NOT NULL AND coalesce(expires_at > now(), true)),
            'locks', (SELECT count(*) FROM pgsilo.locks
                WHERE kind = 'tenant' AND target = t.id AND coalesce(expires_at > now(), true)),
            'revision', t.revision)::text
        FROM pgsilo.tenants t LEFT JOIN pgsilo.placements p ON p.tenant = t.id
            LEFT JOIN pgsilo.clusters c ON c.name = p.cluster WHERE t.id = $1::text";
    let Some(row) = transaction.query_opt(tenant, &[&id.as_str()]).await? else { return Ok(None) };
    let mut tenant: Value = serde_json::from_str(row.get(0))?;
    let changes = "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
            coalesce(actor, login), operation || ' of ' || relation, reason
        FROM pgsilo.audit WHERE relation IN ('tenants', 'placements') AND key = $1
        ORDER BY number DESC LIMIT $2";
    let changes = transaction.query(changes, &[&id.as_str(), &CHANGES]).await?;
    let changes = changes.iter().map(|row| {
        let [at, by, what, why] = [0, 1, 2, 3].map(|column| row.get::<_, Option<String>>(column));
        json!({ "at": at, "by": by, "what": what, "why": why })
    });
    tenant["changes"] = changes.collect();
    Ok(Some(tenant))
}
