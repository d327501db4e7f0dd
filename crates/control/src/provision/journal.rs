//! The registry's journal of what takes several steps: what was begun and has not ended. One process at a
//! time is at one tenant; when it is killed, the next goes on with the same plan, or takes it back.

use std::fmt;

use anyhow::{Context, Result, anyhow, bail};
use pgsilo_core::tenant::TenantId;
use pgsilo_registry::schema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_postgres::types::{Json, ToSql};
use tokio_postgres::{Client, GenericClient, Transaction};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A tenant is made.
    Create,
    /// A database is made that is nobody's yet.
    Prepare,
    /// A tenant is removed.
    Delete,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Create => "create",
            Kind::Prepare => "prepare",
            Kind::Delete => "delete",
        })
    }
}

/// Something that was begun and has not ended.
#[derive(Debug)]
pub(crate) struct Operation<P> {
    id: String,
    /// What it was begun with.
    pub(crate) plan: P,
    /// Whether it is being taken back.
    pub(crate) is_undoing: bool,
    /// The last step that was done, or taken back.
    pub(crate) step: Option<String>,
}

/// Waits for nobody: whoever else is at this tenant is told of, and this fails. Kept until the connection
/// ends.
pub(crate) async fn claim(registry: &Client, subject: impl fmt::Display) -> Result<()> {
    let lock = "SELECT hashtextextended(key || ' ' || $1, 0) FROM pgsilo.lock_key";
    let lock = registry.query_one(lock, &[&subject.to_string()]).await;
    let lock: i64 = lock.context("reading the key of locks")?.get(0);
    if registry.query_one("SELECT pg_try_advisory_lock($1)", &[&lock]).await?.get(0) {
        return Ok(());
    }
    let holder = schema::holder(registry, lock).await?;
    let holder = holder.unwrap_or_else(|| "somebody else".to_owned());
    bail!("{holder} of the registry's server is at {subject} already")
}

/// What of a tenant was begun and has not ended.
///
/// # Errors
/// When that is something else.
pub(crate) async fn unfinished<P: DeserializeOwned>(
    registry: &impl GenericClient,
    kind: Kind,
    subject: &TenantId,
) -> Result<Option<Operation<P>>> {
    let unfinished = "SELECT id::text, kind, undoing, step, plan FROM pgsilo.operations
        WHERE subject = $1::text AND ended_at IS NULL";
    let row = registry.query_opt(unfinished, &[&subject.as_str()]).await;
    let Some(row) = row.context("reading the journal")? else { return Ok(None) };
    let found: &str = row.get(1);
    if found != kind.to_string() {
        let command = match found {
            "prepare" => "prepare".to_owned(),
            found => format!("{found} {subject}"),
        };
        bail!("a {found} of {subject} has not ended: run pgsiloctl tenant {command} first");
    }
    let Json(plan) = row.try_get(4).with_context(|| {
        format!(
            "the journal's {kind} of {subject} is not one of this program's: use a newer pgsiloctl"
        )
    })?;
    let (id, is_undoing, step) = (row.get(0), row.get(2), row.get(3));
    Ok(Some(Operation { id, plan, is_undoing, step }))
}

impl<P: Serialize + fmt::Debug + Sync> Operation<P> {
    /// Writes down that it begins, in a transaction that has the turn.
    pub(crate) async fn begin(
        transaction: &Transaction<'_>,
        kind: Kind,
        subject: &TenantId,
        plan: P,
    ) -> Result<Operation<P>> {
        let begin = "INSERT INTO pgsilo.operations (kind, subject, plan) VALUES ($1, $2::text, $3) RETURNING id::text";
        let values: [&(dyn ToSql + Sync); 3] = [&kind.to_string(), &subject.as_str(), &Json(&plan)];
        let row = transaction.query_one(begin, &values).await.map_err(|error| {
            let constraint = error.as_db_error().and_then(|said| said.constraint());
            match constraint {
                Some("one_of_a_name") => {
                    anyhow!("another that is called so there is being made, and has not ended")
                }
                _ => anyhow::Error::from(error).context("writing the journal"),
            }
        });
        let id = row?.get(0);
        Ok(Operation { id, plan, is_undoing: false, step: None })
    }

    /// A step was done, or taken back.
    pub(crate) async fn passed(&mut self, registry: &Client, step: &str) -> Result<()> {
        let passed =
            "UPDATE pgsilo.operations SET step = $2, failure = NULL WHERE id = $1::text::uuid";
        registry.execute(passed, &[&self.id, &step]).await.context("writing the journal")?;
        self.step = Some(step.to_owned());
        Ok(())
    }

    /// A step has removed something, and this is what.
    pub(crate) async fn removed(
        &mut self,
        registry: &Client,
        step: &str,
        what: &Value,
    ) -> Result<()> {
        let removed = "UPDATE pgsilo.operations SET step = $2, failure = NULL, evidence = evidence || jsonb_build_object($2::text, $3::jsonb)
            WHERE id = $1::text::uuid";
        let removed = registry.execute(removed, &[&self.id, &step, &Json(what)]).await;
        removed.context("writing the journal")?;
        self.step = Some(step.to_owned());
        Ok(())
    }

    /// What its steps have removed.
    pub(crate) async fn evidence(&self, registry: &Client) -> Result<Value> {
        let evidence = "SELECT evidence FROM pgsilo.operations WHERE id = $1::text::uuid";
        let row = registry.query_one(evidence, &[&self.id]).await.context("reading the journal")?;
        let Json(evidence) = row.try_get(0)?;
        Ok(evidence)
    }

    /// From here on it is taken back.
    pub(crate) async fn turn_back(&mut self, registry: &impl GenericClient) -> Result<()> {
        let turn = "UPDATE pgsilo.operations SET undoing = true, step = NULL, failure = NULL WHERE id = $1::text::uuid";
        registry.execute(turn, &[&self.id]).await.context("writing the journal")?;
        (self.is_undoing, self.step) = (true, None);
        Ok(())
    }

    /// Why it went no further; for whoever looks at the journal.
    pub(crate) async fn failed(&self, registry: &Client, error: &anyhow::Error) {
        let failed =
            "UPDATE pgsilo.operations SET failure = left($2, 1000) WHERE id = $1::text::uuid";
        // It is told as well.
        let _best_effort = registry.execute(failed, &[&self.id, &format!("{error:#}")]).await;
    }

    /// It has ended, in a transaction that has the turn.
    pub(crate) async fn end(&self, transaction: &Transaction<'_>) -> Result<()> {
        let end = "UPDATE pgsilo.operations SET ended_at = now(), outcome = $2, failure = NULL WHERE id = $1::text::uuid";
        let outcome = if self.is_undoing { "undone" } else { "done" };
        transaction.execute(end, &[&self.id, &outcome]).await.context("writing the journal")?;
        Ok(())
    }
}
