//! pgsilo and OpenBAO as they are deployed: a certificate authority of one's own, client
//! certificates, namespaces, an agent in between, and the files of a login that are replaced
//! while sessions run. Each test has servers of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::acme::{
    is_given_back, is_not_logged_in, is_of_no_use, lives, lives_to_its_end, refused, session,
};
use pgsilo_sandbox::testing::agent::Agent;
use pgsilo_sandbox::testing::bao::{Folder, Server, Shape};
use pgsilo_sandbox::testing::certificates::{Authority, Signed};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::Signal;
use serde_json::{Value, json};

const LOGINS: &str = "pgsilo_openbao_logins_total{result=\"ok\"}";

/// Leases are short here: a session is told of its end when a busy machine has had its time to
/// renew.
fn settings(openbao: String) -> Settings {
    Settings { openbao, lease: "grace = \"300ms\"\n".to_owned(), ..Settings::default() }
}

fn address(server: &Server) -> String {
    format!("address = \"{}\"\n", server.address())
}

/// Replaces a file as a deployment does: a whole new one is renamed over it.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("written");
    fs::rename(&new, path).expect("renamed");
}

#[tokio::test]
async fn openbao_is_trusted_by_the_authority_that_is_configured_and_no_other() {
    let (dir, authority) = (Folder::new(), Authority::new("OpenBAO's"));
    let shown = authority.sign(&dir, "server");
    let ca = authority.write(dir.join("ca.crt"));
    let tls = Shape { tls: Some(&shown), ca: Some(&authority.pem()), ..Shape::default() };
    let server = Server::start(tls).await;
    server.lend("1h").await;
    let auth = server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let trusting = |ca: &str| format!("{}{ca}{auth}", address(&server));

    let proxy = Proxy::with(settings(trusting(&format!("ca = \"{}\"\n", ca.display())))).await;
    let (client, role) = session(&proxy).await;
    drop(client);
    is_given_back(&proxy, &role).await;

    let wrong = Authority::new("OpenBAO's").write(dir.join("wrong.crt"));
    is_not_logged_in(trusting(&format!("ca = \"{}\"\n", wrong.display())), "certificate").await;
    // The system's.
    is_not_logged_in(trusting(""), "certificate").await;
}

/// A server that takes client certificates, and what pgsilo is told of it.
struct Certified {
    server: Server,
    openbao: String,
    shown: Signed,
    dir: Folder,
}

/// Its tokens and leases live for nine seconds: who goes on after that was renewed.
async fn certified(authority: &Authority, role: &str) -> Certified {
    let dir = Folder::new();
    let own = Authority::new("OpenBAO's");
    let listener = own.sign(&dir, "server");
    let ca = own.write(dir.join("ca.crt"));
    let tls = Shape { tls: Some(&listener), ca: Some(&own.pem()), ..Shape::default() };
    let server = Server::start(tls).await;
    server.lend("9s").await;
    server.write("sys/auth/cert", json!({ "type": "cert" })).await;
    admit(&server, "pgsilo", authority).await;
    let shown = authority.sign(&dir, "pgsilo");
    let openbao = format!(
        "{}ca = \"{}\"\nclient_certificate = {{ certificate = \"{}\", key = \"{}\" }}\nauth = {{ certificate = {{ {role} }} }}\n",
        address(&server),
        ca.display(),
        shown.certificate.display(),
        shown.key.display()
    );
    Certified { server, openbao, shown, dir }
}

async fn admit(server: &Server, name: &str, authority: &Authority) {
    let role = json!({
        "certificate": authority.pem(), "allowed_common_names": ["pgsilo"],
        "token_policies": ["pgsilo"], "token_no_default_policy": true, "token_period": "9s",
    });
    server.write(&format!("auth/cert/certs/{name}"), role).await;
}

/// A certificate is replaced: the new one logs in, and the old one's login is renewed as before.
async fn is_followed(certified: Certified, next: &Authority) {
    let Certified { server, openbao, shown, dir } = certified;
    let proxy = Proxy::with(settings(openbao)).await;
    let (mut old, role) = session(&proxy).await;
    let before = fs::read(&shown.certificate).expect("read");
    next.sign(&dir, "pgsilo");
    assert_ne!(before, fs::read(&shown.certificate).expect("read"));
    proxy.metric_reaches(LOGINS, 2.0).await;
    let (mut new, _role) = session(&proxy).await;
    // For longer than either login lives by itself, and no lease outlives its login.
    let renewals = proxy.metric("pgsilo_renewals_total").await;
    proxy.metric_reaches("pgsilo_renewals_total", renewals + 3.0).await;
    lives(&mut old).await;
    lives(&mut new).await;
    assert_eq!(proxy.metric("pgsilo_openbao_renew_failures_total").await, 0.0);
    assert_eq!(logins(&server).await, 2);
    drop(old);
    is_given_back(&proxy, &role).await;
}

/// Tokens that the certificate method gave out and that live.
async fn logins(server: &Server) -> usize {
    let (_status, answer) = server.ask("LIST", "auth/token/accessors", None).await;
    let mut count = 0;
    for accessor in answer["data"]["keys"].as_array().expect("accessors") {
        let body = json!({ "accessor": accessor });
        let token = server.write("auth/token/lookup-accessor", body).await;
        count += usize::from(token["data"]["path"] == "auth/cert/login");
    }
    count
}

#[tokio::test]
async fn a_client_certificate_logs_in_and_so_does_its_successor_while_sessions_go_on() {
    let authority = Authority::new("the clients'");
    is_followed(certified(&authority, "role = \"pgsilo\"").await, &authority).await;
}

#[tokio::test]
async fn a_client_certificate_of_another_authority_may_follow() {
    let (authority, next) = (Authority::new("the clients'"), Authority::new("the next"));
    // Whichever of the method's roles fits.
    let certified = certified(&authority, "").await;
    admit(&certified.server, "next", &next).await;
    is_followed(certified, &next).await;
}

#[tokio::test]
async fn sessions_of_a_certificate_that_has_expired_are_told_in_time() {
    let authority = Authority::new("the clients'");
    let Certified { server: _server, openbao, dir, .. } = certified(&authority, "").await;
    authority.sign_for(&dir, "pgsilo", Some(Duration::from_secs(12)));
    let proxy = Proxy::with(settings(openbao)).await;
    let (mut old, _role) = session(&proxy).await;
    authority.sign(&dir, "pgsilo");
    proxy.metric_reaches(LOGINS, 2.0).await;
    let (mut new, _role) = session(&proxy).await;
    // OpenBAO renews the old login for the old certificate, while that is valid.
    assert_eq!(old.fatal().await.sqlstate(), "57P01");
    assert!(proxy.metric("pgsilo_openbao_renew_failures_total").await >= 1.0);
    lives(&mut new).await;
}

#[tokio::test]
async fn credentials_are_leased_in_the_namespace_that_is_configured_and_in_no_other() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    let inside = server.within("team-a").await;
    inside.lend("9s").await;
    let auth = inside.app_role(&dir, json!({ "token_period": "60s" })).await;
    let openbao = format!("{}namespace = \"team-a\"\n{auth}", address(&server));
    let proxy = Proxy::with(settings(openbao)).await;
    let (client, role) = session(&proxy).await;
    proxy.metric_reaches("pgsilo_renewals_total", 1.0).await;
    lives_to_its_end(&proxy, client, &role).await;

    // The same, where it is unknown: the root namespace has no such method, and another one
    // has it with other roles.
    is_not_logged_in(format!("{}{auth}", address(&server)), "it answered 403").await;
    let other = server.within("team-b").await;
    other.write("sys/auth/approle", json!({ "type": "approle" })).await;
    let openbao = format!("{}namespace = \"team-b\"\n{auth}", address(&server));
    is_not_logged_in(openbao, "it answered 400").await;
}

#[tokio::test]
async fn through_an_agents_socket_its_token_file_is_followed_as_it_is_rewritten() {
    let server = Server::start(Shape::default()).await;
    server.lend("1h").await;
    let dir = Folder::new();
    server.app_role(&dir, json!({ "token_ttl": "9s", "token_max_ttl": "9s" })).await;
    // No `api_proxy`: the agent attaches no token, pgsilo shows its own.
    let agent = Agent::start(&server, "").await;
    let first = fs::read(agent.token_file()).expect("read");
    let lease = "grace = \"1s\"\n".to_owned();
    let openbao = agent.address() + &agent.auth();
    let proxy = Proxy::with(Settings { lease, ..settings(openbao) }).await;
    let (mut old, _role) = session(&proxy).await;
    let began = Instant::now();

    // The agent logs in again before its token ends, and pgsilo with it. The old token looks the
    // same each time but for what is left of it.
    eventually("the agent to write another token", async || {
        (fs::read(agent.token_file()).expect("read") != first).then_some(())
    })
    .await;
    eventually("pgsilo to use it", async || {
        let lines = proxy.lines();
        let fresh = |line: &&Value| line["ttl_seconds"].as_u64().is_some_and(|ttl| ttl >= 7);
        (lines.iter().filter(fresh).count() == 2).then_some(())
    })
    .await;
    let (mut new, _role) = session(&proxy).await;
    assert_eq!(old.fatal().await.sqlstate(), "57P01", "its token has met its maximum");
    assert!(began.elapsed() > Duration::from_secs(6), "not before: {:?}", began.elapsed());
    let first = json!({ "token": String::from_utf8(first).expect("text") });
    eventually("the old token to be dead", async || {
        let (status, _) = server.ask("POST", "auth/token/lookup", Some(first.clone())).await;
        (status == 403).then_some(())
    })
    .await;
    lives(&mut new).await;
}

#[tokio::test]
async fn a_token_file_whose_token_ends_is_not_taken_for_one_that_lives() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let wish = json!({
        "policies": ["pgsilo"], "no_default_policy": true, "ttl": "5s", "renewable": false,
    });
    let made = server.write("auth/token/create-orphan", wish).await;
    let token = made["auth"]["client_token"].as_str().expect("a token");
    fs::write(dir.join("token"), token).expect("written");
    let auth = format!("auth = {{ token_file = \"{}\" }}\n", dir.join("token").display());
    let lease = "grace = \"1s\"\n".to_owned();
    let proxy = Proxy::with(Settings { lease, ..settings(address(&server) + &auth) }).await;
    let (mut client, _role) = session(&proxy).await;
    assert_eq!(client.fatal().await.sqlstate(), "57P01");
    // It is detected without a client.
    eventually("pgsilo to be unready", async || {
        (proxy.get("/readyz").await.0 == 503).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_agents_own_token_is_no_reason_to_have_another() {
    // `force`: whatever token is shown, the agent puts its own in its place.
    let server = Server::start(Shape::default()).await;
    server.lend("9s").await;
    let dir = Folder::new();
    server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let agent = Agent::start(&server, "api_proxy {\n  use_auto_auth_token = \"force\"\n}").await;
    let proxy = Proxy::with(settings(agent.address() + &agent.auth())).await;
    let (client, role) = session(&proxy).await;
    proxy.metric_reaches("pgsilo_renewals_total", 1.0).await;
    lives_to_its_end(&proxy, client, &role).await;
}

#[tokio::test]
async fn behind_an_agent_the_leases_of_a_killed_proxy_end_by_themselves() {
    // Its token is the agent's, which lives on: nothing but their own end takes them.
    let server = Server::start(Shape::default()).await;
    server.lend("6s").await;
    let dir = Folder::new();
    server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let agent = Agent::start(&server, "").await;
    let mut proxy = Proxy::with(settings(agent.address() + &agent.auth())).await;
    let (_client, role) = session(&proxy).await;
    proxy.signal(Signal::KILL);
    proxy.ended().await;
    let killed = Instant::now();
    is_of_no_use(&role).await;
    let took = killed.elapsed();
    assert!(took > Duration::from_secs(2), "not before: {took:?}");
}

#[tokio::test]
async fn a_credential_from_an_agents_cache_is_refused_for_it_is_another_sessions() {
    let server = Server::start(Shape::default()).await;
    server.lend("1h").await;
    let dir = Folder::new();
    server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let caching = "cache {}\napi_proxy {\n  use_auto_auth_token = true\n}";
    let agent = Agent::start(&server, caching).await;
    let proxy = Proxy::with(settings(agent.address() + &agent.auth())).await;
    let (client, role) = session(&proxy).await;
    let event = refused(&proxy, "58000", Duration::from_secs(2)).await;
    assert_eq!(event["reason"], "lease_denied");
    assert!(event["cause"].as_str().expect("a cause").contains("cache"), "{event}");
    // Nothing of the first session's was given back for it.
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    lives_to_its_end(&proxy, client, &role).await;
}

/// By default OpenBAO locks a role out for 15 minutes after five wrong logins of any sender.
#[tokio::test]
async fn wrong_secret_ids_of_strangers_do_not_lock_the_proxy_out() {
    let login = json!({ "role_id": "pgsilo", "secret_id": "wrong" });
    for _ in 0..8 {
        let (status, answer) = world().bao("POST", "auth/approle/login", Some(login.clone())).await;
        assert_eq!(status, 400, "{answer}");
    }
    let proxy = Proxy::start().await;
    Raw::unix(&proxy.socket()).await.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
async fn a_secret_id_that_is_replaced_is_a_new_login() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let auth = server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let proxy = Proxy::with(settings(address(&server) + &auth)).await;
    let (mut old, role) = session(&proxy).await;

    let first = fs::read_to_string(dir.join("secret-id")).expect("read");
    replace(&dir.join("secret-id"), &format!("{}\n", server.secret_id().await));
    proxy.metric_reaches(LOGINS, 2.0).await;
    let destroy = json!({ "secret_id": first });
    server.write("auth/approle/role/pgsilo/secret-id/destroy", destroy).await;
    let (mut new, _role) = session(&proxy).await;
    lives(&mut old).await;
    lives(&mut new).await;
    drop(old);
    is_given_back(&proxy, &role).await;
}

/// pgsilo's own JWT.
fn own_jwt(subject: &str) -> String {
    mint::token_with("acme", json!({ "sub": subject }))
}

#[tokio::test]
async fn the_kubernetes_method_logs_in_and_follows_a_projected_token() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    // What looks at the token is not Kubernetes but its key; what pgsilo says is the same.
    server.write("sys/auth/kubernetes", json!({ "type": "jwt" })).await;
    let key = fs::read_to_string(world().dir().join("issuer.pem")).expect("the issuer's key");
    server.write("auth/kubernetes/config", json!({ "jwt_validation_pubkeys": [key] })).await;
    let role = json!({
        "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["pgsilo"],
        "token_policies": ["pgsilo"], "token_no_default_policy": true, "token_period": "60s",
    });
    server.write("auth/kubernetes/role/pgsilo", role).await;
    // As the kubelet keeps it: a link to a link to a folder, the latter replaced.
    let project = |name: &str, subject: &str| {
        fs::create_dir(dir.join(name)).expect("a folder");
        fs::write(dir.join(name).join("token"), own_jwt(subject)).expect("written");
        symlink(name, dir.join("..new")).expect("linked");
        fs::rename(dir.join("..new"), dir.join("..data")).expect("renamed");
    };
    project("..first", "pgsilo-pod-1");
    symlink("..data/token", dir.join("token")).expect("linked");
    let auth = format!(
        "auth = {{ kubernetes = {{ role = \"pgsilo\", token_file = \"{}\" }} }}\n",
        dir.join("token").display()
    );
    let proxy = Proxy::with(settings(address(&server) + &auth)).await;
    let (mut old, _role) = session(&proxy).await;
    project("..second", "pgsilo-pod-2");
    proxy.metric_reaches(LOGINS, 2.0).await;
    let (_new, _role) = session(&proxy).await;
    lives(&mut old).await;
    // Each login was made with the token that the file held then.
    for subject in ["pgsilo-pod-1", "pgsilo-pod-2"] {
        eventually("the login", async || {
            let (_status, answer) = server.ask("LIST", "identity/entity-alias/id", None).await;
            let aliases = answer["data"]["key_info"].as_object()?.values().cloned();
            let mut names = aliases.map(|alias: Value| alias["name"].clone());
            names.any(|name| name == subject).then_some(())
        })
        .await;
    }
}
