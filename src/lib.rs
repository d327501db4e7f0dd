//! pgsilo: a PostgreSQL proxy that gives every tenant its own database.
//!
//! # The map
//!
//! The chain (`session`), each stage made from the one before it by value:
//!
//! ```text
//! Accepted -> Secured -> Started -> Identified -> Routed -> Leased -> Attached -> Spliced -> Ending
//! ```
//!
//! The layers, each of which imports only what stands below it:
//!
//! ```text
//! server                        listeners and event loops
//! admin                         metrics and health
//! config                        the file as values, and what it names, read
//! session                       the chain, one file a stage, and the one call that refuses
//! refusal                       what the parts' errors are to a client
//! proxy                         what all sessions share
//! sessions                      who is here, by tenant, and the places that sessions have
//! splice, cancel, pool          the relay; cancel keys; the pool of idle connections
//! backend, frontend, listener   the one dial and the login; bounded reads; where clients connect
//! route                         which of its tenants a session is for: a pure decision
//! registry_database             a database as the registry's source, read with a leased login
//! cluster_watch                 looks at the servers of clusters that have several
//! identity                      who a session is, however that was proved
//! token, registry, lease        three parts that never import each other: they meet in stages
//! clusters                      which server of a cluster takes writes
//! metrics                       the table of metrics
//! audit                         the trail of a connection, and the events
//! reason, ending                the tables of refusals and endings
//! stream, limits, proxy_protocol, log
//! ```
//!
//! `tests/structure.rs` reads this map and keeps it. `backend::dial` takes a `Route`, which only
//! the pure decision of `route` makes, of a verified identity: nothing else can be dialled. What
//! the control plane must agree with is in `pgsilo-core`, the protocol in `pgsilo-wire`.

#![cfg_attr(
    test,
    expect(clippy::disallowed_methods, reason = "unit tests have files and sockets of their own")
)]

mod admin;
mod audit;
mod backend;
mod cancel;
mod cluster_watch;
mod clusters;
pub mod config;
mod ending;
mod frontend;
mod identity;
mod lease;
mod limits;
mod listener;
pub mod log;
pub mod metrics;
mod pool;
mod proxy;
pub mod proxy_protocol;
mod reason;
mod refusal;
pub mod registry;
pub mod registry_database;
mod route;
pub mod server;
mod session;
mod sessions;
mod splice;
mod stream;
pub mod token;

pub use ending::Ending;
pub use refusal::{Reason, Refusal};
