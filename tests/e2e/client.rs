//! The client that both planes ask OpenBAO with, against the real one: each request that is its own
//! and not vaultrs', and that nothing that it logs holds a secret.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgsilo_core::secret::Secret;
use pgsilo_openbao::requests::{CapabilitiesSelf, Read, RevokeLeases, SetPolicy};
use pgsilo_openbao::{Error, OpenBao, Settings};
use pgsilo_sandbox::testing::bao::{Folder, Server, Shape};
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};
use tracing::{Dispatch, Level};
use tracing_subscriber::Registry;

const MOUNT: &str = "pgsilo/acme";
const ROLE: &str = "tenant-acme-rw";
const CREDS: &str = "pgsilo/acme/creds/tenant-acme-rw";

fn data_plane(server: &Server) -> OpenBao {
    OpenBao::new(Settings::for_control(server.address())).expect("a client")
}

#[tokio::test]
async fn leases_are_looked_up_renewed_and_revoked() {
    let server = Server::start(Shape::default()).await;
    server.lend("1h").await;
    let (client, openbao, root) = (server.client(), data_plane(&server), server.token());
    assert_eq!(client.leases(CREDS).await.expect("an answer"), Vec::<String>::new());
    let granted = openbao.creds(&root, MOUNT, ROLE).await.expect("a credential");
    assert_eq!((granted.duration, granted.renewable), (Duration::from_secs(3600), true));
    let [key] = &client.leases(CREDS).await.expect("an answer")[..] else { panic!("one lease") };
    assert_eq!(format!("{CREDS}/{key}"), granted.lease_id);
    let known = client.lease(&granted.lease_id).await.expect("an answer").expect("it is there");
    assert!((3500..=3600).contains(&known.ttl), "{known:?}");
    let renewed = openbao.renew(&root, &granted.lease_id, Duration::from_secs(7200)).await;
    assert_eq!(renewed.expect("renewed").duration, Duration::from_secs(7200));
    assert_eq!(openbao.irrevocable_leases(&root).await.expect("a number"), 0);
    openbao.revoke(&root, &granted.lease_id).await.expect("taken");
    eventually("the lease to be gone", async || {
        client.lease(&granted.lease_id).await.expect("an answer").is_none().then_some(())
    })
    .await;
    let unknown = openbao.renew(&root, &granted.lease_id, Duration::from_secs(60)).await;
    assert!(unknown.expect_err("it is gone").is_status(400));
    let second = openbao.creds(&root, MOUNT, ROLE).await.expect("a credential");
    client.revoke_lease(&second.lease_id).await.expect("revoked");
    assert!(client.lease(&second.lease_id).await.expect("an answer").is_none());
    openbao.creds(&root, MOUNT, ROLE).await.expect("a credential");
    client.run(&RevokeLeases { prefix: CREDS.to_owned(), sync: true }).await.expect("revoked");
    assert_eq!(client.leases(CREDS).await.expect("an answer"), Vec::<String>::new());
}

#[tokio::test]
async fn missing_entities_are_none_and_refusals_are_errors() {
    let server = Server::start(Shape::default()).await;
    server.lend("1h").await;
    let client = server.client();
    assert_eq!(client.engine(MOUNT).await.expect("an answer").as_deref(), Some("database"));
    assert_eq!(client.engine("pgsilo/nobody").await.expect("an answer"), None);
    client.mount_engine("pgsilo/nobody", "database").await.expect("mounted");
    assert_eq!(
        client.engine("pgsilo/nobody").await.expect("an answer").as_deref(),
        Some("database")
    );
    let role = client.database_role(MOUNT, ROLE).await.expect("an answer").expect("a role");
    assert_eq!(role.db_name, "tenant-acme");
    assert!(role.creation_statements.concat().contains("CREATE ROLE"), "{role:?}");
    for mount in [MOUNT, "pgsilo/nobody", "pgsilo/unmounted"] {
        assert!(client.database_role(mount, "nosuch").await.expect("an answer").is_none());
        assert!(client.database_config(mount, "nosuch").await.expect("an answer").is_none());
    }
    let nobody = client.as_token(Secret::new("s.0123456789abcdefghijklmn"));
    for refused in [
        nobody.database_role(MOUNT, ROLE).await.map(drop),
        nobody.engine(MOUNT).await.map(drop),
        nobody.lease("a/b").await.map(drop),
        nobody.leases(CREDS).await.map(drop),
    ] {
        let failure = refused.expect_err("no such token");
        assert!(failure.error().is_status(403), "{failure}");
        let words = failure.to_string();
        assert!(words.starts_with("OpenBAO: ") && words.contains(": it answered 403: "), "{words}");
    }
}

#[tokio::test]
async fn a_databases_configuration_is_written_with_everything_that_it_needs() {
    let server = Server::start(Shape::default()).await;
    server.lend("1h").await;
    let client = server.client();
    let settings = json!({
        "plugin_name": "postgresql-database-plugin",
        "connection_url": "postgresql://{{username}}:{{password}}@127.0.0.1:1/none",
        "username": "somebody",
        "password_authentication": "scram-sha-256",
        "allowed_roles": ["one", "two"],
        "verify_connection": false,
    });
    let password = Secret::new("needs \"quotes\" and \\");
    client.set_database_config(MOUNT, "other", &settings, &password).await.expect("written");
    let read = client.database_config(MOUNT, "other").await.expect("an answer").expect("there");
    assert_eq!(read.username(), Some("somebody"));
    assert_eq!(read.connection_details["password_authentication"], "scram-sha-256");
    assert_eq!(read.others["allowed_roles"], json!(["one", "two"]));
    client.delete_database_config(MOUNT, "other").await.expect("deleted");
    assert!(client.database_config(MOUNT, "other").await.expect("an answer").is_none());
    // It has no such database to give another password in.
    client.rotate_root(MOUNT, "other").await.expect_err("not there");
}

#[tokio::test]
async fn a_policy_may_end_by_itself_and_a_token_asks_what_it_may() {
    let server = Server::start(Shape::default()).await;
    let client = server.client();
    let policy = "path \"a/b\" { capabilities = [\"read\"] }".to_owned();
    let name = "brief".to_owned();
    let expiration = Some("2099-01-02T03:04:05.678Z".to_owned());
    client.run(&SetPolicy { name, policy, expiration }).await.expect("written");
    let read = client.read("sys/policies/acl/brief").await.expect("there");
    assert_eq!(read["data"]["expiration"], "2099-01-02T03:04:05.678Z");
    let asked = CapabilitiesSelf { paths: vec!["a/b".to_owned(), "a/c".to_owned()] };
    let answer: Value = client.ask(&asked).await.expect("answered");
    assert_eq!(answer["data"]["a/b"], json!(["root"]));
}

/// Everything that is told, by whatever library.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<u8>>>);

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn log_lines_of_every_level_hold_no_secret() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let secret_id = Secret::new(server.secret_id().await);
    let wrapping = Secret::new(server.wrapped_secret_id().await);
    let (told, session) = (Told::default(), Secret::new(mint::token("acme")));
    // With a subscriber alone, what other threads' first event of a kind finds there (none) would
    // be taken for the answer of all threads.
    let _another = Dispatch::new(Registry::default());
    let sink = told.clone();
    let everything = tracing_subscriber::fmt()
        .with_max_level(Level::TRACE)
        .with_writer(move || sink.clone())
        .finish();
    // Of this thread, on which the whole test runs.
    let listening = tracing::subscriber::set_default(everything);
    let (openbao, client, root) = (data_plane(&server), server.client(), server.token());
    let login = openbao.log_in_approle("approle", "pgsilo", &secret_id).await.expect("a token");
    let unwrapped = openbao.unwrap_secret_id(&wrapping).await.expect("a secret id");
    let granted = openbao.creds(&login.secret, MOUNT, ROLE).await.expect("a credential");
    let renewed = openbao.renew_self(&login.secret).await.expect("renewed");
    let looked_up = openbao.look_up_self(login.secret.clone()).await.expect("known");
    openbao.revoke(&login.secret, &granted.lease_id).await.expect("revoked");
    let mut failed: Vec<Error> = Vec::new();
    failed.extend(openbao.log_in_jwt("nosuch", "role", &session).await.err());
    failed.extend(openbao.log_in_approle("approle", "nosuch", &secret_id).await.err());
    failed.extend(openbao.creds(&login.secret, MOUNT, "nosuch").await.err());
    failed.extend(openbao.unwrap_secret_id(&wrapping).await.err());
    let quota = json!({ "path": "pgsilo/acme/", "rate": 1, "interval": "1h" });
    client.write("sys/quotas/rate-limit/few", quota).await.expect("written");
    for _ in 0..2 {
        failed.extend(openbao.creds(&root, MOUNT, ROLE).await.err());
    }
    client
        .write("sys/quotas/rate-limit/few", json!({ "path": "", "rate": 1000 }))
        .await
        .expect("written");
    openbao.revoke_self(&login.secret).await.expect("revoked");
    failed.extend(openbao.renew_self(&login.secret).await.err());
    let statuses: Vec<_> = failed.iter().map(ToString::to_string).collect();
    assert_eq!(failed.len(), 6, "{statuses:?}");
    // An answer with a password that is not what was expected.
    let unread = client.ask::<Vec<u8>>(&Read { path: CREDS.to_owned() }).await;
    let unread = unread.expect_err("no list");
    assert!(matches!(unread.error(), Error::NotJson), "{unread}");
    let password = Secret::new("a password of a configuration");
    client
        .set_database_config(MOUNT, "other", &json!({}), &password)
        .await
        .expect_err("too little");
    drop(listening);
    let told = String::from_utf8(told.0.lock().expect("no panic").clone()).expect("text");
    assert!(told.contains("TRACE"), "nothing was logged: {told}");
    let printed =
        format!("{openbao:?} {client:?} {login:?} {granted:?} {looked_up:?} {failed:?} {unread:?}");
    for secret in [
        &root,
        &secret_id,
        &wrapping,
        &session,
        &unwrapped,
        &password,
        &granted.password,
        &login.secret,
        &renewed.secret,
    ] {
        let secret = secret.expose_text().expect("text");
        assert!(!told.contains(secret), "{secret} was told:\n{told}");
        assert!(!printed.contains(secret), "{secret} is printed:\n{printed}");
    }
}
