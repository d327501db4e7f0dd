//! Takes back what nobody should have any more: leases by OpenBAO, roles that no lease reaches as
//! the one who made them.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio_postgres::Client;

use super::verdict::Finding;
use crate::bao::Bao;
use crate::provision::revocation;

/// Mends one finding; whether there was anything to be done. What is doubtful is left alone.
pub(super) async fn mend(finding: &Finding, database: &Client, bao: &Bao) -> Result<bool> {
    match finding {
        Finding::OrphanRole(role) => drop_role(database, &role.name, Sessions::End).await?,
        Finding::IdleRoles { roles, leases, exact } => {
            if *exact {
                for lease in leases {
                    revoke(bao, &lease.id).await?;
                }
            }
            for role in roles {
                drop_role(database, &role.name, Sessions::Spare).await?;
            }
        }
        Finding::RolelessLease(lease) | Finding::OverdueLease(lease) => {
            revoke(bao, &lease.id).await?;
        }
        Finding::Doubtful { .. } | Finding::Surplus { .. } => return Ok(false),
    }
    Ok(true)
}

/// What becomes of those who are logged in as a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sessions {
    /// They have no lease: they end.
    End,
    /// There were none: if there are now, the role stays.
    Spare,
}

/// OpenBAO's word that it is gone, or why it is not. One that is gone already is no failure.
async fn revoke(bao: &Bao, lease: &str) -> Result<()> {
    if bao.look_up_lease(lease).await?.is_none() {
        return Ok(());
    }
    bao.write(&format!("sys/leases/revoke/{lease}"), json!({ "sync": true })).await?;
    Ok(())
}

/// Ends the role's sessions and drops it, with all that was made as it. Only who made a role may
/// drop it, and that is the tenant's broker: the provisioner becomes that for one transaction.
async fn drop_role(database: &Client, role: &str, sessions: Sessions) -> Result<()> {
    // It goes into statements as it stands.
    ensure!(
        role.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
        "{role:?} is not a name that OpenBAO makes"
    );
    let query = "SELECT pg_catalog.quote_ident(m.rolname)
        FROM pg_catalog.pg_auth_members am
        JOIN pg_catalog.pg_roles r ON r.oid = am.roleid
        JOIN pg_catalog.pg_roles m ON m.oid = am.member
        WHERE r.rolname = $1 AND am.admin_option";
    let rows = database.query(query, &[&role]).await.context("who made the role")?;
    let Some(row) = rows.first() else {
        let still = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = $1";
        let gone = database.query_opt(still, &[&role]).await?.is_none();
        ensure!(
            gone,
            "nobody but a superuser may drop {role}: before PostgreSQL 16 its maker may not"
        );
        return Ok(());
    };
    let maker: String = row.try_get(0)?;
    let in_use = "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usename = $1";
    if sessions == Sessions::Spare {
        let in_use: i64 = database.query_one(in_use, &[&role]).await?.try_get(0)?;
        ensure!(in_use == 0, "somebody has logged in as {role}");
    }
    let drop = revocation().replace("{{name}}", role);
    let statements = format!(
        "BEGIN;
         GRANT {maker} TO CURRENT_USER WITH INHERIT FALSE, SET TRUE;
         SET LOCAL ROLE {maker};
         {drop};
         RESET ROLE;
         REVOKE {maker} FROM CURRENT_USER;
         COMMIT"
    );
    if let Err(error) = database.batch_execute(&statements).await {
        let _best_effort = database.batch_execute("ROLLBACK").await;
        return Err(error).context("dropping it as the one who made it");
    }
    Ok(())
}
