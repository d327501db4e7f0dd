//! Reading files that an operator names and others may write: a token that an agent renews, a
//! revocation list, a registry that a program makes.
//!
//! The writer of one of them must not be able to stop pgsilo with it: only regular files are read
//! (a pipe or a device in a file's place would be waited for without end), and never more of one
//! than its kind can need. Reading blocks: callers are at the start, or on a thread that may.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// A credential in a line: a token, a secret id, a wrapping token.
pub const MAX_SECRET: u64 = 128 * KIB;
/// Certificates, keys, bundles of authorities: a system's own bundle has some 200 KiB.
pub const MAX_PEM: u64 = 4 * MIB;
/// A revocation list; what is made of it takes several times as much. Large authorities publish
/// some megabytes.
pub const MAX_REVOCATION_LIST: u64 = 32 * MIB;
/// A key set, as long as one that is fetched may be.
pub const MAX_KEY_SET: u64 = 256 * KIB;
/// The configuration.
pub const MAX_CONFIGURATION: u64 = MIB;
/// Those denied: some hundred thousand entries.
pub const MAX_DENIED: u64 = 32 * MIB;
/// A registry: a hundred thousand tenants take about 30 MiB.
pub const MAX_REGISTRY: u64 = 512 * MIB;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Reads a regular file of at most `limit` bytes. Blocks.
///
/// # Errors
/// Those of the system, `InvalidInput` for what is no regular file, and `FileTooLarge`.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Else the opening of a pipe waits for its writer. A regular file takes no notice.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    // Of the very file that was opened: a look before would be of another, perhaps.
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    bounded(file, found.len(), limit)
}

/// The same of whatever the path leads to, for what is read once, at the start: `/dev/stdin`, or
/// what a shell puts in a file's place.
///
/// # Errors
/// Those of the system, and `FileTooLarge`.
pub fn read_once(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    bounded(file, length, limit)
}

/// `length` is what the system says beforehand. It may say less than there is, or grow meanwhile.
fn bounded(file: File, length: u64, limit: u64) -> io::Result<Vec<u8>> {
    let too_large = || {
        let limit = match (limit % MIB, limit % KIB) {
            (0, _) => format!("{} MiB", limit / MIB),
            (_, 0) => format!("{} KiB", limit / KIB),
            _ => format!("{limit} bytes"),
        };
        let what = format!("longer than such a file may be, {limit}");
        io::Error::new(io::ErrorKind::FileTooLarge, what)
    };
    if length > limit {
        return Err(too_large());
    }
    // All at once: a buffer that grows leaves copies of a secret behind. One more than there should
    // be, for the look at its end.
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, mkfifoat};

    #[test]
    fn only_regular_files_are_read() {
        let pipe = std::env::temp_dir().join(format!("pgsilo-pipe-{}", std::process::id()));
        mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).expect("a pipe");
        // It has no writer: opening it would block.
        for path in [&pipe, Path::new("/dev/zero"), Path::new("/tmp")] {
            let error = read(path, 10).expect_err("no file");
            assert_eq!(error.to_string(), "not a regular file");
        }
        std::fs::remove_file(&pipe).expect("removed");
    }

    #[test]
    fn a_file_is_read_up_to_its_limit_only() {
        let path = std::env::temp_dir().join(format!("pgsilo-long-{}", std::process::id()));
        std::fs::write(&path, "12345").expect("written");
        assert_eq!(read(&path, 5).expect("as long as it may be"), b"12345");
        assert_eq!(read_once(&path, 5).expect("as long as it may be"), b"12345");
        for (limit, said) in [(4, "4 bytes"), (0, "0 MiB")] {
            let error = read(&path, limit).expect_err("too long");
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
            assert_eq!(error.to_string(), format!("longer than such a file may be, {said}"));
        }
        // Its length is not known beforehand.
        let endless = read_once(Path::new("/dev/zero"), 3 * KIB).expect_err("endless");
        assert_eq!(endless.to_string(), "longer than such a file may be, 3 KiB");
        std::fs::remove_file(&path).expect("removed");
    }
}
