//! Two proxies on one registry that never rests, whose connections are cut in every way: each time both
//! come to what it says. `CUTS=100` for more of them; how long each took is printed.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::standby::{Frozen, Standby};
use pgsilo_sandbox::testing::world::World;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::{Client, Config, NoTls};

use super::served::REVISION;

const PASSWORD: &str = "of-a-proxy-in-a-test";
/// Kinds of changes.
const KINDS: usize = 12;
/// Changes in a second.
const RATE: u32 = 100;
/// Tenants that are written; all else hangs on them.
const TENANTS: usize = 40;
/// What a server that does not stand still takes for an answer, at most.
const ANSWER: Duration = Duration::from_secs(2);
/// As proxies are called, and what they log in as.
const READERS: &str = "usename = 'registry_reader' AND application_name LIKE 'pgsilo %'";

/// How a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cut {
    /// The server ends it.
    Killed,
    /// The network drops what it carries: it is open, and says nothing.
    Silent,
    /// All of the server's processes are killed but the first, which begins again.
    Restarted,
    /// The standby is promoted, and the server stands still.
    FailedOver,
}

/// A sandbox's PostgreSQL with the registry, and its standby.
struct Servers {
    // In the order in which they are dropped.
    standby: Standby,
    world: World,
    /// What is between the proxies and both.
    links: [Link; 2],
}

/// Carries bytes to a server that listens at a port.
struct Link {
    port: u16,
    /// Raised to have it carry nothing more on the connections that there are.
    cuts: watch::Sender<u32>,
}

impl Link {
    async fn to(server: u16) -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let cuts = watch::Sender::new(0);
        let told = cuts.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = told.subscribe();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", server)).await else {
                        return;
                    };
                    tokio::select! {
                        _closed = copy_bidirectional(&mut near, &mut far) => {}
                        // Both stay open.
                        _ = cut.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Link { port, cuts }
    }
}

impl Servers {
    async fn new() -> Servers {
        let world = World::own().await;
        let superuser = world.superuser("postgres").await;
        superuser.batch_execute("CREATE DATABASE registry").await.expect("created");
        let dsn = world.var("PG_SUPERUSER_DSN").rsplit_once('/').expect("a database").0;
        let made = Command::new(programs::pgsiloctl())
            .args(["registry", "init", "--tls", "disable"])
            .env("PGSILO_REGISTRY_DSN", format!("{dsn}/registry"))
            .output()
            .expect("it runs");
        assert!(made.status.success(), "{made:?}");
        let fill = format!(
            "CREATE ROLE registry_reader LOGIN PASSWORD '{PASSWORD}' IN ROLE pgsilo_registry_proxy;
             INSERT INTO pgsilo.clusters (name, endpoints, tls) VALUES ('eu', '{{db.internal}}', '{{\"mode\": \"require\"}}');
             INSERT INTO pgsilo.tenants (id) SELECT 't' || n FROM generate_series(0, {TENANTS} - 1) n;
             INSERT INTO pgsilo.placements (tenant, cluster, dbname, seal, mount, roles)
                 SELECT id, 'eu', 'tenant_' || id, 'seal of ' || id, 'pgsilo/' || id,
                     jsonb_build_object('read-write', 'tenant-' || id || '-rw') FROM pgsilo.tenants"
        );
        world.superuser("registry").await.batch_execute(&fill).await.expect("filled");
        let standby = Standby::of(&world).await;
        standby.catch_up(&world).await;
        let primary: Config = world.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
        let links = [Link::to(primary.get_ports()[0]).await, Link::to(standby.port()).await];
        Servers { standby, world, links }
    }

    /// Both, each to be had only where it takes writes.
    fn configs(&self) -> [Config; 2] {
        let primary: Config = self.world.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
        [primary.get_ports()[0], self.standby.port()].map(|port| {
            let mut config = Config::new();
            config.host("127.0.0.1").port(port).dbname("registry");
            config.user(primary.get_user().expect("a user"));
            config.password(primary.get_password().expect("a password"));
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
            config
        })
    }

    async fn proxy(&self) -> Proxy {
        let [primary, standby] = &self.links;
        let registry = format!(
            "[registry.postgres]\nendpoints = [\"127.0.0.1:{}\", \"127.0.0.1:{}\"]\n\
             dbname = \"registry\"\ntls = {{ mode = \"disable\" }}\n\
             user = \"registry_reader\"\npassword_file = \"registry-password\"\n",
            primary.port, standby.port
        );
        let files = vec![("registry-password", PASSWORD.to_owned())];
        Proxy::of(
            &self.world,
            Settings { registry, files, log_level: "info", ..Settings::default() },
        )
        .await
    }

    /// Returns once it is cut, with what keeps it so.
    async fn cut(&self, how: Cut) -> Option<Frozen> {
        match how {
            Cut::Killed => {
                let kill = format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {READERS}"
                );
                let superuser = self.world.superuser("postgres").await;
                superuser.execute(&kill, &[]).await.expect("killed");
            }
            Cut::Silent => {
                self.links.iter().for_each(|link| link.cuts.send_modify(|cuts| *cuts += 1));
            }
            Cut::Restarted => {
                let superuser = self.world.superuser("postgres").await;
                let pid = "SELECT pg_backend_pid()";
                let pid: i32 = superuser.query_one(pid, &[]).await.expect("asked").get(0);
                kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("killed");
            }
            Cut::FailedOver => {
                let frozen = Frozen::of(&self.world);
                self.standby.promote().await;
                return Some(frozen);
            }
        }
        None
    }
}

/// The server that takes writes. One that stands still lets nobody in, and does not say so.
async fn connect(servers: &[Config; 2]) -> Option<Client> {
    for server in servers {
        if let Ok(Ok((client, connection))) = timeout(ANSWER, server.connect(NoTls)).await {
            tokio::spawn(connection);
            return Some(client);
        }
    }
    None
}

/// Writes without rest but while the gate is held.
fn write(servers: [Config; 2], gate: Arc<Mutex<()>>, written: Arc<AtomicUsize>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = interval(Duration::from_secs(1) / RATE);
        let mut client = None::<Client>;
        for number in 0_usize.. {
            ticks.tick().await;
            let _open = gate.lock().await;
            client = match client {
                None => connect(&servers).await,
                connected => connected,
            };
            let Some(connected) = &client else { continue };
            match timeout(ANSWER, connected.batch_execute(&change(number))).await {
                Ok(Ok(())) => drop(written.fetch_add(1, Ordering::Relaxed)),
                // A constraint is somebody's fault, a lost connection is not.
                Ok(Err(error))
                    if error
                        .as_db_error()
                        .is_some_and(|error| !error.code().code().starts_with("57")) =>
                {
                    panic!("{error:?} {}", change(number))
                }
                Ok(Err(_)) | Err(_) => client = None,
            }
        }
    })
}

/// Every kind of change, one after the other.
fn change(number: usize) -> String {
    let tenant = format!("t{}", number.wrapping_mul(7) % TENANTS);
    let state = ["paused", "suspended", "active"][number % 3];
    match number % KINDS {
        0 => format!("UPDATE pgsilo.tenants SET state = '{state}' WHERE id = '{tenant}'"),
        1 => format!("INSERT INTO pgsilo.aliases VALUES ('alias {number}', '{tenant}')"),
        2 => format!("DELETE FROM pgsilo.aliases WHERE tenant = '{tenant}'"),
        3 => format!("INSERT INTO pgsilo.bindings VALUES ('dns:h{number}', '{tenant}', 'read-write')"),
        4 => format!("DELETE FROM pgsilo.bindings WHERE tenant = '{tenant}'"),
        5 => format!(
            "INSERT INTO pgsilo.grants (issuer, subject, tenant, access, reason, granted_by, granted_at)
             VALUES ('https://a', 's{number}', '{tenant}', 'read-only', 'a test', 'a test', now())"
        ),
        6 => format!("DELETE FROM pgsilo.grants WHERE tenant = '{tenant}'"),
        7 => format!("INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('subject', 's{number}', 'a test')"),
        8 => "DELETE FROM pgsilo.locks WHERE ctid IN (SELECT ctid FROM pgsilo.locks LIMIT 1)".to_owned(),
        9 => format!("UPDATE pgsilo.placements SET dbname = 'd{number}' WHERE tenant = '{tenant}'"),
        10 => format!("UPDATE pgsilo.clusters SET max_sessions = {}", 100 + number % 50),
        _ => format!(
            "BEGIN; CREATE TEMP TABLE IF NOT EXISTS gone AS SELECT * FROM pgsilo.placements LIMIT 0; DELETE FROM gone;
             INSERT INTO gone SELECT * FROM pgsilo.placements WHERE tenant = '{tenant}';
             DELETE FROM pgsilo.tenants WHERE id = '{tenant}'; INSERT INTO pgsilo.tenants (id) VALUES ('{tenant}');
             INSERT INTO pgsilo.placements SELECT * FROM gone; COMMIT"
        ),
    }
}

/// Waits until a proxy has all there is, and its digest agrees. How long the first took since it was cut.
async fn agrees(proxy: &Proxy, servers: &[Config; 2], cut: Instant) -> Duration {
    eventually("all there is to be read", async || {
        // What was written when the server stood still may be committed only now.
        let client = connect(servers).await?;
        let revision = "SELECT revision::float8 FROM pgsilo.revision";
        let revision: f64 = client.query_one(revision, &[]).await.ok()?.get(0);
        let is_stale = proxy.metric("pgsilo_registry_stale_seconds").await > 0.0;
        (proxy.metric(REVISION).await == revision && !is_stale).then_some(())
    })
    .await;
    let took = cut.elapsed();
    let compared = "pgsilo_registry_comparisons_total{result=\"ok\"}";
    let before = proxy.metric(compared).await;
    proxy.signal(Signal::HUP);
    eventually("it to be compared", async || (proxy.metric(compared).await > before).then_some(()))
        .await;
    assert_eq!(proxy.metric("pgsilo_registry_comparisons_total{result=\"error\"}").await, 0.0);
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_proxies_come_to_the_same_however_they_are_cut() {
    let cuts = std::env::var("CUTS").map_or(9, |cuts| cuts.parse().expect("a number"));
    let servers = Servers::new().await;
    let proxies = [servers.proxy().await, servers.proxy().await];
    let gate = Arc::new(Mutex::new(()));
    let written = Arc::new(AtomicUsize::new(0));
    let writer = write(servers.configs(), Arc::clone(&gate), Arc::clone(&written));
    let mut took = BTreeMap::<Cut, Vec<Duration>>::new();
    // The server that stands still is overtaken, and goes on at the end.
    let mut overtaken = None;
    for number in 0..=cuts {
        let how = match number {
            last if last == cuts => Cut::FailedOver,
            one if one % 9 == 4 => Cut::Silent,
            one if one % 9 == 8 => Cut::Restarted,
            _ => Cut::Killed,
        };
        let began = Instant::now();
        let before = written.load(Ordering::Relaxed);
        overtaken = servers.cut(how).await;
        eventually("changes of every kind while it is cut", async || {
            (written.load(Ordering::Relaxed) >= before + KINDS).then_some(())
        })
        .await;
        let closed = gate.lock().await;
        let (configs, [one, other]) = (servers.configs(), &proxies);
        // Something that they cannot have read before.
        let news = format!("UPDATE pgsilo.tenants SET name = 'cut {number}' WHERE id = 't0'");
        eventually("a server that takes writes", async || {
            connect(&configs).await?.batch_execute(&news).await.ok()
        })
        .await;
        let both = tokio::join!(agrees(one, &configs, began), agrees(other, &configs, began));
        took.entry(how).or_default().extend(<[_; 2]>::from(both));
        drop(closed);
    }
    assert!(!writer.is_finished(), "it writes to the end");
    writer.abort();
    // The server that was overtaken goes on, and takes writes. No proxy reads there.
    drop(overtaken);
    let [_before, now] = servers.configs();
    let superuser = servers.standby.superuser("postgres").await;
    for _ in 0..10 {
        let kill =
            format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {READERS}");
        superuser.execute(&kill, &[]).await.expect("killed");
        let began = Instant::now();
        let servers = [now.clone(), now.clone()];
        let [one, other] = &proxies;
        tokio::join!(agrees(one, &servers, began), agrees(other, &servers, began));
    }
    for (how, mut times) in took {
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        println!("{how:?}, {} times: {:?} p50, {:?} p99", times.len(), at(0.5), at(0.99));
    }
}
