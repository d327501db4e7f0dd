//! `pgsiloctl lock`: keeps somebody out at once, whatever else the registry says.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use pgsilo_core::duration;
use pgsilo_core::tenant::TenantId;
use pgsilo_core::text::is_loggable;
use pgsilo_core::tls::Holder;
use pgsilo_registry::schema::installed;
use serde_json::json;

use super::{Author, Server, in_force, take_turn};
use crate::say;

/// Who is kept out.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lock a tenant, a subject, an issuer, a token, a certificate or a range of addresses.
    ///
    /// Its sessions end (57P01), and new ones are refused (42501), within a second at every proxy that
    /// reads this registry. It waits until they have it, and says which have not.
    Add(Add),
    /// Say which locks there are.
    List {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Take locks away.
    Remove {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Who does it.
        #[command(flatten)]
        author: Author,
        /// Their ids, as `list` has them.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

/// A lock.
#[derive(Debug, Args)]
pub struct Add {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    author: Author,
    /// What is locked.
    #[arg(value_enum)]
    kind: Kind,
    /// Which one: a tenant's id, a token's subject or id, an issuer's URL, the name in a certificate, an
    /// address or a range of them (10.1.0.0/16).
    target: String,
    /// Whose subject or token, if not any issuer's.
    #[arg(long, value_name = "URL")]
    issuer: Option<String>,
    /// What those who are kept out read, beside that they are.
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// For how long: 30m, 12h, 7d [default: until it is removed].
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    ttl: Option<Duration>,
    /// Only tokens issued and certificates made before now: a new login gets in.
    #[arg(long)]
    issued_before_now: bool,
}

/// What can be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// All of a tenant's sessions.
    Tenant,
    /// Whoever a token or a certificate names.
    Subject,
    /// All whom an issuer vouches for.
    Issuer,
    /// One token, by its `jti`.
    Token,
    /// One certificate, by the name in it.
    Certificate,
    /// Clients of these addresses.
    Address,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Tenant => "tenant",
            Kind::Subject => "subject",
            Kind::Issuer => "issuer",
            Kind::Token => "token",
            Kind::Certificate => "certificate",
            Kind::Address => "address",
        }
    }
}

/// Runs the command to its end.
pub(super) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Add(lock) => add(lock).await,
        Command::List { server, json } => list(&server, json).await,
        Command::Remove { server, author, ids } => remove(&server, &author, &ids).await,
    }
}

async fn add(lock: Add) -> Result<()> {
    let Add { server, author, kind, target, issuer, message, ttl, issued_before_now } = lock;
    if kind == Kind::Tenant && TenantId::parse(&target).is_err() {
        bail!("{target:?} is no tenant's id");
    }
    if ttl.is_some_and(|ttl| ttl.is_zero()) {
        bail!("--ttl 0s would lock nobody");
    }
    if kind == Kind::Certificate && !Holder::may_be_named(&target) {
        bail!(
            "{target:?} is in no certificate that is taken: it is a URI, or \"dns:\" and a host in lower case"
        );
    }
    for (what, text) in [("the target", Some(&target)), ("--message", message.as_ref())] {
        if text.is_some_and(|text| !is_loggable(text)) {
            bail!(
                "{what} is not one line: 1 to 256 characters, none of them controls or marks of direction"
            );
        }
    }
    if issuer.is_some() && !matches!(kind, Kind::Subject | Kind::Token) {
        bail!("--issuer is for a subject or a token");
    }
    // Of any version: who must be kept out is not to wait for a migration.
    let mut session = server.connect().await?;
    let newest = installed(&session.client).await?;
    newest.context("the database has no registry: run pgsiloctl registry init")?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let known = match kind {
        Kind::Tenant => {
            let known = "SELECT FROM pgsilo.tenants WHERE id = $1::text";
            transaction.query_opt(known, &[&target]).await?.is_some()
        }
        _ => true,
    };
    let insert = "INSERT INTO pgsilo.locks (kind, target, issuer, message, issued_before, expires_at, locked_by)
        VALUES ($1::text, CASE $1::text WHEN 'address' THEN ($2::text::cidr)::text ELSE $2::text END,
            $3::text, $4::text, CASE WHEN $5::boolean THEN now() END, now() + make_interval(secs => $6),
            coalesce(nullif(current_setting('pgsilo.actor', true), ''), session_user))
        RETURNING id::text, revision";
    let seconds = ttl.map(|ttl| ttl.as_secs_f64());
    let kind = kind.name();
    let made = transaction
        .query_one(insert, &[&kind, &target, &issuer, &message, &issued_before_now, &seconds])
        .await
        .with_context(|| format!("locking {kind} {target:?}"))?;
    let (id, revision): (String, i64) = (made.get(0), made.get(1));
    transaction.commit().await?;
    if !known {
        say::progress(&format!(
            "the registry has no tenant {target:?} now; it is locked all the same"
        ));
    }
    say::result(&format!("{id}  {kind} {target} is locked"));
    in_force(&session.client, revision).await
}

async fn list(server: &Server, as_json: bool) -> Result<()> {
    let session = server.connect().await?;
    let locks = "SELECT id::text, kind, target::text, issuer::text, message::text,
            to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
            to_char(issued_before AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
            locked_by::text, coalesce(expires_at <= now(), false)
        FROM pgsilo.locks ORDER BY kind, target, id";
    let rows = session.client.query(locks, &[]).await.context("reading the locks")?;
    for row in &rows {
        let text = |column: usize| row.get::<_, Option<String>>(column);
        let is_over: bool = row.get(8);
        if as_json {
            let lock = json!({
                "id": text(0), "kind": text(1), "target": text(2), "issuer": text(3), "message": text(4),
                "expires_at": text(5), "issued_before": text(6), "locked_by": text(7), "is_over": is_over,
            });
            say::result(&lock.to_string());
            continue;
        }
        let [id, kind, target, by] = [0, 1, 2, 7].map(|column| text(column).unwrap_or_default());
        let mut line = format!("{id}  {kind} {target}");
        for (what, value) in [
            (" of ", text(3)),
            (", issued before ", text(6)),
            (", until ", text(5)),
            (": ", text(4)),
        ] {
            line += &value.map(|value| format!("{what}{value}")).unwrap_or_default();
        }
        let over = if is_over { "; it is over" } else { "" };
        say::result(&format!("{line} (by {by}{over})"));
    }
    if rows.is_empty() && !as_json {
        say::result("there are no locks");
    }
    Ok(())
}

async fn remove(server: &Server, author: &Author, ids: &[String]) -> Result<()> {
    let mut session = server.connect().await?;
    let transaction = take_turn(&mut session.client).await?;
    author.sign(&transaction).await?;
    let remove = "DELETE FROM pgsilo.locks WHERE id::text = ANY ($1) RETURNING id::text";
    let removed = transaction.query(remove, &[&ids]).await.context("removing locks")?;
    let removed: Vec<String> = removed.iter().map(|row| row.get(0)).collect();
    if let Some(unknown) = ids.iter().find(|id| !removed.contains(id)) {
        bail!("there is no lock {unknown:?}; none was removed");
    }
    let revision = "SELECT revision FROM pgsilo.revision";
    let revision = transaction.query_one(revision, &[]).await?.get(0);
    transaction.commit().await?;
    say::result(&format!("{} removed", removed.len()));
    in_force(&session.client, revision).await
}
