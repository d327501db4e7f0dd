//! A pgsilo under test: the program itself, with a configuration of its own, its log read as
//! it is written.
//!
//! When it is dropped it is stopped, and its whole log is searched for secrets: for anything like a
//! JWT, a token of OpenBAO's or a leased password, and for the secret id. So every test is also a
//! test that pgsilo logs none at any level. What libraries say below a warning is in no log: the
//! program's filter keeps it out; of those that OpenBAO is asked with, tests/e2e/client.rs listens
//! to all.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;

use super::world::{World, world};
use super::{PATIENCE, eventually, passwords, programs};

/// What a test wants of its pgsilo; the rest is as in the sandbox.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Replaces the listeners: TOML with `{dir}` for the proxy's folder.
    pub listeners: String,
    /// Keys of `[limits]`.
    pub limits: String,
    /// Keys of `[registry]` beside `file`, which is left out where they name a database.
    pub registry: String,
    /// Keys of `[openbao]` that replace the sandbox's.
    pub openbao: String,
    /// Keys of `[lease]`.
    pub lease: String,
    /// Keys of `[[issuer]]` beside the sandbox's.
    pub issuer: String,
    /// Files beside its configuration: name and text.
    pub files: Vec<(&'static str, String)>,
    /// Replaces the issuers: `[[issuer]]` tables.
    pub issuers: String,
    /// The tenants' file, as a change to the sandbox's.
    pub tenants: fn(&str) -> String,
    /// Keys of `[pool]`. By default there is none, so that tests can count leases.
    pub pool: String,
    /// How much is logged; tests look for secrets in all of it.
    pub log_level: &'static str,
    /// More tables: `[audit]`.
    pub more: String,
    /// A shell that runs before pgsilo, in its process: `ulimit -n 64`.
    pub before: String,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            listeners: TLS.to_owned() + UNIX,
            limits: "drain_timeout = \"2s\"\nmax_sessions_per_tenant = 500\n".to_owned(),
            registry: String::new(),
            openbao: String::new(),
            lease: String::new(),
            issuer: String::new(),
            files: Vec::new(),
            issuers: String::new(),
            tenants: str::to_owned,
            pool: "max_idle = 0\n".to_owned(),
            log_level: "trace",
            more: String::new(),
            before: String::new(),
        }
    }
}

/// A TLS listener on a free port.
pub const TLS: &str = "[[listener]]\naddress = \"127.0.0.1:0\"\n\
    tls = { certificate = \"server.crt\", key = \"server.key\" }\n";
/// A Unix socket.
pub const UNIX: &str = "[[listener]]\nsocket = \"{dir}/.s.PGSQL.6432\"\n";
/// A listener in clear on a free port.
pub const PLAIN: &str = "[[listener]]\naddress = \"127.0.0.1:0\"\nplaintext = true\n";

/// A running pgsilo.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    dir: PathBuf,
    log: Arc<Mutex<Vec<Line>>>,
    /// Reads the log until its end, which comes with the process's.
    reader: Option<JoinHandle<()>>,
    /// Held by who wants nobody to read its log.
    reading: Arc<tokio::sync::Mutex<()>>,
    addresses: Vec<SocketAddr>,
    admin: SocketAddr,
    /// What must not be in its log.
    secret_id: String,
}

impl Proxy {
    /// Starts one with the defaults and waits until it is ready.
    pub async fn start() -> Proxy {
        Proxy::with(Settings::default()).await
    }

    /// Starts one and waits until it is ready to serve.
    pub async fn with(settings: Settings) -> Proxy {
        Proxy::of(world(), settings).await
    }

    /// Starts one whose leases for acme come from a role of its own, which is made like acme's
    /// read-write one but for its times.
    pub async fn with_role(
        role: &str,
        default_ttl: &str,
        max_ttl: &str,
        settings: Settings,
    ) -> Proxy {
        world().role_like_acme(role, default_ttl, max_ttl).await;
        let proxy = Proxy::with(settings).await;
        proxy.reload(&proxy.tenants().replacen("tenant-acme-rw", role, 1));
        proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
        proxy
    }

    /// Starts one in front of another sandbox and waits until it is ready to serve.
    pub async fn of(world: &World, settings: Settings) -> Proxy {
        let proxy = Proxy::begin(world, settings).await;
        eventually("pgsilo to be ready", async || {
            (proxy.get("/readyz").await.0 == 200).then_some(())
        })
        .await;
        proxy
    }

    /// Starts one and waits until it listens, whether or not it could serve.
    pub async fn unready(settings: Settings) -> Proxy {
        Proxy::begin(world(), settings).await
    }

    async fn begin(world: &World, settings: Settings) -> Proxy {
        let dir = folder();
        write_files_of(world, &dir, &settings);
        let mut command = Command::new("sh");
        let script = format!("{} exec \"$0\" \"$@\"", settings.before);
        command.arg("-c").arg(script).arg(programs::pgsilo());
        command.arg("serve").arg("--config").arg(dir.join("pgsilo.toml"));
        let mut child = command.stderr(Stdio::piped()).spawn().expect("pgsilo starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (sink, lines) = (Arc::clone(&log), BufReader::new(child.stderr.take().expect("piped")));
        let reading = Arc::new(tokio::sync::Mutex::new(()));
        let may_read = Arc::clone(&reading);
        let reader = std::thread::spawn(move || {
            lines.lines().map_while(Result::ok).for_each(|line| {
                sink.lock().expect("log").push(Line::read(line));
                drop(may_read.blocking_lock());
            });
        });
        let none = SocketAddr::from(([127, 0, 0, 1], 0));
        let secret_id = fs::read_to_string(world.dir().join("secret-id")).expect("read");
        let addresses = Vec::new();
        let reader = Some(reader);
        let mut proxy =
            Proxy { child, dir, log, reader, reading, addresses, admin: none, secret_id };
        let serving = proxy.logged(|line| line["message"] == "pgsilo serves").await;
        assert_eq!(serving["level"], "INFO");
        for line in proxy.lines() {
            let address = |field: &str| line[field].as_str().and_then(|text| text.parse().ok());
            proxy.addresses.extend(address("listener"));
            proxy.admin = address("admin").unwrap_or(proxy.admin);
        }
        proxy
    }

    /// The address of its only TCP listener, or of the first.
    pub fn address(&self) -> SocketAddr {
        *self.addresses.first().expect("a TCP listener")
    }

    /// The addresses of its TCP listeners, in their order.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The folder of its files and its Unix socket.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(".s.PGSQL.6432")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A libpq URI over TLS, verified.
    pub fn tls_dsn(&self, token: &str, dbname: &str) -> String {
        let ca = self.dir.join("ca.crt");
        let address = self.address();
        format!(
            "postgresql://app:{token}@{address}/{dbname}?sslmode=verify-full&sslrootcert={}",
            ca.display()
        )
    }

    /// A libpq URI over the Unix socket.
    pub fn socket_dsn(&self, token: &str, dbname: &str) -> String {
        format!("postgresql://app:{token}@/{dbname}?host={}&port=6432", self.dir.display())
    }

    /// A tokio-postgres client over the Unix socket.
    pub async fn connect(
        &self,
        token: &str,
        dbname: &str,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.dir).port(6432).user("app").password(token).dbname(dbname);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Every line of the log so far.
    pub fn lines(&self) -> Vec<Value> {
        self.lines_that(|_| true)
    }

    fn lines_that(&self, fits: impl Fn(&Value) -> bool) -> Vec<Value> {
        let log = self.log.lock().expect("log");
        log.iter().map(|line| &line.value).filter(|line| fits(line)).cloned().collect()
    }

    /// Reads no more of its log, but for what has been read ahead, until the guard is dropped.
    pub async fn stop_reading(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.reading).lock_owned().await
    }

    /// The first line that fits, once it is there.
    pub async fn logged(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let find = || {
            let log = self.log.lock().expect("log");
            log.iter().map(|line| &line.value).find(|line| fits(line)).cloned()
        };
        let found = eventually("a line of the log", async || find());
        match tokio::time::timeout(PATIENCE / 2, found).await {
            Ok(line) => line,
            Err(_late) => panic!("no such line in the log:\n{}", self.text()),
        }
    }

    /// The whole log so far.
    fn text(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The audit events of one kind so far.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        self.lines_that(|line| line["target"] == "pgsilo::audit" && line["event"] == kind)
    }

    /// The audit events of one kind, once there are so many: a client may know what has become of
    /// it before that can be read here.
    pub async fn events_reach(&self, kind: &str, count: usize) -> Vec<Value> {
        let events = async || Some(self.events(kind)).filter(|events| events.len() >= count);
        eventually(kind, events).await
    }

    /// The first audit event of a kind that fits, once it is there.
    pub async fn event(&self, kind: &str, fits: impl Fn(&Value) -> bool) -> Value {
        self.logged(|line| line["target"] == "pgsilo::audit" && line["event"] == kind && fits(line))
            .await
    }

    /// The event `started` of a session, by its number from 0 in the order in which they were
    /// served, once it is there.
    pub async fn served(&self, number: usize) -> Value {
        eventually("the session's event", async || self.events("started").get(number).cloned())
            .await
    }

    /// The address of its HTTP endpoints.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// `GET path` of its HTTP endpoints: status and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let response =
            reqwest::get(format!("http://{}{path}", self.admin)).await.expect("HTTP answers");
        (response.status().as_u16(), response.text().await.expect("text"))
    }

    /// A metric's value, as `name{label="value"}`.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_status, text) = self.get("/metrics").await;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no metric {name} in\n{text}")).parse().expect("a number")
    }

    /// Waits until a gauge has a value, or a counter has at least that.
    pub async fn metric_reaches(&self, name: &str, value: f64) {
        let counts = name.contains("_total");
        eventually(name, async || {
            let now = self.metric(name).await;
            (now == value || (counts && now > value)).then_some(())
        })
        .await;
    }

    /// Replaces the registry's file and sends SIGHUP.
    pub fn reload(&self, tenants: &str) {
        fs::write(self.dir.join("tenants.toml"), tenants).expect("written");
        self.signal(Signal::HUP);
    }

    /// Places acme on another port of 127.0.0.1, with more keys of its placement, and waits until
    /// that is in force.
    pub async fn place_acme_at(&self, port: u16, more: &str) {
        let tenants = self.tenants();
        let (before, placement) = tenants.split_once("port = ").expect("a placement");
        assert!(before.matches("[[tenant]]").count() == 1 && before.contains("id = \"acme\""));
        let (_, behind) = placement.split_once('\n').expect("more keys");
        self.reload(&format!("{before}port = {port}\n{more}{behind}"));
        self.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    }

    /// The registry's file as it is.
    pub fn tenants(&self) -> String {
        fs::read_to_string(self.dir.join("tenants.toml")).expect("read")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a pid");
        kill_process(pid, signal).expect("the process lives");
    }

    /// Waits until the process has ended, and its log was read to its end unless that was stopped.
    pub async fn ended(&mut self) -> ExitStatus {
        let status = eventually("pgsilo to end", async || self.child.try_wait().expect("waited"));
        let status = status.await;
        let is_read = || self.reader.as_ref().is_none_or(JoinHandle::is_finished);
        eventually("the end of the log", async || {
            (is_read() || self.reading.try_lock().is_err()).then_some(())
        })
        .await;
        status
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let (Ok(None), Some(pid)) =
            (self.child.try_wait(), Pid::from_raw(self.child.id() as i32))
        {
            let _gone = kill_process(pid, Signal::TERM);
            let _gone = kill_process(pid, Signal::TERM);
        }
        let _waited = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _read = reader.join();
        }
        let log = self.text();
        let _gone = fs::remove_dir_all(&self.dir);
        if std::thread::panicking() {
            eprintln!("pgsilo's log:\n{log}");
            return;
        }
        assert!(!holds_token(&log), "a token was logged:\n{log}");
        assert!(!holds_openbao_token(&log), "a token of OpenBAO's was logged:\n{log}");
        assert!(!passwords::is_in(&log), "a leased password was logged:\n{log}");
        assert!(!log.contains("panicked"), "pgsilo panicked:\n{log}");
        assert!(!log.contains(self.secret_id.trim()), "the secret id was logged");
    }
}

/// A line of the log, as it was written and as it is read.
#[derive(Debug)]
struct Line {
    text: String,
    value: Value,
}

impl Line {
    fn read(text: String) -> Line {
        let value = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
        Line { text, value }
    }
}

/// Whether a JWT stands in a text: the beginning of a JSON object in base64url, and a dot behind
/// it. The names of leased roles are random and may begin like one.
fn holds_token(text: &str) -> bool {
    text.match_indices("eyJ").any(|(at, _)| {
        let mut parts =
            text[at..].split(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_');
        let length = parts.next().map_or(0, str::len);
        length >= 16 && text[at + length..].starts_with('.')
    })
}

/// Whether a token of OpenBAO's stands in a text: `s.` and 24 characters.
fn holds_openbao_token(text: &str) -> bool {
    text.match_indices("s.").any(|(at, _)| {
        let begins = !text[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
        let random = text[at + 2..].bytes().take_while(u8::is_ascii_alphanumeric).count();
        begins && random >= 24
    })
}

#[test]
fn a_token_in_a_log_is_noticed() {
    assert!(holds_token("{\"cause\":\"eyJhbGciOiJFUzI1NiIsImtpZCI6IngifQ.eyJpc3MiOiJ4In0.c2ln\"}"));
    assert!(holds_token("eyJhbGciOiJub25lIn0."));
    assert!(holds_openbao_token("{\"token\":\"s.oLSYR3pp2AYjvZsAi9pOx1y2\"}"));
    assert!(!holds_openbao_token("its.oLSYR3pp2AYjvZsAi9pOx1y2 s.short"));
    assert!(!holds_token("{\"role\":\"tenant-acme-rw-eyJ4TNgtlvIZKMY0aB1\",\"x\":0.5}"));
}

/// A new folder with a short path: a Unix socket's has at most 107 bytes.
pub fn folder() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("pgsilo-e2e-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    dir
}

/// Writes a configuration and all that it names.
pub fn write_files(dir: &Path, settings: &Settings) {
    write_files_of(world(), dir, settings);
}

fn write_files_of(world: &World, dir: &Path, settings: &Settings) {
    let sandbox = world.dir();
    for name in ["server.crt", "server.key", "ca.crt", "jwks.json", "secret-id"] {
        fs::copy(sandbox.join(name), dir.join(name)).expect("copied");
    }
    for (name, text) in &settings.files {
        fs::write(dir.join(name), text).expect("written");
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(dir.join(name), private).expect("made private");
    }
    let tenants = fs::read_to_string(sandbox.join("tenants.toml")).expect("read");
    fs::write(dir.join("tenants.toml"), (settings.tenants)(&tenants)).expect("written");
    let openbao = match settings.openbao.is_empty() {
        true => format!(
            "address = \"{}\"\nauth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"secret-id\" }} }}\n",
            world.var("BAO_ADDR")
        ),
        false => settings.openbao.clone(),
    };
    let issuers = match settings.issuers.is_empty() {
        true => format!(
            "[[issuer]]\nissuer = \"https://issuer.sandbox.invalid\"\naudience = [\"pgsilo\"]\n\
             algorithms = [\"ES256\"]\njwks = \"jwks.json\"\ntenant_claim = \"tenant\"\naccess_claim = \"access\"\ndefault_access = \"read-write\"\n{}\n",
            settings.issuer
        ),
        false => settings.issuers.clone(),
    };
    let file = match settings.registry.contains("postgres") {
        true => "",
        false => "file = \"tenants.toml\"\n",
    };
    let mut config = settings.listeners.replace("{dir}", &dir.display().to_string());
    write!(
        config,
        "{issuers}[registry]\n{file}{}\n[openbao]\n{openbao}\n[lease]\n{}\n[limits]\n{}\n[pool]\n{}\n\
         [admin]\naddress = \"127.0.0.1:0\"\n[log]\nlevel = \"{}\"\n{}",
        settings.registry, settings.lease, settings.limits, settings.pool,
        settings.log_level, settings.more
    )
    .expect("formatted");
    fs::write(dir.join("pgsilo.toml"), config).expect("written");
}
