//! Where a sidecar's token comes from: a file that somebody renews, as Kubernetes does a projected
//! service account token, or a command that prints one.
//!
//! The application then needs no password at all, and no pool has to learn how to renew one. What
//! is read here is believed as little as what a client sends: the verifier sees it next.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::MAX_TOKEN_BYTES;

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the token of every session of a listener comes from.
#[derive(Debug)]
pub struct Source(Kind);

#[derive(Debug)]
enum Kind {
    File(PathBuf),
    Command { words: Vec<String>, refresh: Duration, printed: Mutex<Option<Printed>> },
}

/// What a command printed, and when it is to be run again.
struct Printed {
    token: Zeroizing<Vec<u8>>,
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
    /// More than any token has.
    #[error("what it holds or prints is longer than a token can be")]
    TooLong,
}

impl Source {
    /// A file, read at each login.
    pub fn file(path: PathBuf) -> Source {
        Source(Kind::File(path))
    }

    /// A command, run without a shell, and again when what it printed is older than `refresh`.
    pub fn command(words: Vec<String>, refresh: Duration) -> Source {
        Source(Kind::Command { words, refresh, printed: Mutex::default() })
    }

    /// The token as it is now, without the white space around it.
    pub(crate) async fn token(&self) -> Result<Zeroizing<Vec<u8>>, SourceError> {
        match &self.0 {
            Kind::File(path) => read(path).await,
            Kind::Command { words, refresh, printed } => {
                // However many log in, one runs it.
                let mut printed = printed.lock().await;
                match &*printed {
                    Some(known) if known.until > Instant::now() => Ok(known.token.clone()),
                    _ => {
                        let token = run(words).await?;
                        let until = Instant::now() + *refresh;
                        *printed = Some(Printed { token: token.clone(), until });
                        Ok(token)
                    }
                }
            }
        }
    }

    /// What a command printed was refused: it is run again for the next login.
    pub(crate) async fn forget(&self) {
        if let Kind::Command { printed, .. } = &self.0 {
            *printed.lock().await = None;
        }
    }
}

async fn read(path: &PathBuf) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let failed = |error| SourceError::File { path: path.clone(), error };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    bounded(file).await?.map_err(failed)
}

async fn run(words: &[String]) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let command = words.first().cloned().unwrap_or_default();
    let failed = |error| SourceError::Command { command: command.clone(), error };
    let running = async {
        let mut child = Command::new(&command)
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // It may hold what is nobody's to log.
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let Some(stdout) = child.stdout.take() else {
            return Err(failed(std::io::ErrorKind::BrokenPipe.into()));
        };
        let token = bounded(stdout).await?.map_err(failed)?;
        let status = child.wait().await.map_err(failed)?;
        match status.success() {
            true => Ok(token),
            false => Err(SourceError::Failed { command: command.clone(), status }),
        }
    };
    timeout(PATIENCE, running).await.unwrap_or_else(|_late| Err(SourceError::Late(command.clone())))
}

/// Reads to the end, or to where it cannot be a token any more.
async fn bounded(
    from: impl tokio::io::AsyncRead + Unpin,
) -> Result<std::io::Result<Zeroizing<Vec<u8>>>, SourceError> {
    let most = MAX_TOKEN_BYTES + 64;
    let mut bytes = Zeroizing::new(Vec::with_capacity(most));
    if let Err(error) = from.take(most as u64).read_to_end(&mut bytes).await {
        return Ok(Err(error));
    }
    if bytes.len() == most {
        return Err(SourceError::TooLong);
    }
    Ok(Ok(Zeroizing::new(bytes.trim_ascii().to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str], refresh: u64) -> Source {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        Source::command(words, Duration::from_secs(refresh))
    }

    async fn token(source: &Source) -> Result<String, String> {
        let token = source.token().await.map_err(|error| error.to_string())?;
        Ok(String::from_utf8(token.to_vec()).expect("UTF-8"))
    }

    #[tokio::test]
    async fn a_file_is_read_each_time() {
        let path = std::env::temp_dir().join(format!("pgsilo-source-{}", std::process::id()));
        let source = Source::file(path.clone());
        assert!(token(&source).await.expect_err("not there").contains("cannot read"));
        std::fs::write(&path, "one\n").expect("written");
        assert_eq!(token(&source).await, Ok("one".to_owned()));
        std::fs::write(&path, "two").expect("written");
        assert_eq!(token(&source).await, Ok("two".to_owned()));
        std::fs::write(&path, vec![b'x'; MAX_TOKEN_BYTES + 64]).expect("written");
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
    async fn a_command_that_fails_says_no_more_than_its_name() {
        let failing = command(&["sh", "-c", "echo s3cret; echo s3cret >&2; exit 3"], 60);
        assert_eq!(token(&failing).await, Err("\"sh\" ended with exit status: 3".to_owned()));
        let absent = command(&["/nonexistent/command"], 60);
        assert!(token(&absent).await.expect_err("not there").starts_with("cannot run"));
        let endless = command(&["yes"], 60);
        assert!(token(&endless).await.expect_err("too long").contains("longer"));
    }
}
