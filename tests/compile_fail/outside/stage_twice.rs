//! A stage is gone once it was used: one lease makes one login, one login one session.

use pgsilo::session::{Attached, Leased, Routed};

fn lease(_: Routed<'_>) {}

fn attach(_: Leased<'_>) {}

fn splice(_: Attached<'_>) {}

fn twice(routed: Routed<'_>, leased: Leased<'_>, attached: Attached<'_>) {
    lease(routed);
    lease(routed);
    attach(leased);
    attach(leased);
    splice(attached);
    splice(attached);
}

fn main() {}
