//! What goes wrong between pgsilo and OpenBAO. Nothing in here is secret.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::fault::DatabaseFault;

/// Why a request has no answer, or not the one that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An answer other than 2xx.
    #[error("it answered {status}{}{words}", if words.is_empty() { "" } else { ": " })]
    Said {
        /// HTTP's.
        status: u16,
        /// OpenBAO's own, in one line; empty where it says nothing.
        words: String,
    },
    /// It could not make a credential at the tenant's database.
    #[error("it answered 500: {words}")]
    Database {
        /// What became of the database.
        fault: DatabaseFault,
        /// OpenBAO's own, in one line.
        words: String,
    },
    /// It is asked too often, and says when to come again, if it does.
    #[error("it answered 429{}{words}", if words.is_empty() { "" } else { ": " })]
    Busy {
        /// `Retry-After`, as it is.
        after: Option<Duration>,
        /// OpenBAO's own, in one line; empty where it says nothing.
        words: String,
    },
    /// No connection, or one that broke.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// No answer in time. Holds what became of each of its addresses, if that says something.
    #[error("it did not answer in time{0}")]
    Timeout(String),
    /// An answer that is not what the API promises.
    #[error("its answer is not the JSON that was expected")]
    NotJson,
    /// An answer in a coding that was not asked for.
    #[error("its answer is compressed ({0}), which was not requested: is a gateway in between?")]
    Coded(String),
    /// An answer beyond any believable size, in bytes.
    #[error("its answer is longer than {} KiB", .0 / 1024)]
    TooLong(usize),
    /// A file of the client certificate.
    #[error("cannot read {path:?}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// And why.
        error: io::Error,
    },
    /// The HTTP client cannot be made, or what is configured would not do.
    #[error("it cannot be asked as configured: {0}")]
    Client(String),
}

impl Error {
    /// Whether OpenBAO answered so: 403, which is a dead token or a path that is forbidden.
    pub fn is_status(&self, wanted: u16) -> bool {
        matches!(self, Error::Said { status, .. } if *status == wanted)
    }

    /// How long not to ask again, where it says that it is asked too often; zero where it does not
    /// say.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Busy { after, .. } => Some(after.unwrap_or_default()),
            _ => None,
        }
    }
}
