//! Whom to refuse although a good token or certificate is shown: withdrawn before it expired.
//!
//! A file of its own, small and quick to read, so that what is added to it is in force within a
//! second, for those who come and for those who are there. One bad entry refuses the whole file:
//! a list that is partly read would admit a denied identity.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use pgsilo_core::file::MAX_DENIED;
use pgsilo_core::stamp::{LastRead, Stamp};
use pgsilo_core::toml_file::{FileError, TomlFile};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDenied {
    /// Not optional: an empty file is more likely a failed write than an amnesty.
    denied: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    issuer: Option<String>,
    token_id: Option<String>,
    subject: Option<String>,
    issued_before: Option<toml::value::Datetime>,
}

/// A token or certificate, as far as it can be denied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PresentedCredential<'a> {
    /// `None`: a certificate.
    pub(crate) issuer: Option<&'a str>,
    pub(crate) subject: &'a str,
    pub(crate) token_id: Option<&'a str>,
    pub(crate) issued_at: Option<SystemTime>,
}

/// Who is refused, at one moment.
#[derive(Debug, Default)]
struct List {
    tokens: HashMap<String, Vec<Entry>>,
    subjects: HashMap<String, Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    /// `None`: any issuer.
    issuer: Option<String>,
    /// Only what was issued before.
    issued_before: Option<SystemTime>,
}

/// The file, read again when it changes.
#[derive(Debug)]
pub struct Denied {
    path: PathBuf,
    issuers: HashSet<String>,
    current: ArcSwap<List>,
    read: Mutex<LastRead>,
    generation: watch::Sender<u64>,
}

impl Denied {
    /// Reads the file; `issuers` are those that an entry may name.
    ///
    /// # Errors
    /// When it cannot be read or holds an entry that is not valid.
    pub fn open(path: &Path, issuers: HashSet<String>) -> Result<Denied, FileError> {
        let read = Mutex::new(LastRead::new(Stamp::of(path)));
        let current = ArcSwap::from_pointee(load(path, &issuers)?);
        let generation = watch::Sender::new(0);
        Ok(Denied { path: path.into(), issuers, current, read, generation })
    }

    /// Reads the file again if it has changed, or in any case; whether that was so. After an error
    /// the list before stays in force. Blocks.
    ///
    /// # Errors
    /// As for [`Denied::open`].
    pub fn reload(&self, in_any_case: bool) -> Result<bool, FileError> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let load = || {
            self.current.store(Arc::new(load(&self.path, &self.issuers)?));
            self.generation.send_modify(|generation| *generation += 1);
            Ok(())
        };
        let unread = |error: &FileError| error.line().is_none();
        read.again(Stamp::of(&self.path), in_any_case, load, unread)
    }

    /// Whether this was withdrawn.
    pub(crate) fn denies(&self, credential: PresentedCredential<'_>) -> bool {
        let list = self.current.load();
        let hit = |entries: &HashMap<String, Vec<Entry>>, key: &str| {
            entries.get(key).is_some_and(|all| all.iter().any(|entry| entry.covers(credential)))
        };
        hit(&list.subjects, credential.subject)
            || credential.token_id.is_some_and(|id| hit(&list.tokens, id))
    }

    /// Changes with each successful reload, after the new list is in place.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

impl Entry {
    fn covers(&self, credential: PresentedCredential<'_>) -> bool {
        let issuer = self.issuer.as_deref().is_none_or(|issuer| credential.issuer == Some(issuer));
        // What does not say when it was issued cannot be of a later day.
        let early = self
            .issued_before
            .is_none_or(|before| credential.issued_at.is_none_or(|issued_at| issued_at < before));
        issuer && early
    }
}

fn load(path: &Path, issuers: &HashSet<String>) -> Result<List, FileError> {
    let file = TomlFile::read_regular(path, MAX_DENIED)?;
    let raw: RawDenied = file.parse()?;
    let mut list = List::default();
    for (index, raw) in raw.denied.into_iter().enumerate() {
        let wrong = |field: &str, what: &str| file.wrong(&format!("denied[{index}]{field}"), what);
        let issued_before = match raw.issued_before {
            None => None,
            Some(text) => Some(moment(&text.to_string()).ok_or_else(|| {
                wrong(".issued_before", "no moment; write it like 2026-11-25T12:00:00Z")
            })?),
        };
        if let Some(issuer) = raw.issuer.as_ref().filter(|issuer| !issuers.contains(*issuer)) {
            return Err(wrong(".issuer", &format!("{issuer:?} has no [[issuer]] table")));
        }
        let entry = Entry { issuer: raw.issuer, issued_before };
        let (into, key) = match (raw.token_id, raw.subject) {
            (Some(id), None) => (&mut list.tokens, id),
            (None, Some(subject)) => (&mut list.subjects, subject),
            (None, None) => return Err(wrong("", "names no identity; add token_id or subject")),
            (Some(_), Some(_)) => {
                return Err(wrong("", "both token_id and subject; give each an entry of its own"));
            }
        };
        if key.is_empty() {
            return Err(wrong("", "an empty name"));
        }
        into.entry(key).or_default().push(entry);
    }
    Ok(list)
}

fn moment(text: &str) -> Option<SystemTime> {
    let moment = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    let since = Duration::from_secs(u64::try_from(moment.unix_timestamp()).ok()?);
    Some(UNIX_EPOCH + since + Duration::from_nanos(moment.nanosecond().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct File(PathBuf);

    impl File {
        fn new(text: &str) -> File {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("pgsilo-denied-{}-{number}.toml", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).expect("written");
            File(path)
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _gone = std::fs::remove_file(&self.0);
        }
    }

    fn open(file: &File) -> Result<Denied, FileError> {
        let issuers = ["https://a", "https://b"].map(str::to_owned);
        Denied::open(&file.0, issuers.into())
    }

    fn credential<'a>(subject: &'a str, token_id: &'a str, second: u64) -> PresentedCredential<'a> {
        PresentedCredential {
            issuer: Some("https://a"),
            subject,
            token_id: Some(token_id),
            issued_at: Some(UNIX_EPOCH + Duration::from_secs(second)),
        }
    }

    #[test]
    fn tokens_and_subjects_are_denied_by_name() {
        let file = File::new(
            "[[denied]]\ntoken_id = \"t1\"\n\
             [[denied]]\nsubject = \"mallory\"\n\
             [[denied]]\nsubject = \"alice\"\nissued_before = 1970-01-01T00:01:40Z\n\
             [[denied]]\nsubject = \"bob\"\nissuer = \"https://b\"\n",
        );
        let denied = open(&file).expect("a good list");
        assert!(denied.denies(credential("x", "t1", 0)));
        assert!(!denied.denies(credential("x", "t2", 0)));
        assert!(denied.denies(credential("mallory", "t2", 0)));
        // Her new tokens are good.
        assert!(denied.denies(credential("alice", "t2", 99)));
        assert!(!denied.denies(credential("alice", "t2", 100)));
        assert!(
            denied.denies(PresentedCredential { issued_at: None, ..credential("alice", "t2", 0) })
        );
        // Another issuer's bob.
        assert!(!denied.denies(credential("bob", "t2", 0)));
        assert!(denied.denies(PresentedCredential {
            issuer: Some("https://b"),
            ..credential("bob", "t2", 0)
        }));
        assert!(!denied.denies(PresentedCredential { issuer: None, ..credential("bob", "t2", 0) }));
    }

    #[test]
    fn a_change_is_read_and_a_mistake_changes_nothing() {
        let file = File::new("denied = []\n");
        let denied = open(&file).expect("an empty list");
        let generation = denied.subscribe();
        assert!(!denied.denies(credential("mallory", "t", 0)));
        assert!(!denied.reload(false).expect("unchanged"));
        std::fs::write(&file.0, "[[denied]]\nsubject = \"mallory\"\n").expect("written");
        assert!(denied.reload(false).expect("read"));
        assert!(denied.denies(credential("mallory", "t", 0)));
        assert_eq!(*generation.borrow(), 1);
        std::fs::write(&file.0, "[[denied]]\nsubjekt = \"x\"\n").expect("written");
        denied.reload(false).expect_err("a typing error");
        assert!(denied.denies(credential("mallory", "t", 0)), "still");
        assert!(!denied.reload(false).expect("said once"));
        // Not even to be read: that may pass without another change.
        std::fs::remove_file(&file.0).expect("removed");
        denied.reload(false).expect_err("not there");
        denied.reload(false).expect_err("still not there");
        assert!(denied.denies(credential("mallory", "t", 0)), "still");
    }

    #[test]
    fn one_invalid_entry_invalidates_the_list() {
        for (text, expected) in [
            ("", "denied"),
            ("[[denied]]\nsubject = \"a\"\nissuer = \"https://a/\"\n", "has no [[issuer]] table"),
            ("[[denied]]\n", "names no identity"),
            ("[[denied]]\nsubject = \"\"\n", "an empty name"),
            ("[[denied]]\nsubject = \"a\"\ntoken_id = \"b\"\n", "both token_id and subject"),
            ("[[denied]]\nsubject = \"a\"\nissued_before = 2026-01-01\n", "no moment"),
            ("[[denied]]\nsubject = \"a\"\nissued_before = \"x\"\n", "issued_before"),
        ] {
            let file = File::new(text);
            let error = open(&file).expect_err("not valid").to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
