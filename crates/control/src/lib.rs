//! pgsiloctl: the control plane's hand.
//!
//! It works with the *provisioner* identity (see [`provision`]) and never with a tenant's
//! credential. What a script would read goes to stdout, progress and errors go to stderr.

mod acting_role;
mod bao;
pub mod bootstrap;
pub mod certificate;
mod cluster;
mod context;
pub mod leases;
mod logins;
mod postgres;
pub mod provision;
mod provisioner;
pub mod registry;
mod revocation;
pub mod say;
mod secrets;
pub mod settings;
pub mod tenants;
