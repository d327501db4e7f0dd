//! `cargo bench --bench tenants` (behind `cargo build --release -p pgsilo -p pgsiloctl -p pgsilo-sandbox`): how long
//! `pgsiloctl tenant` takes to make a tenant, to check it and to remove it; and what a lease takes where
//! OpenBAO makes the verifier, and where PostgreSQL does.
//!
//! `TENANTS=N` for another number. Times are those of the whole command, from its start until the proxy has the
//! change. It prints what it measured and writes it into `benches/runs/`.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a run fails by panicking and prints what it measured"
)]

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::world::World;
use time::OffsetDateTime;
use tokio_postgres::{Config, NoTls};

/// Leases of each kind.
const LEASES: usize = 100;
const PASSWORD: &str = "not-a-secret-in-a-benchmark";

fn main() {
    let tenants: usize =
        std::env::var("TENANTS").map_or(50, |number| number.parse().expect("TENANTS"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let report = runtime.block_on(run(tenants));
    print!("{report}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(format!("benches/runs/{}-tenants.txt", OffsetDateTime::now_utc().date()));
    fs::write(&path, report).expect("written");
}

async fn run(tenants: usize) -> String {
    let world = World::of_registry(&["--max-connections", "400", "--leased-over-tcp"]).await;
    let report = RefCell::new(String::new());
    let tell = |what: &str, mut times: Vec<Duration>| {
        times.sort_unstable();
        let at =
            |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64();
        let line = format!(
            "{what:<58} {:>7.3} s p50  {:>7.3} s p99  of {}",
            at(0.5),
            at(0.99),
            times.len()
        );
        println!("{line}");
        let _ = writeln!(report.borrow_mut(), "{line}");
    };
    let all = |prefix: &str| (0..tenants).map(move |n| format!("{prefix}-{n}")).collect::<Vec<_>>();
    let each = |ids: Vec<String>, command: &[&str], more: &dyn Fn(&str) -> Vec<String>| {
        let time = |id: &String| {
            let began = Instant::now();
            pgsiloctl(
                &world,
                &[
                    &[command, &[id.as_str()]].concat(),
                    &*more(id).iter().map(String::as_str).collect::<Vec<_>>(),
                ]
                .concat(),
            );
            began.elapsed()
        };
        ids.iter().map(time).collect::<Vec<_>>()
    };
    let nothing = |_: &str| Vec::new();
    tell("tenant create", each(all("cold"), &["tenant", "create"], &nothing));
    pgsiloctl(&world, &["tenant", "prepare", "--standby", &tenants.to_string()]);
    tell(
        "tenant create, of a database that was ready",
        each(all("ready"), &["tenant", "create"], &nothing),
    );
    tell("tenant check", each(all("cold"), &["tenant", "check"], &nothing));
    let confirmed = |id: &str| vec!["--now".to_owned(), "--confirm".to_owned(), id.to_owned()];
    tell("tenant delete --now", each(all("cold"), &["tenant", "delete"], &confirmed));

    for hashing in ["openbao", "postgres"] {
        pgsiloctl(
            &world,
            &["tenant", "create", hashing, "--name", hashing, "--lease-hashing", hashing],
        );
    }
    let standing = format!(
        "CREATE ROLE standing LOGIN PASSWORD '{PASSWORD}' IN ROLE tenant_openbao_login, tenant_postgres_login"
    );
    world.superuser("postgres").await.batch_execute(&standing).await.expect("made");
    let mut times: [[Vec<Duration>; 3]; 2] = Default::default();
    for _ in 0..LEASES {
        for (hashing, times) in ["openbao", "postgres"].into_iter().zip(&mut times) {
            let began = Instant::now();
            let path = format!("pgsilo/{hashing}/creds/tenant-{hashing}-rw");
            let (status, leased) = world.bao("GET", &path, None).await;
            assert_eq!(status, 200, "{leased}");
            times[0].push(began.elapsed());
            let text = |name: &str| leased["data"][name].as_str().expect("text").to_owned();
            times[1].push(log_in(&world, hashing, &text("username"), &text("password")).await);
            times[2].push(log_in(&world, hashing, "standing", PASSWORD).await);
            let body = serde_json::json!({ "lease_id": leased["lease_id"], "sync": true });
            let (status, _) = world.bao("POST", "sys/leases/revoke", Some(body)).await;
            assert!((200..300).contains(&status));
        }
    }
    for (hashing, [lease, leased, direct]) in ["openbao", "postgres"].into_iter().zip(times) {
        let whole = lease.iter().zip(&leased).map(|(one, other)| *one + *other);
        let mut ratios: Vec<f64> = whole
            .zip(&direct)
            .map(|(whole, direct)| whole.as_secs_f64() / direct.as_secs_f64())
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        tell(&format!("lease_hashing = \"{hashing}\": a lease"), lease);
        tell("  a login with it", leased);
        tell("  a login with a password that lasts, of 4096 iterations", direct);
        let line = format!(
            "  lease and login / that login: {:.2} (median of pairs)\n",
            ratios[ratios.len() / 2]
        );
        print!("{line}");
        report.borrow_mut().push_str(&line);
    }
    report.take()
}

fn pgsiloctl(world: &World, arguments: &[&str]) {
    let output = Command::new(programs::pgsiloctl())
        .args(arguments)
        .env("PGSILOCTL_CONFIG", world.var("PGSILOCTL_CONFIG"))
        .output()
        .expect("it runs");
    if !output.status.success() {
        panic!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

async fn log_in(world: &World, tenant: &str, user: &str, password: &str) -> Duration {
    let began = Instant::now();
    let mut config = Config::new();
    config.host("127.0.0.1").port(world.var("PG_PORT").parse().expect("a port"));
    config.user(user).password(password).dbname(format!("tenant_{tenant}"));
    let (client, connection) = config.connect(NoTls).await.expect("let in");
    let connection = tokio::spawn(connection);
    client.simple_query("SELECT 1").await.expect("asked");
    let took = began.elapsed();
    drop(client);
    let _ended = connection.await;
    took
}
