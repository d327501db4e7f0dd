//! `pgsiloctl bootstrap cluster`: a PostgreSQL cluster that tenants are to be made in.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pgsilo_core::registry::document::{ClusterEntry, TlsEntry, TlsMode};
use pgsilo_core::registry::{Host, PlacementTls, is_segment};
use pgsilo_registry::connection::Session;
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::types::Json;

use super::logins::{Kind, Maker};
use super::openbao::allow_clusters;
use super::{
    Administrator, BaoAdministrator, Doing, MONITOR_MOUNT, PROVISIONER_MOUNT, as_provisioner,
};
use crate::cluster::KnownCluster;
use crate::provision::TEMPLATE;
use crate::provision::journal::claim;
use crate::registry::{Author, connect_as_set, known, take_turn};
use crate::say;
use crate::settings::SettingsFile;

/// The provisioner, brokers, the monitor; run in database postgres.
const CLUSTER: &str = include_str!("../../../../docker/postgresql/cluster.sql");
/// Run in the template of tenants' databases.
const TEMPLATE_SQL: &str = include_str!("../../../../docker/postgresql/template.sql");

/// Make a PostgreSQL cluster ready for tenants, and tell the registry and OpenBAO of it.
///
/// Makes, as a superuser: the provisioner, which may make databases and roles and is no superuser; a login for
/// it that OpenBAO makes, each time another; one for who watches the servers; the template of tenants'
/// databases; and shuts PUBLIC out of the databases postgres and template1. Whatever password the
/// provisioner had before works no longer. A cluster that the registry has may be named alone, to bring it to this
/// version; what is said of it otherwise is changed in the registry, too.
#[derive(Debug, Args)]
pub struct Cluster {
    /// What the registry calls it: A-Z a-z 0-9 _ . -
    name: String,
    #[command(flatten)]
    settings: SettingsFile,
    #[command(flatten)]
    administrator: Administrator,
    #[command(flatten)]
    bao: BaoAdministrator,
    #[command(flatten)]
    author: Author,
    /// HOST, HOST:PORT or a socket's path, as proxies and this program reach it; the usual primary first.
    /// May be repeated [default: as the registry has it].
    #[arg(long = "endpoint", value_name = "SERVER")]
    endpoints: Vec<String>,
    /// The same as OpenBAO reaches it, where that is otherwise. May be repeated.
    #[arg(long = "openbao-endpoint", value_name = "SERVER")]
    openbao_endpoints: Vec<String>,
    /// Where it is, for tenants that may live in some regions only.
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// How servers' certificates are checked: verify-full, verify-ca; or disable, for this machine.
    #[arg(long, value_name = "MODE", value_parser = tls_mode)]
    tls: Option<TlsMode>,
    /// PEM of the authorities that they must chain to [default: the system's].
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

fn tls_mode(text: &str) -> Result<TlsMode, String> {
    match text {
        "verify-full" => Ok(TlsMode::VerifyFull),
        "verify-ca" => Ok(TlsMode::VerifyCa),
        "disable" => Ok(TlsMode::Disable),
        _ => Err("verify-full, verify-ca or disable".to_owned()),
    }
}

impl Cluster {
    pub(super) async fn run(self) -> Result<()> {
        if !is_segment(&self.name) || self.name.starts_with('-') || self.name.ends_with(['-', '.'])
        {
            bail!(
                "{:?} cannot be a cluster's name: A-Z a-z 0-9 _ . - , and a letter or digit at both ends",
                self.name
            );
        }
        let settings = self.settings.read()?;
        let bao = self.bao.client(&settings)?;
        let administrator = self.administrator.identity()?;
        let leased = connect_as_set(&settings.registry, async || as_provisioner(&bao).await).await;
        let mut registry = known(leased.context("was pgsiloctl bootstrap registry run?")?).await?;
        claim(&registry.client, "bootstrap of clusters").await?;
        let there = KnownCluster::all(&registry.client).await?;
        let before = there.iter().find(|cluster| cluster.name == self.name);
        let (entry, openbao_endpoints) = self.wanted(&registry, before.is_some()).await?;
        let wanted =
            KnownCluster::read(entry.clone(), openbao_endpoints.clone(), &|path| path.to_owned());
        let wanted = wanted.with_context(|| format!("cluster {}", self.name))?;
        let stranded = stranded(&registry, before, &wanted).await?;
        let in_clear = matches!(wanted.cluster.tls, PlacementTls::Disable);
        ensure!(
            !in_clear || !self.endpoints.is_empty(),
            "cluster {} is reached in clear, where whoever listens could ask for the password: say by --endpoint where it is",
            self.name
        );
        let mut doing = Doing::new(self.dry_run);

        let postgres = administrator.connect(&wanted.placement("postgres")).await?;
        ensure_fit(&postgres).await?;
        let system = "SELECT system_identifier::text FROM pg_control_system()";
        let system: String = postgres.query_one(system, &[]).await?.get(0);
        let known_as = "SELECT name::text FROM pgsilo.clusters WHERE system_identifier = $1 AND name <> $2::text";
        let known_as = registry.client.query_opt(known_as, &[&system, &self.name]).await?;
        if let Some(row) = known_as {
            bail!("the registry has these servers already, as cluster {}", row.get::<_, &str>(0));
        }
        make_roles(&mut doing, &postgres).await?;
        make_template(&mut doing, &postgres, async || {
            administrator.connect(&wanted.placement(TEMPLATE)).await
        })
        .await?;
        for (mount, broker, group, ttl) in [
            (PROVISIONER_MOUNT, "pgsilo_provisioner_broker", "pgsilo_provisioner", "15m"),
            (MONITOR_MOUNT, "pgsilo_monitor_broker", "pgsilo_monitor", "1h"),
        ] {
            let maker = Maker {
                bao: &bao,
                mount,
                connection: &self.name,
                cluster: &wanted,
                dbname: "postgres",
                broker,
            };
            let kind = Kind { role: &self.name, group, ttl };
            maker.describe(&mut doing, &postgres, &[kind]).await?;
        }
        let tls = serde_json::to_value(wanted.tls())?;
        let others_of_row = (openbao_endpoints.as_deref(), system.as_str());
        self.register(&mut doing, &mut registry, &entry, &tls, others_of_row).await?;
        let others = there.iter().filter(|cluster| cluster.name != self.name);
        let mut all: Vec<_> = others.cloned().chain([wanted.clone()]).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        let old = stranded.iter().map(|stranded| stranded.pattern.clone());
        allow_clusters(&mut doing, &bao, &all, &old.collect::<Vec<_>>()).await?;
        if let Some(Stranded { tenants, .. }) = stranded {
            say::progress(&format!(
                "OpenBAO still reaches the {tenants} tenants of {name} as before: run pgsiloctl tenant repair --on {name}, then \
                 this once more",
                name = self.name
            ));
        }
        doing.conclude(&format!("cluster {}", self.name));
        Ok(())
    }

    /// What the registry is to say of it: what it says, with what was said here.
    async fn wanted(
        &self,
        registry: &Session,
        is_there: bool,
    ) -> Result<(ClusterEntry, Option<Vec<String>>)> {
        let (mut entry, mut openbao_endpoints) = match is_there {
            true => {
                let row = "SELECT p.entry, c.openbao_endpoints FROM pgsilo.proxy_clusters p
                    JOIN pgsilo.clusters c ON c.name = p.name WHERE p.name = $1";
                let row = registry.client.query_one(row, &[&self.name]).await?;
                let Json(entry): Json<ClusterEntry> = row.try_get(0)?;
                (entry, row.try_get(1)?)
            }
            false => {
                ensure!(
                    !self.endpoints.is_empty(),
                    "the registry has no cluster {}: say where it is by --endpoint",
                    self.name
                );
                let entry = ClusterEntry {
                    name: self.name.clone(),
                    endpoints: Vec::new(),
                    region: None,
                    tls: None,
                    auth: None,
                    max_sessions: None,
                    monitor: None,
                    read_only: None,
                };
                (entry, None)
            }
        };
        if !self.endpoints.is_empty() {
            // In one spelling: two are not taken for different ones.
            let spelled =
                |text: &String| Host::read(text).map(|host| host.comparable().to_string());
            let endpoints: Result<_, _> = self.endpoints.iter().map(spelled).collect();
            entry.endpoints = endpoints.context("--endpoint")?;
        }
        if !self.openbao_endpoints.is_empty() {
            openbao_endpoints = Some(self.openbao_endpoints.clone());
        }
        entry.region = self.region.clone().or(entry.region);
        if let Some(mode) = self.tls {
            let tls = entry.tls.get_or_insert_with(TlsEntry::default);
            tls.mode = mode;
        }
        if let Some(path) = &self.ca {
            let tls = entry.tls.get_or_insert_with(TlsEntry::default);
            let pem = std::fs::read_to_string(path);
            tls.ca_pem = Some(pem.with_context(|| format!("reading {}", path.display()))?);
        }
        if entry.endpoints.len() > 1 && entry.monitor.is_none() {
            let monitor = json!({ "mount": MONITOR_MOUNT, "role": self.name });
            entry.monitor = Some(serde_json::from_value(monitor)?);
        }
        Ok((entry, openbao_endpoints))
    }

    /// Has the registry say it.
    async fn register(
        &self,
        doing: &mut Doing,
        registry: &mut Session,
        entry: &ClusterEntry,
        tls: &serde_json::Value,
        (openbao_endpoints, system): (Option<&[String]>, &str),
    ) -> Result<()> {
        let tls = match &entry.tls {
            None => json!({}),
            Some(_) => tls.clone(),
        };
        let monitor = entry.monitor.as_ref().map(serde_json::to_value).transpose()?;
        let is_so = "SELECT FROM pgsilo.clusters WHERE name = $1::text AND endpoints = $2
            AND region IS NOT DISTINCT FROM $3::text AND tls = $4 AND openbao_endpoints IS NOT DISTINCT FROM $5
            AND monitor IS NOT DISTINCT FROM $6 AND system_identifier IS NOT DISTINCT FROM $7";
        let (tls, monitor) = (Json(tls), monitor.map(Json));
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
            &self.name,
            &entry.endpoints,
            &entry.region,
            &tls,
            &openbao_endpoints,
            &monitor,
            &system,
        ];
        let is_so = registry.client.query_opt(is_so, &values).await?.is_some();
        doing
            .ensure(format!("the registry has cluster {}", self.name), is_so, async {
                let transaction = take_turn(&mut registry.client).await?;
                self.author.sign(&transaction).await?;
                let write = "INSERT INTO pgsilo.clusters (name, endpoints, region, tls, openbao_endpoints, monitor, system_identifier)
                    VALUES ($1::text, $2, $3::text, $4, $5, $6, $7) ON CONFLICT (name) DO UPDATE SET
                        endpoints = excluded.endpoints, region = excluded.region, tls = excluded.tls,
                        openbao_endpoints = excluded.openbao_endpoints, monitor = excluded.monitor,
                        system_identifier = excluded.system_identifier";
                transaction.execute(write, &values).await?;
                Ok(transaction.commit().await?)
            })
            .await
    }
}

/// Tenants that OpenBAO reaches by another URL than it is to.
#[derive(Debug)]
struct Stranded {
    tenants: i64,
    /// What the provisioner may still write.
    pattern: String,
}

/// Whether a cluster's tenants are described to OpenBAO in another way than they will be.
async fn stranded(
    registry: &Session,
    before: Option<&KnownCluster>,
    wanted: &KnownCluster,
) -> Result<Option<Stranded>> {
    let Some(before) = before else { return Ok(None) };
    let is_same = before.connection_url("").ok() == wanted.connection_url("").ok()
        && before.tls_ca() == wanted.tls_ca();
    let tenants = "SELECT count(*) FROM pgsilo.placements WHERE cluster = $1::text";
    let tenants = registry.client.query_one(tenants, &[&before.name]).await?.get(0);
    let pattern = before.url_pattern().ok();
    Ok(pattern.filter(|_| !is_same && tenants > 0).map(|pattern| Stranded { tenants, pattern }))
}

/// Whether tenants can share it, and this login can make it ready for them.
async fn ensure_fit(postgres: &Client) -> Result<()> {
    // Of a version that has no such setting nothing is said.
    let asked = "SELECT current_setting('server_version_num')::int4, current_setting('server_version'),
        current_setting('max_prepared_transactions')::int4, current_setting('is_superuser')::bool,
        current_setting('password_encryption'), coalesce(current_setting('reserved_connections', true), '0')::int4";
    let row = postgres.query_one(asked, &[]).await?;
    let (number, text): (i32, String) = (row.get(0), row.get(1));
    ensure!(
        number >= 160_000,
        "it is PostgreSQL {text}: before 16, CREATEROLE is as good as superuser, and roles cannot be given away \
         without being inherited"
    );
    ensure!(row.get::<_, bool>(3), "this login is no superuser there");
    ensure!(
        row.get::<_, i32>(2) == 0,
        "max_prepared_transactions must be 0: what a session prepares holds its role for ever, and no revocation \
         could end it"
    );
    ensure!(
        row.get::<_, &str>(4) == "scram-sha-256",
        "password_encryption must be scram-sha-256, which all its logins need"
    );
    if row.get::<_, i32>(5) == 0 {
        say::progress(
            "warning: reserved_connections is 0: where tenants use up all connections, nothing can be revoked; \
             set it to 8 or so",
        );
    }
    Ok(())
}

async fn make_roles(doing: &mut Doing, postgres: &Client) -> Result<()> {
    let as_they_are = "SELECT count(*) = 5 FROM pg_roles r JOIN (VALUES
            ('pgsilo_provisioner', false, true, true), ('pgsilo_provisioner_broker', true, false, true),
            ('pgsilo_monitor', false, false, false), ('pgsilo_monitor_broker', true, false, true),
            ('pgsilo_template_owner', false, false, false)
        ) AS wanted (name, login, createdb, createrole) ON r.rolname = name
        WHERE NOT (rolsuper OR rolreplication OR rolbypassrls) AND rolcanlogin = login
            AND rolcreatedb = createdb AND rolcreaterole = createrole";
    let memberships = "SELECT count(*) = 5 FROM pg_auth_members a JOIN (VALUES
            ('pgsilo_provisioner', 'pgsilo_provisioner_broker'), ('pgsilo_template_owner', 'pgsilo_provisioner'),
            ('pg_use_reserved_connections', 'pgsilo_provisioner'), ('pg_use_reserved_connections', 'pgsilo_provisioner_broker'),
            ('pgsilo_monitor', 'pgsilo_monitor_broker')
        ) AS wanted (role, broker) ON a.roleid = to_regrole(role) AND a.member = to_regrole(broker)
        WHERE a.admin_option";
    let others = "SELECT pg_has_role('pgsilo_provisioner', 'pg_signal_backend', 'USAGE')
            AND bool_and(has_database_privilege(rolname, 'postgres', 'CONNECT'))
        FROM pg_roles WHERE rolname ~ '^pgsilo_(provisioner|monitor)(_broker)?$'";
    let parameters = "SELECT bool_and(has_parameter_privilege(r.oid, p, 'SET')) FROM pg_roles r, unnest(ARRAY['pgsilo.tenant',
            'log_statement', 'log_min_error_statement', 'log_min_duration_statement', 'log_min_duration_sample',
            'log_transaction_sample_rate', 'log_duration']) p WHERE r.rolname = 'pgsilo_provisioner'";
    let no_way_in = "SELECT NOT EXISTS (SELECT FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        WHERE d.datname IN ('postgres', 'template1') AND a.grantee = 0)";
    let mut is_so = true;
    for query in [as_they_are, memberships, parameters, no_way_in, others] {
        // Without the roles, nothing more is asked.
        is_so = is_so && {
            let row = postgres.query_one(query, &[]).await?;
            row.get::<_, Option<bool>>(0) == Some(true)
        };
    }
    let what =
        "the provisioner and the monitor, their brokers, and PUBLIC out of postgres and template1";
    doing.ensure(what, is_so, async { Ok(postgres.batch_execute(CLUSTER).await?) }).await
}

/// The database that tenants' are copied from. It accepts no connections afterwards.
async fn make_template(
    doing: &mut Doing,
    postgres: &Client,
    connect: impl AsyncFnOnce() -> Result<Client>,
) -> Result<()> {
    let there = "SELECT datistemplate AND NOT datallowconn AND NOT EXISTS (
            SELECT FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) a WHERE a.grantee = 0)
        FROM pg_database WHERE datname = $1";
    let there = postgres.query_opt(there, &[&TEMPLATE]).await?;
    let is_so = there.as_ref().is_some_and(|row| row.get(0));
    let what = format!("the database {TEMPLATE}, which tenants' are copied from");
    doing
        .ensure(what, is_so, async {
            if there.is_none() {
                let create = format!(
                    "CREATE DATABASE {TEMPLATE} TEMPLATE template0 ENCODING 'UTF8' IS_TEMPLATE true"
                );
                postgres.batch_execute(&create).await?;
            }
            let open = format!(
                "REVOKE ALL ON DATABASE {TEMPLATE} FROM PUBLIC;
                 ALTER DATABASE {TEMPLATE} IS_TEMPLATE true ALLOW_CONNECTIONS true"
            );
            postgres.batch_execute(&open).await?;
            let template = connect().await?;
            template.batch_execute(TEMPLATE_SQL).await?;
            drop(template);
            let close = format!("ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false");
            Ok(postgres.batch_execute(&close).await?)
        })
        .await
}
