//! Certificates of deletion: what was removed of a tenant, how that was checked, and what remains elsewhere.
//! Signed by a key of OpenBAO's that nobody has (transit, ed25519), so that one is proved without OpenBAO,
//! by who has the public key from before.
//!
//! What is signed is the certificate's text, to the byte. The file has that text as a string, beside the
//! signature.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, Subcommand};
use pgsilo_core::file;
use pgsilo_core::tenant::TenantId;
use pgsilo_openbao::Client as Bao;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_postgres::{Client, Transaction};

use crate::logins::{self, block_on};
use crate::provision::plan::Plan;
use crate::registry::{Author, Server};
use crate::say;
use crate::settings::SettingsFile;

/// Where the key is.
pub(crate) const MOUNT: &str = "pgsilo-transit";
/// And what it is called.
pub(crate) const KEY: &str = "certificates";
/// The longest file that is read.
const MAX_FILE: u64 = 1024 * 1024;

/// Certificates of deletion.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say which there are.
    List {
        /// The registry's.
        #[command(flatten)]
        server: Server,
    },
    /// Print a tenant's newest certificate: what was removed, how that was checked, what remains.
    Show {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// The tenant.
        #[arg(value_parser = TenantId::parse)]
        tenant: TenantId,
        /// Print the signed file, which `certificate check` proves.
        #[arg(long)]
        json: bool,
    },
    /// Print the public key that certificates are proved with; keep it where certificates go.
    Key {
        /// The file of settings.
        #[command(flatten)]
        settings: SettingsFile,
    },
    /// Prove a certificate without OpenBAO or the registry: that it was signed with that key, and what it says.
    ///
    /// Exit code 3 if it was not.
    Check(Check),
}

/// What is proved, and by what.
#[derive(Debug, Args)]
pub struct Check {
    /// The file that `certificate show --json` has printed.
    file: PathBuf,
    /// The public key, as `certificate key` has printed it.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

/// Runs the command to its end.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Check(check) => return check.run(),
        Command::List { server } => block_on(list(&server)),
        Command::Show { server, tenant, json } => block_on(show(&server, &tenant, json)),
        Command::Key { settings } => block_on(async {
            let settings = settings.read()?;
            let bao = logins::log_in(&settings.provisioner, &settings.bao()?).await?;
            say::data(&public_keys(&bao).await?)?;
            Ok(())
        }),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// The key in all its versions, in base64, a line each, the newest first: what was signed before a rotation
/// is proved by the one before.
async fn public_keys(bao: &Bao) -> Result<String> {
    let key = bao.look(&format!("{MOUNT}/keys/{KEY}")).await?;
    let key =
        key.context("OpenBAO has no key for certificates: run pgsiloctl bootstrap openbao")?;
    let versions = key["keys"].as_object().context("OpenBAO tells no versions of the key")?;
    let mut versions: Vec<_> = versions
        .iter()
        .filter_map(|(number, version)| {
            Some((number.parse::<u64>().ok()?, version["public_key"].as_str()?))
        })
        .collect();
    ensure!(!versions.is_empty(), "OpenBAO does not tell the public key");
    versions.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
    Ok(versions.into_iter().map(|(_, key)| key).collect::<Vec<_>>().join("\n"))
}

/// What is certified.
#[derive(Debug)]
pub(crate) struct Deletion(Value);

/// A certificate with its signature.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Signed {
    /// JSON, as it was signed.
    certificate: String,
    /// Of those bytes: ed25519, in base64.
    signature: String,
}

impl Deletion {
    /// Of a tenant whose things are gone, before the registry's rows are.
    pub(crate) async fn of(
        registry: &Client,
        author: &Author,
        plan: &Plan,
        evidence: &Value,
    ) -> Result<Deletion> {
        const FORMAT: &str = "YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"";
        let facts = "SELECT to_char(now() AT TIME ZONE 'UTC', $2), gen_random_uuid()::text,
                coalesce(nullif($3, ''), session_user), nullif($4, ''),
                (SELECT count(*) FROM pgsilo.grants WHERE tenant = $1::text AND at_openbao),
                (SELECT number FROM pgsilo.audit ORDER BY number DESC LIMIT 1)";
        let row = registry
            .query_one(facts, &[&plan.id.as_str(), &FORMAT, &author.actor, &author.reason])
            .await?;
        let (at, id, by): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (why, policies, audit): (Option<String>, i64, Option<i64>) =
            (row.get(3), row.get(4), row.get(5));
        let asked = "SELECT to_char(at AT TIME ZONE 'UTC', $2), coalesce(actor, login), reason FROM pgsilo.audit
            WHERE relation = 'tenants' AND key = $1 AND after ->> 'state' = 'deleting'
                AND before ->> 'state' <> 'deleting' ORDER BY number DESC LIMIT 1";
        let asked = registry.query_opt(asked, &[&plan.id.as_str(), &FORMAT]).await?;
        let asked = asked.map(|row| {
            let [at, by, why] = [0, 1, 2].map(|column| row.get::<_, Option<String>>(column));
            json!({ "at": at, "by": by, "reason": why })
        });
        let mut remains = vec![
            json!({
                "what": "the write-ahead log and physical backups of the cluster, in which the data is",
                "until": "their own retention ends",
            }),
            json!({
                "what": "snapshots of OpenBAO's storage, in which the database's description and the broker's last password are; \
                         both are of no use",
                "until": "their own retention ends",
            }),
            json!({
                "what": "the registry's audit, which has the tenant's id, names and placements and no data of it",
                "until": "kept",
            }),
            json!({
                "what": "logs of proxies and servers, and backups that were made by other means than pgsilo's",
                "until": "not known here",
            }),
            json!({
                "what": "blocks of the database's files on the cluster's storage, which are free and not overwritten",
                "until": "they are written again",
            }),
        ];
        if policies > 0 {
            remains.push(json!({
                "what": format!("{policies} policies of grants at OpenBAO, of no use without the mount"),
                "until": "pgsiloctl grant sync",
            }));
        }
        Ok(Deletion(json!({
            "kind": "pgsilo deletion certificate", "version": 1, "id": id,
            "tenant": plan.id, "display_name": plan.display_name,
            "asked_for": asked, "removed_at": at, "removed_by": by, "reason": why,
            "removed": evidence, "remains": remains, "registry_audit_up_to": audit,
        })))
    }

    /// Has OpenBAO sign it.
    pub(crate) async fn sign(self, bao: &Bao) -> Result<Signed> {
        let certificate = self.0.to_string();
        let input = json!({ "input": BASE64.encode(&certificate) });
        let signed = bao.write(&format!("{MOUNT}/sign/{KEY}"), input).await;
        let signed = signed.context("signing the certificate")?;
        let signature =
            signed["data"]["signature"].as_str().and_then(|text| text.rsplit(':').next());
        let signature = signature.context("OpenBAO gives no signature")?.to_owned();
        Ok(Signed { certificate, signature })
    }
}

impl Signed {
    /// As a file has it.
    pub(crate) fn file(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Whose deletion it certifies.
    pub(crate) fn tenant(&self) -> Result<String> {
        Ok(text(&self.content()?["tenant"]).to_owned())
    }

    /// Writes it to the registry.
    pub(crate) async fn keep(
        &self,
        transaction: &Transaction<'_>,
        tenant: &TenantId,
    ) -> Result<()> {
        let insert = "INSERT INTO pgsilo.certificates (tenant, document, signature) VALUES ($1::text, $2, $3)";
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&tenant.as_str(), &self.certificate, &self.signature];
        transaction.execute(insert, &values).await.context("keeping the certificate")?;
        Ok(())
    }

    fn content(&self) -> Result<Value> {
        serde_json::from_str(&self.certificate).context("the certificate is not JSON")
    }

    /// Whether the holder of one of these keys has signed it.
    fn is_signed_by(&self, keys: &[Vec<u8>]) -> bool {
        let Ok(signature) = BASE64.decode(&self.signature) else { return false };
        keys.iter().any(|key| {
            let key = UnparsedPublicKey::new(&ED25519, key);
            key.verify(self.certificate.as_bytes(), &signature).is_ok()
        })
    }

    fn tell(&self) -> Result<()> {
        let content = self.content()?;
        let line = |name: &str, value: &str| say::result(&format!("{name:<16}{value}"));
        line("tenant", text(&content["tenant"]));
        if let Some(name) = content["display_name"].as_str() {
            line("name", name);
        }
        let asked = &content["asked_for"];
        if asked.is_object() {
            line(
                "asked for",
                &format!(
                    "{} by {}{}",
                    text(&asked["at"]),
                    text(&asked["by"]),
                    because(&asked["reason"])
                ),
            );
        }
        line(
            "removed",
            &format!(
                "{} by {}{}",
                text(&content["removed_at"]),
                text(&content["removed_by"]),
                because(&content["reason"])
            ),
        );
        for (step, what) in content["removed"].as_object().into_iter().flatten() {
            let facts = what.as_object().into_iter().flatten();
            let facts = facts.map(|(name, value)| format!("{name}: {}", shown(value)));
            line("", &format!("{step}: {}", facts.collect::<Vec<_>>().join("; ")));
        }
        for remains in content["remains"].as_array().into_iter().flatten() {
            line(
                "remains",
                &format!("{}; until: {}", text(&remains["what"]), text(&remains["until"])),
            );
        }
        line("certificate", text(&content["id"]));
        Ok(())
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn because(reason: &Value) -> String {
    reason.as_str().map(|reason| format!(": {reason}")).unwrap_or_default()
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

async fn list(server: &Server) -> Result<()> {
    let session = server.open().await?;
    let all = "SELECT id::text, tenant::text, to_char(issued_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')
        FROM pgsilo.certificates ORDER BY issued_at";
    let rows = session.client.query(all, &[]).await.context("reading the certificates")?;
    let rows: Vec<[String; 3]> =
        rows.iter().map(|row| [row.get(1), row.get(2), row.get(0)]).collect();
    Ok(say::table(["tenant", "removed", "certificate"], &rows)?)
}

async fn show(server: &Server, tenant: &TenantId, as_json: bool) -> Result<()> {
    let session = server.open().await?;
    let newest = "SELECT document, signature FROM pgsilo.certificates WHERE tenant = $1::text
        ORDER BY issued_at DESC LIMIT 1";
    let row = session.client.query_opt(newest, &[&tenant.as_str()]).await?;
    let row = row.with_context(|| format!("no tenant {tenant} was ever removed"))?;
    let signed = Signed { certificate: row.get(0), signature: row.get(1) };
    match as_json {
        true => Ok(say::data(&signed.file()?)?),
        false => signed.tell(),
    }
}

impl Check {
    fn run(&self) -> Result<ExitCode> {
        let read = |path: &PathBuf| {
            let bytes = file::read(path, MAX_FILE);
            bytes.with_context(|| format!("reading {}", path.display()))
        };
        let signed: Signed =
            serde_json::from_slice(&read(&self.file)?).context("it is not a signed certificate")?;
        let keys = String::from_utf8(read(&self.key)?).context("the key is not text")?;
        let keys: Vec<_> = keys
            .split_whitespace()
            .map(|key| BASE64.decode(key).context("the key is not base64"))
            .collect::<Result<_>>()?;
        ensure!(
            !keys.is_empty() && keys.iter().all(|key| key.len() == 32),
            "it is not a key of ed25519, which has 32 bytes"
        );
        if !signed.is_signed_by(&keys) {
            say::progress(
                "the signature is not of this certificate with this key: it is not to be believed",
            );
            return Ok(ExitCode::from(3));
        }
        signed.tell()?;
        say::result("signature       good");
        Ok(ExitCode::SUCCESS)
    }
}
