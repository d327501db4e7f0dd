//! When a file was changed, as far as a look at it tells: cheap enough to ask twice a second.
//!
//! Secrets and certificates are replaced while pgsilo runs: written anew, renamed over, or, as
//! Kubernetes does it, reached through a symbolic link that leads elsewhere. Each changes one of
//! these at least. A file that is not there has a stamp, too.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Equal stamps: the file is as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Option<Seen>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Looks at what a path leads to now.
    pub fn of(path: &Path) -> Stamp {
        let seen = std::fs::metadata(path).map(|file| Seen {
            device: file.dev(),
            inode: file.ino(),
            length: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        });
        Stamp(seen.ok())
    }
}

/// What files were like when they were last read: whether to read them again.
#[derive(Debug)]
pub struct LastRead<S = Stamp>(S);

impl<S: PartialEq> LastRead<S> {
    /// Stamps that were looked at before the files were read: a change meanwhile is then seen
    /// later.
    pub fn new(stamp: S) -> LastRead<S> {
        LastRead(stamp)
    }

    /// Reads again if `now` is another stamp, or in any case; whether that was so. After an error
    /// not again before another change, unless `unread` finds that they could not even be read:
    /// that may pass without one.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn again<E>(
        &mut self,
        now: S,
        in_any_case: bool,
        read: impl FnOnce() -> Result<(), E>,
        unread: impl FnOnce(&E) -> bool,
    ) -> Result<bool, E> {
        if self.0 == now && !in_any_case {
            return Ok(false);
        }
        let result = read();
        if !result.as_ref().is_err_and(unread) {
            self.0 = now;
        }
        result.map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use super::Stamp;
    use std::fs;

    #[test]
    fn a_stamp_changes_with_its_file_and_not_by_itself() {
        let dir = std::env::temp_dir().join(format!("pgsilo-stamp-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        let (path, other) = (dir.join("secret"), dir.join("other"));
        let absent = Stamp::of(&path);
        fs::write(&path, "one").expect("written");
        let first = Stamp::of(&path);
        assert_ne!(absent, first);
        assert_eq!(first, Stamp::of(&path));
        // As long, and of the same moment.
        fs::write(&other, "two").expect("written");
        fs::rename(&other, &path).expect("renamed");
        assert_ne!(first, Stamp::of(&path));
        fs::remove_dir_all(&dir).expect("removed");
        assert_eq!(absent, Stamp::of(&path));
    }
}
