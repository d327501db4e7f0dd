//! `pgsiloctl bootstrap registry`: the registry's database, and how proxies and the control plane log in to
//! it.

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_registry::schema::{self, CONTROL, Installed, PROXY};

use super::logins::{Kind, Maker};
use super::{Administrator, BaoAdministrator, Doing};
use crate::registry::Progress;
use crate::settings::{RegistryLogin, SettingsFile};

/// What OpenBAO logs in as.
const BROKER: &str = "pgsilo_registry_broker";

/// Make the registry's database ready: its schema, and logins that OpenBAO makes.
///
/// Makes the database that the file of settings names, unless it is there, brings its schema to this version,
/// and describes it to OpenBAO, with the role `control` for the provisioner and `proxy` for proxies: no login
/// to it lasts. Needs a superuser, or a role with CREATEROLE and CREATEDB.
#[derive(Debug, Args)]
pub struct Registry {
    #[command(flatten)]
    settings: SettingsFile,
    #[command(flatten)]
    administrator: Administrator,
    #[command(flatten)]
    bao: BaoAdministrator,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Registry {
    pub(super) async fn run(self) -> Result<()> {
        let settings = self.settings.read()?;
        let RegistryLogin::Lease { mount, role } = &settings.registry.login else {
            bail!(
                "registry.user and password_file are said: a login that lasts is not this command's to make"
            );
        };
        if (mount.as_str(), role.as_str()) != ("pgsilo-registry", "control") {
            bail!(
                "registry.lease is {mount}/{role}: the policies have \"pgsilo-registry\", and \"control\" for the provisioner"
            );
        }
        let (bao, administrator) = (self.bao.client(&settings)?, self.administrator.identity()?);
        let servers = &settings.registry.servers;
        let name = &settings.registry.dbname;
        let mut doing = Doing::new(self.dry_run);
        let postgres = administrator.connect(&servers.placement("postgres")).await?;
        let there = "SELECT FROM pg_database WHERE datname = $1";
        let there = postgres.query_opt(there, &[name]).await?.is_some();
        doing
            .ensure(format!("the database {name}"), there, async {
                let name = name.replace('"', "\"\"");
                Ok(postgres.batch_execute(&format!("CREATE DATABASE \"{name}\"")).await?)
            })
            .await?;
        let what = format!("the registry's schema, version {}", schema::NEWEST);
        if there || !self.dry_run {
            let mut database = administrator.connect(&servers.placement(name)).await?;
            let there = schema::installed(&database).await?;
            let is_newest = |there: Installed| there.version == schema::NEWEST;
            doing
                .ensure(what, there.is_some_and(is_newest), async {
                    match there {
                        None => schema::init(&mut database, &Progress).await?,
                        Some(_) => schema::migrate(&mut database, &Progress).await?,
                    };
                    Ok(())
                })
                .await?;
        } else {
            doing.ensure(what, false, async { Ok(()) }).await?;
        }
        let known = "SELECT rolcanlogin AND rolcreaterole
                AND (SELECT count(*) = 2 FROM pg_auth_members a
                    WHERE a.member = r.oid AND a.admin_option AND a.roleid IN (to_regrole($2), to_regrole($3)))
                AND EXISTS (SELECT FROM pg_database d, aclexplode(d.datacl) a
                    WHERE d.datname = $4 AND a.grantee = r.oid AND a.privilege_type = 'CONNECT')
            FROM pg_roles r WHERE rolname = $1";
        let known = postgres.query_opt(known, &[&BROKER, &CONTROL, &PROXY, name]).await?;
        let is_so = known.is_some_and(|row| row.get(0));
        doing
            .ensure(format!("{BROKER} makes members of {CONTROL} and {PROXY}"), is_so, async {
                let make = format!(
                    "DO $$ BEGIN
                         IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '{BROKER}') THEN
                             CREATE ROLE {BROKER};
                         END IF;
                     END $$;
                     ALTER ROLE {BROKER} LOGIN CREATEROLE;
                     ALTER ROLE {BROKER} SET search_path = pg_catalog, pg_temp;
                     GRANT {CONTROL}, {PROXY} TO {BROKER} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
                     GRANT CONNECT ON DATABASE \"{}\" TO {BROKER}",
                    name.replace('"', "\"\"")
                );
                Ok(postgres.batch_execute(&make).await?)
            })
            .await?;
        let maker = Maker {
            bao: &bao,
            mount,
            connection: "registry",
            cluster: servers,
            dbname: name,
            broker: BROKER,
        };
        let kinds = [Kind::of("control", CONTROL), Kind { role: "proxy", group: PROXY, ttl: "1h" }];
        maker.describe(&mut doing, &postgres, &kinds).await.context("its logins")?;
        doing.conclude("the registry");
        Ok(())
    }
}
