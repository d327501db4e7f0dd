//! Cancelling: the fork without a token. The request's key is the proof, as it was handed out
//! by an attached session; the client is never answered.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::accepted::Accepted;
use crate::audit;
use crate::wire::startup::CancelRequest;

/// How long a client may take to let its socket be closed.
const GOODBYE: Duration = Duration::from_secs(1);

/// A cancel request on its way to the session whose key it shows.
#[derive(Debug)]
pub struct Cancelling<'c> {
    accepted: Accepted<'c>,
    request: CancelRequest,
}

impl<'c> Cancelling<'c> {
    pub(super) fn new(accepted: Accepted<'c>, request: CancelRequest) -> Cancelling<'c> {
        Cancelling { accepted, request }
    }

    /// Forwards it, and holds the client's socket until the database has closed: a cancel that
    /// came late would hit the next query.
    pub(super) async fn forward(mut self) {
        let client = self.accepted.client();
        let found = client.proxy.cancel_keys.find(&self.request, client.address);
        let result = match found {
            None => "unknown_key",
            Some(found) => {
                client.prove();
                client.trail.tenant = Some(found.whose().tenant.clone());
                let failure = found.cancel().await.err().map(|error| error.to_string());
                let (session, failure) = (found.whose().session, failure.as_deref());
                audit::cancelled(&client.trail, session, found.pid(), failure);
                if failure.is_none() { "forwarded" } else { "failed" }
            }
        };
        metrics::counter!("pgsilo_cancel_requests_total", "result" => result).increment(1);
        // Over TLS a close_notify, as PostgreSQL sends it: libpq calls a cancel whose connection
        // ends without one failed ("unexpected eof while reading").
        let _closed = timeout(GOODBYE, client.frontend.stream.shutdown()).await;
    }
}
