//! Pieces of the PostgreSQL frontend/backend protocol, version 3, without I/O.
//!
//! Everything here turns bytes into values or values into bytes; nothing waits, nothing
//! allocates more than the message it was given, and nothing of pgsilo is imported, so that
//! each piece can be fuzzed alone. Source: PostgreSQL's documentation, chapter "Frontend/
//! Backend Protocol", and `src/backend/tcop/backend_startup.c`.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod frame;
pub mod message;
pub mod sasl;
pub mod startup;
