//! No stage has a default: nothing is ever let in because nobody said otherwise.

use pgsilo::session::{
    Accepted, Attached, Cancelling, Identified, Leased, Routed, Secured, Spliced, Started,
};

fn default<T: Default>() {}

fn main() {
    default::<Accepted<'static>>();
    default::<Secured<'static>>();
    default::<Started<'static>>();
    default::<Identified<'static>>();
    default::<Routed<'static>>();
    default::<Leased<'static>>();
    default::<Attached<'static>>();
    default::<Spliced<'static>>();
    default::<Cancelling<'static>>();
}
