//! A stage that was earned cannot be turned into one for another tenant.

use pgsilo::session::{Leased, Routed};

fn other_tenant<'c>(mut mine: Routed<'c>, theirs: Routed<'c>) {
    mine.route = theirs.route;
}

fn other_route<'c>(mut mine: Leased<'c>, theirs: Routed<'c>) {
    mine.routed = theirs;
}

fn main() {}
