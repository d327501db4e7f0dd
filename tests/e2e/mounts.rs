//! A tenant's mount at OpenBAO: what is stuck there delays no other tenant, and what the
//! provisioner may do there and what not.

use std::net::SocketAddr;

use futures_util::{StreamExt, stream};
use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::orphans::settings_of;

/// OpenBAO asked as the provisioner.
async fn provisioner(world: &World, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    world.bao_as(world.var("PROVISIONER_BAO_TOKEN"), method, path, body).await
}

/// OpenBAO revokes 200 leases at once, over all mounts.
const WORKERS: usize = 200;

#[tokio::test]
async fn one_tenants_stuck_revocations_hold_no_others_up() {
    let world = World::own().await;
    let superuser = world.superuser("tenant_acme").await;
    superuser
        .batch_execute("CREATE TABLE public.gate (); GRANT SELECT ON public.gate TO PUBLIC")
        .await
        .expect("a gate");
    // Each revocation of acme's waits at the gate, which stands for whatever a tenant may hold.
    let path = "pgsilo/acme/roles/tenant-acme-rw";
    let (_status, role) = world.bao("GET", path, None).await;
    let mut role = role["data"].clone();
    let statements = role["revocation_statements"].as_array_mut().expect("statements");
    statements.insert(0, "SELECT FROM public.gate".into());
    assert_eq!(world.bao("POST", path, Some(role)).await.0, 204);
    let gatekeeper = world.superuser("tenant_acme").await;
    gatekeeper
        .batch_execute("BEGIN; LOCK TABLE public.gate IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("shut");
    let lease = async || {
        let (status, answer) = world.bao("GET", "pgsilo/acme/creds/tenant-acme-rw", None).await;
        assert_eq!(status, 200, "{answer}");
        answer["lease_id"].clone()
    };
    // A few at once: OpenBAO takes 30 s for a request at most.
    let leases = stream::iter(0..WORKERS + 20).map(|_| lease()).buffer_unordered(8);
    for lease_id in leases.collect::<Vec<_>>().await {
        let body = json!({ "lease_id": lease_id, "sync": false });
        assert_eq!(world.bao("PUT", "sys/leases/revoke", Some(body)).await.0, 202);
    }
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'tenant_acme_broker'
        AND wait_event_type = 'Lock'";
    eventually("OpenBAO to be stuck", async || {
        let row = superuser.query_one(waiting, &[]).await.expect("asked");
        (row.get::<_, i64>(0) > 0).then_some(())
    })
    .await;

    let proxy = Proxy::of(&world, settings_of(&world)).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token_of(&world, "globex"), "globex").await;
    let role = client.ask("SELECT session_user::text").await;
    drop(client);
    eventually("globex's role to be dropped", async || {
        let query = "SELECT FROM pg_roles WHERE rolname = $1";
        superuser.query_opt(query, &[&role]).await.expect("asked").is_none().then_some(())
    })
    .await;
    let row = superuser.query_one(waiting, &[]).await.expect("asked");
    assert!(row.get::<_, i64>(0) > 0, "acme's are stuck all the while");

    gatekeeper.batch_execute("ROLLBACK").await.expect("open");
    eventually("acme's leases to be revoked", async || {
        world.leases("tenant-acme-rw").await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_provisioner_makes_and_removes_tenants_mounts_and_no_others() {
    let world = World::own().await;
    let of = |kind: &str| Some(json!({ "type": kind }));
    let ask = async |method: &str, path: &str, body: Option<Value>| {
        provisioner(&world, method, path, body).await.0
    };
    assert_eq!(ask("POST", "sys/mounts/pgsilo/initech", of("database")).await, 204);
    for (method, path, body) in [
        ("POST", "sys/mounts/pgsilo/other", of("kv")),
        ("POST", "sys/mounts/pgsilo/other", of("transit")),
        ("POST", "sys/mounts/pgsilo/other/deeper", of("database")),
        ("POST", "sys/mounts/pgsilo", of("database")),
        ("POST", "sys/mounts/other", of("database")),
        ("POST", "sys/mounts/pgsilo/initech/tune", Some(json!({ "max_lease_ttl": "1h" }))),
        ("POST", "sys/remount", Some(json!({ "from": "pgsilo/initech", "to": "other" }))),
        ("DELETE", "sys/mounts/identity", None),
        ("GET", "sys/mounts", None),
        ("POST", "sys/auth/other", of("approle")),
        ("GET", "pgsilo/acme/creds/tenant-acme-rw", None),
        ("POST", "pgsilo/acme/reset/other", Some(json!({}))),
        ("POST", "pgsilo/acme/static-roles/tenant-acme", Some(json!({}))),
        ("POST", "sys/policies/acl/pgsilo", Some(json!({ "policy": "" }))),
    ] {
        assert_eq!(ask(method, path, body).await, 403, "{method} {path}");
    }
    assert_eq!(ask("DELETE", "sys/mounts/pgsilo/initech", None).await, 204);
    let (_status, mounts) = world.bao("GET", "sys/mounts", None).await;
    assert_eq!(mounts["data"]["pgsilo/initech/"], Value::Null);
    assert_eq!(mounts["data"]["pgsilo/acme/"]["type"], "database");
}

/// A server that asks its clients for a password in clear; the passwords that it got.
async fn covets_passwords() -> (SocketAddr, UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let (shown, passwords) = unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut tcp, _from)) = listener.accept().await {
            let mut sink = [0; 4096];
            // A StartupMessage; the URL says `sslmode=disable`.
            let _asked = tcp.read(&mut sink).await;
            let _said = tcp.write_all(b"R\0\0\0\x08\0\0\0\x03").await;
            let read = tcp.read(&mut sink).await.unwrap_or_default();
            let _told = shown.send(String::from_utf8_lossy(&sink[..read]).into_owned());
        }
    });
    (address, passwords)
}

#[tokio::test]
async fn the_provisioners_token_does_not_bring_a_brokers_password_to_light() {
    let world = World::own().await;
    let (evil, mut passwords) = covets_passwords().await;
    let path = "pgsilo/acme/config/tenant-acme";
    let (status, known) = provisioner(&world, "GET", path, None).await;
    assert_eq!(status, 200, "{known}");
    let own = known["data"]["connection_details"]["connection_url"].as_str().expect("a URL");
    let (front, _) = own.split_once('@').expect("a host");
    let database = own.split_once("@").and_then(|(_, tail)| tail.split_once('/')).expect("one").1;
    let elsewhere = format!("{front}@{evil}/{database}");
    let of = |url: &str, more: Value| {
        let mut body = json!({
            "plugin_name": "postgresql-database-plugin", "connection_url": url,
            "allowed_roles": known["data"]["allowed_roles"],
        });
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        body
    };
    let known_to_us = json!({ "username": "tenant_acme_broker", "password": "known" });
    let hidden = format!("{own}&host=127.0.0.1&port={}", evil.port());
    let another_port = format!("{own}&port={}", evil.port());
    let files = format!("{own}&sslkey=/etc/openbao/tls.key");
    let written_otherwise = hidden.replace("host", "h%6fst");
    let with_another = elsewhere.replace(&evil.to_string(), &format!("{},{evil}", evil.ip()));
    for (path, body) in [
        (path, of(&elsewhere, json!({}))),
        (path, of(&elsewhere, json!({ "password": null }))),
        (path, of(&elsewhere, json!({ "PASSWORD": "known" }))),
        (path, of(&elsewhere, known_to_us.clone())),
        (path, of(own, json!({}))),
        (path, of(own, known_to_us.clone())),
        (path, of(own, json!({ "Connection_URL": elsewhere }))),
        (path, of(own, json!({ "root_rotation_statements": ["SELECT 1"] }))),
        ("pgsilo/acme/config/tenant-new", of(&elsewhere, known_to_us.clone())),
        ("pgsilo/acme/config/tenant-new", of(&hidden, known_to_us.clone())),
        ("pgsilo/acme/config/tenant-new", of(&another_port, known_to_us.clone())),
        ("pgsilo/acme/config/tenant-new", of(&files, known_to_us.clone())),
        ("pgsilo/acme/config/tenant-new", of(&written_otherwise, known_to_us.clone())),
        ("pgsilo/acme/config/tenant-new", of(&with_another, known_to_us.clone())),
    ] {
        let (status, answer) = provisioner(&world, "POST", path, Some(body.clone())).await;
        assert_eq!(status, 403, "{body}: {answer}");
    }
    // Removing it removes the password with it.
    assert_eq!(provisioner(&world, "DELETE", path, None).await.0, 204);
    let body = of(own, json!({ "username": "tenant_acme_broker", "verify_connection": false }));
    assert_eq!(provisioner(&world, "POST", path, Some(body)).await.0, 204);
    let rotate = "pgsilo/acme/rotate-root/tenant-acme";
    assert_ne!(provisioner(&world, "POST", rotate, Some(json!({}))).await.0, 204);
    assert!(passwords.try_recv().is_err(), "there was no login");
    // As root, the same leads there: the stand-in does what it should.
    let globex = "pgsilo/globex/config/tenant-globex";
    let (_status, answer) = world.bao("POST", globex, Some(of(&elsewhere, json!({})))).await;
    let shown = passwords.recv().await.expect("shown");
    assert!(shown.starts_with('p') && shown.len() > 20, "{answer}");
}
