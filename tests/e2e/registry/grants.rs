//! Grants: who may use a tenant, where an issuer's word is not enough.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, startup};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};

use super::served::filled;
use super::{Database, OPS_PASSWORD, said};
use crate::openbao::{post, session_authority};

pub(super) const ISSUER: &str = "https://issuer.sandbox.invalid";

/// A proxy whose issuer's word is not enough.
pub(crate) async fn serve() -> (Proxy, Database) {
    let database = filled().await;
    let registry = database.leased("1h").await;
    let issuer = "authorization = \"grant\"\n".to_owned();
    let proxy = Proxy::with(Settings { registry, issuer, ..Settings::default() }).await;
    (proxy, database)
}

fn token(tenant: &str, subject: &str) -> String {
    mint::token_with(tenant, json!({ "sub": subject }))
}

impl Database {
    /// Gives a grant, with more arguments. Its id.
    async fn give(&self, subject: &str, tenant: &str, access: &str, more: &[&str]) -> String {
        let add = ["add", "--issuer", ISSUER, subject, tenant, access, "--reason", "a test"];
        let given = self.grant(&[&add[..], more].concat()).await;
        assert!(said(&given).contains("in force at the one proxy"), "{}", said(&given));
        let told = String::from_utf8_lossy(&given.stdout).into_owned();
        told.split(' ').next().expect("an id").to_owned()
    }
}

async fn refused(proxy: &Proxy, token: &str, tenant: &str) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
    client.send_password(token).await;
    assert_eq!(client.fatal().await.sqlstate(), "42501");
}

#[tokio::test]
pub(crate) async fn a_session_ends_with_its_grant() {
    let (proxy, database) = serve().await;
    let (ann, bob) = (token("acme", "ann"), token("globex", "bob"));
    refused(&proxy, &ann, "acme").await;
    database.give("bob", "globex", "migrate", &[]).await;
    let mut other = Raw::unix(&proxy.socket()).await;
    other.log_in(&bob, "globex").await;
    refused(&proxy, &token("acme", "bob"), "acme").await;
    // Less than the token asks for.
    database.give("ann", "acme", "read-only", &[]).await;
    refused(&proxy, &ann, "acme").await;

    // Withdrawn, by its tenant's end or by its own.
    let id = database.give("ann", "acme", "read-write", &[]).await;
    let mut session = Raw::unix(&proxy.socket()).await;
    session.log_in(&ann, "acme").await;
    let used = proxy.event("granted", |event| event["grant"] == id.as_str()).await;
    assert_eq!(
        (used["level"].as_str(), used["break_glass"].as_bool()),
        (Some("INFO"), Some(false))
    );
    let revoked = database.grant(&["revoke", &id]).await;
    assert!(revoked.status.success(), "{}", said(&revoked));
    let error = session.fatal().await;
    assert_eq!(error.sqlstate(), "57P01");
    let told = "terminating connection because its grant has ended";
    assert_eq!(error.field(b'M').as_deref(), Some(told));
    refused(&proxy, &ann, "acme").await;

    // Lapsed: nobody does anything.
    database.give("ann", "acme", "read-write", &["--ttl", "5s"]).await;
    let mut session = Raw::unix(&proxy.socket()).await;
    session.log_in(&ann, "acme").await;
    assert_eq!(session.fatal().await.sqlstate(), "57P01");
    eventually("it to have lapsed", async || {
        let refused = proxy.connect(&ann, "acme").await.err()?;
        refused.code().filter(|code| code.code() == "42501").map(drop)
    })
    .await;
    let by_grant = |event: &&Value| event["ending"] == "grant_withdrawn";
    assert_eq!(proxy.events("ended").iter().filter(by_grant).count(), 2);
    assert_eq!(other.ask("SELECT 'undisturbed'").await, "undisturbed");
}

#[tokio::test]
async fn what_one_asks_for_another_gives() {
    let (proxy, database) = serve().await;
    let ann = token("acme", "ann");
    let ask = [
        "request",
        "--issuer",
        ISSUER,
        "ann",
        "acme",
        "read-write",
        "--reason",
        "a ticket",
        "--ttl",
        "1h",
    ];
    let asked = database.grant(&[&ask[..], &["--actor", "ann"]].concat()).await;
    assert!(asked.status.success(), "{}", said(&asked));
    let asked = String::from_utf8_lossy(&asked.stdout).into_owned();
    let id = asked.split(' ').next().expect("an id");
    refused(&proxy, &ann, "acme").await;
    let own = database.grant(&["approve", id, "--actor", "ann"]).await;
    assert!(said(&own).contains("who has asked for it does not approve it"), "{}", said(&own));
    let given = database.grant(&["approve", id, "--actor", "eve"]).await;
    assert!(given.status.success(), "{}", said(&given));
    proxy.connect(&ann, "acme").await.expect("granted");
    let list = database.grant(&["list", "--json"]).await;
    let list: Value = serde_json::from_slice(&list.stdout).expect("one grant");
    assert_eq!((&list["requested_by"], &list["granted_by"]), (&json!("ann"), &json!("eve")));
    assert!(list["expires_at"].is_string(), "{list}");

    let asked = database.grant(&[&ask[..], &["--actor", "bob"]].concat()).await;
    let asked = String::from_utf8_lossy(&asked.stdout).into_owned();
    let id = asked.split(' ').next().expect("an id");
    let denied = database.grant(&["deny", id]).await;
    assert!(denied.status.success(), "{}", said(&denied));
    let gone = database.grant(&["approve", id]).await;
    assert!(said(&gone).contains("there is nothing to approve"), "{}", said(&gone));
}

#[tokio::test]
async fn break_glass_is_short_and_loud() {
    let (proxy, database) = serve().await;
    let add = [
        "add",
        "--issuer",
        ISSUER,
        "ann",
        "acme",
        "migrate",
        "--reason",
        "an outage",
        "--break-glass",
        "--ttl",
    ];
    let long = database.grant(&[&add[..], &["5h"]].concat()).await;
    assert!(said(&long).contains("--break-glass lasts for 4h at most"), "{}", said(&long));
    let given = database.grant(&[&add[..], &["1h"]].concat()).await;
    assert!(said(&given).contains("BREAK GLASS"), "{}", said(&given));
    proxy.connect(&token("acme", "ann"), "acme").await.expect("granted");
    let used = proxy.event("granted", |_| true).await;
    assert_eq!(
        (used["level"].as_str(), used["break_glass"].as_bool()),
        (Some("ERROR"), Some(true))
    );
    // The registry itself has the same bound.
    let longer = "UPDATE pgsilo.grants SET expires_at = expires_at + interval '4 hours'";
    database.control().await.batch_execute(longer).await.expect_err("a bound");
}

const GRANTED_POLICY: &str = include_str!("../../../docker/openbao/pgsilo-granted.hcl");
const GRANTED_ROLE: &str = include_str!("../../../docker/openbao/pgsilo-granted-role.json");
const GRANTOR_POLICY: &str = include_str!("../../../docker/openbao/grantor.hcl");

/// Sessions of issuers whose word is not enough log in there by themselves. The grantor's token.
async fn admit_granted_sessions() -> String {
    for (name, policy) in [("pgsilo-granted", GRANTED_POLICY), ("grantor", GRANTOR_POLICY)] {
        post(&format!("sys/policies/acl/{name}"), json!({ "policy": policy })).await;
    }
    for (kind, access) in [("rw", "read-write"), ("ro", "read-only")] {
        let role = GRANTED_ROLE.replace("ACCESS", access).replace("PROXIES", "127.0.0.1/32");
        let role = serde_json::from_str(&role).expect("JSON");
        post(&format!("auth/jwt/cel/role/pgsilo-granted-{kind}"), role).await;
    }
    let grantor = json!({ "policies": ["grantor"], "no_default_policy": true, "ttl": "1h" });
    let made = post("auth/token/create-orphan", grantor).await;
    made["auth"]["client_token"].as_str().expect("a token").to_owned()
}

/// What OpenBAO says to who has a session's token and nothing between.
struct Direct {
    token: String,
}

impl Direct {
    async fn log_in(kind: &str, jwt: &str) -> Direct {
        let login = json!({ "role": format!("pgsilo-granted-{kind}"), "jwt": jwt });
        let (status, answer) = world().bao("POST", "auth/jwt/cel/login", Some(login)).await;
        assert_eq!(status, 200, "{answer}");
        Direct { token: answer["auth"]["client_token"].as_str().expect("a token").to_owned() }
    }

    /// The status of an answer to who asks for a credential.
    async fn ask(&self, path: &str) -> u16 {
        let url = format!("{}/v1/{path}", world().var("BAO_ADDR"));
        let request = reqwest::Client::new().get(url).header("X-Vault-Token", &self.token);
        request.send().await.expect("answered").status().as_u16()
    }
}

const WRITES: &str = "pgsilo/acme/creds/tenant-acme-rw";

#[tokio::test]
async fn under_session_authority_a_grant_ends_at_openbao_too() {
    let grantor = admit_granted_sessions().await;
    let database = filled().await;
    let grant = async |arguments: &[&str]| {
        let mut command = database.program_of_operator();
        command.arg("grant").args(arguments).args(["--tls", "disable"]);
        command.env("GRANTOR_BAO_TOKEN", &grantor).env("BAO_ADDR", world().var("BAO_ADDR"));
        let done = command.output().await.expect("it runs");
        assert!(done.status.success(), "{}", said(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    // Its login is a password: under session authority pgsilo has none at OpenBAO.
    let reader = format!("{}_reader", database.name);
    let make = format!(
        "CREATE ROLE {reader} LOGIN PASSWORD '{OPS_PASSWORD}' IN ROLE pgsilo_registry_proxy"
    );
    world().superuser("postgres").await.batch_execute(&make).await.expect("made");
    let settings = Settings {
        registry: format!(
            "{}user = \"{reader}\"\npassword_file = \"registry-password\"\n",
            database.place()
        ),
        files: vec![("registry-password", OPS_PASSWORD.to_owned())],
        issuer: "authorization = \"grant\"\n".to_owned(),
        lease: session_authority().lease.replace("pgsilo-session", "pgsilo-granted"),
        openbao: session_authority().openbao,
        ..Settings::default()
    };
    let proxy = Proxy::with(settings).await;
    proxy.metric_reaches("pgsilo_registry_stale_seconds", 0.0).await;

    // OpenBAO folds capitals in names: another Olga is nobody.
    let writes = json!("read-write");
    let [ann, other] = ["Olga Ö", "olga Ö"]
        .map(|name| mint::token_with("acme", json!({ "sub": name, "access": writes })));
    let direct = Direct::log_in("rw", &ann).await;
    assert_eq!(direct.ask(WRITES).await, 403);
    let add = ["add", "--issuer", ISSUER, "Olga Ö", "acme", "read-write", "--reason", "a test"];
    let given = grant(&[&add[..], &["--ttl", "15s", "--at-openbao"]].concat()).await;
    assert!(given.contains("may use acme"), "{given}");
    let mut session = Raw::unix(&proxy.socket()).await;
    session.log_in(&ann, "acme").await;
    assert_eq!(session.ask("SELECT current_database()").await, "tenant_acme");
    assert_eq!(direct.ask(WRITES).await, 200);
    assert_eq!(direct.ask("pgsilo/globex/creds/tenant-globex-rw").await, 403);
    assert_eq!(Direct::log_in("rw", &other).await.ask(WRITES).await, 403);
    let reads = mint::token_with("acme", json!({ "sub": "Olga Ö", "access": "read-only" }));
    let less = Direct::log_in("ro", &reads).await;
    assert_eq!(less.ask("pgsilo/acme/creds/tenant-acme-ro").await, 200, "more includes less");
    assert_eq!(less.ask(WRITES).await, 403);
    // Nobody has to do anything for that.
    assert_eq!(session.fatal().await.sqlstate(), "57P01");
    eventually("OpenBAO to end it", async || (direct.ask(WRITES).await == 403).then_some(())).await;

    // Until it is revoked; and what somebody else has done there is undone.
    let given = grant(&[&add[..], &["--at-openbao"]].concat()).await;
    let id = given.split(' ').next().expect("an id");
    assert_eq!(direct.ask(WRITES).await, 200);
    let (status, policies) = world().bao("GET", "sys/policies/acl?list=true", None).await;
    assert_eq!(status, 200);
    let policies = policies["data"]["keys"].as_array().expect("a list").clone();
    let own = policies.iter().filter_map(Value::as_str);
    let own: Vec<_> = own.filter(|name| name.starts_with("pgsilo-grant-")).collect();
    assert_eq!(own.len(), 2, "{own:?}");
    for name in own {
        world().bao("DELETE", &format!("sys/policies/acl/{name}"), None).await;
    }
    let stray = json!({ "policy": format!("path \"{WRITES}\" {{ capabilities = [\"read\"] }}") });
    world().bao("POST", "sys/policies/acl/pgsilo-grant-stray", Some(stray)).await;
    assert_eq!(direct.ask(WRITES).await, 403);
    let would = grant(&["sync", "--dry-run"]).await;
    assert_eq!(direct.ask(WRITES).await, 403);
    let synced = grant(&["sync"]).await;
    assert_eq!(synced, would);
    assert!(synced.starts_with("- pgsilo-grant-stray\n+ pgsilo-grant-read-"), "{synced}");
    assert_eq!(direct.ask(WRITES).await, 200);
    assert_eq!(grant(&["sync"]).await, "", "all is there, and as it should be");
    // What is at OpenBAO is not forgotten there.
    let mut forgetful = database.program_of_operator();
    forgetful.args(["grant", "revoke", id, "--tls", "disable"]).env_remove("BAO_ADDR");
    let forgot = forgetful.output().await.expect("it runs");
    assert!(said(&forgot).contains("--registry-only"), "{}", said(&forgot));
    assert_eq!(direct.ask(WRITES).await, 200);
    grant(&["revoke", id]).await;
    assert_eq!(direct.ask(WRITES).await, 403);
}
