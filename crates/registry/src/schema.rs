//! The registry's schema in versions, and who brings a database to the newest.
//!
//! A version is one SQL file, run in one transaction with the row that says so. They are written
//! to be read by the versions before: what a version takes away or renames, the one before has
//! stopped using. A reader that knows a version may read a newer one for as long as that says so.

use std::fmt;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use pgsilo_core::cause::root_cause;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Transaction};

/// The schema's name.
pub const SCHEMA: &str = "pgsilo";
/// Owns the schema and all in it; nobody logs in as it.
pub const OWNER: &str = "pgsilo_registry_owner";
/// May read all of it, and write what there is.
pub const CONTROL: &str = "pgsilo_registry_control";
/// May read what proxies read.
pub const PROXY: &str = "pgsilo_registry_proxy";

/// The tables that the control plane writes; their triggers write the others.
const WRITTEN: [&str; 12] = [
    "clusters",
    "tenants",
    "placements",
    "aliases",
    "bindings",
    "grants",
    "locks",
    "database_versions",
    "backups",
    "operations",
    "prepared",
    "certificates",
];
const READ_BY_PROXIES: [&str; 9] = [
    "proxy_schema",
    "proxy_revision",
    "proxy_history",
    "proxy_clusters",
    "proxy_tenants",
    "proxy_grants",
    "proxy_locks",
    "proxy_tombstones",
    "proxy_digest",
];

/// Held while a schema is changed. "pgsilo", as a number.
const LOCK: i64 = 0x0070_6773_696C_6F00;
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// One version.
#[derive(Clone, Copy)]
struct Version {
    number: i32,
    name: &'static str,
    sql: &'static str,
    /// The oldest version whose readers can read this one. Raised by whatever they would refuse: also
    /// by a new key in an entry, which readers do not take for nothing.
    readable_from: i32,
}

const VERSIONS: &[Version] = &[
    Version {
        number: 1,
        name: "the registry",
        sql: include_str!("schema/0001.sql"),
        readable_from: 1,
    },
    Version {
        number: 2,
        name: "clusters of several servers",
        sql: include_str!("schema/0002.sql"),
        readable_from: 2,
    },
    Version {
        number: 3,
        name: "sessions that only read, and grants at OpenBAO",
        sql: include_str!("schema/0003.sql"),
        // Readers of version 2 refuse clusters that have the key, and no others: docs/registry.md.
        readable_from: 2,
    },
    Version {
        number: 4,
        name: "tenants that are made in steps",
        sql: include_str!("schema/0004.sql"),
        readable_from: 2,
    },
];

/// The newest version that this program knows, and what it reads.
pub const NEWEST: i32 = VERSIONS[VERSIONS.len() - 1].number;
/// The oldest version that this program can read.
pub const OLDEST: i32 = 1;

/// Where a database's schema is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Its version.
    pub version: i32,
    /// The oldest version whose readers can read it.
    pub readable_from: i32,
}

/// Why a schema cannot be used, or not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It is not there.
    #[error("the database has no registry: run pgsiloctl registry init")]
    Missing,
    /// Somebody else has made a schema of that name, and could drop it.
    #[error("the database has a schema {SCHEMA} of {whose}'s: drop it, or use another database")]
    Foreign {
        /// Its owner.
        whose: String,
    },
    /// It is there already.
    #[error(
        "the database has a registry, of version {0}: pgsiloctl registry migrate brings it to the newest"
    )]
    Exists(i32),
    /// This program does not know how to read it.
    #[error("the registry's schema has version {}, and this program reads {OLDEST} to {NEWEST}: {}", found.version, advice(*found))]
    OutOfRange {
        /// What it has.
        found: Installed,
    },
    /// What it says of its past is not what this program knows of it.
    #[error(
        "the registry says that its version {version} was made of something else than this program's: was it changed by hand, or made by another program?"
    )]
    Altered {
        /// Which one.
        version: i32,
    },
    /// A role is missing that only one with CREATEROLE can make.
    #[error(
        "cannot make the role {role}: {}; run this as a role with CREATEROLE, or make it first (CREATE ROLE {role} NOLOGIN)", root_cause(.error)
    )]
    Role {
        /// Its name.
        role: &'static str,
        /// What PostgreSQL says.
        error: tokio_postgres::Error,
    },
    /// PostgreSQL did not do it.
    #[error("{doing}: {}", root_cause(.error))]
    Postgres {
        /// What was being done.
        doing: String,
        /// Why not.
        error: tokio_postgres::Error,
    },
}

fn advice(found: Installed) -> &'static str {
    if found.version < OLDEST {
        "run pgsiloctl registry migrate of this version"
    } else {
        "use a newer version of this program"
    }
}

impl Installed {
    /// Whether this program can read it.
    ///
    /// # Errors
    /// When it cannot.
    pub fn readable(self) -> Result<Installed, SchemaError> {
        let can = self.version >= OLDEST && self.readable_from <= NEWEST;
        if can { Ok(self) } else { Err(SchemaError::OutOfRange { found: self }) }
    }
}

/// What is being done, told while it takes time.
pub trait Tell {
    /// One line.
    fn tell(&self, line: &dyn fmt::Display);
}

fn failed(doing: impl fmt::Display) -> impl FnOnce(tokio_postgres::Error) -> SchemaError {
    let doing = doing.to_string();
    |error| SchemaError::Postgres { doing, error }
}

/// The version of a database's schema; `None` if it has none.
///
/// # Errors
/// When it cannot be read.
pub async fn installed(client: &impl GenericClient) -> Result<Option<Installed>, SchemaError> {
    let newest = "SELECT version, readable_from FROM pgsilo.proxy_schema";
    match client.query_typed(newest, &[]).await {
        // Without a row it was begun, and cut off.
        Ok(rows) => {
            Ok(rows.first().map(|row| Installed { version: row.get(0), readable_from: row.get(1) }))
        }
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(failed("reading the schema's version")(error)),
    }
}

fn is_missing(error: &tokio_postgres::Error) -> bool {
    let missing = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME];
    error.code().is_some_and(|code| missing.contains(code))
}

/// Makes the schema in a database that has none, and the roles that it is for. Returns what was
/// done, a line each.
///
/// # Errors
/// When it is there already, or PostgreSQL refuses.
pub async fn init(client: &mut Client, tell: &impl Tell) -> Result<Installed, SchemaError> {
    let mut locked = Locked::acquire(client, tell).await?;
    let made = locked.init(tell).await;
    locked.release().await;
    made
}

/// Brings a database's schema to the newest version.
///
/// # Errors
/// When there is none, its past is another than this program knows, or PostgreSQL refuses: what
/// was done before is kept.
pub async fn migrate(client: &mut Client, tell: &impl Tell) -> Result<Installed, SchemaError> {
    let mut locked = Locked::acquire(client, tell).await?;
    let migrated = locked.migrate(tell).await;
    locked.release().await;
    migrated
}

/// A session that changes the schema while no other does.
struct Locked<'c>(&'c mut Client);

impl<'c> Locked<'c> {
    /// Waits for whoever else has the lock, and tells who that is.
    async fn acquire(client: &'c mut Client, tell: &impl Tell) -> Result<Locked<'c>, SchemaError> {
        let doing = "locking the schema";
        // What a version's file names without a schema is PostgreSQL's.
        let settings = "SET search_path = pg_catalog, pg_temp; SET lock_timeout = 0";
        client.batch_execute(settings).await.map_err(failed(doing))?;
        let mut told = None;
        loop {
            let asked = client.query_one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await;
            if asked.map_err(failed(doing))?.get(0) {
                return Ok(Locked(client));
            }
            let holder = holder(client, LOCK).await.map_err(failed(doing))?;
            if holder != told {
                if let Some(holder) = &holder {
                    tell.tell(&format_args!("waiting for {holder}, which changes the schema"));
                }
                told = holder;
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    async fn release(self) {
        self.leave_owner().await;
        // Whoever drops the connection lets go of it, too.
        let _best_effort = self.0.execute("SELECT pg_advisory_unlock($1)", &[&LOCK]).await;
    }

    async fn init(&mut self, tell: &impl Tell) -> Result<Installed, SchemaError> {
        let whose = "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = $1";
        let whose = self
            .0
            .query_opt(whose, &[&SCHEMA])
            .await
            .map_err(failed("looking whose the schema is"))?;
        if let Some(whose) = whose.map(|row| row.get::<_, String>(0)).filter(|whose| whose != OWNER)
        {
            return Err(SchemaError::Foreign { whose });
        }
        self.join_owner().await;
        if let Some(there) = installed(&*self.0).await? {
            return Err(SchemaError::Exists(there.version));
        }
        for role in [OWNER, CONTROL, PROXY] {
            if make_role(self.0, role).await? {
                tell.tell(&format_args!("made the role {role}"));
            }
        }
        let doing = "making the schema";
        self.join_owner().await;
        let make = format!(
            "CREATE SCHEMA IF NOT EXISTS {SCHEMA} AUTHORIZATION {OWNER};
             SET ROLE {OWNER};
             CREATE TABLE IF NOT EXISTS {SCHEMA}.versions (
                 version integer PRIMARY KEY CHECK (version > 0),
                 name text NOT NULL,
                 readable_from integer NOT NULL,
                 -- SHA-256 of the file that it was made of.
                 digest bytea NOT NULL,
                 installed_at timestamptz NOT NULL DEFAULT now(),
                 installed_by text NOT NULL DEFAULT session_user
             );
             CREATE OR REPLACE VIEW {SCHEMA}.proxy_schema AS
                 SELECT version, readable_from FROM {SCHEMA}.versions ORDER BY version DESC LIMIT 1;
             RESET ROLE"
        );
        let transaction = self.0.transaction().await.map_err(failed(doing))?;
        transaction.batch_execute(&make).await.map_err(failed(doing))?;
        transaction.commit().await.map_err(failed(doing))?;
        self.migrate(tell).await
    }

    /// Lets nobody else connect, if that is ours to say.
    async fn close_database(&self, tell: &impl Tell) -> Result<(), tokio_postgres::Error> {
        let whose = "SELECT quote_ident(datname), pg_has_role(datdba, 'USAGE')
            FROM pg_database WHERE datname = current_database()";
        let whose = self.0.query_one(whose, &[]).await?;
        let (name, is_ours): (String, bool) = (whose.try_get(0)?, whose.try_get(1)?);
        let close = format!(
            "REVOKE ALL ON DATABASE {name} FROM PUBLIC;
             GRANT CONNECT ON DATABASE {name} TO {CONTROL}, {PROXY}"
        );
        if is_ours {
            return self.0.batch_execute(&close).await;
        }
        let close = close.split_whitespace().collect::<Vec<_>>().join(" ");
        tell.tell(&format_args!("everybody may connect here; its owner can change that: {close}"));
        Ok(())
    }

    async fn migrate(&mut self, tell: &impl Tell) -> Result<Installed, SchemaError> {
        self.join_owner().await;
        let known = self.known().await?;
        let mut is_new = false;
        for version in VERSIONS {
            match known.iter().find(|(number, _)| *number == version.number) {
                Some((_, of)) if *of == version.digest() => {}
                Some(_) => return Err(SchemaError::Altered { version: version.number }),
                None => {
                    self.install(version).await?;
                    is_new = true;
                    tell.tell(&format_args!("version {}: {}", version.number, version.name));
                }
            }
        }
        self.close_database(tell).await.map_err(failed("closing the database to others"))?;
        let newest = installed(&*self.0).await?.ok_or(SchemaError::Missing)?;
        if newest.version == NEWEST && !is_new {
            let failed = || failed("granting what the roles may");
            let transaction = self.0.transaction().await.map_err(failed())?;
            grant(&transaction).await.map_err(failed())?;
            transaction.commit().await.map_err(failed())?;
        }
        newest.readable()
    }

    /// One that makes a role may give it to itself, and to be it is what changing the schema needs. A
    /// superuser is it anyway, and another may have been given it.
    async fn join_owner(&self) {
        let join = format!("GRANT {OWNER} TO CURRENT_USER WITH INHERIT TRUE, SET TRUE");
        if let Err(error) = self.0.batch_execute(&join).await {
            tracing::debug!(%error, "could not grant the owner to itself");
        }
    }

    /// Who changes the schema does not stay who may change it, the audit included.
    async fn leave_owner(&self) {
        let leave = format!("REVOKE {OWNER} FROM CURRENT_USER GRANTED BY CURRENT_USER");
        if let Err(error) = self.0.batch_execute(&leave).await {
            tracing::debug!(%error, "could not revoke the owner from itself");
        }
    }

    /// The versions that are installed, with the digests of what they were made of.
    async fn known(&self) -> Result<Vec<(i32, Vec<u8>)>, SchemaError> {
        let known = "SELECT version, digest FROM pgsilo.versions ORDER BY version";
        match self.0.query(known, &[]).await {
            Ok(rows) => Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect()),
            Err(error) if is_missing(&error) => Err(SchemaError::Missing),
            Err(error) => Err(failed("reading the schema's versions")(error)),
        }
    }

    async fn install(&mut self, version: &Version) -> Result<(), SchemaError> {
        let doing = || failed(format!("installing version {} of the schema", version.number));
        let transaction = self.0.transaction().await.map_err(doing())?;
        // A reader that never ends must not stop all others behind this.
        let become_owner = format!("SET LOCAL ROLE {OWNER}; SET LOCAL lock_timeout = '10s'");
        transaction.batch_execute(&become_owner).await.map_err(doing())?;
        transaction.batch_execute(version.sql).await.map_err(doing())?;
        let insert = "INSERT INTO pgsilo.versions (version, name, readable_from, digest)
            VALUES ($1, $2, $3, $4)";
        let Version { number, name, readable_from, .. } = version;
        let values: [&(dyn ToSql + Sync); 4] = [number, name, readable_from, &version.digest()];
        transaction.execute(insert, &values).await.map_err(doing())?;
        if version.number == NEWEST {
            grant(&transaction).await.map_err(doing())?;
        }
        transaction.commit().await.map_err(doing())
    }
}

/// Gives each role what it may, of the newest version, and nobody else anything.
async fn grant(transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
    let tables = WRITTEN.map(|table| format!("{SCHEMA}.{table}")).join(", ");
    let views = READ_BY_PROXIES.map(|view| format!("{SCHEMA}.{view}")).join(", ");
    transaction
        .batch_execute(&format!(
            "SET LOCAL ROLE {OWNER};
                 REVOKE ALL ON SCHEMA {SCHEMA} FROM PUBLIC, {CONTROL}, {PROXY};
                 REVOKE ALL ON ALL TABLES IN SCHEMA {SCHEMA} FROM PUBLIC, {CONTROL}, {PROXY};
                 REVOKE ALL ON ALL ROUTINES IN SCHEMA {SCHEMA} FROM PUBLIC, {CONTROL}, {PROXY};
                 GRANT USAGE ON SCHEMA {SCHEMA} TO {CONTROL}, {PROXY};
                 GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {CONTROL};
                 GRANT EXECUTE ON FUNCTION {SCHEMA}.audit_content TO {CONTROL};
                 GRANT INSERT, UPDATE, DELETE ON {tables} TO {CONTROL};
                 GRANT SELECT ON {views} TO {PROXY};
                 RESET ROLE"
        ))
        .await
}

impl Version {
    fn digest(&self) -> Vec<u8> {
        digest(&SHA256, self.sql.as_bytes()).as_ref().to_vec()
    }
}

/// Makes a role that nobody logs in as; whether it was missing.
async fn make_role(client: &Client, role: &'static str) -> Result<bool, SchemaError> {
    let failed = |error| SchemaError::Role { role, error };
    let there = "SELECT 1 FROM pg_roles WHERE rolname = $1";
    if client.query_opt(there, &[&role]).await.map_err(failed)?.is_some() {
        return Ok(false);
    }
    match client.batch_execute(&format!("CREATE ROLE {role} NOLOGIN")).await {
        Ok(()) => Ok(true),
        // Somebody else has made it meanwhile, for another database.
        Err(error)
            if error.code().is_some_and(|code| {
                *code == SqlState::DUPLICATE_OBJECT || *code == SqlState::UNIQUE_VIOLATION
            }) =>
        {
            Ok(false)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Who has an advisory lock of this database, as PostgreSQL's administrators know it.
///
/// # Errors
/// When the database cannot be asked.
pub async fn holder(client: &Client, lock: i64) -> Result<Option<String>, tokio_postgres::Error> {
    let holder = "SELECT format('process %s of %s (%s)', a.pid, a.usename, a.application_name)
        FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND (l.classid::bigint << 32) + l.objid::bigint = $1";
    Ok(client.query_opt(holder, &[&lock]).await?.map(|row| row.get(0)))
}
