//! Gives a tenant's broker a password that PostgreSQL and OpenBAO both know, where one of them has
//! another: a backup of OpenBAO that is older than `rotate-root`, or a standby that was promoted
//! before it had it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgsilo_core::registry::Tenant;
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::Access;
use pgsilo_openbao::{Client as Bao, DatabaseConfig, Failure};
use serde_json::{Map, Value};
use tokio_postgres::Client;

use crate::acting_role::ActingRole;

/// What `provisioner.hcl` lets the provisioner write of a configuration, beside the password.
/// Whatever else is set could not be written again.
const OUTER: [&str; 2] = ["plugin_name", "allowed_roles"];
const DETAILS: [&str; 9] = [
    "connection_url",
    "username",
    "password_authentication",
    "username_template",
    "max_open_connections",
    "max_idle_connections",
    "max_connection_lifetime",
    "verify_connection",
    "tls_ca",
];
/// How often writing is tried: OpenBAO logs in to the database before it believes a configuration.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// Renews the broker of each of OpenBAO's database configurations that the tenant leases from.
/// Where OpenBAO knows no role to lease from, that is a finding of the audit, and nothing is done
/// here.
///
/// # Errors
/// When nothing was changed, or what an operator must write himself: that is said then.
pub(super) async fn renew(tenant: &Tenant, database: &Client, bao: &Bao) -> Result<()> {
    let mount = &tenant.lease().mount;
    let mut configurations = BTreeSet::new();
    for name in Access::ALL.iter().filter_map(|access| tenant.lease().role(*access)) {
        if let Some(role) = bao.database_role(mount, name).await? {
            configurations.insert(role.db_name);
        }
    }
    for name in configurations {
        let found = bao.database_config(mount, &name).await?;
        let found = found.with_context(|| {
            format!(
                "OpenBAO has no {mount}/config/{name}, which its roles lease from: describe it to OpenBAO again"
            )
        })?;
        renew_one((mount, &name), &found, database, bao).await?;
        bao.rotate_root(mount, &name).await?;
    }
    Ok(())
}

/// Makes the configuration anew, with another password. It is not updated: one that is may lead
/// elsewhere with the old one. So everything is checked before what is there is deleted.
async fn renew_one(
    (mount, name): (&str, &str),
    old: &DatabaseConfig,
    database: &Client,
    bao: &Bao,
) -> Result<()> {
    let path = format!("{mount}/config/{name}");
    let broker = old.username().context("OpenBAO does not tell whom it logs in as")?;
    let acting = ActingRole::of(database, broker).await?;
    let acting = acting.with_context(|| format!("there is no role {broker}"))?;
    let new = Value::Object(writable(old).with_context(|| path.clone())?);
    let password = Secret::random()?;
    let verifier = postgres_protocol::password::scram_sha_256(password.expose());
    acting.set_password(database, &verifier).await?;
    bao.delete_database_config(mount, name).await?;
    let written = write_again(|| bao.set_database_config(mount, name, &new, &password)).await;
    written.with_context(|| {
        format!(
            "{path} is deleted and could not be written again. Give {broker} a password, write it with \
             that (bao write {path} password=... and what follows), and rotate it: {new}"
        )
    })
}

async fn write_again(write: impl AsyncFn() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut attempt = 1;
    loop {
        match write().await {
            Ok(()) => return Ok(()),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
        attempt += 1;
    }
}

/// What is to be written for a configuration that was read.
///
/// # Errors
/// When something is set that the provisioner may not write.
fn writable(old: &DatabaseConfig) -> Result<Map<String, Value>> {
    let mut new = Map::new();
    for (allowed, settings) in [(&OUTER[..], &old.others), (&DETAILS[..], &old.connection_details)]
    {
        for (key, value) in settings {
            if is_empty(value) {
                continue;
            }
            ensure!(
                allowed.contains(&key.as_str()),
                "it has {key}, which the provisioner may not write: renew its broker as an administrator"
            );
            new.insert(key.clone(), value.clone());
        }
    }
    ensure!(new.contains_key("connection_url"), "OpenBAO tells no connection_url");
    Ok(new)
}

/// Fields that were not set are not written.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Bool(set) => !set,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const POLICY: &str = include_str!("../../../../docker/openbao/provisioner.hcl");

    #[test]
    fn the_policy_allows_exactly_the_fields_that_are_written() {
        let block = POLICY.split("path \"pgsilo/+/config/tenant-*\"").nth(1).expect("it is there");
        let allowed = block.split("allowed_parameters = {").nth(1).expect("a list");
        let (allowed, _) = allowed.split_once("\n  }").expect("its end");
        let mut keys: Vec<_> =
            allowed.lines().filter_map(|line| line.trim().split('"').nth(1)).collect();
        keys.retain(|key| *key != "password");
        keys.sort_unstable();
        let mut ours = [&OUTER[..], &DETAILS[..]].concat();
        ours.sort_unstable();
        assert_eq!(keys, ours);
    }

    #[test]
    fn a_configuration_that_cannot_be_written_back_is_left_unchanged() {
        let old = json!({
            "plugin_name": "postgresql-database-plugin",
            "plugin_version": "",
            "allowed_roles": ["tenant-acme-rw"],
            "password_policy": "",
            "root_credentials_rotate_statements": [],
            "connection_details": {
                "connection_url": "postgresql://{{username}}:{{password}}@db1:5432/tenant_acme",
                "username": "tenant_acme_broker",
                "max_open_connections": 4,
            },
        });
        let read = |old: &Value| serde_json::from_value(old.clone()).expect("a configuration");
        let new = writable(&read(&old)).expect("all of it may be written");
        assert_eq!(new["username"], "tenant_acme_broker");
        assert_eq!(new.len(), 5);
        for (pointer, value) in [
            ("/password_policy", json!("strict")),
            ("/root_credentials_rotate_statements", json!(["ALTER ROLE ..."])),
            ("/connection_details", json!({ "connection_url": "x", "private_key": "x" })),
        ] {
            let mut other = old.clone();
            *other.pointer_mut(pointer).expect("there") = value;
            writable(&read(&other)).expect_err("not to be written again");
        }
    }
}
