//! No stage can be written down: its fields are private to the file that proves it.

use pgsilo::session::{
    Accepted, Attached, Cancelling, Identified, Leased, Routed, Secured, Spliced, Started,
};

fn any<T>() -> T {
    panic!()
}

fn main() {
    let _ = Accepted { ..any() };
    let _ = Secured { ..any() };
    let _ = Started { ..any() };
    let _ = Identified { ..any() };
    let _ = Routed { ..any() };
    let _ = Leased { ..any() };
    let _ = Attached { ..any() };
    let _ = Spliced { ..any() };
    let _ = Cancelling { ..any() };
}
