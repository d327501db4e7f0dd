//! Each constructor takes the stage before it and no other. From outside they are private as
//! well (see `stage_by_constructor.rs`); here the mismatched types are what matters.

use pgsilo::session::{Attached, Identified, Leased, Routed, Secured, Spliced, Started};

fn route_without_a_token(started: Started<'_>) {
    let _ = Routed::route(started);
}

async fn lease_without_a_route(identified: Identified<'_>) {
    let _ = Leased::lease(identified).await;
}

async fn attach_without_a_lease(routed: Routed<'_>) {
    let _ = Attached::attach(routed).await;
}

fn splice_without_a_login(leased: Leased<'_>) {
    let _ = Spliced::splice(leased);
}

async fn identify_in_clear(secured: Secured<'_>) {
    let _ = Identified::identify(secured).await;
}

fn main() {}
