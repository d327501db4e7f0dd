//! End to end: real PostgreSQL, real OpenBAO, real clients, and the pgsilo program itself.
//!
//! One sandbox serves the whole run; each test starts a pgsilo of its own in front of it, with
//! the configuration that it needs, and reads that one's audit events and metrics. A missing
//! program fails the run: nothing is skipped. Nothing sleeps: everything waits for an event.

mod authority;
mod bad_input;
mod isolation;
mod leases;
mod limits;
mod opening;
mod outside;
mod refusals;
mod relay;
mod support;
