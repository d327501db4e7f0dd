//! Many idle sessions and one that works among them: what each costs must not depend on how many
//! there are.

use std::time::Instant;

use rustix::process::{Resource, getrlimit};

use crate::Plan;
use crate::client::{enter, open};
use crate::contenders::{Contender, Contenders, Many};
use crate::idle::settled;
use crate::machine::{Use, cpu_seconds};
use crate::report::{Goal, Report};
use crate::rounds::{NOISE, TRIES, quantile};
use crate::testbed::Testbed;

/// Clients that log in at once.
const AT_ONCE: usize = 16;
/// Sessions before the first look: what is made once is not a session's.
const WARM_UP: usize = 50;
/// Queries of the one that works, for each look and second of a turn.
const QUERIES: usize = 3000;
/// Descriptors that are not for these sessions: the warm-up's, and what programs keep for
/// themselves.
const SPARE: usize = 1000;

/// What was seen at one look.
#[derive(Debug, Clone, Copy)]
struct Look {
    sessions: usize,
    kib: f64,
    /// Of the contender, for each login since the look before.
    login_ms: f64,
    /// Microseconds that 99 of 100 queries of the one that works take at most.
    p99: f64,
}

pub(crate) async fn run(plan: Plan, testbed: &Testbed, report: &mut Report) {
    // This process has both ends of it.
    let limit = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
    let many = plan.many.min(limit.saturating_sub(SPARE) / 2);
    if many < plan.many {
        report
            .line(&format!("{limit} descriptors are allowed: {many} sessions, not {}", plan.many));
    }
    let to_stand_in = Many::start(testbed, many + 2 * WARM_UP).await;
    title(report, many, "a stand-in for a database");
    tell_direct(plan, testbed, &to_stand_in.direct, report).await;
    for contender in [to_stand_in.haproxy, to_stand_in.pgsilo] {
        let looks = fill(plan, testbed, &contender, many, report).await;
        if contender.is_pgsilo() {
            goals("scale", &looks, report);
        }
    }
    drop(to_stand_in);

    // Processes of their own: memory that other sessions have left would serve these.
    let fresh = Contenders::start(testbed).await;
    title(report, plan.real, "PostgreSQL");
    tell_direct(plan, testbed, &fresh.direct, report).await;
    for contender in [fresh.haproxy, fresh.pgbouncer, fresh.pgsilo] {
        testbed.quiet().await;
        let looks = fill(plan, testbed, &contender, plan.real, report).await;
        if contender.is_pgsilo() {
            goals("scale_real", &looks, report);
        }
    }
}

fn title(report: &mut Report, sessions: usize, of: &str) {
    report.heading(&format!("{sessions} idle sessions with {of}, and one that works among them"));
    report.line(&format!(
        "{:12} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "", "sessions", "KiB each", "logins/s", "ms CPU", "query us", "p99 us"
    ));
}

async fn tell_direct(plan: Plan, testbed: &Testbed, direct: &Contender, report: &mut Report) {
    let (p50, p99) = work(plan, testbed, direct).await;
    report.line(&format!("direct: {p50:.1} us, 99 of 100 within {p99:.1} us"));
}

/// The last looks against the first ones.
fn goals(name: &str, looks: &[Look], report: &mut Report) {
    let [alone, first, .., last] = looks else { panic!("several looks") };
    let each = |look: &Look| (look.kib - alone.kib) / look.sessions as f64;
    report.goal(&format!("{name}_kib_last_vs_first"), each(last) / each(first), Goal::AtMost(1.1));
    let cpu = last.login_ms / first.login_ms;
    report.goal(&format!("{name}_login_cpu_last_vs_first"), cpu, Goal::AtMost(1.25));
    report.goal(&format!("{name}_p99_among_vs_alone"), last.p99 / alone.p99, Goal::AtMost(1.25));
}

/// Opens the sessions, and looks on the way. They are closed when the last look is over.
async fn fill(
    plan: Plan,
    testbed: &Testbed,
    contender: &Contender,
    all: usize,
    report: &mut Report,
) -> Vec<Look> {
    let pid = contender.pid.expect("a process of its own");
    let (p50, p99) = work(plan, testbed, contender).await;
    let mut sessions = open(contender, testbed, WARM_UP, AT_ONCE).await;
    let kib = settled(pid).await;
    let alone = Look { sessions: 0, kib, login_ms: 0.0, p99 };
    report.line(&format!(
        "{:12} {:>8} {:>10} {:>10} {:>10} {p50:>10.1} {p99:>10.1}",
        contender.name, 0, "", "", ""
    ));
    let mut looks = vec![alone];
    for step in 1..=plan.rounds {
        let wanted = all * step / plan.rounds;
        let new = WARM_UP + wanted - sessions.len();
        let (began, used) = (Instant::now(), cpu_seconds(pid));
        sessions.extend(open(contender, testbed, new, AT_ONCE).await);
        let logins = new as f64 / began.elapsed().as_secs_f64();
        let login_ms = (cpu_seconds(pid) - used) / new as f64 * 1e3;
        let kib = settled(pid).await;
        let (p50, p99) = work(plan, testbed, contender).await;
        let look = Look { sessions: wanted, kib, login_ms, p99 };
        report.line(&format!(
            "{:12} {:>8} {:>10.2} {logins:>10.0} {login_ms:>10.2} {p50:>10.1} {p99:>10.1}",
            contender.name,
            look.sessions,
            (kib - alone.kib) / look.sessions as f64
        ));
        looks.push(look);
    }
    looks
}

/// A session that asks one small question after the other: the middle and the slowest hundredth of
/// its times, in microseconds. Asked again when others had the processors.
async fn work(plan: Plan, testbed: &Testbed, contender: &Contender) -> (f64, f64) {
    let mut client = enter(contender, testbed, &contender.password(testbed)).await;
    let (mut quietest, mut best) = (f64::INFINITY, (f64::NAN, f64::NAN));
    for _ in 0..TRIES {
        let (turn, mut times) = (Use::now(), Vec::new());
        for _ in 0..QUERIES * plan.seconds as usize {
            let began = Instant::now();
            client.ask("SELECT '1'").await;
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        let noise = Use::taken_by_others(turn);
        if noise < quietest {
            quietest = noise;
            best = (quantile(times.iter().copied(), 0.5), quantile(times.iter().copied(), 0.99));
        }
        if noise <= NOISE {
            break;
        }
    }
    best
}
