//! Which of OpenBAO's tokens pgsilo takes for its own and for its sessions: none that would end,
//! with every session under it, without notice; and none is left behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use pgsilo_sandbox::testing::acme::{is_not_logged_in, refused};
use pgsilo_sandbox::testing::bao::{Folder, Root, Server, Shape};
use pgsilo_sandbox::testing::certificates::Authority;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::slow::Slow;
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};

use crate::openbao::{own_token, session_authority};

/// Tokens that OpenBAO knows and that fit.
async fn tokens(server: &Root, fits: impl Fn(&Value) -> bool) -> Vec<Value> {
    let (_status, answer) = server.ask("LIST", "auth/token/accessors", None).await;
    let mut found = Vec::new();
    for accessor in answer["data"]["keys"].as_array().expect("accessors") {
        let body = Some(json!({ "accessor": accessor }));
        // It may have ended meanwhile.
        let (_status, token) = server.ask("POST", "auth/token/lookup-accessor", body).await;
        if token["data"].is_object() && fits(&token["data"]) {
            found.push(token["data"].clone());
        }
    }
    found
}

/// No token that a method gave out is left, however often pgsilo has tried.
async fn none_is_left(server: &Root, path: &str) {
    eventually("every token that was not taken to be given back", async || {
        tokens(server, |token| token["path"] == path).await.is_empty().then_some(())
    })
    .await;
}

fn address(server: &Root) -> String {
    format!("address = \"{}\"\n", server.address())
}

async fn lending() -> (Folder, Server) {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    (dir, server)
}

const USES: &str = "its token ends after 10 uses, and every session with it: set token_num_uses=0";
const BATCH: &str = "its token is of type \"batch\"";

#[tokio::test]
async fn an_app_role_whose_tokens_wear_out_is_refused() {
    let (dir, server) = lending().await;
    let worn = json!({ "token_period": "60s", "token_num_uses": 10 });
    let auth = server.app_role(&dir, worn).await;
    is_not_logged_in(address(&server) + &auth, USES).await;
    none_is_left(&server, "auth/approle/login").await;
}

#[tokio::test]
async fn an_app_role_whose_tokens_cannot_be_revoked_is_refused() {
    let (dir, server) = lending().await;
    let batch = json!({ "token_type": "batch", "token_ttl": "60s" });
    let auth = server.app_role(&dir, batch).await;
    is_not_logged_in(address(&server) + &auth, BATCH).await;
}

#[tokio::test]
async fn a_wrapped_secret_id_of_a_role_whose_tokens_wear_out_is_refused() {
    let (dir, server) = lending().await;
    let worn = json!({ "token_period": "60s", "token_num_uses": 10 });
    let auth = server.app_role(&dir, worn).await;
    let wrapped = server.wrapped_secret_id().await;
    fs::write(dir.join("secret-id"), wrapped).expect("written");
    let auth = auth.replace(" } }", ", wrapped = true } }");
    is_not_logged_in(address(&server) + &auth, USES).await;
    none_is_left(&server, "auth/approle/login").await;
}

#[tokio::test]
async fn a_jwt_whose_tokens_wear_out_is_refused_and_so_is_a_service_accounts() {
    let (dir, server) = lending().await;
    let key = fs::read_to_string(world().dir().join("issuer.pem")).expect("the issuer's key");
    fs::write(dir.join("jwt"), mint::token("acme")).expect("written");
    for method in ["jwt", "kubernetes"] {
        // What looks at the token is not Kubernetes but its key; what pgsilo says is the same.
        server.write(&format!("sys/auth/{method}"), json!({ "type": "jwt" })).await;
        let keys = json!({ "jwt_validation_pubkeys": [key] });
        server.write(&format!("auth/{method}/config"), keys).await;
        let mut role = json!({
            "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["pgsilo"],
            "token_policies": ["pgsilo"], "token_no_default_policy": true,
        });
        let path = format!("auth/{method}/role/pgsilo");
        let auth = format!(
            "auth = {{ {method} = {{ role = \"pgsilo\", token_file = \"{}\" }} }}\n",
            dir.join("jwt").display()
        );
        role["token_num_uses"] = 10.into();
        role["token_period"] = "60s".into();
        server.write(&path, role.clone()).await;
        is_not_logged_in(address(&server) + &auth, USES).await;
        none_is_left(&server, &format!("auth/{method}/login")).await;
        role["token_num_uses"] = 0.into();
        role["token_period"] = 0.into();
        role["token_type"] = "batch".into();
        server.write(&path, role).await;
        is_not_logged_in(address(&server) + &auth, BATCH).await;
    }
}

#[tokio::test]
async fn a_client_certificate_whose_tokens_wear_out_is_refused() {
    let (dir, own, clients) =
        (Folder::new(), Authority::new("OpenBAO's"), Authority::new("the clients'"));
    let listener = own.sign(&dir, "server");
    let ca = own.write(dir.join("ca.crt"));
    let tls = Shape { tls: Some(&listener), ca: Some(&own.pem()), ..Shape::default() };
    let server = Server::start(tls).await;
    server.lend("1h").await;
    server.write("sys/auth/cert", json!({ "type": "cert" })).await;
    let shown = clients.sign(&dir, "pgsilo");
    let openbao = format!(
        "{}ca = \"{}\"\nclient_certificate = {{ certificate = \"{}\", key = \"{}\" }}\nauth = {{ certificate = {{ role = \"pgsilo\" }} }}\n",
        address(&server),
        ca.display(),
        shown.certificate.display(),
        shown.key.display()
    );
    for (wrong, cause) in [
        (json!({ "token_period": "60s", "token_num_uses": 10 }), USES),
        (json!({ "token_ttl": "60s", "token_type": "batch" }), BATCH),
    ] {
        let mut role = json!({
            "certificate": clients.pem(), "allowed_common_names": ["pgsilo"],
            "token_policies": ["pgsilo"], "token_no_default_policy": true,
        });
        for (key, value) in wrong.as_object().expect("an object") {
            role[key] = value.clone();
        }
        server.ask("DELETE", "auth/cert/certs/pgsilo", None).await;
        server.write("auth/cert/certs/pgsilo", role).await;
        is_not_logged_in(openbao.clone(), cause).await;
        none_is_left(&server, "auth/cert/login").await;
    }
}

/// A file of a token, and the way to log in with it.
async fn token_file(dir: &Path, made: Value) -> String {
    let token = made["auth"]["client_token"].as_str().expect("a token");
    fs::write(dir.join("token"), token).expect("written");
    format!("auth = {{ token_file = \"{}\" }}\n", dir.join("token").display())
}

#[tokio::test]
async fn a_token_of_a_file_that_breaks_promises_is_refused() {
    let (dir, server) = lending().await;
    let of = |more: Value| {
        let mut wish = json!({ "policies": ["pgsilo"], "no_default_policy": true });
        for (key, value) in more.as_object().expect("an object") {
            wish[key] = value.clone();
        }
        wish
    };
    let orphan = "auth/token/create-orphan";
    for (path, wish, cause) in [
        (orphan, of(json!({ "period": "60s", "num_uses": 10 })), "uses, and every session with it"),
        (orphan, of(json!({ "ttl": "60s", "type": "batch" })), BATCH),
        ("auth/token/create", of(json!({ "period": "60s" })), "make it with -orphan"),
        (orphan, json!({ "policies": ["root"] }), "its token is a root token"),
    ] {
        let made = server.write(path, wish).await;
        let auth = token_file(&dir, made).await;
        is_not_logged_in(address(&server) + &auth, cause).await;
    }
}

#[tokio::test]
async fn a_token_that_may_not_be_looked_up_is_refused() {
    let (dir, server) = lending().await;
    let (_status, policy) = server.ask("GET", "sys/policies/acl/pgsilo", None).await;
    let policy = policy["data"]["policy"].as_str().expect("a policy").to_owned();
    let without = policy.replace("auth/token/lookup-self", "auth/token/lookup-not");
    server.write("sys/policies/acl/pgsilo", json!({ "policy": without })).await;
    let auth = server.app_role(&dir, json!({ "token_period": "60s" })).await;
    is_not_logged_in(address(&server) + &auth, "it answered 403").await;
    none_is_left(&server, "auth/approle/login").await;
}

#[tokio::test]
async fn an_explicit_maximum_causes_a_warning_and_is_served_to_its_end() {
    let (dir, server) = lending().await;
    let ends = json!({ "token_period": "60s", "token_explicit_max_ttl": "1h" });
    let auth = server.app_role(&dir, ends).await;
    let openbao = address(&server) + &auth;
    let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
    let warning = proxy.logged(|line| line["max_seconds"] == 3600).await;
    assert_eq!(warning["level"], "WARN");
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");
}

#[tokio::test]
async fn a_sessions_login_that_breaks_promises_is_refused() {
    let (_dir, server) = lending().await;
    let key = fs::read_to_string(world().dir().join("issuer.pem")).expect("the issuer's key");
    server.write("sys/auth/jwt", json!({ "type": "jwt" })).await;
    server.write("auth/jwt/config", json!({ "jwt_validation_pubkeys": [key] })).await;
    let lease = session_authority().lease.replace("jwt/cel", "jwt");
    let openbao = address(&server);
    let proxy = Proxy::with(Settings { openbao, lease, ..Settings::default() }).await;
    for (wrong, cause) in [
        (json!({ "token_period": "60s", "token_num_uses": 10 }), USES),
        (json!({ "token_ttl": "60s", "token_type": "batch" }), BATCH),
    ] {
        let mut role = json!({
            "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["pgsilo"],
            "token_policies": ["pgsilo"], "token_no_default_policy": true,
        });
        for (key, value) in wrong.as_object().expect("an object") {
            role[key] = value.clone();
        }
        let path = "auth/jwt/role/pgsilo-session-rw";
        server.ask("DELETE", path, None).await;
        server.write(path, role).await;
        let event = refused(&proxy, "58000", Duration::from_secs(10)).await;
        assert_eq!(event["reason"], "lease_denied");
        assert!(event["cause"].as_str().expect("a cause").contains(cause), "{event}");
        none_is_left(&server, "auth/jwt/login").await;
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 0.0);
}

#[tokio::test]
async fn a_login_that_is_answered_too_late_is_given_back() {
    let (dir, server) = lending().await;
    let auth = server.app_role(&dir, json!({ "token_period": "1h" })).await;
    let slow = Slow::before(server.address().trim_start_matches("http://")).await;
    let openbao = format!("address = \"http://{}\"\ntimeout = \"2s\"\n{auth}", slow.address);
    let proxy = Proxy::unready(Settings { openbao, ..Settings::default() }).await;
    let late = proxy.logged(|line| line["error"] == "it did not answer in time").await;
    assert_eq!(late["level"], "ERROR");
    let made = async || tokens(&server, |token| token["path"] == "auth/approle/login").await.len();
    eventually("OpenBAO to have made one", async || (made().await > 0).then_some(())).await;
    slow.lets_go();
    proxy.metric_reaches("pgsilo_openbao_logged_in", 1.0).await;
    eventually("only the one that is used to be left", async || (made().await == 1).then_some(()))
        .await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(client.ask("SELECT 'served'").await, "served");
}

#[tokio::test]
async fn a_sessions_login_that_is_answered_too_late_is_given_back() {
    let bao = world().var("BAO_ADDR").trim_start_matches("http://");
    let slow = Slow::before(bao).await;
    let openbao = format!("address = \"http://{}\"\ntimeout = \"2s\"\n", slow.address);
    let proxy = Proxy::with(Settings { openbao, ..session_authority() }).await;
    let token = mint::token_with("acme", json!({ "sub": "late", "access": "read-write" }));
    let error = proxy.connect(&token, "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some("57P03"));
    let root = Root::of(world());
    let made = async || tokens(&root, |token| token["display_name"] == "jwt-late").await.len();
    eventually("OpenBAO to have made one", async || (made().await == 1).then_some(())).await;
    slow.lets_go();
    eventually("it to be given back", async || (made().await == 0).then_some(())).await;
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 0.0, "no credential was requested");
    let served = proxy.connect(&own_token("acme", "read-write"), "acme").await;
    served.expect("served");
}
