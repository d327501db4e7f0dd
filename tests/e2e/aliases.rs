//! Tenants that issuers call by names of their own: a word leads to the tenant that the registry or
//! the issuer's table says, and to no other, for as long as that is so.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Message, Raw, startup};
use serde_json::{Value, json};

/// A token that names its tenants so.
fn token(tenants: Value) -> String {
    mint::token_with("acme", json!({ "tenant": tenants }))
}

async fn session(proxy: &Proxy, tenants: Value, database: &str) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token(tenants), database).await;
    client
}

async fn refused(proxy: &Proxy, tenants: Value, database: &str) -> Message {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", database)])).await;
    client.send_password(&token(tenants)).await;
    client.fatal().await
}

fn with_alias(tenants: &str, id: &str) -> String {
    let own = format!("id = \"{id}\"");
    tenants.replacen(&own, &format!("{own}\naliases = [\"org_Ab1\"]"), 1)
}

const WHERE: &str = "SELECT current_database()";

#[tokio::test]
async fn an_alias_leads_to_its_tenant_and_its_sessions_end_when_it_means_another() {
    let tenants = |text: &str| with_alias(text, "acme");
    let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
    let plain = proxy.tenants().replacen("\naliases = [\"org_Ab1\"]", "", 1);
    let mut by_alias = session(&proxy, json!(["org_Ab1"]), "").await;
    let mut by_both = session(&proxy, json!(["org_Ab1", "acme"]), "acme").await;
    for client in [&mut by_alias, &mut by_both] {
        assert_eq!(client.ask(WHERE).await, "tenant_acme");
    }
    let started = proxy.event("started", |_| true).await;
    assert_eq!(started["tenant"], "acme");

    // It is the issuer's word: a client may not name it, and an unknown one leads nowhere.
    let unknown = refused(&proxy, json!("org_Ab1"), "org_Ab1").await;
    assert_eq!(unknown.sqlstate(), "3D000");
    assert_eq!(refused(&proxy, json!("ORG_AB1"), "").await.sqlstate(), "28000");
    assert_eq!(refused(&proxy, json!(["acme", "ORG_AB1"]), "acme").await.sqlstate(), "28000");
    let event = proxy.event("refused", |event| event["reason"] == "tenant_unresolved").await;
    assert_eq!((&event["subject"], &event["stage"]), (&json!("tester"), &json!("identified")));

    proxy.reload(&with_alias(&plain, "globex"));
    assert_eq!(by_alias.fatal().await.sqlstate(), "57P01");
    let ended = proxy.event("ended", |_| true).await;
    assert_eq!((&ended["ending"], &ended["tenant"]), (&"tenant_withdrawn".into(), &"acme".into()));
    assert_eq!(by_both.ask(WHERE).await, "tenant_acme", "its token has the id, too");
    let mut moved = session(&proxy, json!("org_Ab1"), "").await;
    assert_eq!(moved.ask(WHERE).await, "tenant_globex");
}

#[tokio::test]
async fn an_issuers_table_says_whom_it_means_and_bounds_hold_for_aliases() {
    let issuer = |more: &str| {
        format!(
            "[[issuer]]\nissuer = \"https://issuer.sandbox.invalid\"\naudience = [\"pgsilo\"]\n\
             algorithms = [\"ES256\"]\njwks = \"jwks.json\"\n{more}\n"
        )
    };
    let tenants = |text: &str| with_alias(text, "globex");
    let listeners = UNIX.to_owned();
    let issuers = issuer("tenant_values = { \"/acme\" = \"acme\" }");
    let proxy = Proxy::with(Settings { issuers, tenants, listeners, ..Settings::default() }).await;
    let mut mapped = session(&proxy, json!(["/admins", "/acme"]), "").await;
    assert_eq!(mapped.ask(WHERE).await, "tenant_acme");
    for unmapped in [json!("acme"), json!("globex"), json!("org_Ab1"), json!(["/admins"])] {
        assert_eq!(refused(&proxy, unmapped.clone(), "").await.sqlstate(), "28000", "{unmapped}");
    }

    let issuers = issuer("tenants = [\"acme\"]");
    let proxy = Proxy::with(Settings { issuers, tenants, ..Settings::default() }).await;
    assert_eq!(refused(&proxy, json!("org_Ab1"), "").await.sqlstate(), "28000");
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "tenant_forbidden", "the registry's word does not widen it");
}
