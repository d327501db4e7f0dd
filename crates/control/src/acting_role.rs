//! How the provisioner does what only another role may: it becomes that role, and gives that up
//! again.
//!
//! PostgreSQL lets only its maker drop a role, and only the grantor revoke a grant. The provisioner
//! has made the tenants' roles and brokers, and brokers the leased roles: so it has ADMIN on each
//! of them, or on who has it. Nothing else of the control plane becomes another role, and
//! afterwards the provisioner is no longer a member of it (but for ADMIN, which it has anyway).

use anyhow::{Context, Result, bail};
use tokio_postgres::Client;

use crate::revocation;

/// A role, and who may give it away.
#[derive(Debug)]
pub(crate) struct ActingRole {
    /// As it is written in a statement.
    role: String,
    /// The same, if it is not the provisioner itself.
    maker: Option<String>,
    /// The provisioner: whoever has logged in may be one that OpenBAO has made, and become it.
    provisioner: String,
}

impl ActingRole {
    /// Finds out who may give a role away; `None` when there is no such role.
    ///
    /// # Errors
    /// When only a superuser may.
    pub(crate) async fn of(database: &Client, role: &str) -> Result<Option<Self>> {
        let query = "SELECT pg_catalog.quote_ident(r.rolname), pg_catalog.quote_ident(m.rolname),
                m.rolname = current_user, pg_catalog.quote_ident(current_user)
            FROM pg_catalog.pg_roles r
            LEFT JOIN pg_catalog.pg_auth_members am ON am.roleid = r.oid AND am.admin_option
            LEFT JOIN pg_catalog.pg_roles m ON m.oid = am.member
            WHERE r.rolname = $1
            ORDER BY m.rolname = current_user DESC";
        let rows = database.query(query, &[&role]).await.context("who made the role")?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (role, maker): (String, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
        let Some(maker) = maker else {
            bail!("only a superuser has {role}: before PostgreSQL 16 its maker has it not");
        };
        let (own, provisioner): (bool, String) = (row.try_get(2)?, row.try_get(3)?);
        Ok(Some(Self { role, maker: (!own).then_some(maker), provisioner }))
    }

    /// Runs statements as the role, in one transaction.
    pub(crate) async fn run(&self, database: &Client, statements: &str) -> Result<()> {
        let Self { role, provisioner, .. } = self;
        let grant =
            self.by_maker(&format!("GRANT {role} TO {provisioner} WITH INHERIT FALSE, SET TRUE"));
        let revoke = self.by_maker(&format!("REVOKE {role} FROM {provisioner}"));
        let whole = format!("{grant}; SET LOCAL ROLE {role}; {statements}; RESET ROLE; {revoke}");
        in_one(database, &whole).await.with_context(|| format!("as {role}"))
    }

    /// Runs statements with the role's privileges, in one transaction.
    pub(crate) async fn run_beside(&self, database: &Client, statements: &str) -> Result<()> {
        let whole = self.beside(statements);
        let role = &self.role;
        in_one(database, &whole).await.with_context(|| format!("with the privileges of {role}"))
    }

    /// Statements that run some with the role's privileges, as a part of a transaction.
    pub(crate) fn beside(&self, statements: &str) -> String {
        let Self { role, provisioner, .. } = self;
        let grant =
            self.by_maker(&format!("GRANT {role} TO {provisioner} WITH INHERIT TRUE, SET FALSE"));
        let revoke = self.by_maker(&format!("REVOKE {role} FROM {provisioner}"));
        format!("{grant}; {statements}; {revoke}")
    }

    /// Runs one statement as the role that can be no part of a transaction.
    pub(crate) async fn run_alone(&self, database: &Client, statement: &str) -> Result<()> {
        let Self { role, provisioner, .. } = self;
        let grant =
            self.by_maker(&format!("GRANT {role} TO {provisioner} WITH INHERIT FALSE, SET TRUE"));
        let revoke = self.by_maker(&format!("REVOKE {role} FROM {provisioner}"));
        in_one(database, &grant).await?;
        let outcome = async {
            database.batch_execute(&format!("SET ROLE {role}")).await?;
            database.batch_execute(statement).await
        };
        let outcome = outcome.await.with_context(|| format!("as {role}"));
        let given_up = async {
            database.batch_execute("RESET ROLE").await.context("giving it up")?;
            in_one(database, &revoke).await
        };
        outcome.and(given_up.await)
    }

    /// Gives the role another password, of which the server is told a SCRAM verifier only.
    pub(crate) async fn set_password(&self, database: &Client, verifier: &str) -> Result<()> {
        let set = self.by_maker(&format!("ALTER ROLE {} PASSWORD '{verifier}'", self.role));
        in_one(database, &set).await.with_context(|| format!("a new password for {}", self.role))
    }

    /// Drops the role, which nothing depends on any more, as who may.
    pub(crate) async fn drop(&self, database: &Client) -> Result<()> {
        let drop = self.by_maker(&format!("DROP ROLE IF EXISTS {}", self.role));
        in_one(database, &drop).await.with_context(|| format!("dropping {}", self.role))
    }

    /// Ends the use of a leased role, and drops it if nothing objects, as its maker.
    pub(crate) async fn revoke(&self, database: &Client, name: &str) -> Result<()> {
        let Some(maker) = &self.maker else { return revocation::run(database, name).await };
        let provisioner = &self.provisioner;
        // Not in one transaction: that statement has several of its own.
        let become_it = format!(
            "GRANT {maker} TO {provisioner} WITH INHERIT FALSE, SET TRUE; SET ROLE {maker}"
        );
        let revoked = match database.batch_execute(&become_it).await {
            Ok(()) => revocation::run(database, name).await,
            Err(error) => Err(error.into()),
        };
        let give_up = format!("RESET ROLE; REVOKE {maker} FROM {provisioner}");
        let given_up = database.batch_execute(&give_up).await.context("giving it up");
        revoked.and(given_up).with_context(|| format!("as {maker}, who made it"))
    }

    /// The role, as it is written in a statement.
    pub(crate) fn name(&self) -> &str {
        &self.role
    }

    fn by_maker(&self, statement: &str) -> String {
        let provisioner = &self.provisioner;
        match &self.maker {
            None => statement.to_owned(),
            Some(maker) => format!(
                "GRANT {maker} TO {provisioner} WITH INHERIT FALSE, SET TRUE; \
                 SET LOCAL ROLE {maker}; {statement}; RESET ROLE; \
                 REVOKE {maker} FROM {provisioner}"
            ),
        }
    }
}

/// Commits all of it or nothing.
async fn in_one(database: &Client, statements: &str) -> Result<()> {
    let whole = format!("BEGIN; SET LOCAL lock_timeout = '5s'; {statements}; COMMIT");
    if let Err(error) = database.batch_execute(&whole).await {
        let _best_effort = database.batch_execute("ROLLBACK").await;
        return Err(error.into());
    }
    Ok(())
}
