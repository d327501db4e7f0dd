//! `pgsiloctl registry check`: whether the registry, the tenants' databases and OpenBAO say the same of
//! each tenant. It changes nothing, and names the command that does.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream;
use pgsilo_core::names::SEAL;
use pgsilo_core::registry::{Host, Tenant};
use pgsilo_core::tenant::Access;
use pgsilo_openbao::{Client as Bao, DatabaseConfig};
use serde_json::{Value, json};
use tokio_postgres::Client;

use super::Server;
use super::apply::snapshot;
use crate::postgres::Identity;
use crate::provisioner::Provisioner;
use crate::say;

/// Tenants that are looked at together.
const AT_ONCE: usize = 8;

/// Find where the registry, the tenants' databases and OpenBAO do not say the same.
///
/// Looks at each tenant that has a placement, as the provisioner, and changes nothing. A finding is one
/// line, with what mends it:
///
///   audit_broken    a row of the registry's audit is not what it was
///   misplaced       the tenant is where it may not live
///   unreachable     its database cannot be logged in to
///   seal_missing    the database does not say whose it is: no session is let in
///   seal_differs    it says that it is another's
///   open_to_all     everybody may connect to it
///   shared_login    a role may connect to it that may connect to another tenant's, too
///   unfinished      its creation or its removal was cut short
///   no_engine       OpenBAO has no database engine where the tenant's credentials come from
///   no_role         it has no such role there
///   elsewhere       the role's credentials are made on another server or database
///   stays_behind    OpenBAO would not follow the cluster's primary to another server
///   not_allowed     the role may not use its database's configuration
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct Check {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    provisioner: Provisioner,
    /// Look at this tenant only; may be repeated.
    #[arg(long = "tenant", value_name = "ID")]
    tenants: Vec<String>,
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

/// Something that is not as it should be.
#[derive(Debug)]
struct Finding {
    kind: &'static str,
    tenant: String,
    what: String,
    mend: String,
}

impl Finding {
    fn of(
        tenant: &Tenant,
        kind: &'static str,
        what: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding { kind, tenant: tenant.id().to_string(), what: what.into(), mend: mend.into() }
    }
}

/// What was learned of a tenant's database beside findings.
struct Looked {
    findings: Vec<Finding>,
    /// Who may connect, besides its owner.
    logins: Vec<String>,
}

/// Runs the command to its end.
pub(super) async fn run(check: Check) -> Result<ExitCode> {
    let Check { server, provisioner, tenants: only, json } = check;
    let bao = provisioner.bao(&server.settings).await?;
    let identity = provisioner.identity(&bao)?;
    let mut session = server.open().await?;
    let mut findings = registry_itself(&session.client).await?;
    let snapshot = snapshot(&mut session.client).await?;
    let mut tenants: Vec<_> = snapshot.tenants().cloned().collect();
    // Half of them is gone, and said above.
    let removed: Vec<_> = findings
        .iter()
        .filter(|one| one.kind == "unfinished")
        .map(|one| one.tenant.clone())
        .collect();
    tenants.retain(|tenant| !removed.iter().any(|id| id == tenant.id().as_str()));
    tenants.retain(|tenant| only.is_empty() || only.iter().any(|id| id == tenant.id().as_str()));
    tenants.sort_by(|one, other| one.id().cmp(other.id()));
    say::progress(&format!("looking at {} tenants", tenants.len()));
    let looks = tenants.iter().map(|tenant| look(tenant, &identity, &bao));
    let mut looks = stream::iter(looks).buffered(AT_ONCE);
    let mut by_login = BTreeMap::<(String, String), Vec<usize>>::new();
    let mut number = 0;
    while let Some(looked) = looks.next().await {
        findings.extend(looked.findings);
        let cluster = tenants[number].placement().cluster.key().to_string();
        for login in looked.logins {
            by_login.entry((cluster.clone(), login)).or_default().push(number);
        }
        number += 1;
        if number % 100 == 0 {
            say::progress(&format!("{number} of {}", tenants.len()));
        }
    }
    for ((_, login), shared) in by_login.iter().filter(|(_, shared)| shared.len() > 1) {
        for number in shared {
            let tenant = &tenants[*number];
            let what = format!("{login} may connect to the databases of {} tenants", shared.len());
            let mend = format!(
                "REVOKE CONNECT ON DATABASE {:?} FROM {login:?}",
                tenant.placement().dbname
            );
            findings.push(Finding::of(tenant, "shared_login", what, mend));
        }
    }
    for Finding { kind, tenant, what, mend } in &findings {
        if json {
            say::data(
                &json!({ "finding": kind, "tenant": tenant, "what": what, "mend": mend })
                    .to_string(),
            )?;
        } else {
            let of = if tenant.is_empty() { "the registry" } else { tenant };
            say::result(&format!("{kind}  {of}: {what}; mend it: {mend}"));
        }
    }
    if findings.is_empty() {
        say::progress(&format!("nothing was found at {} tenants", tenants.len()));
        return Ok(ExitCode::SUCCESS);
    }
    say::progress(&format!("{} findings", findings.len()));
    Ok(ExitCode::from(3))
}

/// What the registry's own database shows.
async fn registry_itself(client: &Client) -> Result<Vec<Finding>> {
    let broken = "SELECT number FROM (
            SELECT number, hash, lag(hash) OVER (ORDER BY number) AS previous, pgsilo.audit_content(a) AS content
            FROM pgsilo.audit a) AS chain
        WHERE hash <> sha256(coalesce(previous, '') || convert_to(content, 'UTF8')) ORDER BY number LIMIT 1";
    let broken = client.query_opt(broken, &[]).await.context("reading the audit")?;
    let mut findings = Vec::new();
    if let Some(row) = broken {
        let number: i64 = row.get(0);
        findings.push(Finding {
            kind: "audit_broken",
            tenant: String::new(),
            what: format!(
                "row {number} of the audit, or the one before it, is not what was written"
            ),
            mend: "find out who can be the registry's owner or a superuser there".to_owned(),
        });
    }
    let unfinished =
        "SELECT subject::text, kind, undoing, coalesce(step, ''), coalesce(failure, '')
        FROM pgsilo.operations WHERE ended_at IS NULL ORDER BY began_at";
    for row in client.query(unfinished, &[]).await.context("reading the journal")? {
        let (tenant, kind, undoing): (String, &str, bool) = (row.get(0), row.get(1), row.get(2));
        let (step, failure): (&str, &str) = (row.get(3), row.get(4));
        let mend = match (kind, undoing) {
            ("create", false) => {
                format!("pgsiloctl tenant create {tenant}, or the same with --undo")
            }
            ("create", true) => format!("pgsiloctl tenant create {tenant} --undo"),
            ("delete", _) => "pgsiloctl tenant purge".to_owned(),
            _ => "pgsiloctl tenant prepare".to_owned(),
        };
        let what = format!("a {kind} has not ended, behind {step:?}: {failure}");
        findings.push(Finding { kind: "unfinished", tenant, what, mend });
    }
    let misplaced = "SELECT tenant, cluster, array_to_string(regions, ', ') FROM pgsilo.misplaced";
    for row in client.query(misplaced, &[]).await.context("reading what is misplaced")? {
        let (tenant, cluster, regions): (String, String, String) =
            (row.get(0), row.get(1), row.get(2));
        let what = format!("it is on {cluster}, and may live in {regions} only");
        let mend = "change its placement or its regions, and `pgsiloctl apply`".to_owned();
        findings.push(Finding { kind: "misplaced", tenant, what, mend });
    }
    Ok(findings)
}

/// What is wrong with one tenant, and what mends it.
pub(crate) async fn look_at(
    tenant: &Tenant,
    identity: &Identity,
    bao: &Bao,
) -> Vec<(String, String)> {
    let found = look(tenant, identity, bao).await.findings;
    found.into_iter().map(|finding| (finding.what, finding.mend)).collect()
}

async fn look(tenant: &Tenant, identity: &Identity, bao: &Bao) -> Looked {
    let mut looked = Looked { findings: Vec::new(), logins: Vec::new() };
    let database = match identity.connect(tenant.placement()).await {
        Ok(database) => look_at_database(tenant, &database, &mut looked).await,
        Err(error) => Err(error),
    };
    if let Err(error) = database {
        let mend = "see that its server runs, and that the provisioner may log in";
        looked.findings.push(Finding::of(tenant, "unreachable", format!("{error:#}"), mend));
    }
    if let Err(error) = look_at_openbao(tenant, bao, &mut looked.findings).await {
        let mend = "see that OpenBAO runs, and what the provisioner's policy lets it read";
        looked.findings.push(Finding::of(
            tenant,
            "unreachable",
            format!("OpenBAO: {error:#}"),
            mend,
        ));
    }
    looked
}

async fn look_at_database(tenant: &Tenant, database: &Client, looked: &mut Looked) -> Result<()> {
    let (dbname, expected) = (&*tenant.placement().dbname, tenant.seal());
    let seals = "SELECT substr(setting, length($1) + 2) FROM pg_db_role_setting s, unnest(setconfig) AS setting
        WHERE setrole = 0 AND setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND starts_with(setting, $1 || '=')";
    let seals = database.query(seals, &[&SEAL]).await.context("reading the seal")?;
    let mend = format!("ALTER DATABASE {dbname:?} SET {SEAL} = '{}'", expected.replace('\'', "''"));
    match seals.first().map(|row| row.get::<_, String>(0)) {
        None => {
            let what = format!("{dbname} has no seal");
            looked.findings.push(Finding::of(tenant, "seal_missing", what, mend));
        }
        Some(found) if found != expected => {
            let what = format!("{dbname} is sealed for {found:?}, not for {expected:?}");
            let mend = format!("see whose database it is; if it is this tenant's: {mend}");
            looked.findings.push(Finding::of(tenant, "seal_differs", what, mend));
        }
        Some(_) => {}
    }
    let connects = "SELECT coalesce(r.rolname::text, '') FROM pg_database d,
            aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a LEFT JOIN pg_roles r ON r.oid = a.grantee
        WHERE d.datname = current_database() AND a.privilege_type = 'CONNECT' AND a.grantee <> d.datdba";
    for row in database.query(connects, &[]).await.context("reading who may connect")? {
        let login: String = row.get(0);
        if login.is_empty() {
            let mend = format!("REVOKE CONNECT ON DATABASE {dbname:?} FROM PUBLIC");
            looked.findings.push(Finding::of(
                tenant,
                "open_to_all",
                format!("everybody may connect to {dbname}"),
                mend,
            ));
        } else {
            looked.logins.push(login);
        }
    }
    Ok(())
}

async fn look_at_openbao(tenant: &Tenant, bao: &Bao, findings: &mut Vec<Finding>) -> Result<()> {
    let mount = &*tenant.lease().mount;
    match bao.engine(mount).await?.as_deref() {
        Some("database") => {}
        other => {
            let what = match other {
                None => format!("there is nothing at {mount}"),
                Some(other) => format!("at {mount} is an engine of type {other}"),
            };
            let mend =
                format!("bao secrets enable -path={mount} database, and describe the tenant there");
            findings.push(Finding::of(tenant, "no_engine", what, mend));
            return Ok(());
        }
    }
    for access in Access::ALL {
        let Some(role) = tenant.lease().role(access) else { continue };
        let Some(known) = bao.database_role(mount, role).await? else {
            let what = format!("OpenBAO has no {mount}/roles/{role}, for {access} access");
            let mend = format!("write {mount}/roles/{role} again, or correct lease.roles.{access}");
            findings.push(Finding::of(tenant, "no_role", what, mend));
            continue;
        };
        let name = &known.db_name;
        let Some(config) = bao.database_config(mount, name).await? else {
            let what = format!("OpenBAO has no {mount}/config/{name}, which {role} is made with");
            let mend = format!(
                "describe the tenant's database there again: bao write {mount}/config/{name} ..."
            );
            findings.push(Finding::of(tenant, "elsewhere", what, mend));
            continue;
        };
        if let Some(place) = place_of(&config).filter(|place| !leads_to(place, tenant)) {
            let what = format!(
                "{mount}/config/{name} leads to {place}, and the registry to {}",
                tenant.placement()
            );
            let mend = format!("correct connection_url of {mount}/config/{name}, or the placement");
            findings.push(Finding::of(tenant, "elsewhere", what, mend));
        }
        look_whether_it_follows(tenant, name, &config, findings);
        let allowed = config.others.get("allowed_roles").and_then(Value::as_array);
        let fits = |pattern: &str| {
            pattern == "*"
                || pattern == role
                || pattern.strip_suffix('*').is_some_and(|begins| role.starts_with(begins))
        };
        if !allowed.is_some_and(|all| all.iter().filter_map(Value::as_str).any(fits)) {
            let what = format!("{mount}/config/{name} does not allow the role {role}");
            let mend = format!("bao write {mount}/config/{name} allowed_roles=...,{role}");
            findings.push(Finding::of(tenant, "not_allowed", what, mend));
        }
    }
    Ok(())
}

/// Of a cluster of several servers: whether OpenBAO tries all of them for the one that takes writes, and
/// gives those up that do not answer; and whether a proxy can have it connect anew.
fn look_whether_it_follows(
    tenant: &Tenant,
    name: &str,
    config: &DatabaseConfig,
    findings: &mut Vec<Finding>,
) {
    let (mount, cluster) = (&tenant.lease().mount, &tenant.placement().cluster);
    if !cluster.has_several() {
        return;
    }
    let mut find = |what: String, mend: String| {
        findings.push(Finding::of(tenant, "stays_behind", what, mend));
    };
    let place = place_of(config).unwrap_or_default();
    let servers = place.split_once('/').map_or(&*place, |(servers, _)| servers);
    let missing = |host: &&Host| !servers.split(',').any(|one| is_server(one, host));
    let parameters = parameters_of(config).unwrap_or_default();
    let is_set = |wanted: &str| parameters.split('&').any(|one| one == wanted);
    let writes = ["read-write", "primary"]
        .iter()
        .any(|attrs| is_set(&format!("target_session_attrs={attrs}")));
    let gives_up = parameters.split('&').any(|one| one.starts_with("connect_timeout="));
    let all: Vec<_> = cluster.endpoints.iter().map(Host::to_string).collect();
    if let Some(host) = cluster.endpoints.iter().find(missing) {
        find(
            format!("{mount}/config/{name} does not name {host}, a server of the cluster"),
            format!("name them all in its connection_url: {}", all.join(",")),
        );
    }
    if !writes || !gives_up {
        find(
            format!(
                "{mount}/config/{name} may lead to a server that takes no writes, or wait for one that does not answer"
            ),
            "add target_session_attrs=read-write and connect_timeout=1 to its connection_url"
                .to_owned(),
        );
    }
    let called = tenant.lease().connection(tenant.id());
    if called != name {
        find(
            format!(
                "no proxy can have OpenBAO connect anew: the registry calls {mount}/config/{name} {called:?}"
            ),
            format!("write connection = {name:?} in the tenant's lease"),
        );
    }
}

fn url_of(config: &DatabaseConfig) -> Option<&str> {
    config.connection_details.get("connection_url")?.as_str()
}

/// `host:port/dbname` of a configuration's URL, if it says that.
fn place_of(config: &DatabaseConfig) -> Option<String> {
    let behind_login = url_of(config)?.split_once("://")?.1.rsplit_once('@')?.1;
    Some(behind_login.split('?').next()?.to_owned())
}

fn parameters_of(config: &DatabaseConfig) -> Option<&str> {
    Some(url_of(config)?.split_once('?')?.1)
}

/// Whether what is written is that server.
fn is_server(written: &str, host: &Host) -> bool {
    Host::read(written).is_ok_and(|one| one.comparable() == host.comparable())
}

/// Whether that is the tenant's database. A socket's folder is a parameter there, and is not compared.
fn leads_to(place: &str, tenant: &Tenant) -> bool {
    let Some((server, dbname)) = place.split_once('/') else { return false };
    let is_there = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp { .. } => server.split(',').any(|one| is_server(one, host)),
    };
    dbname == &*tenant.placement().dbname
        && tenant.placement().cluster.endpoints.iter().any(is_there)
}
