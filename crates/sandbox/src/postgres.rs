//! A real PostgreSQL server: made new, on loopback, passwords everywhere, gone afterwards.
//!
//! It refuses to run as root, so as root it runs as another account, in a folder of that
//! account's; where that account cannot run the programs (they lie below a closed folder), they
//! are copied first. Its superuser's password is random and known to the sandbox's folder only.
//! Everything that takes its durability away is right here: nothing in it must survive.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tokio::process::Command;

use crate::control::REGISTRY;
use crate::files;
use crate::login::Login;
use crate::ports::on_free_port;
use crate::process::{Part, Plan, Process, Processes};
use pgsilo_core::names::{Names, SEAL};
use pgsilo_core::secret::Secret;

/// Connections that only brokers, the provisioner and superusers may have.
pub(super) const RESERVED: u16 = 8;

/// What to run and how.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) programs: Option<PathBuf>,
    pub(super) max_connections: u16,
    /// Leased roles may log in as everybody else may, and not only by the socket.
    pub(super) leased_over_tcp: bool,
    /// A folder that any account may pass through.
    pub(super) runtime: PathBuf,
    pub(super) log: PathBuf,
}

/// A server that runs, and nothing of pgsilo in it.
#[derive(Debug)]
pub(super) struct Postgres {
    pub(super) process: Arc<Process>,
    pub(super) version: String,
    /// The folder of its programs, as found (not the copy).
    pub(super) programs: PathBuf,
    pub(super) superuser: Login,
    /// Where leased roles are let in: the folder of its socket, or a host.
    pub(super) admits_leased: String,
}

/// Who the server runs as when we are root.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

/// The programs, and the account they run as.
#[derive(Debug)]
struct Installation {
    programs: PathBuf,
    account: Option<Account>,
    runtime: PathBuf,
}

impl Installation {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.current_dir(&self.runtime).env("LC_ALL", "C");
        if let Some(account) = &self.account {
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    /// `18.4`, or why its account cannot run it.
    async fn version(&self) -> Result<String> {
        let output = self
            .command("postgres")
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .await
            .with_context(|| format!("running {}/postgres", self.programs.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_once("(PostgreSQL) ").map(|(_, version)| version);
        let version = version.and_then(|version| version.split_whitespace().next());
        version.map(str::to_owned).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            format!("{}/postgres does not run: {}", self.programs.display(), said.trim())
        })
    }

    /// Where its account cannot run the programs, goes on with a copy that it can.
    async fn made_runnable(mut self) -> Result<(Self, String)> {
        let failure = match self.version().await {
            Ok(version) => return Ok((self, version)),
            Err(error) if self.account.is_none() => return Err(error),
            Err(error) => error,
        };
        self.programs = copy_installation(&self.programs, &self.runtime.join("install"))?;
        match self.version().await {
            Ok(version) => Ok((self, version)),
            Err(_) => Err(failure),
        }
    }
}

impl Postgres {
    /// Where leased roles are let in, as a registry writes it.
    pub(super) fn endpoint(&self) -> String {
        let (place, port) = (&self.admits_leased, self.superuser.port);
        match place.starts_with('/') {
            true => format!("{place}/.s.PGSQL.{port}"),
            false => format!("{place}:{port}"),
        }
    }

    /// Has the databases and the registry say what a registry that is written by hand says where it does
    /// not say a seal: the tenant's id.
    pub(super) async fn seal_by_id(&self, tenants: &[Names]) -> Result<()> {
        let cluster = self.superuser.connect("postgres").await?;
        for tenant in tenants {
            let (database, id) = (tenant.database(), tenant.id());
            let seal = format!("ALTER DATABASE \"{database}\" SET {SEAL} = '{id}'");
            cluster.batch_execute(&seal).await?;
        }
        let registry = self.superuser.connect(REGISTRY).await?;
        Ok(registry.batch_execute("UPDATE pgsilo.placements SET seal = tenant").await?)
    }

    /// A password for the provisioner, which nobody logs in as otherwise: for a person who looks around,
    /// and for tests.
    pub(super) async fn let_provisioner_in(&self) -> Result<Login> {
        let user = "pgsilo_provisioner".to_owned();
        let provisioner = Login { user, password: Secret::random()?, ..self.superuser.clone() };
        let verifier = postgres_protocol::password::scram_sha_256(provisioner.password.expose());
        let order = format!("ALTER ROLE {} LOGIN PASSWORD '{verifier}'", provisioner.user);
        self.superuser.connect("postgres").await?.batch_execute(&order).await?;
        Ok(provisioner)
    }

    pub(super) async fn start(processes: &Processes, options: &Options) -> Result<Self> {
        let programs = find_programs(options.programs.as_deref())?;
        let installation = Installation {
            programs: programs.clone(),
            account: account()?,
            runtime: options.runtime.clone(),
        };
        let (installation, version) = installation.made_runnable().await?;
        let major: u32 =
            version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("").parse()?;
        ensure!(
            major >= 16,
            "PostgreSQL {version} in {} is too old: 16 or newer is needed where tenants share a \
             cluster; run scripts/tools.py to get one, or pass --pg-bin",
            programs.display()
        );
        let home = options.runtime.join("pg");
        files::make_dir(&home, 0o700)?;
        own(&home, &installation)?;
        let password = Secret::random()?;
        initialize(processes, &installation, options, &password).await?;
        let (process, superuser, _) = on_free_port(None, async |port| {
            let process = serve(processes, &installation, options, port)?;
            let superuser = superuser(port, &password);
            let ready = process.meanwhile(admitting(&superuser)).await;
            Ok((process, ready.map(|()| superuser)))
        })
        .await?;
        let admits_leased = match options.leased_over_tcp {
            true => superuser.host.clone(),
            false => home.to_string_lossy().into_owned(),
        };
        Ok(Self { process, version, programs, superuser, admits_leased })
    }
}

fn superuser(port: u16, password: &Secret) -> Login {
    Login {
        host: "127.0.0.1".to_owned(),
        port,
        user: "postgres".to_owned(),
        password: password.clone(),
    }
}

/// Waits until the server lets its superuser in.
async fn admitting(superuser: &Login) -> Result<()> {
    let poll = async {
        while superuser.connect("postgres").await.is_err() {
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), poll).await.context("nobody let in after 60 s")
}

async fn initialize(
    processes: &Processes,
    installation: &Installation,
    options: &Options,
    password: &Secret,
) -> Result<()> {
    let home = options.runtime.join("pg");
    let password_file = home.join("password");
    files::write_private(&password_file, password.expose_text()?)?;
    own(&password_file, installation)?;
    let mut command = installation.command("initdb");
    command
        .args(["--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C"])
        .args(["--no-sync", "--no-instructions", "--pgdata"])
        .arg(home.join("data"))
        .arg("--pwfile")
        .arg(&password_file);
    let initdb = processes.start(Plan {
        part: Part::Postgres,
        name: "initdb",
        command,
        log: options.log.clone(),
        stop: Signal::TERM,
        patience: Duration::from_secs(2),
    })?;
    let status = initdb.ended().await;
    files::remove(&password_file)?;
    if !status.is_some_and(|status| status.success()) {
        return Err(initdb.obituary(status));
    }
    // Both files are the server's own; writing over them keeps their owner and mode.
    let data = home.join("data");
    // Who has captured a leased credential is turned away before anything else. Here pgsilo has the
    // same address as everybody; but the socket is in a folder that no other account may enter.
    let elsewhere = if options.leased_over_tcp { "" } else { "host all /^tenant- all reject\n" };
    std::fs::write(
        data.join("pg_hba.conf"),
        format!(
            "local all all scram-sha-256\n{elsewhere}host all all 127.0.0.1/32 scram-sha-256\n"
        ),
    )?;
    let settings = format!(
        "listen_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nmax_connections = {}\n\
         reserved_connections = {RESERVED}\nmax_locks_per_transaction = 256\n\
         max_prepared_transactions = 0\ntemp_file_limit = '4GB'\n\
         fsync = off\nfull_page_writes = off\nsynchronous_commit = off\n\
         password_encryption = 'scram-sha-256'\ncluster_name = 'pgsilo-sandbox'\n\
         log_line_prefix = '%m [%p] %u@%d '\n",
        home.to_string_lossy().replace('\'', "''"),
        options.max_connections,
    );
    let path = data.join("postgresql.conf");
    let given = std::fs::read_to_string(&path)?;
    std::fs::write(&path, format!("{given}\n# the sandbox's\n{settings}"))?;
    Ok(())
}

fn serve(
    processes: &Processes,
    installation: &Installation,
    options: &Options,
    port: u16,
) -> Result<Arc<Process>> {
    let mut command = installation.command("postgres");
    command.arg("-D").arg(options.runtime.join("pg/data")).args(["-p", &port.to_string()]);
    processes.start(Plan {
        part: Part::Postgres,
        name: "PostgreSQL",
        command,
        log: options.log.clone(),
        // The "fast" shutdown: sessions are ended.
        stop: Signal::INT,
        patience: Duration::from_secs(10),
    })
}

// --- Programs and accounts ---------------------------------------------------------------

fn find_programs(options: Option<&Path>) -> Result<PathBuf> {
    let folder = match options {
        Some(folder) => folder.to_owned(),
        None => {
            let found = files::on_path("postgres").context(
                "no PostgreSQL: run scripts/tools.py and set PGSILO_PG_BIN to what it prints, or pass --pg-bin",
            )?;
            let found = found.canonicalize()?;
            found.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    for program in ["postgres", "initdb"] {
        ensure!(
            files::is_program(&folder.join(program)),
            "{} holds no program {program}",
            folder.display()
        );
    }
    Ok(folder.canonicalize()?)
}

/// `postgres` or else `nobody` when we are root; nobody but ourselves when we are not.
fn account() -> Result<Option<Account>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let accounts = std::fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
    match ["postgres", "nobody"].iter().find_map(|name| find_account(&accounts, name)) {
        Some(account) => Ok(Some(account)),
        None => bail!(
            "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it as"
        ),
    }
}

fn find_account(accounts: &str, name: &str) -> Option<Account> {
    accounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let account = Account {
            name: name.to_owned(),
            uid: fields.get(2)?.parse().ok()?,
            gid: fields.get(3)?.parse().ok()?,
        };
        (fields[0] == name && account.uid != 0).then_some(account)
    })
}

fn own(path: &Path, installation: &Installation) -> Result<()> {
    if let Some(account) = &installation.account {
        chown(path, Some(account.uid), Some(account.gid))
            .with_context(|| format!("giving {} to {}", path.display(), account.name))?;
    }
    Ok(())
}

/// Copies an installation (`.../PACKAGE/ROOT/bin`), and the shared libraries that a wheel keeps
/// beside it in `PACKAGE.libs`, so that relative paths between them hold.
fn copy_installation(programs: &Path, target: &Path) -> Result<PathBuf> {
    let parts = || {
        let root = programs.parent()?;
        let package = root.parent()?;
        Some((root, package, package.file_name()?, root.file_name()?))
    };
    let (root, package, package_name, root_name) = parts()
        .with_context(|| format!("{} is no installation's bin folder", programs.display()))?;
    let copy = target.join(package_name).join(root_name);
    for folder in ["bin", "lib", "share"] {
        if root.join(folder).is_dir() {
            files::copy_tree(&root.join(folder), &copy.join(folder))?;
        }
    }
    let mut libraries = package_name.to_owned();
    libraries.push(".libs");
    let beside = package.with_file_name(&libraries);
    if beside.is_dir() {
        files::copy_tree(&beside, &target.join(&libraries))?;
    }
    // `create_dir_all` made these with the caller's umask.
    for folder in [target, &target.join(package_name), &copy] {
        std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    Ok(copy.join("bin"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name_and_is_never_root() {
        let accounts =
            "root:x:0:0::/root:/bin/sh\nnobody2:x:7:7::/:\nnobody:x:65534:65533:n:/:\nbroken\n";
        let nobody = find_account(accounts, "nobody").unwrap();
        assert_eq!((nobody.uid, nobody.gid), (65534, 65533));
        assert_eq!(find_account(accounts, "root"), None);
        assert_eq!(find_account(accounts, "postgres"), None);
    }

    #[test]
    fn a_copied_installation_keeps_its_relative_paths() {
        let dir = files::make_unique_dir(&std::env::temp_dir(), 0o700).unwrap();
        for file in ["p/pg18/bin/postgres", "p/pg18/lib/x/y.so", "p.libs/z.so", "p/pg18/include/h"]
        {
            let path = dir.join("from").join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        let copy = copy_installation(&dir.join("from/p/pg18/bin"), &dir.join("to")).unwrap();
        assert_eq!(copy, dir.join("to/p/pg18/bin"));
        assert!(copy.join("../../../p.libs/z.so").is_file());
        assert!(copy.join("../lib/x/y.so").is_file());
        assert!(!copy.join("../include").exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
