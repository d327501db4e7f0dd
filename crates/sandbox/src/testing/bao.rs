//! OpenBAO of a test's own: real servers, alone or as a cluster, on free ports of 127.0.0.1. Each
//! lends acme's credentials of the shared sandbox's PostgreSQL, through a broker that the tests
//! share. A process is killed and waited for when it is dropped, and its files go with it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpListener;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use pgsilo_core::secret::Secret;
use pgsilo_openbao::{Client, Settings};
use reqwest::redirect;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tokio_postgres::error::SqlState;

use super::certificates::Signed;
use super::world::{World, world};
use super::{eventually, passwords, proxy};

/// The proxy's policy, as a real deployment would use it.
const POLICY: &str = include_str!("../../../../docker/openbao/pgsilo.hcl");
/// What these servers log in to PostgreSQL as.
const BROKER: &str = "deployments_broker";

/// A folder that is gone with its owner.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        Folder(proxy::folder())
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A `bao` that runs.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// `bao VERB -config CONFIG`; what it says goes beside its configuration.
    pub fn start(verb: &str, config: &Path) -> Process {
        let log = config.with_extension("log");
        let sink = File::create(&log).expect("a log");
        let program = std::env::var_os("PGSILO_BAO").unwrap_or_else(|| OsString::from("bao"));
        let mut command = Command::new(program);
        // Meant for other servers than these.
        for (name, _) in std::env::vars_os() {
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("BAO_") || name.starts_with("VAULT_"))
            {
                command.env_remove(name);
            }
        }
        command.arg(verb).arg("-config").arg(config).stdin(Stdio::null());
        command.stdout(sink.try_clone().expect("a log")).stderr(sink);
        let child = command.spawn().expect("PGSILO_BAO names OpenBAO; scripts/tools.py finds it");
        Process { child, log }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("waited").is_some()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL: it has no time to say or write anything.
    pub fn kill(&mut self) {
        let _gone = self.child.kill();
        let _waited = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.log.display(), self.said());
        }
    }
}

/// What kind of server.
#[derive(Debug, Default)]
pub struct Shape<'s> {
    /// Raft, which outlives the process and makes clusters; else memory.
    pub kept: bool,
    /// Of its listener.
    pub tls: Option<&'s Signed>,
    /// Whom its own clients (the test's root) trust.
    pub ca: Option<&'s str>,
    /// Where it tells others that it is, if that is not true.
    pub api_addr: Option<String>,
    /// The same of its cluster's port.
    pub cluster_addr: Option<String>,
}

/// OpenBAO as its root, in one namespace.
#[derive(Debug, Clone)]
pub struct Root {
    http: reqwest::Client,
    address: String,
    token: String,
    namespace: String,
}

/// A server that runs and is unsealed.
#[derive(Debug)]
pub struct Server {
    process: Process,
    dir: Folder,
    root: Root,
    unseal_key: String,
}

impl Deref for Server {
    type Target = Root;

    fn deref(&self) -> &Root {
        &self.root
    }
}

impl Server {
    /// A server of its own, active.
    pub async fn start(shape: Shape<'_>) -> Server {
        let mut server = Server::launch(&shape).await;
        let wish = json!({ "secret_shares": 1, "secret_threshold": 1 });
        let made = server.write("sys/init", wish).await;
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        (server.unseal_key, server.root.token) =
            (text(&made["keys"][0]), text(&made["root_token"]));
        server.unseal().await;
        server.reaches(200).await;
        server
    }

    /// One more node of a server's cluster, a standby.
    pub async fn join(&self, shape: Shape<'_>) -> Server {
        let mut server = Server::launch(&shape).await;
        let wish = json!({ "leader_api_addr": self.address, "leader_ca_cert": shape.ca });
        server.write("sys/storage/raft/join", wish).await;
        server.unseal_key.clone_from(&self.unseal_key);
        server.root.token.clone_from(&self.root.token);
        server.unseal().await;
        server.reaches(429).await;
        server
    }

    /// Waits until every node of the cluster has a vote.
    pub async fn has_voters(&self, count: usize) {
        eventually("the nodes to have votes", async || {
            let (_status, answer) = self.ask("GET", "sys/storage/raft/configuration", None).await;
            let nodes = answer["data"]["config"]["servers"].as_array()?;
            (nodes.iter().filter(|node| node["voter"] == true).count() == count).then_some(())
        })
        .await;
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Keeps a copy of its storage, beside it; it is down meanwhile.
    pub async fn back_up(&mut self) {
        self.kill();
        copy_tree(&self.dir.join("raft"), &self.dir.join("backup"));
        self.restart().await;
    }

    /// Starts it again from the copy.
    pub async fn restore(&mut self) {
        self.kill();
        fs::remove_dir_all(self.dir.join("raft")).expect("removed");
        copy_tree(&self.dir.join("backup"), &self.dir.join("raft"));
        self.restart().await;
    }

    /// Starts it again where it was, and unseals it.
    pub async fn restart(&mut self) {
        self.process = Process::start("server", &self.dir.join("bao.hcl"));
        self.answers().await;
        self.unseal().await;
        self.reaches(200).await;
    }

    /// Starts a process and waits until it answers.
    async fn launch(shape: &Shape<'_>) -> Server {
        for _ in 0..5 {
            let dir = Folder::new();
            let (api, cluster) = (free_port(), free_port());
            let config = configuration(shape, &dir, api, cluster);
            fs::write(dir.join("bao.hcl"), config).expect("written");
            let mut http = reqwest::Client::builder().no_proxy().redirect(redirect::Policy::none());
            if let Some(ca) = shape.ca {
                let ca = reqwest::Certificate::from_pem(ca.as_bytes()).expect("a CA");
                http = http.tls_certs_only([ca]);
            }
            let http = http.build().expect("a client");
            let scheme = if shape.tls.is_some() { "https" } else { "http" };
            let address = format!("{scheme}://127.0.0.1:{api}");
            let (token, namespace) = (String::new(), String::new());
            let root = Root { http, address, token, namespace };
            let process = Process::start("server", &dir.join("bao.hcl"));
            let mut server = Server { process, dir, root, unseal_key: String::new() };
            if server.answers().await {
                return server;
            }
        }
        panic!("no free port for OpenBAO");
    }

    /// Waits until it answers; `false`: it lost its port to another.
    async fn answers(&mut self) -> bool {
        eventually("OpenBAO to answer", async || {
            if self.root.health().await.is_some() {
                return Some(true);
            }
            let ended = self.process.has_ended();
            let lost = ended && self.process.said().contains("address already in use");
            assert!(!ended || lost, "OpenBAO ended");
            lost.then_some(false)
        })
        .await
    }

    async fn unseal(&self) {
        let unsealed = self.write("sys/unseal", json!({ "key": self.unseal_key })).await;
        assert!(unsealed["errors"].is_null(), "{unsealed}");
    }

    /// Waits for a state: 200 is active, 429 a standby.
    pub async fn reaches(&self, health: u16) {
        eventually("OpenBAO's health", async || {
            (self.health().await == Some(health)).then_some(())
        })
        .await;
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for entry in fs::read_dir(from).expect("read") {
        let entry = entry.expect("read");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("known").is_dir() {
            true => copy_tree(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("copied")),
        }
    }
}

fn configuration(shape: &Shape<'_>, dir: &Path, api: u16, cluster: u16) -> String {
    let storage = match shape.kept {
        false => "storage \"inmem\" {}".to_owned(),
        true => {
            fs::create_dir(dir.join("raft")).expect("a folder");
            // A node that joins has a vote within a second, not after ten and more.
            format!(
                "storage \"raft\" {{\n  path = \"{}\"\n  node_id = \"{api}\"\n  \
                 performance_multiplier = 1\n  autopilot_reconcile_interval = \"200ms\"\n  \
                 autopilot_update_interval = \"100ms\"\n}}",
                dir.join("raft").display()
            )
        }
    };
    let (scheme, tls) = match shape.tls {
        None => ("http", "  tls_disable = true".to_owned()),
        Some(Signed { certificate, key }) => (
            "https",
            format!(
                "  tls_cert_file = \"{}\"\n  tls_key_file = \"{}\"",
                certificate.display(),
                key.display()
            ),
        ),
    };
    let api_addr = shape.api_addr.clone().unwrap_or(format!("{scheme}://127.0.0.1:{api}"));
    let cluster_addr = shape.cluster_addr.clone().unwrap_or(format!("https://127.0.0.1:{cluster}"));
    format!(
        "{storage}\nlistener \"tcp\" {{\n  address = \"127.0.0.1:{api}\"\n  \
         cluster_address = \"127.0.0.1:{cluster}\"\n{tls}\n}}\n\
         api_addr = \"{api_addr}\"\ncluster_addr = \"{cluster_addr}\"\n"
    )
}

/// A free port below those that the system gives out by itself: it is not given out while its
/// server is down for a moment.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 199) as u16 * 100;
    loop {
        let port = 10_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Root {
    /// The shared sandbox's OpenBAO.
    pub fn of(world: &World) -> Root {
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        let (address, token) =
            (world.var("BAO_ADDR").to_owned(), world.var("BAO_TOKEN").to_owned());
        Root { http, address, token, namespace: String::new() }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// The root token.
    pub fn token(&self) -> Secret {
        Secret::new(self.token.clone())
    }

    /// The same through the client that pgsilo and pgsiloctl have.
    pub fn client(&self) -> Client {
        let namespace = Some(self.namespace.clone()).filter(|name| !name.is_empty());
        let settings = Settings { namespace, ..Settings::for_control(&self.address) };
        Client::new(settings).expect("a client").as_token(self.token())
    }

    /// Asks; `LIST` is a method there.
    pub async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self
            .http
            .request(method, format!("{}/v1/{path}", self.address))
            .header("X-Vault-Token", &self.token)
            .header("X-Vault-Namespace", &self.namespace);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("OpenBAO answers");
        let status = response.status().as_u16();
        (status, response.json().await.unwrap_or(Value::Null))
    }

    /// Writes, which works.
    pub async fn write(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.ask("POST", path, Some(body)).await;
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
        answer
    }

    async fn health(&self) -> Option<u16> {
        let answer = self.http.get(format!("{}/v1/sys/health", self.address)).send().await;
        answer.ok().map(|answer| answer.status().as_u16())
    }

    /// The same server in a namespace, which is made.
    pub async fn within(&self, namespace: &str) -> Root {
        self.write(&format!("sys/namespaces/{namespace}"), json!({})).await;
        Root { namespace: namespace.to_owned(), ..self.clone() }
    }

    /// Has it lend acme's credentials, each for a time, and makes pgsilo's policy.
    pub async fn lend(&self, default_ttl: &str) {
        self.write("sys/mounts/pgsilo/acme", json!({ "type": "database" })).await;
        self.write("sys/policies/acl/pgsilo", json!({ "policy": POLICY })).await;
        self.write(passwords::POLICY_PATH, passwords::policy()).await;
        self.connect_to(world().var("PG_PORT")).await;
        // As the provisioner makes it, for another broker.
        let (_status, role) = world().bao("GET", "pgsilo/acme/roles/tenant-acme-rw", None).await;
        let role = role["data"].to_string().replace("tenant_acme_broker", BROKER);
        let mut role: Value = serde_json::from_str(&role).expect("JSON");
        role["default_ttl"] = default_ttl.into();
        self.write("pgsilo/acme/roles/tenant-acme-rw", role).await;
    }

    /// Says where acme's database is, whether or not it is there.
    pub async fn connect_to(&self, port: &str) {
        let config = json!({
            "plugin_name": "postgresql-database-plugin",
            "connection_url": format!(
                "postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{port}/tenant_acme?sslmode=disable"
            ),
            "username": BROKER,
            "password": broker_password().await,
            "password_authentication": "scram-sha-256",
            "allowed_roles": ["tenant-acme-*"],
            "verify_connection": false,
            "username_template": "{{ printf \"%s-%s\" (.RoleName | truncate 42) (random 20) }}",
            "max_open_connections": 4,
        });
        self.write("pgsilo/acme/config/tenant-acme", config).await;
    }

    /// An AppRole for pgsilo, whose tokens end as told; the auth line for it. The secret id goes
    /// to `secret-id` in a folder.
    pub async fn app_role(&self, dir: &Path, ends: Value) -> String {
        self.write("sys/auth/approle", json!({ "type": "approle" })).await;
        let mut role = json!({
            "role_id": "pgsilo", "token_policies": ["pgsilo"], "token_no_default_policy": true,
        });
        for (key, value) in ends.as_object().expect("an object") {
            role[key] = value.clone();
        }
        self.write("auth/approle/role/pgsilo", role).await;
        let file = dir.join("secret-id");
        fs::write(&file, self.secret_id().await).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set");
        format!(
            "auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"{}\" }} }}\n",
            file.display()
        )
    }

    /// A token that stands for one more secret id of pgsilo's AppRole.
    pub async fn wrapped_secret_id(&self) -> String {
        let url = format!("{}/v1/auth/approle/role/pgsilo/secret-id", self.address);
        let request = self.http.post(url).header("X-Vault-Token", &self.token);
        let request = request.header("X-Vault-Wrap-TTL", "60s").json(&json!({}));
        let answer: Value = request.send().await.expect("answered").json().await.expect("JSON");
        answer["wrap_info"]["token"].as_str().expect("a wrapping token").to_owned()
    }

    /// One more secret id of pgsilo's AppRole.
    pub async fn secret_id(&self) -> String {
        let made = self.write("auth/approle/role/pgsilo/secret-id", json!({})).await;
        made["data"]["secret_id"].as_str().expect("a secret id").to_owned()
    }
}

/// Makes the broker that all of these servers log in as: like acme's own, with a password that
/// the tests know.
async fn broker_password() -> &'static str {
    static MADE: OnceCell<String> = OnceCell::const_new();
    let make = async || {
        let password = format!("broker-{}", std::process::id());
        let superuser = world().superuser("postgres").await;
        let statements = format!(
            "CREATE ROLE {BROKER} LOGIN CREATEROLE PASSWORD '{password}';
             ALTER ROLE {BROKER} SET search_path = pg_catalog, pg_temp;
             GRANT tenant_acme_app TO {BROKER} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
             GRANT tenant_acme_login TO {BROKER} WITH ADMIN TRUE, INHERIT TRUE, SET FALSE"
        );
        // Others make and drop roles of acme meanwhile: one of two that wait for each other fails.
        eventually("the broker to be made", async || {
            match superuser.batch_execute(&statements).await {
                Ok(()) => Some(()),
                Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => None,
                Err(error) => panic!("the broker cannot be made: {error:?}"),
            }
        })
        .await;
        password
    };
    MADE.get_or_init(make).await
}
