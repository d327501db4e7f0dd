//! `pgsiloctl apply`: makes the registry say what a document says.
//!
//! One transaction, which takes the registry's turn first: what is compared is what is changed. It ends
//! with a look at the whole registry as a proxy sees it, so that what no proxy would serve is not
//! written. A dry run does all of that and then takes it back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::file::MAX_REGISTRY;
use pgsilo_core::registry::{Document, Snapshot};
use pgsilo_core::tenant::TenantId;
use pgsilo_core::toml_file::TomlFile;
use serde_json::{Value, json};
use tokio_postgres::types::Json;
use tokio_postgres::{Client, IsolationLevel, Transaction};

use super::rows::{self, Row, Rows, TABLES, Wanted};
use super::{Author, Server, in_force, take_turn};
use crate::say;

/// Rows that are written at once.
const BATCH: usize = 1000;
/// Lines of one kind of change that are shown, if not all are asked for.
const SHOWN: usize = 40;

/// Make the registry say what a file says.
///
/// Shows what changes, and changes it in one transaction: all of it, or nothing. Of a tenant that the
/// file has it says all: aliases and certificates that it does not have go. A state that is left out
/// stays what it is. Tenants and clusters that the file does not have are left alone, and counted;
/// --prune deletes them from the registry (not their databases). What no proxy would accept is
/// refused. The file is that of a proxy without a registry database; `pgsiloctl registry export`
/// writes one.
#[derive(Debug, Args)]
pub struct Command {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    author: Author,
    /// What the registry is to say.
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Show what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Delete what the file does not have.
    #[arg(long)]
    prune: bool,
    /// With --prune: refuse to delete more tenants than this.
    #[arg(long, value_name = "NUMBER", default_value_t = 10, requires = "prune")]
    max_deletions: usize,
    /// Show every change, however many there are.
    #[arg(long)]
    all: bool,
}

/// What becomes of one row.
#[derive(Debug, PartialEq)]
enum Change {
    Insert(Row),
    /// The columns that are other than they were, as they were and as they will be.
    Update {
        before: Row,
        after: Row,
    },
    Delete,
}

/// What is changed in each table, by key.
type Changes = [BTreeMap<String, Change>; TABLES.len()];

/// Runs the command to its end.
pub(super) async fn run(command: Command) -> Result<()> {
    let file = TomlFile::read_regular(&command.file, MAX_REGISTRY)?;
    // With its mistakes told by line; what it says is then as a proxy would have it.
    Snapshot::read(&command.file, None)?;
    let document: Document = file.parse()?;
    let wanted = rows::of_document(&document, &file)?;

    let mut session = command.server.open().await?;
    let transaction = take_turn(&mut session.client).await?;
    command.author.sign(&transaction).await?;
    let there = read(&transaction).await?;
    let (changes, left_alone) = compare(&there, &wanted.rows, command.prune);
    refuse_moves(&there, &wanted, &changes)?;
    refuse_deletions(&changes)?;
    let deleted = changes[1].values().filter(|change| **change == Change::Delete).count();
    let refused = deleted > command.max_deletions;
    // Nobody waits for a reader of this: it is shown when the turn is given back.
    let mut lines = show(&changes, command.all);
    if !left_alone.is_empty() {
        lines.push(format!("left alone, not in the file: {left_alone} (--prune deletes them)"));
    }
    let total: usize = changes.iter().map(BTreeMap::len).sum();
    let written = async {
        if refused {
            return Ok(());
        }
        write(&transaction, &changes).await?;
        let checked = check(&transaction).await;
        let beside = || {
            format!("beside what is there and not in the file ({left_alone}; --prune deletes it)")
        };
        if left_alone.is_empty() {
            checked?;
        } else {
            checked.with_context(beside)?;
        }
        let now = "SET CONSTRAINTS ALL IMMEDIATE";
        transaction.batch_execute(now).await.context("the registry refuses it")
    };
    let written = written.await;
    let mut revision = None;
    if written.is_err() || refused || command.dry_run {
        transaction.rollback().await?;
    } else {
        let now = "SELECT revision FROM pgsilo.revision";
        revision = Some(transaction.query_one(now, &[]).await?.get(0));
        transaction.commit().await?;
    }
    lines.iter().for_each(|line| say::result(line));
    written?;
    if total > 0 && revision.is_some() {
        let at_openbao = "SELECT EXISTS (SELECT FROM pgsilo.audit
            WHERE relation = 'grants' AND coalesce(after, before) @> '{\"at_openbao\": true}')";
        if session.client.query_one(at_openbao, &[]).await?.get(0) {
            say::progress("grants are at OpenBAO, too: pgsiloctl grant sync makes it follow");
        }
    }
    if refused {
        bail!(
            "the file does not have {deleted} of the registry's tenants: is it whole? \
             --max-deletions {deleted} deletes them"
        );
    }
    match revision {
        None => say::result(&format!("a dry run: {total} changes would be made, none was")),
        Some(revision) => {
            say::result(&format!("{total} changes, revision {revision}"));
            in_force(&session.client, revision).await?;
        }
    }
    Ok(())
}

/// They begin elsewhere, with a time until which they can be undone.
fn refuse_deletions(changes: &Changes) -> Result<()> {
    let begins = |change: &Change| match change {
        Change::Insert(row) | Change::Update { after: row, .. } => {
            row.get("state") == Some(&json!("deleting"))
        }
        Change::Delete => false,
    };
    match changes[1].iter().find(|(_, change)| begins(change)) {
        Some((id, _)) => {
            bail!("tenant {id:?}: a deletion is not begun by a file; leave the state out")
        }
        None => Ok(()),
    }
}

/// A server that a placement describes is a cluster of its own only for the tenants of the file: what it
/// says of it is not to change where others are.
fn refuse_moves(there: &Rows, wanted: &Wanted, changes: &Changes) -> Result<()> {
    let [_, tenants, ..] = &wanted.rows.0;
    for (name, change) in &changes[0] {
        let is_other =
            matches!(change, Change::Update { .. }) && wanted.unnamed_clusters.contains(name);
        let on_it = |row: &Row| row.get("cluster").and_then(Value::as_str) == Some(name);
        let [_, _, placements, ..] = &there.0;
        let other = placements.iter().find(|(id, row)| on_it(row) && !tenants.contains_key(*id));
        if let Some((other, _)) = other.filter(|_| is_other) {
            bail!(
                "a placement says something else of {name} than the registry, and tenant {other:?}, which the \
                 file does not have, is there, too: write a [[cluster]] to change it for all"
            );
        }
    }
    Ok(())
}

/// What the registry says, in full.
pub(super) async fn read(transaction: &Transaction<'_>) -> Result<Rows> {
    let mut all = Rows::default();
    for ((table, key, _), rows) in TABLES.into_iter().zip(&mut all.0) {
        let query = format!(
            "SELECT {key}::text, to_jsonb(t) - 'revision' - 'settings' FROM pgsilo.{table} t"
        );
        for row in
            transaction.query(&query, &[]).await.with_context(|| format!("reading {table}"))?
        {
            let key: String = row.try_get(0)?;
            let columns = row.try_get(1).map_err(anyhow::Error::from);
            let columns =
                columns.and_then(|Json(columns): Json<Row>| rows::canonical(table, columns));
            let columns = columns.with_context(|| format!("reading {key:?} of {table}"))?;
            rows.insert(key, columns);
        }
    }
    Ok(all)
}

/// All that proxies are told, of one moment.
pub(crate) async fn snapshot(client: &mut Client) -> Result<Snapshot> {
    let of_one_moment = client.build_transaction().read_only(true);
    let transaction = of_one_moment.isolation_level(IsolationLevel::RepeatableRead).start().await?;
    let document = read(&transaction).await?.document()?;
    let snapshot = Snapshot::of(document, None, &|path| path.to_owned());
    snapshot.context("no proxy would take all of the registry")
}

/// One tenant with its cluster, as proxies are told of them; an empty snapshot where there is none.
pub(crate) async fn snapshot_of(client: &Client, id: &TenantId) -> Result<Snapshot> {
    let entries = "SELECT t.entry, c.entry FROM pgsilo.proxy_tenants t
            JOIN pgsilo.placements p ON p.tenant = t.id JOIN pgsilo.proxy_clusters c ON c.name = p.cluster
        WHERE t.id = $1";
    let row = client.query_opt(entries, &[&id.as_str()]).await.context("reading the registry")?;
    let Some(row) = row else { return Ok(Snapshot::empty()) };
    let (Json(tenant), Json(cluster)) = (row.try_get(0)?, row.try_get(1)?);
    let document = Document { cluster: vec![cluster], tenant: vec![tenant], binding: Vec::new() };
    let snapshot = Snapshot::of(document, None, &|path| path.to_owned());
    snapshot.with_context(|| format!("no proxy would take {id}"))
}

/// What is to be changed, and what is not in the document and left as it is. Of a tenant that the
/// document has it says all.
fn compare(there: &Rows, wanted: &Rows, prune: bool) -> (Changes, String) {
    let mut changes = Changes::default();
    let mut left_alone = Vec::new();
    let [_, tenants, ..] = &wanted.0;
    for (number, (there, wanted)) in there.0.iter().zip(&wanted.0).enumerate() {
        let of_table = &mut changes[number];
        for (key, row) in wanted {
            let change = match there.get(key) {
                None => Some(Change::Insert(row.clone())),
                Some(before) => difference(before, row),
            };
            of_table.extend(change.map(|change| (key.clone(), change)));
        }
        let mut left = 0;
        for (key, row) in there.iter().filter(|(key, _)| !wanted.contains_key(*key)) {
            let tenant = row.get("tenant").and_then(Value::as_str);
            if prune || tenant.is_some_and(|tenant| tenants.contains_key(tenant)) {
                of_table.insert(key.clone(), Change::Delete);
            } else {
                left += 1;
            }
        }
        if left > 0 {
            left_alone.push(format!("{left} {}", TABLES[number].0));
        }
    }
    (changes, left_alone.join(", "))
}

/// Of the columns that are spoken of, those that change.
fn difference(before: &Row, wanted: &Row) -> Option<Change> {
    let (mut was, mut will_be) = (Row::new(), Row::new());
    for (column, value) in wanted {
        let now = before.get(column).unwrap_or(&Value::Null);
        if now != value {
            was.insert(column.clone(), now.clone());
            will_be.insert(column.clone(), value.clone());
        }
    }
    (!will_be.is_empty()).then_some(Change::Update { before: was, after: will_be })
}

/// The changes as lines.
fn show(changes: &Changes, all: bool) -> Vec<String> {
    let mut lines = Vec::new();
    for ((_, _, name), changes) in TABLES.into_iter().zip(changes) {
        let shown = if all { changes.len() } else { SHOWN };
        for (key, change) in changes.iter().take(shown) {
            lines.push(match change {
                Change::Insert(_) => format!("+ {name} {key}"),
                Change::Delete => format!("- {name} {key}"),
                Change::Update { before, after } => {
                    let columns = before.iter().zip(after.values());
                    let columns: Vec<_> = columns
                        .map(|((column, was), is)| {
                            format!("{column} {} -> {}", short(was), short(is))
                        })
                        .collect();
                    format!("~ {name} {key}: {}", columns.join(", "))
                }
            });
        }
        if let Some(more @ 1..) = changes.len().checked_sub(shown) {
            lines.push(format!("  and {more} more of these (--all shows them)"));
        }
    }
    lines
}

/// A value that fits into a line.
fn short(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((at, _)) => format!("{}...", &text[..at]),
    }
}

/// What is referred to comes first, and goes last.
async fn write(transaction: &Transaction<'_>, changes: &Changes) -> Result<()> {
    // Two may change places.
    transaction.batch_execute("SET CONSTRAINTS ALL DEFERRED").await?;
    for ((table, key, _), changes) in TABLES.into_iter().zip(changes).rev() {
        let gone: Vec<&String> = changes
            .iter()
            .filter(|(_, change)| **change == Change::Delete)
            .map(|(key, _)| key)
            .collect();
        if !gone.is_empty() {
            let order = format!("DELETE FROM pgsilo.{table} WHERE {key} = ANY ($1)");
            transaction
                .execute(&order, &[&gone])
                .await
                .with_context(|| format!("deleting {table}"))?;
        }
    }
    for ((table, key, _), changes) in TABLES.into_iter().zip(changes) {
        // Rows of which the same columns are written go together.
        let mut orders = BTreeMap::<(bool, Vec<&String>), Vec<Row>>::new();
        for (id, change) in changes {
            let (is_new, row) = match change {
                Change::Insert(row) => (true, row),
                Change::Update { after, .. } => (false, after),
                Change::Delete => continue,
            };
            let mut written = row.clone();
            written.insert(key.to_owned(), Value::String(id.clone()));
            orders.entry((is_new, row.keys().collect())).or_default().push(written);
        }
        for ((is_new, columns), rows) in orders {
            let list =
                columns.iter().map(|column| format!("{column:?}")).collect::<Vec<_>>().join(", ");
            let from = format!("jsonb_populate_recordset(NULL::pgsilo.{table}, $1) AS new");
            let order = if is_new {
                format!("INSERT INTO pgsilo.{table} ({list}) SELECT {list} FROM {from}")
            } else {
                let set = columns.iter().map(|column| format!("{column:?} = new.{column:?}"));
                let set = set.collect::<Vec<_>>().join(", ");
                format!(
                    "UPDATE pgsilo.{table} AS t SET {set} FROM {from} WHERE t.{key} = new.{key}"
                )
            };
            for (number, batch) in rows.chunks(BATCH).enumerate() {
                if rows.len() > BATCH {
                    say::progress(&format!("{table}: {} of {}", number * BATCH, rows.len()));
                }
                let written = transaction.execute(&order, &[&Json(batch)]).await;
                written.with_context(|| format!("writing {table}"))?;
            }
        }
    }
    Ok(())
}

/// That proxies would take all of it: also what nothing but a look at the whole can tell.
async fn check(transaction: &Transaction<'_>) -> Result<()> {
    let document = read(transaction).await?.document()?;
    let names: Vec<_> = document.tenant.iter().map(|tenant| tenant.id.clone()).collect();
    let no_files = |path: &Path| path.to_owned();
    match Snapshot::of(document, None, &no_files) {
        Ok(_) => Ok(()),
        Err(error) => {
            let number =
                error.field.strip_prefix("tenant[").and_then(|rest| rest.split(']').next());
            let tenant = number.and_then(|number| names.get(number.parse::<usize>().ok()?));
            match tenant {
                Some(tenant) => bail!("no proxy would take that: tenant {tenant:?}: {error}"),
                None => bail!("no proxy would take that: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(value: Value) -> Rows {
        let tables: Vec<BTreeMap<String, Row>> = serde_json::from_value(value).expect("rows");
        Rows(tables.try_into().expect("all tables"))
    }

    #[test]
    fn what_a_document_does_not_have_is_left_alone_but_what_is_of_its_tenants() {
        let there = rows(json!([
            { "eu1": { "name": "eu1", "server_version": 17 } },
            { "acme": { "id": "acme", "state": "active" }, "globex": { "id": "globex" } },
            {},
            { "old": { "alias": "old", "tenant": "acme" }, "org": { "alias": "org", "tenant": "globex" } },
            {},
        ]));
        let wanted = rows(json!([
            {},
            { "acme": { "id": "acme", "state": "paused" } },
            {},
            { "new": { "alias": "new", "tenant": "acme" } },
            {},
        ]));
        let (changes, left_alone) = compare(&there, &wanted, false);
        let [clusters, tenants, _, aliases, _] = &changes;
        assert!(clusters.is_empty());
        let (before, after) = (json!({ "state": "active" }), json!({ "state": "paused" }));
        let paused = Change::Update {
            before: before.as_object().expect("a row").clone(),
            after: after.as_object().expect("a row").clone(),
        };
        assert_eq!(*tenants, BTreeMap::from([("acme".to_owned(), paused)]));
        assert_eq!(aliases.keys().collect::<Vec<_>>(), ["new", "old"]);
        assert_eq!(aliases["old"], Change::Delete);
        assert_eq!(left_alone, "1 clusters, 1 tenants, 1 aliases");
        let (changes, left_alone) = compare(&there, &wanted, true);
        assert_eq!(changes[1]["globex"], Change::Delete);
        assert_eq!((&*left_alone, changes[3].len()), ("", 3));
    }
}
