//! What OpenBAO meets at a tenant's database when it makes a credential there: what will pass is
//! told from what an operator must mend, on a real OpenBAO and a real PostgreSQL, with pgsilo's
//! authority and with the session's. What OpenBAO's words are is in `crates/openbao/src/fault.rs`.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::openbao::session_authority;
use crate::orphans::settings_of;

/// A sandbox of its own, and a pgsilo of each authority in front of it.
struct Fixture {
    world: World,
    proxies: [(Proxy, String); 2],
    superuser: tokio_postgres::Client,
}

const ROLE: &str = "pgsilo/acme/roles/tenant-acme-rw";
const CONNECTION: &str = "pgsilo/acme/config/tenant-acme";

impl Fixture {
    async fn new() -> Fixture {
        let world = World::own().await;
        let own = Proxy::of(&world, settings_of(&world)).await;
        let openbao = format!("address = \"{}\"\n", world.var("BAO_ADDR"));
        let sessions = Proxy::of(&world, Settings { openbao, ..session_authority() }).await;
        let subject = json!({ "sub": "alice@acme", "tenant": "acme", "access": "read-write" });
        let token = mint::signed_by(&world, subject);
        let superuser = world.superuser("postgres").await;
        let proxies = [(own, mint::token_of(&world, "acme")), (sessions, token)];
        Fixture { world, proxies, superuser }
    }

    /// OpenBAO keeps connections; what has changed meets new ones.
    async fn sql(&self, sql: &str) {
        self.superuser.batch_execute(sql).await.expect(sql);
        let gone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'tenant_acme_broker%'";
        self.superuser.batch_execute(gone).await.expect("terminated");
    }

    async fn write(&self, path: &str, body: Value) {
        let (status, answer) = self.world.bao("POST", path, Some(body)).await;
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
    }

    async fn read(&self, path: &str) -> Value {
        let (status, answer) = self.world.bao("GET", path, None).await;
        assert_eq!(status, 200, "{path}");
        answer["data"].clone()
    }

    /// Each pgsilo refuses so, in OpenBAO's words.
    async fn refuses(&self, sqlstate: &str, reason: &str, words: &str) {
        for (proxy, token) in &self.proxies {
            let before = proxy.events("refused").len();
            let error = proxy.connect(token, "acme").await.expect_err(words);
            assert_eq!(error.code().map(|code| code.code()), Some(sqlstate), "{words}: {error:?}");
            let event =
                eventually("the event", async || proxy.events("refused").get(before).cloned())
                    .await;
            assert_eq!(event["reason"], reason, "{event}");
            let cause = event["cause"].as_str().expect("a cause");
            assert!(cause.starts_with("OpenBAO: ") && cause.contains(words), "{event}");
        }
    }

    /// Of a database that was full a moment ago not everybody tries at once.
    async fn serves(&self) {
        for (proxy, token) in &self.proxies {
            eventually("a session to be served", async || proxy.connect(token, "acme").await.ok())
                .await;
        }
    }
}

#[tokio::test]
async fn a_database_that_refuses_openbaos_connections_is_temporary() {
    let fixture = Fixture::new().await;
    fixture.serves().await;
    fixture.sql("ALTER ROLE tenant_acme_broker CONNECTION LIMIT 0").await;
    fixture.refuses("53300", "backend_full", "SQLSTATE 53300").await;
    fixture.sql("ALTER ROLE tenant_acme_broker CONNECTION LIMIT -1").await;
    fixture.serves().await;

    // There is no listener where OpenBAO connects; pgsilo has another way there.
    let url = fixture.read(CONNECTION).await["connection_details"]["connection_url"].clone();
    let port = fixture.world.var("PG_PORT");
    let elsewhere = url.as_str().expect("a URL").replace(port, "1");
    // The provisioner's description of a connection wants the password with a change.
    fixture.sql("ALTER ROLE tenant_acme_broker PASSWORD 'another'").await;
    let configure = async |url: &str| {
        let mut config = fixture.read(CONNECTION).await;
        let details = config["connection_details"].take();
        for (name, value) in details.as_object().expect("details") {
            config[name] = value.clone();
        }
        config["connection_url"] = url.into();
        config["password"] = "another".into();
        config["verify_connection"] = false.into();
        fixture.write(CONNECTION, config).await;
    };
    configure(&elsewhere).await;
    fixture.refuses("57P03", "lease_backend_away", "connection refused").await;
    configure(url.as_str().expect("a URL")).await;
    fixture.serves().await;

    // A smart shutdown waits for this very session, and accepts no other.
    let postmaster = Pid::from_raw(fixture.world.var("PG_PID").parse().expect("a pid"));
    fixture.sql("SELECT 1").await;
    kill_process(postmaster.expect("a pid"), Signal::TERM).expect("it lives");
    fixture.refuses("57P03", "backend_not_ready", "SQLSTATE 57P03").await;
}

#[tokio::test]
async fn lasting_faults_of_a_database_are_reported_to_the_operator() {
    let fixture = Fixture::new().await;
    fixture.serves().await;
    let role = fixture.read(ROLE).await;
    for (statement, words) in [
        ("CREATE ROL \"{{name}}\"", "SQLSTATE 42601"),
        ("CREATE ROLE \"{{name}}\" SUPERUSER", "SQLSTATE 42501"),
        ("CREATE ROLE \"{{name}}\" IN ROLE nobody", "SQLSTATE 42704"),
    ] {
        let mut broken = role.clone();
        broken["creation_statements"] = json!([statement]);
        fixture.write(ROLE, broken).await;
        fixture.refuses("58000", "lease_denied", words).await;
    }
    let mut nowhere = role.clone();
    nowhere["db_name"] = "nowhere".into();
    fixture.write(ROLE, nowhere).await;
    fixture.refuses("58000", "lease_denied", "failed to find entry for connection").await;
    fixture.write(ROLE, role).await;
    fixture.serves().await;

    let allow = async |roles: &str| {
        let body = json!({ "allowed_roles": [roles], "verify_connection": false });
        fixture.write(CONNECTION, body).await;
    };
    allow("another").await;
    fixture.refuses("58000", "lease_denied", "is not an allowed role").await;
    allow("tenant-acme-*").await;
    fixture.serves().await;

    for (broken, mended, words) in [
        ("NOLOGIN", "LOGIN", "SQLSTATE 28000"),
        ("RENAME TO tenant_acme_broker_2", "", "SQLSTATE 28P01"),
    ] {
        fixture.sql(&format!("ALTER ROLE tenant_acme_broker {broken}")).await;
        fixture.refuses("58000", "lease_denied", words).await;
        if !mended.is_empty() {
            fixture.sql(&format!("ALTER ROLE tenant_acme_broker {mended}")).await;
            fixture.serves().await;
        }
    }
}
