//! What a proxy reads of the registry: all of it, or what is newer than a revision.
//!
//! A reading is of one moment. Entries are as the registry has them: whoever reads checks them. They are
//! read as they come, so that the text of all of them is never in memory at once.

use std::collections::BTreeMap;
use std::future::ready;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest as hash};
use futures_util::{FutureExt, TryStreamExt, try_join};
use pgsilo_core::registry::Entry;
use pgsilo_core::registry::document::ClusterEntry;
use pgsilo_core::timeline::Timeline;
use serde_json::Deserializer;
use tokio::time::timeout;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, GenericClient, IsolationLevel, Row, Transaction};

use crate::connection::{self, ConnectError, Database, Login, Purpose, Session};
use crate::schema::{SchemaError, installed};
use crate::status::application_name;

/// For one reading. A registry of 100,000 tenants is read in seconds.
const READING: Duration = Duration::from_secs(60);
/// For the answer to what its revision is: a server that says nothing is to be noticed.
const PULSE: Duration = Duration::from_secs(2);
/// For an answer to anything else.
const ANSWER: Duration = Duration::from_secs(5);

/// Why a registry cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It is none, or none for this program.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// PostgreSQL's or the network's.
    #[error("{}", pgsilo_core::cause::root_cause(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// Nothing came back.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// A proxy's connection to the registry. It listens: what changes after a reading is told of.
#[derive(Debug)]
pub struct Reader {
    session: Session,
    /// What the proxy is called.
    name: String,
}

impl Reader {
    /// Connects, and looks whether this program can read what is there. The proxy of this name has
    /// read up to that revision. Of several servers none will do that takes writes on a lower timeline
    /// than `least`.
    ///
    /// # Errors
    /// When there is no registry, or none that can be read.
    pub async fn connect(
        database: &Database,
        login: &Login,
        name: &str,
        revision: Option<i64>,
        least: Option<Timeline>,
    ) -> Result<Reader, ReadError> {
        let purpose = Purpose {
            application_name: application_name(name, revision),
            options: "-c search_path=pg_catalog,pg_temp",
            // A standby lags, and cannot be listened to.
            server: database.writer(least),
        };
        let session = connection::connect(database, login, &purpose).await?;
        // Not among the options: a server would be taken for one that takes no writes.
        let begin = "SET default_transaction_read_only = on; LISTEN pgsilo_registry";
        bounded(ANSWER, session.client.batch_execute(begin)).await?;
        bounded(ANSWER, check(&session.client)).await?;
        Ok(Reader { session, name: name.to_owned() })
    }

    /// On which timeline its server takes writes, if it is one of several.
    pub fn timeline(&self) -> Option<Timeline> {
        self.session.timeline
    }

    /// Whether there is anything newer than that. A server that does not answer is soon noticed.
    ///
    /// # Errors
    /// When the connection is lost, or PostgreSQL refuses.
    pub async fn is_current(&self, position: &Position) -> Result<bool, ReadError> {
        let now = "SELECT revision, mark FROM pgsilo.proxy_revision";
        let now = bounded(PULSE, self.session.client.query_typed_one(now, &[])).await?;
        let now = Position { revision: now.try_get(0)?, mark: now.try_get(1)? };
        Ok(now == *position)
    }

    /// Reads all, or what is newer than `since`, if the registry can still say; and where that can have got
    /// out of its way, what is to be read again.
    ///
    /// # Errors
    /// When the connection is lost, PostgreSQL refuses, or it is not for this program any more.
    pub async fn read(
        &mut self,
        since: Option<&Position>,
        again: &Again,
    ) -> Result<Reading, ReadError> {
        read(&mut self.session.client, since, again).await
    }

    /// Reads the registry's digest.
    ///
    /// # Errors
    /// When the connection is lost, or PostgreSQL refuses.
    pub async fn digest(&mut self) -> Result<Digest, ReadError> {
        bounded(READING, digest(&mut self.session.client)).await
    }

    /// Tells operators up to which revision the proxy has read.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn tell(&self, revision: i64) -> Result<(), ReadError> {
        let name = application_name(&self.name, Some(revision));
        let tell = "SELECT set_config('application_name', $1, false)";
        let client = &self.session.client;
        bounded(ANSWER, client.query_typed_one(tell, &[(&name, Type::TEXT)])).await?;
        Ok(())
    }

    /// Resolves when something has changed since this last resolved, and when the connection is lost.
    pub async fn changed(&self) {
        self.session.notified.notified().await;
    }
}

async fn bounded<T, E>(
    patience: Duration,
    asking: impl Future<Output = Result<T, E>>,
) -> Result<T, ReadError>
where
    ReadError: From<E>,
{
    match timeout(patience, asking).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(ReadError::Timeout(patience)),
    }
}

/// Up to where a registry was read: a revision, and its mark. Where a registry was restored, or has
/// lost its newest changes in a failover, the number may come again, and the mark does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The revision.
    pub revision: i64,
    mark: String,
}

/// What is read although it is not newer: what was in its way may have gone.
#[derive(Debug, Default)]
pub struct Again {
    /// Names of clusters.
    pub clusters: Vec<String>,
    /// Ids of tenants.
    pub tenants: Vec<String>,
}

/// What was read.
#[derive(Debug)]
pub struct Reading {
    /// Everything up to this revision is in it.
    pub position: Position,
    /// What was asked for was what is newer than a position, and that is in nothing that the
    /// registry knows of: so this is all that there is.
    pub has_lost_history: bool,
    /// It is all that there is; otherwise it is what has changed, and the rest is as it was.
    pub is_whole: bool,
    /// Where placements are. These and all others in the order of their revisions.
    pub clusters: Vec<ClusterRow>,
    /// Tenants that have a placement; also all those whose cluster is other than it was.
    pub tenants: Vec<TenantRow>,
    /// Grants that somebody has given.
    pub grants: Vec<GrantRow>,
    /// Who is kept out.
    pub locks: Vec<LockRow>,
    /// What is gone; nothing in a whole reading.
    pub gone: Vec<Gone>,
}

/// One cluster.
#[derive(Debug)]
pub struct ClusterRow {
    /// What placements call it.
    pub name: String,
    /// Of its last change.
    pub revision: i64,
    /// Its entry, as in the registry's file.
    pub entry: Result<ClusterEntry, serde_json::Error>,
}

/// One tenant.
#[derive(Debug)]
pub struct TenantRow {
    /// Its id.
    pub id: String,
    /// Of its last change.
    pub revision: i64,
    /// Its entry, and the certificates that are bound to it, as in the registry's file.
    pub entry: Result<Entry, serde_json::Error>,
}

/// One grant.
#[derive(Clone, Debug)]
pub struct GrantRow {
    /// A UUID.
    pub id: String,
    /// Of its last change.
    pub revision: i64,
    /// Whose subject has it.
    pub issuer: String,
    /// Who has it.
    pub subject: String,
    /// For which tenant.
    pub tenant: String,
    /// And how much.
    pub access: String,
    /// When it lapses, in seconds since 1970.
    pub expires_at: Option<f64>,
    /// It was taken in an emergency.
    pub is_break_glass: bool,
}

/// One lock.
#[derive(Clone, Debug)]
pub struct LockRow {
    /// A UUID.
    pub id: String,
    /// Of its last change.
    pub revision: i64,
    /// Of what: `tenant`, `subject`, `issuer`, `token`, `certificate`, `address`.
    pub kind: String,
    /// Which one.
    pub target: String,
    /// Of a subject or a token: whose.
    pub issuer: Option<String>,
    /// What those who are kept out read.
    pub message: Option<String>,
    /// What was issued after this is not meant, in seconds since 1970.
    pub issued_before: Option<f64>,
    /// When it ends, in seconds since 1970.
    pub expires_at: Option<f64>,
}

/// Something that is not there any more.
#[derive(Debug)]
pub struct Gone {
    /// A table: `clusters`, `tenants`, `grants`, `locks`.
    pub kind: String,
    /// The row's key.
    pub key: String,
    /// Of its end.
    pub revision: i64,
}

/// Reads all, or what is newer than `since`, if the registry can still say; and where that can have got
/// out of its way, what is to be read again.
///
/// # Errors
/// When the connection is lost, PostgreSQL refuses, or it is not for this program any more.
pub async fn read(
    client: &mut Client,
    since: Option<&Position>,
    again: &Again,
) -> Result<Reading, ReadError> {
    let of_one_moment =
        client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
    let transaction = bounded(PULSE, of_one_moment.start()).await?;
    let now = "SELECT revision, mark, forgotten,
            (SELECT mark FROM pgsilo.proxy_history WHERE revision = $1)
        FROM pgsilo.proxy_revision";
    let asked = since.map_or(0, |since| since.revision);
    let asked: [(&(dyn ToSql + Sync), Type); 1] = [(&asked, Type::INT8)];
    let now = async { Ok(transaction.query_typed_one(now, &asked).await?) };
    let both = async { try_join!(check(&transaction), now) };
    let ((), now): ((), Row) = bounded(PULSE, both).await?;
    let position = Position { revision: now.try_get(0)?, mark: now.try_get(1)? };
    let (forgotten, known): (i64, Option<String>) = (now.try_get(2)?, now.try_get(3)?);
    let is_known = |since: &&Position| known.as_ref() == Some(&since.mark);
    let has_lost_history = since.filter(|since| since.revision >= forgotten);
    let has_lost_history = has_lost_history.is_some_and(|since| !is_known(&since));
    let since = since.filter(is_known).filter(|since| since.revision >= forgotten);
    let mut reading = Reading {
        position,
        has_lost_history,
        is_whole: since.is_none(),
        clusters: Vec::new(),
        tenants: Vec::new(),
        grants: Vec::new(),
        locks: Vec::new(),
        gone: Vec::new(),
    };
    if since == Some(&reading.position) {
        return Ok(reading);
    }
    // Asked for at once: their answers come one behind the other.
    let newer = Newer { transaction, since: since.map_or(0, |since| since.revision) };
    let gone = async {
        match since {
            Some(_) => newer.rows("kind, key, revision FROM pgsilo.proxy_tombstones", gone).await,
            None => Ok(Vec::new()),
        }
    }
    .boxed();
    let clusters = newer.rows(CLUSTERS, cluster).boxed();
    let tenants = newer.rows(TENANTS, tenant).boxed();
    let grants = "id, revision, issuer, subject, tenant, access,
        extract(epoch FROM expires_at)::float8, break_glass FROM pgsilo.proxy_grants";
    let grants = newer.rows(grants, grant).boxed();
    let locks = "id, revision, kind, target, issuer, message,
        extract(epoch FROM issued_before)::float8, extract(epoch FROM expires_at)::float8
        FROM pgsilo.proxy_locks";
    let locks = newer.rows(locks, lock).boxed();
    let all = async { try_join!(gone, clusters, tenants, grants, locks) };
    (reading.gone, reading.clusters, reading.tenants, reading.grants, reading.locks) =
        bounded(READING, all).await?;
    // Only a change of one of these gets out of another's way.
    let may_unblock =
        !(reading.gone.is_empty() && reading.clusters.is_empty() && reading.tenants.is_empty());
    if may_unblock && !reading.is_whole {
        let clusters = newer.those(CLUSTERS, ("name", &again.clusters), cluster).boxed();
        let tenants = newer.those(TENANTS, ("id", &again.tenants), tenant).boxed();
        let (clusters, tenants) = bounded(READING, async { try_join!(clusters, tenants) }).await?;
        reading.clusters.extend(clusters);
        reading.tenants.extend(tenants);
    }
    reading.gone.sort_by_key(|row| row.revision);
    reading.clusters.sort_by_key(|row| row.revision);
    reading.tenants.sort_by_key(|row| row.revision);
    reading.grants.sort_by_key(|row| row.revision);
    reading.locks.sort_by_key(|row| row.revision);
    Ok(reading)
}

/// Whether this program can read what is there now: it may have been migrated.
async fn check(client: &impl GenericClient) -> Result<(), ReadError> {
    installed(client).await?.ok_or(SchemaError::Missing)?.readable()?;
    Ok(())
}

/// What is newer than a revision.
struct Newer<'c> {
    transaction: Transaction<'c>,
    since: i64,
}

const CLUSTERS: &str = "name, revision, entry::text FROM pgsilo.proxy_clusters";
const TENANTS: &str = "id, revision, entry::text, bindings::text FROM pgsilo.proxy_tenants";

impl Newer<'_> {
    /// What is newer, in no order.
    async fn rows<T>(
        &self,
        what: &str,
        row: fn(&Row) -> Result<T, tokio_postgres::Error>,
    ) -> Result<Vec<T>, tokio_postgres::Error> {
        let query = format!("SELECT {what} WHERE revision > $1");
        self.query(&query, (&self.since, Type::INT8), row).await
    }

    /// Those of these keys that are not newer, in no order.
    async fn those<T>(
        &self,
        what: &str,
        (key, those): (&str, &Vec<String>),
        row: fn(&Row) -> Result<T, tokio_postgres::Error>,
    ) -> Result<Vec<T>, tokio_postgres::Error> {
        if those.is_empty() {
            return Ok(Vec::new());
        }
        let query = format!("SELECT {what} WHERE {key} = ANY ($1) AND revision <= {}", self.since);
        self.query(&query, (those, Type::TEXT_ARRAY), row).await
    }

    async fn query<T>(
        &self,
        query: &str,
        parameter: (&(dyn ToSql + Sync), Type),
        row: fn(&Row) -> Result<T, tokio_postgres::Error>,
    ) -> Result<Vec<T>, tokio_postgres::Error> {
        let rows = self.transaction.query_typed_raw(query, [parameter]).await?;
        rows.and_then(|one| ready(row(&one))).try_collect().await
    }
}

fn cluster(row: &Row) -> Result<ClusterRow, tokio_postgres::Error> {
    let entry = serde_json::from_str(row.try_get(2)?);
    Ok(ClusterRow { name: row.try_get(0)?, revision: row.try_get(1)?, entry })
}

fn tenant(row: &Row) -> Result<TenantRow, tokio_postgres::Error> {
    let [entry, bindings] = [row.try_get(2)?, row.try_get(3)?].map(Deserializer::from_str);
    let entry = Entry::read(&mut { entry }, &mut { bindings });
    Ok(TenantRow { id: row.try_get(0)?, revision: row.try_get(1)?, entry })
}

fn grant(row: &Row) -> Result<GrantRow, tokio_postgres::Error> {
    Ok(GrantRow {
        id: row.try_get(0)?,
        revision: row.try_get(1)?,
        issuer: row.try_get(2)?,
        subject: row.try_get(3)?,
        tenant: row.try_get(4)?,
        access: row.try_get(5)?,
        expires_at: row.try_get(6)?,
        is_break_glass: row.try_get(7)?,
    })
}

fn lock(row: &Row) -> Result<LockRow, tokio_postgres::Error> {
    Ok(LockRow {
        id: row.try_get(0)?,
        revision: row.try_get(1)?,
        kind: row.try_get(2)?,
        target: row.try_get(3)?,
        issuer: row.try_get(4)?,
        message: row.try_get(5)?,
        issued_before: row.try_get(6)?,
        expires_at: row.try_get(7)?,
    })
}

fn gone(row: &Row) -> Result<Gone, tokio_postgres::Error> {
    Ok(Gone { kind: row.try_get(0)?, key: row.try_get(1)?, revision: row.try_get(2)? })
}

/// What a reader must hold if it has missed nothing: of each kind of rows, how many and a sum over
/// their keys and revisions.
#[derive(Debug, PartialEq, Eq)]
pub struct Digest {
    /// Of which revision.
    pub revision: i64,
    kinds: BTreeMap<String, (i64, i128)>,
}

impl Digest {
    /// That of rows that a reader holds, told by kind, key and revision.
    pub fn of<'r>(revision: i64, rows: impl Iterator<Item = (&'r str, &'r str, i64)>) -> Digest {
        let mut kinds = BTreeMap::<String, (i64, i128)>::new();
        for (kind, key, revision) in rows {
            let hash = hash(&SHA256, format!("{key} {revision}").as_bytes());
            let first: [u8; 8] = std::array::from_fn(|at| hash.as_ref()[at]);
            // A kind's name is made once.
            let of_kind = match kinds.get_mut(kind) {
                Some(of_kind) => of_kind,
                None => kinds.entry(kind.to_owned()).or_default(),
            };
            *of_kind = (of_kind.0 + 1, of_kind.1 + i128::from(i64::from_be_bytes(first)));
        }
        Digest { revision, kinds }
    }
}

/// Reads the registry's digest.
///
/// # Errors
/// When the connection is lost, or PostgreSQL refuses.
pub async fn digest(client: &mut Client) -> Result<Digest, tokio_postgres::Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    let now = "SELECT revision FROM pgsilo.proxy_revision";
    let revision = transaction.query_typed_one(now, &[]).await?.try_get(0)?;
    let kinds = "SELECT kind, rows, digest::text FROM pgsilo.proxy_digest";
    let mut digest = Digest { revision, kinds: BTreeMap::new() };
    for row in transaction.query_typed(kinds, &[]).await? {
        let sum: String = row.try_get(2)?;
        // What is no number is no digest of ours, either.
        let sum = sum.parse().unwrap_or(i128::MIN);
        digest.kinds.insert(row.try_get(0)?, (row.try_get(1)?, sum));
    }
    Ok(digest)
}
