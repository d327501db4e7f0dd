//! Rounds: every contender takes its turn in each.

use crate::contenders::Contender;
use crate::machine::{self, Use};

/// The share of the processors that others may have had in a turn that counts.
pub(crate) const NOISE: f64 = 0.10;
/// How often a turn is taken at most, for the quietest one to count.
pub(crate) const TRIES: usize = 3;

/// One turn of one contender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    /// What it is about: queries a second, milliseconds, bytes a second.
    pub(crate) value: f64,
    /// What was done in it, for costs to be divided by: queries, bytes.
    pub(crate) work: f64,
    /// Processor time of the contender, in seconds.
    pub(crate) cpu: f64,
    /// The share of all processors that others had.
    pub(crate) noise: f64,
}

/// What a contender has done in all rounds, in their order.
#[derive(Debug)]
pub(crate) struct Score {
    pub(crate) contender: Contender,
    pub(crate) turns: Vec<Turn>,
}

/// Runs the rounds. `turn` returns a value and the work done.
pub(crate) fn play(
    rounds: usize,
    contenders: &[Contender],
    mut turn: impl FnMut(&Contender) -> (f64, f64),
) -> Vec<Score> {
    let mut scores: Vec<Score> = contenders
        .iter()
        .map(|contender| Score { contender: *contender, turns: Vec::new() })
        .collect();
    for round in 0..rounds {
        for number in 0..scores.len() {
            // The first one of a round is the last of the next.
            let number = (number + round) % scores.len();
            let score = &mut scores[number];
            score.turns.push(quiet(|| take(&score.contender, &mut turn)));
        }
    }
    scores
}

/// The first turn that was quiet, or the quietest.
fn quiet(mut take: impl FnMut() -> Turn) -> Turn {
    let mut best = take();
    for _ in 1..TRIES {
        if best.noise <= NOISE {
            break;
        }
        let again = take();
        if again.noise < best.noise {
            best = again;
        }
    }
    best
}

fn take(contender: &Contender, turn: &mut impl FnMut(&Contender) -> (f64, f64)) -> Turn {
    let cpu = |pid: Option<u32>| pid.map_or(0.0, machine::cpu_seconds);
    let (began, used) = (Use::now(), cpu(contender.pid));
    let (value, work) = turn(contender);
    let cpu = cpu(contender.pid) - used;
    Turn { value, work, cpu, noise: Use::taken_by_others(began) }
}

impl Score {
    /// The median value.
    pub(crate) fn value(&self) -> f64 {
        median(self.turns.iter().map(|turn| turn.value))
    }

    /// The median cost of one unit of work, in seconds of a processor.
    pub(crate) fn cost(&self) -> f64 {
        median(self.turns.iter().map(|turn| turn.cpu / turn.work))
    }

    /// The median of the ratios to another's value in the same round.
    pub(crate) fn ratio(&self, to: &Score) -> f64 {
        median(self.turns.iter().zip(&to.turns).map(|(own, other)| own.value / other.value))
    }

    /// The worst noise of a turn that counts.
    pub(crate) fn noise(&self) -> f64 {
        self.turns.iter().map(|turn| turn.noise).fold(0.0, f64::max)
    }
}

/// The middle of some figures.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The figure below which a share of them lies.
pub(crate) fn quantile(values: impl Iterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    assert!(!values.is_empty(), "nothing was measured");
    let place = (values.len() - 1) as f64 * share;
    let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
    low + (high - low) * place.fract()
}
