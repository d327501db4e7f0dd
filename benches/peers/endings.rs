//! What the users of a connection pool notice when its sessions end: pools as docs/pools.md sets
//! them up, whose connections are in use all the time or half of it, and a bound on the age of
//! sessions.

use std::path::Path;
use std::process::Stdio;

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings};
use pgsilo_sandbox::testing::world::World;
use serde_json::Value;
use tokio::process::Command;

use crate::Plan;
use crate::report::Report;

/// A session gets a third of it as notice, half of that for its last words.
const LIMITS: &str = "max_session_age = \"12s\"\n";
const ENDINGS: &str = "pgsilo_endings_total{ending=\"session_age\"}";
/// Connections of a pool, and users.
const SIZE: usize = 12;

/// How a pool is used. Seconds.
struct Use {
    pool: &'static str,
    /// From the checkout to the first statement.
    hold: f64,
    /// From the return to the next checkout.
    gap: f64,
}

const USES: [Use; 9] = [
    Use { pool: "sqlalchemy", hold: 0.0, gap: 0.0 },
    Use { pool: "sqlalchemy", hold: 0.05, gap: 0.0 },
    Use { pool: "sqlalchemy", hold: 0.2, gap: 0.0 },
    Use { pool: "sqlalchemy", hold: 0.2, gap: 0.4 },
    Use { pool: "psycopg_pool", hold: 0.05, gap: 0.0 },
    Use { pool: "psycopg_pool", hold: 0.05, gap: 0.4 },
    Use { pool: "asyncpg", hold: 0.05, gap: 0.0 },
    Use { pool: "asyncpg", hold: 0.05, gap: 0.4 },
    Use { pool: "asyncpg, unreset", hold: 0.05, gap: 0.4 },
];

/// Prints the table, and what failed.
pub(crate) async fn run(plan: Plan, report: &mut Report) {
    let world: &'static World =
        Box::leak(Box::new(World::start("endings", &["--without-proxy", "--leased-over-tcp"])));
    let seconds = f64::from(plan.seconds) * 40.0;
    report.heading(&format!(
        "Endings of pools: {SIZE} connections, {SIZE} users, {seconds} s each; of pgsilo's configuration: {}",
        LIMITS.trim()
    ));
    report.line(&format!(
        "{:18} {:>8} {:>8} {:>10} {:>10} {:>10}",
        "", "hold ms", "gap ms", "uses", "endings", "failed"
    ));
    let mut words = Vec::new();
    for each in &USES {
        let settings = Settings {
            listeners: PLAIN.to_owned(),
            limits: LIMITS.to_owned(),
            ..Settings::default()
        };
        let proxy = Proxy::of(world, settings).await;
        let said = used(each, seconds, world, &proxy).await;
        let failures = said["failures"].as_object().expect("told");
        let failed: u64 = failures.values().filter_map(Value::as_u64).sum();
        report.line(&format!(
            "{:18} {:>8} {:>8} {:>10} {:>10} {:>10}",
            each.pool,
            each.hold * 1000.0,
            each.gap * 1000.0,
            said["uses"],
            proxy.metric(ENDINGS).await,
            failed
        ));
        words.extend(
            failures.iter().map(|(text, count)| format!("{}: {count} x {text}", each.pool)),
        );
    }
    report.line("");
    for line in words {
        report.line(&line);
    }
}

async fn used(each: &Use, seconds: f64, world: &World, proxy: &Proxy) -> Value {
    let python = std::env::var("PGSILO_PYTHON").expect("run `make bench`: it sets PGSILO_PYTHON");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/endings.py");
    let output = Command::new(python)
        .arg("-B")
        .arg(script)
        .arg(each.pool)
        .args([SIZE.to_string(), each.hold.to_string(), each.gap.to_string(), seconds.to_string()])
        .env("PGSILO_HOST", proxy.address().ip().to_string())
        .env("PGSILO_PORT", proxy.address().port().to_string())
        .env("PGSILO_TOKEN", mint::token_of(world, "acme"))
        .stderr(Stdio::inherit())
        .output()
        .await
        .expect("it starts");
    assert!(output.status.success(), "{}", each.pool);
    serde_json::from_slice(&output.stdout).expect("one line of JSON")
}
