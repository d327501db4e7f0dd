//! What every contender stands on: one sandbox, whose PostgreSQL speaks TLS as well, with pgbench's
//! tables in acme's database, and clients that speak TLS.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::raw::ssl_request;
use pgsilo_sandbox::testing::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The role of those that do not lease one.
pub(crate) const ROLE: &str = "bench";
pub(crate) const PASSWORD: &str = "for-benchmarks-on-loopback-only";
/// The database of tenant acme.
pub(crate) const DATABASE: &str = "tenant_acme";

/// A running sandbox, prepared.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) world: World,
    clients: PathBuf,
    pub(crate) server: String,
    /// What the server takes at most.
    pub(crate) connections: usize,
}

impl Testbed {
    /// Starts it, big enough for this many idle sessions of a contender.
    pub(crate) async fn start(idle: usize) -> Testbed {
        let connections = idle + 200;
        let server = variable("PGSILO_POSTGRES_TLS");
        let bin = format!("{server}/bin");
        let limit = connections.to_string();
        // By the same way as everybody else: pgsilo's way to the database is TCP here, too.
        let arguments =
            ["--without-proxy", "--leased-over-tcp", "--pg-bin", &bin, "--max-connections", &limit];
        let world = World::start("bench", &arguments);
        let clients = PathBuf::from(variable("PGSILO_PGBENCH_BIN"));
        let server = said(Command::new(format!("{bin}/postgres")).arg("--version"));
        let testbed = Testbed { world, clients, server, connections };
        testbed.prepare().await;
        testbed
    }

    async fn prepare(&self) {
        let superuser = self.world.superuser(DATABASE).await;
        let text = |name: &str| fs::read_to_string(self.world.dir().join(name)).expect("read");
        // Written by the server itself, so that they are its own.
        let data: String =
            superuser.query_one("SHOW data_directory", &[]).await.expect("told").get(0);
        for name in ["server.crt", "server.key"] {
            let sql = format!(
                "COPY (SELECT unnest(string_to_array('{}', E'\\n'))) TO '{data}/{name}'",
                text(name).trim_end()
            );
            superuser.batch_execute(&sql).await.expect("written");
            let private = fs::Permissions::from_mode(0o600);
            fs::set_permissions(Path::new(&data).join(name), private).expect("made private");
        }
        for sql in ["ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()"] {
            superuser.batch_execute(sql).await.expect("set");
        }
        eventually("the server to speak TLS", async || {
            let mut tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port())).await.ok()?;
            tcp.write_all(&ssl_request()).await.ok()?;
            (tcp.read_u8().await.ok()? == b'S').then_some(())
        })
        .await;
        let role = format!("CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'");
        superuser.batch_execute(&role).await.expect("made");
        let dsn = self.world.var("PG_SUPERUSER_DSN");
        let server = dsn.strip_suffix("postgres").expect("a DSN of the database postgres");
        let mut pgbench = self.program("pgbench");
        pgbench.args(["--initialize", "--quiet", "--scale", "10"]);
        said(pgbench.arg(format!("{server}{DATABASE}")));
        let grants = "GRANT CONNECT ON DATABASE tenant_acme TO bench;
            GRANT USAGE ON SCHEMA public TO PUBLIC;
            GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC;
            CREATE UNLOGGED TABLE copied (text text);
            GRANT ALL ON copied TO PUBLIC";
        superuser.batch_execute(grants).await.expect("granted");
    }

    /// A client program that speaks TLS.
    pub(crate) fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.clients.join(name));
        command.env("LC_ALL", "C").env("PGOPTIONS", "").env("PGSSLROOTCERT", self.ca());
        command
    }

    /// Waits until no client has a session any more, nor a pool.
    pub(crate) async fn quiet(&self) {
        let superuser = self.world.superuser("postgres").await;
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity \
             WHERE usename = '{ROLE}' OR usename LIKE 'tenant-acme-rw-%'"
        );
        eventually("every session to be gone", async || {
            let left: i64 = superuser.query_one(&sql, &[]).await.expect("told").get(0);
            (left == 0).then_some(())
        })
        .await;
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.world.dir().join("ca.crt")
    }

    pub(crate) fn port(&self) -> u16 {
        self.world.var("PG_PORT").parse().expect("a port")
    }
}

/// What `make bench` has told.
pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("run `make bench`: it sets {name}"))
}

/// What a program writes on its standard output; its failure is ours.
pub(crate) fn said(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("it starts");
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {stdout}{}", String::from_utf8_lossy(&stderr));
    stdout.trim_end().to_owned()
}

/// The first line of what a program says of its version, wherever it says it.
pub(crate) fn version(program: &Path, flag: &str) -> String {
    let output = Command::new(program).arg(flag).output().expect("it starts");
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
}
