//! What has to be true of a connection before its bytes reach a database.
//!
//! Each stage is a type that can only be made from the stage before it, by value, in the file
//! named for it. Later stages import earlier ones, never the other way round. `chain.rs` runs them.
//!
//! ```text
//! Accepted -> Secured -> Started -> Identified -> Routed -> Leased -> Attached -> Spliced -> Ending
//! ```
//!
//! Beside the stages stand `client.rs` (what they hand on, and what outlives them), `resources.rs`
//! (what a session owns), `cancelling.rs` (the one fork without a token) and `authority.rs` (what may
//! end a spliced session).
//! ARCHITECTURE.md has the packets of a session in a picture.

mod accepted;
mod attached;
mod authority;
mod cancelling;
mod chain;
mod client;
mod identified;
mod leased;
mod resources;
mod routed;
mod secured;
mod spliced;
mod started;

pub(crate) use chain::serve;
pub(crate) use client::Client;
