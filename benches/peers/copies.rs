//! COPY out of the database and into it.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use pgsilo_sandbox::testing::proxy::folder;

use crate::Plan;
use crate::contenders::{Contender, Contenders};
use crate::report::{Goal, Report};
use crate::rounds::{Score, play};
use crate::testbed::{Testbed, said};

const GB: f64 = 1e9;
const ROW: usize = 1000;

pub(crate) fn run(plan: Plan, testbed: &Testbed, contenders: &Contenders, report: &mut Report) {
    let out = out(plan, testbed, &contenders.plain(), report);
    let [direct, _, _, pgsilo] = &out[..] else { panic!("four") };
    report.goal("copy_out_vs_direct", pgsilo.ratio(direct), Goal::AtLeast(1.2));
    report.goal("copy_out_cpu_s_per_gb", pgsilo.cost() * GB, Goal::AtMost(0.6));

    let into = into(plan, testbed, &contenders.plain(), report);
    let [direct, _, _, pgsilo] = &into[..] else { panic!("four") };
    report.goal("copy_in_vs_direct", pgsilo.ratio(direct), Goal::AtLeast(0.97));
    report.goal("copy_in_cpu_s_per_gb", pgsilo.cost() * GB, Goal::AtMost(0.5));
}

pub(crate) fn out(
    plan: Plan,
    testbed: &Testbed,
    contenders: &[Contender],
    report: &mut Report,
) -> Vec<Score> {
    let rows = rows(plan);
    let sql = format!("COPY (SELECT repeat('x', {ROW}) FROM generate_series(1, {rows})) TO STDOUT");
    measure(plan, testbed, contenders, report, "out", |psql| {
        psql.args(["--output", "/dev/null", "--command", &sql]);
    })
}

pub(crate) fn into(
    plan: Plan,
    testbed: &Testbed,
    contenders: &[Contender],
    report: &mut Report,
) -> Vec<Score> {
    let rows = rows(plan);
    let dir = folder();
    let file = dir.join("rows");
    write_rows(&file, rows);
    // Nothing is kept, so that no round is slower than the one before.
    let sql = "BEGIN; TRUNCATE copied; COPY copied FROM STDIN WITH (FREEZE); ROLLBACK";
    let scores = measure(plan, testbed, contenders, report, "in", |psql| {
        psql.args(["--set", "ON_ERROR_STOP=1", "--command", sql]);
        psql.stdin(File::open(&file).expect("opened"));
    });
    fs::remove_dir_all(dir).expect("removed");
    scores
}

fn rows(plan: Plan) -> usize {
    plan.seconds as usize * 250_000
}

/// Has each contender's psql move those bytes.
fn measure(
    plan: Plan,
    testbed: &Testbed,
    contenders: &[Contender],
    report: &mut Report,
    way: &str,
    asks: impl Fn(&mut Command),
) -> Vec<Score> {
    let bytes = (rows(plan) * (ROW + 1)) as f64;
    report.heading(&format!("COPY {way}, {:.2} GB in rows of {ROW} bytes, in clear", bytes / GB));
    let scores = play(plan.rounds, contenders, |contender| {
        let mut psql = testbed.program("psql");
        contender.told(&mut psql, testbed);
        psql.args(["--no-psqlrc", "--quiet"]);
        asks(&mut psql);
        let began = Instant::now();
        said(&mut psql);
        (bytes / 1e6 / began.elapsed().as_secs_f64(), bytes)
    });
    report.table(&scores, "MB/s", (GB, "CPU s / GB"));
    scores
}

fn write_rows(file: &Path, rows: usize) {
    let mut writer = BufWriter::new(File::create(file).expect("made"));
    let row = "x".repeat(ROW) + "\n";
    for _ in 0..rows {
        writer.write_all(row.as_bytes()).expect("written");
    }
    writer.flush().expect("written");
}
