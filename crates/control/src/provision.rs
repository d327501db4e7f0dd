//! Makes a tenant: its database, its roles, its seal, and what OpenBAO needs to lease for it.
//!
//! All of it is done as the *provisioner*: a PostgreSQL role with CREATEDB and CREATEROLE and
//! never superuser, and an OpenBAO token that can describe credentials and read none. It needs
//! PostgreSQL 16 or newer, where CREATEROLE reaches only the roles one has made. Every step may
//! be repeated, so a provisioning that was cut short is finished by running it again.
//!
//! What a superuser has to do, once for each cluster, is done before: the provisioner's role, and
//! the database [`TEMPLATE`], where PUBLIC lacks what would let any session use up what is the
//! cluster's.
//!
//! Per tenant `x`, in PostgreSQL:
//!
//! | name | what |
//! |---|---|
//! | database `tenant_x` | owned by the provisioner, so that the tenant cannot break the seal; closed to PUBLIC |
//! | `tenant_x_app` | NOLOGIN, owns schema `public` and everything the tenant makes |
//! | `tenant_x_ro` | NOLOGIN, may SELECT what `tenant_x_app` makes |
//! | `tenant_x_login` | NOLOGIN, may connect, nothing else: every leased role is in it |
//! | `tenant_x_broker` | what OpenBAO logs in as: makes and drops leased roles of this tenant only |
//! | schema `pgsilo` | the provisioner's; functions by which sessions see, cancel and end their tenant's own |
//!
//! The SQL is that of docs/setup.md, from the same files.

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use pgsilo_core::names::{Names, Role, SEAL};
use pgsilo_core::secret::Secret;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::SetRoleRequest;
use serde_json::json;
use tokio_postgres::{Client, NoTls};

use crate::postgres::SETTINGS;
use crate::revocation;

/// How OpenBAO names leased roles: after its own role, with 20 random characters behind it.
pub const USERNAME_TEMPLATE: &str = r#"{{ printf "%s-%s" (.RoleName | truncate 42) (random 20) }}"#;

/// What tenants' databases are made from; `docker/postgresql/template.sql` makes it what it is.
pub const TEMPLATE: &str = "pgsilo_template";

/// The tenant's roles; run in any database.
const ROLES: &str = include_str!("../../../docker/postgresql/roles.sql");
/// Schema `public`, and functions for the tenant's own sessions; run in the tenant's database.
const DATABASE: &str = include_str!("../../../docker/postgresql/database.sql");
/// How OpenBAO makes a leased role.
const CREATE: &str = include_str!("../../../docker/openbao/create.sql");

/// What [`TEMPLATE`] takes from everybody, and a tenant that writes may be given: applications need
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Allowance {
    /// `pg_advisory_lock` and its kin, as migrations of many frameworks use them.
    AdvisoryLocks,
    /// `lo_create` and its kin.
    LargeObjects,
    /// `pg_logical_emit_message`.
    LogicalMessages,
}

impl Allowance {
    const ALL: [Allowance; 3] =
        [Allowance::AdvisoryLocks, Allowance::LargeObjects, Allowance::LogicalMessages];

    /// Names of functions, as a regular expression.
    fn functions(self) -> &'static str {
        match self {
            Allowance::AdvisoryLocks => "^pg_(try_)?advisory_(xact_)?lock",
            Allowance::LargeObjects => "^lo_(creat|create|from_bytea)$",
            Allowance::LogicalMessages => "^pg_logical_emit_message$",
        }
    }
}

/// How much of its cluster a tenant may have.
#[derive(Debug, Clone)]
pub struct Share {
    /// Connections to its database, those of its broker included.
    pub connections: u16,
    /// What its sessions may use besides.
    pub allowed: Vec<Allowance>,
}

/// A role that can log in to a PostgreSQL server by password.
#[derive(Debug, Clone)]
pub struct Login {
    /// A name or an address.
    pub host: String,
    /// TCP.
    pub port: u16,
    /// Its name.
    pub user: String,
    /// And what it logs in with.
    pub password: Secret,
}

impl Login {
    /// A connection to `database`; it closes when the client is dropped.
    pub async fn connect(&self, database: &str) -> Result<Client> {
        let (client, connection) = tokio_postgres::Config::new()
            .host(&self.host)
            .port(self.port)
            .user(&self.user)
            .password(self.password.expose())
            .dbname(database)
            .application_name("pgsiloctl")
            .options(SETTINGS)
            .connect(NoTls)
            .await
            .with_context(|| format!("logging in to database {database} as {}", self.user))?;
        // Its error is also the error of whatever statement was under way.
        tokio::spawn(connection);
        Ok(client)
    }
}

/// One of the recipe's files, for this tenant.
fn fill(recipe: &str, tenant: &Names) -> String {
    recipe.replace("TENANT", tenant.id().as_str())
}

/// The identity that makes tenants.
#[derive(Debug, Clone)]
pub struct Provisioner {
    /// In the cluster.
    pub postgres: Login,
    /// At OpenBAO.
    pub bao: Bao,
    /// Of each tenant.
    pub share: Share,
}

impl Provisioner {
    /// Makes the tenant, or finishes making it.
    pub async fn create_tenant(&self, tenant: &Names) -> Result<()> {
        let broker_password = Secret::random()?;
        let cluster = self.postgres.connect("postgres").await?;
        ensure_fit(&cluster).await?;
        make_roles(&cluster, tenant, &broker_password).await.context("the tenant's roles")?;
        make_database(&cluster, tenant, &self.share).await.context("the tenant's database")?;
        let database = self.postgres.connect(&tenant.database()).await?;
        let contents = fill(DATABASE, tenant);
        database.batch_execute(&contents).await.context("what is in the tenant's database")?;
        allow(&database, tenant, &self.share.allowed).await.context("allowing what it may use")?;
        self.describe_to_openbao(tenant, &broker_password)
            .await
            .context("describing the tenant to OpenBAO")
    }

    async fn describe_to_openbao(&self, tenant: &Names, broker_password: &Secret) -> Result<()> {
        let connection = tenant.connection();
        let (host, port) = (&self.postgres.host, self.postgres.port);
        let kinds = ["rw", "ro", "migrate"];
        let roles: Vec<_> = kinds.iter().map(|kind| tenant.lease_role(kind)).collect();
        let description = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": format!(
                "postgresql://{{{{username}}}}:{{{{password}}}}@{host}:{port}/{}?sslmode=disable",
                tenant.database(),
            ),
            "username": tenant.role(Role::Broker),
            // The hash is made by OpenBAO: the password itself never stands in an SQL text,
            // so it cannot reach the server's log.
            "password_authentication": "scram-sha-256",
            "allowed_roles": roles,
            "username_template": USERNAME_TEMPLATE,
            "max_open_connections": 4,
            // Without, OpenBAO keeps a connection to each tenant's database for ever.
            "max_connection_lifetime": "5m",
        });
        let mount = self.mount(tenant).await?;
        // It may not be updated, see the policy: what is there goes, its password with it.
        if self.bao.database_config(&mount, &connection).await?.is_some() {
            self.bao.delete_database_config(&mount, &connection).await?;
        }
        let written =
            self.bao.set_database_config(&mount, &connection, &description, broker_password);
        written.await?;
        // From here on only OpenBAO knows the broker's password.
        self.bao.rotate_root(&mount, &connection).await?;
        for (kind, role) in kinds.iter().zip(&roles) {
            // Read-write and migrate have the same rights: an application that may not make
            // its own tables would not run unchanged. Two names let an operator count, bound
            // and withdraw migrations apart.
            let works_as = if *kind == "ro" { "ro" } else { "app" };
            let made = lease_statements(tenant, &connection, works_as);
            let (mount, name) = (mount.clone(), role.clone());
            self.bao.run(&SetRoleRequest { mount, name, ..made }).await?;
        }
        Ok(())
    }

    /// Makes the tenant's mount, unless it is there; answers with its path.
    async fn mount(&self, tenant: &Names) -> Result<String> {
        let mount = tenant.mount();
        match self.bao.engine(&mount).await?.as_deref() {
            None => self.bao.mount_database_engine(&mount).await?,
            Some("database") => {}
            Some(other) => bail!("at {mount} OpenBAO has an engine of type {other:?}"),
        }
        Ok(mount)
    }
}

/// How OpenBAO makes and unmakes a leased role that works as the tenant's role of that kind, `app`
/// or `ro`.
///
/// The leased role owns nothing: all it makes belongs to that role, which it becomes at login
/// and comes back to at DISCARD ALL, RESET ROLE and SET SESSION AUTHORIZATION DEFAULT. The
/// broker is a member of it, because only a member may end its sessions, and may become it, because
/// that tells its logins from all others (see `drop.sql`); without that, a live session would go on
/// working as that role after its own is gone.
fn lease_statements(tenant: &Names, connection: &str, kind: &str) -> SetRoleRequest {
    SetRoleRequest {
        db_name: connection.to_owned(),
        default_ttl: Some("1h".to_owned()),
        max_ttl: Some("24h".to_owned()),
        creation_statements: Some(vec![fill(CREATE, tenant).replace("KIND", kind)]),
        revocation_statements: Some(revocation::STATEMENTS.map(str::to_owned).to_vec()),
        ..SetRoleRequest::default()
    }
}

/// What a cluster must be for tenants to share it.
async fn ensure_fit(cluster: &Client) -> Result<()> {
    let settings = "SELECT current_setting('server_version_num')::int4,
        current_setting('max_prepared_transactions')::int4";
    let row = cluster.query_one(settings, &[]).await?;
    let (version, prepared): (i32, i32) = (row.try_get(0)?, row.try_get(1)?);
    ensure!(
        version >= 160_000,
        "PostgreSQL 16 or newer is needed: before it, CREATEROLE is as good as superuser"
    );
    ensure!(
        prepared == 0,
        "max_prepared_transactions must be 0: what a session prepares holds its role for ever, \
         and no revocation could end it"
    );
    Ok(())
}

async fn make_roles(cluster: &Client, tenant: &Names, broker_password: &Secret) -> Result<()> {
    cluster.batch_execute(&fill(ROLES, tenant)).await?;
    let verifier = postgres_protocol::password::scram_sha_256(broker_password.expose());
    let broker = tenant.role(Role::Broker);
    cluster.batch_execute(&format!("ALTER ROLE \"{broker}\" PASSWORD '{verifier}'")).await?;
    Ok(())
}

async fn make_database(cluster: &Client, tenant: &Names, share: &Share) -> Result<()> {
    let database = tenant.database();
    let known = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1";
    if !exists(cluster, known, &database).await? {
        // Closed until PUBLIC has been shut out below.
        let create =
            format!("CREATE DATABASE \"{database}\" TEMPLATE {TEMPLATE} ALLOW_CONNECTIONS false");
        cluster.batch_execute(&create).await?;
    }
    let [app, login, broker] = [Role::App, Role::Login, Role::Broker].map(|role| tenant.role(role));
    let (id, connections) = (tenant.id(), share.connections);
    cluster
        .batch_execute(&format!(
            "REVOKE ALL ON DATABASE \"{database}\" FROM PUBLIC;
             GRANT CONNECT, TEMPORARY, CREATE ON DATABASE \"{database}\" TO \"{app}\";
             GRANT CONNECT ON DATABASE \"{database}\" TO \"{login}\", \"{broker}\";
             ALTER DATABASE \"{database}\" SET {SEAL} = '{id}';
             ALTER DATABASE \"{database}\" CONNECTION LIMIT {connections};
             ALTER DATABASE \"{database}\" ALLOW_CONNECTIONS true"
        ))
        .await?;
    Ok(())
}

/// Gives the tenant's own role what it may use of what [`TEMPLATE`] takes from everybody, and takes
/// the rest away. Its read-only role gets none of it.
async fn allow(database: &Client, tenant: &Names, allowed: &[Allowance]) -> Result<()> {
    let app = tenant.role(Role::App);
    for allowance in Allowance::ALL {
        let (verb, to) = match allowed.contains(&allowance) {
            true => ("GRANT", "TO"),
            false => ("REVOKE", "FROM"),
        };
        let functions =
            "SELECT oid::pg_catalog.regprocedure::pg_catalog.text FROM pg_catalog.pg_proc
             WHERE pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND proname ~ $1";
        for row in database.query(functions, &[&allowance.functions()]).await? {
            let function: String = row.try_get(0)?;
            let sql = format!("{verb} EXECUTE ON FUNCTION {function} {to} \"{app}\"");
            database.batch_execute(&sql).await?;
        }
    }
    Ok(())
}

async fn exists(cluster: &Client, query: &str, name: &str) -> Result<bool> {
    Ok(cluster.query_opt(query, &[&name]).await?.is_some())
}

#[cfg(test)]
mod tests {
    use pgsilo_core::tenant::TenantId;

    use super::*;

    #[test]
    fn lease_statements_name_this_tenant_only_and_never_an_owner() {
        let acme = Names::of(&TenantId::parse("acme").unwrap());
        let made = lease_statements(&acme, "tenant-acme", "ro").creation_statements.unwrap();
        let body = made.concat();
        assert!(body.contains(r#"CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}'"#));
        assert!(body.contains(r#"SET role = 'tenant_acme_ro'"#));
        assert!(!body.contains("tenant_acme_app"));
        assert!(!body.contains("TENANT") && !body.contains("KIND"));
        // OpenBAO cuts the statements at each semicolon.
        assert_eq!(CREATE.matches(';').count(), CREATE.lines().count());
    }
}
