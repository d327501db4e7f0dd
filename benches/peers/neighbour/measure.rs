//! The neighbour: queries at a steady rate by pgbench, logins at a steady rate, what becomes of its
//! roles, and whether pgsilo says that it lives. All of it on a thread of its own.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::folder;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval, timeout};
use tokio_postgres::Client;

use super::arena::Arena;
use crate::rounds::quantile;

/// Queries a second, in all.
const RATE: u32 = 200;
/// Logins a second.
const LOGINS: u32 = 5;
/// A login or an answer of `/livez` that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a role is looked for.
const FORGETTING: Duration = Duration::from_secs(60);

pub(super) const WHAT: &str =
    "pgbench -S -M prepared, 4 clients, 200 queries a second; 5 logins a second; milliseconds";

/// The neighbour at work.
pub(super) struct Neighbour {
    arena: Arc<Arena>,
    pgbench: Child,
    logs: PathBuf,
    rest: JoinHandle<Vec<Seen>>,
}

/// Something that the neighbour has seen.
#[derive(Debug)]
struct Seen {
    at: SystemTime,
    what: What,
    took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    LoggedIn,
    Refused,
    RoleGone,
    Lives,
    SeemsDead,
}

/// One row.
pub(super) struct Measured {
    /// Milliseconds of each query, from when it was due.
    queries: Vec<f64>,
    due: f64,
    logins: Vec<f64>,
    refused: usize,
    gone: Vec<f64>,
    lives: usize,
    seems_dead: usize,
}

impl Neighbour {
    /// Sets it to work for so long.
    pub(super) async fn start(arena: &Arc<Arena>, all: Duration) -> Neighbour {
        let logs = folder();
        let mut pgbench = Command::new(arena.world.pg_program("pgbench"));
        pgbench
            .args(["--no-vacuum", "--select-only", "--protocol", "prepared", "--client", "4"])
            .args(["--rate", &RATE.to_string(), "--time", &all.as_secs().to_string(), "--log"])
            .arg(format!("--log-prefix={}/pgbench", logs.display()))
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", arena.address().port().to_string())
            .env("PGUSER", "app")
            .env("PGDATABASE", "globex")
            .env("PGPASSWORD", mint::token_of(arena.world, "globex"))
            .env("PGSSLMODE", "disable")
            .stdout(Stdio::null())
            .stderr(fs::File::create(logs.join("stderr")).expect("made"));
        let pgbench = pgbench.spawn().expect("pgbench starts");
        let own = Arc::clone(arena);
        let rest = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(look(own, all))
        });
        Neighbour { arena: Arc::clone(arena), pgbench, logs, rest }
    }

    /// Waits until it is done; what it saw of what was due in a time.
    pub(super) async fn measured(mut self, from: SystemTime, to: SystemTime) -> Measured {
        let seen = self.rest.await.expect("looked");
        let waited = tokio::task::spawn_blocking(move || {
            let _status = self.pgbench.wait();
            self.logs
        });
        let logs = waited.await.expect("waited");
        let within = |at: SystemTime| from <= at && at < to;
        let queries = queries(&logs, within);
        let _gone = fs::remove_dir_all(&logs);
        drop(self.arena);
        let of = |what: What| {
            let these = seen.iter().filter(move |seen| seen.what == what && within(seen.at));
            these.map(|seen| seen.took.as_secs_f64() * 1e3).collect::<Vec<_>>()
        };
        let window = to.duration_since(from).expect("later").as_secs_f64();
        Measured {
            queries,
            due: window * f64::from(RATE),
            logins: of(What::LoggedIn),
            refused: of(What::Refused).len(),
            gone: of(What::RoleGone),
            lives: of(What::Lives).len(),
            seems_dead: of(What::SeemsDead).len(),
        }
    }
}

/// Milliseconds of each query that was due in a time, of pgbench's log: of each transaction its
/// time from when it was due, and when it was over.
fn queries(logs: &PathBuf, within: impl Fn(SystemTime) -> bool) -> Vec<f64> {
    let mut times = Vec::new();
    for entry in fs::read_dir(logs).expect("a folder").flatten() {
        if entry.file_name() == "stderr" {
            continue;
        }
        for line in fs::read_to_string(entry.path()).expect("a log").lines() {
            let fields: Vec<u64> = line.split(' ').filter_map(|text| text.parse().ok()).collect();
            let [_client, _number, micros, _script, seconds, rest, ..] = fields[..] else {
                continue;
            };
            let over = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(rest);
            if within(over - Duration::from_micros(micros)) {
                times.push(micros as f64 / 1e3);
            }
        }
    }
    times
}

/// Logs in, and asks whether pgsilo lives, until all of the time is over.
async fn look(arena: Arc<Arena>, all: Duration) -> Vec<Seen> {
    let until = Instant::now() + all - PATIENCE;
    // Opened before the attack: later none may get in.
    let superuser = Arc::new(arena.world.superuser("postgres").await);
    let mut looks = JoinSet::new();
    let mut turns = interval(Duration::from_secs(1) / LOGINS);
    for turn in 0.. {
        turns.tick().await;
        if Instant::now() >= until {
            break;
        }
        looks.spawn(log_in(Arc::clone(&arena), Arc::clone(&superuser)));
        if turn % LOGINS == 0 {
            looks.spawn(live(Arc::clone(&arena)));
        }
    }
    looks.join_all().await.into_iter().flatten().collect()
}

async fn log_in(arena: Arc<Arena>, superuser: Arc<Client>) -> Vec<Seen> {
    let (at, began) = (SystemTime::now(), Instant::now());
    let entered = timeout(PATIENCE, async {
        let client = arena.log_in("globex").await?;
        let rows = client.query_one("SELECT session_user::text", &[]).await?;
        Ok::<_, tokio_postgres::Error>(rows.get::<_, String>(0))
    });
    let entered = entered.await;
    let took = began.elapsed();
    let Ok(Ok(role)) = entered else {
        return vec![Seen { at, what: What::Refused, took }];
    };
    // The session is over: its role goes with it.
    let (left, began) = (SystemTime::now(), Instant::now());
    let look = "SELECT 1 FROM pg_roles WHERE rolname = $1 AND rolcanlogin";
    while began.elapsed() < FORGETTING
        && !matches!(superuser.query_opt(look, &[&role]).await, Ok(None))
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let gone = Seen { at: left, what: What::RoleGone, took: began.elapsed() };
    vec![Seen { at, what: What::LoggedIn, took }, gone]
}

async fn live(arena: Arc<Arena>) -> Vec<Seen> {
    let (at, began) = (SystemTime::now(), Instant::now());
    // On a connection of its own.
    let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().expect("a client");
    let asked = http.get(format!("http://{}/livez", arena.proxy.admin())).send().await;
    let lives = asked.is_ok_and(|answer| answer.status() == 200);
    let what = if lives { What::Lives } else { What::SeemsDead };
    vec![Seen { at, what, took: began.elapsed() }]
}

impl Measured {
    pub(super) const TITLE: &str =
        "query p50     p99  done  login p50     p99  refused  role gone p99  /livez";
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |times: &[f64], share| match times.is_empty() {
            true => "-".to_owned(),
            false => format!("{:.1}", quantile(times.iter().copied(), share)),
        };
        let attempts = self.logins.len() + self.refused;
        write!(
            f,
            "{:>9} {:>7} {:>4.0}% {:>10} {:>7} {:>8} {:>14} {:>7}",
            at(&self.queries, 0.5),
            at(&self.queries, 0.99),
            (self.queries.len() as f64 / self.due * 100.0).min(100.0),
            at(&self.logins, 0.5),
            at(&self.logins, 0.99),
            format!("{}/{attempts}", self.refused),
            at(&self.gone, 0.99),
            format!("{}/{}", self.lives, self.lives + self.seems_dead),
        )
    }
}
