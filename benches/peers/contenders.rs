//! Those that are measured: a direct connection, HAProxy, PgBouncer, and pgsilo.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pgsilo_sandbox::testing::bao::free_port;
use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, TLS, folder};

use crate::stand_in;
use crate::testbed::{DATABASE, PASSWORD, ROLE, Testbed, version};

/// Threads of HAProxy and event loops of pgsilo: one for each processor. PgBouncer has one.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Someone that a client can connect to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) tls: bool,
    /// What is measured of it besides the client's view; `None` for a direct connection.
    pub(crate) pid: Option<u32>,
    takes_token: bool,
}

impl Contender {
    pub(crate) fn is_pgsilo(&self) -> bool {
        self.takes_token
    }

    pub(crate) fn dbname(&self) -> &'static str {
        if self.takes_token { "acme" } else { DATABASE }
    }

    pub(crate) fn user(&self) -> &'static str {
        if self.takes_token { "app" } else { ROLE }
    }

    /// A token is good for ten minutes: asked for anew whenever it is used.
    pub(crate) fn password(&self, testbed: &Testbed) -> String {
        match self.takes_token {
            true => mint::token_of(&testbed.world, "acme"),
            false => PASSWORD.to_owned(),
        }
    }

    /// The same as a connection string of libpq.
    pub(crate) fn conninfo(&self, testbed: &Testbed) -> String {
        format!(
            "host={} port={} user={} dbname={} password={} sslmode={} sslrootcert={}",
            self.address.ip(),
            self.address.port(),
            self.user(),
            self.dbname(),
            self.password(testbed),
            self.sslmode(),
            testbed.ca().display()
        )
    }

    fn sslmode(&self) -> &'static str {
        if self.tls { "verify-full" } else { "disable" }
    }

    /// Tells a libpq program whom to connect to.
    pub(crate) fn told(&self, command: &mut Command, testbed: &Testbed) {
        command
            .env("PGHOST", self.address.ip().to_string())
            .env("PGPORT", self.address.port().to_string())
            .env("PGUSER", self.user())
            .env("PGDATABASE", self.dbname())
            .env("PGPASSWORD", self.password(testbed))
            .env("PGSSLMODE", self.sslmode());
    }
}

/// All of them, running.
#[derive(Debug)]
pub(crate) struct Contenders {
    pub(crate) direct: Contender,
    pub(crate) direct_tls: Contender,
    pub(crate) haproxy: Contender,
    pub(crate) pgbouncer: Contender,
    pub(crate) pgbouncer_tls: Contender,
    pub(crate) pgsilo: Contender,
    pub(crate) pgsilo_tls: Contender,
    /// With connections that are ready, as by default; the others make each when it is asked for.
    pub(crate) prewarm: Contender,
    pub(crate) prewarm_tls: Contender,
    /// With connections that serve one session after the other (`pool.reuse = "reset"`).
    pub(crate) reuse: Contender,
    pub(crate) reuse_tls: Contender,
    pub(crate) versions: Vec<String>,
    proxy: Proxy,
    _prewarm_proxy: Proxy,
    _reuse_proxy: Proxy,
    _peers: [Peer; 2],
}

/// A peer's process and its folder.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Child,
    dir: PathBuf,
    port: u16,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _waited = self.child.wait();
        let _gone = fs::remove_dir_all(&self.dir);
    }
}

impl Peer {
    /// Starts its program and waits until it listens.
    pub(crate) async fn start(mut command: Command, dir: PathBuf, port: u16) -> Peer {
        let log = fs::File::create(dir.join("log")).expect("made");
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut peer = Peer { child, dir, port };
        eventually(&name, async || {
            if let Some(status) = peer.child.try_wait().expect("waited") {
                let log = fs::read_to_string(peer.dir.join("log")).unwrap_or_default();
                panic!("{name} ended with {status}: {log}");
            }
            TcpStream::connect(local(port)).ok()
        })
        .await;
        peer
    }

    pub(crate) fn contender(&self, name: &'static str, tls: bool) -> Contender {
        let pid = Some(self.child.id());
        Contender { name, address: local(self.port), tls, pid, takes_token: false }
    }
}

impl Contenders {
    pub(crate) async fn start(testbed: &Testbed) -> Contenders {
        let haproxy = haproxy(testbed.port(), testbed.connections).await;
        let pgbouncer = pgbouncer(testbed).await;
        let proxy = Proxy::of(&testbed.world, settings(testbed.connections)).await;
        let [plain, tls] = proxy.addresses()[..] else { panic!("two listeners") };
        let by_default = Settings { pool: String::new(), ..settings(testbed.connections) };
        let prewarm_proxy = Proxy::of(&testbed.world, by_default).await;
        let [prewarm_plain, prewarm_tls] = prewarm_proxy.addresses()[..] else {
            panic!("two listeners")
        };
        let reusing = Settings {
            pool: "max_idle_per_tenant = 16\nreuse = \"reset\"\n".to_owned(),
            ..settings(testbed.connections)
        };
        let reuse_proxy = Proxy::of(&testbed.world, reusing).await;
        let [reuse_plain, reuse_tls] = reuse_proxy.addresses()[..] else { panic!("two listeners") };
        let database = local(testbed.port());
        Contenders {
            direct: direct_at(database, false),
            direct_tls: direct_at(database, true),
            haproxy: haproxy.contender("HAProxy", false),
            pgbouncer: pgbouncer.contender("PgBouncer", false),
            pgbouncer_tls: pgbouncer.contender("PgBouncer", true),
            pgsilo: pgsilo_at("pgsilo", plain, false, &proxy),
            pgsilo_tls: pgsilo_at("pgsilo", tls, true, &proxy),
            prewarm: pgsilo_at("pgsilo prewarm", prewarm_plain, false, &prewarm_proxy),
            prewarm_tls: pgsilo_at("pgsilo prewarm", prewarm_tls, true, &prewarm_proxy),
            reuse: pgsilo_at("pgsilo reuse", reuse_plain, false, &reuse_proxy),
            reuse_tls: pgsilo_at("pgsilo reuse", reuse_tls, true, &reuse_proxy),
            versions: vec![
                testbed.server.clone(),
                version(Path::new("haproxy"), "-v"),
                version(Path::new("pgbouncer"), "--version"),
                format!("pgsilo {}", env!("CARGO_PKG_VERSION")),
            ],
            proxy,
            _prewarm_proxy: prewarm_proxy,
            _reuse_proxy: reuse_proxy,
            _peers: [haproxy, pgbouncer],
        }
    }

    /// In clear, the direct connection first.
    pub(crate) fn plain(&self) -> [Contender; 4] {
        [self.direct, self.haproxy, self.pgbouncer, self.pgsilo]
    }

    /// With a client that speaks TLS. HAProxy cannot: it does not know the SSLRequest.
    pub(crate) fn tls(&self) -> [Contender; 3] {
        [self.direct_tls, self.pgbouncer_tls, self.pgsilo_tls]
    }

    /// The pgsilo that is measured.
    pub(crate) fn proxy(&self) -> &Proxy {
        &self.proxy
    }
}

/// Those that many sessions can be held through, in front of a stand-in for a database, and for
/// pgsilo one for OpenBAO: PostgreSQL makes a role the slower, the more of a tenant there are.
#[derive(Debug)]
pub(crate) struct Many {
    pub(crate) direct: Contender,
    pub(crate) haproxy: Contender,
    pub(crate) pgsilo: Contender,
    _proxy: Proxy,
    _peer: Peer,
}

impl Many {
    /// Starts them, for so many connections.
    pub(crate) async fn start(testbed: &Testbed, connections: usize) -> Many {
        let (database, openbao) = (stand_in::database().await, stand_in::openbao().await);
        let peer = haproxy(database.port(), connections).await;
        let openbao = format!(
            "address = \"http://{openbao}\"\n\
             auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"secret-id\" }} }}\n"
        );
        let settings = Settings { openbao, ..settings(connections) };
        let proxy = Proxy::of(&testbed.world, settings).await;
        proxy.place_acme_at(database.port(), "auth = [\"password\"]\n").await;
        Many {
            direct: direct_at(database, false),
            haproxy: peer.contender("HAProxy", false),
            pgsilo: pgsilo_at("pgsilo", proxy.address(), false, &proxy),
            _proxy: proxy,
            _peer: peer,
        }
    }
}

fn direct_at(address: SocketAddr, tls: bool) -> Contender {
    Contender { name: "direct", address, tls, pid: None, takes_token: false }
}

fn pgsilo_at(name: &'static str, address: SocketAddr, tls: bool, proxy: &Proxy) -> Contender {
    Contender { name, address, tls, pid: Some(proxy.pid()), takes_token: true }
}

fn settings(connections: usize) -> Settings {
    let limits = format!(
        "max_sessions_per_tenant = {connections}\nmax_connections_per_address = {connections}\n\
         max_sessions = {connections}\n"
    );
    let log_level = "info";
    Settings { listeners: PLAIN.to_owned() + TLS, limits, log_level, ..Settings::default() }
}

/// In session mode, as pgsilo is: a client has its server to itself.
async fn pgbouncer(testbed: &Testbed) -> Peer {
    let (dir, port) = (folder(), free_port());
    for name in ["server.crt", "server.key"] {
        fs::copy(testbed.world.dir().join(name), dir.join(name)).expect("copied");
    }
    fs::write(dir.join("users"), format!("\"{ROLE}\" \"{PASSWORD}\"\n")).expect("written");
    let config = format!(
        "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
         listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {dir}/users\n\
         pool_mode = session\nserver_idle_timeout = 2\nmax_client_conn = {connections}\ndefault_pool_size = {connections}\n\
         client_tls_sslmode = allow\nclient_tls_cert_file = {dir}/server.crt\n\
         client_tls_key_file = {dir}/server.key\nlog_connections = 0\nlog_disconnections = 0\n",
        testbed.port(),
        dir = dir.display(),
        connections = testbed.connections,
    );
    fs::write(dir.join("pgbouncer.ini"), config).expect("written");
    let mut command = Command::new("pgbouncer");
    command.arg("--quiet").arg(dir.join("pgbouncer.ini"));
    // It refuses to run as root.
    if rustix::process::geteuid().is_root() {
        let owned = Command::new("chown").args(["-R", "nobody"]).arg(&dir).status();
        assert!(owned.is_ok_and(|status| status.success()), "chown");
        command.uid(65534).gid(65534);
    }
    Peer::start(command, dir, port).await
}

async fn haproxy(to: u16, connections: usize) -> Peer {
    let (dir, port) = (folder(), free_port());
    let config = format!(
        "global\n  nbthread {}\n  maxconn {}\ndefaults\n  mode tcp\n  timeout connect 5s\n  \
         timeout client 1h\n  timeout server 1h\nlisten postgres\n  bind 127.0.0.1:{port}\n  \
         server postgres 127.0.0.1:{to}\n",
        processors(),
        connections,
    );
    fs::write(dir.join("haproxy.cfg"), config).expect("written");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-q").arg("-f").arg(dir.join("haproxy.cfg"));
    Peer::start(command, dir, port).await
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
