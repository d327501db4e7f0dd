//! `make soak`: many short sessions through one pgsilo, and what is left of them: no role, no
//! lease, no descriptor, no memory.
//!
//! As an hour of a busy application goes: most clients work and terminate, some vanish in the
//! middle of a query or of their login, some show a wrong token; and some stay from the beginning
//! to the end, their leases renewed again and again. It prints a table, writes it into
//! `benches/runs/`, and fails where something is left or somebody was lost. Nothing in it is timed
//! to pass.
//!
//! `ATTACK=grants MINUTES=10 make soak` is another run: a tenant that grants something of its own
//! to every leased role of its neighbour (`soak/grants.rs`).

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a run fails by panicking and prints what it measured, and so does what it shares with the tests"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pgsilo_sandbox::testing;
use testing::proxy::{Proxy, Settings};
use testing::raw::{Raw, query, startup};
use testing::world::world;
use testing::{eventually, mint};
use time::OffsetDateTime;

#[path = "soak/grants.rs"]
mod grants;

/// Samples in a run.
const SAMPLES: usize = 10;
/// How much a process may have grown since the first sample: an allocator's slack.
const SLACK_KIB: usize = 4096;

/// Connections to OpenBAO are kept for the next request: as many as were needed at once.
const KEPT: usize = 16;

/// Sessions that stay, on leases of acme's that live for [`LEASE`].
const STAYING: usize = 20;
const LEASE: &str = "10s";
const ROLE: &str = "tenant-acme-soak";

/// What a process holds at one moment.
#[derive(Debug, Clone, Copy)]
struct Held {
    resident_kib: usize,
    descriptors: usize,
}

fn main() {
    let number = |name: &str, usual| {
        std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
    };
    let (sessions, at_once) = (number("SESSIONS", 10_000), number("AT_ONCE", 50));
    let attack = std::env::var("ATTACK").unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let (name, report) = match attack.as_str() {
        "" => ("soak", runtime.block_on(soak(sessions, at_once))),
        "grants" => ("grants", runtime.block_on(grants::soak(number("MINUTES", 10), at_once))),
        other => panic!("ATTACK={other}: there is `grants`"),
    };
    println!("{report}");
    let date = OffsetDateTime::now_utc().date();
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("benches/runs/{date}-{name}.txt"));
    fs::write(&file, report).expect("written");
}

async fn soak(sessions: usize, at_once: usize) -> String {
    let proxy = Proxy::with_role(ROLE, LEASE, "1h", Settings::default()).await;
    let proxy = Arc::new(proxy);
    let mut staying = Vec::new();
    for _ in 0..STAYING {
        staying.push(proxy.connect(&mint::token("acme"), "acme").await.expect("served"));
    }
    let mut report = format!(
        "{sessions} short sessions, {at_once} at once, and {STAYING} that stay on leases of {LEASE}; {} cores\n\n\
         sessions  seconds  resident KiB  descriptors\n",
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    // One of each kind first: what is made once is not growth.
    for kind in 0..20 {
        one(&proxy, kind).await;
    }
    let began = Instant::now();
    let mut samples = Vec::new();
    for sample in 0..=SAMPLES {
        if sample > 0 {
            many(&proxy, sessions / SAMPLES, at_once).await;
        }
        settle(&proxy).await;
        let held = held(proxy.pid());
        let (done, took) = (sessions / SAMPLES * sample, began.elapsed().as_secs_f64());
        let Held { resident_kib, descriptors } = held;
        let _ = writeln!(report, "{done:8}  {took:7.1}  {resident_kib:12}  {descriptors:11}");
        eprintln!("{done} sessions, {took:.1} s, {resident_kib} KiB, {descriptors} descriptors");
        samples.push(held);
    }
    for client in staying {
        client.simple_query("SELECT 1").await.expect("none of those that stay was lost");
    }
    let _ = writeln!(report, "\n{}", left(&proxy).await);
    let (first, last) = (samples[1], samples[SAMPLES]);
    assert!(
        last.resident_kib <= first.resident_kib + SLACK_KIB,
        "it grew from {} to {} KiB:\n{report}",
        first.resident_kib,
        last.resident_kib
    );
    assert!(last.descriptors <= first.descriptors + KEPT, "descriptors are left:\n{report}");
    report
}

async fn many(proxy: &Arc<Proxy>, sessions: usize, at_once: usize) {
    let next = Arc::new(AtomicUsize::new(0));
    let workers: Vec<_> = (0..at_once)
        .map(|_| {
            let (proxy, next) = (Arc::clone(proxy), Arc::clone(&next));
            tokio::spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= sessions {
                        return;
                    }
                    one(&proxy, number).await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("no session went wrong");
    }
}

/// One client. Of twenty, seventeen behave.
async fn one(proxy: &Proxy, number: usize) {
    let tenant = if number.is_multiple_of(3) { "acme" } else { "globex" };
    match number % 20 {
        17 => {
            let error = proxy.connect("no token", tenant).await.expect_err("refused");
            assert_eq!(error.code().map(|code| code.code()), Some("28P01"));
        }
        18 => {
            let mut client = Raw::unix(&proxy.socket()).await;
            client.log_in(&mint::token(tenant), tenant).await;
            client.send(&query("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")).await;
            // The database has begun to answer; the client is gone.
            assert_eq!(client.message().await.tag, b'T');
        }
        19 => {
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
            client.send_password(&mint::token(tenant)).await;
        }
        _ => {
            let client = proxy.connect(&mint::token(tenant), tenant).await.expect("served");
            let sql = "BEGIN; SELECT count(*) FROM customers; COMMIT";
            client.simple_query(sql).await.expect("answered");
        }
    }
}

/// Waits until nothing is under way any more.
async fn settle(proxy: &Proxy) {
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
    proxy.metric_reaches("pgsilo_sessions_active", STAYING as f64).await;
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    eventually("every other lease to be given back", async || {
        let leases = proxy.metric("pgsilo_leases_total").await;
        let revoked = proxy.metric("pgsilo_revocations_total").await;
        (revoked + STAYING as f64 == leases).then_some(())
    })
    .await;
}

fn held(pid: u32) -> Held {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|text| text.split_whitespace().next()).expect("VmRSS");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count();
    Held { resident_kib: resident.parse().expect("KiB"), descriptors }
}

/// What OpenBAO and PostgreSQL still have, once they had time to finish: nothing.
async fn left(proxy: &Proxy) -> String {
    eventually("no role to be of use", async || {
        (world().usable_roles_like("^tenant-.*-[A-Za-z0-9]{20}$").await == 0).then_some(())
    })
    .await;
    for role in [ROLE, "tenant-globex-rw"] {
        eventually("no lease to be left", async || {
            world().leases(role).await.is_empty().then_some(())
        })
        .await;
    }
    let superuser = world().superuser("postgres").await;
    // Somebody was logging in when they were stopped; a later revocation drops them.
    let stopped = "SELECT count(*) FROM pg_roles
        WHERE rolname ~ '^tenant-.*-[A-Za-z0-9]{20}$' AND NOT rolcanlogin";
    let stopped: i64 = superuser.query_one(stopped, &[]).await.expect("asked").get(0);
    let mut report = format!(
        "leased roles left that anybody can use: 0\nleased roles left that nobody can: {stopped}\nleases left: 0\n"
    );
    for metric in [
        "pgsilo_connections_total",
        "pgsilo_sessions_total",
        "pgsilo_leases_total",
        "pgsilo_revocations_total",
        "pgsilo_revocation_failures_total",
        "pgsilo_renewals_total",
        "pgsilo_renewal_failures_total",
        "pgsilo_abandoned_total",
        "pgsilo_refusals_total{reason=\"token_invalid\"}",
    ] {
        let _ = writeln!(report, "{metric} {}", proxy.metric(metric).await);
    }
    report
}
