//! Grants as policies at OpenBAO, for sessions that ask with their own authority.
//!
//! A session's token names its policy there by the issuer, the subject, the tenant and the access that
//! its JWT says (docker/openbao/pgsilo-granted-role.json), and such a policy is there for as long as
//! the registry's grant: OpenBAO itself ends it, whether or not the registry and the proxies are there
//! then.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use pgsilo_core::registry::is_segment;
use pgsilo_core::tenant::Access;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::{DeletePolicy, SetPolicy};
use serde_json::Value;
use tokio_postgres::Client;

use crate::bao::BaoServer;

/// What the names of these policies begin with.
const PREFIX: &str = "pgsilo-grant-";

/// Whether grants are written to OpenBAO, too.
#[derive(Debug, Args)]
pub(super) struct AtOpenBao {
    /// Write grants to OpenBAO, too, as policies that end with them: for `[lease] authority = "session"`.
    #[arg(long, env = "PGSILO_GRANTS_AT_OPENBAO")]
    at_openbao: bool,
    #[command(flatten)]
    grantor: Grantor,
}

/// Who writes them there.
#[derive(Debug, Args)]
pub struct Grantor {
    #[command(flatten)]
    bao: BaoServer,
    /// A file that holds the grantor's OpenBAO token [default: what GRANTOR_BAO_TOKEN holds].
    #[arg(long, value_name = "FILE")]
    bao_token_file: Option<PathBuf>,
}

/// Whose grants.
#[derive(Clone, Debug)]
pub(super) struct Whose {
    pub(super) issuer: String,
    pub(super) subject: String,
    pub(super) tenant: String,
}

/// A policy that is to be there.
#[derive(Debug)]
struct Policy {
    /// What it lets read.
    path: String,
    /// In seconds from now; `None`: it does not end.
    ends: Option<f64>,
}

impl AtOpenBao {
    /// OpenBAO, if grants are written there: before anything is written to the registry.
    pub(super) fn policies(&self) -> Result<Option<Policies>> {
        self.at_openbao.then(|| self.grantor.policies()).transpose()
    }
}

impl Grantor {
    pub(super) fn policies(&self) -> Result<Policies> {
        let bao = self.bao.client(self.bao_token_file.as_deref(), "GRANTOR_BAO_TOKEN")?;
        Ok(Policies { bao })
    }
}

/// The policies at OpenBAO.
pub(super) struct Policies {
    bao: Bao,
}

impl Policies {
    /// Makes OpenBAO have what the registry says of one subject at one tenant.
    pub(super) async fn follow(&self, registry: &Client, whose: &Whose) -> Result<()> {
        take_turn(registry).await?;
        let wanted = wanted(registry, Some(whose)).await?;
        let all = Access::ALL.map(|access| name(access, whose));
        let gone = all.into_iter().filter(|name| !wanted.contains_key(name)).collect();
        let written = self.write(&wanted, gone).await;
        written.context(
            "it is in the registry, and not at OpenBAO: pgsiloctl grant sync makes OpenBAO follow",
        )
    }

    /// Makes OpenBAO have exactly what the registry says. How many are there, and how many had to go.
    pub(super) async fn follow_all(&self, registry: &Client) -> Result<(usize, usize)> {
        take_turn(registry).await?;
        let wanted = wanted(registry, None).await?;
        let there = self.bao.policies().await?.into_iter();
        let is_gone = |name: &String| name.starts_with(PREFIX) && !wanted.contains_key(name);
        let gone: Vec<_> = there.filter(is_gone).collect();
        let counts = (wanted.len(), gone.len());
        self.write(&wanted, gone).await?;
        Ok(counts)
    }

    /// What is taken away goes first.
    async fn write(&self, wanted: &BTreeMap<String, Policy>, gone: Vec<String>) -> Result<()> {
        for name in gone {
            self.bao.run(&DeletePolicy { name }).await?;
        }
        for (name, Policy { path, ends }) in wanted {
            let policy = format!("path \"{path}\" {{ capabilities = [\"read\"] }}");
            // Whole seconds, and not after the grant.
            let ttl = ends.map(|seconds| format!("{:.0}s", seconds.floor()));
            self.bao.run(&SetPolicy { name: name.clone(), policy, ttl }).await?;
        }
        Ok(())
    }
}

/// Until this connection to the registry ends nobody else writes grants to OpenBAO: who has read the
/// registry later writes later.
async fn take_turn(registry: &Client) -> Result<()> {
    let take = "SELECT pg_advisory_lock(hashtextextended('pgsilo grants at OpenBAO', 0))";
    registry.batch_execute(take).await.context("taking the turn to write to OpenBAO")
}

/// What the grants that are in force let read, by the policy's name.
async fn wanted(registry: &Client, whose: Option<&Whose>) -> Result<BTreeMap<String, Policy>> {
    let grants = "SELECT g.issuer::text, g.subject::text, g.tenant::text, g.access::text,
            extract(epoch FROM g.expires_at - now())::float8, p.mount, p.roles::text
        FROM pgsilo.grants g JOIN pgsilo.placements p USING (tenant)
        WHERE g.granted_by IS NOT NULL AND coalesce(g.expires_at > now() + interval '1 s', true)
            AND ($1::text IS NULL OR (g.issuer, g.subject, g.tenant) = ($1, $2::text, $3::text))";
    let [issuer, subject, tenant] = match whose {
        None => [None; 3],
        Some(Whose { issuer, subject, tenant }) => [issuer, subject, tenant].map(Some),
    };
    let rows = registry.query(grants, &[&issuer, &subject, &tenant]).await;
    let mut wanted = BTreeMap::<String, Policy>::new();
    for row in rows.context("reading the grants")? {
        let [issuer, subject, tenant] = [0, 1, 2].map(|column| row.get::<_, String>(column));
        let granted: Access = row.get::<_, String>(3).parse()?;
        let (ends, mount): (Option<f64>, String) = (row.get(4), row.get(5));
        let roles: Value = serde_json::from_str(row.get(6))?;
        let whose = Whose { issuer, subject, tenant };
        for access in Access::ALL.into_iter().filter(|access| *access <= granted) {
            let Some(role) = roles.get(access.as_str()).and_then(Value::as_str) else { continue };
            // Else it could be another path, or several.
            if !mount.split('/').all(is_segment) || !is_segment(role) {
                bail!("the placement of {} has a mount or a role that is none", whose.tenant);
            }
            let path = format!("{mount}/creds/{role}");
            let policy = wanted.entry(name(access, &whose)).or_insert(Policy { path, ends });
            // Of several grants the last to end counts.
            policy.ends = policy.ends.zip(ends).map(|(one, other)| one.max(other));
        }
    }
    Ok(wanted)
}

/// As a session's role makes it of its token. OpenBAO does not tell capitals from small letters here, so
/// texts are told by their bytes.
fn name(access: Access, whose: &Whose) -> String {
    let Whose { issuer, subject, tenant } = whose;
    let hex = |text: &str| -> String { text.bytes().map(|byte| format!("{byte:02x}")).collect() };
    format!("{PREFIX}{access}-{tenant}-{}-{}", hex(issuer), hex(subject))
}
