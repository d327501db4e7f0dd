//! What there is at one moment: the leased roles of a tenant's database server, and OpenBAO's
//! leases for the tenant.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use pgsilo_core::names::LeasedNames;
use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::Access;
use pgsilo_openbao::Client as Bao;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::Client;

use super::verdict::{Finding, Lease, Role, Stopped};

/// Leases looked up at once.
const AT_ONCE: usize = 8;

/// The leased roles and the leases that go by one name.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) roles: Vec<Role>,
    pub(super) leases: Vec<Lease>,
}

/// A tenant's.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// To be judged, each by itself.
    pub(super) groups: Vec<Group>,
    /// What is wrong whatever else there is.
    pub(super) findings: Vec<Finding>,
}

/// What tells a tenant's leased roles from all others of the cluster: the part of OpenBAO's role
/// in front of the random characters, which tenants of long names may share, and who made them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Made {
    prefix: String,
    broker: String,
}

/// Counts a tenant's roles and leases, with sessions at the primary and at `standbys` (of which one may
/// be the primary). Roles first: a role is made before its lease.
pub(super) async fn take(
    tenant: &Tenant,
    database: &Client,
    standbys: &[Client],
    bao: &Bao,
) -> Result<Census> {
    ensure_primary(database).await?;
    let mount = &tenant.lease().mount;
    let mut names: Vec<&str> =
        Access::ALL.iter().filter_map(|access| tenant.lease().role(*access)).collect();
    // Two kinds of access may lease from one role.
    names.sort_unstable();
    names.dedup();
    let at_standbys = sessions_at(standbys).await?;
    let mut census = Census::default();
    let mut made = Vec::with_capacity(names.len());
    let mut groups = BTreeMap::<Made, Group>::new();
    for name in &names {
        let how = match how_made(bao, mount, name).await? {
            Some(how) => how,
            // Its roles are not judged: it may be the registry that is wrong.
            None => {
                let role = format!("{mount}/roles/{name}");
                census.findings.push(Finding::UnknownToOpenBao { role });
                continue;
            }
        };
        if !groups.contains_key(&how) {
            let (mut roles, mut stopped) = leased_roles(database, &how).await?;
            let there = |name: &str| at_standbys.get(name).copied().unwrap_or_default();
            roles.iter_mut().for_each(|role| role.sessions += there(&role.name));
            stopped.iter_mut().for_each(|role| role.sessions += there(&role.name));
            census.findings.extend(stopped.into_iter().map(Finding::StoppedRole));
            groups.insert(how.clone(), Group { roles, leases: Vec::new() });
        }
        made.push((*name, how));
    }
    for (name, how) in made {
        let leases = leases(bao, &format!("{mount}/creds/{name}")).await?;
        groups.entry(how).or_default().leases.extend(leases);
    }
    census.groups = groups.into_values().collect();
    Ok(census)
}

/// A standby does not show the primary's sessions, and every role would look idle.
async fn ensure_primary(database: &Client) -> Result<()> {
    let row = database.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
    let standby: bool = row.try_get(0)?;
    ensure!(!standby, "the placement is a standby: sessions on its primary cannot be seen there");
    Ok(())
}

/// Reads how OpenBAO makes a role's credentials; `None` where it knows none. Roles and leases are
/// told to belong together by the roles' names and VALID UNTIL: where those are not as they should
/// be, every lease would look like one whose role is gone.
async fn how_made(bao: &Bao, mount: &str, name: &str) -> Result<Option<Made>> {
    let Some(role) = bao.database_role(mount, name).await? else { return Ok(None) };
    let all = |statements: &[String]| statements.join(";").to_uppercase();
    let (creation, renewal) = (all(&role.creation_statements), all(&role.renew_statements));
    ensure!(
        creation.contains("VALID UNTIL") && (renewal.is_empty() || renewal.contains("VALID UNTIL")),
        "role {name} of OpenBAO cannot be audited: its statements do not set VALID UNTIL '{{{{expiration}}}}'"
    );
    let config = bao.database_config(mount, &role.db_name).await?;
    let config = config.with_context(|| {
        format!("OpenBAO has no {mount}/config/{}, which role {name} leases from", role.db_name)
    })?;
    let names = config.username_template().and_then(LeasedNames::parse).with_context(|| {
        format!(
            "role {name} of OpenBAO cannot be audited: the username_template of its database is not as docs/setup.md has it"
        )
    })?;
    let broker = config.username().context("OpenBAO does not tell whom it logs in as")?;
    Ok(Some(Made { prefix: names.prefix(name), broker: broker.to_owned() }))
}

/// Those that may log in, and those that were stopped.
async fn leased_roles(database: &Client, how: &Made) -> Result<(Vec<Role>, Vec<Stopped>)> {
    let query = "SELECT r.rolname::text, r.rolcanlogin,
               extract(epoch FROM r.rolvaliduntil)::float8,
               (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid = r.oid),
               ARRAY(SELECT DISTINCT d.datname::text FROM pg_catalog.pg_shdepend s
                   JOIN pg_catalog.pg_database d ON d.oid = s.dbid
                   WHERE NOT r.rolcanlogin AND s.refobjid = r.oid
                       AND s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass),
               r.rolvaliduntil > pg_catalog.clock_timestamp() - '5 s'::pg_catalog.interval
                   - pg_catalog.current_setting('authentication_timeout')::pg_catalog.interval
        FROM pg_catalog.pg_roles r
        WHERE pg_catalog.starts_with(r.rolname::text, $1) AND r.rolvaliduntil IS NOT NULL
          AND EXISTS (SELECT FROM pg_catalog.pg_auth_members am
              JOIN pg_catalog.pg_roles m ON m.oid = am.member
              WHERE am.roleid = r.oid AND am.admin_option AND m.rolname = $2)";
    let Made { prefix, broker } = how;
    let rows = database.query(query, &[&format!("{prefix}-"), broker]).await;
    let (mut roles, mut stopped) = (Vec::new(), Vec::new());
    for row in rows.context("reading the roles")? {
        let (name, sessions): (String, i64) = (row.try_get(0)?, row.try_get(3)?);
        if !LeasedNames::made(&name, prefix) {
            continue;
        }
        let valid_until = row.try_get(2)?;
        match row.try_get(1)? {
            true => roles.push(Role { name, valid_until, sessions }),
            false => {
                let (databases, young): (Vec<String>, bool) = (row.try_get(4)?, row.try_get(5)?);
                // drop.sql leaves it so long where logins are under way, to a later revocation.
                if !(young && sessions == 0 && databases.is_empty()) {
                    stopped.push(Stopped { name, since: valid_until, sessions, databases });
                }
            }
        }
    }
    Ok((roles, stopped))
}

/// How many sessions each role has at those of these servers that are standbys: the primary's own are
/// counted with its roles.
async fn sessions_at(servers: &[Client]) -> Result<BTreeMap<String, i64>> {
    let query = "SELECT usename::text, count(*) FROM pg_catalog.pg_stat_activity
        WHERE usename IS NOT NULL AND pg_catalog.pg_is_in_recovery() GROUP BY usename";
    let mut sessions = BTreeMap::new();
    for server in servers {
        for row in server.query(query, &[]).await.context("counting sessions at a standby")? {
            *sessions.entry(row.try_get(0)?).or_default() += row.try_get::<_, i64>(1)?;
        }
    }
    Ok(sessions)
}

async fn leases(bao: &Bao, path: &str) -> Result<Vec<Lease>> {
    let keys = bao.leases(path).await?;
    let listed = keys.len();
    let found = stream::iter(keys)
        .map(|key| look_up(bao, format!("{path}/{key}")))
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    let found: Vec<_> = found.into_iter().flatten().collect();
    // One or two may go meanwhile; that all have, is not to be acted upon.
    ensure!(
        listed < 3 || !found.is_empty(),
        "OpenBAO lists {listed} leases below {path} and knows none of them"
    );
    Ok(found)
}

/// `None` when it went meanwhile.
async fn look_up(bao: &Bao, id: String) -> Result<Option<Lease>> {
    let Some(known) = bao.lease(&id).await? else { return Ok(None) };
    let expires = OffsetDateTime::parse(&known.expire_time, &Rfc3339);
    let expires = expires.context("the end of a lease")?.unix_timestamp_nanos() as f64 / 1e9;
    Ok(Some(Lease { id, expires, overdue: -known.ttl, given_up: known.revoke_error }))
}
