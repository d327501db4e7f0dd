//! pgsiloctl: the control plane's hand.
//!
//! It works as the *provisioner* (see [`provision`]); as a tenant's role only where a login is tried. What a
//! script would read goes to stdout, progress and errors go to stderr.
//!
//! | module | what |
//! |---|---|
//! | [`settings`] | `pgsiloctl.toml`; where nothing is said there, options and the environment |
//! | [`bootstrap`] | OpenBAO, the registry and clusters, made ready once by an administrator |
//! | [`tenants`] | the commands for tenants, their states and their lives |
//! | [`provision`] | what a tenant has, step by step, made and taken back; the journal of that |
//! | [`certificate`] | what certifies that a tenant was removed |
//! | [`registry`] | the registry's own commands, and who writes to it |
//! | [`leases`] | the audit of leases, and what it mends |
//! | `context`, `logins`, `postgres`, `bao` | logins, made for this process and given back |
//! | `cluster` | a cluster, as it is reached from here and by OpenBAO |
//! | `acting_role`, `revocation` | what only another role may do; how a leased role ends |

mod acting_role;
mod bao;
pub mod bootstrap;
pub mod certificate;
mod cluster;
mod context;
pub mod leases;
mod logins;
pub mod manual;
mod postgres;
pub mod provision;
mod provisioner;
pub mod registry;
mod revocation;
pub mod say;
mod secrets;
pub mod settings;
pub mod tenants;
