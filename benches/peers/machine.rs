//! What processes and the machine used: read from /proc.

use std::collections::{HashMap, HashSet};
use std::fs;

/// A clock tick, which /proc counts in: `USER_HZ` is 100 wherever Linux runs today.
const TICK: f64 = 0.01;

/// Seconds of processor time that a process has used so far, to the nanosecond: `schedstat` of each
/// of its threads. Threads that have ended are not in it.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
    let nanoseconds = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Memory that is a process's own, in KiB: its proportional set size.
pub(crate) fn memory_kib(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
    let pss = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
    pss.trim().trim_end_matches("kB").trim().parse().expect("KiB")
}

/// All processor time, at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Use {
    /// Of every processor, idle or not.
    all: f64,
    /// Not idle.
    busy: f64,
    /// Taken by the machine below.
    stolen: f64,
    /// By this process and everything that it has started.
    ours: f64,
}

impl Use {
    pub(crate) fn now() -> Use {
        let text = fs::read_to_string("/proc/stat").expect("/proc/stat");
        let line = text.lines().next().expect("a line");
        let ticks: Vec<f64> =
            line.split_whitespace().skip(1).filter_map(|text| text.parse().ok()).collect();
        let [user, nice, system, idle, iowait, irq, softirq, stolen, ..] = ticks[..] else {
            panic!("/proc/stat has another form")
        };
        let busy = user + nice + system + irq + softirq;
        let all = busy + idle + iowait + stolen;
        Use { all: all * TICK, busy: busy * TICK, stolen: stolen * TICK, ours: family() }
    }

    /// The share of all processors that others had since then, from 0 to 1. Interrupts count as
    /// theirs, so it is a little more than that.
    pub(crate) fn taken_by_others(since: Use) -> f64 {
        let now = Use::now();
        let others = (now.busy - since.busy) - (now.ours - since.ours);
        ((others.max(0.0) + now.stolen - since.stolen) / (now.all - since.all)).max(0.0)
    }
}

/// Seconds that this process and its descendants have used, those that have ended included.
fn family() -> f64 {
    let mut parents: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut used: HashMap<u32, f64> = HashMap::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The program's name may hold blanks and parentheses; what follows it does not.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let parent = fields[1].parse().expect("a pid");
        parents.entry(parent).or_default().push(pid);
        let ticks = fields[11..15].iter().filter_map(|text| text.parse::<f64>().ok());
        used.insert(pid, ticks.sum::<f64>() * TICK);
    }
    let (mut seen, mut queue) = (HashSet::new(), vec![std::process::id()]);
    let mut sum = 0.0;
    while let Some(pid) = queue.pop() {
        if seen.insert(pid) {
            sum += used.get(&pid).copied().unwrap_or_default();
            queue.extend(parents.get(&pid).into_iter().flatten());
        }
    }
    sum
}
