//! What pgsilo's data plane and its control plane must agree on: one type, one grammar and one rule
//! each.
//!
//! Nothing here serves or asks anybody by itself, and nothing knows of a session.

#![cfg_attr(
    test,
    expect(clippy::disallowed_methods, reason = "unit tests have files and sockets of their own")
)]

pub mod addresses;
pub mod backoff;
pub mod cause;
pub mod clock;
pub mod coding;
pub mod duration;
pub mod file;
pub mod host;
pub mod limits;
pub mod names;
pub mod registry;
pub mod secret;
mod shared_map;
pub mod stamp;
pub mod tenant;
pub mod text;
pub mod timeline;
pub mod tls;
pub mod toml_file;
