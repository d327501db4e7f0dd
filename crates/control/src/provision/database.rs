//! What a tenant has at PostgreSQL. The SQL is that of `docker/postgresql`.

use anyhow::{Context, Result, bail, ensure};
use pgsilo_core::names::{Role, SEAL};
use pgsilo_core::secret::Secret;
use tokio_postgres::Client;

use super::Making;
use super::plan::{Allowance, LeaseHashing};

/// The tenant's roles; run in any database.
const ROLES: &str = include_str!("../../../../docker/postgresql/roles.sql");
/// Schema `public`, and functions for the tenant's own sessions; run in the tenant's database.
const DATABASE: &str = include_str!("../../../../docker/postgresql/database.sql");
/// How the broker of a tenant works whose verifiers PostgreSQL makes; run in any database.
const HASHING: &str = include_str!("../../../../docker/postgresql/hashing.sql");

pub(super) const ROLES_OF_A_TENANT: [Role; 4] =
    [Role::Broker, Role::Login, Role::ReadOnly, Role::App];

impl Making<'_> {
    /// A connection to a database of the cluster that is no tenant's.
    pub(super) async fn cluster(&self) -> Result<Client> {
        self.identity.connect(&self.cluster.placement("postgres")).await
    }

    async fn database(&self) -> Result<Client> {
        self.identity.connect(&self.cluster.placement(&self.names.database())).await
    }

    /// One of the recipe's files, for this tenant.
    pub(super) fn fill_in(&self, recipe: &str) -> String {
        recipe.replace("TENANT", self.names.in_postgres().as_str())
    }

    pub(super) async fn ensure_no_database(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        ensure_fit(&cluster).await?;
        let name = self.names.database();
        if exists(&cluster, "SELECT FROM pg_database WHERE datname = $1", &name).await? {
            bail!(
                "cluster {} has a database {name} already, and no journal says what it is",
                self.cluster.name
            );
        }
        for role in ROLES_OF_A_TENANT.map(|role| self.names.role(role)) {
            if exists(&cluster, "SELECT FROM pg_roles WHERE rolname = $1", &role).await? {
                bail!(
                    "cluster {} has a role {role} already, and no journal says what it is",
                    self.cluster.name
                );
            }
        }
        let template = &self.plan.template;
        let is_template = "SELECT FROM pg_database WHERE datname = $1 AND datistemplate";
        ensure!(
            exists(&cluster, is_template, template).await?,
            "cluster {} has no template database {template}",
            self.cluster.name
        );
        Ok(())
    }

    pub(super) async fn make_database(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        // One whose creation was interrupted is not there.
        if !exists(&cluster, "SELECT FROM pg_database WHERE datname = $1", &name).await? {
            // Closed until PUBLIC has been shut out below.
            let template = self.plan.template.replace('"', "\"\"");
            let create = format!(
                "CREATE DATABASE \"{name}\" TEMPLATE \"{template}\" ALLOW_CONNECTIONS false"
            );
            unhurried(&cluster, &create).await?;
        }
        let close = format!("REVOKE ALL ON DATABASE \"{name}\" FROM PUBLIC");
        Ok(cluster.batch_execute(&close).await?)
    }

    pub(super) async fn make_roles(&self) -> Result<()> {
        Ok(self.cluster().await?.batch_execute(&self.fill_in(ROLES)).await?)
    }

    pub(super) async fn fill(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let allow = |whether: bool| {
            format!("ALTER DATABASE \"{}\" ALLOW_CONNECTIONS {whether}", self.names.database())
        };
        // Nobody but its owner may connect yet.
        cluster.batch_execute(&allow(true)).await?;
        let database = self.database().await?;
        database.batch_execute(&self.fill_in(DATABASE)).await?;
        drop(database);
        Ok(cluster.batch_execute(&allow(false)).await?)
    }

    pub(super) async fn open(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        let [app, login, broker] =
            [Role::App, Role::Login, Role::Broker].map(|role| self.names.role(role));
        let (seal, connections) = (self.plan.seal.replace('\'', "''"), self.plan.connections);
        if self.plan.lease_hashing == LeaseHashing::Postgres {
            let set = cluster.batch_execute(&self.fill_in(HASHING)).await;
            set.context(
                "letting PostgreSQL make the verifiers: was the cluster bootstrapped by this version?",
            )?;
        }
        let open = format!(
            "GRANT CONNECT, TEMPORARY, CREATE ON DATABASE \"{name}\" TO \"{app}\";
             GRANT CONNECT ON DATABASE \"{name}\" TO \"{login}\", \"{broker}\";
             ALTER DATABASE \"{name}\" SET {SEAL} = '{seal}';
             ALTER DATABASE \"{name}\" CONNECTION LIMIT {connections};
             ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS true"
        );
        cluster.batch_execute(&open).await?;
        self.allow(&self.database().await?).await
    }

    /// Gives the tenant's own role what it may use of what the template takes from everybody, and takes
    /// the rest away. Its read-only role gets none of it.
    async fn allow(&self, database: &Client) -> Result<()> {
        let app = self.names.role(Role::App);
        for allowance in Allowance::ALL {
            let (verb, to) = match self.plan.allow.contains(&allowance) {
                true => ("GRANT", "TO"),
                false => ("REVOKE", "FROM"),
            };
            let functions = "SELECT oid::regprocedure::text FROM pg_proc
                WHERE pronamespace = 'pg_catalog'::regnamespace AND proname ~ $1";
            let rows = database.query(functions, &[&allowance.functions()]).await?;
            let orders = rows.iter().map(|row| {
                let function: &str = row.get(0);
                format!("{verb} EXECUTE ON FUNCTION {function} {to} \"{app}\"")
            });
            let orders = orders.collect::<Vec<_>>().join(";");
            let allowed = database.batch_execute(&orders).await;
            allowed.with_context(|| format!("allowing {allowance:?}"))?;
        }
        Ok(())
    }

    /// Gives the broker a password, which PostgreSQL is only told the verifier of.
    pub(super) async fn set_broker_password(&self, password: &Secret) -> Result<()> {
        let verifier = postgres_protocol::password::scram_sha_256(password.expose());
        let broker = self.names.role(Role::Broker);
        let set = format!("ALTER ROLE \"{broker}\" PASSWORD '{verifier}'");
        Ok(self.cluster().await?.batch_execute(&set).await?)
    }

    pub(super) async fn drop_database(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        let known =
            "SELECT pg_get_userbyid(datdba) = current_user FROM pg_database WHERE datname = $1";
        let Some(row) = cluster.query_opt(known, &[&name]).await? else { return Ok(()) };
        ensure!(row.get::<_, bool>(0), "database {name} is not the provisioner's");
        // FORCE ends sessions, and does not keep new ones out.
        let close = format!("ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS false");
        if let Err(error) = cluster.batch_execute(&close).await {
            // One whose removal was interrupted can only be dropped.
            let invalid = "SELECT FROM pg_database WHERE datname = $1 AND datconnlimit = -2";
            if !exists(&cluster, invalid, &name).await? {
                return Err(error.into());
            }
        }
        self.ensure_nothing_leads_out(&cluster, &name).await?;
        unhurried(&cluster, &format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)")).await
    }

    /// What DROP DATABASE would be refused for, or would leave elsewhere, with what to do.
    pub(super) async fn ensure_nothing_leads_out(
        &self,
        cluster: &Client,
        name: &str,
    ) -> Result<()> {
        let leads_out = "SELECT 'the replication slot ' || slot_name || ': drop it by pg_drop_replication_slot'
                FROM pg_replication_slots WHERE database = $1
            UNION ALL SELECT 'the prepared transaction ' || gid || ': roll it back' FROM pg_prepared_xacts WHERE database = $1
            UNION ALL SELECT 'the subscription with oid ' || s.subid || ': drop it, and its slot where it leads'
                FROM pg_stat_subscription s JOIN pg_shdepend d ON d.classid = 'pg_subscription'::regclass AND d.objid = s.subid
                    JOIN pg_database b ON b.oid = d.dbid WHERE b.datname = $1
            LIMIT 1";
        match cluster.query_opt(leads_out, &[&name]).await.context("what leads out of it")? {
            None => Ok(()),
            Some(row) => bail!("{name} has {}, as a superuser", row.get::<_, &str>(0)),
        }
    }

    pub(super) async fn drop_roles(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        for role in ROLES_OF_A_TENANT.map(|role| self.names.role(role)) {
            let dropped = cluster.batch_execute(&format!("DROP ROLE IF EXISTS \"{role}\"")).await;
            dropped.with_context(|| format!("dropping {role}"))?;
        }
        Ok(())
    }

    pub(super) async fn verify_database(&self) -> Result<Vec<String>> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        let mut wrong = Vec::new();
        let known = "SELECT d.datallowconn, d.datconnlimit, pg_get_userbyid(d.datdba) = current_user,
                EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a WHERE a.grantee = 0),
                (SELECT substr(setting, length($2) + 2) FROM pg_db_role_setting s, unnest(s.setconfig) setting
                    WHERE s.setdatabase = d.oid AND s.setrole = 0 AND starts_with(setting, $2 || '='))
            FROM pg_database d WHERE d.datname = $1";
        match cluster.query_opt(known, &[&name, &SEAL]).await? {
            None => wrong.push(format!("there is no database {name}")),
            Some(row) => {
                let (is_open, limit, is_ours): (bool, i32, bool) =
                    (row.get(0), row.get(1), row.get(2));
                let seal: Option<String> = row.get(4);
                let expected = i32::from(self.plan.connections);
                for (is_wrong, what) in [
                    (!is_open, format!("{name} lets nobody connect")),
                    (
                        limit != expected,
                        format!("{name} takes {limit} connections, not {expected}"),
                    ),
                    (!is_ours, format!("{name} is not the provisioner's")),
                    (row.get(3), format!("everybody may use {name}")),
                    (seal.as_ref() != Some(&self.plan.seal), format!("{name} has another seal")),
                ] {
                    wrong.extend(is_wrong.then_some(what));
                }
            }
        }
        for role in ROLES_OF_A_TENANT {
            let (name, may_log_in) = (self.names.role(role), role == Role::Broker);
            let as_it_is = "SELECT FROM pg_roles WHERE rolname = $1 AND rolcanlogin = $2
                AND rolcreaterole = $2 AND NOT (rolsuper OR rolcreatedb OR rolreplication OR rolbypassrls)";
            if cluster.query_opt(as_it_is, &[&name, &may_log_in]).await?.is_none() {
                wrong.push(format!("the role {name} is missing, or may do something else"));
            }
        }
        Ok(wrong)
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

async fn exists(cluster: &Client, query: &str, name: &str) -> Result<bool> {
    Ok(cluster.query_opt(query, &[&name]).await?.is_some())
}

/// Copying or removing a database takes as long as it takes.
async fn unhurried(cluster: &Client, order: &str) -> Result<()> {
    cluster.batch_execute("SET statement_timeout = 0").await?;
    Ok(cluster.batch_execute(order).await?)
}
