//! Grants: who may use a tenant, where an issuer's word is not enough.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, startup};
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};

use super::served::filled;
use super::{Database, said};

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
