//! `cargo bench --bench registry` (behind `cargo build --release -p pgsilo -p pgsiloctl -p pgsilo-sandbox`):
//! a registry of 100,000 tenants in PostgreSQL, and two proxies that read it: how long the first
//! reading takes, what memory a tenant takes, and how soon a change is in force.
//!
//! `TENANTS=N` for another number. It prints what it measured and writes it into `benches/runs/`.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a run fails by panicking and prints what it measured, and so does what it shares with the tests"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing;
use testing::programs;
use testing::proxy::{Proxy, Settings};
use testing::world::{World, world};
use time::OffsetDateTime;
use tokio_postgres::{Client, Config};

/// Changes, and how many in a second.
const CHANGES: usize = 1000;
const RATE: u64 = 100;
const PASSWORD: &str = "not-a-secret-in-a-benchmark";

fn main() {
    let tenants: usize =
        std::env::var("TENANTS").map_or(100_000, |number| number.parse().expect("TENANTS"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let report = runtime.block_on(run(tenants));
    print!("{report}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(format!("benches/runs/{}-registry.txt", OffsetDateTime::now_utc().date()));
    fs::write(&path, report).expect("written");
}

async fn run(tenants: usize) -> String {
    let mut report = String::new();
    let world = world();
    let superuser = world.superuser("postgres").await;
    superuser.batch_execute("CREATE DATABASE registry").await.expect("created");
    let dsn = world.var("PG_SUPERUSER_DSN").rsplit_once('/').expect("a database").0.to_owned();
    let made = Command::new(programs::pgsiloctl())
        .args(["registry", "init", "--tls", "disable"])
        .env("PGSILO_REGISTRY_DSN", format!("{dsn}/registry"))
        .status();
    assert!(made.expect("it runs").success());
    let control = world.superuser("registry").await;
    let login = format!(
        "CREATE ROLE registry_reader LOGIN PASSWORD '{PASSWORD}' IN ROLE pgsilo_registry_proxy"
    );
    control.batch_execute(&login).await.expect("made");

    let empty = serve(world).await;
    let before = resident_kib(&empty);
    drop(empty);
    let began = Instant::now();
    fill(&control, tenants).await;
    let _ = writeln!(
        report,
        "{tenants} tenants written in one transaction    {:.1} s",
        began.elapsed().as_secs_f64()
    );

    let began = Instant::now();
    let first = serve(world).await;
    let count = tenants as f64;
    let whole = until(&first, count).await;
    let _ = writeln!(
        report,
        "from the start of a proxy until they are served    {:.2} s",
        (whole - began).as_secs_f64()
    );
    let second = serve(world).await;
    until(&second, count).await;
    let after = resident_kib(&first);
    let bytes = (after.saturating_sub(before) * 1024) as f64 / count;
    let _ = writeln!(report, "memory of a proxy    {after} KiB, {bytes:.0} bytes a tenant");

    let (processor, mut times) = (processor_ticks(&first), Vec::with_capacity(CHANGES));
    let watcher = world.superuser("registry").await;
    let mut due = Instant::now();
    for number in 0..CHANGES {
        due += Duration::from_micros(1_000_000 / RATE);
        tokio::time::sleep_until(due.into()).await;
        let id = number.wrapping_mul(7919) % tenants;
        let state = if number % 2 == 0 { "paused" } else { "active" };
        let change = format!(
            "UPDATE pgsilo.tenants SET state = '{state}', name = 'n{number}' WHERE id = 't{id}'"
        );
        control.batch_execute(&change).await.expect("written");
        times.push(in_force(&control, &watcher).await);
    }
    let worked = processor_ticks(&first) - processor;
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    let _ = writeln!(
        report,
        "from a change's commit until both proxies have it    {:.1} ms p50, {:.1} ms p99, {:.1} ms at most; {CHANGES} changes, {RATE} a second at most",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    let _ = writeln!(
        report,
        "a proxy's processor time for a change    {:.2} ms",
        worked as f64 * 10.0 / CHANGES as f64
    );
    let later = resident_kib(&first);
    let _ = writeln!(report, "memory of a proxy after them    {later} KiB");
    report
}

/// 50 clusters, and tenants on them, as `pgsiloctl apply` would write them.
async fn fill(control: &Client, tenants: usize) {
    let fill = format!(
        "BEGIN;
         INSERT INTO pgsilo.clusters (name, region, endpoints, tls)
             SELECT 'c' || n, 'eu', ARRAY['db-' || n || '.internal:5432'], '{{\"mode\": \"require\"}}'
             FROM generate_series(0, 49) n;
         INSERT INTO pgsilo.tenants (id) SELECT 't' || n FROM generate_series(0, {tenants} - 1) n;
         INSERT INTO pgsilo.placements (tenant, cluster, dbname, seal, mount, roles)
             SELECT 't' || n, 'c' || n % 50, 'tenant_t' || n, encode(sha256(n::text::bytea), 'hex'),
                 'pgsilo/t' || n, jsonb_build_object('read-write', 'tenant-t' || n || '-rw', 'read-only', 'tenant-t' || n || '-ro')
             FROM generate_series(0, {tenants} - 1) n;
         COMMIT; ANALYZE"
    );
    control.batch_execute(&fill).await.expect("written");
}

async fn serve(world: &World) -> Proxy {
    let dsn: Config = world.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
    let endpoint = match &dsn.get_hosts()[0] {
        tokio_postgres::config::Host::Tcp(host) => format!("{host}:{}", dsn.get_ports()[0]),
        tokio_postgres::config::Host::Unix(folder) => {
            format!("{}/.s.PGSQL.{}", folder.display(), dsn.get_ports()[0])
        }
    };
    let tls = if endpoint.starts_with('/') { "" } else { "tls = { mode = \"disable\" }\n" };
    let registry = format!(
        "[registry.postgres]\nendpoints = [\"{endpoint}\"]\ndbname = \"registry\"\n{tls}\
         user = \"registry_reader\"\npassword_file = \"registry-password\"\n"
    );
    let files = vec![("registry-password", PASSWORD.to_owned())];
    Proxy::unready(Settings { registry, files, log_level: "info", ..Settings::default() }).await
}

/// Waits until so many tenants are served.
async fn until(proxy: &Proxy, count: f64) -> Instant {
    loop {
        if proxy.metric("pgsilo_registry_tenants").await >= count {
            return Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until both proxies say that they have read all there is. How long that took.
async fn in_force(control: &Client, watcher: &Client) -> Duration {
    let began = Instant::now();
    let revision = "SELECT revision::text FROM pgsilo.revision";
    let revision: String = control.query_one(revision, &[]).await.expect("asked").get(0);
    let current = "SELECT count(*) FROM pg_stat_activity
        WHERE usename = 'registry_reader' AND nullif(split_part(application_name, ' @', 2), '')::bigint >= $1::text::bigint";
    loop {
        let current: i64 = watcher.query_one(current, &[&revision]).await.expect("asked").get(0);
        if current == 2 {
            return began.elapsed();
        }
    }
}

fn resident_kib(proxy: &Proxy) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Of a hundredth of a second each.
fn processor_ticks(proxy: &Proxy) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", proxy.pid())).expect("it lives");
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    fields[11].parse::<u64>().expect("a number") + fields[12].parse::<u64>().expect("a number")
}
