//! OpenBAO's HTTP API, as far as pgsilo needs it: the one client of the data plane and of the
//! control plane. Each request is a type, and each is sent by one function.
//!
//! | module | feature | what |
//! |---|---|---|
//! | `transport` | | how requests are sent, and what of an answer is believed |
//! | `tokens` | | logins and tokens |
//! | `leases` | `data` | the data plane's: credentials and their leases |
//! | `client`, `requests` | `control` | the control plane's: OpenBAO as one identity |
//!
//! The features are the boundary between the planes. The proxy depends on this package with `data`,
//! `pgsiloctl` with `control`: `cargo check -p pgsilo` and `cargo check -p pgsiloctl` show that
//! neither names what is the other's. A build of the whole workspace has both.
//!
//! # What is used of vaultrs
//!
//! Its requests: structs that say a method, a path, a query and a body (they are
//! `rustify::Endpoint`s). Those four are read of them, and `transport` sends what they say, over
//! an HTTP client of our own. The functions that vaultrs and rustify send requests with are never
//! called: they log what an answer that is an error says, keep copies of whole answers in errors
//! whose Debug prints them, read bodies without a bound, panic on a token that is no header, drop
//! lease ids, and hold what they were given as `String`s that print in Debug and are not wiped. So
//! answers are our own, too, and hold `Secret`s.
//!
//! # What always holds
//!
//! - No token, secret or password is in an error, in Debug or in a log. Of an answer that is an
//!   error only OpenBAO's `errors` are kept, in one line and cut.
//! - An answer is read up to a bound and wiped after it was understood; a request's body that holds
//!   a secret is written once and wiped when it was sent. These are the copies made here: what the
//!   HTTP and TLS libraries keep in their buffers and headers is not wiped.
//! - A token is sent over TLS, or to this machine. One redirect is followed, of a standby to the
//!   active server, and never from https to http.
//! - An answer that an agent kept is refused, and one in a coding that was not asked for.
//! - No request is retried here: that is its caller's decision.
//! - Nothing is read of the environment, but by the system's certificate store (`SSL_CERT_FILE`).

mod answers;
#[cfg(feature = "control")]
mod client;
mod clients_by_token;
mod error;
mod fault;
mod json;
#[cfg(feature = "data")]
mod leases;
#[cfg(feature = "control")]
pub mod requests;
mod settings;
mod tokens;
mod transport;

#[cfg(feature = "control")]
pub use client::{Client, Credential, DatabaseConfig, DatabaseRole, Failure, LeaseInfo};
pub use error::Error;
pub use fault::{DatabaseFault, FullScope};
#[cfg(feature = "data")]
pub use leases::{Granted, Renewed};
pub use settings::{Bounds, ClientCertificate, Settings};
pub use tokens::{Nature, Token};
pub use transport::OpenBao;
