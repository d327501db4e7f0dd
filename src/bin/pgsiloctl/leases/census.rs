//! What there is at one moment: the leased roles of a tenant's database server, and OpenBAO's
//! leases for the tenant.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use pgsilo::registry::Tenant;
use pgsilo::tenant::Access;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::Client;

use super::verdict::{Lease, Role};
use crate::bao::{Bao, text};

/// Random characters at the end of a leased role's name, as the documented `username_template`
/// makes them.
const RANDOM: usize = 20;
/// How much of OpenBAO's role name that template keeps.
const KEPT: usize = 42;
/// Leases looked up at once.
const AT_ONCE: usize = 8;

/// The leased roles and the leases that go by one name: what of OpenBAO's role stands in front of
/// the random characters.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) roles: Vec<Role>,
    pub(super) leases: Vec<Lease>,
}

/// Counts a tenant's roles and leases. Roles first: a role is made before its lease.
pub(super) async fn take(tenant: &Tenant, database: &Client, bao: &Bao) -> Result<Vec<Group>> {
    let mount = &tenant.lease().mount;
    let names: Vec<&str> =
        Access::ALL.iter().filter_map(|access| tenant.lease().role(*access)).collect();
    let mut groups = BTreeMap::<&str, Group>::new();
    for name in &names {
        let kept = kept(name);
        if !groups.contains_key(kept) {
            ensure_timed(bao, mount, name).await?;
            let roles = leased_roles(database, kept).await?;
            groups.insert(kept, Group { roles, leases: Vec::new() });
        }
    }
    for name in &names {
        let leases = leases(bao, &format!("{mount}/creds/{name}")).await?;
        groups.entry(kept(name)).or_default().leases.extend(leases);
    }
    Ok(groups.into_values().collect())
}

fn kept(name: &str) -> &str {
    name.char_indices().nth(KEPT).map_or(name, |(end, _)| &name[..end])
}

/// Roles and leases are told to belong together by VALID UNTIL. Without it every role would look
/// like one that no lease explains.
async fn ensure_timed(bao: &Bao, mount: &str, name: &str) -> Result<()> {
    let role = bao.read(&format!("{mount}/roles/{name}")).await?;
    let statements = |key: &str| {
        let all = role["data"][key].as_array().into_iter().flatten();
        all.filter_map(Value::as_str).collect::<Vec<_>>().join(";").to_uppercase()
    };
    let (creation, renewal) = (statements("creation_statements"), statements("renew_statements"));
    ensure!(
        creation.contains("VALID UNTIL") && (renewal.is_empty() || renewal.contains("VALID UNTIL")),
        "role {name} of OpenBAO cannot be audited: its statements do not set VALID UNTIL '{{{{expiration}}}}'"
    );
    Ok(())
}

async fn leased_roles(database: &Client, kept: &str) -> Result<Vec<Role>> {
    let query = "SELECT r.rolname::text,
               extract(epoch FROM r.rolvaliduntil)::float8,
               (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid = r.oid)
        FROM pg_catalog.pg_roles r
        WHERE pg_catalog.starts_with(r.rolname::text, $1) AND r.rolvaliduntil IS NOT NULL";
    let rows = database.query(query, &[&format!("{kept}-")]).await.context("reading the roles")?;
    let mut roles = Vec::new();
    for row in rows {
        let name: String = row.try_get(0)?;
        if is_leased(&name, kept) {
            roles.push(Role { name, valid_until: row.try_get(1)?, sessions: row.try_get(2)? });
        }
    }
    Ok(roles)
}

/// Whether OpenBAO made this name: no role of another name, or of a longer one, is ever touched.
fn is_leased(name: &str, kept: &str) -> bool {
    let random = name.strip_prefix(kept).and_then(|rest| rest.strip_prefix('-'));
    random.is_some_and(|random| {
        random.len() == RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
    })
}

async fn leases(bao: &Bao, path: &str) -> Result<Vec<Lease>> {
    let keys = bao.list(&format!("sys/leases/lookup/{path}")).await?;
    let found = stream::iter(keys)
        .map(|key| look_up(bao, format!("{path}/{key}")))
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    Ok(found.into_iter().flatten().collect())
}

/// `None` when it went meanwhile.
async fn look_up(bao: &Bao, id: String) -> Result<Option<Lease>> {
    let body = json!({ "lease_id": id });
    let Some(answer) = bao.write_if_known("sys/leases/lookup", body).await? else {
        return Ok(None);
    };
    let expires = OffsetDateTime::parse(text(&answer, "/data/expire_time")?, &Rfc3339)
        .context("the end of a lease")?;
    let left = answer.pointer("/data/ttl").and_then(Value::as_i64).context("no ttl of a lease")?;
    let expires = expires.unix_timestamp_nanos() as f64 / 1e9;
    Ok(Some(Lease { id, expires, overdue: -left }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_openbao_makes_are_leased_roles() {
        assert!(is_leased("tenant-acme-rw-oLSYR3pp2AYjvZsAi9pO", "tenant-acme-rw"));
        for other in [
            "tenant-acme-rw-oLSYR3pp2AYjvZsAi9p",
            "tenant-acme-rw-x-LSYR3pp2AYjvZsAi9pO",
            "tenant-acme-rwoLSYR3pp2AYjvZsAi9pO1",
            "tenant-acme-ro-oLSYR3pp2AYjvZsAi9pO",
            "tenant-acme-rw-oLSYR3pp2AYjvZsAi9p\"",
            "tenant-acme-rw",
        ] {
            assert!(!is_leased(other, "tenant-acme-rw"), "{other}");
        }
    }

    #[test]
    fn a_long_name_is_cut_as_the_template_cuts_it() {
        assert_eq!(kept("tenant-acme-rw"), "tenant-acme-rw");
        assert_eq!(kept(&"x".repeat(50)).len(), 42);
    }
}
