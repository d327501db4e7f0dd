//! Removes what should be gone: leases by OpenBAO, roles that no lease reaches as
//! the one who made them, and what keeps those from being dropped.

use anyhow::{Context, Result, bail, ensure};
use pgsilo_core::registry::Placement;
use pgsilo_openbao::Client as Bao;
use tokio::sync::Mutex;
use tokio_postgres::Client;

use super::grants::Grants;
use super::verdict::{ClusterFinding, Finding};
use crate::acting_role::ActingRole;
use crate::postgres::Identity;

/// How often a role is tried whose large objects grow fewer: each time takes two seconds' worth.
const PORTIONS: usize = 200;

/// A placement's cluster, and OpenBAO, as the provisioner.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mender<'a> {
    pub(super) database: &'a Client,
    pub(super) placement: &'a Placement,
    pub(super) provisioner: &'a Identity,
    pub(super) bao: &'a Bao,
    /// While it revokes grants, the provisioner is a member of other tenants' roles.
    pub(super) alone: &'a Mutex<()>,
}

impl Mender<'_> {
    /// Mends one finding; whether there was anything to be done. What is doubtful is left alone,
    /// and what an operator must do.
    pub(super) async fn mend(&self, finding: &Finding) -> Result<bool> {
        match finding {
            Finding::OrphanRole(role) => self.drop_role(&role.name, Sessions::End).await?,
            Finding::StoppedRole(role) => self.drop_role(&role.name, Sessions::End).await?,
            Finding::IdleRoles { roles, leases, exact } => {
                if *exact {
                    for lease in leases {
                        self.revoke(&lease.id).await?;
                    }
                }
                for role in roles {
                    self.drop_role(&role.name, Sessions::Spare).await?;
                }
            }
            Finding::RolelessLease(lease)
            | Finding::OverdueLease(lease)
            | Finding::IrrevocableLease(lease) => self.revoke(&lease.id).await?,
            Finding::Cluster(finding) => return self.mend_cluster(finding).await,
            Finding::Doubtful { .. }
            | Finding::Surplus { .. }
            | Finding::Undecided { .. }
            | Finding::UnknownToOpenBao { .. } => return Ok(false),
        }
        Ok(true)
    }

    async fn mend_cluster(&self, finding: &ClusterFinding) -> Result<bool> {
        match finding {
            ClusterFinding::RolelessSession { pid, role, .. } => {
                self.end_session(*pid, *role).await
            }
            ClusterFinding::PreparedTransaction { name, owner, database } => {
                self.roll_back(name, owner, database).await?;
                Ok(true)
            }
            ClusterFinding::PreparedAllowed { .. } => Ok(false),
            ClusterFinding::RemovedTenant { roles, .. } => {
                self.ensure_nothing_is_owned(roles).await?;
                for role in roles {
                    self.drop_group_role(role).await?;
                }
                Ok(true)
            }
        }
    }

    /// OpenBAO's word that it is gone, or why it is not. One that is gone already is no failure.
    async fn revoke(&self, lease: &str) -> Result<()> {
        if self.bao.lease(lease).await?.is_none() {
            return Ok(());
        }
        if let Err(failure) = self.bao.revoke_lease(lease).await {
            let other_password = failure.to_string().contains("SQLSTATE 28P01");
            let error = anyhow::Error::from(failure);
            return Err(match other_password {
                true => error.context(
                    "OpenBAO and PostgreSQL know different passwords of the broker: \
                     --new-broker-passwords gives it one that both know",
                ),
                false => error,
            });
        }
        Ok(())
    }

    /// Ends the role's use and drops it, with all that was made as it and all that it was granted.
    async fn drop_role(&self, role: &str, sessions: Sessions) -> Result<()> {
        let Some(acting) = ActingRole::of(self.database, role).await? else { return Ok(()) };
        if sessions == Sessions::Spare {
            let in_use = "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usename = $1";
            let in_use: i64 = self.database.query_one(in_use, &[&role]).await?.try_get(0)?;
            ensure!(in_use == 0, "somebody has logged in as {role}");
        }
        let mut owned = i64::MAX;
        for _ in 0..PORTIONS {
            acting.revoke(self.database, role).await?;
            let Some(left) = self.owned_by(role).await? else { return Ok(()) };
            if left == 0 || left >= owned {
                break;
            }
            owned = left;
        }
        self.take_away(&[role]).await?;
        acting.revoke(self.database, role).await?;
        match self.owned_by(role).await? {
            None => Ok(()),
            Some(_) => bail!("it stays, and nobody can log in: {}", self.why_it_stays(role).await?),
        }
    }

    /// How many objects a role owns; `None` when it is gone.
    async fn owned_by(&self, role: &str) -> Result<Option<i64>> {
        let query = "SELECT (SELECT count(*) FROM pg_catalog.pg_shdepend s
                WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
                    AND s.refobjid = r.oid AND s.deptype = 'o')
            FROM pg_catalog.pg_roles r WHERE r.rolname = $1";
        let row = self.database.query_opt(query, &[&role]).await.context("is it gone")?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    async fn why_it_stays(&self, role: &str) -> Result<String> {
        let query = "SELECT (SELECT count(*) FROM pg_catalog.pg_stat_activity a
                WHERE a.usesysid = r.oid),
            ARRAY(SELECT coalesce(d.datname, 'all of them') || ': ' || count(*)
                FROM pg_catalog.pg_shdepend s LEFT JOIN pg_catalog.pg_database d ON d.oid = s.dbid
                WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
                    AND s.refobjid = r.oid GROUP BY d.datname)
            FROM pg_catalog.pg_roles r WHERE r.rolname = $1";
        let Some(row) = self.database.query_opt(query, &[&role]).await? else {
            return Ok("it has just gone".to_owned());
        };
        let (sessions, objects): (i64, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
        Ok(match (sessions, objects.is_empty()) {
            (1.., _) => format!("{sessions} of its sessions do not end"),
            (_, false) => format!(
                "objects depend on it that are too many (a superuser drops them), or that somebody \
                 holds a lock on ({})",
                objects.join(", ")
            ),
            (_, true) => {
                "logins are under way, or somebody holds a lock on it; try again in a minute".into()
            }
        })
    }

    /// Whether it may: `pg_signal_backend` may, and a superuser, as no other role has such a role's
    /// privileges.
    async fn end_session(&self, pid: i32, role: u32) -> Result<bool> {
        let may = "SELECT pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')";
        if !self.database.query_one(may, &[]).await?.try_get::<_, bool>(0)? {
            return Ok(false);
        }
        // Its process may be another's by now.
        let end = "SELECT pg_catalog.pg_terminate_backend(a.pid, 5000)
            FROM pg_catalog.pg_stat_activity a
            LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid
            WHERE a.pid = $1 AND a.usesysid = $2 AND r.oid IS NULL";
        let row = self.database.query_opt(end, &[&pid, &role]).await.context("ending it")?;
        let ended = row.map_or(Ok(true), |row| row.try_get(0))?;
        ensure!(ended, "it does not end");
        Ok(true)
    }

    /// As its owner, in its database: only it and a superuser may.
    async fn roll_back(&self, name: &str, owner: &str, dbname: &str) -> Result<()> {
        let there = self.placement.beside(dbname);
        let database = self.provisioner.connect(&there).await?;
        let known = "SELECT pg_catalog.quote_literal(gid) FROM pg_catalog.pg_prepared_xacts
            WHERE gid = $1";
        let Some(row) = database.query_opt(known, &[&name]).await? else { return Ok(()) };
        let literal: String = row.try_get(0)?;
        let acting = ActingRole::of(&database, owner).await?;
        let acting = acting.with_context(|| {
            format!("only a superuser may roll it back: its owner is gone; in database {dbname}: ROLLBACK PREPARED {literal}")
        })?;
        acting.run_alone(&database, &format!("ROLLBACK PREPARED {literal}")).await
    }

    /// A role of a tenant that was removed: it has no sessions and no database.
    async fn drop_group_role(&self, role: &str) -> Result<()> {
        let Some(acting) = ActingRole::of(self.database, role).await? else { return Ok(()) };
        let leased = "SELECT r.rolname::text FROM pg_catalog.pg_roles r
            JOIN pg_catalog.pg_auth_members am ON am.roleid = r.oid AND am.admin_option
            JOIN pg_catalog.pg_roles m ON m.oid = am.member
            WHERE m.rolname = $1 AND r.rolvaliduntil IS NOT NULL";
        for row in self.database.query(leased, &[&role]).await.context("its leased roles")? {
            self.drop_role(row.try_get(0)?, Sessions::End).await?;
        }
        self.take_away(&[role]).await?;
        acting.drop(self.database).await
    }

    /// What a removed tenant's roles still own is a copy of its data that somebody has kept: a
    /// database that was renamed, or restored under another name.
    async fn ensure_nothing_is_owned(&self, roles: &[String]) -> Result<()> {
        let query = "SELECT DISTINCT coalesce(d.datname::text, s.objid::text)
            FROM pg_catalog.pg_shdepend s
            JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
            LEFT JOIN pg_catalog.pg_database d ON d.oid IN (s.dbid, s.objid)
            WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
                AND s.deptype = 'o' AND r.rolname = ANY ($1)";
        let owned = self.database.query(query, &[&roles]).await.context("what they own")?;
        let owned: Vec<String> =
            owned.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        ensure!(
            owned.is_empty(),
            "they own what is in {}: drop it, or if it is wanted, DROP SCHEMA pgsilo CASCADE, REASSIGN OWNED and DROP OWNED there",
            owned.join(", ")
        );
        Ok(())
    }

    /// Takes away what all of some roles are granted, so that each can be dropped.
    pub(super) async fn take_away(&self, roles: &[&str]) -> Result<()> {
        let Mender { database, placement, provisioner, .. } = *self;
        let _alone = self.alone.lock().await;
        Grants { database, placement, provisioner }.take_away(roles).await
    }
}

/// What becomes of those who are logged in as a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sessions {
    /// They have no lease: they end.
    End,
    /// There were none: if there are now, the role stays.
    Spare,
}
