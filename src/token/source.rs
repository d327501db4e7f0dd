//! Where a sidecar's token comes from: a file that is renewed, as Kubernetes does a projected
//! service account token, or a command that prints one.
//!
//! The application then needs no password at all, and no pool has to learn how to renew one. What
//! is read here is believed as little as what a client sends: the verifier sees it next.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::file;
use pgsilo_core::secret::Secret;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::MAX_TOKEN_BYTES;

/// The most that is read, in bytes: a token, and white space around it.
const MOST: usize = MAX_TOKEN_BYTES + 64;
/// How long the last of what an ended command has printed may take to be read.
const REST: Duration = Duration::from_millis(20);
/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a command is not run again after it has failed.
const FAILURE: Duration = Duration::from_secs(1);

/// Where the token of every session of a listener comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSettings {
    /// A file, read at each login.
    File(PathBuf),
    /// A command, run without a shell.
    Command {
        /// Program and arguments.
        words: Vec<String>,
        /// It is run again when what it printed is older than this.
        refresh: Duration,
    },
}

/// The same, with what was read there last.
#[derive(Debug)]
pub struct Source {
    settings: SourceSettings,
    /// By the command.
    printed: Mutex<Option<Printed>>,
}

/// What a command printed, or how it failed, and when it is to be run again.
struct Printed {
    token: Result<Secret, Arc<SourceError>>,
    until: Instant,
}

impl std::fmt::Debug for Printed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Printed").field("until", &self.until).finish_non_exhaustive()
    }
}

/// Why there is no token. Holds nothing of what a command printed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// The file cannot be read.
    #[error("cannot read the token file {path:?}: {error}")]
    File { path: PathBuf, error: std::io::Error },
    /// The command cannot be started or waited for.
    #[error("cannot run {command:?}: {error}")]
    Command { command: String, error: std::io::Error },
    /// It ended badly.
    #[error("{command:?} ended with {status}")]
    Failed { command: String, status: std::process::ExitStatus },
    /// It did not end.
    #[error("{0:?} did not end within 5 s")]
    Late(String),
    /// The run that others waited for, too.
    #[error("{0}")]
    Shared(Arc<SourceError>),
    /// More than any token has.
    #[error("what it holds or prints is longer than a token can be")]
    TooLong,
}

impl Source {
    /// Reads nothing yet.
    pub(crate) fn new(settings: SourceSettings) -> Source {
        Source { settings, printed: Mutex::default() }
    }

    /// The token as it is now, without the white space around it.
    pub(crate) async fn token(&self) -> Result<Secret, SourceError> {
        match &self.settings {
            SourceSettings::File(path) => read(path).await,
            SourceSettings::Command { words, refresh } => {
                // However many log in, one runs it.
                let mut printed = self.printed.lock().await;
                match &*printed {
                    Some(known) if known.until > Instant::now() => known.token.clone(),
                    _ => {
                        let token = run(words).await.map_err(Arc::new);
                        // Those who waited for it fail with it, and do not each run it again.
                        let lasts = if token.is_ok() { *refresh } else { FAILURE };
                        let until = Instant::now() + lasts;
                        *printed = Some(Printed { token: token.clone(), until });
                        token
                    }
                }
                .map_err(SourceError::Shared)
            }
        }
    }

    /// What a command printed was refused: it is run again for the next login.
    pub(crate) async fn forget(&self) {
        *self.printed.lock().await = None;
    }
}

async fn read(path: &Path) -> Result<Secret, SourceError> {
    let failed = |error| SourceError::File { path: path.to_path_buf(), error };
    let from = path.to_path_buf();
    let read =
        tokio::task::spawn_blocking(move || file::read(&from, MOST as u64).map(Zeroizing::new));
    let bytes = read.await.map_err(|error| failed(error.into()))?.map_err(failed)?;
    trimmed(&bytes)
}

async fn run(words: &[String]) -> Result<Secret, SourceError> {
    let name = words.first().cloned().unwrap_or_default();
    let failed = |error| SourceError::Command { command: name.clone(), error };
    #[expect(clippy::disallowed_methods, reason = "a sidecar's token may come from a command")]
    let mut command = Command::new(&name);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
    // It may hold secrets.
    command.stderr(Stdio::null()).kill_on_drop(true).process_group(0);
    let mut running = Running(command.spawn().map_err(failed)?);
    let printed = timeout(PATIENCE, printed(&mut running)).await;
    // Whatever came of it, nothing of it is left: neither a process nor one that is not buried.
    let status = running.end().await.map_err(failed)?;
    let bytes = printed.map_err(|_late| SourceError::Late(name.clone()))?.map_err(failed)?;
    match bytes.len() > MOST || status.success() {
        true => trimmed(&bytes),
        false => Err(SourceError::Failed { command: name.clone(), status }),
    }
}

/// What a command has printed by its end, or more than a token has. What it has started ends with
/// it; what has left its group may go on holding its standard output open, and is not waited for.
async fn printed(running: &mut Running) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut stdout = running.0.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST + 1));
    let mut exited = pin!(running.exited());
    let mut is_over = false;
    while bytes.len() <= MOST {
        let read = stdout.read_buf(&mut *bytes);
        let read = match is_over {
            false => tokio::select! {
                read = read => read?,
                ended = &mut exited => {
                    ended?;
                    running.kill();
                    is_over = true;
                    continue;
                }
            },
            // It was written before the end.
            true => match timeout(REST, read).await {
                Ok(read) => read?,
                Err(_held_open) => 0,
            },
        };
        if read == 0 {
            if !is_over {
                exited.await?;
            }
            break;
        }
    }
    Ok(bytes)
}

/// A command and what it has started, which all end with this. What has left its process group, as
/// a daemon does, is not followed.
struct Running(Child);

impl Running {
    /// Resolves when the command has exited, and does not reap it: until that is done, the kernel
    /// gives neither its id nor its group's to another.
    fn exited(&self) -> impl Future<Output = std::io::Result<()>> + use<> {
        let id = self.id();
        async move {
            // Asked for first: an exit behind this line is not missed.
            let mut changes = signal(SignalKind::child())?;
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
            while let Some(id) = id
                && waitid(WaitId::Pid(id), look)?.is_none()
            {
                changes.recv().await;
            }
            Ok(())
        }
    }

    /// `None` once it was buried.
    fn id(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.0.id()?).ok()?)
    }

    /// Kills what is left of it, and buries it.
    async fn end(&mut self) -> std::io::Result<ExitStatus> {
        self.kill();
        self.0.wait().await
    }

    fn kill(&self) {
        if let Some(id) = self.id() {
            let _nobody_is_left = kill_process_group(id, Signal::KILL);
        }
    }
}

impl Drop for Running {
    /// The login was cut short. Tokio buries what was not waited for.
    fn drop(&mut self) {
        self.kill();
    }
}

/// Without the white space around it, if it can be a token.
fn trimmed(bytes: &[u8]) -> Result<Secret, SourceError> {
    match bytes.len() > MOST {
        true => Err(SourceError::TooLong),
        false => Ok(Secret::new(bytes.trim_ascii())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str], refresh: u64) -> Source {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        let refresh = Duration::from_secs(refresh);
        Source::new(SourceSettings::Command { words, refresh })
    }

    async fn token(source: &Source) -> Result<String, String> {
        let token = source.token().await.map_err(|error| error.to_string())?;
        Ok(token.expose_text().expect("UTF-8").to_owned())
    }

    #[tokio::test]
    async fn a_file_is_read_each_time() {
        let path = std::env::temp_dir().join(format!("pgsilo-source-{}", std::process::id()));
        let source = Source::new(SourceSettings::File(path.clone()));
        assert!(token(&source).await.expect_err("not there").contains("cannot read"));
        std::fs::write(&path, "one\n").expect("written");
        assert_eq!(token(&source).await, Ok("one".to_owned()));
        std::fs::write(&path, "two").expect("written");
        assert_eq!(token(&source).await, Ok("two".to_owned()));
        std::fs::write(&path, vec![b'x'; MOST + 1]).expect("written");
        assert!(token(&source).await.expect_err("too long").contains("longer"));
        std::fs::remove_file(&path).expect("removed");
    }

    #[tokio::test]
    async fn a_command_is_run_again_when_it_is_due_or_was_refused() {
        // Prints its own process id: another run prints another.
        let source = command(&["sh", "-c", "echo $$"], 3600);
        let first = token(&source).await;
        assert_eq!(token(&source).await, first);
        source.forget().await;
        assert_ne!(token(&source).await, first);
        let impatient = command(&["sh", "-c", "echo $$"], 0);
        assert_ne!(token(&impatient).await, token(&impatient).await);
    }

    #[tokio::test]
    async fn processes_that_a_command_leaves_behind_are_killed() {
        let marker = format!("{}.5", 100_000 + std::process::id());
        let source = command(&["sh", "-c", &format!("sleep {marker} & echo token")], 60);
        let began = Instant::now();
        assert_eq!(token(&source).await, Ok("token".to_owned()));
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        let runs = || {
            let processes = std::fs::read_dir("/proc").expect("processes");
            processes.flatten().any(|process| {
                let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&marker)
            })
        };
        while runs() {
            assert!(began.elapsed() < PATIENCE, "it is left");
            tokio::task::yield_now().await;
        }
    }

    /// However it ends, no process of it is left, not even a zombie.
    #[tokio::test]
    async fn no_process_of_a_command_survives() {
        let marker = format!("{}.75", 100_000 + std::process::id());
        let left = || {
            let processes = std::fs::read_dir("/proc").expect("processes").flatten();
            let mut named = processes.filter(|process| {
                let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&marker)
            });
            named.next().is_some()
        };
        for script in ["echo token", "yes", "exec >&-; sleep MARKER", "exit 1", "sleep MARKER"] {
            let script = format!("sleep {marker} & {}", script.replace("MARKER", &marker));
            let source = command(&["sh", "-c", &script], 60);
            let came = token(&source).await;
            assert_eq!(came.is_ok(), script.ends_with("echo token"), "{script}: {came:?}");
            let began = Instant::now();
            while left() {
                assert!(began.elapsed() < PATIENCE, "{script}: it is left");
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn a_pipe_in_place_of_a_file_is_not_waited_for() {
        let source = Source::new(SourceSettings::File("/dev/zero".into()));
        assert!(token(&source).await.expect_err("no file").contains("not a regular file"));
    }

    #[tokio::test]
    async fn a_command_that_fails_says_no_more_than_its_name() {
        let failing = command(&["sh", "-c", "echo s3cret; echo s3cret >&2; exit 3"], 60);
        assert_eq!(token(&failing).await, Err("\"sh\" ended with exit status: 3".to_owned()));
        let absent = command(&["/nonexistent/command"], 60);
        assert!(token(&absent).await.expect_err("not there").starts_with("cannot run"));
        let endless = command(&["yes"], 60);
        assert!(token(&endless).await.expect_err("too long").contains("longer"));
    }
}
