//! What a tenant has at OpenBAO: a mount of its own, a connection, and a role for each access.

use anyhow::{Result, bail, ensure};
use pgsilo_core::names::Role;
use pgsilo_core::secret::Secret;
use pgsilo_openbao::requests::SetRoleRequest;
use serde_json::{Value, json};

use super::Making;
use super::plan::LeaseHashing;
use crate::bao::{self, again, is_same};
use crate::revocation;

/// How OpenBAO makes a leased role.
const CREATE: &str = include_str!("../../../../docker/openbao/create.sql");

/// For each access, its part of the role's name, and which of the tenant's roles it works as. Read-write
/// and migrate have the same rights: an application that may not make its own tables would not run
/// unchanged. Two names let an operator count, bound and withdraw migrations apart.
const LEASED: [(&str, &str); 3] = [("rw", "app"), ("ro", "ro"), ("migrate", "app")];

impl Making<'_> {
    pub(super) fn lease_roles(&self) -> [String; LEASED.len()] {
        LEASED.map(|(kind, _)| self.names.lease_role(kind))
    }

    /// That OpenBAO has nothing of it yet.
    pub(crate) async fn ensure_no_mount(&self) -> Result<()> {
        let mount = self.names.mount();
        if let Some(kind) = self.bao.engine(&mount).await? {
            bail!(
                "OpenBAO has an engine of type {kind:?} at {mount} already, and no journal says what it is"
            );
        }
        Ok(())
    }

    pub(super) async fn mount(&self) -> Result<()> {
        let mount = self.names.mount();
        match self.bao.engine(&mount).await?.as_deref() {
            None => again(async || self.bao.mount_engine(&mount, "database").await).await,
            Some("database") => Ok(()),
            Some(other) => bail!("at {mount} OpenBAO has an engine of type {other:?}"),
        }
    }

    pub(super) async fn unmount(&self) -> Result<()> {
        let mount = self.names.mount();
        match self.bao.engine(&mount).await? {
            None => Ok(()),
            Some(_) => again(async || self.bao.unmount(&mount).await).await,
        }
    }

    /// The connection's description, without the password.
    fn connection(&self) -> Result<Value> {
        let mut description = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": self.cluster.connection_url(&self.names.database())?,
            "username": self.names.role(Role::Broker),
            "allowed_roles": self.lease_roles(),
            "username_template": self.names.leased().template(),
            "password_authentication": match self.plan.lease_hashing {
                // The password itself never stands in an SQL text, so it cannot reach the server's log.
                LeaseHashing::Openbao => "scram-sha-256",
                LeaseHashing::Postgres => "password",
            },
            "max_open_connections": 4,
            // Without, OpenBAO keeps a connection to each tenant's database for ever.
            "max_connection_lifetime": "5m",
        });
        if let Some(ca) = self.cluster.tls_ca() {
            description["tls_ca"] = json!(ca);
        }
        Ok(description)
    }

    pub(super) async fn describe_broker(&self) -> Result<()> {
        let (mount, connection) = (self.names.mount(), self.names.connection());
        let description = self.connection()?;
        let password = Secret::random()?;
        self.set_broker_password(&password).await?;
        bao::describe(self.bao, (&mount, &connection), &description, &password).await
    }

    pub(super) async fn forget_broker(&self) -> Result<()> {
        bao::forget(self.bao, &self.names.mount(), &self.names.connection()).await
    }

    pub(super) async fn describe_leases(&self) -> Result<()> {
        let described = self.lease_roles().into_iter().zip(LEASED).map(|(name, (_, works_as))| {
            let request = SetRoleRequest { name, ..self.lease_statements(works_as) };
            async move { again(async || self.bao.run(&request).await).await }
        });
        futures_util::future::try_join_all(described).await.map(drop)
    }

    pub(super) async fn forget_leases(&self) -> Result<()> {
        let mount = self.names.mount();
        for role in self.lease_roles() {
            if self.bao.database_role(&mount, &role).await?.is_some() {
                again(async || self.bao.delete_database_role(&mount, &role).await).await?;
                let left = self.bao.database_role(&mount, &role).await?;
                ensure!(left.is_none(), "OpenBAO still has {mount}/roles/{role}");
            }
        }
        Ok(())
    }

    /// How OpenBAO makes and unmakes a leased role that works as the tenant's role of that kind, `app`
    /// or `ro`.
    ///
    /// The leased role owns nothing: all it makes belongs to that role, which it becomes at login
    /// and comes back to at DISCARD ALL, RESET ROLE and SET SESSION AUTHORIZATION DEFAULT. The
    /// broker is a member of it, because only a member may end its sessions, and may become it, because
    /// that tells its logins from all others (see `drop.sql`); without that, a live session would go on
    /// working as that role after its own is gone.
    fn lease_statements(&self, kind: &str) -> SetRoleRequest {
        SetRoleRequest {
            mount: self.names.mount(),
            db_name: self.names.connection(),
            default_ttl: Some("1h".to_owned()),
            max_ttl: Some("24h".to_owned()),
            creation_statements: Some(vec![self.fill_in(CREATE).replace("KIND", kind)]),
            revocation_statements: Some(revocation::STATEMENTS.map(str::to_owned).to_vec()),
            ..SetRoleRequest::default()
        }
    }

    /// Whether passwords are in statements, and PostgreSQL makes the verifiers.
    pub(super) async fn hashes_in_postgres(&self) -> Result<bool> {
        let (mount, connection) = (self.names.mount(), self.names.connection());
        let found = self.bao.database_config(&mount, &connection).await?;
        let how = found
            .as_ref()
            .and_then(|found| found.connection_details.get("password_authentication"));
        Ok(how.and_then(Value::as_str) == Some("password"))
    }

    /// Whether OpenBAO's login is described as it should be, whatever its password.
    pub(super) async fn is_described(&self) -> Result<bool> {
        Ok(self.wrong_with_connection().await?.is_none())
    }

    async fn wrong_with_connection(&self) -> Result<Option<String>> {
        let (mount, connection) = (self.names.mount(), self.names.connection());
        let Some(found) = self.bao.database_config(&mount, &connection).await? else {
            return Ok(Some(format!("OpenBAO has no {mount}/config/{connection}")));
        };
        let expected = self.connection()?;
        let keys = [
            "connection_url",
            "username",
            "username_template",
            "password_authentication",
            "tls_ca",
        ];
        let differs = keys.into_iter().find(|key| !bao::tells(&found, key, expected.get(*key)));
        Ok(differs.map(|key| format!("{mount}/config/{connection} has another {key}")))
    }

    pub(super) async fn verify_leasing(&self) -> Result<Vec<String>> {
        let mount = self.names.mount();
        let mut wrong: Vec<_> = self.wrong_with_connection().await?.into_iter().collect();
        for (role, (_, works_as)) in self.lease_roles().into_iter().zip(LEASED) {
            let expected = self.lease_statements(works_as);
            match self.bao.database_role(&mount, &role).await? {
                None => wrong.push(format!("OpenBAO has no {mount}/roles/{role}")),
                Some(found)
                    if !is_same(
                        &found.creation_statements,
                        &expected.creation_statements.unwrap_or_default(),
                    ) || !is_same(&found.revocation_statements, &revocation::STATEMENTS) =>
                {
                    wrong.push(format!(
                        "{mount}/roles/{role} makes or ends credentials in another way"
                    ));
                }
                Some(_) => {}
            }
        }
        Ok(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openbao_cuts_the_statements_at_each_semicolon() {
        assert_eq!(CREATE.matches(';').count(), CREATE.lines().count());
    }
}
