//! Clusters of a primary and a standby: where sessions go, and what becomes of them in a failover.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, query};
use pgsilo_sandbox::testing::standby::{Frozen, Standby};
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;
use tokio_postgres::Config;

const PORT: &str = "SELECT current_setting('port')";

/// A sandbox of its own, whose server has a standby, and whose OpenBAO connects to whichever of both
/// takes writes.
struct Pair {
    // In the order in which they are dropped.
    standby: Standby,
    world: World,
}

/// Which of OpenBAO's hosts comes first.
#[derive(Clone, Copy)]
enum First {
    Primary,
    Standby,
}

impl Pair {
    async fn new(first: First) -> Pair {
        let world = World::own().await;
        let superuser = world.superuser("postgres").await;
        // What watches may connect to a database that is no tenant's, and no more: the sandbox has its role.
        let monitor = "GRANT pgsilo_monitor TO pgsilo_provisioner WITH ADMIN OPTION";
        superuser.batch_execute(monitor).await.expect("made");
        // What is committed is sent at once, as elsewhere.
        let commit = "ALTER DATABASE tenant_acme SET synchronous_commit = on";
        superuser.batch_execute(commit).await.expect("set");
        let table = "SET ROLE tenant_acme_app; CREATE TABLE written (writer int, number int)";
        world.superuser("tenant_acme").await.batch_execute(table).await.expect("made");
        let standby = Standby::of(&world).await;
        let pair = Pair { standby, world };
        pair.follow("pgsilo/acme/config/tenant-acme", "tenant_acme", first, json!({})).await;
        let dsn: Config = pair.world.var("PROVISIONER_DSN").parse().expect("a DSN");
        let password = std::str::from_utf8(dsn.get_password().expect("a password")).expect("text");
        let login = json!({
            "plugin_name": "postgresql-database-plugin",
            "username": dsn.get_user().expect("a user"), "password": password,
            "password_authentication": "scram-sha-256", "allowed_roles": "*",
        });
        pair.follow("pgsilo-monitor/config/eu1", "postgres", first, login).await;
        let role = json!({
            "db_name": "eu1", "default_ttl": "1h", "max_ttl": "24h",
            "creation_statements": [
                "CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE pgsilo_monitor"
            ],
            "revocation_statements": ["DROP ROLE \"{{name}}\""],
        });
        let (status, answer) = pair.world.bao("POST", "pgsilo-monitor/roles/eu1", Some(role)).await;
        assert!((200..300).contains(&status), "{answer}");
        pair.standby.catch_up(&pair.world).await;
        pair
    }

    /// Has OpenBAO connect to the server that takes writes, the one after the other.
    async fn follow(&self, path: &str, dbname: &str, first: First, more: serde_json::Value) {
        let mut hosts =
            [self.primary_port(), self.standby.port()].map(|port| format!("127.0.0.1:{port}"));
        if matches!(first, First::Standby) {
            hosts.reverse();
        }
        let mut config = more;
        config["connection_url"] = format!(
            "postgresql://{{{{username}}}}:{{{{password}}}}@{}/{dbname}\
             ?sslmode=disable&target_session_attrs=read-write&connect_timeout=1",
            hosts.join(",")
        )
        .into();
        let (status, answer) = self.world.bao("POST", path, Some(config)).await;
        assert!((200..300).contains(&status), "{answer}");
    }

    fn primary_port(&self) -> u16 {
        let dsn: Config = self.world.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
        dsn.get_ports()[0]
    }

    /// A proxy for which both are one cluster, its servers in that order.
    async fn proxy(&self, order: First, monitor: &str) -> Proxy {
        let listeners = PLAIN.to_owned() + UNIX;
        let proxy = Proxy::of(&self.world, Settings { listeners, ..Settings::default() }).await;
        let mut ports = [self.primary_port(), self.standby.port()];
        if matches!(order, First::Standby) {
            ports.reverse();
        }
        let [one, other] = ports;
        proxy.reload(&format!(
            "[[cluster]]\nname = \"eu1\"\nendpoints = [\"127.0.0.1:{one}\", \"127.0.0.1:{other}\"]\n\
             tls = {{ mode = \"disable\" }}\n{monitor}\n\
             [[tenant]]\nid = \"acme\"\n[tenant.placement]\ncluster = \"eu1\"\ndbname = \"tenant_acme\"\n\
             [tenant.lease]\nroles = {{ read-write = \"tenant-acme-rw\", read-only = \"tenant-acme-ro\" }}\n"
        ));
        proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
        proxy
    }

    fn token(&self) -> String {
        mint::token_of(&self.world, "acme")
    }

    /// A session, and the port of the server that it is at.
    async fn session(&self, proxy: &Proxy) -> (Raw, u16) {
        session_of(proxy, &self.token()).await
    }
}

/// The same of whoever has a token.
async fn session_of(proxy: &Proxy, token: &str) -> (Raw, u16) {
    let mut session = Raw::tcp(proxy.address()).await;
    session.log_in(token, "acme").await;
    let port = session.ask(PORT).await;
    (session, port.parse().expect("a port"))
}

const MONITOR: &str = "monitor = { mount = \"pgsilo-monitor\", role = \"eu1\" }";
const PREFERS_STANDBY: &str =
    "monitor = { mount = \"pgsilo-monitor\", role = \"eu1\" }\nread_only = \"prefer-standby\"";

#[tokio::test]
async fn a_session_that_only_reads_may_go_to_a_standby() {
    let pair = Pair::new(First::Standby).await;
    let proxy = pair.proxy(First::Primary, PREFERS_STANDBY).await;
    let reads = mint::signed_by(&pair.world, json!({ "access": "read-only" }));
    let reader = async || session_of(&proxy, &reads).await;
    // Once the standby was looked at. A role that was made a moment ago is there a moment later.
    eventually("it to be known as a standby", async || {
        (reader().await.1 == pair.standby.port()).then_some(())
    })
    .await;
    let mut there = Vec::new();
    for _ in 0..5 {
        let (session, port) = reader().await;
        assert_eq!(port, pair.standby.port());
        there.push(session);
    }
    // They are no orphans.
    let registry = proxy.dir().join("tenants.toml");
    let registry = ["--registry", registry.to_str().expect("a path"), "--tenant", "acme"];
    assert_eq!(crate::orphans::audit(&pair.world, &registry).await, (0, Vec::new()));
    let (mut writer, port) = pair.session(&proxy).await;
    assert_eq!(port, pair.primary_port());
    let lag = "INSERT INTO written VALUES (1, 1) RETURNING 'written'";
    assert_eq!(writer.ask(lag).await, "written");
    eventually("it to be replayed", async || {
        (there[0].ask("SELECT count(*)::text FROM written").await == "1").then_some(())
    })
    .await;
    // One that is cancelled there is.
    let client = proxy.connect(&reads, "acme").await.expect("a session");
    let cancel = client.cancel_token();
    let sleeping = tokio::spawn(async move { client.simple_query("SELECT pg_sleep(60)").await });
    eventually("it to be cancelled", async || {
        cancel.cancel_query(tokio_postgres::NoTls).await.expect("sent");
        sleeping.is_finished().then_some(())
    })
    .await;
    let cancelled = sleeping.await.expect("it ends").expect_err("cancelled");
    assert_eq!(cancelled.code().map(|code| code.code()), Some("57014"));

    // It becomes the primary: whom others follow then is not known.
    pair.standby.promote().await;
    for mut session in there {
        assert_eq!(session.fatal().await.sqlstate(), "57P01");
    }
    let (_session, port) = reader().await;
    assert_eq!(
        port,
        pair.standby.port(),
        "it is the only one that answers as one of the cluster's"
    );
}

/// That a standby has no connection left is nothing that the primary is to suffer for.
#[tokio::test]
async fn a_full_standby_turns_nobody_away() {
    let pair = Pair::new(First::Primary).await;
    let proxy = pair.proxy(First::Primary, PREFERS_STANDBY).await;
    let reads = mint::signed_by(&pair.world, json!({ "access": "read-only" }));
    let reader = async || session_of(&proxy, &reads).await;
    let limit = "ALTER DATABASE tenant_acme CONNECTION LIMIT 8";
    pair.world.superuser("postgres").await.batch_execute(limit).await.expect("set");
    pair.standby.catch_up(&pair.world).await;
    let mut at_standby = Vec::new();
    eventually("the standby to be full", async || {
        let (session, port) = reader().await;
        if port == pair.standby.port() {
            at_standby.push(session);
        }
        (at_standby.len() == 8).then_some(())
    })
    .await;
    let ((_one, first), (_other, second)) = tokio::join!(reader(), reader());
    assert_eq!([first, second], [pair.primary_port(); 2]);
    for _ in 0..3 {
        let (mut writer, port) = pair.session(&proxy).await;
        assert_eq!(port, pair.primary_port());
        writer.ask("INSERT INTO written VALUES (1, 1) RETURNING 'written'").await;
    }
}

/// Without a standby that answers, who only reads goes where all go.
#[tokio::test]
async fn a_session_that_only_reads_goes_to_the_primary_without_a_standby() {
    let pair = Pair::new(First::Primary).await;
    let proxy = pair.proxy(First::Primary, PREFERS_STANDBY).await;
    let reads = mint::signed_by(&pair.world, json!({ "access": "read-only" }));
    let primary = pair.primary_port();
    let Pair { standby, world: _world } = pair;
    drop(standby);
    assert_eq!(session_of(&proxy, &reads).await.1, primary);
}

#[tokio::test]
async fn a_session_goes_to_the_server_that_takes_writes() {
    let pair = Pair::new(First::Primary).await;
    for monitor in ["", MONITOR] {
        let proxy = pair.proxy(First::Standby, monitor).await;
        for _ in 0..3 {
            assert_eq!(pair.session(&proxy).await.1, pair.primary_port(), "{monitor}");
        }
        // Its cancel requests go there, too.
        let client = proxy.connect(&pair.token(), "acme").await.expect("a session");
        let cancel = client.cancel_token();
        let (cancelled, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), async {
            let watcher = pair.world.superuser("postgres").await;
            let sleeps = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            eventually("the query to run", async || {
                watcher.query_opt(sleeps, &[]).await.expect("asked")
            })
            .await;
            cancel.cancel_query(tokio_postgres::NoTls).await.expect("asked");
        });
        let code = cancelled.expect_err("cancelled").code().cloned();
        assert_eq!(code, Some(tokio_postgres::error::SqlState::QUERY_CANCELED));
    }
}

/// What several clients write, one row after the other, each with a new session where it has none.
struct Writers {
    stop: Arc<AtomicBool>,
    /// The next row's number.
    next: Arc<AtomicU32>,
    tasks: Vec<tokio::task::JoinHandle<Written>>,
}

#[derive(Default)]
struct Written {
    acknowledged: Vec<i32>,
    /// Sessions that ended while it wrote.
    ended: usize,
}

impl Writers {
    fn begin(count: i32, proxy: &Proxy, token: &str) -> Writers {
        let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let address = proxy.address();
        let tasks = (0..count).map(|writer| {
            let (stop, next, token) = (Arc::clone(&stop), Arc::clone(&next), token.to_owned());
            tokio::spawn(async move {
                let mut written = Written::default();
                let mut config = Config::new();
                config.host("127.0.0.1").port(address.port()).user("app").password(&token);
                while !stop.load(Ordering::Acquire) {
                    let connected = config.dbname("acme").connect(tokio_postgres::NoTls).await;
                    let Ok((client, connection)) = connected else { continue };
                    tokio::spawn(connection);
                    while !stop.load(Ordering::Acquire) {
                        let number = next.fetch_add(1, Ordering::AcqRel) as i32;
                        let insert = "INSERT INTO written VALUES ($1, $2)";
                        match client.execute(insert, &[&writer, &number]).await {
                            Ok(_) => written.acknowledged.push(number),
                            Err(_ended) => {
                                written.ended += 1;
                                break;
                            }
                        }
                    }
                }
                written
            })
        });
        let tasks = tasks.collect();
        Writers { stop, next, tasks }
    }

    /// The number that no row has yet.
    fn reached(&self) -> i32 {
        self.next.load(Ordering::Acquire) as i32
    }

    /// Waits until so many more rows were begun.
    async fn write_more(&self, rows: i32) {
        let until = self.reached() + rows;
        eventually("rows to be written", async || (self.reached() >= until).then_some(())).await;
    }

    async fn end(self) -> Vec<Written> {
        self.stop.store(true, Ordering::Release);
        futures_util::future::join_all(self.tasks)
            .await
            .into_iter()
            .map(|written| written.expect("a writer ends"))
            .collect()
    }
}

async fn rows(server: tokio_postgres::Client) -> HashSet<i32> {
    let rows = server.query("SELECT number FROM written", &[]).await.expect("read");
    rows.iter().map(|row| row.get(0)).collect()
}

/// The primary stands still, as a machine does that hangs or is cut off; its standby is promoted; the
/// primary goes on, and takes itself for one still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn nobody_writes_to_a_primary_that_was_overtaken() {
    let pair = Pair::new(First::Standby).await;
    let proxy = pair.proxy(First::Primary, MONITOR).await;
    let (mut idle, at) = pair.session(&proxy).await;
    assert_eq!(at, pair.primary_port());
    let (mut busy, _) = pair.session(&proxy).await;
    busy.send(&query("SELECT pg_sleep(60)")).await;
    let writers = Writers::begin(4, &proxy, &pair.token());
    writers.write_more(200).await;
    pair.standby.catch_up(&pair.world).await;

    let frozen = Frozen::of(&pair.world);
    pair.standby.promote().await;
    let (promoted, promotion) = (Instant::now(), writers.reached());
    // Those with nothing to do and those that wait for it are told.
    for session in [&mut idle, &mut busy] {
        assert_eq!(session.fatal().await.sqlstate(), "57P01");
    }
    println!("its sessions ended {:?} after the promotion", promoted.elapsed());
    eventually("a session at the new primary", async || {
        let client = proxy.connect(&pair.token(), "acme").await.ok()?;
        let at: String = client.query_one(PORT, &[]).await.ok()?.get(0);
        (at == pair.standby.port().to_string()).then_some(())
    })
    .await;
    println!("a new session worked {:?} after the promotion", promoted.elapsed());
    writers.write_more(100).await;

    drop(frozen);
    proxy
        .logged(|line| {
            line["level"] == "ERROR"
                && line["message"]
                    .as_str()
                    .is_some_and(|text| text.contains("nobody is let in there"))
        })
        .await;
    writers.write_more(200).await;
    for _ in 0..10 {
        assert_eq!(pair.session(&proxy).await.1, pair.standby.port());
    }
    let written = writers.end().await;
    let (before, after) = (
        rows(pair.world.superuser("tenant_acme").await).await,
        rows(pair.standby.superuser("tenant_acme").await).await,
    );
    let late: Vec<_> = before.iter().filter(|number| **number >= promotion).collect();
    assert!(late.is_empty(), "written to the primary before, after the promotion: {late:?}");
    for writer in &written {
        let lost = writer
            .acknowledged
            .iter()
            .filter(|number| **number >= promotion && !after.contains(number));
        assert_eq!(lost.count(), 0, "acknowledged after the promotion, and not there");
        assert!(writer.ended > 0, "it went on at the primary before");
    }
    assert!(
        written.iter().any(|writer| writer.acknowledged.iter().any(|number| *number >= promotion))
    );
    assert_eq!(proxy.metric("pgsilo_failovers_total").await, 1.0);
    drop((idle, busy));
    proxy.metric_reaches("pgsilo_endings_total{ending=\"failed_over\"}", 6.0).await;
}

/// The cluster has one server at first, and one again for a while.
#[tokio::test]
async fn sessions_from_before_the_standby_leave_with_the_failover() {
    let pair = Pair::new(First::Standby).await;
    let proxy = pair.proxy(First::Primary, MONITOR).await;
    let several = proxy.tenants();
    let alone = several.replace(&format!(", \"127.0.0.1:{}\"]", pair.standby.port()), "]");
    assert_ne!(alone, several);
    let mut sessions = Vec::new();
    for (reloads, text) in [&several, &alone, &several, &alone, &several].into_iter().enumerate() {
        proxy.reload(text);
        let reloads = reloads as f64 + 2.0;
        proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", reloads).await;
        sessions.push(pair.session(&proxy).await.0);
    }
    pair.standby.catch_up(&pair.world).await;
    pair.standby.promote().await;
    for session in &mut sessions {
        assert_eq!(session.fatal().await.sqlstate(), "57P01");
    }
    assert_eq!(pair.session(&proxy).await.1, pair.standby.port());
}

/// One of the servers takes connections, and says nothing.
#[tokio::test]
async fn a_silent_server_costs_a_login_its_share_and_the_next_ones_nothing() {
    let pair = Pair::new(First::Primary).await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let proxy = pair.proxy(First::Primary, "").await;
    let port = silent.local_addr().expect("an address").port();
    let three = proxy.tenants().replacen(
        "endpoints = [",
        &format!("endpoints = [\"127.0.0.1:{port}\", "),
        1,
    );
    proxy.reload(&three);
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 2.0).await;
    let (_first, at) = pair.session(&proxy).await;
    assert_eq!(at, pair.primary_port());
    drop(silent.accept().await.expect("it was tried"));
    for _ in 0..3 {
        assert_eq!(pair.session(&proxy).await.1, pair.primary_port());
    }
    let tried_again = tokio::time::timeout(std::time::Duration::ZERO, silent.accept()).await;
    assert!(tried_again.is_err(), "the primary is known");
}

/// Both take writes, and answer.
#[tokio::test]
async fn a_primary_that_lives_on_loses_its_sessions() {
    let pair = Pair::new(First::Standby).await;
    let proxy = pair.proxy(First::Primary, MONITOR).await;
    let (mut idle, at) = pair.session(&proxy).await;
    let (mut busy, _) = pair.session(&proxy).await;
    busy.send(&query("BEGIN; INSERT INTO written VALUES (0, 0); SELECT pg_sleep(60)")).await;
    assert_eq!(at, pair.primary_port());
    pair.standby.promote().await;
    for session in [&mut idle, &mut busy] {
        let told = session.fatal().await;
        assert_eq!(told.sqlstate(), "57P01");
        let why = told.field(b'M').expect("a message");
        assert_eq!(why, "terminating connection because the database has failed over");
    }
    for _ in 0..5 {
        assert_eq!(pair.session(&proxy).await.1, pair.standby.port());
    }
    assert!(rows(pair.world.superuser("tenant_acme").await).await.is_empty());
    let ended = proxy.event("ended", |event| event["ending"] == "failed_over").await;
    assert_eq!(ended["tenant"], "acme");
}
