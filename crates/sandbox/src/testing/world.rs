//! The sandbox that the whole run shares: started by the first test that needs it, stopped by
//! the end of this process, which closes its standard input.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio_postgres::types::ToSql;

use super::{eventually, passwords, programs};

/// A running sandbox.
#[derive(Debug)]
pub struct World {
    env: HashMap<String, String>,
    /// Its standard input keeps it alive.
    sandbox: Child,
}

/// The one sandbox.
pub fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let allowed =
            ["--max-connections", "800", "--allow", "advisory-locks", "--leased-over-tcp"];
        World::start("shared", &allowed)
    })
}

impl World {
    /// Starts a sandbox whose registry is a file; blocks until it is ready.
    pub fn start(name: &str, arguments: &[&str]) -> World {
        World::start_with(name, &[&["--registry-file"], arguments].concat())
    }

    fn start_with(name: &str, arguments: &[&str]) -> World {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = format!("e2e-{}-{name}-{number}", std::process::id());
        let dir = programs::tmp().join(dir);
        let mut sandbox = Command::new(programs::sandbox())
            .arg("--until-eof")
            .args(arguments)
            .arg("--dir")
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("pgsilo-sandbox starts");
        let mut said = String::new();
        let mut lines = BufReader::new(sandbox.stdout.take().expect("piped")).lines();
        loop {
            let Some(Ok(line)) = lines.next() else { panic!("the sandbox did not start:\n{said}") };
            said += &line;
            said.push('\n');
            if line.starts_with("Ready in ") {
                break;
            }
        }
        std::thread::spawn(move || lines.for_each(drop));
        let env = std::fs::read_to_string(dir.join("env")).expect("the sandbox wrote its env file");
        let world = World { env: parse(&env), sandbox };
        world.mark_passwords();
        world
    }

    /// On a thread of its own: the caller may be a runtime's.
    fn mark_passwords(&self) {
        let mark = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(passwords::mark(self));
        };
        std::thread::scope(|scope| scope.spawn(mark).join().expect("passwords are marked"));
    }

    /// A sandbox of its own, without a proxy, for a test that makes a part of it unwell.
    pub async fn own() -> World {
        World::own_with(&["--without-proxy", "--leased-over-tcp"]).await
    }

    /// The same, started as an operator would have it.
    pub async fn own_with(arguments: &'static [&'static str]) -> World {
        let world = tokio::task::spawn_blocking(move || World::start("own", arguments));
        world.await.expect("started")
    }

    /// A sandbox whose registry is its database: what `pgsiloctl` makes is served.
    pub async fn of_registry(arguments: &'static [&'static str]) -> World {
        let world = tokio::task::spawn_blocking(move || World::start_with("registry", arguments));
        world.await.expect("started")
    }

    /// Sends a signal to its OpenBAO.
    pub fn signal_bao(&self, signal: Signal) {
        let pid = Pid::from_raw(self.var("BAO_PID").parse().expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("OpenBAO lives");
    }

    /// Seals its OpenBAO, which then answers 503 to everything.
    pub async fn seal(&self) {
        let (status, answer) = self.bao("PUT", "sys/seal", Some(serde_json::json!({}))).await;
        assert_eq!(status, 204, "{answer}");
    }

    /// Opens it again.
    pub async fn unseal(&self) {
        let key = serde_json::json!({ "key": self.var("BAO_UNSEAL_KEY") });
        let (status, answer) = self.bao("PUT", "sys/unseal", Some(key)).await;
        assert_eq!(status, 200, "{answer}");
    }

    /// A variable of the sandbox's `env` file.
    pub fn var(&self, name: &str) -> &str {
        self.env.get(name).unwrap_or_else(|| panic!("the sandbox has no {name}"))
    }

    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.var("PGSILO_SANDBOX_DIR").into()
    }

    /// A program of the PostgreSQL that it runs: psql, pgbench, ...
    pub fn pg_program(&self, name: &str) -> PathBuf {
        Path::new(self.var("PG_BIN")).join(name)
    }

    /// A superuser's connection to a database of the cluster.
    pub async fn superuser(&self, dbname: &str) -> tokio_postgres::Client {
        let mut config: tokio_postgres::Config =
            self.var("PG_SUPERUSER_DSN").parse().expect("a DSN");
        let (client, connection) =
            config.dbname(dbname).connect(tokio_postgres::NoTls).await.expect("superuser logs in");
        tokio::spawn(connection);
        client
    }

    /// Waits until a process of the database waits for that: `PgSleep`, `ClientWrite`.
    pub async fn waits_for(&self, pid: impl Display, event: &str) {
        let watcher = self.superuser("postgres").await;
        let pid = pid.to_string();
        let waits = "SELECT 1 FROM pg_stat_activity WHERE pid::text = $1 AND wait_event = $2";
        eventually(&format!("process {pid} to wait for {event}"), async || {
            watcher.query_opt(waits, &[&pid, &event]).await.expect("asked")
        })
        .await;
    }

    /// Waits until there is no such process of the database.
    pub async fn has_ended(&self, pid: impl Display) {
        let watcher = self.superuser("postgres").await;
        let pid = pid.to_string();
        let there = "SELECT 1 FROM pg_stat_activity WHERE pid::text = $1";
        eventually(&format!("process {pid} to end"), async || {
            let there = watcher.query_opt(there, &[&pid]).await.expect("asked");
            there.is_none().then_some(())
        })
        .await;
    }

    /// How many of the roles of these names anybody can use: they may log in, or are logged in. A
    /// role that was revoked while others were logging in may stay for a minute, and is of no use.
    pub async fn usable_roles(&self, names: &[impl AsRef<str>]) -> i64 {
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        self.count_usable("r.rolname = ANY ($1)", &names).await
    }

    /// The same of those whose names match a regular expression.
    pub async fn usable_roles_like(&self, pattern: &str) -> i64 {
        self.count_usable("r.rolname ~ $1", &pattern).await
    }

    async fn count_usable(&self, which: &str, names: &(dyn ToSql + Sync)) -> i64 {
        let query = format!(
            "SELECT count(*) FROM pg_roles r WHERE {which} AND (r.rolcanlogin OR EXISTS (
                SELECT FROM pg_stat_activity a WHERE a.usesysid = r.oid))"
        );
        let superuser = self.superuser("postgres").await;
        superuser.query_one(&query, &[names]).await.expect("asked").get(0)
    }

    /// Asks OpenBAO as root. `LIST` is a method there.
    pub async fn bao(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        self.bao_as(self.var("BAO_TOKEN"), method, path, body).await
    }

    /// Has acme's leases renewed sooner or later than the sandbox has it.
    pub async fn lend_acme(&self, default_ttl: &str) {
        let path = "pgsilo/acme/roles/tenant-acme-rw";
        let (_status, role) = self.bao("GET", path, None).await;
        let mut role = role["data"].clone();
        role["default_ttl"] = default_ttl.into();
        let (status, _) = self.bao("POST", path, Some(role)).await;
        assert_eq!(status, 204);
    }

    /// Asks OpenBAO with a token.
    pub async fn bao_as(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let url = format!("{}/v1/{path}", self.var("BAO_ADDR"));
        let mut request =
            reqwest::Client::new().request(method, url).header("X-Vault-Token", token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("OpenBAO answers");
        let status = response.status().as_u16();
        (status, response.json().await.unwrap_or(Value::Null))
    }

    /// Makes a role at OpenBAO like acme's read-write one, but for its times.
    pub async fn role_like_acme(&self, name: &str, default_ttl: &str, max_ttl: &str) {
        // Once: it interrupts sessions that are served meanwhile.
        static ALLOWED: tokio::sync::OnceCell<()> = tokio::sync::OnceCell::const_new();
        let allow = async || {
            let any = serde_json::json!({
                "allowed_roles": ["tenant-acme-*"], "verify_connection": false,
            });
            let (status, answer) =
                self.bao("POST", "pgsilo/acme/config/tenant-acme", Some(any)).await;
            assert!((200..300).contains(&status), "{answer}");
        };
        ALLOWED.get_or_init(allow).await;
        let (status, answer) = self.bao("GET", "pgsilo/acme/roles/tenant-acme-rw", None).await;
        assert_eq!(status, 200);
        let mut role = answer["data"].clone();
        role["default_ttl"] = default_ttl.into();
        role["max_ttl"] = max_ttl.into();
        let (status, answer) =
            self.bao("POST", &format!("pgsilo/acme/roles/{name}"), Some(role)).await;
        assert!((200..300).contains(&status), "{answer}");
    }

    /// Ids of the leases that OpenBAO holds for a tenant's role, `tenant-ID-...`.
    pub async fn leases(&self, role: &str) -> Vec<String> {
        let tenant = role.split('-').nth(1).expect("tenant-ID-...");
        let path = format!("sys/leases/lookup/pgsilo/{tenant}/creds/{role}");
        let (_status, answer) = self.bao("LIST", &path, None).await;
        let keys = answer["data"]["keys"].as_array().cloned().unwrap_or_default();
        keys.iter().filter_map(|key| key.as_str().map(str::to_owned)).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.sandbox.stdin.take());
        let _stopped = self.sandbox.wait();
    }
}

fn parse(env: &str) -> HashMap<String, String> {
    env.lines()
        .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').replace("'\\''", "'")))
        .collect()
}
