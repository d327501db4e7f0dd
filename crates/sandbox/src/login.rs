//! A role that logs in to the sandbox's PostgreSQL by password, without pgsilo in between.

use anyhow::{Context, Result};
use pgsilo_core::secret::Secret;
use tokio_postgres::{Client, NoTls};

/// Whom, and where.
#[derive(Debug, Clone)]
pub(super) struct Login {
    /// An address, or the folder of a socket.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) user: String,
    pub(super) password: Secret,
}

impl Login {
    /// A connection to `database`; it closes when the client is dropped.
    pub(super) async fn connect(&self, database: &str) -> Result<Client> {
        let (client, connection) = tokio_postgres::Config::new()
            .host(&self.host)
            .port(self.port)
            .user(&self.user)
            .password(self.password.expose())
            .dbname(database)
            .application_name("pgsilo-sandbox")
            .connect(NoTls)
            .await
            .with_context(|| format!("logging in to database {database} as {}", self.user))?;
        // Its error is also the error of whatever statement was under way.
        tokio::spawn(connection);
        Ok(client)
    }
}
