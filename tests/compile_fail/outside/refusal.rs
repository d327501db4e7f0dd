//! Refusals are the table's: their causes cannot be swapped for a text of one's own.

use pgsilo::{Reason, Refusal};

fn main() {
    let _ = Refusal::new(Reason::Internal, "cause");
    let _ = Reason::Internal.text();
    let _: fn(Refusal) -> String = |refusal| refusal.cause;
}
