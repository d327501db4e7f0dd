//! `pgsiloctl registry export`: what the registry says, as a file.

use anyhow::{Context, Result};
use pgsilo_registry::schema::installed;
use tokio_postgres::IsolationLevel;

use super::Server;
use super::apply::read;
use crate::say;

/// Writes it to standard output.
pub(super) async fn run(server: &Server, json: bool) -> Result<()> {
    let mut session = server.open().await?;
    installed(&session.client)
        .await?
        .context("the database has no registry: run pgsiloctl registry init")?;
    let of_one_moment = session.client.build_transaction().read_only(true);
    let transaction = of_one_moment.isolation_level(IsolationLevel::RepeatableRead).start().await?;
    let document = read(&transaction).await?.document()?;
    let text = if json {
        serde_json::to_string_pretty(&document)?
    } else {
        toml::to_string(&document).context("writing TOML")?
    };
    say::data(text.trim_end()).context("writing it")
}
