//! Connections to the databases that a registry names, protected as their placements say.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::future::try_join_all;
use pgsilo_core::registry::{Cluster, ClusterKey, Placement};
use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client as Bao, Credential};
use pgsilo_registry::connection::{self, ConnectError, Database, Login, Purpose, Server};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::{logins, secrets};

/// A session works inside databases where tenants may make things, some of it as their brokers:
/// nothing of theirs is found by an unqualified name, and nothing is waited for without end.
pub(crate) const SETTINGS: &str = "-c search_path=pg_catalog,pg_temp -c statement_timeout=30s";

/// How long a standby may take until it knows a login.
const REPLAYED: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// As whom databases are logged in to.
#[derive(Clone, Debug)]
pub(crate) enum Identity {
    /// A role that logs in by the same password, whatever the server.
    Password { user: String, password: Secret },
    /// One that OpenBAO makes at each cluster, for this process.
    Leased(Arc<LeasedLogins>),
}

/// Logins that OpenBAO has made, one for each cluster: they end with this process.
#[derive(Debug)]
pub(crate) struct LeasedLogins {
    bao: Bao,
    /// Where the database engine is, which has a role for each cluster.
    mount: String,
    made: Mutex<HashMap<String, Arc<OnceCell<Login>>>>,
}

impl LeasedLogins {
    /// Whoever holds this token asks for them.
    pub(crate) fn of(bao: &Bao, mount: &str) -> LeasedLogins {
        LeasedLogins { bao: bao.clone(), mount: mount.to_owned(), made: Mutex::default() }
    }

    async fn at(&self, cluster: &Cluster) -> Result<Login> {
        let ClusterKey::Named(name) = cluster.key() else {
            bail!(
                "the server {cluster} is in no cluster of the registry: OpenBAO makes no login for it"
            );
        };
        let made = {
            let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(name.to_string()).or_default())
        };
        let lease = async || {
            let Credential { username: user, password, .. } =
                logins::lease(&self.bao, &self.mount, name).await?;
            anyhow::Ok(Login { user, password })
        };
        let login = made.get_or_try_init(lease).await.with_context(|| {
            format!("a login at cluster {name}, as pgsiloctl bootstrap cluster {name} makes them")
        })?;
        Ok(login.clone())
    }
}

impl Identity {
    /// The user of a DSN, with its password or that of a file; each with the option that says it.
    pub(crate) fn by_dsn(
        (option, dsn): (&str, &Secret),
        file: (&str, Option<&PathBuf>),
    ) -> Result<Identity> {
        // The parser's error may hold what it could not parse.
        let dsn: tokio_postgres::Config = match dsn.expose_text().map(str::parse) {
            Ok(Ok(dsn)) => dsn,
            _ => bail!("{option} is not a DSN; write it like postgresql://user@host"),
        };
        let user = dsn.get_user().with_context(|| format!("{option} names no user"))?.to_owned();
        let password = secrets::password((option, &dsn), file)?;
        Ok(Identity::Password { user, password })
    }

    /// A connection to a placement's database; it closes when the client is dropped. Of several
    /// servers, to the one that takes writes.
    pub(crate) async fn connect(&self, placement: &Placement) -> Result<Client> {
        let database = Database::of(&placement.cluster, &placement.dbname);
        let server = database.writer(None);
        self.connect_to(database, server, placement).await
    }

    /// Connections to the same database at each of its cluster's servers, whatever they are.
    pub(crate) async fn connect_to_each(&self, placement: &Placement) -> Result<Vec<Client>> {
        let database = Database::of(&placement.cluster, &placement.dbname);
        let each = database.hosts.iter().map(|host| {
            let database = Database { hosts: vec![host.clone()], ..database.clone() };
            let connected = self.connect_to(database, Server::Any, placement);
            async move { connected.await.with_context(|| format!("the server {host}")) }
        });
        try_join_all(each).await
    }

    async fn connect_to(
        &self,
        mut database: Database,
        server: Server,
        placement: &Placement,
    ) -> Result<Client> {
        let purpose =
            Purpose { application_name: "pgsiloctl".to_owned(), options: SETTINGS, server };
        let login = match self {
            Identity::Password { user, password } => {
                Login { user: user.clone(), password: password.clone() }
            }
            Identity::Leased(logins) => logins.at(&placement.cluster).await?,
        };
        // Whatever the registry lets proxies answer: these logins are not for a server to ask for.
        database.channel_binding = database.tls.is_some();
        let began = Instant::now();
        let mut session = connection::connect(&database, &login, &purpose).await;
        // A standby has a login that was just made when it has replayed that.
        while let (Err(ConnectError::Postgres(error)), Identity::Leased(_), Server::Any) =
            (&session, self, server)
            && error.code() == Some(&SqlState::INVALID_PASSWORD)
            && began.elapsed() < REPLAYED
        {
            sleep(ASK_AGAIN).await;
            session = connection::connect(&database, &login, &purpose).await;
        }
        let session = match session {
            Err(ConnectError::InClear) => {
                bail!("its placement has no TLS, and this identity is not for a network to read")
            }
            session => {
                session.with_context(|| format!("logging in to {placement} as {}", login.user))?
            }
        };
        Ok(session.client)
    }
}
