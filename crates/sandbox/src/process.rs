//! Child processes: started in groups of their own, stopped in order, never left behind.
//!
//! A group of its own keeps a terminal's Ctrl-C from reaching a child, so that we alone decide
//! the order in which things end. If we are killed with no chance to decide anything, a
//! watchdog does: a small `sh` that reads a pipe from us and, when that ends without `done`,
//! ends every process it was told of and removes our files. A pid may have been given to a
//! stranger by then, so the watchdog notes when each process began and spares any other.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::Command;
use tokio::sync::watch;

/// What runs, in the order of need: each part may use those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Postgres,
    OpenBao,
    Proxy,
}

/// How to start a child, and how it likes to be told to stop.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) part: Part,
    pub(super) name: &'static str,
    pub(super) command: Command,
    /// Where its output goes; emptied at the start.
    pub(super) log: PathBuf,
    pub(super) stop: Signal,
    /// How long it may take to stop before it is killed.
    pub(super) patience: Duration,
}

/// A child that was started; it may have ended since.
#[derive(Debug)]
pub(super) struct Process {
    part: Part,
    name: &'static str,
    pid: Pid,
    log: PathBuf,
    stop: Signal,
    patience: Duration,
    ended: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// How it ended, once it has.
    pub(super) async fn ended(&self) -> Option<ExitStatus> {
        let mut ended = self.ended.clone();
        // An error means that the task which waits is gone: the runtime is ending.
        ended.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }

    /// What `work` gives, unless the child ends first.
    pub(super) async fn meanwhile<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            status = self.ended() => Err(self.obituary(status)),
        }
    }

    /// Which child ended, how, and its last words.
    pub(super) fn obituary(&self, status: Option<ExitStatus>) -> anyhow::Error {
        let how = status.map_or_else(|| "it is gone".to_owned(), |status| status.to_string());
        anyhow!(
            "{} stopped by itself ({how}); the end of {}:\n{}",
            self.name,
            self.log.display(),
            last_lines(&self.log, 15)
        )
    }

    /// Whether its last words say that its port was taken by another.
    pub(super) fn lost_its_port(&self) -> bool {
        last_lines(&self.log, 15).to_lowercase().contains("address already in use")
    }

    /// Tells it to stop, waits, kills it when that takes too long.
    pub(super) async fn stop(&self) {
        if self.ended.borrow().is_none() {
            let _ = kill_process(self.pid, self.stop);
            if tokio::time::timeout(self.patience, self.ended()).await.is_err() {
                self.kill().await;
            }
        }
        // What it started and left.
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    async fn kill(&self) {
        if self.ended.borrow().is_none() {
            let _ = kill_process_group(self.pid, Signal::KILL);
            let _ = tokio::time::timeout(Duration::from_secs(5), self.ended()).await;
        }
    }
}

/// Every child of this sandbox.
#[derive(Debug)]
pub(super) struct Processes {
    started: Mutex<Vec<Arc<Process>>>,
    watchdog: Arc<Watchdog>,
}

impl Processes {
    /// `remove` are the files and folders to remove if we are killed.
    pub(super) fn new(remove: &[&Path]) -> Result<Self> {
        Ok(Self {
            started: Mutex::default(),
            watchdog: Arc::new(Watchdog::start(remove).context("starting the watchdog")?),
        })
    }

    pub(super) fn start(&self, mut plan: Plan) -> Result<Arc<Process>> {
        let log = File::create(&plan.log).with_context(|| format!("{}", plan.log.display()))?;
        // Meant for other servers than these.
        for (name, _) in std::env::vars_os() {
            let foreign = |name: &str| {
                let prefixes = ["PG", "BAO_", "VAULT_"];
                prefixes.iter().any(|prefix| name.starts_with(prefix))
                    && !name.starts_with("PGSILO_")
            };
            if name.to_str().is_some_and(foreign) {
                plan.command.env_remove(name);
            }
        }
        let mut child = plan
            .command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", plan.name))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("{} has no pid", plan.name))?;
        let watched = pid.as_raw_nonzero().get();
        self.watchdog.tell(&format!("watch {watched} {}", watchdog_signal(plan.part)));
        let (tell, ended) = watch::channel(None);
        let watchdog = Arc::clone(&self.watchdog);
        tokio::spawn(async move {
            let status = child.wait().await.ok();
            watchdog.tell(&format!("forget {watched}"));
            let _ = tell.send(status);
        });
        let process = Arc::new(Process {
            part: plan.part,
            name: plan.name,
            pid,
            log: plan.log,
            stop: plan.stop,
            patience: plan.patience,
            ended,
        });
        self.all().push(Arc::clone(&process));
        Ok(process)
    }

    /// Waits until one of the children that still run ends by itself, and says which.
    pub(super) async fn death(&self) -> anyhow::Error {
        let running = self.running();
        let waits = running.iter().map(|process| Box::pin(process.ended()));
        let (status, index, _) = futures_util::future::select_all(waits).await;
        running[index].obituary(status)
    }

    /// Stops every child, the last needed first.
    pub(super) async fn stop(&self) {
        let mut running = self.running();
        running.sort_by_key(|process| std::cmp::Reverse(process.part));
        for process in running {
            process.stop().await;
        }
    }

    /// Ends every child at once.
    pub(super) async fn kill(&self) {
        let running = self.running();
        for process in &running {
            // PostgreSQL would leave shared memory behind; SIGQUIT is its "at once".
            if process.part == Part::Postgres {
                let _ = kill_process(process.pid, Signal::QUIT);
                let _ = tokio::time::timeout(Duration::from_secs(1), process.ended()).await;
            }
        }
        futures_util::future::join_all(running.iter().map(|process| process.kill())).await;
    }

    /// No child is left and the files are removed: the watchdog may go.
    pub(super) fn dismiss_watchdog(&self) {
        self.watchdog.tell("done");
        self.watchdog.wait();
    }

    fn running(&self) -> Vec<Arc<Process>> {
        let alive = |process: &&Arc<Process>| process.ended.borrow().is_none();
        self.all().iter().filter(alive).cloned().collect()
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Process>>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watchdog_signal(part: Part) -> &'static str {
    match part {
        Part::Postgres => "QUIT",
        Part::OpenBao | Part::Proxy => "KILL",
    }
}

/// Ends everything when we are gone without a word.
#[derive(Debug)]
struct Watchdog {
    child: Mutex<std::process::Child>,
}

/// `watch PID SIGNAL`, `forget PID`, `done`; the end of input means that our owner is gone.
const WATCHDOG: &str = r#"
trap '' INT HUP TERM QUIT
start_time() { # when process $1 began; nothing when it is gone or a zombie
    if [ -d /proc/self ]; then
        line=
        { read -r line < "/proc/$1/stat"; } 2>/dev/null
        set -- ${line##*) }
        [ "${1:-Z}" = Z ] || echo "${20}"
    else
        ps -o lstart= -p "$1" | tr -d ' :'
    fi
}
watched=
while read -r verb pid signal; do
    case $verb in
    watch) watched="$watched $pid:$signal:$(start_time "$pid")" ;;
    forget)
        kept=
        for each in $watched; do [ "${each%%:*}" = "$pid" ] || kept="$kept $each"; done
        watched=$kept ;;
    done) exit 0 ;;
    esac
done
alive=
for each in $watched; do
    pid=${each%%:*} rest=${each#*:}
    now=$(start_time "$pid")
    if [ -n "$now" ] && [ "$now" = "${rest#*:}" ]; then
        kill -s "${rest%%:*}" "$pid"
        alive="$alive $each"
    fi
done
tries=0
while [ "$tries" -lt 50 ]; do
    left=
    for each in $alive; do
        now=$(start_time "${each%%:*}")
        [ -z "$now" ] || [ "$now" != "${each##*:}" ] || left=1
    done
    [ -n "$left" ] || break
    sleep 0.1 || sleep 1
    tries=$((tries + 1))
done
for each in $alive; do kill -s KILL -- "-${each%%:*}"; done
rm -rf -- "$@"
"#;

impl Watchdog {
    fn start(remove: &[&Path]) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let child = std::process::Command::new("sh")
            .args(["-c", WATCHDOG, "pgsilo-sandbox-watchdog"])
            .args(remove)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { child: Mutex::new(child) })
    }

    /// A watchdog that is gone cannot be told anything; that must not stop us.
    fn tell(&self, line: &str) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = &mut child.stdin {
            let _ = pipe.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn wait(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.wait();
    }
}

/// The last lines of a file, indented.
pub(super) fn last_lines(path: &Path, count: usize) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(16 * 1024)));
        let _ = file.read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    if lines.is_empty() {
        return "    (empty)".to_owned();
    }
    let last = &lines[lines.len().saturating_sub(count)..];
    last.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
