//! A connection that is logged in: on its way to a session, or idle in the pool.

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
use crate::clusters::Reign;
use crate::route::Route;
use crate::stream::{self, Stream};

/// A logged-in connection to a database that is the tenant's.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) stream: Stream,
    pub(crate) process: Process,
    /// ParameterStatus and notices as they came, for the client.
    pub(crate) greeting: Vec<u8>,
    pub(crate) history: History,
    /// The server, where it is one of several.
    pub(crate) reign: Option<Reign>,
}

/// What has happened on a connection since its login.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    pub(crate) opened: BootTime,
    /// When its seal was last read and was the tenant's.
    pub(crate) sealed: BootTime,
    /// How many sessions have used it before.
    pub(crate) sessions: u32,
    /// Whether its login was bound to its TLS channel.
    pub(crate) is_bound: bool,
    /// The server's version, if it was reported.
    pub(super) version: Option<ServerVersion>,
}

/// An idle [`Attachment`], on no event loop.
#[derive(Debug)]
pub(crate) struct IdleBackend {
    stream: stream::DetachedStream,
    process: Process,
    greeting: Vec<u8>,
    history: History,
    reign: Option<Reign>,
}

impl Attachment {
    /// Leaves the event loop. Nothing is read until it is resumed.
    pub(crate) fn detach(self) -> io::Result<IdleBackend> {
        let Attachment { stream, process, greeting, history, reign } = self;
        Ok(IdleBackend { stream: stream.detach()?, process, greeting, history, reign })
    }
}

impl IdleBackend {
    /// Sends a Terminate, and waits until the database has closed the connection: its process has
    /// freed the connection slot by then.
    pub(crate) async fn terminate(self) -> io::Result<()> {
        let mut stream = self.stream.resume()?;
        stream.write_all(&message::TERMINATE).await?;
        stream.shutdown().await?;
        closed(&mut stream).await
    }

    /// The database's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Whether its server was the primary once, and another is now.
    pub(crate) fn is_overtaken(&self) -> bool {
        self.reign.as_ref().is_some_and(Reign::is_over)
    }

    /// Moves to the event loop that this runs on, if the connection is alive and its database is
    /// sealed for the tenant of the route, which must be the one that it was dialled for. The seal
    /// is not read again within `check_delay`, if nothing has arrived since.
    pub(crate) async fn resume(
        self,
        route: &Arc<Route>,
        check_delay: Duration,
    ) -> Result<Attachment, BackendError> {
        let IdleBackend { stream, process, mut greeting, mut history, reign } = self;
        if history.sealed.elapsed() < check_delay && stream.is_silent() {
            return Ok(Attachment { stream: stream.resume()?, process, greeting, history, reign });
        }
        let stream = stream.resume()?;
        let mut connection = Connection::new(stream, route, process.redial.clone());
        connection.version = history.version;
        connection.cluster = reign.as_ref().map(|reign| Arc::clone(reign.cluster()));
        // Settings that a reload has changed meanwhile are reported here, and become part of the
        // greeting.
        history.sealed = BootTime::now();
        let reign = connection.check_seal(route.tenant(), &mut greeting).await?;
        Ok(Attachment { stream: connection.into_stream()?, process, greeting, history, reign })
    }
}
