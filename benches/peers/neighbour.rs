//! What a tenant has of its neighbour's attacks, and of a stranger's: the times of its queries and
//! logins, quiet and under each, with the sandbox's own PostgreSQL and OpenBAO.
//!
//! The attacks are the parts' own: nothing stands in for a database or an OpenBAO but where the
//! attacker is the database. Each meets a pgsilo of its own, so that nothing of one reaches the
//! next.

mod admin;
mod arena;
mod chains;
mod handshakes;
mod locks;
mod log;
mod logins;
mod measure;
mod revocations;
mod scram;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::LocalBoxFuture;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::Plan;
use crate::report::Report;
use arena::{Arena, Fixture};
use measure::{Measured, Neighbour};

/// How long an attack is waited for to be in force. It goes on whether it is or not.
const RUN_UP: Duration = Duration::from_secs(8);
/// From the neighbour's first query to the attack.
const WARM_UP: Duration = Duration::from_secs(2);
/// What hung during an attack may come to its end behind it.
const TAIL: Duration = Duration::from_secs(12);

/// One of the attacks.
struct Attack {
    name: &'static str,
    /// What it does, and how much of it.
    what: &'static str,
    begin: fn(Arc<Arena>) -> LocalBoxFuture<'static, Held>,
}

/// An attack that is under way, for as long as it is held.
struct Held {
    /// It ends with them.
    _tasks: JoinSet<()>,
    end: Option<Box<dyn FnOnce() + Send>>,
}

impl Held {
    fn by(tasks: JoinSet<()>) -> Held {
        Held { _tasks: tasks, end: None }
    }

    fn ending(mut self, end: impl FnOnce() + Send + 'static) -> Held {
        self.end = Some(Box::new(end));
        self
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end();
        }
    }
}

const QUIET: Attack = Attack {
    name: "quiet",
    what: "nobody attacks",
    begin: |_arena| Box::pin(async { Held::by(JoinSet::new()) }),
};

/// In the order of the table.
const ATTACKS: [Attack; 10] = [
    QUIET,
    logins::ATTACK,
    log::ATTACK,
    locks::ATTACK,
    handshakes::ATTACK,
    admin::ATTACK,
    scram::ATTACK,
    chains::REFUSED,
    chains::LOOKED_AT,
    revocations::ATTACK,
];

/// Prints the table, and a line for each attack of what it was.
pub(crate) async fn run(plan: Plan, report: &mut Report) {
    let window = Duration::from_secs(u64::from(plan.seconds) * 5);
    let fixture = Fixture::start().await;
    report.line(&format!(
        "{}; OpenBAO {}; pgsilo {}",
        fixture.server(),
        fixture.openbao().await,
        env!("CARGO_PKG_VERSION")
    ));
    report.heading(&format!(
        "A neighbour under attack: {} s each; {}",
        window.as_secs(),
        measure::WHAT
    ));
    report.line(&format!("{:20} {}", "", Measured::TITLE));
    let only = std::env::var("ATTACK").unwrap_or_default();
    let wanted =
        |attack: &&Attack| only.is_empty() || only.split(',').any(|name| name == attack.name);
    for attack in ATTACKS.iter().filter(wanted) {
        let measured = under(attack, &fixture, window).await;
        report.line(&format!("{:20} {measured}", attack.name));
    }
    report.line("");
    report
        .line(&format!("of pgsilo's configuration: {}", arena::LIMITS.trim().replace('\n', ", ")));
    if let Ok(more) = std::env::var("LIMITS") {
        report.line(&format!("and {more}"));
    }
    for attack in ATTACKS.iter().filter(wanted) {
        report.line(&format!("{}: {}", attack.name, attack.what));
    }
}

async fn under(attack: &Attack, fixture: &Fixture, window: Duration) -> Measured {
    let arena = Arc::new(fixture.arena().await);
    let all = WARM_UP + RUN_UP + window + TAIL;
    let neighbour = Neighbour::start(&arena, all).await;
    tokio::time::sleep(WARM_UP).await;
    let held = (attack.begin)(Arc::clone(&arena)).await;
    let from = SystemTime::now();
    tokio::time::sleep(window).await;
    let to = SystemTime::now();
    drop(held);
    neighbour.measured(from, to).await
}

/// Waits until an attack is in force, if that is to be.
async fn in_force(is: impl Future<Output = ()>) {
    let _or_not = timeout(RUN_UP, is).await;
}

/// Does something again and again, so many times a second, each time on its own.
fn again<F>(tasks: &mut JoinSet<()>, a_second: u32, act: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    tasks.spawn(async move {
        let mut turns = tokio::time::interval(Duration::from_secs(1) / a_second);
        let mut under_way = JoinSet::new();
        loop {
            turns.tick().await;
            under_way.spawn(timeout(Duration::from_secs(30), act()));
            while under_way.try_join_next().is_some() {}
        }
    });
}

/// Does something in so many places at once, each again as soon as it is over.
fn at_once<F>(tasks: &mut JoinSet<()>, places: usize, act: impl Fn() -> F + Clone + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    for _ in 0..places {
        let act = act.clone();
        tasks.spawn(async move {
            loop {
                act().await;
                // What is refused at once is not tried a thousand times a second.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
}
