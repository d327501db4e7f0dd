//! The registry in PostgreSQL: made and kept by `pgsiloctl registry`, its revisions, its audit, and
//! who may do what in it.

mod check;
mod converging;
pub(crate) mod grants;
mod model;
pub(crate) mod served;
mod tenants;

use std::collections::BTreeMap;
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::future::join_all;
use pgsilo_registry::read::{Again, Digest, Position, ReadError, Reading, digest};
use pgsilo_registry::schema::NEWEST;
use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::world::world;
use serde_json::Value;
use tokio::process::Command;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};

/// Who makes schemas is a member of their owner meanwhile, which is the server's and not the database's.
static CHANGING_SCHEMAS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const OPS_PASSWORD: &str = "of-an-operator-in-a-test";

/// A database of its own, made by the provisioner: a role with CREATEDB and CREATEROLE.
pub(crate) struct Database {
    name: String,
}

impl Database {
    async fn create() -> Database {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("registry_{}_{number}", std::process::id());
        let dsn: Config = world().var("PROVISIONER_DSN").parse().expect("a DSN");
        let (client, connection) = dsn.connect(NoTls).await.expect("connected");
        tokio::spawn(connection);
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("created");
        // Its roles are the server's, and the sandbox's own registry has them from a superuser.
        let share = "GRANT pgsilo_registry_owner, pgsilo_registry_control, pgsilo_registry_proxy
            TO pgsilo_provisioner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE";
        world().superuser("postgres").await.batch_execute(share).await.expect("shared");
        Database { name }
    }

    /// With the registry in it.
    async fn with_registry() -> Database {
        let database = Database::create().await;
        let _one_at_a_time = CHANGING_SCHEMAS.lock().await;
        let made = database.run(&["init"]).await;
        assert!(made.status.success(), "{}", said(&made));
        let make = format!(
            "CREATE ROLE {}_ops LOGIN PASSWORD '{OPS_PASSWORD}' IN ROLE pgsilo_registry_control",
            database.name
        );
        world().superuser("postgres").await.batch_execute(&make).await.expect("made");
        database
    }

    /// `pgsiloctl registry ...`: what changes the schema as the provisioner, and all else as somebody
    /// who may do what the control plane does, and nothing more.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match arguments[0] {
            "init" | "migrate" => self.program(),
            _ => self.program_of_operator(),
        };
        command.arg("registry").args(arguments).args(["--tls", "disable"]);
        command
    }

    /// `pgsiloctl apply`.
    async fn apply(&self, arguments: &[&str]) -> Output {
        let mut command = self.program_of_operator();
        command.arg("apply").args(arguments).args(["--tls", "disable"]);
        command.output().await.expect("it runs")
    }

    /// `pgsiloctl lock ...`.
    async fn lock(&self, arguments: &[&str]) -> Output {
        let mut command = self.program_of_operator();
        command.arg("lock").args(arguments).args(["--tls", "disable"]);
        command.output().await.expect("it runs")
    }

    /// `pgsiloctl grant ...`.
    async fn grant(&self, arguments: &[&str]) -> Output {
        let mut command = self.program_of_operator();
        command.arg("grant").args(arguments).args(["--tls", "disable"]);
        command.output().await.expect("it runs")
    }

    /// The same, as who may do what the control plane does.
    fn program_of_operator(&self) -> Command {
        let mut command = Command::new(programs::pgsiloctl());
        let dsn: Config = world().var("PROVISIONER_DSN").parse().expect("a DSN");
        let (name, port) = (&self.name, dsn.get_ports()[0]);
        let dsn = format!("postgresql://{name}_ops:{OPS_PASSWORD}@127.0.0.1:{port}/{name}");
        command.env("PGSILO_REGISTRY_DSN", dsn);
        command
    }

    /// `pgsiloctl`, which is told where this is.
    fn program(&self) -> Command {
        let mut command = Command::new(programs::pgsiloctl());
        let dsn = world().var("PROVISIONER_DSN");
        let (server, _postgres) = dsn.rsplit_once('/').expect("a database");
        command.env("PGSILO_REGISTRY_DSN", format!("{server}/{}", self.name));
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().await.expect("it runs")
    }

    async fn status(&self) -> Value {
        let output = self.run(&["status", "--json"]).await;
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// As a superuser, who then is one of the registry's roles.
    async fn as_role(&self, role: &str) -> Client {
        let client = world().superuser(&self.name).await;
        // A superuser's own session would pass every check by.
        client.batch_execute(&format!("SET SESSION AUTHORIZATION {role}")).await.expect("set");
        client
    }

    async fn control(&self) -> Client {
        self.as_role("pgsilo_registry_control").await
    }

    async fn proxy(&self) -> Client {
        self.as_role("pgsilo_registry_proxy").await
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What an order is refused with.
async fn refused(client: &Client, order: &str) -> SqlState {
    let error = client.batch_execute(order).await.expect_err(order);
    error.code().expect("PostgreSQL's").clone()
}

const TENANTS: &str = "
    INSERT INTO pgsilo.clusters (name, region, endpoints)
        VALUES ('eu1', 'eu', '{db1:5432}'), ('us1', 'us', '{db2:5432}');
    INSERT INTO pgsilo.tenants (id, regions) VALUES ('acme', '{eu}'), ('globex', NULL);
    INSERT INTO pgsilo.placements VALUES
        ('acme', 'eu1', 'tenant_acme', 'seal-1', 'pgsilo/acme', '{\"read-write\": \"acme-rw\"}'),
        ('globex', 'us1', 'tenant_globex', 'seal-2', 'pgsilo/globex', '{\"read-write\": \"globex-rw\"}')";

#[tokio::test]
async fn a_registry_is_made_once_and_brought_to_the_newest_version() {
    let database = Database::create().await;
    let _one_at_a_time = CHANGING_SCHEMAS.lock().await;
    let early = database.run(&["migrate"]).await;
    assert_eq!(early.status.code(), Some(1));
    assert!(said(&early).contains("run pgsiloctl registry init"), "{}", said(&early));
    // Two at once: one makes it, the other waits for that and says that it is there.
    let both = tokio::join!(database.run(&["init"]), database.run(&["init"]));
    let (made, late): (Vec<_>, Vec<_>) =
        <[Output; 2]>::from(both).into_iter().partition(|output| output.status.success());
    assert_eq!((made.len(), late.len()), (1, 1));
    assert!(said(&late[0]).contains("pgsiloctl registry migrate"), "{}", said(&late[0]));
    let migrated = join_all((0..4).map(|_| database.run(&["migrate"]))).await;
    for output in migrated {
        assert!(output.status.success(), "{}", said(&output));
    }
    let control = database.control().await;
    let revision = "SELECT revision FROM pgsilo.revision";
    assert_eq!(control.query_one(revision, &[]).await.expect("asked").get::<_, i64>(0), 1);
    // Who made it is not who owns it.
    let stays = "SELECT pg_has_role($1::text, 'pgsilo_registry_owner', 'SET')";
    let dsn: Config = world().var("PROVISIONER_DSN").parse().expect("a DSN");
    let stays = control.query_one(stays, &[&dsn.get_user().expect("a user")]).await.expect("asked");
    assert!(!stays.get::<_, bool>(0));
    let superuser = world().superuser("postgres").await;
    let may = "SELECT has_database_privilege(r, $1, 'CONNECT') FROM unnest($2::text[]) r";
    let roles = ["pgsilo_registry_control", "pgsilo_registry_proxy", "pg_monitor"].as_slice();
    let may = superuser.query(may, &[&database.name, &roles]).await.expect("asked");
    assert_eq!(may.iter().map(|row| row.get(0)).collect::<Vec<bool>>(), [true, true, false]);

    // Somebody else's schema is not made ours.
    let another = Database::create().await;
    let superuser = world().superuser(&another.name).await;
    superuser.batch_execute("CREATE SCHEMA pgsilo").await.expect("made");
    let foreign = another.run(&["init"]).await;
    assert!(said(&foreign).contains("a schema pgsilo of"), "{}", said(&foreign));

    // A past that this program does not know.
    let owner = database.as_role("pgsilo_registry_owner").await;
    let alter = "UPDATE pgsilo.versions SET digest = sha256('another')";
    owner.batch_execute(alter).await.expect("altered");
    let output = database.run(&["migrate"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("version 1 was made of something else"), "{}", said(&output));
}

#[tokio::test]
async fn another_version_is_told_and_not_written_to() {
    let database = Database::with_registry().await;
    let owner = database.as_role("pgsilo_registry_owner").await;
    for (order, told) in [
        (
            format!("DELETE FROM pgsilo.versions WHERE version = {NEWEST}"),
            format!("this program writes version {NEWEST}: run pgsiloctl registry migrate"),
        ),
        (
            "INSERT INTO pgsilo.versions (version, name, readable_from, digest) VALUES (900, 'a', 900, sha256('a'))".to_owned(),
            format!("this program knows {NEWEST} at most: use a newer pgsiloctl"),
        ),
    ] {
        owner.batch_execute(&order).await.expect("altered");
        let output = database.run(&["export"]).await;
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(&told), "{}", said(&output));
        let locked = database.lock(&["add", "subject", "mallory"]).await;
        assert!(locked.status.success(), "{}", said(&locked));
    }
}

#[tokio::test]
async fn each_role_may_do_its_own_and_nothing_else() {
    let database = Database::with_registry().await;
    let (control, proxy) = (database.control().await, database.proxy().await);
    control.batch_execute(TENANTS).await.expect("written");
    for order in [
        "INSERT INTO pgsilo.audit SELECT * FROM pgsilo.audit",
        "UPDATE pgsilo.audit SET login = 'somebody else'",
        "DELETE FROM pgsilo.audit",
        "UPDATE pgsilo.revision SET revision = 1",
        "DELETE FROM pgsilo.tombstones",
        "DELETE FROM pgsilo.versions",
        "SELECT pgsilo.raise_revision()",
        "TRUNCATE pgsilo.tenants CASCADE",
        "DROP TRIGGER c_audit ON pgsilo.tenants",
        "ALTER TABLE pgsilo.tenants DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
        "CREATE FUNCTION pgsilo.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ] {
        assert_eq!(refused(&control, order).await, SqlState::INSUFFICIENT_PRIVILEGE, "{order}");
        assert_eq!(refused(&proxy, order).await, SqlState::INSUFFICIENT_PRIVILEGE, "{order}");
    }
    for table in ["clusters", "tenants", "placements", "grants", "locks", "audit", "revision"] {
        let order = format!("SELECT FROM pgsilo.{table}");
        assert_eq!(refused(&proxy, &order).await, SqlState::INSUFFICIENT_PRIVILEGE, "{order}");
    }
    let order = "UPDATE pgsilo.tenants SET state = 'active'";
    assert_eq!(refused(&proxy, order).await, SqlState::INSUFFICIENT_PRIVILEGE);
    // Who may connect, and is neither.
    let somebody = database.as_role("pg_monitor").await;
    let order = "SELECT FROM pgsilo.proxy_tenants";
    assert_eq!(refused(&somebody, order).await, SqlState::INSUFFICIENT_PRIVILEGE);
}

#[tokio::test]
async fn what_may_not_be_cannot_be_written() {
    let database = Database::with_registry().await;
    let control = database.control().await;
    control.batch_execute(TENANTS).await.expect("written");
    for order in [
        "INSERT INTO pgsilo.tenants (id) VALUES ('Acme')",
        "INSERT INTO pgsilo.tenants (id) VALUES ('../globex')",
        "UPDATE pgsilo.tenants SET state = 'gone'",
        "UPDATE pgsilo.tenants SET state = 'deleting'",
        // Residency, from each side.
        "UPDATE pgsilo.placements SET cluster = 'us1' WHERE tenant = 'acme'",
        "UPDATE pgsilo.clusters SET region = 'us' WHERE name = 'eu1'",
        "UPDATE pgsilo.tenants SET regions = '{eu}' WHERE id = 'globex'",
        "BEGIN; SET CONSTRAINTS ALL DEFERRED; DELETE FROM pgsilo.clusters WHERE name = 'eu1';
            INSERT INTO pgsilo.clusters (name, region, endpoints) VALUES ('eu1', 'us', '{db1:5432}'); COMMIT",
        // What would be another server's name to some and not to others.
        "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{db1.:5432}')",
        "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{db1:05432}')",
        "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{::1}')",
        "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{/run//a}')",
        "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{db3, /run/../a}')",
        "UPDATE pgsilo.clusters SET max_sessions = 0",
        // What some could not read would keep nobody out.
        "INSERT INTO pgsilo.locks (kind, target, expires_at, locked_by) VALUES ('tenant', 'acme', 'infinity', 'ann')",
        "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('address', '127', 'ann')",
        "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('address', '::ffff:127.0.0.1/128', 'ann')",
        "INSERT INTO pgsilo.grants (issuer, subject, tenant, access, reason, break_glass)
            VALUES ('i', 's', 'acme', 'read-only', 'r', true)",
        "INSERT INTO pgsilo.grants (issuer, subject, tenant, access, reason, requested_by, granted_by, granted_at)
            VALUES ('i', 's', 'acme', 'read-only', 'r', 'ann', 'ann', now())",
        // A word is one tenant's, from each side, and an id is its own.
        "INSERT INTO pgsilo.aliases VALUES ('acme', 'globex')",
        "INSERT INTO pgsilo.aliases VALUES ('acme', 'acme')",
        "UPDATE pgsilo.placements SET seal = 'acme' WHERE tenant = 'globex'",
        "UPDATE pgsilo.tenants SET database_names = '{acme}' WHERE id = 'globex'",
        "INSERT INTO pgsilo.aliases VALUES ('initech', 'acme'); INSERT INTO pgsilo.tenants (id) VALUES ('initech')",
        "UPDATE pgsilo.placements SET seal = 'initech' WHERE tenant = 'globex'; INSERT INTO pgsilo.tenants (id) VALUES ('initech')",
        "UPDATE pgsilo.tenants SET database_names = '{initech}' WHERE id = 'globex'; INSERT INTO pgsilo.tenants (id) VALUES ('initech')",
        "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('tenant', 'No Such', 'ann')",
        "INSERT INTO pgsilo.locks (kind, target, issuer, locked_by) VALUES ('tenant', 'acme', 'i', 'ann')",
    ] {
        assert_eq!(refused(&control, order).await, SqlState::CHECK_VIOLATION, "{order}");
    }
    let address = "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('address', '10.0.0.1/8', 'ann')";
    assert_eq!(refused(&control, address).await, SqlState::INVALID_TEXT_REPRESENTATION);
    for (order, expected) in [
        // One database is one tenant's, and one seal.
        (
            "UPDATE pgsilo.placements SET cluster = 'eu1', dbname = 'tenant_acme' WHERE tenant = 'globex'",
            SqlState::UNIQUE_VIOLATION,
        ),
        (
            "UPDATE pgsilo.placements SET seal = 'seal-1' WHERE tenant = 'globex'",
            SqlState::UNIQUE_VIOLATION,
        ),
        ("DELETE FROM pgsilo.clusters WHERE name = 'eu1'", SqlState::FOREIGN_KEY_VIOLATION),
        // A server is in one cluster, and a role of OpenBAO's is one tenant's.
        (
            "INSERT INTO pgsilo.clusters (name, endpoints) VALUES ('other', '{DB1}')",
            SqlState::UNIQUE_VIOLATION,
        ),
        (
            "UPDATE pgsilo.placements SET mount = 'pgsilo/acme', roles = '{\"migrate\": \"ACME-rw\"}' WHERE tenant = 'globex'",
            SqlState::UNIQUE_VIOLATION,
        ),
    ] {
        assert_eq!(refused(&control, order).await, expected, "{order}");
    }
}

/// What a reader holds, by key: the revision of each row.
#[derive(Debug, Default, PartialEq)]
struct Held {
    position: Option<Position>,
    rows: BTreeMap<(String, String), i64>,
}

impl Held {
    fn revision(&self) -> i64 {
        self.position.as_ref().expect("read").revision
    }

    fn take(&mut self, reading: Reading) {
        let before = self.position.as_ref().map_or(0, |position| position.revision);
        assert!(reading.position.revision >= before && !reading.has_lost_history);
        if reading.is_whole {
            self.rows.clear();
        }
        for gone in reading.gone {
            self.rows.remove(&(gone.kind, gone.key));
        }
        let clusters = reading.clusters.into_iter().map(|row| ("clusters", row.name, row.revision));
        let tenants = reading.tenants.into_iter().map(|row| ("tenants", row.id, row.revision));
        let grants = reading.grants.into_iter().map(|row| ("grants", row.id, row.revision));
        let locks = reading.locks.into_iter().map(|row| ("locks", row.id, row.revision));
        for (kind, key, revision) in clusters.chain(tenants).chain(grants).chain(locks) {
            self.rows.insert((kind.to_owned(), key), revision);
        }
        self.position = Some(reading.position);
    }
}

async fn read(client: &mut Client, since: Option<&Position>) -> Result<Reading, ReadError> {
    pgsilo_registry::read::read(client, since, &Again::default()).await
}

async fn whole(client: &mut Client) -> Held {
    let mut held = Held::default();
    held.take(read(client, None).await.expect("read"));
    held
}

#[tokio::test]
async fn who_reads_what_is_newer_misses_nothing_that_many_write_at_once() {
    let database = Database::with_registry().await;
    database.control().await.batch_execute(TENANTS).await.expect("written");
    let mut reader = database.proxy().await;
    let mut held = whole(&mut reader).await;
    let writers = (0..6).map(|writer| {
        let database = &database;
        async move {
            let mut client = database.control().await;
            for number in 0..40 {
                let transaction = client.transaction().await.expect("begun");
                let id = format!("t{writer}-{}", number % 7);
                let order = match number % 5 {
                    0 | 1 => format!(
                        "INSERT INTO pgsilo.tenants (id) VALUES ('{id}') ON CONFLICT (id) DO UPDATE SET state = 'paused';
                         INSERT INTO pgsilo.placements VALUES ('{id}', 'us1', 'd-{id}', 's-{id}', 'm-{id}', '{{\"read-write\": \"r\"}}')
                            ON CONFLICT (tenant) DO NOTHING"
                    ),
                    2 if number % 2 == 0 => format!("DELETE FROM pgsilo.tenants WHERE id = '{id}'"),
                    // It is not to be seen any more, and is there.
                    2 => format!("DELETE FROM pgsilo.placements WHERE tenant = '{id}'"),
                    3 => format!(
                        "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('subject', '{id}', 'ann');
                         DELETE FROM pgsilo.locks WHERE target <> '{id}' AND target LIKE 't{writer}-%'"
                    ),
                    _ => "UPDATE pgsilo.clusters SET server_version = coalesce(server_version, 0) + 1 WHERE name = 'us1'".to_owned(),
                };
                transaction.batch_execute(&order).await.expect("written");
                // One that is rolled back leaves nothing.
                if number % 11 == 10 {
                    transaction.rollback().await.expect("rolled back");
                } else {
                    transaction.commit().await.expect("committed");
                }
            }
        }
    });
    let mut readings = 0;
    let mut writing = std::pin::pin!(join_all(writers));
    loop {
        tokio::select! {
            biased;
            reading = read(&mut reader, held.position.as_ref()) => {
                held.take(reading.expect("read"));
                readings += 1;
            }
            _ = &mut writing => break,
        }
    }
    held.take(read(&mut reader, held.position.as_ref()).await.expect("read"));
    println!("{readings} readings to revision {}", held.revision());
    assert_eq!(held, whole(&mut reader).await);
    assert!(readings > 5 && held.revision() > 100);

    // The digest says the same of a reader that has missed nothing, and of no other.
    let theirs = digest(&mut reader).await.expect("read");
    let own = |held: &Held| {
        let rows = held.rows.iter().map(|((kind, key), revision)| (&**kind, &**key, *revision));
        Digest::of(held.revision(), rows)
    };
    assert_eq!(own(&held), theirs);
    let one = held.rows.values_mut().next().expect("a row");
    *one -= 1;
    assert_ne!(own(&held), theirs);
}

/// What was lost in a failover, or by a restore, comes again with the same numbers and other
/// content.
#[tokio::test]
async fn a_registry_that_has_lost_its_newest_changes_is_read_anew() {
    let database = Database::with_registry().await;
    let control = database.control().await;
    control.batch_execute(TENANTS).await.expect("written");
    let mut reader = database.proxy().await;
    let before = read(&mut reader, None).await.expect("read");
    let lost = "UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'";
    control.batch_execute(lost).await.expect("written");
    let held = read(&mut reader, Some(&before.position)).await.expect("read");
    assert_eq!((held.tenants.len(), held.is_whole), (1, false));

    // As it was before that; then something else is written, as the same revision.
    let owner = database.as_role("pgsilo_registry_owner").await;
    let revision = before.position.revision;
    let lose = format!(
        "BEGIN; ALTER TABLE pgsilo.tenants DISABLE TRIGGER USER;
         UPDATE pgsilo.tenants SET state = 'active', revision = {revision} WHERE id = 'acme';
         ALTER TABLE pgsilo.tenants ENABLE TRIGGER USER;
         DELETE FROM pgsilo.history WHERE revision > {revision};
         UPDATE pgsilo.revision SET revision = {revision}; COMMIT"
    );
    owner.batch_execute(&lose).await.expect("lost");
    let other = "UPDATE pgsilo.tenants SET state = 'paused' WHERE id = 'globex'";
    control.batch_execute(other).await.expect("written");
    let reading = read(&mut reader, Some(&held.position)).await.expect("read");
    assert_eq!(reading.position.revision, held.position.revision);
    assert!(reading.has_lost_history && reading.is_whole);
    assert_eq!(reading.tenants.len(), 2);
    let known = read(&mut reader, Some(&before.position)).await.expect("read");
    assert!(!known.has_lost_history && !known.is_whole, "that is in its history");
}

#[tokio::test]
async fn a_revision_is_told_once_in_a_transaction_and_only_of_a_change() {
    let database = Database::with_registry().await;
    let control = database.control().await;
    let revision = async || database.status().await["revision"].as_i64().expect("a number");
    control.batch_execute(&format!("BEGIN; {TENANTS}; COMMIT")).await.expect("written");
    assert_eq!(revision().await, 2);
    let suspend = "UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'";
    control.batch_execute(suspend).await.expect("written");
    control.batch_execute(suspend).await.expect("it says the same");
    assert_eq!(revision().await, 3);
    let mut reader = database.proxy().await;
    let third = read(&mut reader, None).await.expect("read").position;
    // What is said of a tenant makes it another; a backup's status does not.
    control
        .batch_execute("INSERT INTO pgsilo.aliases VALUES ('org_1', 'globex')")
        .await
        .expect("written");
    let backup =
        "INSERT INTO pgsilo.backups (tenant, status, began_at) VALUES ('acme', 'done', now())";
    control.batch_execute(backup).await.expect("written");
    let newer = read(&mut reader, Some(&third)).await.expect("read");
    let ids: Vec<_> = newer.tenants.iter().map(|row| &*row.id).collect();
    assert_eq!((ids, newer.is_whole), (vec!["globex"], false));
}

#[tokio::test]
async fn every_change_is_in_the_audit_with_who_and_why_and_what_before() {
    let database = Database::with_registry().await;
    let control = database.control().await;
    control.batch_execute(TENANTS).await.expect("written");
    let change = "BEGIN; SET LOCAL pgsilo.actor = 'ann'; SET LOCAL pgsilo.reason = 'a bill';
        UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'; COMMIT";
    control.batch_execute(change).await.expect("written");
    let last = "SELECT login, actor, reason, relation, key, operation, before ->> 'state', after ->> 'state'
        FROM pgsilo.audit ORDER BY number DESC LIMIT 1";
    let row = control.query_one(last, &[]).await.expect("asked");
    let texts: Vec<String> = (0..8).map(|column| row.get(column)).collect();
    let expected = [
        "pgsilo_registry_control",
        "ann",
        "a bill",
        "tenants",
        "acme",
        "update",
        "active",
        "suspended",
    ];
    assert_eq!(texts, expected);
    let broken = "SELECT count(*) FROM (
        SELECT hash, lag(hash) OVER (ORDER BY number) AS previous, pgsilo.audit_content(a) AS content FROM pgsilo.audit a
        ) AS chain WHERE hash <> sha256(coalesce(previous, '') || convert_to(content, 'UTF8'))";
    let owner = database.as_role("pgsilo_registry_owner").await;
    let count: i64 = owner.query_one(broken, &[]).await.expect("asked").get(0);
    assert_eq!(count, 0);
    // Even the owner's hand leaves a trace.
    let forge = "ALTER TABLE pgsilo.audit DISABLE TRIGGER ALL; UPDATE pgsilo.audit SET actor = 'bob' WHERE actor = 'ann'";
    owner.batch_execute(forge).await.expect("forged");
    let count: i64 = owner.query_one(broken, &[]).await.expect("asked").get(0);
    assert_eq!(count, 1);
}

#[tokio::test]
async fn a_file_is_applied_shown_first_and_exported_as_it_was() {
    let database = Database::with_registry().await;
    let dir = tempdir("apply");
    let file = |text: &str| {
        let path = dir.join("tenants.toml");
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let text = "[[cluster]]\nname = \"eu1\"\nregion = \"eu\"\nendpoints = [\"db1.internal:5432\"]\n\
        tls = { mode = \"require\" }\n\
        [[tenant]]\nid = \"acme\"\nname = \"Acme Ltd\"\nregions = [\"eu\"]\naliases = [\"org_1\", \"/acme\"]\n\
        database_names = [\"shop\"]\nplacement = { cluster = \"eu1\", dbname = \"d1\", seal = \"5f0c\" }\n\
        lease = { roles = { read-write = \"acme-rw\", read-only = \"acme-ro\" } }\n\
        limits = { max_sessions = 5, idle_timeout = \"90m\" }\n\
        [[tenant]]\nid = \"globex\"\nstate = \"paused\"\n\
        placement = { host = \"DB2\", tls = { mode = \"require\" }, dbname = \"d2\" }\n\
        lease = { mount = \"m\", roles = { migrate = \"r\" } }\n\
        [[binding]]\ncertificate = \"dns:billing\"\ntenant = \"acme\"\naccess = \"read-only\"\n";
    let first = file(text);
    let dry = database.apply(&["--file", &first, "--dry-run"]).await;
    assert!(dry.status.success(), "{}", said(&dry));
    let shown = String::from_utf8_lossy(&dry.stdout).into_owned();
    for line in [
        "+ cluster eu1",
        "+ cluster db2:5432",
        "+ tenant acme",
        "+ placement of globex",
        "+ alias /acme",
        "+ certificate dns:billing",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(database.status().await["tenants"], 0, "none was made");
    let applied =
        database.apply(&["--file", &first, "--actor", "ann", "--reason", "the first two"]).await;
    assert!(applied.status.success(), "{}", said(&applied));
    assert_eq!(database.status().await["revision"], 2, "one transaction");
    let control = database.control().await;
    let who = "SELECT DISTINCT actor || ': ' || reason FROM pgsilo.audit";
    let who = control.query(who, &[]).await.expect("asked");
    assert_eq!(who.iter().map(|row| row.get(0)).collect::<Vec<String>>(), ["ann: the first two"]);

    // Once more: it says what it says already. And so does what is exported, in either form.
    let exported = database.run(&["export"]).await;
    let exported = String::from_utf8(exported.stdout).expect("text");
    for text in [text, &exported] {
        let again = database.apply(&["--file", &file(text)]).await;
        assert!(again.status.success(), "{}", said(&again));
        assert_eq!(String::from_utf8_lossy(&again.stdout), "0 changes, revision 2\n", "{text}");
    }
    let json = database.run(&["export", "--json"]).await;
    let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["tenant"][0]["limits"]["idle_timeout"], "90m");

    // Two change places, one loses an alias, one is not in the file.
    let other = text.replace("\"d1\"", "\"d3\"").replace("[\"org_1\", \"/acme\"]", "[\"org_1\"]");
    let (rest, binding) = other.split_once("[[binding]]").expect("a binding");
    let (acme, _globex) = rest.split_once("[[tenant]]\nid = \"globex\"").expect("globex");
    let smaller = file(&format!("{acme}[[binding]]{binding}"));
    let applied = database.apply(&["--file", &smaller]).await;
    let shown = String::from_utf8_lossy(&applied.stdout).into_owned();
    for line in [
        "~ placement of acme: dbname d1 -> d3",
        "- alias /acme",
        "left alone, not in the file: 1 clusters, 1 tenants, 1 placements (--prune deletes them)",
    ] {
        assert!(shown.contains(line), "{line}: {shown}{}", said(&applied));
    }
    let pruned = database.apply(&["--file", &smaller, "--prune", "--max-deletions", "0"]).await;
    assert!(said(&pruned).contains("--max-deletions 1 deletes them"), "{}", said(&pruned));
    let pruned = database.apply(&["--file", &smaller, "--prune"]).await;
    assert!(pruned.status.success(), "{}", said(&pruned));
    assert_eq!(database.status().await["tenants"], 1);

    // A server gets a name: the cluster that it was goes, as its tenants go to the other.
    let alone = "[[tenant]]\nid = \"globex\"\nplacement = { host = \"db2\", tls = { mode = \"require\" }, dbname = \"d2\" }\n\
        lease = { mount = \"m\", roles = { migrate = \"r\" } }\n";
    let applied = database.apply(&["--file", &file(alone)]).await;
    assert!(applied.status.success(), "{}", said(&applied));
    let named = "[[cluster]]\nname = \"two\"\nendpoints = [\"db2\"]\ntls = { mode = \"require\" }\n"
        .to_owned()
        + &alone.replace("host = \"db2\", tls = { mode = \"require\" }", "cluster = \"two\"");
    let refused = database.apply(&["--file", &file(&named)]).await;
    assert!(said(&refused).contains("--prune deletes it"), "{}", said(&refused));
    let renamed = database.apply(&["--file", &file(&named), "--prune"]).await;
    assert!(renamed.status.success(), "{}", said(&renamed));
    // A state that is left out stays.
    control
        .batch_execute("UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'globex'")
        .await
        .expect("written");
    let again = database.apply(&["--file", &file(&named)]).await;
    assert!(String::from_utf8_lossy(&again.stdout).starts_with("0 changes"), "{}", said(&again));
    let resumed = named.replace("id = \"globex\"", "id = \"globex\"\nstate = \"active\"");
    let resumed = database.apply(&["--file", &file(&resumed)]).await;
    assert!(
        String::from_utf8_lossy(&resumed.stdout)
            .contains("~ tenant globex: state suspended -> active")
    );
}

#[tokio::test]
async fn what_no_proxy_would_take_is_not_applied() {
    let database = Database::with_registry().await;
    let control = database.control().await;
    control.batch_execute(TENANTS).await.expect("written");
    let dir = tempdir("refuse");
    let tenant = |id: &str, more: &str| {
        format!(
            "[[tenant]]\nid = \"{id}\"\nplacement = {{ host = \"db9\", tls = {{ mode = \"require\" }}, dbname = \"{id}\" }}\n{more}"
        )
    };
    let lease = "lease = { mount = \"pgsilo/acme\", roles = { read-only = \"r\" } }\n";
    for (text, expected) in [
        // A mistake of the file's own has its line.
        (tenant("Initech", lease), "tenants.toml:2: tenant[0].id: \"Initech\" is not one"),
        // What only shows beside those that are there.
        (
            tenant(
                "initech",
                "lease = { mount = \"pgsilo/acme\", roles = { read-only = \"ACME-rw\" } }\n",
            ),
            "tenants never share a role",
        ),
        (tenant("initech", &format!("aliases = [\"acme\"]\n{lease}")), "is a tenant's id"),
        (tenant("initech", lease).replace("\"db9\", ", "\"db1\", "), "is a server of cluster"),
        (
            tenant("initech", &format!("regions = [\"eu\"]\n{lease}")),
            "tenant initech may live in eu only, and cluster db9:5432 is in no region",
        ),
    ] {
        let path = dir.join("tenants.toml");
        std::fs::write(&path, &text).expect("written");
        let output = database.apply(&["--file", path.to_str().expect("a path")]).await;
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(said(&output).contains(expected), "{expected}: {}", said(&output));
        assert_eq!(database.status().await["tenants"], 2, "nothing is written");
    }
}

/// A folder of its own.
fn tempdir(name: &str) -> std::path::PathBuf {
    let dir = programs::tmp().join(format!("registry-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("made");
    dir
}
