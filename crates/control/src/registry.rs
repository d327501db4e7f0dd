//! `pgsiloctl registry`: makes the registry in a PostgreSQL database, brings it to the newest
//! version, and says how it is. `pgsiloctl apply`: makes it say what a file says.

pub mod apply;
pub(crate) mod check;
mod export;
pub mod grants;
pub mod locks;
mod policies;
mod rows;

use std::cmp::Ordering;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use pgsilo_core::registry::Host;
use pgsilo_core::secret::Secret;
use pgsilo_core::text::is_loggable;
use pgsilo_core::tls::{self, CaFile};
use pgsilo_openbao::Client as Bao;
use pgsilo_registry::connection::{self, Database, Login, Purpose, Session, Tls};
use pgsilo_registry::schema::{self, Tell};
use pgsilo_registry::status;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use crate::logins::{self, block_on};
use crate::settings::{RegistryLogin, RegistrySettings, SettingsFile};
use crate::{say, secrets};

/// How long a change is waited for that proxies should have within a second.
const IN_FORCE: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// What is done with the registry.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the registry in an empty database.
    ///
    /// Makes the schema pgsilo, and three roles that nobody logs in as: pgsilo_registry_owner owns
    /// it, pgsilo_registry_control may write what there is, pgsilo_registry_proxy may read what
    /// proxies read. Needs CREATE on the database, and CREATEROLE unless the roles are there.
    Init(Server),
    /// Bring the registry to this program's version.
    ///
    /// Each version is one transaction; one that failed is tried again by running this again. Two
    /// of these do not run at once: the second waits, and says for whom. Run it before proxies of
    /// the new version start: those of the version before can read the newer registry.
    Migrate(Server),
    /// Say which version the registry has, its revision, and which proxies are behind.
    Status {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    #[expect(missing_docs, reason = "it would replace the command's own text")]
    Check(check::Check),
    /// Write what the registry says as a file that a proxy can read, and `pgsiloctl apply`.
    ///
    /// Clusters, tenants with a placement, and certificates. Not grants, not locks: they are not what
    /// there is but who may use it.
    Export {
        /// The registry's.
        #[command(flatten)]
        server: Server,
        /// Write JSON instead of TOML.
        #[arg(long)]
        json: bool,
    },
}

/// Who changes the registry, for its audit. Whoever logs in can say anything here; the login itself is
/// written there, too.
#[derive(Debug, Args)]
pub struct Author {
    /// Who you are, for the registry's audit.
    #[arg(long, value_name = "NAME", env = "USER", default_value = "")]
    pub(crate) actor: String,
    /// Why, for the registry's audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) reason: String,
}

impl Author {
    pub(crate) async fn sign(&self, transaction: &Transaction<'_>) -> Result<()> {
        for (what, text) in [("--actor", &self.actor), ("--reason", &self.reason)] {
            if !text.is_empty() && !is_loggable(text) {
                bail!(
                    "{what} is not one line: 1 to 256 characters, none of them controls or marks of direction"
                );
            }
        }
        let sign =
            "SELECT set_config('pgsilo.actor', $1, true), set_config('pgsilo.reason', $2, true)";
        transaction
            .execute(sign, &[&self.actor, &self.reason])
            .await
            .context("signing the change")?;
        Ok(())
    }
}

/// Where the registry is, and who asks: as the file of settings says, or as these options do.
#[derive(Clone, Debug, Args)]
pub struct Server {
    /// The file of settings.
    #[command(flatten)]
    pub settings: SettingsFile,
    /// The database, as a libpq DSN: hosts, port, user, dbname; the password too, if this comes
    /// from the environment (a command line can be read by others) [default: as the file of settings
    /// says].
    #[arg(
        long,
        value_name = "DSN",
        env = "PGSILO_REGISTRY_DSN",
        hide_env_values = true,
        value_parser = secrets::secret
    )]
    dsn: Option<Secret>,
    /// A file that holds the password, if the DSN does not.
    #[arg(long, value_name = "FILE")]
    dsn_password_file: Option<PathBuf>,
    /// How the server's certificate is checked, of the DSN. A Unix socket has no TLS.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = TlsMode::VerifyFull)]
    tls: TlsMode,
    /// PEM of the authorities that it must chain to [default: the system's].
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// libpq's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    /// In clear: to this machine only.
    Disable,
    /// The certificate chains to the authorities.
    VerifyCa,
    /// And names the host.
    VerifyFull,
}

/// Runs `pgsiloctl apply` to its end.
pub fn run_apply(command: apply::Command) -> Result<ExitCode> {
    block_on(apply::run(command))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `pgsiloctl grant` to its end.
pub fn run_grant(command: grants::Command) -> Result<ExitCode> {
    block_on(grants::run(command))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `pgsiloctl lock` to its end.
pub fn run_lock(command: locks::Command) -> Result<ExitCode> {
    block_on(locks::run(command))?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the turn to write, and says for whom.
pub(crate) async fn take_turn(client: &mut Client) -> Result<Transaction<'_>> {
    // By its trigger: who may write may take it.
    let turn = "UPDATE pgsilo.tenants SET id = id WHERE false";
    let transaction = client.transaction().await?;
    transaction.batch_execute("SET LOCAL lock_timeout = '2s'; SAVEPOINT turn").await?;
    loop {
        match transaction.execute(turn, &[]).await {
            Ok(_none) => break,
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                transaction.batch_execute("ROLLBACK TO SAVEPOINT turn").await?;
                let holders = "SELECT string_agg(format('process %s of %s (%s)', a.pid, a.usename, a.application_name), ', ')
                    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                    WHERE l.relation = 'pgsilo.revision'::regclass AND l.granted AND l.mode <> 'AccessShareLock'
                        AND l.pid <> pg_backend_pid()";
                let holders: Option<String> = transaction.query_one(holders, &[]).await?.get(0);
                let holders = holders.unwrap_or_else(|| "somebody".to_owned());
                say::progress(&format!("waiting for {holders}, who writes to the registry"));
            }
            Err(error) => return Err(error).context("taking the turn to write"),
        }
    }
    transaction.batch_execute("RELEASE SAVEPOINT turn; SET LOCAL lock_timeout = 0").await?;
    Ok(transaction)
}

/// Waits until all proxies that are connected have read up to a revision, and says so; not for long.
pub(crate) async fn in_force(client: &Client, revision: i64) -> Result<()> {
    let began = Instant::now();
    loop {
        let proxies = status::status(client).await?.proxies;
        let is_behind = |proxy: &&status::Connected| proxy.revision.is_none_or(|at| at < revision);
        let behind: Vec<_> = proxies.iter().filter(is_behind).map(|proxy| &*proxy.name).collect();
        if proxies.is_empty() {
            say::progress(
                "no proxy is connected to the registry now; one that serves without keeps to what it has read",
            );
        } else if behind.is_empty() {
            say::progress(&format!(
                "in force at {}, after {:.1} s",
                if proxies.len() == 1 {
                    "the one proxy".to_owned()
                } else {
                    format!("all {} proxies", proxies.len())
                },
                began.elapsed().as_secs_f64()
            ));
        } else if began.elapsed() > IN_FORCE {
            bail!("it is written, and NOT in force yet at {}", behind.join(", "));
        } else {
            sleep(ASK_AGAIN).await;
            continue;
        }
        return Ok(());
    }
}

/// Runs the command to its end.
pub fn run(command: Command) -> Result<ExitCode> {
    block_on(async {
        match command {
            Command::Init(server) => {
                let mut session = server.connect().await?;
                let made = schema::init(&mut session.client, &Progress).await?;
                say::result(&format!("the registry is there, version {}", made.version));
            }
            Command::Migrate(server) => {
                let mut session = server.connect().await?;
                let now = schema::migrate(&mut session.client, &Progress).await?;
                say::result(&format!("the registry has version {}", now.version));
            }
            Command::Check(check) => return check::run(check).await,
            Command::Export { server, json } => export::run(&server, json).await?,
            Command::Status { server, json } => {
                let session = server.connect().await?;
                report(&status::status(&session.client).await?, json);
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

pub(crate) struct Progress;

impl Tell for Progress {
    fn tell(&self, line: &dyn std::fmt::Display) {
        say::progress(&line.to_string());
    }
}

impl Server {
    /// A connection to a registry that this program knows how to write.
    pub(crate) async fn open(&self) -> Result<Session> {
        known(self.connect().await?).await
    }
}

/// Of a registry that this program knows how to write.
pub(crate) async fn known(session: Session) -> Result<Session> {
    let there = schema::installed(&session.client).await?;
    let there = there.context("the database has no registry: run pgsiloctl registry init")?;
    match there.version.cmp(&schema::NEWEST) {
        Ordering::Less => bail!(
            "the registry has version {}, and this program writes version {}: run pgsiloctl registry migrate",
            there.version,
            schema::NEWEST
        ),
        Ordering::Equal => Ok(session),
        Ordering::Greater => bail!(
            "the registry has version {}, and this program knows {} at most: use a newer pgsiloctl",
            there.version,
            schema::NEWEST
        ),
    }
}

impl Server {
    /// Whether a command line says where it is, and not the file of settings.
    pub(crate) fn is_said(&self) -> bool {
        self.dsn.is_some()
    }

    /// A connection to a database that may have no registry.
    pub(crate) async fn connect(&self) -> Result<Session> {
        match &self.dsn {
            Some(dsn) => self.connect_by(dsn).await,
            None if self.settings.exists() => {
                let settings = self.settings.read()?;
                let bao = settings.bao()?;
                connect_as_set(&settings.registry, async || {
                    logins::log_in(&settings.provisioner, &bao).await
                })
                .await
            }
            None => bail!(
                "nothing says where the registry is: write {}, or set PGSILO_REGISTRY_DSN or --dsn",
                self.settings
            ),
        }
    }

    async fn connect_by(&self, dsn: &Secret) -> Result<Session> {
        // The parser's error may hold what it could not parse.
        let text = dsn;
        let dsn: tokio_postgres::Config = match text.expose_text().map(str::parse) {
            Ok(Ok(dsn)) => dsn,
            _ if text.expose_text().is_ok_and(|dsn| dsn.contains("sslmode")) => {
                bail!("--dsn has sslmode: say that by --tls, and sslrootcert by --ca")
            }
            _ => bail!("--dsn is not a DSN; write it like postgresql://user@host/dbname"),
        };
        let user = dsn.get_user().context("--dsn names no user")?.to_owned();
        let name = dsn.get_dbname().context("--dsn names no database")?.to_owned();
        let file = ("--dsn-password-file", self.dsn_password_file.as_ref());
        let password = secrets::password(("--dsn", &dsn), file)?;
        let hosts = hosts(&dsn)?;
        let tls = match self.tls {
            TlsMode::Disable => None,
            _ if hosts.iter().all(|host| matches!(host, Host::Unix(_))) => None,
            mode => Some(self.tls(mode)?),
        };
        // A server that was taken over would ask for the password itself.
        let channel_binding = tls.is_some();
        let database = Database { hosts, name, tls, channel_binding };
        log_in(&database, &Login { user, password }).await
    }

    fn tls(&self, mode: TlsMode) -> Result<Tls> {
        let mode = match mode {
            TlsMode::VerifyCa => tls::Mode::VerifyCa,
            TlsMode::VerifyFull | TlsMode::Disable => tls::Mode::VerifyFull,
        };
        let ca = self.ca.as_deref().map(CaFile::read).transpose()?;
        Ok(Tls { config: tls::client(mode, ca.as_ref())?, server_name: None })
    }
}

/// A connection to the registry that the file of settings names. `provisioner` logs in to OpenBAO, where
/// the login is leased.
pub(crate) async fn connect_as_set(
    registry: &RegistrySettings,
    provisioner: impl AsyncFnOnce() -> Result<Bao>,
) -> Result<Session> {
    let database = Database::of(&registry.servers.cluster, &registry.dbname);
    let login = match &registry.login {
        RegistryLogin::Lease { mount, role } => {
            let made = logins::lease(&provisioner().await?, mount, role).await;
            let made = made.context("a login at the registry")?;
            Login { user: made.username, password: made.password }
        }
        RegistryLogin::Password { user, file } => {
            Login { user: user.clone(), password: secrets::file(file)? }
        }
    };
    log_in(&database, &login).await
}

async fn log_in(database: &Database, login: &Login) -> Result<Session> {
    let purpose = Purpose {
        application_name: "pgsiloctl".to_owned(),
        options: "-c search_path=pg_catalog,pg_temp",
        server: connection::Server::Primary(None),
    };
    let connected = connection::connect(database, login, &purpose).await;
    connected.with_context(|| format!("logging in to the registry as {}", login.user))
}

fn hosts(dsn: &tokio_postgres::Config) -> Result<Vec<Host>> {
    let ports = dsn.get_ports();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(5432);
    let hosts = dsn.get_hosts().iter().enumerate().map(|(index, host)| match host {
        tokio_postgres::config::Host::Tcp(host) => {
            Host::Tcp { host: host.clone(), port: port(index) }
        }
        tokio_postgres::config::Host::Unix(folder) => {
            Host::Unix(folder.join(format!(".s.PGSQL.{}", port(index))))
        }
    });
    let hosts: Vec<_> = hosts.collect();
    match hosts.is_empty() {
        true => bail!("--dsn names no host"),
        false => Ok(hosts),
    }
}

fn report(status: &status::Status, as_json: bool) {
    let status::Status { version, revision, tenants, grants, locks, audit, proxies } = status;
    if as_json {
        let proxies: Vec<_> = proxies
            .iter()
            .map(|proxy| json!({ "name": proxy.name, "revision": proxy.revision }))
            .collect();
        let status = json!({
            "version": version, "newest_version": schema::NEWEST, "revision": revision,
            "tenants": tenants, "grants": grants, "locks": locks, "proxies": proxies,
            "audit": audit.as_ref().map(|(number, hash)| json!({ "number": number, "hash": hash })),
        });
        return say::result(&status.to_string());
    }
    let newest = match version.cmp(&schema::NEWEST) {
        Ordering::Less => ": pgsiloctl registry migrate brings it to the newest",
        Ordering::Equal => "",
        Ordering::Greater => ", which is newer than this program",
    };
    say::result(&format!("version   {version}{newest}"));
    say::result(&format!("revision  {revision}"));
    say::result(&format!("tenants   {tenants}, grants {grants}, locks {locks}"));
    if let Some((number, hash)) = audit {
        say::result(&format!("audit     {number} rows, the last one's hash {hash}"));
    }
    for proxy in proxies {
        let behind = match proxy.revision {
            Some(at) if at >= *revision => "current".to_owned(),
            Some(at) => format!("at revision {at}, {} behind", revision - at),
            None => "has read nothing yet".to_owned(),
        };
        say::result(&format!("proxy     {}  {behind}", proxy.name));
    }
    if proxies.is_empty() {
        say::result("no proxy is connected");
    }
}
