//! Even whoever holds the right predecessor cannot make the next stage: the chain does.

use pgsilo::session::{
    Accepted, Attached, Client, Identified, Leased, Routed, Secured, Spliced, Started,
};

fn accept(client: &mut Client) {
    let _ = Accepted::accept(client);
}

async fn secure(accepted: Accepted<'_>) {
    let _ = Secured::secure(accepted).await;
}

fn start(secured: Secured<'_>) {
    let _ = Started::start(secured);
}

async fn identify(started: Started<'_>) {
    let _ = Identified::identify(started).await;
}

fn route(identified: Identified<'_>) {
    let _ = Routed::route(identified);
}

async fn lease(routed: Routed<'_>) {
    let _ = Leased::lease(routed).await;
}

async fn attach(leased: Leased<'_>) {
    let _ = Attached::attach(leased).await;
}

fn splice(attached: Attached<'_>) {
    let _ = Spliced::splice(attached);
}

async fn run(spliced: Box<Spliced<'_>>) {
    spliced.run().await;
}

fn main() {}
