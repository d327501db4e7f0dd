//! How long it takes to be let in, and how often it can be done.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use pgsilo_sandbox::testing::proxy::Proxy;

use crate::Plan;
use crate::contenders::{Contender, Contenders};
use crate::queries::pgbench;
use crate::report::{Goal, Report};
use crate::rounds::{median, play, quantile};
use crate::testbed::{Testbed, variable};

/// Logins a second at each contender.
const RATE: u32 = 20;
/// The stages of a login, as pgsilo's metric names them.
const STAGES: [&str; 5] = ["secured", "identified", "routed", "leased", "attached"];

pub(crate) async fn run(
    plan: Plan,
    testbed: &Testbed,
    contenders: &Contenders,
    report: &mut Report,
) {
    let Contenders { prewarm, prewarm_tls, reuse, reuse_tls, .. } = *contenders;
    let clear: Vec<_> = contenders.plain().into_iter().chain([prewarm, reuse]).collect();
    let tls: Vec<_> = contenders.tls().into_iter().chain([prewarm_tls, reuse_tls]).collect();
    for (how, all) in [("clear", clear), ("tls", tls)] {
        logins(plan, testbed, &all, how, contenders.proxy(), report).await;
        churn(plan, testbed, &all, how, report);
    }
}

async fn logins(
    plan: Plan,
    testbed: &Testbed,
    all: &[Contender],
    how: &str,
    proxy: &Proxy,
    report: &mut Report,
) {
    report.heading(&format!("A login by libpq, {RATE} a second at each, {how}: milliseconds"));
    let before = stages(proxy).await;
    let times = time(plan, testbed, all);
    let after = stages(proxy).await;
    report.line(&format!("{:12} {:>8} {:>8} {:>8} {:>8}", "", "p50", "p90", "p99", "/ direct"));
    let at = |times: &[f64], share| quantile(times.iter().copied(), share) * 1e3;
    for (contender, own) in all.iter().zip(&times) {
        // Of the same number in the same round.
        let ratio = median(own.iter().zip(&times[0]).map(|(own, direct)| own / direct));
        report.line(&format!(
            "{:12} {:>8.2} {:>8.2} {:>8.2} {ratio:>8.3}",
            contender.name,
            at(own, 0.5),
            at(own, 0.9),
            at(own, 0.99)
        ));
        match contender.name {
            "pgsilo" => {
                report.goal(&format!("login_cold_{how}_vs_direct"), ratio, Goal::AtMost(2.0));
            }
            "pgsilo prewarm" => {
                report.goal(&format!("login_prewarm_{how}_vs_direct"), ratio, Goal::AtMost(0.5));
            }
            "pgsilo reuse" if !contender.tls => {
                report.goal("login_reuse_clear_ms", at(own, 0.5), Goal::AtMost(1.0));
            }
            _ => {}
        }
    }
    let means = STAGES.iter().zip(before.iter().zip(&after)).map(|(stage, (before, after))| {
        let mean = (after.0 - before.0) / (after.1 - before.1) * 1e3;
        format!("{stage} {mean:.2}")
    });
    report.line(&format!("of pgsilo's, by stage: {}", means.collect::<Vec<_>>().join(", ")));
}

/// What each login took, in seconds.
fn time(plan: Plan, testbed: &Testbed, all: &[Contender]) -> Vec<Vec<f64>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/connects.py");
    let mut command = Command::new(variable("PGSILO_PYTHON"));
    command.arg(script).arg(plan.connects.to_string()).arg(RATE.to_string());
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python starts");
    let mut targets = child.stdin.take().expect("piped");
    for contender in all {
        writeln!(targets, "{}", contender.conninfo(testbed)).expect("told");
    }
    drop(targets);
    let output = child.wait_with_output().expect("waited");
    assert!(output.status.success(), "a login failed");
    let text = String::from_utf8(output.stdout).expect("text");
    let times = text
        .lines()
        .map(|line| line.split_whitespace().map(|text| text.parse().expect("seconds")).collect());
    times.collect()
}

/// Seconds and number of each stage so far.
async fn stages(proxy: &Proxy) -> Vec<(f64, f64)> {
    let (_status, text) = proxy.get("/metrics").await;
    let read = |stage: &str, what: &str| {
        let name = format!("pgsilo_stage_seconds_{what}{{stage=\"{stage}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name));
        value.map_or(0.0, |value| value.parse().expect("a number"))
    };
    STAGES.iter().map(|stage| (read(stage, "sum"), read(stage, "count"))).collect()
}

/// Applications that connect for each query.
fn churn(plan: Plan, testbed: &Testbed, all: &[Contender], how: &str, report: &mut Report) {
    report.heading(&format!("pgbench -S -C, 4 clients, {how}: a login for each query"));
    let args = ["--connect", "--client", "4", "--jobs", "2"];
    let scores = play(plan.rounds, all, |contender| pgbench(plan, testbed, contender, &args));
    report.table(&scores, "logins/s", (1000.0, "CPU s / 1000"));
    let [direct, .., reuse] = &scores[..] else { panic!("several") };
    if !direct.contender.tls {
        report.goal("churn_reuse_vs_direct", reuse.ratio(direct), Goal::AtLeast(10.0));
    }
}
