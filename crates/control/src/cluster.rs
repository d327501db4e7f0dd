//! A cluster as the control plane knows it: how it is reached from here, and by OpenBAO.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use pgsilo_core::host::is_loopback;
use pgsilo_core::registry::document::{ClusterEntry, TlsEntry, TlsMode};
use pgsilo_core::registry::{Cluster, EntryError, Host, Placement};
use tokio_postgres::GenericClient;
use tokio_postgres::types::Json;

/// One that is in the registry, or is the registry's own.
#[derive(Clone, Debug)]
pub struct KnownCluster {
    /// As everybody but OpenBAO reaches it.
    pub cluster: Arc<Cluster>,
    /// Its name, or what it is.
    pub name: String,
    /// With its authorities' text in it.
    tls: TlsEntry,
    /// As OpenBAO reaches it.
    openbao_endpoints: Vec<Host>,
    /// Where those were said, and are not just `cluster`'s.
    has_own_endpoints: bool,
}

impl KnownCluster {
    /// Takes what is written of it; a file that it names is read, of which `resolve` says where it is.
    ///
    /// # Errors
    /// When it is not acceptable.
    pub fn read(
        mut entry: ClusterEntry,
        openbao_endpoints: Option<Vec<String>>,
        resolve: &dyn Fn(&Path) -> PathBuf,
    ) -> Result<KnownCluster, EntryError> {
        let name = entry.name.clone();
        if let Some(tls) = &mut entry.tls
            && let Some(path) = tls.ca.take()
        {
            let wrong = |what| EntryError { field: "tls.ca".to_owned(), what, because: None };
            let path = resolve(&path);
            let pem = std::fs::read_to_string(&path)
                .map_err(|error| wrong(format!("cannot read {}: {error}", path.display())))?;
            if pem.contains("PRIVATE KEY") {
                return Err(wrong(format!("{} has a private key in it", path.display())));
            }
            tls.ca_pem = Some(pem);
        }
        let tls = entry.tls.clone().unwrap_or_default();
        let cluster = Cluster::read(entry, resolve)?;
        let has_own_endpoints = openbao_endpoints.is_some();
        let openbao_endpoints = match openbao_endpoints {
            None => cluster.endpoints.to_vec(),
            Some(all) => all.iter().map(|text| Host::read(text)).collect::<Result<_, _>>()?,
        };
        Ok(KnownCluster { cluster, name, tls, openbao_endpoints, has_own_endpoints })
    }

    /// All that the registry has, by name.
    ///
    /// # Errors
    /// When they cannot be read, or one is not acceptable.
    pub async fn all(registry: &impl GenericClient) -> Result<Vec<KnownCluster>> {
        let all = "SELECT p.entry, c.openbao_endpoints FROM pgsilo.proxy_clusters p
            JOIN pgsilo.clusters c ON c.name = p.name ORDER BY p.name";
        let rows = registry.query(all, &[]).await.context("reading the clusters")?;
        let read = |row: &tokio_postgres::Row| {
            let Json(entry): Json<ClusterEntry> = row.try_get(0)?;
            let name = entry.name.clone();
            let known = KnownCluster::read(entry, row.try_get(1)?, &|path| path.to_owned());
            known.with_context(|| format!("cluster {name}"))
        };
        rows.iter().map(read).collect()
    }

    /// One of its databases.
    pub fn placement(&self, dbname: &str) -> Placement {
        Placement::in_cluster(&self.cluster, dbname)
    }

    /// How OpenBAO logs in to one of its databases: what takes writes, of several servers, the usual
    /// primary last, because it takes the first that will do.
    ///
    /// # Errors
    /// When OpenBAO could not check whom it talks to.
    pub fn connection_url(&self, dbname: &str) -> Result<String> {
        let servers = self.servers()?;
        // A socket has no TLS to go by.
        let is_local = |host: &Host| matches!(host, Host::Tcp { host, .. } if is_loopback(host));
        let by_socket = matches!(&*self.cluster.endpoints, [Host::Unix(_)]);
        let mode = match self.tls.mode {
            _ if by_socket && self.openbao_endpoints.iter().all(is_local) => "disable",
            TlsMode::Disable => "disable",
            TlsMode::Require => "require",
            TlsMode::VerifyCa => "verify-ca",
            TlsMode::VerifyFull => "verify-full",
        };
        ensure!(
            self.tls.server_name.is_none() || self.has_own_endpoints,
            "cluster {} has tls.server_name, which OpenBAO cannot check: say by openbao_endpoints how it \
             reaches the servers by the names of their certificates",
            self.name
        );
        let follows = match self.openbao_endpoints.len() {
            1 => "",
            _ => "&target_session_attrs=read-write&connect_timeout=1",
        };
        Ok(format!(
            "postgresql://{{{{username}}}}:{{{{password}}}}@{servers}/{dbname}?sslmode={mode}{follows}"
        ))
    }

    /// What the provisioner may write as a `connection_url` of this cluster: all its databases.
    ///
    /// # Errors
    /// When OpenBAO cannot reach it.
    pub fn url_pattern(&self) -> Result<String> {
        Ok(format!("postgresql://{{{{username}}}}:{{{{password}}}}@{}/*", self.servers()?))
    }

    fn servers(&self) -> Result<String> {
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        if self.openbao_endpoints.iter().any(is_socket) {
            bail!(
                "OpenBAO cannot reach cluster {} by a socket: give it openbao_endpoints",
                self.name
            );
        }
        let servers = self.openbao_endpoints.iter().rev().map(Host::to_string);
        Ok(servers.collect::<Vec<_>>().join(","))
    }

    /// The authorities that OpenBAO checks its servers by; `None`: the system's, or none.
    pub fn tls_ca(&self) -> Option<&str> {
        self.tls.ca_pem.as_deref()
    }

    /// How its connections are protected, as the registry has it.
    pub fn tls(&self) -> &TlsEntry {
        &self.tls
    }
}
