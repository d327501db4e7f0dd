//! What a tenant has at PostgreSQL. The SQL is that of `docker/postgresql`.

use anyhow::{Context, Result, bail, ensure};
use pgsilo_core::names::{Role, SEAL};
use pgsilo_core::secret::Secret;
use tokio_postgres::Client;

use super::Making;
use super::plan::{Allowance, LeaseHashing};
use crate::leases::grants::Grants;

/// The tenant's roles; run in any database.
const ROLES: &str = include_str!("../../../../docker/postgresql/roles.sql");
/// Schema `public`, and functions for the tenant's own sessions; run in the tenant's database.
const DATABASE: &str = include_str!("../../../../docker/postgresql/database.sql");
/// What is a template's owner's becomes the tenant's; run in the tenant's database.
const ADOPT: &str = include_str!("../../../../docker/postgresql/adopt.sql");
/// How the broker of a tenant works whose verifiers PostgreSQL makes; run in any database.
const HASHING: &str = include_str!("../../../../docker/postgresql/hashing.sql");

pub(super) const ROLES_OF_A_TENANT: [Role; 4] =
    [Role::Broker, Role::Login, Role::ReadOnly, Role::App];

/// What a cluster has of a tenant's database.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) oid: u32,
    /// Of the cluster, whatever its name leads to.
    pub(super) system_identifier: String,
    pub(super) seal: Option<String>,
    /// Whether it is the provisioner's.
    is_ours: bool,
    pub(super) connections: i32,
}

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

    /// That the cluster has nothing of it yet, and that it can be made there.
    pub(crate) async fn ensure_no_database(&self) -> Result<()> {
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
        ensure!(
            !matches!(template.as_str(), "template0" | "template1"),
            "{template} lets everybody use up the cluster: make a template of {}",
            super::TEMPLATE
        );
        let is_template = "SELECT FROM pg_database WHERE datname = $1 AND datistemplate";
        ensure!(
            exists(&cluster, is_template, template).await?,
            "cluster {} has no template database {template}",
            self.cluster.name
        );
        Ok(())
    }

    /// What there is, if anything.
    pub(super) async fn found(&self, cluster: &Client) -> Result<Option<Found>> {
        let found = "SELECT d.oid, (SELECT system_identifier::text FROM pg_control_system()),
                (SELECT substr(setting, length($2) + 2) FROM pg_db_role_setting s, unnest(s.setconfig) setting
                    WHERE s.setdatabase = d.oid AND s.setrole = 0 AND starts_with(setting, $2 || '=')),
                pg_get_userbyid(d.datdba) = current_user, d.datconnlimit
            FROM pg_database d WHERE d.datname = $1";
        let row = cluster.query_opt(found, &[&self.names.database(), &SEAL]).await;
        Ok(row.context("what it is")?.map(|row| Found {
            oid: row.get(0),
            system_identifier: row.get(1),
            seal: row.get(2),
            is_ours: row.get(3),
            connections: row.get(4),
        }))
    }

    /// That it is there, this tenant's, and that nothing would keep it from being dropped.
    pub(crate) async fn ensure_this_tenants(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let (name, id) = (self.names.database(), &self.plan.id);
        let found = self.found(&cluster).await?;
        let found = found.with_context(|| {
            format!("cluster {} has no database {name}: where is {id}?", self.cluster.name)
        })?;
        ensure!(found.is_ours, "database {name} is not the provisioner's");
        ensure!(
            found.seal.as_ref() == Some(&self.plan.seal),
            "database {name} is not sealed for {id}: see whose it is"
        );
        self.ensure_nothing_leads_out(&cluster, &name).await
    }

    /// Waits for whoever makes a database of this name: a server goes on with that when its client is gone.
    async fn alone(&self, cluster: &Client) -> Result<()> {
        let key = format!("pgsilo {}", self.names.database());
        cluster.batch_execute("SET statement_timeout = 0").await?;
        let alone = "SELECT pg_advisory_lock(hashtextextended($1, 0))";
        cluster.query(alone, &[&key]).await.context("waiting for who makes it")?;
        Ok(())
    }

    pub(super) async fn make_database(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        self.alone(&cluster).await?;
        // One whose creation was interrupted is not there.
        if !exists(&cluster, "SELECT FROM pg_database WHERE datname = $1", &name).await? {
            // Closed until PUBLIC has been shut out below.
            let template = self.plan.template.replace('"', "\"\"");
            let create = format!(
                "CREATE DATABASE \"{name}\" TEMPLATE \"{template}\" ALLOW_CONNECTIONS false"
            );
            cluster.batch_execute(&create).await?;
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
        let open = "SELECT has_function_privilege('public', 'pg_catalog.pg_advisory_lock(bigint)', 'EXECUTE')";
        let is_open: bool = self.database().await?.query_one(open, &[]).await?.get(0);
        ensure!(
            !is_open,
            "template {} was not made of {}: everybody could use up the cluster there",
            self.plan.template,
            super::TEMPLATE
        );
        self.fill_contents().await?;
        Ok(cluster.batch_execute(&allow(false)).await?)
    }

    /// What is in it, made or made again.
    pub(super) async fn fill_contents(&self) -> Result<()> {
        let database = self.database().await?;
        let brings = "SELECT FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass
            AND refobjid = to_regrole('pgsilo_template_owner')
            AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) LIMIT 1";
        if database.query_opt(brings, &[]).await?.is_some() {
            let adopted = database.batch_execute(&self.fill_in(ADOPT)).await;
            adopted.context("taking over what the template brings")?;
        }
        Ok(database.batch_execute(&self.fill_in(DATABASE)).await?)
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
        match self.plan.allow.as_deref() {
            None => Ok(()),
            Some(allowed) => self.allow(&self.database().await?, allowed).await,
        }
    }

    /// Gives the tenant's own role what it may use of what the template takes from everybody, and takes
    /// the rest away. Its read-only role gets none of it.
    async fn allow(&self, database: &Client, allowed: &[Allowance]) -> Result<()> {
        let app = self.names.role(Role::App);
        for allowance in Allowance::ALL {
            let (verb, to) = match allowed.contains(&allowance) {
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
            let ordered = database.batch_execute(&orders).await;
            ordered.with_context(|| format!("allowing {allowance:?}"))?;
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

    /// Drops it, unless it is gone; `expected` is what it must be.
    pub(super) async fn drop_database(&self, expected: Option<(u32, &str)>) -> Result<()> {
        let cluster = self.cluster().await?;
        self.alone(&cluster).await?;
        let name = self.names.database();
        if let Some((_, system)) = expected {
            let found = "SELECT system_identifier::text FROM pg_control_system()";
            let found: String = cluster.query_one(found, &[]).await?.get(0);
            ensure!(
                found == system,
                "cluster {} is now another server than the one that has the database (system identifier {system})",
                self.cluster.name
            );
        }
        let Some(found) = self.found(&cluster).await? else { return Ok(()) };
        ensure!(found.is_ours, "database {name} is not the provisioner's");
        if let Some((oid, _)) = expected {
            ensure!(found.oid == oid, "{name} is another database than it was (oid {oid})");
        }
        // FORCE ends sessions, and does not keep new ones out. One whose removal was interrupted can only be
        // dropped.
        if found.connections != -2 {
            let close = format!("ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS false");
            cluster.batch_execute(&close).await?;
        }
        self.ensure_nothing_leads_out(&cluster, &name).await?;
        let drop = format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)");
        let Err(error) = cluster.batch_execute(&drop).await else { return Ok(()) };
        let stays = "SELECT string_agg(pid::text, ', ') FROM pg_stat_activity WHERE datname = $1";
        let stays: Option<String> = cluster.query_one(stays, &[&name]).await?.get(0);
        Err(match stays {
            None => error.into(),
            Some(pids) => anyhow::Error::from(error).context(format!(
                "the sessions {pids} do not end yet: run this again when they have, or restart the server"
            )),
        })
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
            UNION ALL SELECT 'the subscription ' || s.subname || ': drop it, and its slot where it leads'
                FROM pg_subscription s JOIN pg_database b ON b.oid = s.subdbid WHERE b.datname = $1
            LIMIT 1";
        match cluster.query_opt(leads_out, &[&name]).await.context("what leads out of it")? {
            None => Ok(()),
            Some(row) => bail!("{name} has {}, as a superuser", row.get::<_, &str>(0)),
        }
    }

    pub(super) async fn drop_roles(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        let roles = ROLES_OF_A_TENANT.map(|role| self.names.role(role));
        self.take_away(&cluster, &roles).await?;
        for role in roles {
            let dropped = cluster.batch_execute(&format!("DROP ROLE IF EXISTS \"{role}\"")).await;
            dropped.with_context(|| format!("dropping {role}"))?;
        }
        Ok(())
    }

    /// Takes away what other databases grant these roles: any tenant can grant them something, and so keep
    /// them.
    pub(super) async fn take_away(&self, cluster: &Client, roles: &[String]) -> Result<()> {
        let roles: Vec<_> = roles.iter().map(String::as_str).collect();
        let placement = self.cluster.placement("postgres");
        let grants =
            Grants { database: cluster, placement: &placement, provisioner: self.identity };
        grants.take_away(&roles).await
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
