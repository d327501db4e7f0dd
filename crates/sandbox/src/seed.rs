//! Different data for each tenant, written the way an application would write it.
//!
//! The tables are made with a leased credential, which is then given back and must be gone: so
//! no sandbox is ever ready whose leases do not work from end to end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::login::Login;
use crate::openbao::OpenBao;
use pgsilo_core::names::Names;

/// A tenant of the sandbox and how much is in its database.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) tenant: &'static str,
    customers: &'static [&'static str],
    invoices: u32,
}

/// Different counts, so that one tenant's answer is not taken for another's.
pub(super) const TENANTS: [Data; 2] = [
    Data {
        tenant: "acme",
        customers: &["Road Runner Ltd", "Coyote & Sons", "Mesa Rockets"],
        invoices: 5,
    },
    Data {
        tenant: "globex",
        customers: &["Cypress Creek", "Hammock District", "Sector 7-G", "Volcano Lair", "Moe's"],
        invoices: 12,
    },
];

impl Data {
    fn sql(&self) -> String {
        let names: Vec<_> =
            self.customers.iter().map(|name| format!("('{}')", name.replace('\'', "''"))).collect();
        format!(
            "SET search_path = public;
             CREATE TABLE customers (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL);
             CREATE TABLE invoices (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                 customer_id int NOT NULL REFERENCES customers, cents bigint NOT NULL);
             INSERT INTO customers (name) VALUES {};
             INSERT INTO invoices (customer_id, cents)
                 SELECT 1 + n % {}, 100 * n + {} FROM generate_series(1, {}) AS n",
            names.join(", "),
            self.customers.len(),
            self.tenant.len(),
            self.invoices
        )
    }

    /// Leases, writes, gives back, and looks whether the role is gone.
    pub(super) async fn write(
        &self,
        tenant: &Names,
        bao: &OpenBao,
        superuser: &Login,
        admits_leased: &str,
    ) -> Result<()> {
        let (mount, role) = (tenant.mount(), tenant.lease_role("migrate"));
        let granted = bao.root.openbao().creds(&bao.root_token, &mount, &role).await;
        let lease = granted.context("OpenBAO gives no credential")?;
        let leased = Login {
            user: lease.username,
            password: lease.password,
            host: admits_leased.to_owned(),
            ..superuser.clone()
        };
        let session = leased.connect(&tenant.database()).await?;
        session.batch_execute(&self.sql()).await.context("writing the tenant's data")?;
        bao.root.revoke_lease(&lease.lease_id).await?;
        let cluster = superuser.connect("postgres").await?;
        let left = cluster
            .query_opt("SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = $1", &[&leased.user])
            .await?;
        ensure!(left.is_none(), "the leased role {} outlived its lease", leased.user);
        let ended = async { while session.batch_execute("SELECT 1").await.is_ok() {} };
        tokio::time::timeout(Duration::from_secs(5), ended)
            .await
            .with_context(|| format!("a session of {} outlived its lease", leased.user))?;
        Ok(())
    }
}
