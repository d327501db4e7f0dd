//! A tenant that grants something of its own to each leased role of its neighbour as soon as that
//! is made, so that PostgreSQL drops none of them, beside the neighbour's sessions; and the audit,
//! by its timer.
//!
//! What must come of it: no role of a session that ended can log in, OpenBAO has nothing to try
//! again, and the next audit leaves none. What it costs the neighbour is printed. `AUDIT=never`:
//! without the timer.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;
use tokio::process::Command;

/// Between two lines of the table.
const SAMPLE: Duration = Duration::from_secs(30);
/// Between two audits.
const PAUSE: Duration = Duration::from_secs(120);
const NEIGHBOURS: &str = "^tenant-globex-.*-[A-Za-z0-9]{20}$";

pub(crate) async fn soak(minutes: usize, at_once: usize) -> String {
    // There is no pool: each login makes a lease.
    let proxy = Arc::new(Proxy::with(Settings::default()).await);
    let over = Arc::new(AtomicBool::new(false));
    let logins = Arc::new(Mutex::new(Vec::new()));
    let attacker = tokio::spawn(grant(Arc::clone(&proxy), Arc::clone(&over)));
    let refused = Arc::new(AtomicUsize::new(0));
    let neighbours: Vec<_> = (0..at_once)
        .map(|_| {
            let (proxy, over) = (Arc::clone(&proxy), Arc::clone(&over));
            tokio::spawn(neighbour(proxy, over, Arc::clone(&logins), Arc::clone(&refused)))
        })
        .collect();
    let audits = std::env::var("AUDIT").as_deref() != Ok("never");
    let timer = tokio::spawn(audit_by_timer(Arc::clone(&over), audits));

    let mut report = format!(
        "{minutes} minutes of grants to every leased role of a neighbour with {at_once} sessions at once; \
         {}; {} cores\n\n\
         seconds  its sessions  refused  login p50 ms   p99 ms  revoked roles that stay\n",
        if audits { "an audit every two minutes" } else { "no audit" },
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    let (began, mut sessions) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(60 * minutes as u64) {
        tokio::time::sleep(SAMPLE).await;
        let mut taken = std::mem::take(&mut *logins.lock().expect("whole"));
        sessions += taken.len();
        let (p50, p99) = (percentile(&mut taken, 50), percentile(&mut taken, 99));
        let (seconds, stay) = (began.elapsed().as_secs(), stopped().await);
        let refused = refused.load(Ordering::Relaxed);
        let line =
            format!("{seconds:7}  {sessions:12}  {refused:7}  {p50:12.1}  {p99:7.1}  {stay:23}");
        eprintln!("{line}");
        let _ = writeln!(report, "{line}");
    }
    over.store(true, Ordering::Relaxed);
    for neighbour in neighbours {
        neighbour.await.expect("no session of the neighbour went wrong");
    }
    let granted = attacker.await.expect("the attacker was served");
    timer.await.expect("the audits ended");
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    eventually("the neighbour's leases to be revoked", async || {
        world().leases("tenant-globex-rw").await.is_empty().then_some(())
    })
    .await;
    let stay = stopped().await;
    assert!(granted > 0, "the attack was none");
    let _ = writeln!(report, "\ngrants made: {granted}\nrevoked roles that stay: {stay}");
    conclude(report).await
}

/// Roles that are left cannot log in, OpenBAO has given nothing up, and an audit leaves none.
async fn conclude(mut report: String) -> String {
    assert_eq!(world().usable_roles_like(NEIGHBOURS).await, 0, "somebody may still log in");
    report += "roles of the neighbour that anybody can use: 0\n";
    let (_status, answer) = world().bao("GET", "sys/leases/count?type=irrevocable", None).await;
    assert_eq!(answer["data"]["lease_count"], json!(0));
    report += "irrevocable leases: 0\n";
    let began = Instant::now();
    let audited = audit().await;
    let said = String::from_utf8_lossy(&audited.stdout);
    assert!(audited.status.success(), "{said}{}", String::from_utf8_lossy(&audited.stderr));
    let superuser = world().superuser("postgres").await;
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ $1";
    let left: i64 = superuser.query_one(left, &[&NEIGHBOURS]).await.expect("asked").get(0);
    assert_eq!(left, 0, "{said}");
    let took = began.elapsed().as_secs_f64();
    let _ = writeln!(report, "left after the next audit, which took {took:.0} s: 0");
    report
}

async fn audit() -> Output {
    let mut audit = Command::new(programs::pgsiloctl());
    audit.args(["leases", "audit", "--fix", "--settle", "5s"]);
    for name in ["PGSILO_REGISTRY", "PROVISIONER_DSN", "PROVISIONER_BAO_TOKEN", "BAO_ADDR"] {
        audit.env(name, world().var(name));
    }
    audit.output().await.expect("it runs")
}

/// As docs/operations.md has it: again two minutes after the last one ended.
async fn audit_by_timer(over: Arc<AtomicBool>, audits: bool) {
    let mut rest = Duration::ZERO;
    while audits && !over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        rest += Duration::from_secs(1);
        if rest >= PAUSE {
            let began = Instant::now();
            let audited = audit().await;
            let said = String::from_utf8_lossy(&audited.stderr);
            let last = said.lines().last().unwrap_or_default();
            eprintln!("audit in {:.0} s: {last}", began.elapsed().as_secs_f64());
            rest = Duration::ZERO;
        }
    }
}

/// Grants to every leased role, without a pause; returns to how many.
async fn grant(proxy: Arc<Proxy>, over: Arc<AtomicBool>) -> usize {
    let token = mint::token_with("acme", json!({ "exp": mint::now() + 7200 }));
    let acme = proxy.connect(&token, "acme").await.expect("served");
    acme.batch_execute("CREATE TABLE IF NOT EXISTS hook (n int)").await.expect("made");
    let mut granted = HashSet::new();
    while !over.load(Ordering::Relaxed) {
        let query = "SELECT rolname::text FROM pg_roles WHERE rolname ~ $1 AND rolcanlogin";
        for row in acme.query(query, &[&NEIGHBOURS]).await.expect("answered") {
            let role: String = row.get(0);
            // It may be gone by now.
            if !granted.contains(&role)
                && acme.batch_execute(&format!("GRANT SELECT ON hook TO \"{role}\"")).await.is_ok()
            {
                granted.insert(role);
            }
        }
    }
    granted.len()
}

/// Logs in, works, and leaves, again and again; what is refused is counted.
async fn neighbour(
    proxy: Arc<Proxy>,
    over: Arc<AtomicBool>,
    logins: Arc<Mutex<Vec<f64>>>,
    refused: Arc<AtomicUsize>,
) {
    let token = mint::token_with("globex", json!({ "exp": mint::now() + 7200 }));
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        let Ok(client) = proxy.connect(&token, "globex").await else {
            refused.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        };
        logins.lock().expect("whole").push(began.elapsed().as_secs_f64() * 1000.0);
        let work = "SELECT count(*) FROM customers; SELECT pg_sleep(1)";
        client.simple_query(work).await.expect("answered");
    }
}

/// Revoked roles of the neighbour that are still there.
async fn stopped() -> i64 {
    let superuser = world().superuser("postgres").await;
    let query = "SELECT count(*) FROM pg_roles WHERE rolname ~ $1 AND NOT rolcanlogin";
    superuser.query_one(query, &[&NEIGHBOURS]).await.expect("asked").get(0)
}

fn percentile(times: &mut [f64], percent: usize) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len().saturating_sub(1) * percent / 100).copied().unwrap_or(f64::NAN)
}
