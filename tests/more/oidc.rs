//! An OpenID provider that others wrote, with its own discovery document, keys and access tokens
//! (RFC 9068), as the issuer that pgsilo believes.

use std::fs;
use std::path::PathBuf;

use jsonwebtoken::decode_header;
use pgsilo_sandbox::testing::bao::free_port;
use pgsilo_sandbox::testing::driver::{output, script};
use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, folder};
use pgsilo_sandbox::testing::world::world;
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::var;

/// What pgsilo is to the provider: a resource.
const PGSILO: &str = "https://databases.example";
/// Of each of its clients; see issuer.js.
const SECRET: &str = "for-tests-on-loopback-only";

/// A running provider.
struct Provider {
    dir: PathBuf,
    port: u16,
    http: reqwest::Client,
    process: Child,
}

impl Provider {
    /// Starts it with one key.
    async fn start(kid: &str) -> Provider {
        let dir = folder();
        for name in ["server.crt", "server.key", "ca.crt"] {
            fs::copy(world().dir().join(name), dir.join(name)).expect("copied");
        }
        let ca = fs::read(dir.join("ca.crt")).expect("read");
        let ca = reqwest::Certificate::from_pem(&ca).expect("a CA");
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([ca]);
        let port = free_port();
        let process = node(&dir, port, &[kid]);
        let http = http.build().expect("a client");
        let provider = Provider { dir, port, http, process };
        provider.answers(&[kid]).await;
        provider
    }

    /// Starts it again with other keys, the first of which signs.
    async fn restart(&mut self, kids: &[&str]) {
        self.process.kill().await.expect("killed");
        self.process = node(&self.dir, self.port, kids);
        self.answers(kids).await;
    }

    fn name(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Waits until it publishes these keys.
    async fn answers(&self, kids: &[&str]) {
        eventually("the provider to answer", async || {
            let jwks = self.http.get(self.name() + "/jwks").send().await.ok()?;
            let jwks: Value = jwks.json().await.ok()?;
            let published = jwks["keys"].as_array()?.iter().filter_map(|key| key["kid"].as_str());
            published.eq(kids.iter().copied()).then_some(())
        })
        .await;
    }

    /// What it gives a client that asks for a token, for a resource or for none.
    async fn token(&self, client: &str, resource: Option<&str>) -> String {
        let resource = resource.map(|resource| format!("&resource={resource}")).unwrap_or_default();
        let request = self
            .http
            .post(self.name() + "/token")
            .basic_auth(client, Some(SECRET))
            .header("Content-Type", "application/x-www-form-urlencoded")
            .body(format!("grant_type=client_credentials{resource}"));
        let answer: Value = request.send().await.expect("sent").json().await.expect("JSON");
        answer["access_token"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// A pgsilo that believes it.
    async fn proxy(&self) -> Proxy {
        let issuers = format!(
            "[[issuer]]\nissuer = \"{}\"\naudience = [\"{PGSILO}\"]\nalgorithms = [\"ES256\"]\n\
             discovery = true\nca = \"ca.crt\"\nrefresh = \"1s\"\n\
             tenant_claim = \"tenant\"\ndefault_access = \"read-write\"\n",
            self.name()
        );
        Proxy::with(Settings { issuers, ..Settings::default() }).await
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.dir);
    }
}

fn node(dir: &PathBuf, port: u16, kids: &[&str]) -> Child {
    let mut command = Command::new("node");
    command.env("NODE_PATH", var("NODE_PATH")).arg(script("tests/more/node/issuer.js"));
    command.arg(dir).arg(port.to_string()).args(kids).kill_on_drop(true);
    command.spawn().expect("node starts")
}

/// What psql is told by the database that it reaches with a token.
async fn psql(proxy: &Proxy, token: &str, database: &str) -> Result<String, String> {
    let mut command = Command::new(world().pg_program("psql"));
    command.args(["-X", "-w", "-A", "-t", "-c", "SELECT current_database()"]);
    command.env("PGPASSWORD", token);
    let dir = proxy.dir().display();
    command.arg(format!("host={dir} port=6432 user=app dbname={database}"));
    let output = output(&mut command).await;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

async fn lands(proxy: &Proxy, token: &str, tenant: &str) {
    assert_eq!(psql(proxy, token, tenant).await, Ok(format!("tenant_{tenant}")));
}

#[tokio::test]
async fn a_client_of_an_openid_provider_reaches_its_own_tenant_only() {
    let provider = Provider::start("first").await;
    let proxy = provider.proxy().await;
    for (client, tenant, other) in [("orders", "acme", "globex"), ("billing", "globex", "acme")] {
        let token = provider.token(client, Some(PGSILO)).await;
        let header = decode_header(&token).expect("a JWT");
        assert_eq!(header.typ.as_deref(), Some("at+jwt"));
        assert_eq!(header.kid.as_deref(), Some("first"));
        lands(&proxy, &token, tenant).await;
        let started = proxy.event("started", |event| event["tenant"] == tenant).await;
        assert_eq!(started["issuer"], provider.name());
        assert_eq!(started["subject"], client);
        let said = psql(&proxy, &token, other).await.expect_err("another's");
        assert!(said.contains(&format!("database \"{other}\" does not exist")), "{said}");
    }
}

#[tokio::test]
async fn other_tokens_of_an_openid_provider_are_refused() {
    let provider = Provider::start("first").await;
    let proxy = provider.proxy().await;
    for (client, resource, reason, cause) in [
        ("orders", Some("https://elsewhere.example"), "token_invalid", "wrong audience"),
        // It gives out no JWT for no resource.
        ("orders", None, "token_invalid", "malformed token"),
        ("nobody", Some(PGSILO), "tenant_unresolved", "no tenant claim"),
    ] {
        let token = provider.token(client, resource).await;
        let said = psql(&proxy, &token, "acme").await.expect_err("refused");
        let refused = proxy
            .event("refused", |event| {
                event["cause"].as_str().is_some_and(|said| said.starts_with(cause))
            })
            .await;
        assert_eq!(refused["reason"], reason, "{said}");
    }
    assert_eq!(proxy.events("started").len(), 0);
}

#[tokio::test]
async fn an_openid_providers_new_key_works_at_once_and_its_old_one_until_it_is_gone() {
    let mut provider = Provider::start("first").await;
    let proxy = provider.proxy().await;
    let old = provider.token("orders", Some(PGSILO)).await;
    lands(&proxy, &old, "acme").await;

    provider.restart(&["second", "first"]).await;
    let new = provider.token("orders", Some(PGSILO)).await;
    assert_eq!(decode_header(&new).expect("a JWT").kid.as_deref(), Some("second"));
    // A fetch that found the provider stopped says so for five seconds, and drivers try again; and so
    // they do where OpenBAO's storage, which all tests write to, has let another one's write win.
    let served = async || match psql(&proxy, &new, "acme").await {
        Ok(database) => Some(database),
        Err(said) => {
            let for_a_moment = ["cannot be verified at the moment", "not available at the moment"];
            assert!(for_a_moment.iter().any(|words| said.contains(words)), "{said}");
            None
        }
    };
    assert_eq!(eventually("the new key to be taken", served).await, "tenant_acme");
    lands(&proxy, &old, "acme").await;

    provider.restart(&["second"]).await;
    eventually("the old key to be refused", async || psql(&proxy, &old, "acme").await.err()).await;
    lands(&proxy, &new, "acme").await;
}
