//! What a route leads to is for the dial site and the lease alone.

use pgsilo::session::Route;

fn look(routed: &Route) {
    let _ = routed.tenant();
    let _ = routed.request(None);
    let _ = &routed.tenant;
}

fn main() {}
