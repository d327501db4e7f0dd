//! Gives a tenant's broker a password that PostgreSQL and OpenBAO both know, where one of them has another:
//! a backup of OpenBAO that is older than `rotate-root`, or a standby that was promoted before it had it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use pgsilo::registry::Tenant;
use pgsilo::tenant::Access;
use serde_json::{Map, Value, json};
use tokio_postgres::Client;

use super::standing::Standing;
use crate::bao::{Bao, text};
use crate::secret::Secret;

/// What of a configuration is read in one place and written in another.
const OUTER: [&str; 4] =
    ["plugin_name", "plugin_version", "allowed_roles", "root_credentials_rotate_statements"];

/// Renews the broker of each of OpenBAO's database configurations that the tenant leases from. Where
/// OpenBAO knows none, that is a finding of the audit, and nothing is done here.
pub(super) async fn renew(tenant: &Tenant, database: &Client, bao: &Bao) -> Result<()> {
    let mount = &tenant.lease().mount;
    let mut configurations = BTreeSet::new();
    for name in Access::ALL.iter().filter_map(|access| tenant.lease().role(*access)) {
        if let Some(role) = bao.find(&format!("{mount}/roles/{name}")).await? {
            configurations.insert(text(&role, "/data/db_name")?.to_owned());
        }
    }
    for name in configurations {
        let path = format!("{mount}/config/{name}");
        if let Some(configuration) = bao.find(&path).await? {
            renew_one(&path, &configuration["data"], database, bao).await?;
            bao.write(&format!("{mount}/rotate-root/{name}"), json!({})).await?;
        }
    }
    Ok(())
}

/// Makes the configuration anew, with another password. It is not updated: one that is may lead elsewhere
/// with the old one.
async fn renew_one(path: &str, old: &Value, database: &Client, bao: &Bao) -> Result<()> {
    let broker = text(old, "/connection_details/username")?;
    let standing = Standing::of(database, broker).await?;
    let standing = standing.with_context(|| format!("there is no role {broker}"))?;
    let mut new = Map::new();
    for key in OUTER {
        if !is_empty(&old[key]) {
            new.insert(key.to_owned(), old[key].clone());
        }
    }
    let details = old["connection_details"].as_object();
    new.extend(details.context("OpenBAO tells no connection_details")?.clone());
    ensure!(new.contains_key("connection_url"), "OpenBAO tells no connection_url");
    let password = Secret::random()?;
    let verifier = postgres_protocol::password::scram_sha_256(password.expose().as_bytes());
    standing.set_password(database, &verifier).await?;
    new.insert("password".to_owned(), password.expose().into());
    bao.delete(path).await?;
    bao.write(path, Value::Object(new)).await?;
    Ok(())
}

/// What nobody has set is not written: the provisioner may write what `provisioner.hcl` lists.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}
