//! Connections to the databases that a registry names, protected as their placements say.

use anyhow::{Context as _, Result, bail};
use futures_util::future::try_join_all;
use pgsilo_core::registry::Placement;
use pgsilo_core::secret::Secret;
use pgsilo_registry::connection::{self, ConnectError, Database, Login, Purpose, Server};
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
    /// A connection to a placement's database; it closes when the client is dropped. Of several
    /// servers, to the one that takes writes.
    pub(crate) async fn connect(&self, placement: &Placement) -> Result<Client> {
        let database = Database::of(&placement.cluster, &placement.dbname);
        let server = database.writer(None);
        self.connect_to(database, server, placement).await
    }

    /// Connections to the same database at each of its cluster's servers, whatever they are.
    pub(crate) async fn connect_to_each(&self, placement: &Placement) -> Result<Vec<Client>> {
        let database = Database::of(&placement.cluster, &placement.dbname);
        let each = database.hosts.iter().map(|host| {
            let database = Database { hosts: vec![host.clone()], ..database.clone() };
            let connected = self.connect_to(database, Server::Any, placement);
            async move { connected.await.with_context(|| format!("the server {host}")) }
        });
        try_join_all(each).await
    }

    async fn connect_to(
        &self,
        database: Database,
        server: Server,
        placement: &Placement,
    ) -> Result<Client> {
        let purpose =
            Purpose { application_name: "pgsiloctl".to_owned(), options: SETTINGS, server };
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
