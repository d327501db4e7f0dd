//! Session authority, as OpenBAO sees it: a session's token brings the credentials of the tenant
//! that it names, for as long as it lives, to pgsilo and to nothing else; and nothing of it is left
//! behind.

use std::net::IpAddr;

use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};

use crate::openbao::session_authority;

const ROLE: &str = "pgsilo-session-rw";

fn token(tenant: impl Into<Value>, more: Value) -> String {
    let mut claims = json!({ "tenant": tenant.into(), "access": "read-write" });
    for (name, value) in more.as_object().expect("an object") {
        claims[name] = value.clone();
    }
    mint::token_with("acme", claims)
}

/// Shows OpenBAO a session's token; what it answers.
async fn log_in(jwt: &str) -> (u16, Value) {
    let body = json!({ "role": ROLE, "jwt": jwt });
    world().bao("POST", "auth/jwt/cel/login", Some(body)).await
}

/// The OpenBAO token that a session's token becomes.
async fn become_known(jwt: &str) -> String {
    let (status, answer) = log_in(jwt).await;
    assert_eq!(status, 200, "{answer}");
    answer["auth"]["client_token"].as_str().expect("a token").to_owned()
}

async fn creds(token: &str, tenant: &str) -> u16 {
    let path = format!("pgsilo/{tenant}/creds/tenant-{tenant}-rw");
    world().bao_as(token, "GET", &path, None).await.0
}

/// Its session is in its tenant's database.
async fn arrives(proxy: &Proxy, tenant: &str, subject: &str) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token(tenant, json!({ "sub": subject })), tenant).await;
    assert_eq!(client.ask("SELECT current_database()").await, format!("tenant_{tenant}"));
}

#[tokio::test]
async fn subjects_that_differ_in_case_or_not_at_all_are_each_their_own_tenants() {
    let proxy = Proxy::with(session_authority()).await;
    for (tenant, subject) in [
        ("acme", "Olga"),
        ("globex", "olga"),
        ("acme", "OLGA"),
        ("acme", "olga"),
        ("globex", "Olga"),
    ] {
        arrives(&proxy, tenant, subject).await;
    }
    // Asked directly, with all that the token can get.
    let acmes = become_known(&token("acme", json!({ "sub": "Olga" }))).await;
    let globexs = become_known(&token("globex", json!({ "sub": "olga" }))).await;
    assert_eq!((creds(&globexs, "globex").await, creds(&globexs, "acme").await), (200, 403));
    assert_eq!((creds(&acmes, "acme").await, creds(&acmes, "globex").await), (200, 403));
    for token in [acmes, globexs] {
        world().bao_as(&token, "POST", "auth/token/revoke-self", None).await;
    }
}

#[tokio::test]
async fn a_token_without_exactly_one_tenant_gets_no_login() {
    for tenant in [
        json!(["acme", "globex"]),
        json!(["acme"]),
        json!([]),
        json!({ "acme": 1 }),
        json!(true),
        json!(7),
        Value::Null,
        json!(""),
        json!("ACME"),
        json!("Acme"),
        json!("acme\n"),
        json!(" acme"),
        json!("acme "),
        json!("acme/../globex"),
        json!("acme/globex"),
        json!("acme\""),
        json!("acme'"),
        json!("acme*"),
        json!("+"),
        json!("*"),
        json!("acme,globex"),
        json!("{{identity.entity.id}}"),
        json!("<no value>"),
        json!("-acme"),
        json!("a".repeat(64)),
    ] {
        let (status, answer) = log_in(&token(tenant.clone(), json!({}))).await;
        assert_eq!(status, 400, "{tenant}: {answer}");
    }
    for more in [
        json!({ "access": null }),
        json!({ "access": ["read-write"] }),
        json!({ "access": "read-only" }),
        json!({ "sub": null }),
        json!({ "sub": ["tester"] }),
        json!({ "aud": "another" }),
        json!({ "exp": null }),
        json!({ "exp": mint::now() - 45 }),
    ] {
        let (status, answer) = log_in(&token("acme", more.clone())).await;
        assert_eq!(status, 400, "{more}: {answer}");
    }
}

#[tokio::test]
async fn a_sessions_login_ends_with_its_token_and_works_from_pgsilos_address_only() {
    let lives = 120;
    let jwt = token("acme", json!({ "exp": mint::now() + lives }));
    let known = become_known(&jwt).await;
    let (status, answer) = world().bao_as(&known, "GET", "auth/token/lookup-self", None).await;
    assert_eq!(status, 200);
    // Renewed or not: a minute behind the token at most, when pgsilo has ended the session.
    let max = answer["data"]["explicit_max_ttl"].as_u64().expect("a maximum");
    assert!((1..=lives + 60).contains(&max), "{answer}");
    assert_eq!(answer["data"]["num_uses"], 0);
    assert_eq!(answer["data"]["policies"], json!([ROLE]));

    // From an address that is not pgsilo's.
    let other: IpAddr = "127.0.0.2".parse().expect("an address");
    let elsewhere = reqwest::Client::builder().no_proxy().local_address(other).build();
    let elsewhere = elsewhere.expect("a client");
    let url = |path: &str| format!("{}/v1/{path}", world().var("BAO_ADDR"));
    let body = json!({ "role": ROLE, "jwt": jwt });
    let login = elsewhere.post(url("auth/jwt/cel/login")).json(&body).send().await;
    let login: Value = login.expect("answered").json().await.expect("JSON");
    let own = login["auth"]["client_token"].as_str().unwrap_or("none");
    for token in [own, &known] {
        let request = elsewhere.get(url("pgsilo/acme/creds/tenant-acme-rw"));
        let answer = request.header("X-Vault-Token", token).send().await.expect("answered");
        assert_eq!(answer.status().as_u16(), 403);
    }
    assert_eq!(creds(&known, "acme").await, 200, "from pgsilo's");
    world().bao_as(&known, "POST", "auth/token/revoke-self", None).await;
}

#[tokio::test]
async fn neither_entities_nor_logins_pile_up() {
    let proxy = Proxy::with(session_authority()).await;
    arrives(&proxy, "acme", "first").await;
    let entities = async || {
        let (_status, answer) = world().bao("LIST", "identity/entity-alias/id", None).await;
        let aliases = answer["data"]["key_info"].as_object().cloned().unwrap_or_default();
        let mut names: Vec<_> = aliases.values().map(|alias| alias["name"].to_string()).collect();
        names.retain(|name| name.contains("piling") || name.contains("acme"));
        names
    };
    assert_eq!(entities().await, ["\"acme\""]);
    for number in 0..20 {
        arrives(&proxy, "acme", &format!("piling-{number}")).await;
    }
    assert_eq!(entities().await, ["\"acme\""], "one for the tenant, however many subjects");
    eventually("no login to be left", async || {
        let (_status, answer) = world().bao("LIST", "auth/token/accessors", None).await;
        for accessor in answer["data"]["keys"].as_array().expect("accessors") {
            let body = Some(json!({ "accessor": accessor }));
            let (_status, token) = world().bao("POST", "auth/token/lookup-accessor", body).await;
            if token["data"]["display_name"].as_str().is_some_and(|name| name.contains("piling")) {
                return None;
            }
        }
        Some(())
    })
    .await;
}
