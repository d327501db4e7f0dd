//! A proxy that reads its tenants from the registry's database.

use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query, startup};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};
use tokio_postgres::Config;

use super::{Database, said};

/// A registry that says what the sandbox's file says.
pub(crate) async fn filled() -> Database {
    let database = Database::with_registry().await;
    let file = world().dir().join("tenants.toml");
    let file = file.to_str().expect("a path");
    let applied = database.apply(&["--file", file]).await;
    assert!(applied.status.success(), "{}", said(&applied));
    database
}

impl Database {
    /// Where it is, as `[registry.postgres]` has it; the login is left out.
    pub(super) fn place(&self) -> String {
        let dsn: Config = world().var("PROVISIONER_DSN").parse().expect("a DSN");
        let tokio_postgres::config::Host::Tcp(host) = &dsn.get_hosts()[0] else { panic!("by TCP") };
        format!(
            "[registry.postgres]\nendpoints = [\"{host}:{}\"]\ndbname = \"{}\"\nname = \"gateway-1\"\n\
             tls = {{ mode = \"disable\" }}\n",
            dsn.get_ports()[0],
            self.name
        )
    }

    /// A login that OpenBAO makes, for so long.
    pub(crate) async fn leased(&self, ttl: &str) -> String {
        let dsn: Config = world().var("PROVISIONER_DSN").parse().expect("a DSN");
        let password = std::str::from_utf8(dsn.get_password().expect("a password")).expect("text");
        let mount = json!({ "type": "database" });
        // Once for all tests.
        let (status, _) = world().bao("POST", "sys/mounts/pgsilo-registry", Some(mount)).await;
        assert!(matches!(status, 204 | 400), "{status}");
        let tokio_postgres::config::Host::Tcp(host) = &dsn.get_hosts()[0] else { panic!("by TCP") };
        let port = dsn.get_ports()[0];
        let connection = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": format!(
                "postgresql://{{{{username}}}}:{{{{password}}}}@{host}:{port}/{}?sslmode=disable", self.name
            ),
            "username": dsn.get_user().expect("a user"),
            "password": password,
            "password_authentication": "scram-sha-256",
            "allowed_roles": "*",
        });
        let role = json!({
            "db_name": self.name,
            "creation_statements": [
                "CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE pgsilo_registry_proxy"
            ],
            // What it owns, a large object, goes with it.
            "revocation_statements": [
                "ALTER ROLE \"{{name}}\" NOLOGIN",
                "GRANT \"{{name}}\" TO CURRENT_USER",
                "DROP OWNED BY \"{{name}}\"",
                "DROP ROLE \"{{name}}\"",
            ],
            "default_ttl": ttl,
            "max_ttl": ttl,
        });
        for (path, body) in [("config", connection), ("roles/proxy-", role)] {
            let path = match path {
                "config" => format!("pgsilo-registry/config/{}", self.name),
                roles => format!("pgsilo-registry/{roles}{}", self.name),
            };
            let (status, answer) = world().bao("POST", &path, Some(body)).await;
            assert!((200..300).contains(&status), "{answer}");
        }
        format!(
            "{}lease = {{ mount = \"pgsilo-registry\", role = \"proxy-{}\" }}\n",
            self.place(),
            self.name
        )
    }

    pub(super) async fn serve(&self) -> Proxy {
        let registry = self.leased("1h").await;
        Proxy::with(Settings { registry, ..Settings::default() }).await
    }

    /// Writes, and returns the revision.
    async fn write(&self, sql: &str) -> f64 {
        self.control().await.batch_execute(sql).await.expect("written");
        self.status().await["revision"].as_f64().expect("a number")
    }
}

pub(super) const REVISION: &str = "pgsilo_registry_revision";
const COMPARED: &str = "pgsilo_registry_comparisons_total{result=\"ok\"}";

#[tokio::test]
async fn tenants_of_the_database_are_served_and_follow_its_changes() {
    let database = filled().await;
    let proxy = database.serve().await;
    let mut acme = Raw::unix(&proxy.socket()).await;
    acme.log_in(&mint::token("acme"), "acme").await;
    let mut globex = Raw::unix(&proxy.socket()).await;
    globex.log_in(&mint::token("globex"), "globex").await;
    assert_eq!(acme.ask("SELECT current_database()").await, "tenant_acme");

    let revision =
        database.write("UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'").await;
    assert_eq!(acme.fatal().await.sqlstate(), "57P01");
    let refused = proxy.connect(&mint::token("acme"), "acme").await.expect_err("suspended");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
    assert_eq!(proxy.metric(REVISION).await, revision);
    assert_eq!(globex.ask("SELECT 'undisturbed'").await, "undisturbed");
    eventually("it to say how far it has read", async || {
        let status = database.status().await;
        let one = &status["proxies"][0];
        let said = (one["name"].as_str(), one["revision"].as_f64());
        (said == (Some("gateway-1"), Some(revision))).then_some(())
    })
    .await;

    let revision =
        database.write("UPDATE pgsilo.tenants SET state = 'active' WHERE id = 'acme'").await;
    proxy.metric_reaches(REVISION, revision).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");

    // Its cluster goes and comes again, as it was.
    let again = "BEGIN; SET CONSTRAINTS ALL DEFERRED;
        CREATE TEMP TABLE gone AS SELECT name, region, endpoints, tls, auth FROM pgsilo.clusters;
        DELETE FROM pgsilo.clusters;
        INSERT INTO pgsilo.clusters (name, region, endpoints, tls, auth) SELECT * FROM gone; COMMIT";
    let superuser = world().superuser(&database.name).await;
    superuser.batch_execute(again).await.expect("written");
    let revision = database.status().await["revision"].as_f64().expect("a number");
    proxy.metric_reaches(REVISION, revision).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");

    // Its whole cluster is somewhere else now.
    let port = "UPDATE pgsilo.clusters SET endpoints = '{127.0.0.1:1}'";
    let revision = database.write(port).await;
    proxy.metric_reaches(REVISION, revision).await;
    let refused = proxy.connect(&mint::token("globex"), "globex").await.expect_err("nothing there");
    assert_eq!(refused.code().map(|code| code.code()), Some("08001"));
}

/// The database says whose it is, so a mistake in the registry leads nowhere.
#[tokio::test]
async fn two_placements_that_are_swapped_lead_no_session_to_the_other() {
    let database = filled().await;
    let proxy = database.serve().await;
    let swap = "UPDATE pgsilo.placements SET dbname = CASE tenant WHEN 'acme' THEN 'tenant_globex' ELSE 'tenant_acme' END
        WHERE tenant IN ('acme', 'globex')";
    let revision = database.write(swap).await;
    proxy.metric_reaches(REVISION, revision).await;
    for tenant in ["acme", "globex"] {
        let refused = proxy.connect(&mint::token(tenant), tenant).await.expect_err("refused");
        assert!(refused.code().is_some(), "{refused:?}");
    }
    for event in proxy.events_reach("refused", 2).await {
        assert!(
            ["backend_rejected", "seal_broken"].contains(&event["reason"].as_str().expect("one")),
            "{event}"
        );
    }
    assert!(proxy.events("started").is_empty());
}

#[tokio::test]
async fn a_connection_that_is_cut_misses_nothing() {
    let database = filled().await;
    let proxy = database.serve().await;
    let superuser = world().superuser("postgres").await;
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = $1 AND application_name LIKE 'pgsilo gateway-1 @%'";
    for number in 0..20 {
        let cut: i64 = superuser.query_one(cut, &[&database.name]).await.expect("cut").get(0);
        let state = if number % 2 == 0 { "paused" } else { "active" };
        let change = format!("UPDATE pgsilo.tenants SET state = '{state}' WHERE id = 'acme'");
        let revision = database.write(&change).await;
        proxy.metric_reaches(REVISION, revision).await;
        assert!(cut <= 1, "one connection");
    }
    proxy.metric_reaches("pgsilo_registry_stale_seconds", 0.0).await;
    // It agrees with the database, each time: after each new connection, and when it is asked to look.
    let compared = proxy.metric(COMPARED).await;
    assert!(compared > 0.0);
    proxy.signal(rustix::process::Signal::HUP);
    proxy.metric_reaches(COMPARED, compared + 1.0).await;
    assert_eq!(proxy.metric("pgsilo_registry_comparisons_total{result=\"error\"}").await, 0.0);
}

/// Somebody's hand, which no trigger has seen.
#[tokio::test]
async fn what_is_not_what_was_read_is_found_and_read_again() {
    let database = filled().await;
    let proxy = database.serve().await;
    let owner = database.as_role("pgsilo_registry_owner").await;
    let forge = "BEGIN; ALTER TABLE pgsilo.tenants DISABLE TRIGGER USER;
        UPDATE pgsilo.tenants SET state = 'suspended', revision = revision - 1 WHERE id = 'acme';
        ALTER TABLE pgsilo.tenants ENABLE TRIGGER USER; COMMIT";
    owner.batch_execute(forge).await.expect("forged");
    proxy.connect(&mint::token("acme"), "acme").await.expect("it does not know");
    proxy.signal(rustix::process::Signal::HUP);
    proxy.metric_reaches("pgsilo_registry_comparisons_total{result=\"error\"}", 1.0).await;
    proxy.logged(|line| line["message"] == "the registry in force was not its database's").await;
    eventually("it to be read again", async || {
        let refused = proxy.connect(&mint::token("acme"), "acme").await.err()?;
        refused.code().filter(|code| code.code() == "42501").map(drop)
    })
    .await;
}

/// The first server takes connections and says nothing.
#[tokio::test]
async fn a_server_that_is_silent_costs_its_time_and_no_more() {
    let database = filled().await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = silent.local_addr().expect("bound").port();
    let registry = database.leased("1h").await;
    let both = format!("endpoints = [\"127.0.0.1:{port}\", ");
    let registry = registry.replacen("endpoints = [", &both, 1);
    let proxy = Proxy::with(Settings { registry, ..Settings::default() }).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served from the second");
}

/// A connection that is open and silent is no answer.
#[tokio::test]
async fn a_registry_that_does_not_answer_is_noticed_and_asked_on_another_connection() {
    let database = filled().await;
    let proxy = database.serve().await;
    let superuser = world().superuser("postgres").await;
    let process = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name LIKE 'pgsilo gateway-1 @%'";
    let process: i32 = superuser.query_one(process, &[&database.name]).await.expect("asked").get(0);
    let process = rustix::process::Pid::from_raw(process).expect("a pid");
    rustix::process::kill_process(process, rustix::process::Signal::STOP).expect("stopped");
    let revision =
        database.write("UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'").await;
    proxy.logged(|line| line["error"].as_str().is_some_and(|why| why.contains("no answer"))).await;
    proxy.metric_reaches(REVISION, revision).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect_err("suspended");
    rustix::process::kill_process(process, rustix::process::Signal::CONT).expect("it goes on");
}

#[tokio::test]
async fn a_login_that_ends_is_followed_by_another_before() {
    let database = filled().await;
    let registry = database.leased("6s").await;
    let proxy = Proxy::with(Settings { registry, ..Settings::default() }).await;
    let roles = "SELECT usename::text FROM pg_stat_activity WHERE usename IS NOT NULL AND datname = $1 AND application_name LIKE 'pgsilo gateway-1 @%'";
    let superuser = world().superuser("postgres").await;
    let role = async || {
        let rows = superuser.query(roles, &[&database.name]).await.expect("asked");
        rows.first().map(|row| row.get::<_, String>(0))
    };
    let first = role().await.expect("connected");
    eventually("another login", async || role().await.filter(|now| *now != first)).await;
    eventually("the first to be gone", async || {
        let there = superuser.query("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&first]).await;
        there.expect("asked").is_empty().then_some(())
    })
    .await;
    let failed = |line: &Value| {
        line["message"] == "the registry cannot be read; what was read stays in force"
    };
    assert!(!proxy.lines().iter().any(failed), "it was never without one");
}

/// What is not known is not denied: nobody is told that there is no such tenant.
#[tokio::test]
async fn without_its_registry_a_proxy_serves_nobody_and_says_so() {
    let database = Database::create().await;
    let registry = database.leased("1h").await;
    let proxy = Proxy::unready(Settings { registry, ..Settings::default() }).await;
    let refused = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    assert_eq!(refused.code().map(|code| code.code()), Some("57P03"));
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "registry_stale");
    eventually("it to say so", async || {
        (proxy.get("/readyz").await == (503, "the registry is stale\n".to_owned())).then_some(())
    })
    .await;
    let why = |line: &Value| {
        line["error"].as_str().is_some_and(|why| why.contains("pgsiloctl registry init"))
    };
    proxy.logged(why).await;
}

/// What was read serves on, for as long as it may.
#[tokio::test]
async fn a_registry_that_is_away_serves_for_max_staleness_and_no_longer() {
    let database = filled().await;
    let registry = format!("max_staleness = \"2s\"\n{}", database.leased("1h").await);
    let proxy = Proxy::with(Settings { registry, ..Settings::default() }).await;
    let superuser = world().superuser("postgres").await;
    let close = format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", database.name);
    superuser.batch_execute(&close).await.expect("closed");
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    superuser.execute(cut, &[&database.name]).await.expect("cut");
    let began = Instant::now();
    if let Ok(client) = proxy.connect(&mint::token("acme"), "acme").await {
        client.simple_query("SELECT 1").await.expect("served");
    } else {
        assert!(began.elapsed() > Duration::from_secs(1), "only once that is over");
    }
    let mut session = None;
    eventually("the registry to be too old", async || {
        match proxy.connect(&mint::token("acme"), "acme").await {
            Ok(client) => {
                session = Some(client);
                None
            }
            Err(error) => (error.code().map(|code| code.code()) == Some("57P03")).then_some(()),
        }
    })
    .await;
    let open = format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", database.name);
    superuser.batch_execute(&open).await.expect("opened");
    eventually("it to be read again", async || {
        proxy.connect(&mint::token("acme"), "acme").await.ok().map(drop)
    })
    .await;
    if let Some(session) = session {
        session.simple_query("SELECT 1").await.expect("sessions of before live on");
    }
}

/// Who is locked out meanwhile would not be told of it.
#[tokio::test]
pub(crate) async fn sessions_end_with_a_registry_that_is_too_old_where_that_is_asked_for() {
    let database = filled().await;
    let registry = database.leased("1h").await;
    let registry = format!("max_staleness = \"1s\"\nstale_sessions = \"end\"\n{registry}");
    let proxy = Proxy::with(Settings { registry, ..Settings::default() }).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let superuser = world().superuser("postgres").await;
    let allow = async |may: bool| {
        let allow = format!("ALTER DATABASE {} ALLOW_CONNECTIONS {may}", database.name);
        superuser.batch_execute(&allow).await.expect("set");
    };
    allow(false).await;
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    superuser.execute(cut, &[&database.name]).await.expect("cut");
    assert_eq!(client.fatal().await.sqlstate(), "57P01");
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "registry_stale");
    allow(true).await;
    eventually("it to be read again", async || {
        proxy.connect(&mint::token("acme"), "acme").await.ok().map(drop)
    })
    .await;
}

/// One tenant's entry that cannot be is no other tenant's trouble.
#[tokio::test]
async fn an_entry_that_cannot_be_is_not_served_and_told_once() {
    let database = filled().await;
    let proxy = database.serve().await;
    let mut globex = Raw::unix(&proxy.socket()).await;
    globex.log_in(&mint::token("globex"), "globex").await;
    let wrong =
        "UPDATE pgsilo.placements SET roles = '{\"read-write\": \"../sys\"}' WHERE tenant = 'acme'";
    let revision = database.write(wrong).await;
    proxy.metric_reaches(REVISION, revision).await;
    proxy.metric_reaches("pgsilo_registry_rejected", 1.0).await;
    let refused = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    assert_eq!(refused.code().map(|code| code.code()), Some("3D000"));
    globex.send(&query("SELECT 1")).await;
    globex.until(b'Z').await;
    // Another change does not have it told again.
    let revision =
        database.write("UPDATE pgsilo.tenants SET name = 'Globex' WHERE id = 'globex'").await;
    proxy.metric_reaches(REVISION, revision).await;
    let told = |line: &&Value| line["id"] == "acme" && line["level"] == "ERROR";
    assert_eq!(proxy.lines().iter().filter(told).count(), 1);
    let mend = "UPDATE pgsilo.placements SET roles = '{\"read-write\": \"tenant-acme-rw\"}' WHERE tenant = 'acme'";
    let revision = database.write(mend).await;
    proxy.metric_reaches(REVISION, revision).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served again");
}

/// A proxy whose registry has a lock, and a message with it.
pub(crate) async fn with_lock(kind: &str, target: &str, message: &str) -> (Proxy, Database) {
    let database = filled().await;
    let proxy = database.serve().await;
    let locked = database.lock(&["add", kind, target, "--message", message]).await;
    assert!(locked.status.success(), "{}", said(&locked));
    (proxy, database)
}

#[tokio::test]
pub(crate) async fn a_lock_ends_what_it_names_and_lets_nobody_past() {
    let database = filled().await;
    let proxy = database.serve().await;
    let token = |tenant: &str, subject: &str, id: &str| {
        mint::token_with(tenant, json!({ "sub": subject, "jti": id }))
    };
    let ann = token("acme", "ann", "t1");
    for (kind, target, more) in [
        ("tenant", "acme", &[][..]),
        ("subject", "ann", &[]),
        ("subject", "ann", &["--issuer", "https://issuer.sandbox.invalid"]),
        ("token", "t1", &["--ttl", "1h"]),
        ("address", "127.0.0.0/8", &[]),
        ("subject", "ann", &["--issued-before-now"]),
    ] {
        // By TCP: what comes by the socket has no address.
        let over_tcp = proxy.tls_dsn(&ann, "acme");
        let mut locked_out = Raw::tls(proxy.address()).await;
        locked_out.log_in(&ann, "acme").await;
        let mut other = Raw::unix(&proxy.socket()).await;
        other.log_in(&token("globex", "bob", "t2"), "globex").await;

        let added = database.lock(&[&["add", kind, target, "--actor", "eve"], more].concat()).await;
        let (id, told) = (String::from_utf8_lossy(&added.stdout).into_owned(), said(&added));
        assert!(added.status.success() && told.contains("in force at the one proxy"), "{told}");
        let error = locked_out.fatal().await;
        assert_eq!(error.sqlstate(), "57P01", "{kind}");
        assert_eq!(
            error.field(b'M').as_deref(),
            Some("terminating connection because access is locked")
        );
        assert_eq!(other.ask("SELECT 'undisturbed'").await, "undisturbed", "{kind}");
        let mut again = Raw::tls(proxy.address()).await;
        again.send(&startup(&[("user", "app"), ("database", "acme")])).await;
        again.send_password(&ann).await;
        let error = again.fatal().await;
        assert_eq!(error.sqlstate(), "42501", "{kind} {over_tcp}");
        let event = proxy.event("refused", |event| event["reason"] == "access_locked").await;
        let id = id.split(' ').next().expect("an id").to_owned();
        assert!(
            event["cause"].as_str().expect("a cause").contains("the registry's lock"),
            "{event}"
        );

        let list = database.lock(&["list", "--json"]).await;
        let list: Value = serde_json::from_slice(&list.stdout).expect("one lock");
        assert_eq!((list["id"].as_str(), list["locked_by"].as_str()), (Some(&*id), Some("eve")));
        let removed = database.lock(&["remove", &id]).await;
        assert!(removed.status.success(), "{}", said(&removed));
        let mut again = Raw::tls(proxy.address()).await;
        again.log_in(&ann, "acme").await;
    }
    let unknown = database.lock(&["remove", "none"]).await;
    assert!(said(&unknown).contains("there is no lock \"none\""), "{}", said(&unknown));
    let wrong = database.lock(&["add", "address", "here"]).await;
    assert!(said(&wrong).contains("locking address \"here\""), "{}", said(&wrong));
}

/// Under load, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspension_ends_eighty_sessions_and_wakes_no_other() {
    let database = filled().await;
    let proxy = database.serve().await;
    let (acme, globex) = (mint::token("acme"), mint::token("globex"));
    let mut busy = Vec::new();
    for _ in 0..60 {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(&acme, "acme").await;
        busy.push(tokio::spawn(async move {
            loop {
                client.send_anyway(&query("SELECT 1")).await;
                loop {
                    match client.next().await {
                        None => return "closed without a word".to_owned(),
                        Some(message) if message.tag == b'E' => return message.sqlstate(),
                        Some(message) if message.tag == b'Z' => break,
                        Some(_) => {}
                    }
                }
            }
        }));
    }
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(&acme, "acme").await;
        idle.push(client);
    }
    let other = proxy.connect(&globex, "globex").await.expect("connected");
    let (over, mut is_over) = tokio::sync::oneshot::channel::<()>();
    let others = tokio::spawn(async move {
        let mut transactions = 0;
        while is_over.try_recv().is_err() {
            other.batch_execute("BEGIN; SELECT 1; COMMIT").await.expect("no transaction is lost");
            transactions += 1;
        }
        // Its session ends when this is over.
        (transactions, other)
    });
    database.write("UPDATE pgsilo.tenants SET state = 'suspended' WHERE id = 'acme'").await;
    for session in busy {
        assert_eq!(session.await.expect("it ends"), "57P01");
    }
    for mut session in idle {
        assert_eq!(session.fatal().await.sqlstate(), "57P01");
    }
    let refused = proxy.connect(&acme, "acme").await.expect_err("suspended");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
    over.send(()).expect("they go on");
    let (transactions, _other) = others.await.expect("no transaction is lost");
    assert!(transactions > 0);
    let ended = proxy.events_reach("ended", 80).await;
    assert!(ended.iter().all(|event| event["tenant"] == "acme"), "{ended:?}");
}
