//! How a tenant is removed, in the order in which nothing is left that could not be: its leases while
//! OpenBAO can still revoke them, OpenBAO's description while nobody leases, then the database and its
//! roles. Each step says what it has removed, and how that was checked, for the deletion's certificate.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, stream};
use pgsilo_core::names::{LeasedNames, Role};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::Making;
use crate::acting_role::ActingRole;

/// How long leases are revoked before somebody must look.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);
/// Leases that are revoked at once.
const AT_ONCE: usize = 8;

/// One thing that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// Nobody new is let in.
    Shut,
    /// What was leased ends.
    Leases,
    /// How credentials are made.
    LeaseRoles,
    /// OpenBAO's login at the database.
    Broker,
    /// The mount.
    Mount,
    /// The database.
    Database,
    /// Leased roles that were left behind, and the tenant's own.
    Roles,
}

impl Removal {
    pub(crate) const ALL: [Removal; 7] = [
        Removal::Shut,
        Removal::Leases,
        Removal::LeaseRoles,
        Removal::Broker,
        Removal::Mount,
        Removal::Database,
        Removal::Roles,
    ];

    /// As the journal has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Removal::Shut => "shut",
            Removal::Leases => "leases",
            Removal::LeaseRoles => "lease_roles",
            Removal::Broker => "broker",
            Removal::Mount => "mount",
            Removal::Database => "database",
            Removal::Roles => "roles",
        }
    }

    /// What is said of it.
    fn described(self) -> &'static str {
        match self {
            Removal::Shut => "shutting the database",
            Removal::Leases => "revoking what was leased",
            Removal::LeaseRoles => "removing how credentials are made",
            Removal::Broker => "removing OpenBAO's login at the database",
            Removal::Mount => "removing the mount at OpenBAO",
            Removal::Database => "dropping the database",
            Removal::Roles => "dropping the roles",
        }
    }
}

impl Making<'_> {
    /// Removes one thing, or what is left of it, and says what that was.
    pub(crate) async fn remove(&self, step: Removal) -> Result<Value> {
        let removed = match step {
            Removal::Shut => self.shut().await,
            Removal::Leases => self.revoke_leases().await,
            Removal::LeaseRoles => self.remove_lease_roles().await,
            Removal::Broker => self
                .forget_broker()
                .await
                .map(|()| self.path("config/", &[self.names.connection()])),
            Removal::Mount => self.remove_mount().await,
            Removal::Database => self.remove_database().await,
            Removal::Roles => self.remove_roles().await,
        };
        removed.context(step.described())
    }

    /// That nothing would stop it halfway.
    pub(crate) async fn ensure_removable(&self) -> Result<()> {
        let cluster = self.cluster().await?;
        self.ensure_nothing_leads_out(&cluster, &self.names.database()).await
    }

    fn path(&self, below: &str, names: &[String]) -> Value {
        let mount = self.names.mount();
        let paths: Vec<_> = names.iter().map(|name| format!("{mount}/{below}{name}")).collect();
        json!({ "openbao": paths, "checked": "OpenBAO answers that there is nothing" })
    }

    /// No role but the broker may connect from here on; and what the database was.
    async fn shut(&self) -> Result<Value> {
        let cluster = self.cluster().await?;
        let name = self.names.database();
        let facts = "SELECT d.oid, pg_database_size(d.oid), (SELECT system_identifier::text FROM pg_control_system()),
                current_setting('server_version')
            FROM pg_database d WHERE d.datname = $1";
        let Some(row) = cluster.query_opt(facts, &[&name]).await.context("what it is")? else {
            return Ok(json!({ "database": name, "was": "not there" }));
        };
        let (oid, bytes): (u32, i64) = (row.get(0), row.get(1));
        let (system, version): (String, String) = (row.get(2), row.get(3));
        let [app, login] = [Role::App, Role::Login].map(|role| self.names.role(role));
        let roles = "SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)";
        let roles: i64 = cluster.query_one(roles, &[&[&app, &login].as_slice()]).await?.get(0);
        if roles == 2 {
            let shut = format!("REVOKE ALL ON DATABASE \"{name}\" FROM \"{app}\", \"{login}\"");
            cluster.batch_execute(&shut).await?;
        }
        Ok(json!({
            "database": name, "oid": oid, "bytes": bytes, "cluster": self.cluster.name,
            "system_identifier": system, "server_version": version,
        }))
    }

    /// Revokes until OpenBAO lists none.
    async fn revoke_leases(&self) -> Result<Value> {
        let began = Instant::now();
        let mut revoked = 0;
        loop {
            let leases = self.listed_leases().await?;
            if leases.is_empty() {
                return Ok(json!({ "leases": revoked, "checked": "OpenBAO lists none" }));
            }
            let ends = stream::iter(&leases)
                .map(|lease| async move { (lease, self.bao.revoke_lease(lease).await) })
                .buffer_unordered(AT_ONCE)
                .collect::<Vec<_>>()
                .await;
            let mut failure = None;
            for (lease, ended) in ends {
                match ended {
                    Ok(()) => revoked += 1,
                    Err(error) => failure = Some((lease, error)),
                }
            }
            if let Some((lease, error)) = failure
                && began.elapsed() > PATIENCE
            {
                let id = &self.plan.id;
                return Err(anyhow::Error::from(error).context(format!(
                    "the lease {lease} cannot be revoked. See why, then run this again; if it never will be, an \
                     administrator has OpenBAO forget it (bao lease revoke -force -prefix pgsilo/{id}), and its \
                     role is dropped with the others"
                )));
            }
            ensure!(
                began.elapsed() < 2 * PATIENCE,
                "leases come as fast as they are revoked: who leases for a tenant that is being deleted?"
            );
            sleep(PAUSE).await;
        }
    }

    async fn listed_leases(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for role in self.lease_roles() {
            let below = format!("{}/creds/{role}", self.names.mount());
            let keys = self.bao.leases(&below).await?;
            all.extend(keys.into_iter().map(|key| format!("{below}/{key}")));
        }
        Ok(all)
    }

    async fn remove_lease_roles(&self) -> Result<Value> {
        self.forget_leases().await?;
        // Whoever asked for one meanwhile has it.
        self.revoke_leases().await?;
        Ok(self.path("roles/", &self.lease_roles()))
    }

    async fn remove_mount(&self) -> Result<Value> {
        let mount = self.names.mount();
        self.unmount().await?;
        ensure!(self.bao.engine(&mount).await?.is_none(), "OpenBAO still has {mount}");
        Ok(json!({ "openbao": [mount], "checked": "OpenBAO answers that there is nothing" }))
    }

    async fn remove_database(&self) -> Result<Value> {
        self.drop_database().await?;
        let name = self.names.database();
        let cluster = self.cluster().await?;
        let there = "SELECT FROM pg_database WHERE datname = $1";
        ensure!(cluster.query_opt(there, &[&name]).await?.is_none(), "{name} is still there");
        Ok(json!({
            "database": name, "method": "DROP DATABASE: its files are unlinked, and not overwritten",
            "checked": "pg_database has none of that name",
        }))
    }

    async fn remove_roles(&self) -> Result<Value> {
        let cluster = self.cluster().await?;
        let broker = self.names.role(Role::Broker);
        let leased = "SELECT r.rolname::text FROM pg_roles r JOIN pg_auth_members a ON a.roleid = r.oid AND a.admin_option
                JOIN pg_roles m ON m.oid = a.member
            WHERE m.rolname = $1 AND r.rolvaliduntil IS NOT NULL";
        let leased = cluster.query(leased, &[&broker]).await.context("its leased roles")?;
        let prefixes = self.lease_roles().map(|role| self.names.leased().prefix(&role));
        let mut dropped = Vec::new();
        for row in leased {
            let role: String = row.get(0);
            if !prefixes.iter().any(|prefix| LeasedNames::made(&role, prefix)) {
                bail!(
                    "{broker} has made a role {role}, which OpenBAO has not named: see what it is"
                );
            }
            if let Some(acting) = ActingRole::of(&cluster, &role).await? {
                acting.drop(&cluster).await?;
            }
            dropped.push(role);
        }
        self.drop_roles().await?;
        dropped.extend(super::database::ROLES_OF_A_TENANT.map(|role| self.names.role(role)));
        let left = "SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)";
        let left: i64 = cluster.query_one(left, &[&dropped]).await?.get(0);
        ensure!(left == 0, "{left} of its roles are still there");
        Ok(json!({ "roles": dropped, "checked": "pg_roles has none of them" }))
    }
}
