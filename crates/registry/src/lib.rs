//! The registry in PostgreSQL: tenants, where they are, who may use them and who is kept out.
//!
//! - [`schema`]: its tables and views, in versions, and who brings a database to the newest.
//! - [`read`]: what a proxy reads, all of it or what is newer than a revision.
//! - [`status`]: how it is, and which proxies are behind.
//! - [`connection`]: how its server is connected to.
//! - [`observe`]: which server of a cluster takes writes: the one thing that is asked of other servers.
//!
//! Its rows have one revision, raised by each transaction that writes, under a lock that is held to
//! the transaction's end: so whoever has read up to a revision has missed nothing before it. Rows
//! carry the revision of their last change, and what is gone leaves a tombstone with its own.

pub mod connection;
pub mod observe;
pub mod read;
pub mod schema;
pub mod status;
