//! A stage is earned once for each connection: it cannot be kept for the next one.

use pgsilo::session::{
    Accepted, Attached, Cancelling, Identified, Leased, Routed, Secured, Spliced, Started,
};

fn clone<T: Clone>() {}

fn main() {
    clone::<Accepted<'static>>();
    clone::<Secured<'static>>();
    clone::<Started<'static>>();
    clone::<Identified<'static>>();
    clone::<Routed<'static>>();
    clone::<Leased<'static>>();
    clone::<Attached<'static>>();
    clone::<Spliced<'static>>();
    clone::<Cancelling<'static>>();
}
