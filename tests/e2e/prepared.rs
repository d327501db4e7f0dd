//! Where sessions may prepare transactions, one can hold its own role's row without a session that
//! could be ended. Such a cluster is found, and what was prepared there rolled back.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use pgsilo_sandbox::testing::bao::{Folder, free_port};
use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::world::World;
use serde_json::json;
use tokio_postgres::{Client, NoTls};

use crate::orphans::{audited, command};

const PASSWORD: &str = "for-tests-on-loopback-only";
/// As OpenBAO names them.
const ROLE: &str = "tenant-acme-rw-AAAAAAAAAAAAAAAAAAAA";

/// A server that is ended and gone with this.
struct Server {
    child: Child,
    port: u16,
    dir: Folder,
}

impl Server {
    /// One of the sandbox's kind, as the account that runs that.
    async fn start(world: &World, settings: &str) -> Server {
        let process = format!("/proc/{}", world.var("PG_PID"));
        let bin = fs::read_link(format!("{process}/exe")).expect("it runs");
        let bin = bin.parent().expect("a folder");
        let account = fs::metadata(&process).expect("it runs");
        let (dir, port) = (Folder::new(), free_port());
        fs::write(dir.join("password"), PASSWORD).expect("written");
        for path in [&*dir, &dir.join("password")] {
            chown(path, Some(account.uid()), Some(account.gid())).expect("given to it");
        }
        let program = |name: &str| {
            let mut command = Command::new(bin.join(name));
            command.uid(account.uid()).gid(account.gid()).current_dir("/").arg("-D");
            command.arg(dir.join("data"));
            command
        };
        let mut initdb = program("initdb");
        initdb.args(["-U", "postgres", "--auth=scram-sha-256", "--no-sync", "--pwfile"]);
        let made = initdb.arg(dir.join("password")).output().expect("initdb runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let path = dir.join("data/postgresql.conf");
        let given = fs::read_to_string(&path).expect("read");
        let ours = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n{settings}\n",
            dir.display()
        );
        fs::write(&path, given + &ours).expect("written");
        let log = fs::File::create(dir.join("log")).expect("a log");
        let child = program("postgres").stderr(log).spawn().expect("postgres starts");
        let server = Server { child, port, dir };
        eventually("PostgreSQL to let its superuser in", async || {
            server.connect("postgres", "postgres").await
        })
        .await;
        server
    }

    async fn connect(&self, user: &str, dbname: &str) -> Option<Client> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user(user).password(PASSWORD).dbname(dbname);
        let (client, connection) = config.connect(NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    async fn run(&self, user: &str, dbname: &str, statements: &[&str]) {
        let client = self.connect(user, dbname).await.expect("logged in");
        for sql in statements {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
    }

    /// The registry that has acme there.
    fn registry(&self, file: &Path) {
        let (port, mount) = (self.port, "pgsilo/acme");
        let text = format!(
            "[[tenant]]\nid = \"acme\"\n[tenant.placement]\nhost = \"127.0.0.1\"\nport = {port}\n\
             dbname = \"tenant_acme\"\ntls = {{ mode = \"disable\" }}\n\
             [tenant.lease]\nmount = \"{mount}\"\nroles = {{ read-write = \"tenant-acme-rw\" }}\n"
        );
        fs::write(file, text).expect("written");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _waited = self.child.wait();
    }
}

/// A tenant as the recipe has it, and a leased role.
async fn provision(server: &Server) {
    let password = format!("PASSWORD '{PASSWORD}'");
    let provisioner =
        format!("CREATE ROLE pgsilo_provisioner LOGIN CREATEDB CREATEROLE {password}");
    let statements =
        [provisioner.as_str(), "GRANT CONNECT ON DATABASE postgres TO pgsilo_provisioner"];
    server.run("postgres", "postgres", &statements).await;
    let broker = format!("CREATE ROLE tenant_acme_broker LOGIN CREATEROLE {password}");
    let statements = [
        "CREATE ROLE tenant_acme_app NOLOGIN",
        "CREATE ROLE tenant_acme_login NOLOGIN",
        &broker,
        "GRANT tenant_acme_app, tenant_acme_login TO tenant_acme_broker
            WITH ADMIN TRUE, INHERIT FALSE, SET FALSE",
        "CREATE DATABASE tenant_acme TEMPLATE template0",
        "GRANT CREATE ON DATABASE tenant_acme TO tenant_acme_app",
        "GRANT CONNECT ON DATABASE tenant_acme TO tenant_acme_login, tenant_acme_broker",
    ];
    server.run("pgsilo_provisioner", "postgres", &statements).await;
    let made = format!(
        "CREATE ROLE \"{ROLE}\" LOGIN {password} VALID UNTIL '2099-01-01' IN ROLE tenant_acme_login;
         GRANT tenant_acme_app TO \"{ROLE}\" WITH INHERIT FALSE, SET TRUE;
         GRANT \"{ROLE}\" TO tenant_acme_broker WITH INHERIT TRUE, SET TRUE;
         ALTER ROLE \"{ROLE}\" SET role = 'tenant_acme_app'"
    );
    server.run("tenant_acme_broker", "tenant_acme", &[&made]).await;
}

#[tokio::test]
async fn prepared_transactions_of_a_session_are_rolled_back_and_its_role_dropped() {
    // Of its own: its OpenBAO has no leases of others.
    let world = World::own().await;
    let server = Server::start(&world, "max_prepared_transactions = 5").await;
    provision(&server).await;
    let own = "BEGIN; SET LOCAL ROLE NONE; ALTER ROLE CURRENT_USER PASSWORD 'mine';
        PREPARE TRANSACTION 'it''s mine'";
    let apps = "BEGIN; CREATE SCHEMA held; PREPARE TRANSACTION 'the app''s'";
    server.run(ROLE, "tenant_acme", &[own, apps]).await;

    let registry = server.dir.join("tenants.toml");
    server.registry(&registry);
    let dsn = format!("postgresql://pgsilo_provisioner:{PASSWORD}@any");
    let audit = async |arguments: &[&str]| {
        let mut command = command(&world, arguments);
        command.env("PGSILO_REGISTRY", &registry).env("PROVISIONER_DSN", &dsn);
        let (code, findings) = audited(&mut command).await;
        let told: Vec<_> =
            findings.iter().map(|one| json!([one["finding"], one["outcome"]])).collect();
        (code, told)
    };
    let found = |outcome: &str| {
        vec![
            json!(["prepared_allowed", "left"]),
            json!(["prepared_transaction", outcome]),
            json!(["prepared_transaction", outcome]),
            json!(["orphan_role", outcome]),
        ]
    };
    assert_eq!(audit(&[]).await, (3, found("left")));
    assert_eq!(audit(&["--fix"]).await, (3, found("mended")));
    assert_eq!(audit(&[]).await, (3, vec![json!(["prepared_allowed", "left"])]));
    let superuser = server.connect("postgres", "tenant_acme").await.expect("logged in");
    let left = "SELECT (SELECT count(*) FROM pg_prepared_xacts)
        + (SELECT count(*) FROM pg_roles WHERE rolname = $1)";
    assert_eq!(superuser.query_one(left, &[&ROLE]).await.expect("asked").get::<_, i64>(0), 0);
}
