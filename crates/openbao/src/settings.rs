//! Where OpenBAO is, and how it is reached.

use std::path::PathBuf;
use std::time::Duration;

/// How to reach OpenBAO.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Base URL: `https://127.0.0.1:8200`. http only where that is this machine.
    pub address: String,
    /// The Unix socket of a local agent, which `address` is then reached through.
    pub socket: Option<PathBuf>,
    /// PEM of the authorities that OpenBAO's certificate must chain to; `None`: the system's.
    pub ca: Option<Vec<u8>>,
    /// What is shown to OpenBAO in TLS.
    pub identity: Option<ClientCertificate>,
    /// Sent with each request.
    pub namespace: Option<String>,
    /// Of one HTTP request, connect included.
    pub timeout: Duration,
    /// Connections that are kept while nothing is asked.
    pub max_idle_connections: usize,
    /// How much of an answer is read.
    pub bounds: Bounds,
}

impl Settings {
    /// The control plane's: it asks little at once, for as long as that takes, and lists what there
    /// is.
    pub fn for_control(address: &str) -> Settings {
        Settings {
            address: address.to_owned(),
            socket: None,
            ca: None,
            identity: None,
            namespace: None,
            timeout: Duration::from_secs(30),
            max_idle_connections: 8,
            bounds: Bounds::CONTROL,
        }
    }
}

/// How much of an answer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The longest answer, in bytes.
    pub answer: usize,
    /// How much of OpenBAO's own words is kept in an error, in characters.
    pub words: usize,
}

impl Bounds {
    /// Answers to sessions' requests are small, and their errors go to the log.
    pub const DATA: Bounds = Bounds { answer: 256 * 1024, words: 300 };
    /// A list of leases has some 30 bytes for each: half a million of one role's. An operator reads
    /// all that OpenBAO says.
    pub const CONTROL: Bounds = Bounds { answer: 16 * 1024 * 1024, words: 4000 };
}

/// Files that are read by [`present_certificate`](crate::OpenBao::present_certificate), and at the
/// start.
#[derive(Clone, Debug)]
pub struct ClientCertificate {
    /// PEM, leaf first.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}
