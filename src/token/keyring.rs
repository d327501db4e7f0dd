//! The keys of one issuer that are in force, and where they come from.
//!
//! - *Listed* keys, in the configuration, never change.
//! - *A file's* keys are read again when it has changed (`server/watched_files.rs`).
//! - *Fetched* keys have a task for each issuer, on the control runtime: it fetches them at once at
//!   the start, then every `refresh` with jitter, and after growing pauses where that failed. They
//!   are in force for `max_stale` (in CLOCK_BOOTTIME), counted from the beginning of the fetch that
//!   brought them.
//!
//! A new set takes the old one's place as a whole or, where it is not valid, not at all.
//!
//! A token may name a key that is not there: it was published a moment ago, or it is invented. Its
//! session requests a refresh that begins after its request, waits for the end of that, 7 s at
//! most, and verifies once more. However many request one, there is one, and requested fetches
//! begin 5 s apart at least (`refresh_gate.rs`). The session itself fetches nothing: if it goes
//! away, the fetch goes on.
//!
//! The configuration makes keyrings; [`super::Verifier`] asks them and has them kept.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use pgsilo_core::backoff::{Backoff, spread};
use pgsilo_core::clock::BootTime;
use pgsilo_core::file::{self, MAX_KEY_SET};
use pgsilo_core::stamp::{LastRead, Stamp};

use super::IssuerFault;
use super::fetch::{FetchError, Fetcher, KeysAt, TIME_OUT};
use super::keys::{self, Algorithm, Key, KeyError, KeySet};
use super::refresh_gate::RefreshGate;
use crate::metrics::{KEYS_FETCHES, Outcome};

/// Between two fetches that tokens with unknown keys request: strangers can make such tokens.
const MIN_FETCH_INTERVAL: Duration = Duration::from_secs(5);
/// How long a login waits for a fetch: until it may begin, and some more. A deadline of the login's
/// own may come first.
const PATIENCE: Duration = Duration::from_secs(7);
/// As `MIN_FETCH_INTERVAL`, of a file.
const MIN_READ_INTERVAL: Duration = Duration::from_millis(100);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How much of a line about an issuer's own words goes to the log, in characters.
const MAX_WORDS: usize = 300;

/// The keys of one issuer.
#[derive(Debug)]
pub struct Keyring {
    source: Source,
    /// What it begins with, until it is settled.
    first: Vec<Key>,
    /// The issuer's: every key is narrowed to these.
    algorithms: Vec<Algorithm>,
    current: ArcSwapOption<InForce>,
    made: BootTime,
}

#[derive(Debug)]
enum Source {
    Listed,
    File(KeyFile, RefreshGate),
    Fetched(Fetcher, RefreshGate),
}

/// Where an issuer's keys come from, as the configuration says it.
#[derive(Debug)]
pub enum KeySource {
    /// From there.
    Listed(Vec<Key>),
    /// A JWK Set in a file, read again when it changes.
    File(PathBuf),
    /// An address that is asked.
    Fetched {
        /// Which.
        at: KeysAt,
        /// PEM of the roots; `None`: the system's.
        ca: Option<Vec<u8>>,
        /// How often.
        refresh: Duration,
        /// How long keys serve after they were fetched.
        max_stale: Duration,
    },
}

/// Why an issuer's keys cannot be had from where they are.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeySourceError {
    /// The file.
    #[error(transparent)]
    File(#[from] KeyFileError),
    /// The HTTP client.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl KeySource {
    /// The keys, for these algorithms, and what is unwise about them. Fetches nothing; reads files.
    pub(super) fn open(
        self,
        algorithms: &[Algorithm],
    ) -> Result<(Keyring, Vec<String>), KeySourceError> {
        match self {
            KeySource::Listed(keys) => {
                let warnings = keys::idle(&keys, algorithms);
                Ok((Keyring::listed(keys), warnings))
            }
            KeySource::File(path) => {
                let (file, set) = KeyFile::open(path.clone())?;
                let said = set.warnings.into_iter();
                let said = said.map(|warning| format!("{path:?}: {warning}"));
                let warnings = said.chain(keys::idle(&set.keys, algorithms)).collect();
                Ok((Keyring::file(file, set.keys), warnings))
            }
            KeySource::Fetched { at, ca, refresh, max_stale } => {
                let fetcher = Fetcher::new(at, ca.as_deref(), refresh, max_stale)?;
                Ok((Keyring::fetched(fetcher), Vec::new()))
            }
        }
    }
}

/// A set of keys as a whole.
#[derive(Debug)]
pub(super) struct InForce {
    keys: Vec<Key>,
    /// What is unwise about them.
    warnings: Vec<String>,
    /// When they were asked for.
    asked: BootTime,
}

/// A JWK Set in a file.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    read: LastRead,
    /// Since when the keys in force are not the file's.
    failing: Option<BootTime>,
}

/// Why a file's keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The system does not give it.
    #[error("cannot read {path:?}: {error}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is no key set, or none for its issuer.
    #[error("{path:?}: {error}")]
    NotValid {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        error: KeyError,
    },
}

impl KeyFile {
    /// Reads a file. Blocks.
    ///
    /// # Errors
    /// When it is no key set.
    pub fn open(path: PathBuf) -> Result<(KeyFile, KeySet), KeyFileError> {
        // Looked at before it is read: a change meanwhile is then seen later.
        let last = LastRead::new(Stamp::of(&path));
        let set = KeySet::from_jwks(&read(&path)?);
        let set = set.map_err(|error| KeyFileError::NotValid { path: path.clone(), error })?;
        Ok((KeyFile { path, seen: Mutex::new(Seen { read: last, failing: None }) }, set))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, KeyFileError> {
    file::read(path, MAX_KEY_SET)
        .map_err(|error| KeyFileError::Unreadable { path: path.to_owned(), error })
}

impl Keyring {
    /// Keys that never change.
    pub fn listed(keys: Vec<Key>) -> Keyring {
        Keyring::new(Source::Listed, keys)
    }

    /// Keys of a file, as it was just read.
    pub fn file(file: KeyFile, keys: Vec<Key>) -> Keyring {
        Keyring::new(Source::File(file, RefreshGate::new(MIN_READ_INTERVAL, TIME_OUT)), keys)
    }

    /// Keys of an address: none before the first fetch.
    pub fn fetched(fetcher: Fetcher) -> Keyring {
        Keyring::new(
            Source::Fetched(fetcher, RefreshGate::new(MIN_FETCH_INTERVAL, PATIENCE)),
            Vec::new(),
        )
    }

    fn new(source: Source, first: Vec<Key>) -> Keyring {
        let (algorithms, current) = (Vec::new(), ArcSwapOption::empty());
        Keyring { source, first, algorithms, current, made: BootTime::now() }
    }

    /// Puts the first keys in force, narrowed to the issuer's algorithms.
    pub(super) fn settle(&mut self, algorithms: &[Algorithm]) -> Result<(), IssuerFault> {
        self.algorithms = algorithms.to_vec();
        if let Source::Fetched(..) = self.source {
            return Ok(());
        }
        let keys = std::mem::take(&mut self.first);
        keys::unique(&keys).map_err(IssuerFault::DuplicateKey)?;
        let keys = keys::narrow(keys, algorithms);
        if keys.is_empty() {
            return Err(IssuerFault::NoKey);
        }
        let set = InForce { keys, warnings: Vec::new(), asked: BootTime::now() };
        self.current.store(Some(Arc::new(set)));
        Ok(())
    }

    /// The keys to verify with, unless there are none yet or they are too old.
    pub(super) fn in_force(&self) -> Option<Arc<InForce>> {
        let set = self.current.load_full()?;
        match &self.source {
            Source::Fetched(fetcher, _) if set.asked.elapsed() > fetcher.max_stale => None,
            Source::Listed | Source::File(..) | Source::Fetched(..) => Some(set),
        }
    }

    /// How long the keys in force have not been known to be the issuer's; `None` where they
    /// cannot change.
    pub(super) fn age(&self) -> Option<Duration> {
        match &self.source {
            Source::Listed => None,
            Source::File(file, _) => {
                let seen = file.seen.lock().unwrap_or_else(PoisonError::into_inner);
                Some(seen.failing.map_or(Duration::ZERO, BootTime::elapsed))
            }
            Source::Fetched(..) => {
                let newest = self.current.load();
                Some(newest.as_ref().map_or(self.made, |set| set.asked).elapsed())
            }
        }
    }

    /// Where a refresh may find other keys.
    pub(super) fn refresh_gate(&self) -> Option<&RefreshGate> {
        match &self.source {
            Source::Listed => None,
            Source::File(_, gate) | Source::Fetched(_, gate) => Some(gate),
        }
    }

    /// Resolves when the file is requested to be read again.
    pub(super) async fn file_refresh_requested(&self) {
        match &self.source {
            Source::File(_, gate) => gate.requested().await,
            Source::Listed | Source::Fetched(..) => std::future::pending().await,
        }
    }

    /// Puts a new set in force: all of it or, where it is not valid, nothing.
    fn replace(&self, issuer: &str, json: &[u8], asked: BootTime) -> Result<(), KeyError> {
        let KeySet { keys, mut warnings } = KeySet::from_jwks(json)?;
        warnings.extend(keys::idle(&keys, &self.algorithms));
        let keys = keys::narrow(keys, &self.algorithms);
        if keys.is_empty() {
            return Err(KeyError::NoneFits);
        }
        let ids =
            |keys: &[Key]| -> Vec<_> { keys.iter().map(|k| k.id().map(str::to_owned)).collect() };
        let (count, new_ids) = (keys.len(), ids(&keys));
        let set = Arc::new(InForce { keys, warnings, asked });
        let before = self.current.swap(Some(Arc::clone(&set)));
        // Said once, not at each fetch.
        if before.as_ref().is_none_or(|before| ids(&before.keys) != new_ids) {
            tracing::info!(issuer, keys = count, "an issuer's keys are in force");
        }
        if before.is_none_or(|before| before.warnings != set.warnings) {
            for warning in &set.warnings {
                tracing::warn!(issuer, "{}", cut(warning));
            }
        }
        Ok(())
    }

    /// Reads the file again if it has changed, or in any case; whether that was so. `None` where
    /// there is no file. Blocks.
    pub(super) fn reload(
        &self,
        issuer: &str,
        in_any_case: bool,
    ) -> Option<Result<bool, KeyFileError>> {
        let Source::File(file, gate) = &self.source else {
            return None;
        };
        let mut seen = file.seen.lock().unwrap_or_else(PoisonError::into_inner);
        gate.begin();
        let asked = BootTime::now();
        let Seen { read: last, failing } = &mut *seen;
        let load = || {
            let result = read(&file.path).and_then(|json| {
                let invalid = |error| KeyFileError::NotValid { path: file.path.clone(), error };
                self.replace(issuer, &json, asked).map_err(invalid)
            });
            *failing = result.is_err().then(|| failing.unwrap_or(asked));
            result
        };
        let unread = |error: &KeyFileError| matches!(error, KeyFileError::Unreadable { .. });
        let result = last.again(Stamp::of(&file.path), in_any_case, load, unread);
        gate.end(failing.is_none());
        Some(result)
    }

    /// Fetches the keys periodically, for as long as the process runs; returns at once where they
    /// are not fetched.
    pub(super) async fn refresh_periodically(&self, issuer: &str) {
        let Source::Fetched(fetcher, gate) = &self.source else {
            return;
        };
        let fetches = |outcome: Outcome| KEYS_FETCHES.of([issuer, outcome.label()]);
        let (fetches, failures) = (fetches(Outcome::Ok), fetches(Outcome::Error));
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY.min(fetcher.refresh));
        let mut failing = None::<BootTime>;
        loop {
            gate.begin();
            let fetched = self.fetch(issuer, fetcher).await;
            gate.end(fetched.is_ok());
            let pause = match fetched {
                Ok(()) => {
                    if let Some(since) = failing.take() {
                        let failed_seconds = since.elapsed().as_secs();
                        tracing::info!(
                            issuer,
                            failed_seconds,
                            "an issuer's keys can be fetched again"
                        );
                    }
                    fetches.increment(1);
                    retry.reset();
                    fetcher.refresh.mul_f64(0.8 + spread() / 5.0)
                }
                Err(error) => {
                    failing.get_or_insert_with(BootTime::now);
                    failures.increment(1);
                    tracing::error!(
                        issuer,
                        error = cut(&error.to_string()),
                        age_seconds = self.age().unwrap_or_default().as_secs(),
                        "an issuer's keys cannot be fetched; those before stay in force until `max_stale`: {}",
                        error.advice()
                    );
                    retry.pause()
                }
            };
            tokio::select! {
                () = (BootTime::now() + pause).arrives() => {}
                () = gate.requested() => {}
            }
        }
    }

    async fn fetch(&self, issuer: &str, fetcher: &Fetcher) -> Result<(), FetchError> {
        let asked = BootTime::now();
        let json = fetcher.fetch().await?;
        Ok(self.replace(issuer, &json, asked)?)
    }
}

impl InForce {
    /// What tokens may name.
    pub(super) fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().filter_map(Key::id)
    }

    /// A token without `kid` is only taken where there is no choice to make.
    pub(super) fn key(&self, id: Option<&str>) -> Option<&Key> {
        match (id, self.keys.as_slice()) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(id), keys) => keys.iter().find(|key| key.id() == Some(id)),
        }
    }
}

/// What an issuer wrote, for one line of the log.
fn cut(words: &str) -> String {
    words.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect()
}

#[cfg(test)]
mod tests;
