//! Where the attacks take place: a sandbox, and for each attack a pgsilo in front of it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use pgsilo_sandbox::testing::authority::Authority;
use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, folder};
use pgsilo_sandbox::testing::world::World;

use crate::testbed::said;

/// What is not as by default.
pub(super) const LIMITS: &str = "transaction_timeout = \"5s\"\n";
/// A listener that asks clients for a certificate and takes those that have none.
const ASKING: &str = "[[listener]]\naddress = \"127.0.0.1:0\"\ntls = { certificate = \"server.crt\", \
    key = \"server.key\", client_ca = \"clients.crt\" }\n";

/// A sandbox as anybody starts it, with pgbench's tables in the neighbour's database.
pub(super) struct Fixture {
    pub(super) world: &'static World,
    authority: Authority,
}

/// A pgsilo and what is around it.
pub(super) struct Arena {
    pub(super) world: &'static World,
    pub(super) proxy: Proxy,
    folder: PathBuf,
}

impl Fixture {
    pub(super) async fn start() -> Fixture {
        let world: &'static World = Box::leak(Box::new(World::start(
            "neighbour",
            &["--without-proxy", "--leased-over-tcp"],
        )));
        let dsn = world.var("PG_SUPERUSER_DSN");
        let server = dsn.strip_suffix("postgres").expect("a DSN of the database postgres");
        let mut pgbench = Command::new(world.pg_program("pgbench"));
        pgbench.args(["--initialize", "--quiet", "--scale", "2"]);
        said(pgbench.arg(format!("{server}tenant_globex")));
        let grant = "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant_globex_app";
        let superuser = world.superuser("tenant_globex").await;
        superuser.batch_execute(grant).await.expect("granted");
        Fixture { world, authority: Authority::new() }
    }

    pub(super) fn server(&self) -> String {
        said(Command::new(self.world.pg_program("postgres")).arg("--version"))
    }

    pub(super) async fn openbao(&self) -> String {
        let (_status, answer) = self.world.bao("GET", "sys/health", None).await;
        answer["version"].as_str().expect("a version").to_owned()
    }

    pub(super) async fn arena(&self) -> Arena {
        let folder = folder();
        // The log goes through a reader of its own, which can be stopped.
        let before = format!(
            "mkfifo {0}/log; cat {0}/log >&2 & echo $! >{0}/reader; exec 2>{0}/log;",
            folder.display()
        );
        let settings = Settings {
            listeners: PLAIN.to_owned() + ASKING,
            limits: LIMITS.to_owned() + &std::env::var("LIMITS").unwrap_or_default(),
            files: vec![("clients.crt", self.authority.pem())],
            pool: String::new(),
            log_level: "info",
            before,
            ..Settings::default()
        };
        Arena { world: self.world, proxy: Proxy::of(self.world, settings).await, folder }
    }
}

impl Arena {
    /// The listener in clear.
    pub(super) fn address(&self) -> SocketAddr {
        self.proxy.address()
    }

    /// The listener that asks for certificates.
    pub(super) fn asking(&self) -> SocketAddr {
        self.proxy.addresses()[1]
    }

    /// The process that reads pgsilo's log.
    pub(super) fn reader(&self) -> i32 {
        let text = fs::read_to_string(self.folder.join("reader")).expect("written");
        text.trim().parse().expect("a pid")
    }

    /// A login of a tenant, of any access, by a real client.
    pub(super) async fn log_in(
        &self,
        tenant: &str,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.address().port()).user("app").dbname(tenant);
        config.password(mint::token_of(self.world, tenant));
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.folder);
    }
}
