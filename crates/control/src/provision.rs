//! Makes a tenant, and takes it back: its database, its roles, its seal, and what OpenBAO needs to lease
//! for it.
//!
//! All of it is done as the *provisioner*: a PostgreSQL role with CREATEDB and CREATEROLE and
//! never superuser, and an OpenBAO token that can describe credentials and read none of a tenant's. It
//! needs PostgreSQL 16 or newer, where CREATEROLE reaches only the roles one has made. Every step may
//! be repeated, so what was cut short is finished by doing it again. What a superuser has to do, once
//! for each cluster, is [`bootstrap`](crate::bootstrap)'s.
//!
//! Per tenant `x`, which PostgreSQL calls `n`:
//!
//! | name | what |
//! |---|---|
//! | database `tenant_n` | owned by the provisioner, so that the tenant cannot break the seal; closed to PUBLIC |
//! | `tenant_n_app` | NOLOGIN, owns schema `public` and everything the tenant makes |
//! | `tenant_n_ro` | NOLOGIN, may SELECT what `tenant_n_app` makes |
//! | `tenant_n_login` | NOLOGIN, may connect, nothing else: every leased role is in it |
//! | `tenant_n_broker` | what OpenBAO logs in as: makes and drops leased roles of this tenant only |
//! | schema `pgsilo` | the provisioner's; functions by which sessions see, cancel and end their tenant's own |
//! | OpenBAO `pgsilo/x` | a mount of its own: the connection, and a role for each access |
//!
//! | module | what |
//! |---|---|
//! | [`plan`] | what a tenant is to be |
//! | `journal` | what was begun and has not ended, in the registry |
//! | `database` | the steps at PostgreSQL |
//! | `leasing` | the steps at OpenBAO |
//! | `removal` | how a tenant is removed |

mod database;
pub(crate) mod journal;
mod leasing;
pub mod plan;
pub(crate) mod removal;

use anyhow::{Context, Result};
use pgsilo_core::names::Names;
use pgsilo_openbao::Client as Bao;

use crate::cluster::KnownCluster;
use crate::postgres::Identity;
use plan::Plan;

/// What tenants' databases are made from; `docker/postgresql/template.sql` makes it what it is.
pub const TEMPLATE: &str = "pgsilo_template";

/// One thing that is made, and can be taken back. In the order in which a tenant is made, but for the
/// registry's rows, which come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// An empty database, which nobody may connect to.
    Database,
    /// The tenant's roles.
    Roles,
    /// What is in the database.
    Contents,
    /// The seal, who may connect, how often, and what may be used.
    Opening,
    /// A database engine of its own.
    Mount,
    /// OpenBAO's login there, with a password that it alone knows.
    Broker,
    /// How credentials are made.
    Leases,
}

impl Step {
    /// Of a tenant.
    pub(crate) const ALL: [Step; 7] = [
        Step::Database,
        Step::Roles,
        Step::Contents,
        Step::Opening,
        Step::Mount,
        Step::Broker,
        Step::Leases,
    ];
    /// Of a database that is nobody's yet.
    pub(crate) const PREPARED: [Step; 3] = [Step::Database, Step::Roles, Step::Contents];
    /// In which they are taken back: what is leased first, and roles when what they own is gone.
    pub(crate) const BACK: [Step; 5] =
        [Step::Leases, Step::Broker, Step::Mount, Step::Database, Step::Roles];

    /// As the journal has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Step::Database => "database",
            Step::Roles => "roles",
            Step::Contents => "contents",
            Step::Opening => "opening",
            Step::Mount => "mount",
            Step::Broker => "broker",
            Step::Leases => "leases",
        }
    }

    /// What is said of it.
    fn described(self) -> &'static str {
        match self {
            Step::Database => "the database",
            Step::Roles => "its roles",
            Step::Contents => "what is in the database",
            Step::Opening => "the seal, and who may connect",
            Step::Mount => "its mount at OpenBAO",
            Step::Broker => "OpenBAO's login at the database",
            Step::Leases => "how credentials are made",
        }
    }
}

/// One tenant that is being made, or taken back, and by whom.
#[derive(Debug)]
pub(crate) struct Making<'a> {
    plan: &'a Plan,
    names: Names,
    cluster: &'a KnownCluster,
    identity: &'a Identity,
    bao: &'a Bao,
}

impl<'a> Making<'a> {
    pub(crate) fn of(
        plan: &'a Plan,
        cluster: &'a KnownCluster,
        identity: &'a Identity,
        bao: &'a Bao,
    ) -> Making<'a> {
        Making { plan, names: plan.names(), cluster, identity, bao }
    }

    /// Does a step, or does it again.
    pub(crate) async fn make(&self, step: Step) -> Result<()> {
        let made = match step {
            Step::Database => self.make_database().await,
            Step::Roles => self.make_roles().await,
            Step::Contents => self.fill().await,
            Step::Opening => self.open().await,
            Step::Mount => self.mount().await,
            Step::Broker => self.describe_broker().await,
            Step::Leases => self.describe_leases().await,
        };
        made.context(step.described())
    }

    /// Takes a step back, whether or not it was done.
    pub(crate) async fn unmake(&self, step: Step) -> Result<()> {
        let unmade = match step {
            Step::Database => self.drop_database(None).await,
            Step::Roles => self.drop_roles().await,
            Step::Contents | Step::Opening => Ok(()),
            Step::Mount => self.unmount().await,
            Step::Broker => self.forget_broker().await,
            Step::Leases => self.forget_leases().await,
        };
        unmade.with_context(|| format!("taking back {}", step.described()))
    }

    /// What was chosen when it was made: how many connections, and whether PostgreSQL makes verifiers.
    pub(crate) async fn as_it_is(&self) -> Result<(u16, bool)> {
        self.ensure_this_tenants().await?;
        let found = self.found(&self.cluster().await?).await?.context("it has just gone")?;
        let connections = u16::try_from(found.connections).unwrap_or(u16::MAX);
        Ok((connections, self.hashes_in_postgres().await?))
    }

    /// Makes what is there be what this version makes, with as little as that takes: nobody's session ends.
    pub(crate) async fn repair(&self) -> Result<()> {
        for step in [Step::Roles, Step::Contents, Step::Opening, Step::Mount, Step::Leases] {
            let made = match step {
                Step::Contents => self.fill_contents().await.context(step.described()),
                step => self.make(step).await,
            };
            made?;
        }
        // Its password is nobody's to know: it is described anew only where that is needed.
        if !self.is_described().await? {
            self.make(Step::Broker).await?;
        }
        Ok(())
    }

    /// What is wrong with what is there, if anything.
    pub(crate) async fn verify(&self) -> Result<Vec<String>> {
        let mut wrong = self.verify_database().await?;
        wrong.extend(self.verify_leasing().await?);
        Ok(wrong)
    }
}
