//! Takes away what is granted to roles, in whatever database and by whomever: they could not be
//! dropped.
//!
//! Roles are the cluster's, so a tenant may grant to another tenant's roles what it has, and
//! PostgreSQL drops no role that a grant of any database names. DROP OWNED takes grants away only
//! in the database it runs in, and only as one grantor; so each grantor takes its own away. For
//! many roles at once: a tenant that attacks its neighbour leaves thousands.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use pgsilo_core::registry::Placement;
use tokio_postgres::Client;

use crate::acting_role::ActingRole;
use crate::postgres::Identity;

/// Roles, or statements, in one transaction: each takes a place in the lock table, which is the
/// cluster's.
const AT_ONCE: usize = 200;
/// What is dropped with a role in one transaction, for the same reason; as drop.sql has it.
const MOST_DEPENDENT: i64 = 2000;

/// Where any of the roles is named, on a cluster that the provisioner may log in to.
const DATABASES: &str = "SELECT DISTINCT d.datname::text FROM pg_catalog.pg_shdepend s
    JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
    JOIN pg_catalog.pg_database d ON d.oid = s.dbid
    WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND r.rolname = ANY ($1)";

/// Each grantor, what of, and to which of the roles.
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
    SELECT g.rolname::text, format('REVOKE ALL ON %s %s FROM ',
            CASE WHEN o.type IN ('view', 'materialized view', 'foreign table') THEN 'TABLE'
                WHEN o.type IN ('function', 'procedure', 'aggregate') THEN 'ROUTINE'
                WHEN o.type = 'server' THEN 'FOREIGN SERVER'
                ELSE upper(replace(o.type, '-', ' ')) END,
            -- Without IN, a name stands for what differs in OUT arguments only, too.
            CASE WHEN acls.classid <> 'pg_proc'::regclass THEN o.identity
                ELSE (SELECT format('%I.%I(%s)', n.nspname, p.proname, (
                        SELECT string_agg(CASE WHEN t.n = cardinality(p.proargtypes) AND p.provariadic <> 0
                            THEN 'VARIADIC ' ELSE 'IN ' END || format_type(t.type, NULL), ', ' ORDER BY t.n)
                        FROM unnest(p.proargtypes) WITH ORDINALITY t (type, n)))
                    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                    WHERE p.oid = acls.objid) END),
        array_agg(DISTINCT quote_ident(r.rolname))
    FROM acls
    CROSS JOIN LATERAL aclexplode(acls.acl) a
    JOIN pg_roles r ON r.oid = a.grantee
    JOIN pg_roles g ON g.oid = a.grantor
    CROSS JOIN LATERAL pg_identify_object(acls.classid, acls.objid, 0) o
    WHERE acls.acl IS NOT NULL AND r.rolname = ANY ($1) AND o.identity IS NOT NULL
    GROUP BY 1, 2";

/// Which of the roles something names in this database all the same. A leased role owns nothing
/// where it cannot log in but user mappings, which others make for it.
const LEFT: &str = "SELECT DISTINCT r.rolname::text FROM pg_catalog.pg_shdepend s
    JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
    JOIN pg_catalog.pg_database d ON d.oid = s.dbid
    WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND r.rolname = ANY ($1)
        AND d.datname = current_database() AND (s.deptype <> 'o' OR d.datname <> $2)";

/// What DROP OWNED of a role would drop or change here; at most [`MOST_DEPENDENT`].
const DEPENDENT: &str = "WITH RECURSIVE gone AS (
        SELECT s.classid, s.objid FROM pg_shdepend s
            JOIN pg_roles r ON r.oid = s.refobjid JOIN pg_database d ON d.oid = s.dbid
            WHERE s.refclassid = 'pg_authid'::regclass AND r.rolname = $1
                AND d.datname = current_database()
        UNION
        SELECT d.classid, d.objid FROM pg_depend d
            JOIN gone g ON d.refclassid = g.classid AND d.refobjid = g.objid
    ) SELECT count(*) FROM (SELECT FROM gone LIMIT $2) g";

/// A placement's cluster, as the provisioner.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grants<'a> {
    pub(crate) database: &'a Client,
    pub(crate) placement: &'a Placement,
    pub(crate) provisioner: &'a Identity,
}

impl Grants<'_> {
    /// Takes away all that any database of the cluster grants the roles, which own nothing but what
    /// is to go with them.
    ///
    /// # Errors
    /// When a database cannot be reached, a grantor is no role that the provisioner may become, or
    /// something is left. All that can be taken away is.
    pub(crate) async fn take_away(&self, roles: &[&str]) -> Result<()> {
        let named = self.database.query(DATABASES, &[&roles]).await;
        let mut outcome = Ok(());
        for row in named.context("where the roles are named")? {
            let dbname: String = row.try_get(0)?;
            let there = self.placement.beside(&dbname);
            let here = async {
                let client = self.provisioner.connect(&there).await?;
                self.take_away_in(&client, roles).await
            };
            let here = here.await;
            outcome =
                outcome.and(here.with_context(|| format!("what database {} grants", there.dbname)));
        }
        outcome
    }

    async fn take_away_in(&self, database: &Client, roles: &[&str]) -> Result<()> {
        let mut grants = BTreeMap::<String, Vec<String>>::new();
        for row in database.query(GRANTS, &[&roles]).await.context("reading the grants")? {
            let (grantor, revoke, grantees): (_, String, Vec<String>) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let statements =
                grantees.chunks(AT_ONCE).map(|some| format!("{revoke}{} CASCADE", some.join(", ")));
            grants.entry(grantor).or_default().extend(statements);
        }
        let mut grantors = Vec::with_capacity(grants.len());
        let mut refused = None;
        for (grantor, statements) in grants {
            let Some(grantor) = ActingRole::of(database, &grantor).await? else { continue };
            for some in statements.chunks(AT_ONCE) {
                if grantor.run(database, &some.join("; ")).await.is_ok() {
                    continue;
                }
                // One that names what has gone meanwhile, or what only its owner may name, keeps no
                // other.
                for one in some {
                    refused = grantor.run(database, one).await.err().or(refused);
                }
            }
            grantors.push(grantor);
        }
        // Default privileges, policies and user mappings name roles, too, and have no grantor; and
        // of what could not be named, as another session's temporary tables, PostgreSQL knows the
        // number.
        let mut outcome = Ok(());
        for role in self.left(database, roles).await? {
            outcome = outcome.and(drop_owned(database, &role, &grantors).await);
        }
        match refused {
            Some(refused) if !self.left(database, roles).await?.is_empty() => {
                outcome.and(Err(refused))
            }
            _ => outcome,
        }
    }

    async fn left(&self, database: &Client, roles: &[&str]) -> Result<Vec<String>> {
        let left = database.query(LEFT, &[&roles, &&*self.placement.dbname]).await;
        let left = left.context("what is left")?;
        Ok(left.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }
}

/// With the privileges of grantors, so that it takes away what those have granted.
async fn drop_owned(database: &Client, role: &str, grantors: &[ActingRole]) -> Result<()> {
    let dependent = database.query_one(DEPENDENT, &[&role, &MOST_DEPENDENT]).await;
    let dependent: i64 = dependent.context("what depends on it")?.try_get(0)?;
    if dependent >= MOST_DEPENDENT {
        bail!(
            "{MOST_DEPENDENT} objects or more depend on {role}, too many for one transaction: a \
             superuser drops them, or runs DROP OWNED BY"
        );
    }
    let Some(acting) = ActingRole::of(database, role).await? else { return Ok(()) };
    let owned = format!("DROP OWNED BY {} CASCADE", acting.name());
    let mut all = owned;
    for grantor in grantors {
        all = grantor.beside(&all);
    }
    acting.run_beside(database, &all).await
}
