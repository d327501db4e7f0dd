//! `pgsiloctl grant`: who may use a tenant, where an issuer's word is not enough.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use pgsilo_core::duration;
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_core::text::is_loggable;
use serde_json::json;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::policies::{AtOpenBao, Grantor, Policies, Whose};
use super::{Author, Server, in_force, take_turn};
use crate::say;

/// The longest that a break-glass grant lasts. The registry refuses longer ones.
const LONGEST_BREAK_GLASS: Duration = Duration::from_secs(4 * 60 * 60);

/// Who may use a tenant.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Let a subject use a tenant.
    ///
    /// It counts for issuers that the proxies' configuration has with authorization = "grant". When it
    /// lapses or is revoked, the sessions that need it end (57P01).
    Add {
        /// Which.
        #[command(flatten)]
        grant: Grant,
        /// In an emergency: for 4 hours at most, and each use of it is an error in the proxies' logs.
        #[arg(long, requires = "ttl")]
        break_glass: bool,
    },
    /// Ask for a grant, which somebody else must approve.
    Request {
        /// Which.
        #[command(flatten)]
        grant: Grant,
    },
    /// Give what somebody else has asked for; its time begins now.
    Approve(One),
    /// Refuse what somebody has asked for.
    Deny(One),
    /// Take grants back, and end the sessions that need them.
    Revoke(One),
    /// Make OpenBAO have exactly the registry's grants, where they are written there, too.
    ///
    /// After a restore of either, or where a tenant's mount or roles have changed.
    Sync {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Who writes there.
        #[command(flatten)]
        grantor: Grantor,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// Take no more than so many policies away: more is more likely the wrong registry.
        #[arg(long, value_name = "N", default_value_t = 10)]
        max_deletions: usize,
    },
    /// Say which grants there are, and which were asked for.
    List {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Of one tenant.
        #[arg(long, value_name = "ID")]
        tenant: Option<String>,
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
}

/// A grant.
#[derive(Debug, Args)]
pub struct Grant {
    /// The registry's.
    #[command(flatten)]
    server: Server,
    /// Who does it, and why.
    #[command(flatten)]
    author: Author,
    /// Who vouches for the subject.
    #[arg(long, value_name = "URL")]
    issuer: String,
    /// Who gets it: `sub` in the tokens.
    subject: String,
    /// The tenant.
    #[arg(value_parser = TenantId::parse)]
    tenant: TenantId,
    /// How much: read-only, read-write or migrate; more includes less.
    access: Access,
    /// For how long: 30m, 12h, 7d [default: until it is revoked].
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    ttl: Option<Duration>,
    #[command(flatten)]
    at_openbao: AtOpenBao,
}

/// Grants that are there.
#[derive(Debug, Args)]
pub struct One {
    /// The registry's.
    #[command(flatten)]
    server: Server,
    /// Who does it, and why.
    #[command(flatten)]
    author: Author,
    /// Its id, as `list` has it.
    id: String,
    #[command(flatten)]
    at_openbao: AtOpenBao,
    /// To revoke or deny: not at OpenBAO, which has it until `pgsiloctl grant sync`.
    #[arg(long)]
    registry_only: bool,
}

/// Runs the command to its end.
pub(super) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Add { grant, break_glass } => give(grant, true, break_glass).await,
        Command::Request { grant } => give(grant, false, false).await,
        Command::Approve(one) => approve(one).await,
        Command::Deny(one) => end(one, "granted_by IS NULL", "denied").await,
        Command::Revoke(one) => end(one, "granted_by IS NOT NULL", "revoked").await,
        Command::Sync { server, grantor, dry_run, max_deletions } => {
            sync(&server, &grantor, dry_run, max_deletions).await
        }
        Command::List { server, tenant, json } => list(&server, tenant.as_deref(), json).await,
    }
}

async fn give(grant: Grant, at_once: bool, break_glass: bool) -> Result<()> {
    let Grant { server, author, issuer, subject, tenant, access, ttl, at_openbao } = grant;
    let policies = at_openbao.policies(false)?;
    if author.reason.is_empty() {
        bail!("--reason is missing: a grant says why it was given");
    }
    for (what, text) in [("--issuer", &issuer), ("the subject", &subject)] {
        if !is_loggable(text) {
            bail!(
                "{what} is in no token that is taken: 1 to 256 characters, none of them controls or marks of direction"
            );
        }
    }
    if break_glass && ttl.is_none_or(|ttl| ttl > LONGEST_BREAK_GLASS) {
        bail!("--break-glass lasts for 4h at most: say --ttl 4h or less");
    }
    let mut session = server.open().await?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let insert = "INSERT INTO pgsilo.grants
            (issuer, subject, tenant, access, reason, lasts, break_glass, expires_at, granted_by, granted_at,
                requested_by, at_openbao)
        SELECT $1::text, $2::text, $3::text, $4::text, $5::text, make_interval(secs => $6), $7::boolean,
            CASE WHEN $8::boolean THEN now() + make_interval(secs => $6) END,
            CASE WHEN $8::boolean THEN who END, CASE WHEN $8::boolean THEN now() END,
            CASE WHEN NOT $8::boolean THEN who END, $9::boolean
        FROM coalesce(nullif(current_setting('pgsilo.actor', true), ''), session_user) AS who
        RETURNING id::text, revision";
    let seconds = ttl.map(|ttl| ttl.as_secs_f64());
    let (tenant, access) = (tenant.as_str(), access.as_str());
    let (reason, at_openbao) = (&author.reason, at_openbao.at_openbao);
    let values: [&(dyn ToSql + Sync); 9] = [
        &issuer,
        &subject,
        &tenant,
        &access,
        reason,
        &seconds,
        &break_glass,
        &at_once,
        &at_openbao,
    ];
    let made = transaction.query_one(insert, &values).await;
    let made = made.with_context(|| format!("granting {access} access to {tenant:?}"))?;
    let (id, revision): (String, i64) = (made.get(0), made.get(1));
    transaction.commit().await?;
    if !at_once {
        say::result(&format!(
            "{id}  asked for: somebody else must approve it (pgsiloctl grant approve {id})"
        ));
        return Ok(());
    }
    say::result(&format!("{id}  {subject} of {issuer} may use {tenant}: {access}"));
    let tenant = tenant.to_owned();
    let whose = Whose { issuer, subject, tenant };
    if break_glass {
        say::progress(
            "BREAK GLASS: each use of it is an error in the proxies' logs, and it is in the registry's audit",
        );
    }
    both(policies, &session.client, revision, whose).await
}

async fn approve(one: One) -> Result<()> {
    let One { server, author, id, at_openbao, registry_only: _ } = one;
    let mut session = server.open().await?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let give = "UPDATE pgsilo.grants SET granted_at = now(), expires_at = now() + lasts, at_openbao = at_openbao OR $2,
            granted_by = coalesce(nullif(current_setting('pgsilo.actor', true), ''), session_user)
        WHERE id::text = $1 AND granted_by IS NULL
        RETURNING revision, issuer::text, subject::text, tenant::text, at_openbao";
    let given = match transaction.query_opt(give, &[&id, &at_openbao.at_openbao]).await {
        Err(error) if error.code() == Some(&SqlState::CHECK_VIOLATION) => {
            bail!("who has asked for it does not approve it")
        }
        given => given.context("approving")?,
    };
    let Some(given) = given else { bail!("there is nothing to approve with the id {id:?}") };
    let (revision, whose) = (given.get(0), whose(&given, 1));
    let policies = at_openbao.policies(given.get(4))?;
    transaction.commit().await?;
    say::result(&format!("{id}  granted"));
    both(policies, &session.client, revision, whose).await
}

async fn end(one: One, which: &str, done: &str) -> Result<()> {
    let One { server, author, id, at_openbao, registry_only } = one;
    let mut session = server.open().await?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let end = format!(
        "DELETE FROM pgsilo.grants WHERE id::text = $1 AND {which}
         RETURNING issuer::text, subject::text, tenant::text, at_openbao"
    );
    let Some(ended) = transaction.query_opt(&end, &[&id]).await.context("ending a grant")? else {
        bail!("there is none to be {done} with the id {id:?}");
    };
    let policies = match registry_only {
        true => None,
        false => at_openbao
            .policies(ended.get(3))
            .context("nothing was done; --registry-only takes it back at the proxies alone")?,
    };
    let revision = "SELECT revision FROM pgsilo.revision";
    let revision = transaction.query_one(revision, &[]).await?.get(0);
    transaction.commit().await?;
    say::result(&format!("{id}  {done}"));
    if registry_only && ended.get::<_, bool>(3) {
        say::progress("OpenBAO has it still: pgsiloctl grant sync");
    }
    both(policies, &session.client, revision, whose(&ended, 0)).await
}

async fn sync(
    server: &Server,
    grantor: &Grantor,
    dry_run: bool,
    max_deletions: usize,
) -> Result<()> {
    let (policies, session) = (grantor.policies()?, server.open().await?);
    let differences = policies.differences(&session.client).await?;
    let gone = differences.gone.len();
    differences.gone.iter().for_each(|name| say::result(&format!("- {name}")));
    differences.written().for_each(|name| say::result(&format!("+ {name}")));
    let all = differences.all;
    if dry_run {
        let written = differences.written().count();
        say::progress(&format!("{written} of {all} would be written, and {gone} taken away"));
        return Ok(());
    }
    if gone > max_deletions {
        bail!(
            "{gone} policies would be taken away: is it the right registry? --max-deletions {gone} does it"
        );
    }
    policies.write(&differences).await?;
    say::progress(&format!(
        "OpenBAO has the policies of {all} grants and accesses; {gone} had to go"
    ));
    Ok(())
}

/// Whose grant a row is of, from a column on.
fn whose(row: &Row, first: usize) -> Whose {
    let [issuer, subject, tenant] = [0, 1, 2].map(|column| row.get(first + column));
    Whose { issuer, subject, tenant }
}

/// Waits until the proxies have it, which is soon, and makes OpenBAO follow, which may not answer.
async fn both(
    policies: Option<Policies>,
    registry: &Client,
    revision: i64,
    whose: Whose,
) -> Result<()> {
    let at_proxies = in_force(registry, revision).await;
    if let Some(policies) = policies {
        policies.follow(registry, &whose).await?;
    }
    at_proxies
}

async fn list(server: &Server, tenant: Option<&str>, as_json: bool) -> Result<()> {
    let session = server.open().await?;
    let grants =
        "SELECT id::text, issuer::text, subject::text, tenant::text, access::text, reason::text,
            to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
            requested_by::text, granted_by::text, break_glass, coalesce(expires_at <= now(), false)
        FROM pgsilo.grants WHERE $1::text IS NULL OR tenant = $1 ORDER BY tenant, subject, id";
    let rows = session.client.query(grants, &[&tenant]).await.context("reading the grants")?;
    for row in &rows {
        let text = |column: usize| row.get::<_, Option<String>>(column);
        let (is_break_glass, is_over): (bool, bool) = (row.get(9), row.get(10));
        if as_json {
            let grant = json!({
                "id": text(0), "issuer": text(1), "subject": text(2), "tenant": text(3), "access": text(4),
                "reason": text(5), "expires_at": text(6), "requested_by": text(7), "granted_by": text(8),
                "break_glass": is_break_glass, "is_over": is_over,
            });
            say::data(&grant.to_string())?;
            continue;
        }
        let [id, issuer, subject, tenant, access, reason] =
            [0, 1, 2, 3, 4, 5].map(|column| text(column).unwrap_or_default());
        let state = match (text(8), text(7)) {
            (Some(by), _) if is_over => format!("granted by {by}, and over"),
            (Some(by), _) => format!("granted by {by}"),
            (None, by) => format!("asked for by {}", by.unwrap_or_default()),
        };
        let until = text(6).map(|until| format!(", until {until}")).unwrap_or_default();
        let loud = if is_break_glass { ", BREAK GLASS" } else { "" };
        say::result(&format!(
            "{id}  {subject} of {issuer}: {tenant} {access}{until}{loud} ({state}: {reason})"
        ));
    }
    if rows.is_empty() && !as_json {
        say::result("there are no grants");
    }
    Ok(())
}
