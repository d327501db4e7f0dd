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
    /// Removes one thing, or what is left of it, and says what that was. `evidence` is what was said before.
    pub(crate) async fn remove(&self, step: Removal, evidence: &Value) -> Result<Value> {
        let removed = match step {
            Removal::Shut => self.shut().await,
            Removal::Leases => self.revoke_leases().await.map(leases_revoked),
            Removal::LeaseRoles => self.remove_lease_roles().await,
            Removal::Broker => self
                .forget_broker()
                .await
                .map(|()| self.path("config/", &[self.names.connection()])),
            Removal::Mount => self.remove_mount().await,
            Removal::Database => self.remove_database(&evidence[Removal::Shut.name()]).await,
            Removal::Roles => self.remove_roles().await,
        };
        removed.context(step.described())
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
        self.ensure_this_tenants().await?;
        let found = self.found(&cluster).await?.context("it has just gone")?;
        let facts = "SELECT pg_database_size($1::oid), current_setting('server_version')";
        let row = cluster.query_one(facts, &[&found.oid]).await.context("how much it is")?;
        let (bytes, version): (i64, String) = (row.get(0), row.get(1));
        let [app, login] = [Role::App, Role::Login].map(|role| self.names.role(role));
        let shut = format!("REVOKE ALL ON DATABASE \"{name}\" FROM \"{app}\", \"{login}\"");
        cluster.batch_execute(&shut).await?;
        Ok(json!({
            "database": name, "oid": found.oid, "bytes": bytes, "cluster": self.cluster.name,
            "system_identifier": found.system_identifier, "server_version": version,
        }))
    }

    /// Revokes until OpenBAO lists none; how many that were.
    async fn revoke_leases(&self) -> Result<u64> {
        let began = Instant::now();
        let mut revoked = 0;
        loop {
            let leases = self.listed_leases().await?;
            if leases.is_empty() {
                return Ok(revoked);
            }
            ensure!(
                began.elapsed() < 2 * PATIENCE || revoked == 0,
                "leases come as fast as they are revoked: who leases for a tenant that is being deleted?"
            );
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
        let revoked = self.revoke_leases().await?;
        let mut removed = self.path("roles/", &self.lease_roles());
        removed["leases_made_meanwhile"] = json!(revoked);
        Ok(removed)
    }

    async fn remove_mount(&self) -> Result<Value> {
        let mount = self.names.mount();
        self.unmount().await?;
        ensure!(self.bao.engine(&mount).await?.is_none(), "OpenBAO still has {mount}");
        Ok(json!({ "openbao": [mount], "checked": "OpenBAO answers that there is nothing" }))
    }

    async fn remove_database(&self, shut: &Value) -> Result<Value> {
        let oid = shut["oid"].as_u64().and_then(|oid| u32::try_from(oid).ok());
        let expected = oid.zip(shut["system_identifier"].as_str());
        let expected = expected.context("the journal does not say which database it was")?;
        self.drop_database(Some(expected)).await?;
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
        let mut dropped: Vec<String> = leased.iter().map(|row| row.get(0)).collect();
        self.take_away(&cluster, &dropped).await?;
        for role in &dropped {
            if !prefixes.iter().any(|prefix| LeasedNames::made(role, prefix)) {
                bail!(
                    "{broker} has made a role {role}, which OpenBAO has not named: see what it is"
                );
            }
            if let Some(acting) = ActingRole::of(&cluster, role).await? {
                acting.drop(&cluster).await?;
            }
        }
        self.drop_roles().await?;
        dropped.extend(super::database::ROLES_OF_A_TENANT.map(|role| self.names.role(role)));
        let left = "SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)";
        let left: i64 = cluster.query_one(left, &[&dropped]).await?.get(0);
        ensure!(left == 0, "{left} of its roles are still there");
        Ok(json!({ "roles": dropped, "checked": "pg_roles has none of them" }))
    }
}

fn leases_revoked(number: u64) -> Value {
    json!({ "leases": number, "checked": "OpenBAO lists none" })
}
