//! Grants as policies at OpenBAO, for sessions that ask with their own authority.
//!
//! A session's token names its policy there by the issuer, the subject, the tenant and the access that
//! its JWT says (docker/openbao/pgsilo-granted-role.json), and such a policy is there for as long as
//! the registry's grant: OpenBAO itself ends it, whether or not the registry and the proxies are there
//! then.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::FalseyValueParser;
use pgsilo_core::registry::is_segment;
use pgsilo_core::tenant::Access;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::{DeletePolicy, SetPolicy};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::Client;

use crate::bao::BaoServer;

/// What the names of these policies begin with.
const PREFIX: &str = "pgsilo-grant-";

/// Whether grants are written to OpenBAO, too.
#[derive(Debug, Args)]
pub(super) struct AtOpenBao {
    /// Write the grant to OpenBAO, too, as a policy that ends with it: for `[lease] authority = "session"`.
    #[arg(long, env = "PGSILO_GRANTS_AT_OPENBAO", value_parser = FalseyValueParser::new())]
    pub(super) at_openbao: bool,
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
    rules: String,
    /// In seconds since 1970, and as OpenBAO takes it; `None`: it does not end.
    ends: Option<(f64, String)>,
}

/// What there is to do at OpenBAO.
#[derive(Debug, Default)]
pub(super) struct Differences {
    /// Not there, or otherwise.
    wanted: BTreeMap<String, Policy>,
    /// Of no grant.
    pub(super) gone: Vec<String>,
    /// How many grants' policies are to be there.
    pub(super) all: usize,
    /// Tenants whose placement says what no policy can.
    pub(super) unsayable: Vec<String>,
}

impl Differences {
    /// Names of policies that are to be written.
    pub(super) fn written(&self) -> impl Iterator<Item = &str> {
        self.wanted.keys().map(String::as_str)
    }
}

impl AtOpenBao {
    /// OpenBAO, if the grant is to be there: before anything is written to the registry.
    pub(super) fn policies(&self, is_there: bool) -> Result<Option<Policies>> {
        (self.at_openbao || is_there).then(|| self.grantor.policies()).transpose()
    }
}

impl Grantor {
    pub(super) fn policies(&self) -> Result<Policies> {
        let bao = self.bao.client(self.bao_token_file.as_deref(), "GRANTOR_BAO_TOKEN");
        Ok(Policies { bao: bao.context("the grant is for OpenBAO, too")? })
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
        let (wanted, unsayable) = wanted(registry, Some(whose)).await?;
        let all = Access::ALL.map(|access| name(access, whose));
        let gone = all.into_iter().filter(|name| !wanted.contains_key(name)).collect();
        let there = Differences { all: wanted.len(), wanted, gone, unsayable };
        self.write(&there).await.context(
            "it is in the registry, and not at OpenBAO: pgsiloctl grant sync makes OpenBAO follow",
        )
    }

    /// Where OpenBAO has not exactly what the registry says.
    pub(super) async fn differences(&self, registry: &Client) -> Result<Differences> {
        take_turn(registry).await?;
        let (mut wanted, unsayable) = wanted(registry, None).await?;
        let (all, mut gone) = (wanted.len(), Vec::new());
        let there = self.bao.policies().await?;
        for name in there.into_iter().filter(|name| name.starts_with(PREFIX)) {
            match wanted.get(&name) {
                None => gone.push(name),
                Some(policy) if self.has(&name, policy).await? => drop(wanted.remove(&name)),
                Some(_) => {}
            }
        }
        Ok(Differences { wanted, gone, all, unsayable })
    }

    /// Whether a policy is there as it should be.
    async fn has(&self, name: &str, policy: &Policy) -> Result<bool> {
        let there = self.bao.read(&format!("sys/policies/acl/{name}")).await?;
        let moment = |text: &str| OffsetDateTime::parse(text, &Rfc3339).ok();
        let ends = there["data"]["expiration"].as_str().and_then(moment);
        let is_when = ends == policy.ends.as_ref().and_then(|(_, text)| moment(text));
        Ok(is_when && there["data"]["policy"].as_str() == Some(&*policy.rules))
    }

    /// Makes OpenBAO follow. What is taken away goes first.
    pub(super) async fn write(&self, differences: &Differences) -> Result<()> {
        for name in &differences.gone {
            self.bao.run(&DeletePolicy { name: name.clone() }).await?;
        }
        for (name, Policy { rules, ends }) in &differences.wanted {
            let expiration = ends.as_ref().map(|(_, text)| text.clone());
            let (name, policy) = (name.clone(), rules.clone());
            self.bao.run(&SetPolicy { name, policy, expiration }).await?;
        }
        if let [first, ..] = &differences.unsayable[..] {
            bail!(
                "the placement of {first} has a mount or a role that is none: its grants are not at OpenBAO"
            );
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

/// What the grants that are in force let read, by the policy's name; and tenants of which that cannot be
/// said.
async fn wanted(
    registry: &Client,
    whose: Option<&Whose>,
) -> Result<(BTreeMap<String, Policy>, Vec<String>)> {
    let grants = "SELECT g.issuer::text, g.subject::text, g.tenant::text, g.access::text,
            extract(epoch FROM g.expires_at)::float8,
            to_char(g.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
            p.mount, p.roles::text
        FROM pgsilo.grants g JOIN pgsilo.placements p USING (tenant)
        WHERE g.at_openbao AND g.granted_by IS NOT NULL AND coalesce(g.expires_at > now(), true)
            AND ($1::text IS NULL OR (g.issuer, g.subject, g.tenant) = ($1, $2::text, $3::text))";
    let [issuer, subject, tenant] = match whose {
        None => [None; 3],
        Some(Whose { issuer, subject, tenant }) => [issuer, subject, tenant].map(Some),
    };
    let rows = registry.query(grants, &[&issuer, &subject, &tenant]).await;
    let (mut wanted, mut unsayable) = (BTreeMap::<String, Policy>::new(), Vec::new());
    for row in rows.context("reading the grants")? {
        let [issuer, subject, tenant] = [0, 1, 2].map(|column| row.get::<_, String>(column));
        let granted: Access = row.get::<_, String>(3).parse()?;
        let ends = row.get::<_, Option<f64>>(4).zip(row.get::<_, Option<String>>(5));
        let mount: String = row.get(6);
        let roles: Value = serde_json::from_str(row.get(7))?;
        let whose = Whose { issuer, subject, tenant };
        for access in Access::ALL.into_iter().filter(|access| *access <= granted) {
            let Some(role) = roles.get(access.as_str()).and_then(Value::as_str) else { continue };
            // Else it could be another path, or several.
            if !mount.split('/').all(is_segment) || !is_segment(role) {
                unsayable.push(whose.tenant.clone());
                continue;
            }
            let rules = format!("path \"{mount}/creds/{role}\" {{ capabilities = [\"read\"] }}");
            let another = Policy { rules, ends: ends.clone() };
            match wanted.entry(name(access, &whose)) {
                Entry::Vacant(none) => drop(none.insert(another)),
                // Of several grants the last to end counts.
                Entry::Occupied(mut known) => {
                    if known.get().ends_before(&another) {
                        known.insert(another);
                    }
                }
            }
        }
    }
    Ok((wanted, unsayable))
}

impl Policy {
    fn ends_before(&self, other: &Policy) -> bool {
        match (&self.ends, &other.ends) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some((one, _)), Some((other, _))) => one < other,
        }
    }
}

/// As a session's role makes it of its token. OpenBAO does not tell capitals from small letters here, so
/// texts are told by their bytes.
fn name(access: Access, whose: &Whose) -> String {
    let Whose { issuer, subject, tenant } = whose;
    let hex = |text: &str| -> String { text.bytes().map(|byte| format!("{byte:02x}")).collect() };
    format!("{PREFIX}{access}-{tenant}-{}-{}", hex(issuer), hex(subject))
}
