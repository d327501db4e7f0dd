//! pgsilo and OpenBAO: whose authority leases are asked for with, how pgsilo logs in, and what
//! becomes of sessions when a login ends, the proxy is killed, or OpenBAO is unwell.

use std::fs;

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::{World, world};
use pgsilo_sandbox::testing::{eventually, fake, mint};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn address() -> String {
    format!("address = \"{}\"\n", world().var("BAO_ADDR"))
}

pub(crate) async fn post(path: &str, body: Value) -> Value {
    let (status, answer) = world().bao("POST", path, Some(body)).await;
    assert!((200..300).contains(&status), "{path}: {status} {answer}");
    answer
}

/// Makes an AppRole of its own for a test; answers with its secret id.
async fn app_role(name: &str, extra: Value) -> String {
    let mut role = json!({
        "role_id": name, "token_policies": ["pgsilo"], "token_no_default_policy": true,
    });
    for (key, value) in extra.as_object().expect("an object") {
        role[key] = value.clone();
    }
    post(&format!("auth/approle/role/{name}"), role).await;
    let made = post(&format!("auth/approle/role/{name}/secret-id"), json!({})).await;
    made["data"]["secret_id"].as_str().expect("a secret id").to_owned()
}

/// A pgsilo that logs in with an AppRole of its own.
async fn with_app_role(name: &str, extra: Value, settings: Settings) -> Proxy {
    let secret_id = app_role(name, extra).await;
    let file = std::env::temp_dir().join(format!("pgsilo-e2e-{}-{name}", std::process::id()));
    fs::write(&file, secret_id).expect("written");
    let auth = format!(
        "auth = {{ approle = {{ role_id = \"{name}\", secret_id_file = \"{}\" }} }}\n",
        file.display()
    );
    Proxy::with(Settings { openbao: address() + &auth, ..settings }).await
}

async fn roles_left(roles: &[String]) -> i64 {
    world().usable_roles(roles).await
}

async fn sessions(proxy: &Proxy, count: usize) -> (Vec<Raw>, Vec<String>) {
    let (mut clients, mut roles) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(&mint::token("acme"), "acme").await;
        roles.push(client.ask("SELECT session_user::text").await);
        clients.push(client);
    }
    (clients, roles)
}

#[tokio::test]
async fn a_killed_proxy_leaves_no_usable_role_once_its_token_period_has_passed() {
    let extra = json!({ "token_period": "5s" });
    let mut proxy = with_app_role("killed", extra, Settings::default()).await;
    let (_clients, roles) = sessions(&proxy, 200).await;
    assert_eq!(roles_left(&roles).await, 200);
    proxy.signal(rustix::process::Signal::KILL);
    proxy.ended().await;
    eventually("every role to be dropped", async || (roles_left(&roles).await == 0).then_some(()))
        .await;
}

#[tokio::test]
async fn a_login_at_its_maximum_is_followed_by_another_and_its_sessions_are_told_in_time() {
    let extra = json!({ "token_ttl": "8s", "token_max_ttl": "8s" });
    let settings = Settings { lease: "grace = \"3s\"\n".to_owned(), ..Settings::default() };
    let proxy = with_app_role("maximal", extra, settings).await;
    let mut first = Raw::unix(&proxy.socket()).await;
    first.log_in(&mint::token("acme"), "acme").await;
    // Another login is there well before the first one ends, so new sessions are always served.
    proxy.metric_reaches("pgsilo_openbao_logins_total{result=\"ok\"}", 2.0).await;
    let mut second = Raw::unix(&proxy.socket()).await;
    second.log_in(&mint::token("acme"), "acme").await;
    let error = first.fatal().await;
    assert_eq!(error.sqlstate(), "57P01");
    assert_eq!(
        error.field(b'M').as_deref(),
        Some("terminating connection because its database credential expired")
    );
    assert_eq!(second.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn a_dead_token_is_replaced_and_the_session_is_served() {
    let proxy =
        with_app_role("mortal", json!({ "token_period": "60s" }), Settings::default()).await;
    let mut first = Raw::unix(&proxy.socket()).await;
    first.log_in(&mint::token("acme"), "acme").await;
    // Its token is the only one that the role has given out.
    let (_status, answer) = world().bao("LIST", "auth/token/accessors", None).await;
    for accessor in answer["data"]["keys"].as_array().expect("accessors") {
        let body = Some(json!({ "accessor": accessor }));
        let (_status, token) =
            world().bao("POST", "auth/token/lookup-accessor", body.clone()).await;
        if token["data"]["meta"]["role_name"] == "mortal" {
            world().bao("POST", "auth/token/revoke-accessor", body).await;
        }
    }
    assert_eq!(first.fatal().await.sqlstate(), "57P01", "its lease went with the token");
    let mut second = Raw::unix(&proxy.socket()).await;
    second.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(second.ask("SELECT 'served'").await, "served");
    assert_eq!(proxy.metric("pgsilo_openbao_logins_total{result=\"ok\"}").await, 2.0);
}

#[tokio::test]
async fn a_wrapped_secret_id_is_unwrapped_once_and_kept() {
    let extra = json!({ "token_ttl": "6s", "token_max_ttl": "6s" });
    app_role("wrapped", extra).await;
    let url = format!("{}/v1/auth/approle/role/wrapped/secret-id", world().var("BAO_ADDR"));
    let request =
        reqwest::Client::new().post(url).header("X-Vault-Token", world().var("BAO_TOKEN"));
    let request = request.header("X-Vault-Wrap-TTL", "60s").json(&json!({}));
    let answer: Value = request.send().await.expect("answered").json().await.expect("JSON");
    let wrapping = answer["wrap_info"]["token"].as_str().expect("a wrapping token");
    let file = std::env::temp_dir().join(format!("pgsilo-e2e-{}-wrapping", std::process::id()));
    fs::write(&file, wrapping).expect("written");
    let auth = format!(
        "auth = {{ approle = {{ role_id = \"wrapped\", secret_id_file = \"{}\", wrapped = true }} }}\n",
        file.display()
    );
    let proxy = Proxy::with(Settings { openbao: address() + &auth, ..Settings::default() }).await;
    // The second login can only work with what the first unwrapped.
    proxy.metric_reaches("pgsilo_openbao_logins_total{result=\"ok\"}", 2.0).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");
    assert_eq!(proxy.metric("pgsilo_openbao_logins_total{result=\"ok\"}").await, 2.0);
}

#[tokio::test]
async fn a_token_file_is_read_again_when_it_changes() {
    let token = async || {
        let wish = json!({ "policies": ["pgsilo"], "no_default_policy": true, "period": "60s" });
        let made = post("auth/token/create-orphan", wish).await;
        made["auth"]["client_token"].as_str().expect("a token").to_owned()
    };
    let file = std::env::temp_dir().join(format!("pgsilo-e2e-{}-token", std::process::id()));
    let first = token().await;
    fs::write(&file, &first).expect("written");
    let openbao = format!("{}auth = {{ token_file = \"{}\" }}\n", address(), file.display());
    let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
    let mut old = Raw::unix(&proxy.socket()).await;
    old.log_in(&mint::token("acme"), "acme").await;

    fs::write(&file, format!("{}\n", token().await)).expect("written");
    proxy.metric_reaches("pgsilo_openbao_logins_total{result=\"ok\"}", 2.0).await;
    // The old token may go now: only its own leases go with it.
    let mut new = Raw::unix(&proxy.socket()).await;
    new.log_in(&mint::token("acme"), "acme").await;
    post("auth/token/revoke", json!({ "token": first })).await;
    assert_eq!(old.fatal().await.sqlstate(), "57P01");
    assert_eq!(new.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn pgsilo_may_log_in_with_a_jwt_of_its_own() {
    post(
        "auth/jwt/role/pgsilo-itself",
        json!({
            "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["pgsilo"],
            "bound_subject": "pgsilo-itself", "token_policies": ["pgsilo"],
            "token_no_default_policy": true, "token_period": "60s",
        }),
    )
    .await;
    let file = std::env::temp_dir().join(format!("pgsilo-e2e-{}-jwt", std::process::id()));
    fs::write(&file, mint::token_with("acme", json!({ "sub": "pgsilo-itself" }))).expect("written");
    let auth = format!(
        "auth = {{ jwt = {{ role = \"pgsilo-itself\", token_file = \"{}\" }} }}\n",
        file.display()
    );
    let proxy = Proxy::with(Settings { openbao: address() + &auth, ..Settings::default() }).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");
}

pub(crate) fn session_authority() -> Settings {
    let lease = "authority = \"session\"\n[lease.session]\nmount = \"jwt/cel\"\n\
        roles = { read-write = \"pgsilo-session-rw\", read-only = \"pgsilo-session-ro\" }\n";
    Settings { openbao: address(), lease: lease.to_owned(), ..Settings::default() }
}

/// A token that OpenBAO takes by itself: the tenant, and a subject of that tenant's.
pub(crate) fn own_token(tenant: &str, access: &str) -> String {
    let subject = format!("alice@{tenant}");
    mint::token_with(tenant, json!({ "sub": subject, "access": access }))
}

#[tokio::test]
async fn under_session_authority_the_clients_own_token_gets_the_lease() {
    let proxy = Proxy::with(session_authority()).await;
    assert_eq!(proxy.get("/readyz").await.0, 200, "there is nothing to log in to");
    for tenant in ["acme", "globex"] {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(&own_token(tenant, "read-write"), tenant).await;
        assert_eq!(client.ask("SELECT current_database()").await, format!("tenant_{tenant}"));
        let role = client.ask("SELECT session_user::text").await;
        assert!(role.starts_with(&format!("tenant-{tenant}-rw-")));
        drop(client);
        eventually("the lease to go with its token", async || {
            (roles_left(std::slice::from_ref(&role)).await == 0).then_some(())
        })
        .await;
    }
    let reader = proxy.connect(&own_token("acme", "read-only"), "acme").await.expect("connected");
    reader.query("SELECT * FROM customers", &[]).await.expect("reads");
    reader.batch_execute("DELETE FROM customers").await.expect_err("does not write");
    assert_eq!(proxy.metric("pgsilo_openbao_logins_total{result=\"ok\"}").await, 0.0);
}

#[tokio::test]
async fn under_session_authority_even_a_proxy_that_asks_is_refused_another_tenant() {
    // A registry gone wrong, or a proxy in an attacker's hands: acme's sessions ask for globex's
    // credential, and OpenBAO itself says no.
    let proxy = Proxy::with(session_authority()).await;
    proxy.reload(&proxy.tenants().replacen("tenant-acme-rw", "tenant-globex-rw", 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    let error = proxy.connect(&own_token("acme", "read-write"), "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some("58000"));
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "lease_denied");
    assert!(event["cause"].as_str().expect("a cause").contains("403"), "{event}");

    // Asked directly, with all that the session's token can get.
    let login = json!({ "role": "pgsilo-session-rw", "jwt": own_token("acme", "read-write") });
    let token = post("auth/jwt/cel/login", login).await["auth"]["client_token"].clone();
    let ask = async |path: &str| {
        let url = format!("{}/v1/{path}", world().var("BAO_ADDR"));
        let token = token.as_str().expect("a token");
        let request = reqwest::Client::new().get(url).header("X-Vault-Token", token);
        request.send().await.expect("answered").status().as_u16()
    };
    assert_eq!(ask("pgsilo/acme/creds/tenant-acme-rw").await, 200);
    for path in [
        "pgsilo/globex/creds/tenant-globex-rw",
        "pgsilo/acme/creds/tenant-acme-ro",
        "pgsilo/acme/creds/tenant-acme-rw-2",
        "pgsilo/acme/roles/tenant-acme-rw",
        "pgsilo/acme/config/tenant-acme",
    ] {
        assert_eq!(ask(path).await, 403, "{path}");
    }
    // A reader cannot choose the writers' role, nor somebody without an access any.
    for access in [json!("read-only"), Value::Null] {
        let jwt = mint::token_with("acme", json!({ "sub": "alice@acme", "access": access }));
        let login = json!({ "role": "pgsilo-session-rw", "jwt": jwt });
        assert_eq!(world().bao("POST", "auth/jwt/cel/login", Some(login)).await.0, 400);
    }
}

#[tokio::test]
async fn under_session_authority_a_lease_is_renewed_with_its_own_login() {
    // The policy allows just the roles that there are, so it takes a world of its own to give
    // one of them another time.
    let world = World::own().await;
    world.lend_acme("4s").await;
    let openbao = format!("address = \"{}\"\n", world.var("BAO_ADDR"));
    let proxy = Proxy::of(&world, Settings { openbao, ..session_authority() }).await;
    let token = mint::signed_by(
        &world,
        json!({ "sub": "alice@acme", "tenant": "acme", "access": "read-write" }),
    );
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token, "acme").await;
    proxy.metric_reaches("pgsilo_renewals_total", 2.0).await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn leases_that_openbao_has_given_up_on_are_counted() {
    // The real one has given up on none, and says so to pgsilo's own policy.
    let proxy = Proxy::start().await;
    given_up(&proxy, 0).await;
    // It takes a real one ten minutes.
    let address = fake::serves(|mut tcp| async move {
        let mut request = vec![0; 4096];
        let n = tcp.read(&mut request).await.unwrap_or(0);
        let body = match String::from_utf8_lossy(&request[..n])
            .contains("/v1/sys/leases/count?type=irrevocable ")
        {
            true => "{\"data\":{\"lease_count\":3,\"counts\":{\"database_1\":3}}}",
            false => {
                "{\"data\":{\"ttl\":0,\"renewable\":false,\"num_uses\":0,\"type\":\"service\",\
                 \"orphan\":true,\"explicit_max_ttl\":0}}"
            }
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let _said = tcp.write_all(answer.as_bytes()).await;
    })
    .await;
    let openbao =
        format!("address = \"http://{address}\"\nauth = {{ token_file = \"secret-id\" }}\n");
    let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
    given_up(&proxy, 3).await;
}

/// Waits until that many are told; there is no such metric before.
async fn given_up(proxy: &Proxy, leases: u32) {
    let line = format!("\npgsilo_openbao_irrevocable_leases {leases}\n");
    eventually("the leases to be counted", async || {
        proxy.get("/metrics").await.1.contains(&line).then_some(())
    })
    .await;
}
