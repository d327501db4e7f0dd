//! `pgsiloctl bootstrap openbao`: policies, and logins for the proxy, the provisioner and the operator.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use pgsilo_openbao::Client as Bao;
use pgsilo_openbao::requests::{EnableAuthRequest, SetPolicy};
use serde_json::{Value, json};

use super::logins::ensure_engine;
use super::{BaoAdministrator, Doing, MONITOR_MOUNT, PROVISIONER_MOUNT, PROVISIONER_POLICY};
use crate::bao::again;
use crate::certificate;
use crate::cluster::KnownCluster;
use crate::say;
use crate::settings::{BaoLogin, RegistryLogin, SettingsFile};

const PROXY: &str = include_str!("../../../../docker/openbao/pgsilo.hcl");
const PROVISIONER: &str = include_str!("../../../../docker/openbao/provisioner.hcl");
const OPERATOR: &str = include_str!("../../../../docker/openbao/operator.hcl");

/// Make OpenBAO ready: policies, mounts, and how the proxy and the control plane log in.
///
/// Three identities, each with one policy and without the default one: the proxy's leases tenants'
/// credentials and gives them back; the provisioner's describes how they are made and reads none; the
/// operator's leases as the proxy does, for `pgsiloctl tenant check`. They log in by AppRole. Their secret
/// ids are written to files that only this account can read, and nowhere else; a file that is there is
/// kept: remove it, and run this again, for another. The file of settings says where OpenBAO is and where
/// the provisioner's and the operator's secret ids go.
#[derive(Debug, Args)]
pub struct Openbao {
    #[command(flatten)]
    settings: SettingsFile,
    #[command(flatten)]
    administrator: BaoAdministrator,
    /// Where the proxy's secret id goes, for its host; without, none is made.
    #[arg(long, value_name = "FILE")]
    proxy_secret_id: Option<PathBuf>,
    /// Addresses that proxies have, as OpenBAO sees them; their logins work from there only. May be
    /// repeated [default: as it is; at first, from anywhere].
    #[arg(long, value_name = "CIDR")]
    proxy_from: Vec<String>,
    /// The same of the control plane.
    #[arg(long, value_name = "CIDR")]
    control_from: Vec<String>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Openbao {
    pub(super) async fn run(self) -> Result<()> {
        let settings = self.settings.read()?;
        let bao = self.administrator.client(&settings)?;
        let mut doing = Doing::new(self.dry_run);
        for (name, text) in [("pgsilo", PROXY.to_owned()), ("pgsilo-operator", OPERATOR.to_owned())]
        {
            ensure_policy(&mut doing, &bao, name, text).await?;
        }
        // Its clusters are kept: `bootstrap cluster` writes them.
        let there = read_policy(&bao, PROVISIONER_POLICY).await?;
        let list = there.as_deref().and_then(urls_of).unwrap_or(NO_URL);
        ensure_policy(&mut doing, &bao, PROVISIONER_POLICY, with_urls(list)).await?;
        let mut engines = vec![PROVISIONER_MOUNT, MONITOR_MOUNT];
        if let RegistryLogin::Lease { mount, .. } = &settings.registry.login {
            engines.push(mount);
        }
        for path in engines {
            ensure_engine(&mut doing, &bao, path, "database").await?;
        }
        ensure_engine(&mut doing, &bao, certificate::MOUNT, "transit").await?;
        let path = format!("{}/keys/{}", certificate::MOUNT, certificate::KEY);
        let is_so = bao.look(&path).await?.is_some();
        doing
            .ensure("a key that signs certificates of deletion", is_so, async {
                bao.write(&path, json!({ "type": "ed25519" })).await?;
                Ok(())
            })
            .await?;
        let mut logins = vec![Login {
            mount: "approle",
            role_id: "pgsilo",
            policy: "pgsilo",
            // Never at an end while it is renewed, and dead, its leases with it, 60 s after the
            // proxy stops renewing it.
            period: 60,
            from: &self.proxy_from,
            secret_id: self.proxy_secret_id.as_deref(),
        }];
        for (login, policy) in [
            (Some(&settings.provisioner), PROVISIONER_POLICY),
            (settings.operator.as_ref(), "pgsilo-operator"),
        ] {
            if let Some(BaoLogin::AppRole { mount, role_id, secret_id_file }) = login {
                logins.push(Login {
                    mount,
                    role_id,
                    policy,
                    period: 600,
                    from: &self.control_from,
                    secret_id: Some(secret_id_file),
                });
            }
        }
        for login in logins {
            login
                .ensure(&mut doing, &bao)
                .await
                .with_context(|| format!("AppRole {}", login.role_id))?;
        }
        doing.conclude("OpenBAO");
        Ok(())
    }
}

/// An AppRole.
#[derive(Debug)]
struct Login<'a> {
    mount: &'a str,
    /// Its id, and its name.
    role_id: &'a str,
    policy: &'a str,
    /// In seconds.
    period: u64,
    from: &'a [String],
    secret_id: Option<&'a Path>,
}

impl Login<'_> {
    async fn ensure(&self, doing: &mut Doing, bao: &Bao) -> Result<()> {
        let Login { mount, role_id, .. } = self;
        let methods = bao.read("sys/auth").await?;
        let method = methods["data"].get(format!("{mount}/"));
        doing
            .ensure(format!("logins by AppRole at {mount}"), method.is_some(), async {
                let (path, engine_type) = ((*mount).to_owned(), Some("approle".to_owned()));
                bao.run(&EnableAuthRequest { path, engine_type, ..Default::default() }).await?;
                Ok(())
            })
            .await?;
        let lockout =
            method.map(|method| &method["config"]["user_lockout_config"]["user_lockout_disable"]);
        let what = format!("nobody keeps a proxy out by wrong secret ids at {mount}");
        doing
            .ensure(what, lockout == Some(&Value::Bool(true)), async {
                let no_lockout = json!({ "user_lockout_config": { "lockout_disable": true } });
                bao.write(&format!("sys/auth/{mount}/tune"), no_lockout).await?;
                Ok(())
            })
            .await?;
        let path = format!("auth/{mount}/role/{role_id}");
        let mut expected = json!({
            "token_policies": [self.policy],
            "token_no_default_policy": true,
            "token_type": "service",
            "token_period": self.period,
        });
        // Where nothing is said of addresses, those that are there are kept.
        if !self.from.is_empty() {
            expected["secret_id_bound_cidrs"] = json!(self.from);
            expected["token_bound_cidrs"] = json!(self.from);
        }
        let there = bao.look(&path).await?;
        if there
            .as_ref()
            .is_none_or(|there| there["secret_id_bound_cidrs"].as_array().is_none_or(Vec::is_empty))
            && self.from.is_empty()
        {
            say::progress(&format!("warning: {role_id} may log in from anywhere: say from where"));
        }
        let id = bao.look(&format!("{path}/role-id")).await?;
        let has_id = id.is_some_and(|id| id["role_id"] == json!(role_id));
        let is_so = has_id
            && there.is_some_and(|found| {
                expected.as_object().into_iter().flatten().all(|(key, value)| {
                    let found = &found[key];
                    found == value || same_addresses(found, value)
                })
            });
        expected["role_id"] = json!(role_id);
        let from = match self.from {
            [] => String::new(),
            from => format!(", from {}", from.join(", ")),
        };
        doing
            .ensure(
                format!("{role_id} logs in with the policy {}{from}", self.policy),
                is_so,
                async {
                    bao.write(&path, expected.clone()).await?;
                    Ok(())
                },
            )
            .await?;
        let Some(file) = self.secret_id else { return Ok(()) };
        let is_so = fs::metadata(file).is_ok_and(|file| file.len() > 0);
        doing
            .ensure(format!("the secret id of {role_id} is in {}", file.display()), is_so, async {
                // There before there is a secret id, and nobody else's to read.
                let mut new = file.as_os_str().to_owned();
                new.push(".new");
                let new = Path::new(&new);
                let mut options = OpenOptions::new();
                let opened = match fs::remove_file(new) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => options.write(true).create_new(true).mode(0o600).open(new),
                };
                let mut opened = opened.with_context(|| format!("making {}", new.display()))?;
                let others = bao.list(&format!("{path}/secret-id")).await?.len();
                if others > 0 {
                    say::progress(&format!(
                        "warning: {others} other secret ids of {role_id} work; destroy them when nobody uses them: \
                         bao list {path}/secret-id"
                    ));
                }
                let secret_id = bao.new_secret_id(mount, role_id).await?;
                let written = opened.write_all(secret_id.expose());
                let written = written.and_then(|()| fs::rename(new, file));
                written.with_context(|| format!("writing {}", file.display()))
            })
            .await
    }
}

/// Whether both are the same addresses: OpenBAO leaves out the mask of one.
fn same_addresses(one: &Value, other: &Value) -> bool {
    let read = |value: &Value| -> Option<Vec<String>> {
        let texts = value.as_array()?.iter().map(|text| text.as_str());
        let plain = |text: &str| {
            text.strip_suffix("/32").or(text.strip_suffix("/128")).unwrap_or(text).to_owned()
        };
        texts.map(|text| text.map(plain)).collect()
    };
    read(one).is_some_and(|one| !one.is_empty() && Some(one) == read(other))
}

async fn read_policy(bao: &Bao, name: &str) -> Result<Option<String>> {
    let found = bao.look(&format!("sys/policies/acl/{name}")).await?;
    Ok(found.and_then(|found| found["policy"].as_str().map(str::to_owned)))
}

async fn ensure_policy(doing: &mut Doing, bao: &Bao, name: &str, policy: String) -> Result<()> {
    let is_so = read_policy(bao, name).await?.as_ref() == Some(&policy);
    doing
        .ensure(format!("the policy {name} is this version's"), is_so, async {
            let request = SetPolicy { name: name.to_owned(), policy, expiration: None };
            again(async || bao.run(&request).await).await
        })
        .await
}

/// Has the provisioner's policy let it describe databases of these clusters, and of no others; beside URLs
/// that tenants are still described with.
pub(super) async fn allow_clusters(
    doing: &mut Doing,
    bao: &Bao,
    clusters: &[KnownCluster],
    others: &[String],
) -> Result<()> {
    let patterns = clusters.iter().filter_map(|cluster| match cluster.url_pattern() {
        Ok(pattern) => Some(pattern),
        Err(error) => {
            say::progress(&format!(
                "warning: no tenant can be made in {}: {error:#}",
                cluster.name
            ));
            None
        }
    });
    let patterns: Vec<_> = patterns.chain(others.iter().cloned()).collect();
    for pattern in &patterns {
        say::progress(&format!("the provisioner may describe databases of {pattern}"));
    }
    ensure_policy(doing, bao, PROVISIONER_POLICY, provisioner_policy(&patterns)).await
}

/// Where the policy lists URLs; an empty list would be anything.
const NO_URL: &str = "\"none\"";
const URLS: &str = "\"connection_url\"          = [";

/// The provisioner's policy, where its databases' URLs are like one of these.
fn provisioner_policy(patterns: &[String]) -> String {
    match patterns {
        [] => with_urls(NO_URL),
        patterns => {
            let each: Vec<_> = patterns.iter().map(|one| format!("{one:?}")).collect();
            with_urls(&each.join(", "))
        }
    }
}

fn with_urls(list: &str) -> String {
    const SERVER: &str = "\"postgresql://{{username}}:{{password}}@DATABASE/*\"";
    PROVISIONER.replace(SERVER, list)
}

/// The list of URLs of a policy that this program has written, whichever version.
fn urls_of(policy: &str) -> Option<&str> {
    let (_, behind) = policy.split_once(URLS)?;
    let (list, _) = behind.split_once("]\n")?;
    let is_ours = |url: &str| {
        let url = url.trim();
        url == NO_URL || url.starts_with("\"postgresql://{{username}}:{{password}}@")
    };
    // Servers of one URL have commas between them, too.
    list.split("\", \"")
        .all(|url| is_ours(&format!("\"{}\"", url.trim_matches('"'))))
        .then_some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_provisioner_may_describe_the_databases_of_its_clusters_and_no_others() {
        let none = provisioner_policy(&[]);
        assert!(none.contains(r#""connection_url"          = ["none"]"#), "{none}");
        let patterns = ["db1:5432", "db3:5432,db2:5432"]
            .map(|servers| format!("postgresql://{{{{username}}}}:{{{{password}}}}@{servers}/*"));
        let two = provisioner_policy(&patterns);
        assert!(
            two.contains(r#"= ["postgresql://{{username}}:{{password}}@db1:5432/*", "postgresql://{{username}}:{{password}}@db3:5432,db2:5432/*"]"#),
            "{two}"
        );
        for policy in [none, two] {
            assert!(!policy.contains("@DATABASE"), "{policy}");
            // Another version of it keeps them.
            assert_eq!(with_urls(urls_of(&policy).expect("a list")), policy);
        }
        assert_eq!(urls_of("path \"*\" { capabilities = [\"sudo\"] }"), None);
        assert_eq!(urls_of("  \"connection_url\"          = [\"*\"]\n"), None);
    }

    #[test]
    fn one_address_is_the_same_without_its_mask() {
        assert!(same_addresses(&json!(["127.0.0.1"]), &json!(["127.0.0.1/32"])));
        assert!(same_addresses(&json!(["::1", "10.0.0.0/8"]), &json!(["::1/128", "10.0.0.0/8"])));
        for (one, other) in [
            (json!(["10.0.0.0"]), json!(["10.0.0.0/8"])),
            (json!(["10.0.0.1"]), json!([])),
            (json!([]), json!([])),
            (json!(null), json!(["10.0.0.1"])),
        ] {
            assert!(!same_addresses(&one, &other), "{one} {other}");
        }
    }
}
