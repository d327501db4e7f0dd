//! A credential stops working, whatever stands against it: another tenant, who hammers logins, the
//! session itself.
//!
//! Each test has a sandbox of its own, without other clients, and logs in to PostgreSQL directly,
//! as who has captured a leased credential would.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};
use tokio_postgres::{Client, Error};

use crate::orphans::{audit, settings_of, world_and_proxy};

/// Where tenants' databases are as PostgreSQL makes them: the recipe's template takes large objects
/// away.
async fn with_large_objects() -> (World, Proxy) {
    let (world, proxy) = world_and_proxy().await;
    for database in ["tenant_acme", "tenant_globex"] {
        let grant = "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC";
        world.superuser(database).await.batch_execute(grant).await.expect("granted");
    }
    (world, proxy)
}

async fn reconfigure(world: &World, settings: &[&str]) {
    let superuser = world.superuser("postgres").await;
    for setting in settings {
        superuser.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await.expect("set");
    }
    superuser.batch_execute("SELECT pg_reload_conf()").await.expect("read again");
}

/// A session that has given its leased role a password that is known, and the role's name.
async fn captured(world: &World, proxy: &Proxy, tenant: &str) -> (Raw, String) {
    captured_with(world, proxy, json!({ "tenant": tenant }), tenant).await
}

async fn captured_with(world: &World, proxy: &Proxy, claims: Value, tenant: &str) -> (Raw, String) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::signed_by(world, claims), tenant).await;
    let role = client.ask("SELECT session_user::text").await;
    let give = "SET ROLE NONE; ALTER ROLE CURRENT_USER PASSWORD 'captured'; SELECT 'given'";
    assert_eq!(client.ask(give).await, "given");
    client.ask("RESET ROLE; SELECT 'back'").await;
    (client, role)
}

/// A login with a captured credential.
async fn directly(world: &World, role: &str, options: &str) -> Result<Client, Error> {
    let tenant = role.split('-').nth(1).expect("a tenant's role");
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.var("PG_PORT").parse().expect("a port"));
    config.user(role).password("captured").dbname(format!("tenant_{tenant}")).options(options);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Waits until OpenBAO holds no lease for a role any more: it has done all that it ever will.
async fn is_revoked(world: &World, lease_role: &str) {
    eventually("the lease to be revoked", async || {
        world.leases(lease_role).await.is_empty().then_some(())
    })
    .await;
    let (status, answer) = world.bao("GET", "sys/leases/count?type=irrevocable", None).await;
    assert_eq!((status, &answer["data"]["lease_count"]), (200, &json!(0)));
}

/// Whether there is such a role, and whether it may log in.
async fn may_log_in(world: &World, role: &str) -> Option<bool> {
    let superuser = world.superuser("postgres").await;
    let query = "SELECT rolcanlogin FROM pg_roles WHERE rolname = $1";
    superuser.query_opt(query, &[&role]).await.expect("asked").map(|row| row.get(0))
}

/// Sessions that have outlived their role.
async fn roleless_sessions(world: &World) -> i64 {
    let superuser = world.superuser("postgres").await;
    let query = "SELECT count(*) FROM pg_stat_activity
        WHERE usesysid <> 0 AND NOT EXISTS (SELECT FROM pg_roles WHERE oid = usesysid)";
    superuser.query_one(query, &[]).await.expect("asked").get(0)
}

async fn is_refused(world: &World, role: &str) {
    let error = directly(world, role, "").await.map(drop).expect_err("it cannot log in");
    let sqlstate = error.code().expect("the server's answer").code();
    assert!(["28P01", "28000"].contains(&sqlstate), "{error:?}");
}

/// A revoked role of globex's that stays, as acme has granted it something.
async fn kept_by_acme(world: &World, proxy: &Proxy) -> String {
    let (victim, role) = captured(world, proxy, "globex").await;
    let acme = proxy.connect(&mint::token_of(world, "acme"), "acme").await.expect("acme");
    acme.batch_execute(&format!("CREATE TABLE hook (n int); GRANT SELECT ON hook TO \"{role}\""))
        .await
        .expect("granted");
    drop(victim);
    is_revoked(world, "tenant-globex-rw").await;
    role
}

/// Everything that a tenant may grant to a role that is not its own, by each of its roles.
fn grants(role: &str) -> Vec<String> {
    let granted = [
        "CREATE SCHEMA hook",
        "CREATE TABLE hook.t (n int, m int)",
        "CREATE VIEW hook.v AS SELECT 1",
        "CREATE SEQUENCE hook.s",
        "CREATE TYPE hook.kind AS ENUM ('a')",
        "CREATE DOMAIN hook.some AS int",
        "CREATE FUNCTION hook.f(int, text) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE PROCEDURE hook.p() LANGUAGE sql AS 'SELECT 1'",
        // Two of one name, but for OUT arguments.
        "CREATE FUNCTION hook.two(int, VARIADIC \"char\"[]) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE FUNCTION hook.one(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE PROCEDURE hook.one(OUT x int) LANGUAGE plpgsql AS 'BEGIN x := 1; END'",
        "GRANT EXECUTE ON FUNCTION hook.one(int), hook.two(int, \"char\"[]) TO \"ROLE\"",
        "SELECT lo_create(4711)",
        "GRANT SELECT ON hook.t TO PUBLIC",
        "GRANT ALL ON SCHEMA hook TO \"ROLE\"",
        "GRANT ALL ON hook.t, hook.v TO \"ROLE\"",
        "GRANT UPDATE (n) ON hook.t TO \"ROLE\"",
        "GRANT USAGE ON SEQUENCE hook.s TO \"ROLE\"",
        "GRANT USAGE ON TYPE hook.kind, hook.some TO \"ROLE\"",
        "GRANT EXECUTE ON FUNCTION hook.f(int, text) TO \"ROLE\"",
        "GRANT EXECUTE ON PROCEDURE hook.p() TO \"ROLE\"",
        "GRANT SELECT ON LARGE OBJECT 4711 TO \"ROLE\"",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO \"ROLE\"",
        "ALTER TABLE hook.t ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY hook ON hook.t TO \"ROLE\" USING (true)",
        // By somebody who does not own it.
        "GRANT USAGE ON SCHEMA hook TO tenant_acme_ro",
        "GRANT SELECT ON hook.t TO tenant_acme_ro WITH GRANT OPTION",
        "CREATE TABLE hook.u (n int)",
        "GRANT ALL ON hook.u TO \"ROLE\" WITH GRANT OPTION",
    ];
    granted.iter().map(|sql| sql.replace("ROLE", role)).collect()
}

#[tokio::test]
async fn grants_of_another_tenant_do_not_keep_a_credential_alive() {
    let (world, proxy) = with_large_objects().await;
    let (victim, role) = captured(&world, &proxy, "globex").await;
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    for sql in grants(&role) {
        acme.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    let reader = mint::signed_by(&world, json!({ "tenant": "acme", "access": "read-only" }));
    let reader = proxy.connect(&reader, "acme").await.expect("a reader");
    let sql = format!("GRANT SELECT ON hook.t TO \"{role}\"");
    reader.batch_execute(&sql).await.expect("granted by who does not own it");

    drop(victim);
    is_revoked(&world, "tenant-globex-rw").await;
    assert_eq!(may_log_in(&world, &role).await, Some(false), "it stays, and may not log in");
    is_refused(&world, &role).await;
    let (code, findings) = audit(&world, &[]).await;
    let expected = json!({
        "tenant": "globex", "finding": "stopped_role", "role": role, "sessions": 0,
        "databases": ["tenant_acme"], "outcome": "left",
    });
    assert_eq!((code, findings), (3, vec![expected]));

    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    assert_eq!(may_log_in(&world, &role).await, None);
    assert_eq!(audit(&world, &[]).await, (0, vec![]));
    // What it has granted to others, it has.
    let left = "SELECT count(*) FROM information_schema.role_table_grants
        WHERE table_name = 't' AND grantee IN ('PUBLIC', 'tenant_acme_ro')";
    let left: i64 = acme.query_one(left, &[]).await.expect("asked").get(0);
    assert_eq!(left, 2);
    reader.batch_execute("SELECT n FROM hook.t").await.expect("and so it reads");
}

/// Another session's own objects cannot be named.
#[tokio::test]
async fn objects_of_an_idle_session_do_not_keep_its_role() {
    let (world, proxy) = world_and_proxy().await;
    let (victim, role) = captured(&world, &proxy, "globex").await;
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    for sql in [
        "CREATE TEMP TABLE own (n int)",
        "CREATE FUNCTION pg_temp.own() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TABLE hook (n int)",
    ] {
        acme.batch_execute(sql).await.expect("made");
    }
    for what in ["SELECT ON own", "EXECUTE ON FUNCTION pg_temp.own()", "SELECT ON hook"] {
        acme.batch_execute(&format!("GRANT {what} TO \"{role}\"")).await.expect("granted");
    }
    drop(victim);
    is_revoked(&world, "tenant-globex-rw").await;
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    assert_eq!(may_log_in(&world, &role).await, None);
    acme.batch_execute("SELECT * FROM own").await.expect("it is its own all the same");
}

/// Nor what its own tenant grants it, as the role that owns all.
#[tokio::test]
async fn grants_of_its_own_tenant_do_not_keep_a_role() {
    let (world, proxy) = with_large_objects().await;
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    let role: String =
        acme.query_one("SELECT session_user::text", &[]).await.expect("a role").get(0);
    for sql in grants(&role) {
        acme.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    drop(acme);
    is_revoked(&world, "tenant-acme-rw").await;
    assert_eq!(may_log_in(&world, &role).await, None, "it is gone");
}

#[tokio::test]
async fn a_login_that_is_under_way_does_not_outlive_its_role() {
    a_login_is_ended_that_is_under_way("").await;
}

/// As roles are that statements of before made, which gave the broker nothing but ADMIN.
#[tokio::test]
async fn a_login_under_way_does_not_outlive_a_role_of_which_the_broker_is_no_member() {
    a_login_is_ended_that_is_under_way(
        "REVOKE \"ROLE\" FROM tenant_acme_broker GRANTED BY tenant_acme_broker",
    )
    .await;
}

/// A login may pass all of a server's checks, and be seen as its role's only half an hour later.
async fn a_login_is_ended_that_is_under_way(first: &str) {
    let (world, proxy) = world_and_proxy().await;
    let (client, role) = captured(&world, &proxy, "acme").await;
    let superuser = world.superuser("postgres").await;
    superuser.batch_execute(&first.replace("ROLE", &role)).await.expect("done");
    // In PostgreSQL, after it has asked whether the role may log in.
    let login = directly(&world, &role, "-c post_auth_delay=20");
    let revoked = async {
        let superuser = world.superuser("postgres").await;
        let starting = "SELECT l.pid FROM pg_locks l WHERE l.locktype = 'object'
            AND l.classid = 'pg_database'::regclass AND NOT EXISTS (
                SELECT FROM pg_stat_activity a WHERE a.pid = l.pid AND a.usesysid IS NOT NULL)";
        let mut seen = HashMap::new();
        eventually("the login to be under way, longer than any other takes", async || {
            let rows = superuser.query(starting, &[]).await.expect("asked");
            rows.iter().find_map(|row| {
                let since = *seen.entry(row.get::<_, i32>(0)).or_insert_with(Instant::now);
                (since.elapsed() > Duration::from_secs(1)).then_some(())
            })
        })
        .await;
        drop(client);
        is_revoked(&world, "tenant-acme-rw").await;
        eventually("the role to be gone", async || {
            may_log_in(&world, &role).await.is_none().then_some(())
        })
        .await;
    };
    let (login, ()) = tokio::join!(login, revoked);
    // It is ended in the middle of it, or as soon as it is through.
    if let Ok(client) = login {
        client.simple_query("SELECT 1").await.expect_err("ended before its first query");
    }
    assert_eq!(roleless_sessions(&world).await, 0);
}

/// Eight who log in without a pause, until the role is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_that_race_a_revocation_do_not_outlive_their_role() {
    let (world, proxy) = world_and_proxy().await;
    let world = std::sync::Arc::new(world);
    for _ in 0..3 {
        let (client, role) = captured(&world, &proxy, "acme").await;
        let hammers: Vec<_> = (0..8)
            .map(|_| {
                let (world, role) = (std::sync::Arc::clone(&world), role.clone());
                tokio::spawn(async move {
                    let mut clients = Vec::new();
                    // Until it is told that there is no such role, or that it may not.
                    loop {
                        match directly(&world, &role, "").await {
                            Ok(client) => clients.push(client),
                            Err(error) if error.code().is_some_and(|c| c.code() == "28P01") => {
                                break;
                            }
                            Err(_) => {}
                        }
                        if clients.len() > 8 {
                            clients.remove(0);
                        }
                    }
                    clients
                })
            })
            .collect();
        eventually("them to log in", async || {
            let superuser = world.superuser("postgres").await;
            let query = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
            let in_it: i64 = superuser.query_one(query, &[&role]).await.expect("asked").get(0);
            (in_it > 8).then_some(())
        })
        .await;
        drop(client);
        is_revoked(&world, "tenant-acme-rw").await;
        let mut clients = Vec::new();
        for hammer in hammers {
            clients.extend(hammer.await.expect("it ended"));
        }
        for client in &clients {
            eventually("each session to have ended", async || {
                client.simple_query("SELECT 1").await.is_err().then_some(())
            })
            .await;
        }
        assert_eq!(roleless_sessions(&world).await, 0);
        assert_ne!(may_log_in(&world, &role).await, Some(true));
    }
}

/// PostgreSQL says "tuple concurrently updated" to who changes a row that has just been changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_change_their_role_without_a_pause_are_stopped_at_once() {
    let (world, proxy) = world_and_proxy().await;
    // Who commits cannot be interrupted, and takes as long as on a disk.
    let slow =
        ["fsync = on", "synchronous_commit = on", "commit_delay = 20000", "commit_siblings = 0"];
    reconfigure(&world, &slow).await;
    for _ in 0..5 {
        let (client, role) = captured(&world, &proxy, "acme").await;
        let mut hammers = Vec::new();
        for _ in 0..8 {
            let client = directly(&world, &role, "").await.expect("in");
            hammers.push(tokio::spawn(async move {
                let change = "SET ROLE NONE; ALTER ROLE CURRENT_USER PASSWORD 'captured'";
                // Until it is ended; the others change it, too.
                while !client.is_closed() {
                    let _refused = client.batch_execute(change).await;
                }
            }));
        }
        let leases = world.leases("tenant-acme-rw").await;
        for lease in &leases {
            let path = format!("pgsilo/acme/creds/tenant-acme-rw/{lease}");
            let body = json!({ "lease_id": path, "sync": true });
            let (status, answer) = world.bao("PUT", "sys/leases/revoke", Some(body)).await;
            assert_eq!(status, 204, "{answer}");
        }
        assert_eq!(leases.len(), 1);
        assert_ne!(may_log_in(&world, &role).await, Some(true));
        for hammer in hammers {
            hammer.await.expect("it has ended");
        }
        drop(client);
    }
}

/// A grant holds the role that it names until its transaction ends, and no bound is set to that
/// here.
#[tokio::test]
async fn no_revocation_waits_for_what_another_tenant_has_not_committed() {
    let (world, proxy) = world_and_proxy().await;
    let superuser = world.superuser("postgres").await;
    let told = ["authentication_timeout = '1s'", "log_lock_waits = on", "deadlock_timeout = '5ms'"];
    reconfigure(&world, &told).await;
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    acme.batch_execute("CREATE TABLE hook (n int); BEGIN").await.expect("begun");
    let mut held = Vec::new();
    for _ in 0..4 {
        let (victim, role) = captured(&world, &proxy, "globex").await;
        let grant = format!("GRANT SELECT ON hook TO \"{role}\"");
        acme.batch_execute(&grant).await.expect("granted");
        held.push((victim, role));
    }
    let roles: Vec<_> = held.iter().map(|(_, role)| role.clone()).collect();
    drop(held);
    is_revoked(&world, "tenant-globex-rw").await;
    for role in &roles {
        assert_eq!(may_log_in(&world, role).await, Some(false), "it stays, and may not log in");
    }
    // They are old by and by, and later revocations try them again: without success, and without
    // waiting.
    let (_victim, later) = captured(&world, &proxy, "globex").await;
    let aged = "SELECT count(*) FROM pg_roles WHERE NOT rolcanlogin
        AND rolname = ANY ($1) AND rolvaliduntil < clock_timestamp() - '7 s'::interval";
    eventually("the roles to have been stopped long ago", async || {
        let row = superuser.query_one(aged, &[&roles]).await.expect("asked");
        (row.get::<_, i64>(0) == 4).then_some(())
    })
    .await;
    drop(_victim);
    is_revoked(&world, "tenant-globex-rw").await;
    assert_eq!(may_log_in(&world, &later).await, None);
    let log = std::fs::read_to_string(world.dir().join("postgres.log")).expect("read");
    assert!(!log.contains("still waiting for"), "{log}");

    // Nothing depends on them any more: whichever revocation comes later drops them.
    acme.batch_execute("ROLLBACK").await.expect("over");
    eventually("the roles to be dropped", async || {
        let client = proxy.connect(&mint::token_of(&world, "globex"), "globex").await;
        drop(client.expect("globex"));
        is_revoked(&world, "tenant-globex-rw").await;
        let left = "SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)";
        let left: i64 = superuser.query_one(left, &[&roles]).await.expect("asked").get(0);
        (left == 0).then_some(())
    })
    .await;
}

/// PostgreSQL looks through all that a tenant's roles have to do with, at each login that is
/// leased.
#[tokio::test]
async fn a_role_that_stays_has_no_memberships_and_is_dropped_all_the_same() {
    let (world, proxy) = world_and_proxy().await;
    let role = kept_by_acme(&world, &proxy).await;
    let superuser = world.superuser("postgres").await;
    // What the broker has as its maker, it cannot give up.
    let memberships = "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.rolname = $1
        WHERE m.member = r.oid OR (m.roleid = r.oid AND (m.inherit_option OR m.set_option))";
    let left: i64 = superuser.query_one(memberships, &[&role]).await.expect("asked").get(0);
    assert_eq!((may_log_in(&world, &role).await, left), (Some(false), 0));
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    assert_eq!(may_log_in(&world, &role).await, None);
}

/// Read-only as it is, a session may make large objects, more than the lock table has places.
#[tokio::test]
async fn a_role_that_owns_more_than_the_lock_table_holds_is_dropped_in_portions() {
    let (world, proxy) = with_large_objects().await;
    let claims = json!({ "tenant": "acme", "access": "read-only" });
    let (mut client, role) = captured_with(&world, &proxy, claims, "acme").await;
    let superuser = world.superuser("tenant_globex").await;
    let places = "SELECT 2 * current_setting('max_locks_per_transaction')::int8
        * current_setting('max_connections')::int8";
    let places: i64 = superuser.query_one(places, &[]).await.expect("asked").get(0);
    let make = format!(
        "SET ROLE NONE; SELECT count(lo_create(0))::text FROM generate_series(1, {places})"
    );
    assert_eq!(client.ask(&make).await, places.to_string());
    drop(client);

    // A neighbour takes locks all the while.
    let locks = "SELECT count(*) FROM (SELECT pg_advisory_xact_lock_shared(n)
        FROM generate_series(1, 2000) n) taken";
    let gone = async {
        is_revoked(&world, "tenant-acme-ro").await;
        assert_ne!(may_log_in(&world, &role).await, Some(true));
        is_refused(&world, &role).await;
        let (code, findings) = audit(&world, &["--fix"]).await;
        assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
        assert_eq!(may_log_in(&world, &role).await, None);
    };
    let neighbour = async {
        loop {
            superuser.batch_execute(locks).await.expect("there are places left");
        }
    };
    tokio::select! {
        () = gone => {}
        () = neighbour => {}
    }
    let left = "SELECT count(*) FROM pg_largeobject_metadata";
    let acme = world.superuser("tenant_acme").await;
    assert_eq!(acme.query_one(left, &[]).await.expect("asked").get::<_, i64>(0), 0);
}

/// Only a role with `pg_signal_backend` may end it, and nothing would look for it.
#[tokio::test]
async fn a_session_whose_role_is_gone_is_found_and_ended() {
    let (world, _proxy) = world_and_proxy().await;
    let superuser = world.superuser("postgres").await;
    let made = "CREATE ROLE \"tenant-acme-lost\" LOGIN PASSWORD 'captured';
        GRANT CONNECT ON DATABASE tenant_acme TO \"tenant-acme-lost\"";
    superuser.batch_execute(made).await.expect("made");
    let lost = directly(&world, "tenant-acme-lost", "").await.expect("in");
    let dropped = "REVOKE CONNECT ON DATABASE tenant_acme FROM \"tenant-acme-lost\";
        DROP ROLE \"tenant-acme-lost\";
        REVOKE pg_signal_backend FROM pgsilo_provisioner";
    superuser.batch_execute(dropped).await.expect("dropped");
    lost.batch_execute("SELECT 1").await.expect("it works on");

    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!(code, 3, "{findings:?}");
    assert_eq!(findings[0]["finding"], "roleless_session");
    assert_eq!(findings[0]["database"], "tenant_acme");
    lost.batch_execute("SELECT 1").await.expect("the provisioner may not");
    superuser
        .batch_execute("GRANT pg_signal_backend TO pgsilo_provisioner")
        .await
        .expect("as the recipe has it");
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    lost.batch_execute("SELECT 1").await.expect_err("it is ended");
}

/// The registry, from which an operator has taken globex.
fn without_globex(world: &World) -> PathBuf {
    let registry = std::fs::read_to_string(world.var("PGSILO_REGISTRY")).expect("read");
    let (acme_only, _) = registry.split_once("[[tenant]]\nid = \"globex\"").expect("both");
    let file = world.dir().join("acme.toml");
    std::fs::write(&file, acme_only).expect("written");
    file
}

#[tokio::test]
async fn roles_of_a_removed_tenant_are_dropped_despite_grants() {
    let (world, proxy) = world_and_proxy().await;
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    let (_status, answer) = world.bao("GET", "pgsilo/globex/creds/tenant-globex-rw", None).await;
    let leased = answer["data"]["username"].as_str().expect("a name").to_owned();
    for role in ["tenant_globex_app", "tenant_globex_ro", "tenant_globex_broker", &leased] {
        acme.batch_execute(&format!("GRANT SELECT ON customers TO \"{role}\""))
            .await
            .expect("made");
    }
    // Its operator has dropped the database, and could not drop its roles.
    let superuser = world.superuser("postgres").await;
    superuser.batch_execute("DROP DATABASE tenant_globex WITH (FORCE)").await.expect("dropped");
    superuser.batch_execute("DROP ROLE tenant_globex_app").await.expect_err("acme objects");
    let file = without_globex(&world);
    let registry = file.to_str().expect("UTF-8");

    let (code, findings) = audit(&world, &["--registry", registry]).await;
    assert_eq!((code, &findings[0]["finding"]), (3, &json!("removed_tenant")), "{findings:?}");
    assert_eq!(findings[0]["removed"], "globex");
    let (code, findings) = audit(&world, &["--registry", registry, "--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ 'globex'";
    assert_eq!(superuser.query_one(left, &[]).await.expect("asked").get::<_, i64>(0), 0);
    acme.batch_execute("SELECT * FROM customers").await.expect("acme is served");
}

/// A copy that somebody has restored under another name, and that the tenant's roles own.
#[tokio::test]
async fn data_kept_of_a_removed_tenant_is_not_touched() {
    let (world, _proxy) = world_and_proxy().await;
    let superuser = world.superuser("postgres").await;
    let renamed = "ALTER DATABASE tenant_globex WITH ALLOW_CONNECTIONS false";
    superuser.batch_execute(renamed).await.expect("closed");
    eventually("nobody to be in it", async || {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = 'tenant_globex'";
        superuser.batch_execute(end).await.expect("asked");
        let rename = "ALTER DATABASE tenant_globex RENAME TO globex_archive";
        superuser.batch_execute(rename).await.ok()
    })
    .await;
    for sql in [
        "ALTER DATABASE globex_archive WITH ALLOW_CONNECTIONS true",
        // So that its broker could go.
        "REVOKE ALL ON DATABASE globex_archive FROM tenant_globex_broker",
    ] {
        superuser.batch_execute(sql).await.expect("done");
    }
    let archive = world.superuser("globex_archive").await;
    archive
        .batch_execute("CREATE POLICY kept ON customers TO tenant_globex_app USING (true)")
        .await
        .expect("made");
    let state =
        "SELECT array_agg(c.relname || ' ' || c.relowner::regrole || coalesce(c.relacl::text, '')
            ORDER BY c.oid)::text || (SELECT count(*) FROM pg_policy)
        FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace";
    let state = async || -> String { archive.query_one(state, &[]).await.expect("asked").get(0) };
    let before = state().await;
    let file = without_globex(&world);
    let arguments = ["--registry", file.to_str().expect("UTF-8"), "--fix"];

    let (code, findings) = audit(&world, &arguments).await;
    assert_eq!((code, &findings[0]["finding"]), (1, &json!("removed_tenant")), "{findings:?}");
    let why = findings[0]["outcome"]["failed"].as_str().expect("why");
    assert!(why.contains("globex_archive") && why.contains("REASSIGN OWNED"), "{why}");
    assert_eq!(state().await, before);
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^tenant_globex_'";
    assert_eq!(superuser.query_one(left, &[]).await.expect("asked").get::<_, i64>(0), 4);

    // As it asks for.
    for sql in [
        // Not reassigned: its functions would work as their new owner.
        "DROP SCHEMA pgsilo CASCADE",
        "REASSIGN OWNED BY tenant_globex_app, tenant_globex_ro TO postgres",
        "DROP OWNED BY tenant_globex_login",
        "DROP OWNED BY tenant_globex_ro",
        "DROP OWNED BY tenant_globex_app",
    ] {
        archive.batch_execute(sql).await.expect("the superuser's");
    }
    let (code, findings) = audit(&world, &arguments).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    assert_eq!(superuser.query_one(left, &[]).await.expect("asked").get::<_, i64>(0), 0);
    archive.batch_execute("SELECT * FROM customers").await.expect("it is kept");
}

/// Hundreds of them, each named by hundreds of grants; and by what others make for it.
#[tokio::test]
async fn an_attack_with_grants_is_cleared_away_at_once() {
    let (world, proxy) = world_and_proxy().await;
    let superuser = world.superuser("tenant_acme").await;
    let foreign =
        "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER far FOREIGN DATA WRAPPER nothing;
        GRANT USAGE ON FOREIGN DATA WRAPPER nothing TO tenant_acme_app;
        ALTER SERVER far OWNER TO tenant_acme_app";
    superuser.batch_execute(foreign).await.expect("made");
    let acme = proxy.connect(&mint::token_of(&world, "acme"), "acme").await.expect("acme");
    acme.batch_execute("CREATE TABLE hook (n int); CREATE TABLE line (n int)").await.expect("made");
    let lease = async || {
        let (status, answer) = world.bao("GET", "pgsilo/globex/creds/tenant-globex-rw", None).await;
        assert_eq!(status, 200, "{answer}");
        let role = answer["data"]["username"].as_str().expect("a role").to_owned();
        let attack = format!("GRANT SELECT ON hook, line TO \"{role}\"");
        acme.batch_execute(&attack).await.expect("granted");
        let body = json!({ "lease_id": answer["lease_id"], "sync": true });
        assert_eq!(world.bao("PUT", "sys/leases/revoke", Some(body)).await.0, 204);
        role
    };
    let mut roles = Vec::new();
    for _ in 0..40 {
        roles.push(lease().await);
    }
    // It belongs to the role that it is for.
    let mapping = format!("CREATE USER MAPPING FOR \"{}\" SERVER far", roles[0]);
    acme.batch_execute(&mapping).await.expect("made");
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, findings.len()), (0, roles.len()), "{findings:?}");
    assert!(findings.iter().all(|one| one["outcome"] == "mended"), "{findings:?}");
    for role in &roles {
        assert_eq!(may_log_in(&world, role).await, None);
    }
}

#[tokio::test]
async fn one_audit_at_a_time_mends_a_cluster() {
    let (world, proxy) = world_and_proxy().await;
    let role = kept_by_acme(&world, &proxy).await;
    // As another one holds it.
    let other = world.superuser("postgres").await;
    let claim = i64::from_be_bytes(*b"pgsilo-a");
    other.query_one("SELECT pg_advisory_lock($1)", &[&claim]).await.expect("claimed");
    assert_eq!(audit(&world, &["--fix"]).await, (1, vec![]));
    assert_eq!(may_log_in(&world, &role).await, Some(false));
    drop(other);
    eventually("the other one to have ended", async || {
        let (code, findings) = audit(&world, &["--fix"]).await;
        (code == 0).then(|| assert_eq!(findings[0]["outcome"], "mended"))
    })
    .await;
}

/// As an operator starts it, and as the recipe of `pg_hba.conf` has it.
#[tokio::test]
async fn a_captured_credential_opens_nothing_where_pgsilo_is_not() {
    let world = World::own_with(&["--without-proxy"]).await;
    let proxy = Proxy::of(&world, settings_of(&world)).await;
    let (mut client, role) = captured(&world, &proxy, "acme").await;
    let error = directly(&world, &role, "").await.map(drop).expect_err("not from here");
    assert_eq!(error.code().map(|code| code.code()), Some("28000"), "{error:?}");
    let said = error.as_db_error().expect("the server's answer").message();
    assert!(said.contains("pg_hba.conf rejects connection"), "{said}");
    assert_eq!(client.ask("SELECT 'served'").await, "served");
    let (code, findings) = audit(&world, &[]).await;
    assert_eq!((code, findings), (0, vec![]), "the audit finds its way, too");
}
