//! A connection that is logged in: on its way to a session, or idle until one comes for it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use pgsilo_wire::message;
use tokio::io::AsyncWriteExt;

use super::error::BackendError;
use super::messages::closed;
use super::version::ServerVersion;
use super::{Connection, Process};
use crate::route::Route;
use crate::stream::{self, Stream};

/// A logged-in connection to a database that is the tenant's.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) stream: Stream,
    pub(crate) process: Process,
    /// ParameterStatus and notices as they came, for the client.
    pub(crate) greeting: Vec<u8>,
    pub(crate) past: Past,
}

/// What has become of a connection since it was logged in on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    pub(crate) made: BootTime,
    /// When its database was last asked whose it is, and said so.
    pub(crate) sealed: BootTime,
    /// How many sessions have had it before.
    pub(crate) sessions: u32,
    /// Whether its login was bound to its TLS channel.
    pub(crate) is_bound: bool,
    /// Of the server, if it has said so.
    pub(super) version: Option<ServerVersion>,
}

/// An [`Attachment`] that waits for its session, on no event loop.
#[derive(Debug)]
pub(crate) struct Parked {
    stream: stream::Parked,
    process: Process,
    greeting: Vec<u8>,
    past: Past,
}

impl Attachment {
    /// Leaves the event loop. Nothing is read until it is resumed.
    pub(crate) fn park(self) -> io::Result<Parked> {
        let Attachment { stream, process, greeting, past } = self;
        Ok(Parked { stream: stream.park()?, process, greeting, past })
    }
}

impl Parked {
    /// Tells the database that nobody will use it, and waits until its place there is free: its process
    /// gives that back before its end closes the connection.
    pub(crate) async fn say_goodbye(self) -> io::Result<()> {
        let mut stream = self.stream.resume()?;
        stream.write_all(&message::TERMINATE).await?;
        stream.shutdown().await?;
        closed(&mut stream).await
    }

    /// The database's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Comes to the event loop that this runs on, if the connection still lives and its database is
    /// sealed for the tenant of the route, which must be the one that it was dialled for. What the
    /// database said of that lately counts, if it has said nothing since then.
    pub(crate) async fn resume(
        self,
        route: &Arc<Route>,
        lately: Duration,
    ) -> Result<Attachment, BackendError> {
        let Parked { stream, process, mut greeting, mut past } = self;
        if past.sealed.elapsed() < lately && stream.is_silent() {
            return Ok(Attachment { stream: stream.resume()?, process, greeting, past });
        }
        let stream = stream.resume()?;
        let mut connection = Connection::new(stream, route, process.redial.clone());
        connection.version = past.version;
        // What a reload has changed meanwhile is told here as well, and becomes part of the greeting.
        past.sealed = BootTime::now();
        connection.check_seal(route.tenant().id(), &mut greeting).await?;
        Ok(Attachment { stream: connection.into_stream()?, process, greeting, past })
    }
}
