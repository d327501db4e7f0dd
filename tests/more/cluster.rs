//! PostgreSQL servers with TLS: certificates of our own making, a `pg_hba.conf` that asks for
//! each method in a database of its own, and OpenBAO roles that lease for them.
//!
//! A cluster lives as long as this process keeps its standard input open, whether or not the
//! value is dropped.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pgsilo_sandbox::testing::bao::free_port;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, folder};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{PATIENCE, eventually};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SignatureAlgorithm, date_time_ymd,
};
use serde_json::json;

const SUPERUSER_PASSWORD: &str = "for-tests-on-loopback-only";

/// What `pg_hba.conf` asks of a tenant's login, each in the database `tenant_NAME`.
pub(crate) const METHODS: [&str; 4] = ["scram", "md5", "password", "trust"];

/// A certificate authority.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    algorithm: &'static SignatureAlgorithm,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub(crate) struct Certificate {
    pub(crate) chain: String,
    pub(crate) key: String,
    /// The authority's certificate.
    pub(crate) ca: String,
}

impl Authority {
    /// One that signs with this algorithm, which is what channel binding hashes with.
    pub(crate) fn new(algorithm: &'static SignatureAlgorithm) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority");
        Authority { issuer, algorithm }
    }

    pub(crate) fn certify(&self, name: &str) -> Certificate {
        self.certify_until(name, 2099)
    }

    /// A certificate for a name, valid until a year begins.
    pub(crate) fn certify_until(&self, name: &str, year: i32) -> Certificate {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        // What counts is who signs. Not every OpenSSL reads an Ed25519 key as it is written here.
        let algorithm = match self.algorithm == &PKCS_ED25519 {
            true => &PKCS_ECDSA_P256_SHA256,
            false => self.algorithm,
        };
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        Certificate { chain: certificate.pem(), key: key.serialize_pem(), ca: self.issuer.pem() }
    }
}

/// A running server.
pub(crate) struct Cluster {
    dir: PathBuf,
    pub(crate) port: u16,
    pub(crate) certificate: Certificate,
    shell: Child,
}

impl Cluster {
    /// Starts a server of that installation, with that certificate, and has OpenBAO lease for
    /// its databases. `sealed_for` is the tenant that they are all sealed for.
    pub(crate) async fn start(installation: &Path, certificate: Certificate) -> Cluster {
        let dir = folder();
        let account = account();
        // The server's account may not be able to read where the installation is.
        run(Command::new("cp").arg("-a").arg(installation).arg(dir.join("native")), None);
        fs::write(dir.join("password"), SUPERUSER_PASSWORD).expect("written");
        if let Some(id) = account {
            run(Command::new("chown").args(["-R", &format!("{id}:{id}")]).arg(&dir), None);
            chown(&dir, Some(id), Some(id)).expect("owned");
        }
        let bin = dir.join("native/bin");
        let mut initdb = Command::new(bin.join("initdb"));
        initdb
            .args([
                "-U",
                "postgres",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "-D",
            ])
            .arg(dir.join("data"))
            .arg(format!("--pwfile={}", dir.join("password").display()));
        run(&mut initdb, account);
        let cluster = Cluster::serve(dir, certificate, account).await;
        cluster.make_databases().await;
        cluster.make_leases().await;
        cluster
    }

    async fn serve(dir: PathBuf, certificate: Certificate, account: Option<u32>) -> Cluster {
        let port = free_port();
        let data = dir.join("data");
        let mut hba = "local all all scram-sha-256\nhost all postgres 127.0.0.1/32 scram-sha-256\n"
            .to_owned();
        for (method, asks) in METHODS.iter().zip(["scram-sha-256", "md5", "password", "trust"]) {
            let kind = if *method == "scram" { "hostssl" } else { "host" };
            hba += &format!("{kind} tenant_{method} all 127.0.0.1/32 {asks}\n");
        }
        fs::write(data.join("pg_hba.conf"), hba).expect("written");
        fs::write(data.join("server.crt"), &certificate.chain).expect("written");
        fs::write(data.join("server.key"), &certificate.key).expect("written");
        if let Some(id) = account {
            for file in ["server.crt", "server.key"] {
                chown(data.join(file), Some(id), Some(id)).expect("owned");
            }
        }
        run(Command::new("chmod").arg("600").arg(data.join("server.key")), None);
        let settings = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n\
             ssl = on\nfsync = off\nlog_connections = on\nlc_messages = 'C'\n",
            dir.display()
        );
        let conf = data.join("postgresql.conf");
        let given = fs::read_to_string(&conf).expect("read");
        fs::write(&conf, given + &settings).expect("written");

        // However this process ends, its end of the pipe closes, and nothing is left.
        let script = "\"$1/native/bin/postgres\" -D \"$1/data\" 2>>\"$1/log\" & pid=$!\n\
                      cat >/dev/null; kill -INT $pid; wait $pid; cd /; rm -rf \"$1\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(&dir).current_dir("/").stdin(Stdio::piped());
        if let Some(id) = account {
            shell.uid(id).gid(id);
        }
        let shell = shell.spawn().expect("sh starts");
        let cluster = Cluster { dir, port, certificate, shell };
        eventually("PostgreSQL to let its superuser in", async || {
            cluster.try_superuser("postgres").await.ok()
        })
        .await;
        cluster
    }

    async fn try_superuser(
        &self,
        dbname: &str,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(self.port)
            .user("postgres")
            .password(SUPERUSER_PASSWORD)
            .dbname(dbname)
            .connect(tokio_postgres::NoTls)
            .await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A superuser's connection.
    pub(crate) async fn superuser(&self) -> tokio_postgres::Client {
        self.try_superuser("postgres").await.expect("superuser logs in")
    }

    async fn make_databases(&self) {
        let superuser = self.superuser().await;
        superuser.batch_execute("CREATE ROLE tenant_app NOLOGIN").await.expect("made");
        for method in METHODS {
            for sql in [
                format!("CREATE DATABASE tenant_{method}"),
                format!("ALTER DATABASE tenant_{method} SET pgsilo.tenant = 'acme'"),
            ] {
                superuser.batch_execute(&sql).await.expect("made");
            }
        }
    }

    async fn make_leases(&self) {
        let config = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": format!(
                "postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{}/postgres?sslmode=disable", self.port),
            "username": "postgres",
            "password": SUPERUSER_PASSWORD,
            "allowed_roles": "*",
        });
        let name = format!("cluster-{}", self.port);
        let (status, said) =
            world().bao("POST", &format!("pgsilo/acme/config/{name}"), Some(config)).await;
        assert!(status < 300, "{said}");
        for method in METHODS {
            let first = match method {
                "md5" => "SET LOCAL password_encryption = 'md5'",
                _ => "SET LOCAL password_encryption = 'scram-sha-256'",
            };
            let role = json!({
                "db_name": name,
                "creation_statements": [
                    first,
                    "CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE tenant_app",
                ],
                "revocation_statements": ["DROP ROLE IF EXISTS \"{{name}}\""],
            });
            let path = format!("pgsilo/acme/roles/{}", self.role(method));
            let (status, said) = world().bao("POST", &path, Some(role)).await;
            assert!(status < 300, "{said}");
        }
    }

    /// OpenBAO's role for the database of a method.
    pub(crate) fn role(&self, method: &str) -> String {
        format!("tenant-{}-{method}", self.port)
    }

    /// The authority's certificate as a file.
    pub(crate) fn ca(&self) -> PathBuf {
        let path = self.dir.join("ca.crt");
        fs::write(&path, &self.certificate.ca).expect("written");
        path
    }

    /// Its Unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).expect("read")
    }

    /// A pgsilo whose acme lives where `placement` says: keys of `[tenant.placement]` beside
    /// `dbname`, which is that of the method.
    pub(crate) async fn proxy(&self, method: &str, placement: &str) -> Proxy {
        self.proxy_with(method, placement, Settings::default()).await
    }

    /// The same, with settings of its own.
    pub(crate) async fn proxy_with(
        &self,
        method: &str,
        placement: &str,
        settings: Settings,
    ) -> Proxy {
        let placement = format!("dbname = \"tenant_{method}\"\n{placement}");
        placed_with(&self.role(method), &placement, settings).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _status = self.shell.wait();
    }
}

/// A pgsilo whose only tenant, acme, has this placement.
pub(crate) async fn placed(role: &str, placement: &str) -> Proxy {
    placed_with(role, placement, Settings::default()).await
}

async fn placed_with(role: &str, placement: &str, settings: Settings) -> Proxy {
    let proxy = Proxy::with(settings).await;
    proxy.reload(&format!(
        "[[tenant]]\nid = \"acme\"\n[tenant.placement]\n{placement}\n\
         [tenant.lease]\nroles = {{ read-write = \"{role}\" }}\n"
    ));
    let reloaded = proxy.logged(|line| line["message"] == "registry reloaded");
    tokio::time::timeout(PATIENCE, reloaded).await.expect("reloaded");
    proxy
}

/// PostgreSQL refuses to run as root: then it runs as nobody.
fn account() -> Option<u32> {
    rustix::process::geteuid().is_root().then_some(65534)
}

fn run(command: &mut Command, account: Option<u32>) {
    if let Some(id) = account {
        command.uid(id).gid(id);
    }
    let output = command.current_dir("/").output().expect("it starts");
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
