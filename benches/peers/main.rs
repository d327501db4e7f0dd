//! `make bench`: pgsilo beside a direct connection, PgBouncer and HAProxy, in one run.
//!
//! Everything runs on loopback, with the packaged programs and a real PostgreSQL and OpenBAO. The
//! contenders take turns in every round, so that what the machine does meanwhile meets all of them,
//! and a round in which others used the processors is run again. Figures are medians; ratios are
//! medians of the ratios within each round. Every goal has a line `ratio NAME VALUE`, met or not.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a run fails by panicking and prints what it measured, and so does what it shares with the tests"
)]

mod client;
mod connects;
mod contenders;
mod copies;
mod endings;
mod idle;
mod machine;
mod neighbour;
mod queries;
mod relays;
mod report;
mod rounds;
mod scale;
mod stand_in;
#[path = "../strangers/mod.rs"]
mod strangers;
mod testbed;

use std::path::{Path, PathBuf};

use contenders::Contenders;
use report::Report;
use testbed::Testbed;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Plan {
    rounds: usize,
    /// Of one contender in one round.
    seconds: u32,
    /// Idle sessions of each contender.
    idle: usize,
    /// Idle sessions of a contender in front of a stand-in for a database.
    many: usize,
    /// And in front of PostgreSQL.
    real: usize,
    /// Connects of each contender, at 20 a second.
    connects: usize,
}

const FULL: Plan =
    Plan { rounds: 7, seconds: 3, idle: 1000, many: 10_000, real: 2000, connects: 200 };
const QUICK: Plan = Plan { rounds: 3, seconds: 1, idle: 100, many: 900, real: 90, connects: 20 };

fn main() {
    let quick = std::env::var("QUICK").is_ok_and(|text| !text.is_empty() && text != "0");
    let plan = if quick { QUICK } else { FULL };
    let only = std::env::var("ONLY").unwrap_or_default();
    let wants = |part: &str| only.is_empty() || only.split(',').any(|name| name == part);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    // These have a fixture of their own, without other contenders.
    if matches!(only.as_str(), "neighbour" | "endings") {
        runtime.block_on(async {
            let mut report = Report::of_pgsilo(plan);
            match only.as_str() {
                "neighbour" => neighbour::run(plan, &mut report).await,
                _ => endings::run(plan, &mut report).await,
            }
            report.write(&runs(), &named(&only, quick));
        });
        return;
    }
    runtime.block_on(async {
        let testbed = Testbed::start(plan.idle.max(plan.real)).await;
        let contenders = Contenders::start(&testbed).await;
        let mut report = Report::new(plan, &testbed, &contenders);
        if wants("queries") {
            queries::run(plan, &testbed, &contenders, &mut report);
        }
        if wants("copies") {
            copies::run(plan, &testbed, &contenders, &mut report);
        }
        if wants("connects") {
            connects::run(plan, &testbed, &contenders, &mut report).await;
        }
        if wants("idle") {
            idle::run(plan, &testbed, &contenders, &mut report).await;
        }
        if wants("scale") {
            scale::run(plan, &testbed, &mut report).await;
        }
        // For work on the relay.
        if !only.is_empty() && wants("relays") {
            relays::run(plan, &testbed, &contenders, &mut report).await;
        }
        report.goals_in_lines();
        // A part of the benchmark is for work on that part.
        let name = match only.as_str() {
            "" => "bench",
            "relays" => "relays",
            _ => return,
        };
        report.write(&runs(), &named(name, quick));
    });
}

/// Where runs are written.
fn runs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/runs")
}

fn named(name: &str, quick: bool) -> String {
    if quick { format!("{name}-quick") } else { name.to_owned() }
}
