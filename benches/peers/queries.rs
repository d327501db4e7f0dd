//! Small prepared queries, as many as go through.

use crate::Plan;
use crate::contenders::{Contender, Contenders};
use crate::report::{Goal, Report};
use crate::rounds::{Score, play};
use crate::testbed::{Testbed, said};

/// What the goals count processor time for.
const QUERIES: f64 = 100_000.0;

pub(crate) fn run(plan: Plan, testbed: &Testbed, contenders: &Contenders, report: &mut Report) {
    for clients in [1, 8, 32] {
        let scores = tell(plan, testbed, &contenders.plain(), clients, report);
        let [direct, haproxy, _pgbouncer, pgsilo] = &scores[..] else { panic!("four") };
        let (ratio, haproxys) = (pgsilo.ratio(direct), haproxy.ratio(direct));
        match clients {
            1 => {
                let added = |score: &Score| (1.0 / score.value() - 1.0 / direct.value()) * 1e6;
                report.line(&format!(
                    "microseconds added: HAProxy {:.1}, pgsilo {:.1}",
                    added(haproxy),
                    added(pgsilo)
                ));
                report.goal(
                    "c1_added_us_vs_haproxy",
                    added(pgsilo) / added(haproxy),
                    Goal::AtMost(1.0),
                );
            }
            8 => {
                report.goal("c8_vs_direct", ratio, Goal::AtLeast(0.55));
                report.goal("c8_vs_haproxy", ratio / haproxys, Goal::AtLeast(1.0));
                report.goal("c8_cpu_s_per_100k", pgsilo.cost() * QUERIES, Goal::AtMost(1.7));
            }
            _ => report.goal("c32_vs_direct", ratio, Goal::AtLeast(0.64)),
        }
    }
    report.heading("pgbench -S -M prepared, 8 clients, TLS up to the proxy");
    let scores = measure(plan, testbed, &contenders.tls(), 8);
    report.table(&scores, "queries/s", (QUERIES, "CPU s / 100k"));
    let [direct, _pgbouncer, pgsilo] = &scores[..] else { panic!("three") };
    report.goal("tls_c8_vs_direct_tls", pgsilo.ratio(direct), Goal::AtLeast(0.60));
}

/// In clear.
pub(crate) fn tell(
    plan: Plan,
    testbed: &Testbed,
    contenders: &[Contender],
    clients: usize,
    report: &mut Report,
) -> Vec<Score> {
    report.heading(&format!("pgbench -S -M prepared, {clients} clients, in clear"));
    let scores = measure(plan, testbed, contenders, clients);
    report.table(&scores, "queries/s", (QUERIES, "CPU s / 100k"));
    scores
}

fn measure(plan: Plan, testbed: &Testbed, contenders: &[Contender], clients: usize) -> Vec<Score> {
    let (clients, jobs) = (clients.to_string(), clients.min(2).to_string());
    let args = ["--protocol", "prepared", "--client", &clients, "--jobs", &jobs];
    play(plan.rounds, contenders, |contender| pgbench(plan, testbed, contender, &args))
}

/// Selects for as long as a turn is: transactions a second, and transactions.
pub(crate) fn pgbench(
    plan: Plan,
    testbed: &Testbed,
    contender: &Contender,
    args: &[&str],
) -> (f64, f64) {
    let mut pgbench = testbed.program("pgbench");
    contender.told(&mut pgbench, testbed);
    pgbench.args(["--no-vacuum", "--select-only", "--time", &plan.seconds.to_string()]);
    let text = said(pgbench.args(args));
    (figure(&text, "tps = "), figure(&text, "number of transactions actually processed: "))
}

/// The number behind some words of what pgbench says.
fn figure(text: &str, before: &str) -> f64 {
    let rest = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in\n{text}")).1;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().expect("a number")
}
