//! Takes away what is granted to a role, in whatever database and by whomever: it could not be dropped.
//!
//! Roles are the cluster's, so a tenant may grant to another tenant's roles what it has, and
//! PostgreSQL drops no role that a grant of any database names. DROP OWNED takes grants away only in
//! the database it runs in, and only as one grantor; so each grantor takes its own away.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use pgsilo::registry::Placement;
use tokio_postgres::Client;

use super::standing::Standing;
use crate::postgres::Identity;

/// Where a role is named, on a cluster that the provisioner may log in to.
const DATABASES: &str = "SELECT DISTINCT d.datname::text FROM pg_catalog.pg_shdepend s
    JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
    JOIN pg_catalog.pg_database d ON d.oid = s.dbid
    WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND r.rolname = $1";

/// Each grantor, and its statements.
const GRANTS: &str = "
    WITH acls (classid, objid, acl) AS (
        SELECT 'pg_class'::regclass, oid, relacl FROM pg_class
        UNION ALL SELECT 'pg_class'::regclass, attrelid, attacl FROM pg_attribute
        UNION ALL SELECT 'pg_proc'::regclass, oid, proacl FROM pg_proc
        UNION ALL SELECT 'pg_namespace'::regclass, oid, nspacl FROM pg_namespace
        UNION ALL SELECT 'pg_type'::regclass, oid, typacl FROM pg_type
        UNION ALL SELECT 'pg_language'::regclass, oid, lanacl FROM pg_language
        UNION ALL SELECT 'pg_largeobject'::regclass, oid, lomacl FROM pg_largeobject_metadata
        UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid, fdwacl
            FROM pg_foreign_data_wrapper
        UNION ALL SELECT 'pg_foreign_server'::regclass, oid, srvacl FROM pg_foreign_server
    )
    SELECT DISTINCT g.rolname::text, format('REVOKE ALL ON %s %s FROM %I CASCADE',
        CASE WHEN o.type IN ('view', 'materialized view', 'foreign table') THEN 'TABLE'
            WHEN o.type IN ('function', 'procedure', 'aggregate') THEN 'ROUTINE'
            WHEN o.type = 'server' THEN 'FOREIGN SERVER'
            ELSE upper(replace(o.type, '-', ' ')) END,
        o.identity, r.rolname)
    FROM acls
    CROSS JOIN LATERAL aclexplode(acls.acl) a
    JOIN pg_roles r ON r.oid = a.grantee
    JOIN pg_roles g ON g.oid = a.grantor
    CROSS JOIN LATERAL pg_identify_object(acls.classid, acls.objid, 0) o
    WHERE acls.acl IS NOT NULL AND r.rolname = $1";

/// What names the role in this database and is not its own.
const LEFT: &str = "SELECT count(*) FROM pg_catalog.pg_shdepend s
    JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
    JOIN pg_catalog.pg_database d ON d.oid = s.dbid
    WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND r.rolname = $1
        AND d.datname = current_database() AND s.deptype <> 'o'";

/// Takes away all that any database of a placement's cluster grants a role.
///
/// # Errors
/// When a database cannot be reached, or a grantor is nobody that the provisioner may become.
pub(super) async fn take_away(
    database: &Client,
    placement: &Placement,
    provisioner: &Identity,
    role: &str,
) -> Result<()> {
    for row in database.query(DATABASES, &[&role]).await.context("where the role is named")? {
        let dbname: String = row.try_get(0)?;
        let there = Placement { dbname, ..placement.clone() };
        let client = provisioner.connect(&there).await?;
        let here = take_away_in(&client, role).await;
        here.with_context(|| format!("what database {} grants it", there.dbname))?;
    }
    Ok(())
}

async fn take_away_in(database: &Client, role: &str) -> Result<()> {
    let mut grants = BTreeMap::<String, Vec<String>>::new();
    for row in database.query(GRANTS, &[&role]).await.context("reading the grants")? {
        grants.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
    }
    for (grantor, statements) in grants {
        let Some(grantor) = Standing::of(database, &grantor).await? else { continue };
        // Each takes a place in the lock table, which is the cluster's, until the end of its transaction.
        for some in statements.chunks(200) {
            grantor.run(database, &some.join("; ")).await?;
        }
    }
    // Default privileges and policies name it, too, and have no grantor.
    let left: i64 = database.query_one(LEFT, &[&role]).await.context("what is left")?.try_get(0)?;
    if left == 0 {
        return Ok(());
    }
    let Some(standing) = Standing::of(database, role).await? else { return Ok(()) };
    let owned = format!("DROP OWNED BY {} CASCADE", standing.name());
    standing.run_beside(database, &owned).await
}
