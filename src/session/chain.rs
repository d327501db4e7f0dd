//! The chain as a specification: the order of the stages, and the only call that refuses.
//!
//! It stands beside the stages and not above them: what is private here none of them can name, so
//! this file shows every way to be refused. A stage that stops answers with a refusal, or says that
//! there is no client left to tell. A panic in a stage is a refusal, too, and the login's deadline
//! is around all of them. A connection whose place is given to another is closed without a word.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::time::timeout_at;

use super::accepted::Accepted;
use super::attached::Attached;
use super::cancelling::Cancelling;
use super::client::{Client, Stop};
use super::identified::Identified;
use super::leased::Leased;
use super::routed::Routed;
use super::secured::Secured;
use super::spliced::Spliced;
use super::started::{StartOutcome, Started};
use crate::audit;
use crate::limits::Eviction;
use crate::metrics;
use crate::refusal::{Reason, Refusal};

/// What a connection turned out to be for.
enum Admitted<'c> {
    Session(Box<Spliced>),
    Cancel(Cancelling<'c>),
}

/// Serves one connection from its first byte to its last. While its place is not its own,
/// `eviction` may end it. An async function would hold its arguments twice.
pub(crate) fn serve(
    client: Box<Client>,
    eviction: Option<Eviction>,
) -> impl Future<Output = ()> + Send {
    // Boxed, and freed when it is over: a session holds only the memory that it needs now.
    let opening = Box::pin(open(client, eviction));
    async move {
        let opened = opening.await;
        if let Some((spliced, client)) = opened {
            spliced.run(client).await;
        }
    }
}

/// Serves a connection until it is a session, or to its end if it is to be none.
async fn open(
    mut client: Box<Client>,
    mut eviction: Option<Eviction>,
) -> Option<(Box<Spliced>, Box<Client>)> {
    let deadline = client.deadline();
    // Boxed, here and below: of what comes one after the other each has its own size.
    let login = AssertUnwindSafe(Box::pin(login(&mut client))).catch_unwind();
    let stop = tokio::select! {
        biased;
        login = timeout_at(deadline, login) => match login {
            Ok(Ok(Ok(Admitted::Session(spliced)))) => return Some((spliced, client)),
            Ok(Ok(Ok(Admitted::Cancel(cancelling)))) => {
                match Box::pin(cancelling.forward(evicted(&mut eviction))).await {
                    Ok(()) => return None,
                    Err(stop) => stop,
                }
            }
            Ok(Ok(Err(stop))) => stop,
            Ok(Err(_panic)) => Refusal::new(Reason::Internal, "a stage of the login panicked").into(),
            Err(_elapsed) => Refusal::new(Reason::LoginTimeout, "the login deadline passed").into(),
        },
        () = evicted(&mut eviction) => Stop::Evicted,
    };
    match stop {
        // Polled first: a connection that is evicted at that moment has been refused.
        Stop::Refused(refusal) => tokio::select! {
            biased;
            () = Box::pin(refuse(&mut client, *refusal)) => {}
            () = evicted(&mut eviction) => {}
        },
        Stop::ClientLeft => client.abandon(),
        Stop::Evicted => client.evict(),
    }
    None
}

async fn evicted(eviction: &mut Option<Eviction>) {
    match eviction {
        Some(eviction) => eviction.told().await,
        None => std::future::pending().await,
    }
}

/// The login, as a specification.
async fn login(client: &mut Client) -> Result<Admitted<'_>, Stop> {
    let secured = timeout_at(client.startup_deadline(), async {
        let accepted = Accepted::accept(client).await?;
        Secured::secure(accepted).await
    });
    let secured = secured.await.map_err(|_elapsed| {
        let cause = "the startup packet did not come within [limits] startup_timeout";
        Refusal::new(Reason::LoginTimeout, cause)
    })??;
    let started = match Started::start(secured)? {
        StartOutcome::Session(started) => started,
        StartOutcome::Cancel(cancelling) => return Ok(Admitted::Cancel(cancelling)),
    };
    let identified = Identified::identify(started).await?;
    let routed = Routed::route(identified).await?;
    let leased = Leased::lease(routed).await?;
    let attached = Attached::attach(leased).await?;
    Ok(Admitted::Session(Box::new(Spliced::splice(attached))))
}

/// Turns a connection away: one metric, one audit event, one message, and the close.
async fn refuse(client: &mut Client, refusal: Refusal) {
    client.unprove();
    metrics::REFUSALS.of(refusal.reason()).increment(1);
    audit::refused(&client.trail, &refusal.told());
    let message = refusal.message(client.trail.session);
    client.frontend.send_last(&message).await;
}
