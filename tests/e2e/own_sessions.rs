//! Sessions of one tenant see, cancel and end each other by SQL, though each has a role of its own;
//! and reach no other tenant's, whatever they try.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::world::{World, world};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::orphans::settings_of;

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await.expect("a pid").get(0)
}

async fn connect(proxy: &Proxy, tenant: &str, access: &str) -> Client {
    let token = mint::token_with(tenant, json!({ "access": access }));
    proxy.connect(&token, tenant).await.expect("connected")
}

/// What a function that signals says: its answer, or the SQLSTATE that it fails with.
async fn signal(client: &Client, function: &str, pid: i32) -> Result<bool, SqlState> {
    match client.query_one(&format!("SELECT {function}({pid})"), &[]).await {
        Ok(row) => Ok(row.get(0)),
        Err(error) => Err(error.code().expect("an SQLSTATE").clone()),
    }
}

async fn listed(client: &Client, view: &str) -> Vec<i32> {
    let sql = format!("SELECT pid FROM {view} ORDER BY pid");
    let rows = client.query(&sql, &[]).await.expect("listed");
    rows.iter().map(|row| row.get(0)).collect()
}

/// Runs `pg_sleep` in a session until another one has cancelled it.
async fn cancels(canceller: &Client, function: &str, victim: &Client) {
    let pid = pid(victim).await;
    let cancel = async {
        world().waits_for(pid, "PgSleep").await;
        assert_eq!(signal(canceller, function, pid).await, Ok(true));
    };
    let (slept, ()) = tokio::join!(victim.batch_execute("SELECT pg_sleep(600)"), cancel);
    assert_eq!(slept.expect_err("cancelled").code(), Some(&SqlState::QUERY_CANCELED));
}

#[tokio::test]
async fn a_session_sees_cancels_and_ends_its_tenants_own_and_no_others() {
    let proxy = Proxy::start().await;
    let asker = connect(&proxy, "acme", "read-write").await;
    let own = connect(&proxy, "acme", "migrate").await;
    let neighbour = connect(&proxy, "globex", "read-write").await;
    let mut provisioner: tokio_postgres::Config =
        world().var("PROVISIONER_DSN").parse().expect("a DSN");
    let (provisioner, connection) = provisioner
        .dbname("tenant_acme")
        .connect(tokio_postgres::NoTls)
        .await
        .expect("the provisioner logs in");
    tokio::spawn(connection);
    let superuser = world().superuser("tenant_acme").await;
    // OpenBAO keeps a connection.
    let broker = "SELECT pid FROM pg_stat_activity WHERE usename = 'tenant_acme_broker'";
    let broker: i32 = superuser.query(broker, &[]).await.expect("asked")[0].get(0);

    // Its own: seen with what they do, which PostgreSQL shows of no other role's session.
    own.query_one("SELECT 'seen'", &[]).await.expect("a row");
    let own_pid = pid(&own).await;
    let query = format!("SELECT query FROM pgsilo.pg_stat_activity WHERE pid = {own_pid}");
    let seen: String = asker.query_one(&query, &[]).await.expect("listed").get(0);
    assert!(seen.contains("pg_backend_pid"), "{seen}");
    cancels(&asker, "pgsilo.pg_cancel_backend", &own).await;

    // Tries to have its own words found in place of PostgreSQL's.
    asker
        .batch_execute(
            "CREATE TEMP TABLE pg_stat_activity AS
                 SELECT a.*, 0 AS mine FROM pg_catalog.pg_stat_activity a;
             CREATE FUNCTION public.pg_has_role(oid, text) RETURNS boolean RETURN true;
             CREATE FUNCTION public.pg_has_role(name, name, text) RETURNS boolean RETURN true;
             SET search_path = pg_temp, public, pg_catalog",
        )
        .await
        .expect("made");
    let pids = listed(&asker, "pgsilo.pg_stat_activity").await;
    assert!(pids.contains(&own_pid) && pids.contains(&pid(&asker).await), "{pids:?}");
    for other in [pid(&neighbour).await, pid(&provisioner).await, pid(&superuser).await, broker] {
        assert!(!pids.contains(&other));
        for function in ["pgsilo.pg_cancel_backend", "pgsilo.pg_terminate_backend"] {
            let refused = Err(SqlState::INSUFFICIENT_PRIVILEGE);
            assert_eq!(signal(&asker, function, other).await, refused);
        }
        // What decides is no one's to ask either.
        let refused = Err(SqlState::INSUFFICIENT_PRIVILEGE);
        assert_eq!(signal(&asker, "pgsilo.may_signal", other).await, refused);
    }
    asker
        .batch_execute(
            "DROP FUNCTION public.pg_has_role(oid, text), public.pg_has_role(name, name, text)",
        )
        .await
        .expect("dropped");
    // Nor are the functions its own to change.
    for sql in [
        "CREATE FUNCTION pgsilo.mine() RETURNS int RETURN 1",
        "ALTER FUNCTION pgsilo.sessions() RESET ALL",
        "DROP VIEW pgsilo.pg_stat_activity",
    ] {
        let error = asker.batch_execute(sql).await.expect_err("not its own");
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{sql}");
    }

    // An end, and an unknown pid, as a transaction sees it that has looked before.
    asker.batch_execute("BEGIN").await.expect("begun");
    assert!(listed(&asker, "pgsilo.pg_stat_activity").await.contains(&own_pid));
    let end = format!("SELECT pgsilo.pg_terminate_backend(pid => {own_pid}, timeout => 60000)");
    assert!(asker.query_one(&end, &[]).await.expect("ended").get::<_, bool>(0));
    assert_eq!(signal(&asker, "pgsilo.pg_terminate_backend", own_pid).await, Ok(false));
    asker.batch_execute("COMMIT").await.expect("committed");
    own.query_one("SELECT 1", &[]).await.expect_err("it has ended");
    for other in [&neighbour, &provisioner, &superuser] {
        other.query_one("SELECT 1", &[]).await.expect("it lives");
    }
}

#[tokio::test]
async fn a_session_that_reads_only_reaches_none_that_writes() {
    let proxy = Proxy::start().await;
    let reader = connect(&proxy, "acme", "read-only").await;
    let other = connect(&proxy, "acme", "read-only").await;
    let writer = connect(&proxy, "acme", "read-write").await;
    let migration = connect(&proxy, "acme", "migrate").await;
    let pids = listed(&reader, "pgsilo.pg_stat_activity").await;
    for stronger in [&writer, &migration] {
        let stronger = pid(stronger).await;
        assert!(!pids.contains(&stronger));
        // As the role that it has logged in as, too.
        for role in ["tenant_acme_ro", "none"] {
            reader.batch_execute(&format!("SET ROLE {role}")).await.expect("set");
            let refused = Err(SqlState::INSUFFICIENT_PRIVILEGE);
            assert_eq!(signal(&reader, "pgsilo.pg_terminate_backend", stronger).await, refused);
        }
    }
    assert!(pids.contains(&pid(&other).await));
    cancels(&reader, "pgsilo.pg_cancel_backend", &other).await;
    cancels(&writer, "pgsilo.pg_cancel_backend", &reader).await;
}

/// A lease's role may have a search_path that leads there first; then an application that names
/// the functions as always finds the tenant's, and makes its tables where it always did.
#[tokio::test]
async fn an_application_that_is_not_changed_finds_the_functions_by_its_search_path() {
    let proxy = Proxy::start().await;
    let asker = connect(&proxy, "acme", "read-write").await;
    let own = connect(&proxy, "acme", "read-write").await;
    let own_pid = pid(&own).await;
    // By default PostgreSQL's own are found.
    let refused = Err(SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(signal(&asker, "pg_cancel_backend", own_pid).await, refused);

    let (status, answer) = world().bao("GET", "pgsilo/acme/roles/tenant-acme-rw", None).await;
    assert_eq!(status, 200);
    world().role_like_acme("tenant-acme-shadowed", "1h", "24h").await;
    let mut role = answer["data"].clone();
    let statements = role["creation_statements"].as_array_mut().expect("statements");
    let path = "ALTER ROLE \"{{name}}\" SET search_path = \"$user\", public, pgsilo, pg_catalog";
    statements.push(json!(path));
    let (status, answer) =
        world().bao("POST", "pgsilo/acme/roles/tenant-acme-shadowed", Some(role)).await;
    assert!(status < 300, "{answer}");
    let tenants = |text: &str| text.replacen("tenant-acme-rw", "tenant-acme-shadowed", 1);
    let settings = Settings { tenants, ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let asker = connect(&proxy, "acme", "read-write").await;
    let victim = connect(&proxy, "acme", "read-write").await;
    cancels(&asker, "pg_cancel_backend", &victim).await;
    asker
        .batch_execute("CREATE TABLE made_here (id int); DROP TABLE public.made_here")
        .await
        .expect("public is where tables are made");
    // As Rails does before it drops a database.
    let ended = "SELECT pg_terminate_backend(pid), pid FROM pg_stat_activity
         WHERE datname = current_database() AND pid = $1 AND pid <> pg_backend_pid()";
    let victim_pid = pid(&victim).await;
    let row = asker.query_one(ended, &[&victim_pid]).await.expect("ended");
    assert!(row.get::<_, bool>(0));
    // It comes back to that path.
    for sql in ["SET search_path = public", "DISCARD ALL"] {
        asker.batch_execute(sql).await.expect(sql);
    }
    assert!(listed(&asker, "pg_stat_activity").await.contains(&own_pid));
}

/// What docs/compatibility.md has for a cluster of one tenant.
#[tokio::test]
async fn where_a_tenant_is_alone_its_role_may_be_let_signal_and_see() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, settings_of(&world)).await;
    let token = mint::token_of(&world, "acme");
    let asker = proxy.connect(&token, "acme").await.expect("connected");
    let own = proxy.connect(&token, "acme").await.expect("connected");
    let pid = pid(&own).await;
    let refused = Err(SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(signal(&asker, "pg_terminate_backend", pid).await, refused);
    let grant = "GRANT pg_signal_backend, pg_read_all_stats TO tenant_acme_app";
    world.superuser("postgres").await.batch_execute(grant).await.expect("granted");
    let query = format!("SELECT query FROM pg_stat_activity WHERE pid = {pid}");
    let seen: String = asker.query_one(&query, &[]).await.expect("listed").get(0);
    assert!(seen.contains("pg_backend_pid"), "{seen}");
    assert_eq!(signal(&asker, "pg_terminate_backend", pid).await, Ok(true));
}

/// docs/compatibility.md has this table.
#[tokio::test]
async fn ways_back_to_the_tenants_role() {
    let proxy = Proxy::start().await;
    let client = connect(&proxy, "acme", "read-write").await;
    for (statement, comes_back) in [
        ("RESET ALL", false),
        ("RESET ROLE", true),
        ("SET SESSION AUTHORIZATION DEFAULT", true),
        ("RESET SESSION AUTHORIZATION", true),
        ("DISCARD ALL", true),
    ] {
        for left in [false, true] {
            client.batch_execute("RESET ROLE").await.expect("reset");
            if left {
                client.batch_execute("SET ROLE NONE").await.expect("set");
            }
            client.batch_execute(statement).await.expect(statement);
            let row = client.query_one("SELECT current_user::text, session_user::text", &[]);
            let row = row.await.expect("a row");
            let (current, session): (&str, &str) = (row.get(0), row.get(1));
            let expected = if left && !comes_back { session } else { "tenant_acme_app" };
            assert_eq!(current, expected, "{statement}, left: {left}");
        }
    }
}

/// The tenant may make any schema, and would own what is put into it: the broker's functions above
/// all.
#[tokio::test]
async fn nothing_of_the_brokers_is_put_into_a_schema_of_the_tenants() {
    let world = World::own().await;
    let sql = include_str!("../../docker/postgresql/database.sql").replace("TENANT", "acme");
    let mut provisioner: tokio_postgres::Config =
        world.var("PROVISIONER_DSN").parse().expect("a DSN");
    let (provisioner, connection) =
        provisioner.dbname("tenant_acme").connect(tokio_postgres::NoTls).await.expect("connected");
    tokio::spawn(connection);
    let superuser = world.superuser("tenant_acme").await;
    // Run again while somebody reads the view, and where there is no schema public any more.
    let reader = world.superuser("tenant_acme").await;
    reader.batch_execute("BEGIN; SELECT FROM pgsilo.pg_stat_activity").await.expect("read");
    superuser.batch_execute("DROP SCHEMA public CASCADE").await.expect("dropped");
    provisioner.batch_execute(&sql).await.expect("it may be run again");
    reader.batch_execute("COMMIT").await.expect("read");
    let its_own = "DROP SCHEMA pgsilo CASCADE; CREATE SCHEMA pgsilo AUTHORIZATION tenant_acme_app";
    superuser.batch_execute(its_own).await.expect("made");
    let error = provisioner.batch_execute(&sql).await.expect_err("refused");
    let said = error.as_db_error().expect("PostgreSQL's").message();
    assert!(said.contains("schema pgsilo is the tenant's own"), "{said}");
    let functions = "SELECT 1 FROM pg_proc WHERE pronamespace = 'pgsilo'::regnamespace";
    assert!(superuser.query(functions, &[]).await.expect("told").is_empty());
}
