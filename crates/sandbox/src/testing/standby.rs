//! A standby of a sandbox's PostgreSQL: streams from it, and can be promoted. And what can be done to
//! the sandbox's own server beside it. It is killed, and its files go, when it is dropped.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use super::bao::free_port;
use super::eventually;
use super::world::World;

/// One standby.
#[derive(Debug)]
pub struct Standby {
    child: Child,
    data: PathBuf,
    port: u16,
    superuser: Config,
}

impl Standby {
    /// Makes one of what a sandbox's server has, and waits until it lets in.
    pub async fn of(world: &World) -> Standby {
        let primary = Path::new("/proc").join(world.var("PG_PID"));
        let data = data_of(&primary);
        let hba = data.join("pg_hba.conf");
        let rules = fs::read_to_string(&hba).expect("read");
        if !rules.contains("host replication") {
            let rules = rules + "host replication all 127.0.0.1/32 scram-sha-256\n";
            fs::write(&hba, rules).expect("written");
        }
        let reload = "SELECT pg_reload_conf()";
        world.superuser("postgres").await.query_one(reload, &[]).await.expect("reloaded");
        let superuser: Config = world.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
        let [Host::Tcp(host)] = superuser.get_hosts() else { panic!("one host by TCP") };
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let copy = data.with_file_name(format!("standby-{number}"));
        let (user, password) = (superuser.get_user(), superuser.get_password());
        let made = Command::new(world.pg_program("pg_basebackup"))
            .args(["-h", host, "-p", &superuser.get_ports()[0].to_string(), "-R", "-c", "fast"])
            .args(["-U", user.expect("a user"), "-D"])
            .arg(&copy)
            .env("PGPASSWORD", std::str::from_utf8(password.expect("one")).expect("text"))
            .status();
        assert!(made.expect("pg_basebackup runs").success());
        let owner = fs::metadata(&data).expect("the primary's folder");
        give(&copy, &owner);
        let port = free_port();
        let program = fs::read_link(primary.join("exe")).expect("the primary's program");
        let mut command = Command::new(program);
        command.arg("-D").arg(&copy).args([
            "-p",
            &port.to_string(),
            "-c",
            "unix_socket_directories=",
        ]);
        command.env("LC_ALL", "C").current_dir("/").stdout(Stdio::null()).stderr(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        let child = command.spawn().expect("the standby starts");
        let mut superuser_there = Config::new();
        superuser_there
            .host(host)
            .port(port)
            .user(user.expect("a user"))
            .password(password.expect("a password"))
            .dbname("postgres");
        let standby = Standby { child, data: copy, port, superuser: superuser_there };
        eventually("the standby to let in", async || standby.try_superuser("postgres").await).await;
        standby
    }

    /// Where it listens, at 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A superuser's connection to a database there.
    pub async fn superuser(&self, dbname: &str) -> tokio_postgres::Client {
        self.try_superuser(dbname).await.expect("the superuser logs in")
    }

    async fn try_superuser(&self, dbname: &str) -> Option<tokio_postgres::Client> {
        let mut config = self.superuser.clone();
        let (client, connection) =
            config.dbname(dbname).connect(tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// Waits until it has replayed what its primary has written so far.
    pub async fn catch_up(&self, world: &World) {
        let primary = world.superuser("postgres").await;
        // What is not on its disk yet is not sent, either.
        let written = "SELECT pg_current_wal_insert_lsn()::text";
        let written: String = primary.query_one(written, &[]).await.expect("asked").get(0);
        let here = self.superuser("postgres").await;
        let replayed = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
        eventually("the standby to catch up", async || {
            let row = here.query_one(replayed, &[&written]).await.expect("asked");
            row.get::<_, bool>(0).then_some(())
        })
        .await;
    }

    /// Makes it a primary, and waits until it is one.
    pub async fn promote(&self) {
        let promote = "SELECT pg_promote()";
        let promoted = self.superuser("postgres").await.query_one(promote, &[]).await;
        assert!(promoted.expect("promoted").get::<_, bool>(0));
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.child);
        let _gone = kill_process(pid, Signal::QUIT);
        let _status = self.child.wait();
        let _removed = fs::remove_dir_all(&self.data);
    }
}

/// All processes of a sandbox's PostgreSQL stand still, until this is dropped: whoever connects gets no
/// answer, nor does who is connected.
#[derive(Debug)]
pub struct Frozen(Vec<Pid>);

impl Frozen {
    /// Freezes it.
    pub fn of(world: &World) -> Frozen {
        let main: i32 = world.var("PG_PID").parse().expect("a pid");
        let mut frozen = Vec::new();
        // First the one that starts others.
        let mut pids = vec![main];
        while let Some(pid) = pids.pop() {
            let process = Pid::from_raw(pid).expect("a pid");
            if kill_process(process, Signal::STOP).is_ok() {
                frozen.push(process);
            }
            if pid == main {
                let children = fs::read_to_string(format!("/proc/{main}/task/{main}/children"));
                let children = children.expect("its processes");
                pids.extend(
                    children.split_whitespace().map(|pid| pid.parse::<i32>().expect("a pid")),
                );
            }
        }
        Frozen(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for process in &self.0 {
            let _ended_meanwhile = kill_process(*process, Signal::CONT);
        }
    }
}

/// What `postgres -D` was told.
fn data_of(process: &Path) -> PathBuf {
    let command = fs::read(process.join("cmdline")).expect("the primary runs");
    let mut arguments = command.split(|byte| *byte == 0).skip_while(|argument| argument != b"-D");
    let data = arguments.nth(1).expect("-D and a folder");
    PathBuf::from(std::str::from_utf8(data).expect("text"))
}

/// Gives a folder, and all that is in it, to who has the other.
fn give(path: &Path, owner: &fs::Metadata) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    chown(path, Some(owner.uid()), Some(owner.gid())).expect("given");
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).expect("a folder") {
            give(&entry.expect("an entry").path(), owner);
        }
    }
}
