//! Tables for people, lines for machines, and a file with both.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use time::OffsetDateTime;

use crate::Plan;
use crate::contenders::{Contenders, processors};
use crate::rounds::Score;
use crate::testbed::Testbed;

/// What is wished of a figure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

/// What will be printed.
#[derive(Debug)]
pub(crate) struct Report {
    text: String,
    goals: Vec<(String, f64, Goal)>,
}

impl Report {
    pub(crate) fn new(plan: Plan, testbed: &Testbed, contenders: &Contenders) -> Report {
        let mut text = String::new();
        let date = OffsetDateTime::now_utc().date();
        let _ = writeln!(text, "{date}, {} processors; {}", processors(), processor());
        let _ = writeln!(text, "{}", contenders.versions.join("; "));
        let Plan { rounds, seconds, .. } = plan;
        let _ = writeln!(text, "{rounds} rounds, {seconds} s a turn, medians");
        let _ = writeln!(text, "PostgreSQL on port {} of loopback", testbed.port());
        print!("{text}");
        Report { text, goals: Vec::new() }
    }

    /// Of a run with pgsilo alone.
    pub(crate) fn of_pgsilo(plan: Plan) -> Report {
        let mut report = Report { text: String::new(), goals: Vec::new() };
        let date = OffsetDateTime::now_utc().date();
        report.line(&format!("{date}, {} processors; {}", processors(), processor()));
        report.line(&format!("{} s a unit of time", plan.seconds));
        report
    }

    /// A line, with a line break behind it.
    pub(crate) fn line(&mut self, line: &str) {
        println!("{line}");
        self.text += line;
        self.text.push('\n');
    }

    /// A heading, with an empty line before it.
    pub(crate) fn heading(&mut self, heading: &str) {
        self.line("");
        self.line(heading);
    }

    /// Every contender's value, ratio to the first one's, and cost of some work.
    pub(crate) fn table(&mut self, scores: &[Score], value: &str, (work, unit): (f64, &str)) {
        self.line(&format!(
            "{:12} {value:>14} {:>8} {unit:>18} {:>8}",
            "", "/ direct", "others' CPU"
        ));
        for score in scores {
            let cost = match score.contender.pid {
                Some(_) => format!("{:.3}", score.cost() * work),
                None => String::new(),
            };
            self.line(&format!(
                "{:12} {:>14.1} {:>8.3} {cost:>18} {:>7.0}%",
                score.contender.name,
                score.value(),
                score.ratio(&scores[0]),
                score.noise() * 100.0
            ));
        }
        for score in scores {
            let turns: Vec<String> =
                score.turns.iter().map(|turn| format!("{:.1}", turn.value)).collect();
            self.text += &format!("  raw {} {}\n", score.contender.name, turns.join(" "));
        }
    }

    /// A figure that has a goal.
    pub(crate) fn goal(&mut self, name: &str, value: f64, goal: Goal) {
        self.goals.push((name.to_owned(), value, goal));
    }

    /// A line for each goal.
    pub(crate) fn goals_in_lines(&mut self) {
        self.heading("Goals");
        for (name, value, goal) in std::mem::take(&mut self.goals) {
            let (met, wish) = match goal {
                Goal::AtLeast(least) => (value >= least, format!(">= {least:.3}")),
                Goal::AtMost(most) => (value <= most, format!("<= {most:.3}")),
            };
            let verdict = if met { "met" } else { "MISSED" };
            self.line(&format!("ratio {name} {value:.3}  {wish} {verdict}"));
        }
    }

    /// Writes all of it into a dated file.
    pub(crate) fn write(&self, runs: &Path, name: &str) {
        let date = OffsetDateTime::now_utc().date();
        fs::create_dir_all(runs).expect("a folder");
        let file = runs.join(format!("{date}-{name}.txt"));
        fs::write(&file, &self.text).expect("written");
        eprintln!("written: {}", file.display());
    }
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |text| text.trim_start_matches([' ', '\t', ':']));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}; Linux {}", kernel.trim())
}
