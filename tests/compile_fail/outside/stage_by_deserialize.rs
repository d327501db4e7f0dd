//! No stage can be read from bytes.

use pgsilo::session::{
    Accepted, Attached, Cancelling, Identified, Leased, Routed, Secured, Spliced, Started,
};

fn deserialize<T: serde::de::DeserializeOwned>() {}

fn main() {
    deserialize::<Accepted<'static>>();
    deserialize::<Secured<'static>>();
    deserialize::<Started<'static>>();
    deserialize::<Identified<'static>>();
    deserialize::<Routed<'static>>();
    deserialize::<Leased<'static>>();
    deserialize::<Attached<'static>>();
    deserialize::<Spliced<'static>>();
    deserialize::<Cancelling<'static>>();
}
