//! What is wrong with a cluster, for all tenants: sessions that have outlived their role,
//! transactions that were prepared, roles of tenants that are no more.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use tokio_postgres::Client;

use super::verdict::ClusterFinding;

/// Looks at the cluster of a database, which serves the given databases of the given tenants.
pub(super) async fn look(
    database: &Client,
    tenants: &BTreeSet<String>,
    databases: &BTreeSet<String>,
) -> Result<Vec<ClusterFinding>> {
    let mut findings = roleless_sessions(database).await.context("the sessions")?;
    findings.extend(prepared(database, databases).await.context("the prepared transactions")?);
    findings.extend(removed_tenants(database, tenants).await.context("the tenants' roles")?);
    Ok(findings)
}

/// A session keeps the number of its role when that is dropped. A role that was made while sessions
/// were read is there at the second look.
async fn roleless_sessions(database: &Client) -> Result<Vec<ClusterFinding>> {
    let query = "SELECT pid, usesysid, coalesce(datname::text, '')
        FROM pg_catalog.pg_stat_activity WHERE usesysid <> 0
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE oid = usesysid)";
    let rows = database.query(query, &[]).await?;
    rows.iter()
        .map(|row| {
            Ok(ClusterFinding::RolelessSession {
                pid: row.try_get(0)?,
                role: row.try_get(1)?,
                database: row.try_get(2)?,
            })
        })
        .collect()
}

async fn prepared(database: &Client, ours: &BTreeSet<String>) -> Result<Vec<ClusterFinding>> {
    let mut findings = Vec::new();
    let max = "SELECT current_setting('max_prepared_transactions')::int4";
    let max: i32 = database.query_one(max, &[]).await?.try_get(0)?;
    if max > 0 {
        findings.push(ClusterFinding::PreparedAllowed { max });
    }
    let query = "SELECT gid, coalesce(owner::text, ''), database::text
        FROM pg_catalog.pg_prepared_xacts";
    for row in database.query(query, &[]).await? {
        let (name, owner, database) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if ours.contains(&database) {
            findings.push(ClusterFinding::PreparedTransaction { name, owner, database });
        }
    }
    Ok(findings)
}

/// Roles that are named as a tenant's are, whose database is gone, and that no registry's tenant
/// has. Brokers first: they have what they made.
async fn removed_tenants(
    database: &Client,
    tenants: &BTreeSet<String>,
) -> Result<Vec<ClusterFinding>> {
    let query = "SELECT r.rolname::text FROM pg_catalog.pg_roles r
            JOIN pg_catalog.pg_auth_members am ON am.roleid = r.oid AND am.admin_option
            JOIN pg_catalog.pg_roles m ON m.oid = am.member AND m.rolname = current_user
        WHERE r.rolname ~ '^tenant_.*_(app|ro|login|broker)$' AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_database d
            WHERE d.datname = pg_catalog.regexp_replace(r.rolname, '_[a-z]+$', ''))
        ORDER BY r.rolname !~ '_broker$', r.rolname";
    let mut removed = BTreeMap::<String, Vec<String>>::new();
    for row in database.query(query, &[]).await? {
        let role: String = row.try_get(0)?;
        let id = role.strip_prefix("tenant_").and_then(|rest| rest.rsplit_once('_'));
        match id {
            Some((id, _kind)) if !tenants.contains(id) => {
                removed.entry(id.to_owned()).or_default().push(role);
            }
            _ => {}
        }
    }
    Ok(removed.into_iter().map(|(id, roles)| ClusterFinding::RemovedTenant { id, roles }).collect())
}
