//! Whoever looks, and mends: the provisioner, at OpenBAO and in each cluster of the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use futures_util::{StreamExt, stream};
use pgsilo::registry::{Placement, Registry, Tenant};

use super::mend::Mender;
use super::report::{Outcome, Report};
use super::verdict::Finding;
use super::{brokers, census, cluster, verdict};
use crate::bao::Bao;
use crate::postgres::Identity;

/// Subjects looked at at once.
const AT_ONCE: usize = 8;

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
    /// Of one of its tenants.
    placement: Placement,
    /// Its tenants' databases.
    databases: BTreeSet<String>,
    /// All tenants of the registry, wherever they are.
    tenants: BTreeSet<String>,
}

impl Subject {
    /// The clusters that the tenants are on, and the tenants.
    pub(super) fn all(chosen: Vec<Arc<Tenant>>, registry: &Registry) -> Vec<Subject> {
        let tenants: BTreeSet<_> =
            registry.snapshot().tenants().map(|tenant| tenant.id().as_str().to_owned()).collect();
        let mut clusters = BTreeMap::<String, (Placement, BTreeSet<String>)>::new();
        for tenant in &chosen {
            let placement = tenant.placement();
            let (_, databases) = clusters
                .entry(placement.host.to_string())
                .or_insert_with(|| (placement.clone(), BTreeSet::new()));
            databases.insert(placement.dbname.clone());
        }
        let clusters = clusters.into_values().map(|(placement, databases)| {
            let tenants = tenants.clone();
            Subject::Cluster(Arc::new(Cluster { placement, databases, tenants }))
        });
        // What a transaction that was prepared holds, no revocation gets.
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
            Subject::Cluster(cluster) => ("cluster", cluster.placement.host.to_string()),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = self.named();
        write!(f, "{kind} {name}")
    }
}

/// What was found of one subject.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) subject: Subject,
    pub(super) findings: Vec<Finding>,
}

/// Whoever may look, and mend.
#[derive(Debug)]
pub(super) struct Auditor {
    pub(super) provisioner: Identity,
    pub(super) bao: Bao,
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
        let census = census::take(tenant, &database, &self.bao).await?;
        let mut findings = census.findings;
        for group in census.groups {
            findings.extend(verdict::judge(group.roles, group.leases)?);
        }
        Ok(findings)
    }

    /// Reports what was confirmed; mends what still is so, if that is wanted: other subjects may
    /// have taken their time since.
    pub(super) async fn settle(&self, confirmed: Suspect, fix: bool, report: &mut Report) {
        if !fix {
            for finding in &confirmed.findings {
                report.tell(&confirmed.subject, finding, &Outcome::Left);
            }
            return;
        }
        let subject = confirmed.subject.clone();
        let Some(confirmed) = self.look_again(vec![confirmed], report).await.pop() else { return };
        let placement = subject.placement();
        let database = match self.provisioner.connect(placement).await {
            Ok(database) => database,
            Err(error) => return report.fail(&subject.to_string(), &error),
        };
        let (provisioner, bao) = (&self.provisioner, &self.bao);
        let mender = Mender { database: &database, placement, provisioner, bao };
        for finding in &confirmed.findings {
            let outcome = match mender.mend(finding).await {
                Ok(true) => Outcome::Mended,
                Ok(false) => Outcome::Left,
                Err(error) => Outcome::Failed(format!("{error:#}")),
            };
            report.tell(&subject, finding, &outcome);
        }
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
