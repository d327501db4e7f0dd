//! What is the whole cluster's, and how much of it one tenant can take.

use futures_util::future::join_all;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};

use crate::orphans::settings_of;
use crate::pool::{Parameters, log_in};

/// Functions that a session may call, of those that need a grant.
async fn callable(client: &Client) -> Vec<String> {
    let functions = "SELECT proname::text FROM pg_catalog.pg_proc
        WHERE pronamespace = 'pg_catalog'::regnamespace
          AND (proname LIKE '%advisory%lock%' OR proname LIKE 'lo\\_%' OR proname LIKE '%logical_emit%')
          AND has_function_privilege(oid, 'EXECUTE') ORDER BY 1";
    let rows = client.query(functions, &[]).await.expect("asked");
    rows.into_iter().map(|row| row.get(0)).collect()
}

/// The sandbox of these tests allows advisory locks; read-only sessions have none all the same.
#[tokio::test]
async fn a_session_cannot_use_up_what_is_the_clusters_unless_it_is_allowed_to() {
    let proxy = Proxy::start().await;
    let token = mint::token_with("acme", json!({ "access": "read-only" }));
    let reader = proxy.connect(&token, "acme").await.expect("connected");
    let writer = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    let refused = [
        "SELECT lo_create(0)",
        "SELECT lo_creat(-1)",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))",
    ];
    let locks = [
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_lock_shared(1, 2)",
        "SELECT pg_try_advisory_xact_lock(1)",
    ];
    for (client, sqls) in [(&reader, &refused[..]), (&reader, &locks), (&writer, &refused)] {
        for sql in sqls {
            let error = client.batch_execute(sql).await.expect_err(sql);
            assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{sql}");
        }
    }
    for sql in locks {
        writer.batch_execute(sql).await.expect(sql);
    }
    // Whatever else there is of the kind, in this PostgreSQL: what lets go, or works on what is
    // there.
    let harmless = |name: &String| {
        name.contains("unlock") || (name.starts_with("lo_") && !name.starts_with("lo_creat"))
    };
    let left = callable(&reader).await;
    assert!(left.iter().all(harmless), "{left:?}");
    let given = callable(&writer).await;
    assert!(given.iter().all(|name| harmless(name) || name.contains("advisory")), "{given:?}");
    for allowed in ["pg_advisory_lock", "pg_try_advisory_xact_lock_shared"] {
        assert!(given.iter().any(|name| name == allowed), "{given:?}");
    }
}

/// Leases from OpenBAO, and logs in past any proxy's bounds until logins fail: the
/// connections, the lease, and what was said at last.
async fn fill(world: &World, tenant: &str) -> (Vec<Client>, String, String) {
    let (status, answer) =
        world.bao("GET", &format!("pgsilo/{tenant}/creds/tenant-{tenant}-rw"), None).await;
    assert_eq!(status, 200, "{answer}");
    let text = |field: &str| answer["data"][field].as_str().expect("a text");
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.var("PG_PORT").parse().expect("a port"));
    config.user(text("username")).password(text("password")).dbname(format!("tenant_{tenant}"));
    let lease = answer["lease_id"].as_str().expect("an id").to_owned();
    let mut clients = Vec::new();
    loop {
        match config.connect(NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                clients.push(client);
            }
            Err(error) => {
                assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS), "{error:?}");
                let said = error.as_db_error().expect("an error of the server").message();
                return (clients, lease, said.to_owned());
            }
        }
    }
}

/// However full a cluster is, a tenant has no more than its share, and leases are made and revoked.
#[tokio::test]
async fn a_tenant_has_its_share_of_the_connections_and_leases_come_and_go_in_a_full_cluster() {
    let arguments = ["--without-proxy", "--max-connections", "40", "--leased-over-tcp"];
    let world = tokio::task::spawn_blocking(move || World::start("full", &arguments));
    let world = world.await.expect("started");
    let (acme, _lease, said) = fill(&world, "acme").await;
    assert_eq!(said, "too many connections for database \"tenant_acme\"");
    let (globex, lease, said) = fill(&world, "globex").await;
    assert!(said.contains("reserved for roles with privileges"), "{said}");
    assert!(!acme.is_empty() && !globex.is_empty());
    // OpenBAO keeps its connections: without them it has to get in as well.
    let superuser = world.superuser("postgres").await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE usename = 'tenant_globex_broker'";
    superuser.query_one(end, &[]).await.expect("ended");
    eventually("a credential", async || {
        // The first request may find the connection that has just gone.
        (world.bao("GET", "pgsilo/globex/creds/tenant-globex-ro", None).await.0 == 200)
            .then_some(())
    })
    .await;
    let body = json!({ "lease_id": lease, "sync": true });
    let (status, answer) = world.bao("PUT", "sys/leases/revoke", Some(body)).await;
    assert!((200..300).contains(&status), "{answer}");
    eventually("its sessions to be over", async || {
        globex.iter().all(Client::is_closed).then_some(())
    })
    .await;
    assert!(acme.iter().all(|client| !client.is_closed()), "the neighbour's go on");
}

const OF_ACME: Parameters<'_> = &[("user", "app"), ("database", "acme")];
const OTHERWISE: Parameters<'_> =
    &[("user", "app"), ("database", "acme"), ("application_name", "another")];
const OF_GLOBEX: Parameters<'_> = &[("user", "app"), ("database", "globex")];

/// Prewarms one connection for acme's next session; its process.
async fn prewarmed_for_acme(world: &World, proxy: &Proxy) -> i64 {
    for _ in 0..2 {
        let _client = log_in(proxy, &mint::token_of(world, "acme"), OF_ACME).await;
    }
    proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
    proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
    let is_prewarmed = |line: &serde_json::Value| line["message"] == "connection prewarmed";
    proxy.logged(is_prewarmed).await["pid"].as_i64().expect("a process")
}

async fn connections(superuser: &Client, filter: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE {filter}");
    superuser.query_one(&sql, &[]).await.expect("counted").get(0)
}

fn one_idle() -> Settings {
    let pool = "max_idle_per_tenant = 1\nidle_timeout = \"60s\"\n".to_owned();
    Settings { pool, ..Settings::default() }
}

/// The next session is served, for which the idle connection is evicted, and no other is prewarmed
/// at once.
async fn served_after_eviction(proxy: &Proxy, token: &str, parameters: Parameters<'_>) {
    let (mut client, _) = log_in(proxy, token, parameters).await;
    assert_eq!(client.ask("SELECT 'served'").await, "served");
    assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"backend_full\"}").await, 1.0);
    assert_eq!(proxy.events("refused").len(), 0);
}

#[tokio::test]
async fn an_idle_connection_is_evicted_for_a_session_that_finds_its_database_full() {
    let world = World::own().await;
    let proxy = Proxy::of(&world, Settings { openbao: settings_of(&world).openbao, ..one_idle() });
    let proxy = proxy.await;
    prewarmed_for_acme(&world, &proxy).await;
    let superuser = world.superuser("postgres").await;
    let of_acme = "datname = 'tenant_acme'";
    // Those of the sessions before are gone, the broker's and the one that waits are there.
    let places = eventually("two connections", async || {
        let usual = connections(&superuser, of_acme).await;
        let leased = connections(&superuser, "usename LIKE 'tenant-acme-rw-%'").await;
        (leased == 1).then_some(usual)
    })
    .await;
    let limit = format!("ALTER DATABASE tenant_acme CONNECTION LIMIT {places}");
    superuser.batch_execute(&limit).await.expect("limited");
    let token = mint::token_of(&world, "acme");
    served_after_eviction(&proxy, &token, OTHERWISE).await;

    // With nothing more to give up it is said, and a crowd asks OpenBAO for a few credentials only.
    let full = format!("ALTER DATABASE tenant_acme CONNECTION LIMIT {}", places - 1);
    proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
    eventually("the session to be gone", async || {
        (connections(&superuser, "usename LIKE 'tenant-acme-rw-%'").await == 0).then_some(())
    })
    .await;
    superuser.batch_execute(&full).await.expect("limited");
    let leases = proxy.metric("pgsilo_leases_total").await;
    for error in join_all((0..30).map(|_| proxy.connect(&token, "acme"))).await {
        let error = error.expect_err("full");
        assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS), "{error:?}");
    }
    let events = eventually("every event", async || {
        Some(proxy.events("refused")).filter(|events| events.len() == 30)
    })
    .await;
    assert!(events.iter().all(|event| event["reason"] == "backend_full"), "{events:#?}");
    for _ in 0..5 {
        let error = proxy.connect(&token, "acme").await.expect_err("full");
        assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS), "{error:?}");
    }
    let events = eventually("every event", async || {
        Some(proxy.events("refused")).filter(|events| events.len() == 35)
    })
    .await;
    let unasked = events.iter().filter(|event| {
        event["cause"].as_str().is_some_and(|cause| cause.contains("a moment ago"))
    });
    let (unasked, asked) =
        (unasked.count() as f64, proxy.metric("pgsilo_leases_total").await - leases);
    assert!(unasked > 0.0 && asked + unasked <= 35.0, "{asked} leases, {unasked} without");
    superuser.batch_execute("ALTER DATABASE tenant_acme CONNECTION LIMIT -1").await.expect("free");
    eventually("a session to be served", async || proxy.connect(&token, "acme").await.ok()).await;
}

#[tokio::test]
async fn an_idle_connection_of_another_tenant_is_evicted_on_a_full_server() {
    let arguments = ["--without-proxy", "--max-connections", "40", "--leased-over-tcp"];
    let world = tokio::task::spawn_blocking(move || World::start("room", &arguments));
    let world = world.await.expect("started");
    let proxy = Proxy::of(&world, Settings { openbao: settings_of(&world).openbao, ..one_idle() });
    let proxy = proxy.await;
    let waiting = prewarmed_for_acme(&world, &proxy).await;
    let superuser = world.superuser("postgres").await;
    // For a tenant at its own limit no other tenant's is evicted.
    let limit = "ALTER DATABASE tenant_globex CONNECTION LIMIT 0";
    superuser.batch_execute(limit).await.expect("limited");
    let globex = mint::token_of(&world, "globex");
    let error = proxy.connect(&globex, "globex").await.expect_err("its own limit");
    assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS), "{error:?}");
    assert_eq!(connections(&superuser, &format!("pid = {waiting}")).await, 1);
    let limit = "ALTER DATABASE tenant_globex CONNECTION LIMIT -1";
    superuser.batch_execute(limit).await.expect("unlimited");
    eventually("globex to be served", async || proxy.connect(&globex, "globex").await.ok()).await;

    let (_clients, _lease, said) = fill(&world, "globex").await;
    assert!(said.contains("reserved for roles with privileges"), "{said}");
    let (mut client, _) = log_in(&proxy, &globex, OF_GLOBEX).await;
    assert_eq!(client.ask("SELECT 'served'").await, "served");
    assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"backend_full\"}").await, 1.0);
    assert_eq!(connections(&superuser, &format!("pid = {waiting}")).await, 0);
}
