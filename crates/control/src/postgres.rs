//! Connections to the databases that a registry names, protected as their placements say.

use anyhow::{Context as _, Result, bail};
use pgsilo_core::registry::Placement;
use pgsilo_core::secret::Secret;
use pgsilo_registry::connection::{self, ConnectError, Database, Login, Purpose};
use tokio_postgres::Client;

/// A session works inside databases where tenants may make things, some of it as their brokers:
/// nothing of theirs is found by an unqualified name, and nothing is waited for without end.
pub(crate) const SETTINGS: &str = "-c search_path=pg_catalog,pg_temp -c statement_timeout=30s";

/// A role that logs in by password, whatever the server.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) user: String,
    pub(crate) password: Secret,
}

impl Identity {
    /// A connection to a placement's database; it closes when the client is dropped.
    pub(crate) async fn connect(&self, placement: &Placement) -> Result<Client> {
        let database = Database::of(&placement.cluster, &placement.dbname);
        // Of several servers, the one that takes writes.
        let writes = database.hosts.len() > 1;
        let purpose =
            Purpose { application_name: "pgsiloctl".to_owned(), options: SETTINGS, writes };
        let Identity { user, password } = self.clone();
        let session = connection::connect(&database, &Login { user, password }, &purpose).await;
        let session = match session {
            Err(ConnectError::InClear) => {
                bail!("its placement has no TLS, and this identity is not for a network to read")
            }
            session => {
                session.with_context(|| format!("logging in to {placement} as {}", self.user))?
            }
        };
        Ok(session.client)
    }
}
