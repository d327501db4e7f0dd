//! Logins that OpenBAO makes at a database of pgsilo's own: the provisioner's, the monitor's, the registry's.

use anyhow::{Result, bail};
use pgsilo_core::secret::Secret;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::SetRoleRequest;
use serde_json::json;
use tokio_postgres::Client;

use super::Doing;
use crate::bao::{self, again, is_same};
use crate::cluster::KnownCluster;
use crate::{revocation, say};

/// A member of a role, which may become it.
const LOGIN: &str = include_str!("../../../../docker/openbao/login.sql");
/// One that is the provisioner.
const PROVISIONER_LOGIN: &str = include_str!("../../../../docker/openbao/provisioner-login.sql");
/// Who uses one renews it.
const TTL: &str = "15m";
const MAX_TTL: &str = "24h";

/// How logins of a kind are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind<'a> {
    /// OpenBAO's role.
    pub(super) role: &'a str,
    /// In PostgreSQL: what they are members of.
    pub(super) group: &'a str,
    /// How long one lives that nobody renews.
    pub(super) ttl: &'a str,
}

/// Where OpenBAO makes them, and as whom.
#[derive(Debug)]
pub(super) struct Maker<'a> {
    pub(super) bao: &'a Bao,
    pub(super) mount: &'a str,
    /// The connection's name there.
    pub(super) connection: &'a str,
    pub(super) cluster: &'a KnownCluster,
    pub(super) dbname: &'a str,
    /// A role that may make them, whose password becomes OpenBAO's.
    pub(super) broker: &'a str,
}

impl<'a> Kind<'a> {
    pub(super) fn of(role: &'a str, group: &'a str) -> Kind<'a> {
        Kind { role, group, ttl: TTL }
    }

    fn statements(&self) -> String {
        match self.group {
            "pgsilo_provisioner" => PROVISIONER_LOGIN.to_owned(),
            group => LOGIN.replace("GROUP", group),
        }
    }
}

impl Maker<'_> {
    /// Describes the database and the logins, where that is not so. `postgres` is an administrator's
    /// connection, for the broker's password.
    pub(super) async fn describe(
        &self,
        doing: &mut Doing,
        postgres: &Client,
        kinds: &[Kind<'_>],
    ) -> Result<()> {
        let Maker { bao, mount, connection, .. } = *self;
        ensure_engine(doing, bao, mount, "database").await?;
        let allowed: Vec<_> = kinds.iter().map(|kind| kind.role).collect();
        let mut description = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": self.cluster.connection_url(self.dbname)?,
            "username": self.broker,
            "username_template": format!("{}-{{{{ random 20 }}}}", self.broker.trim_end_matches("_broker")),
            "password_authentication": "scram-sha-256",
            "allowed_roles": allowed,
            "max_open_connections": 4,
            "max_connection_lifetime": "5m",
        });
        if let Some(ca) = self.cluster.tls_ca() {
            description["tls_ca"] = json!(ca);
        }
        let there = bao.database_config(mount, connection).await?;
        let is_so = there.as_ref().is_some_and(|found| {
            let expected = description.as_object().into_iter().flatten();
            // OpenBAO writes times in its own way.
            expected
                .filter(|(key, _)| !key.ends_with("_lifetime"))
                .all(|(key, value)| bao::tells(found, key, Some(value)))
        });
        // A server that was made anew, or restored, knows another password of the broker than OpenBAO.
        let is_so = is_so && self.works(kinds).await?;
        let what = format!(
            "OpenBAO logs in as {} at {mount}/config/{connection}, with a password that it alone knows",
            self.broker
        );
        doing
            .ensure(what, is_so, async {
                let password = Secret::random()?;
                let verifier = postgres_protocol::password::scram_sha_256(password.expose());
                let set = format!("ALTER ROLE \"{}\" PASSWORD '{verifier}'", self.broker);
                postgres.batch_execute(&set).await?;
                bao::describe(bao, (mount, connection), &description, &password).await
            })
            .await?;
        for kind in kinds {
            let creation = kind.statements();
            let there = bao.database_role(mount, kind.role).await?;
            let is_so = there.is_some_and(|found| {
                found.db_name == connection
                    && is_same(&found.creation_statements, &[&creation])
                    && is_same(&found.revocation_statements, &revocation::OF_LOGINS)
            });
            let what =
                format!("credentials of {mount}/roles/{} are members of {}", kind.role, kind.group);
            doing
                .ensure(what, is_so, async {
                    let request = SetRoleRequest {
                        mount: mount.to_owned(),
                        name: kind.role.to_owned(),
                        db_name: connection.to_owned(),
                        default_ttl: Some(kind.ttl.to_owned()),
                        max_ttl: Some(MAX_TTL.to_owned()),
                        creation_statements: Some(vec![creation.clone()]),
                        revocation_statements: Some(
                            revocation::OF_LOGINS.map(str::to_owned).to_vec(),
                        ),
                        ..SetRoleRequest::default()
                    };
                    again(async || bao.run(&request).await).await
                })
                .await?;
        }
        Ok(())
    }
}

impl Maker<'_> {
    /// Whether OpenBAO makes a login, which is given back.
    async fn works(&self, kinds: &[Kind<'_>]) -> Result<bool> {
        let Some(kind) = kinds.first() else { return Ok(true) };
        if self.bao.database_role(self.mount, kind.role).await?.is_none() {
            return Ok(true);
        }
        match self.bao.credential(self.mount, kind.role).await {
            Ok(made) => self.bao.revoke_own_lease(&made.lease_id).await?,
            Err(error) => {
                say::progress(&format!(
                    "no login is made by {}/{}: {error}",
                    self.mount, kind.role
                ));
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Mounts an engine, unless it is there.
pub(super) async fn ensure_engine(
    doing: &mut Doing,
    bao: &Bao,
    path: &str,
    kind: &str,
) -> Result<()> {
    let there = bao.engine(path).await?;
    if let Some(other) = there.as_deref().filter(|there| *there != kind) {
        bail!("at {path} OpenBAO has an engine of type {other:?}, and not {kind:?}");
    }
    let what = format!("the engine {kind} is mounted at {path}");
    doing
        .ensure(what, there.is_some(), async {
            again(async || bao.mount_engine(path, kind).await).await
        })
        .await
}
