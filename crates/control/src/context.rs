//! What a command that changes tenants works with: the registry, and the provisioner's logins to OpenBAO and
//! to the clusters.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use pgsilo_openbao::Client as Bao;
use pgsilo_registry::connection::Session;

use crate::bootstrap::PROVISIONER_MOUNT;
use crate::cluster::KnownCluster;
use crate::logins;
use crate::postgres::{Identity, LeasedLogins};
use crate::registry::{Server, connect_as_set, known};
use crate::settings::Settings;

/// The provisioner at work.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) bao: Bao,
    pub(crate) identity: Identity,
    pub(crate) registry: Session,
    pub(crate) clusters: Vec<KnownCluster>,
}

impl Context {
    /// Logs in to OpenBAO and to the registry.
    pub(crate) async fn open(server: &Server) -> Result<Context> {
        let settings = server.settings.read()?;
        let bao = logins::log_in(&settings.provisioner, &settings.bao()?).await?;
        let registry = match server.is_said() {
            true => server.open().await?,
            false => {
                known(connect_as_set(&settings.registry, async || Ok(bao.clone())).await?).await?
            }
        };
        let clusters = KnownCluster::all(&registry.client).await?;
        let identity = Identity::Leased(Arc::new(LeasedLogins::of(&bao, PROVISIONER_MOUNT)));
        Ok(Context { settings, bao, identity, registry, clusters })
    }

    /// A cluster of the registry.
    pub(crate) fn cluster(&self, name: &str) -> Result<&KnownCluster> {
        let found = self.clusters.iter().find(|cluster| cluster.name == name);
        found.with_context(|| {
            let all: Vec<_> = self.clusters.iter().map(|cluster| &*cluster.name).collect();
            format!("the registry has no cluster {name}; it has {}", all.join(", "))
        })
    }
}
