//! pgsiloctl: the control plane's hand.
//!
//! It works with the *provisioner* identity (see [`provision`]) and never with a tenant's
//! credential. What a script would read goes to stdout, progress and errors go to stderr.

mod bao;
pub mod leases;
mod postgres;
pub mod provision;
mod provisioner;
pub mod registry;
mod revocation;
pub mod say;
mod secrets;
