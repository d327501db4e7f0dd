//! Cancelling: the fork without a token. The request's key is the proof, as it was handed out
//! by an attached session; the client is never answered.
//!
//! How long that takes is the database's to say, and so may be a tenant's. So no such request makes
//! a place among its listener's handshakes its own: a few of each tenant give theirs back, and all
//! others continue until another connection needs the slot.

use std::pin::pin;
use std::time::Duration;

use pgsilo_wire::startup::CancelRequest;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::accepted::Accepted;
use super::client::Stop;
use crate::audit;
use crate::metrics::{self, Cancelled};

/// How long a client may take to let its socket be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why it was not seen to its end.
const EVICTED: &str = "its slot was needed before the database had closed it";

/// A cancel request on its way to the session whose key it shows.
#[derive(Debug)]
pub(super) struct Cancelling<'c> {
    accepted: Accepted<'c>,
    request: CancelRequest,
}

impl<'c> Cancelling<'c> {
    pub(super) fn new(accepted: Accepted<'c>, request: CancelRequest) -> Cancelling<'c> {
        Cancelling { accepted, request }
    }

    /// Forwards it, and holds the client's socket until the database has closed: a cancel that
    /// came late would hit the next query. Stops when its place is another's.
    pub(super) async fn forward(mut self, evicted: impl Future<Output = ()>) -> Result<(), Stop> {
        let (mut evicted, mut stays) = (pin!(evicted), true);
        let client = self.accepted.client();
        let found = client.proxy.cancel_keys.find(&self.request, client.address);
        let (result, counted) = match found {
            None => (Cancelled::UnknownKey, None),
            Some(found) => {
                let counted = client.proxy.cancelling.count(found.tenant());
                if counted.is_some() {
                    client.handshake = None;
                }
                client.trail.tenant = Some(found.tenant().clone());
                let cancelled = tokio::select! {
                    biased;
                    cancelled = found.cancel() => cancelled.map_err(|error| error.to_string()),
                    () = &mut evicted => {
                        stays = false;
                        Err(EVICTED.to_owned())
                    }
                };
                let (session, failure) = (found.session(), cancelled.as_ref().err());
                audit::cancelled(&client.trail, session, found.pid(), failure.map(String::as_str));
                let result = match failure {
                    None => Cancelled::Forwarded,
                    Some(_) => Cancelled::Failed,
                };
                (result, counted)
            }
        };
        metrics::CANCEL_REQUESTS.of(result).increment(1);
        if stays {
            // Over TLS a close_notify, as PostgreSQL sends it: libpq calls a cancel whose
            // connection ends without one failed ("unexpected eof while reading").
            stays = tokio::select! {
                _closed = timeout(CLOSE_TIMEOUT, client.frontend.stream.shutdown()) => true,
                () = &mut evicted => false,
            };
        }
        drop(counted);
        if stays { Ok(()) } else { Err(Stop::Evicted) }
    }
}
