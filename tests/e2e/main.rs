//! End to end: real PostgreSQL, real OpenBAO, real clients, and the pgsilo program itself.
//!
//! One sandbox serves the whole run; each test starts a pgsilo of its own in front of it, with
//! the configuration that it needs, and reads that one's audit events and metrics. A missing
//! program fails the run: nothing is skipped. Nothing sleeps: everything waits for an event.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why, and so do the functions that tests share"
)]
#![expect(clippy::needless_pass_by_value, reason = "`json!` makes values")]

mod aliases;
mod authority;
mod bad_input;
mod bearer;
mod certificates;
mod client;
mod denied;
mod deployments;
mod drivers;
mod failover;
mod faults;
mod isolation;
mod keys;
mod leases;
mod limits;
mod listeners;
mod log;
mod logins;
mod mounts;
mod openbao;
mod opening;
mod orphans;
mod outages;
mod outside;
mod own_sessions;
mod pool;
mod pools;
mod prepared;
mod provision;
mod quotas;
mod refusals;
mod registry;
mod relay;
mod restored;
mod reuse;
mod revocation;
mod sessions;
mod shares;
mod sidecar;
mod starting;
mod times;
mod unwell;
mod vanished;
