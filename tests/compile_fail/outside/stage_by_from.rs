//! No stage is a conversion away, neither from the one before it nor from what it holds.

use std::sync::Arc;

use pgsilo::registry::Tenant;
use pgsilo::session::{
    Accepted, Attached, Client, Identified, Leased, Routed, Secured, Spliced, Started,
};
use pgsilo::token::Claims;
use pgsilo::wire::startup::Startup;

fn from<A, B: From<A>>() {}

fn main() {
    from::<&'static mut Client, Accepted<'static>>();
    from::<Accepted<'static>, Secured<'static>>();
    from::<Startup, Started<'static>>();
    from::<Claims, Identified<'static>>();
    from::<Arc<Tenant>, Routed<'static>>();
    from::<Identified<'static>, Routed<'static>>();
    from::<Routed<'static>, Leased<'static>>();
    from::<Leased<'static>, Attached<'static>>();
    from::<Attached<'static>, Spliced<'static>>();
}
