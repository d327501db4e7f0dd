//! What audits and repairs: the provisioner, at OpenBAO and in each cluster of the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, stream};
use pgsilo_core::registry::{Placement, ReadOnlyServer, Snapshot, Tenant};
use pgsilo_openbao::Client as Bao;
use tokio::sync::Mutex;
use tokio_postgres::Client;

use super::mend::Mender;
use super::report::{Outcome, Report};
use super::verdict::Finding;
use super::{brokers, census, cluster, verdict};
use crate::postgres::Identity;

/// Subjects looked at at once.
const AT_ONCE: usize = 8;
/// Tenants mended at once.
const MENDED_AT_ONCE: usize = 4;
/// What is not begun by then is left to the next audit: one tenant's do not keep the others
/// waiting.
const MENDED_WITHIN: Duration = Duration::from_secs(300);
/// The advisory lock of a repair.
const CLAIM: i64 = i64::from_be_bytes(*b"pgsilo-a");

/// What is looked at.
#[derive(Debug, Clone)]
pub(super) enum Subject {
    /// A tenant: its roles and leases.
    Tenant(Arc<Tenant>),
    /// A cluster, once for all tenants that are on it.
    Cluster(Arc<Cluster>),
}

#[derive(Debug)]
pub(super) struct Cluster {
    /// As one of its tenants', in the database that is no tenant's.
    placement: Placement,
    /// Its tenants' databases.
    databases: BTreeSet<String>,
    /// What PostgreSQL calls all tenants of the registry, wherever they are.
    tenants: BTreeSet<String>,
}

impl Subject {
    /// The clusters that the tenants are on, and the tenants.
    pub(super) fn all(chosen: Vec<Arc<Tenant>>, registry: &Snapshot) -> Vec<Subject> {
        let tenants: BTreeSet<_> = registry
            .tenants()
            .map(|tenant| {
                let dbname = &*tenant.placement().dbname;
                dbname.strip_prefix("tenant_").unwrap_or(tenant.id().as_str()).to_owned()
            })
            .collect();
        let mut clusters = BTreeMap::<String, (Placement, BTreeSet<String>)>::new();
        for tenant in &chosen {
            let placement = tenant.placement();
            let (_, databases) = clusters
                .entry(placement.cluster.to_string())
                .or_insert_with(|| (common(placement), BTreeSet::new()));
            databases.insert((*placement.dbname).to_owned());
        }
        let clusters = clusters.into_values().map(|(placement, databases)| {
            let tenants = tenants.clone();
            Subject::Cluster(Arc::new(Cluster { placement, databases, tenants }))
        });
        clusters.chain(chosen.into_iter().map(Subject::Tenant)).collect()
    }

    fn placement(&self) -> &Placement {
        match self {
            Subject::Tenant(tenant) => tenant.placement(),
            Subject::Cluster(cluster) => &cluster.placement,
        }
    }

    /// `tenant` or `cluster`, and which.
    pub(super) fn named(&self) -> (&'static str, String) {
        match self {
            Subject::Tenant(tenant) => ("tenant", tenant.id().as_str().to_owned()),
            Subject::Cluster(cluster) => ("cluster", cluster.placement.cluster.to_string()),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = self.named();
        write!(f, "{kind} {name}")
    }
}

/// The database of a placement's server where no tenant can take all connections, or a lock.
fn common(placement: &Placement) -> Placement {
    placement.beside("postgres")
}

/// What was found of one subject.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) subject: Subject,
    pub(super) findings: Vec<Finding>,
}

/// The identity that audits and repairs.
#[derive(Debug)]
pub(super) struct Auditor {
    pub(super) provisioner: Identity,
    pub(super) bao: Bao,
    /// Held by who takes grants away.
    pub(super) alone: Mutex<()>,
}

impl Auditor {
    /// Looks at each subject once; gives back those with findings.
    pub(super) async fn look(&self, subjects: Vec<Subject>, report: &mut Report) -> Vec<Suspect> {
        let looks = stream::iter(subjects).map(|subject| async move {
            let judged = self.judge(&subject).await;
            (subject, judged)
        });
        let mut looks = looks.buffered(AT_ONCE);
        let mut suspects = Vec::new();
        while let Some((subject, judged)) = looks.next().await {
            match judged {
                Ok(findings) if findings.is_empty() => {}
                Ok(findings) => suspects.push(Suspect { subject, findings }),
                Err(error) => report.fail(&subject.to_string(), &error),
            }
        }
        suspects
    }

    /// Looks at the suspects once more; gives back those with findings that are still the same.
    pub(super) async fn look_again(
        &self,
        suspects: Vec<Suspect>,
        report: &mut Report,
    ) -> Vec<Suspect> {
        let subjects: Vec<_> = suspects.iter().map(|one| one.subject.clone()).collect();
        let mut confirmed = self.look(subjects, report).await;
        for now in &mut confirmed {
            let before = suspects.iter().find(|one| one.subject.named() == now.subject.named());
            let before = before.map(|one| &one.findings[..]).unwrap_or_default();
            now.findings = verdict::confirmed(before, std::mem::take(&mut now.findings));
        }
        confirmed.retain(|one| !one.findings.is_empty());
        confirmed
    }

    async fn judge(&self, subject: &Subject) -> Result<Vec<Finding>> {
        let database = self.provisioner.connect(subject.placement()).await?;
        let tenant = match subject {
            Subject::Tenant(tenant) => tenant,
            Subject::Cluster(cluster) => {
                let looked = cluster::look(&database, &cluster.tenants, &cluster.databases).await?;
                return Ok(looked.into_iter().map(Finding::Cluster).collect());
            }
        };
        // A server that cannot be asked may have sessions: then nothing is known of any.
        let standbys = match tenant.placement().cluster.read_only {
            ReadOnlyServer::Primary => Vec::new(),
            ReadOnlyServer::PreferStandby => {
                let each = self.provisioner.connect_to_each(tenant.placement()).await;
                each.context("sessions at standbys cannot be counted")?
            }
        };
        let census = census::take(tenant, &database, &standbys, &self.bao).await?;
        let mut findings = census.findings;
        for group in census.groups {
            findings.extend(verdict::judge(group.roles, group.leases)?);
        }
        Ok(findings)
    }

    /// Reports what was confirmed, and leaves it.
    pub(super) fn leave(confirmed: &[Suspect], report: &mut Report) {
        for one in confirmed {
            for finding in &one.findings {
                report.tell(&one.subject, finding, &Outcome::Left);
            }
        }
    }

    /// Mends what was confirmed and still is so: other subjects may have taken their time since.
    /// Clusters first: what a transaction that was prepared holds, no revocation gets.
    pub(super) async fn mend(&self, confirmed: Vec<Suspect>, report: &mut Report) {
        let (clusters, tenants): (Vec<_>, Vec<_>) =
            confirmed.into_iter().partition(|one| matches!(one.subject, Subject::Cluster(_)));
        for (suspects, at_once) in [(clusters, 1), (tenants, MENDED_AT_ONCE)] {
            let mends = stream::iter(suspects).map(|confirmed| async move {
                let subject = confirmed.subject.clone();
                (subject, self.mend_one(confirmed).await)
            });
            let mut mends = mends.buffered(at_once);
            while let Some((subject, mended)) = mends.next().await {
                match mended {
                    Ok(mended) => {
                        for (finding, outcome) in &mended {
                            report.tell(&subject, finding, outcome);
                        }
                    }
                    Err(error) => report.fail(&subject.to_string(), &error),
                }
            }
        }
    }

    async fn mend_one(&self, confirmed: Suspect) -> Result<Vec<(Finding, Outcome)>> {
        let Suspect { subject, findings } = confirmed;
        let findings = verdict::confirmed(&findings, self.judge(&subject).await?);
        let placement = subject.placement();
        let database = self.provisioner.connect(placement).await?;
        let Auditor { provisioner, bao, alone } = self;
        let mender = Mender { database: &database, placement, provisioner, bao, alone };
        let began = Instant::now();
        let stopped: Vec<_> = findings.iter().filter_map(Finding::stopped).collect();
        if !stopped.is_empty() {
            // What it cannot take away, each of them will tell.
            let _told_later = mender.take_away(&stopped).await;
        }
        let mut mended = Vec::with_capacity(findings.len());
        for finding in findings {
            let outcome = match began.elapsed() < MENDED_WITHIN {
                true => match mender.mend(&finding).await {
                    Ok(true) => Outcome::Mended,
                    Ok(false) => Outcome::Left,
                    Err(error) => Outcome::Failed(format!("{error:#}")),
                },
                false => Outcome::Failed(format!(
                    "not reached within {} s; the next audit goes on",
                    MENDED_WITHIN.as_secs()
                )),
            };
            mended.push((finding, outcome));
        }
        Ok(mended)
    }

    /// Keeps other audits from mending the suspects' clusters, for as long as what it answers
    /// lives. Those of clusters where another one is at work are given up, and told of.
    pub(super) async fn claim(
        &self,
        suspects: &mut Vec<Suspect>,
        report: &mut Report,
    ) -> Vec<Client> {
        let mut clients = Vec::new();
        let mut claims = BTreeMap::<String, bool>::new();
        for suspect in &*suspects {
            let placement = suspect.subject.placement();
            let cluster = placement.cluster.to_string();
            if claims.contains_key(&cluster) {
                continue;
            }
            let claimed = match self.claim_one(placement).await {
                Ok(client) => {
                    clients.push(client);
                    true
                }
                Err(error) => {
                    report.fail(&format!("cluster {cluster}"), &error);
                    false
                }
            };
            claims.insert(cluster, claimed);
        }
        suspects
            .retain(|one| claims.get(&one.subject.placement().cluster.to_string()) == Some(&true));
        clients
    }

    async fn claim_one(&self, placement: &Placement) -> Result<Client> {
        let client = self.provisioner.connect(&common(placement)).await?;
        let claim = "SELECT pg_catalog.pg_try_advisory_lock($1)";
        let claimed: bool = client.query_one(claim, &[&CLAIM]).await?.try_get(0)?;
        ensure!(claimed, "another audit is mending there; look again when it is done");
        Ok(client)
    }

    /// Gives each tenant's brokers passwords that both sides know.
    pub(super) async fn renew_brokers(&self, tenants: &[Arc<Tenant>], report: &mut Report) {
        for tenant in tenants {
            let renewed = async {
                let database = self.provisioner.connect(tenant.placement()).await?;
                brokers::renew(tenant, &database, &self.bao).await
            };
            if let Err(error) = renewed.await {
                report.fail(&Subject::Tenant(Arc::clone(tenant)).to_string(), &error);
            }
        }
    }
}
