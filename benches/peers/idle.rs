//! What a session costs that does nothing, before and after 2 MB went through it.

use std::time::Duration;

use pgsilo_sandbox::testing::eventually;

use crate::Plan;
use crate::client::{open, take};
use crate::contenders::{Contender, Contenders};
use crate::machine::memory_kib;
use crate::report::{Goal, Report};
use crate::testbed::Testbed;

/// Sessions before the first look: what a contender makes once is not a session's.
const WARM_UP: usize = 50;
const THROUGH: usize = 2_000_000;

struct Held {
    fresh: f64,
    used: f64,
}

pub(crate) async fn run(
    plan: Plan,
    testbed: &Testbed,
    contenders: &Contenders,
    report: &mut Report,
) {
    report.heading(&format!(
        "KiB of memory (PSS) for each of {} idle sessions: fresh, and after {} MB",
        plan.idle,
        THROUGH / 1_000_000
    ));
    for contender in [contenders.haproxy, contenders.pgbouncer, contenders.pgsilo] {
        tell(plan, testbed, &contender, report).await;
    }
    // Processes of their own: memory that sessions in clear have left would serve these.
    let fresh = Contenders::start(testbed).await;
    for contender in [fresh.pgbouncer_tls, fresh.pgsilo_tls] {
        tell(plan, testbed, &contender, report).await;
    }
}

async fn tell(plan: Plan, testbed: &Testbed, contender: &Contender, report: &mut Report) {
    let Held { fresh, used } = measure(plan, testbed, contender).await;
    let how = if contender.tls { "tls" } else { "clear" };
    report.line(&format!("{:12} {how:>6} {fresh:>8.2} {used:>8.2}", contender.name));
    if contender.is_pgsilo() {
        let most = if contender.tls { 12.0 } else { 2.0 };
        report.goal(&format!("idle_{how}_kib"), fresh, Goal::AtMost(most));
        report.goal(&format!("idle_{how}_after_2mb_vs_before"), used / fresh, Goal::AtMost(1.05));
    }
}

async fn measure(plan: Plan, testbed: &Testbed, contender: &Contender) -> Held {
    testbed.quiet().await;
    let pid = contender.pid.expect("a process of its own");
    let _first = open(contender, testbed, WARM_UP, 1).await;
    let before = settled(pid).await;
    // One after the other: what many logins at once need is another question.
    let mut sessions = open(contender, testbed, plan.idle, 1).await;
    let fresh = settled(pid).await;
    for session in &mut sessions {
        take(session, THROUGH).await;
    }
    let used = settled(pid).await;
    let each = |kib: f64| (kib - before) / plan.idle as f64;
    Held { fresh: each(fresh), used: each(used) }
}

/// The memory of a process once it no longer changes.
pub(crate) async fn settled(pid: u32) -> f64 {
    let mut last = f64::NAN;
    eventually("memory to settle", async || {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = memory_kib(pid);
        let same = (now - last).abs() < 16.0;
        last = now;
        same.then_some(now)
    })
    .await
}
