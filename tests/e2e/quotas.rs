//! When OpenBAO is asked too often and says 429: what keeps sessions alive goes before what begins
//! new ones, and who is told when to come again comes then.

use std::time::Duration;

use pgsilo_sandbox::testing::acme::{lives, refused, session};
use pgsilo_sandbox::testing::bao::{Folder, Server, Shape};
use pgsilo_sandbox::testing::gateway::{Busy, Gateway};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;

use crate::orphans::settings_of;

const RENEWALS: &str = "/sys/leases/renew";
const CREDENTIALS: &str = "/creds/";

/// A pgsilo that asks a sandbox's OpenBAO through a gateway, and whose leases are renewed soon.
async fn behind_a_gateway() -> (World, Gateway, Proxy) {
    let world = World::own().await;
    world.lend_acme("15s").await;
    let gateway = Gateway::before(world.var("BAO_ADDR")).await;
    let own = settings_of(&world).openbao;
    let openbao = own.replace(world.var("BAO_ADDR"), gateway.address());
    assert_ne!(own, openbao);
    let lease = "grace = \"300ms\"\n".to_owned();
    let proxy = Proxy::of(&world, Settings { openbao, lease, ..Settings::default() }).await;
    (world, gateway, proxy)
}

#[tokio::test]
async fn renewals_go_before_logins() {
    let (world, gateway, proxy) = behind_a_gateway().await;
    let mut lasting = Raw::unix(&proxy.socket()).await;
    lasting.log_in(&mint::token_of(&world, "acme"), "acme").await;
    gateway.refuse(Busy { path: RENEWALS, times: 2, retry_after: 1 });
    // A renewal was told to come again.
    proxy.metric_reaches("pgsilo_renewal_failures_total", 1.0).await;
    // Both tenants' wait: it is OpenBAO that is asked too often, not one role.
    for tenant in ["acme", "globex"] {
        let client = proxy.connect(&mint::token_of(&world, tenant), tenant).await;
        client.expect("served, if later");
    }
    let answered = gateway.answered(&[RENEWALS, CREDENTIALS]);
    let order: Vec<_> =
        answered.iter().map(|(path, status)| (path.contains(RENEWALS), *status)).collect();
    let (renewal, credential) = ((true, 429), (false, 200));
    let expected = [credential, renewal, renewal, (true, 200), credential];
    assert_eq!(order.get(..5), Some(&expected[..]), "{answered:?}");
    lives(&mut lasting).await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let (world, gateway, proxy) = behind_a_gateway().await;
    gateway.refuse(Busy { path: "/pgsilo/acme/creds/", times: 1, retry_after: 3600 });
    let token = mint::token_of(&world, "acme");
    for words in ["it answered 429: rate limit quota exceeded", "no credential is asked for"] {
        let before = proxy.events("refused").len();
        let error = proxy.connect(&token, "acme").await.expect_err("too often");
        assert_eq!(error.code().map(|code| code.code()), Some("57P03"), "{error:?}");
        let event =
            eventually("the event", async || proxy.events("refused").get(before).cloned()).await;
        assert_eq!(event["reason"], "lease_unavailable");
        assert!(event["cause"].as_str().expect("a cause").contains(words), "{event}");
    }
    assert_eq!(gateway.answered(&["/pgsilo/acme/creds/"]).len(), 1, "it was not asked again");
    // What one tenant is told is no other's business.
    let globex = mint::token_of(&world, "globex");
    proxy.connect(&globex, "globex").await.expect("served");
    // A second is waited for.
    gateway.refuse(Busy { path: "/pgsilo/globex/creds/", times: 1, retry_after: 1 });
    proxy.connect(&globex, "globex").await.expect_err("too often");
    proxy.connect(&globex, "globex").await.expect("served, a second later");
}

/// The whole life of sessions, at the level at which every test logs: everything.
#[tokio::test]
async fn no_secret_is_in_a_log_of_everything() {
    let world = World::own().await;
    world.lend_acme("15s").await;
    let gateway = Gateway::before(world.var("BAO_ADDR")).await;
    let openbao = settings_of(&world).openbao.replace(world.var("BAO_ADDR"), gateway.address());
    let lease = "grace = \"300ms\"\n".to_owned();
    let settings = Settings { openbao, lease, ..Settings::default() };
    let proxy = Proxy::of(&world, settings).await;
    let token = mint::token_of(&world, "acme");
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&token, "acme").await;
    gateway.refuse(Busy { path: RENEWALS, times: 1, retry_after: 1 });
    proxy.metric_reaches("pgsilo_renewal_failures_total", 1.0).await;
    proxy.metric_reaches("pgsilo_renewals_total", 1.0).await;
    lives(&mut client).await;
    gateway.refuse(Busy { path: CREDENTIALS, times: 1, retry_after: 0 });
    proxy.connect(&token, "acme").await.expect_err("refused");
    drop(client);
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
    let secrets = gateway.secrets();
    for kind in ["secret id", "token", "password"] {
        assert!(secrets.iter().any(|(what, _)| *what == kind), "no {kind} was seen");
    }
    let log = proxy.lines().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    for (what, secret) in &secrets {
        assert!(!log.contains(secret.as_str()), "a {what} was logged:\n{log}");
    }
}

/// The real one says it where it is asked to.
#[tokio::test]
async fn a_quota_of_openbaos_says_when_to_come_again() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let auth = server.app_role(&dir, json!({ "token_period": "60s" })).await;
    let openbao = format!("address = \"{}\"\n{auth}", server.address());
    let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
    server.write("sys/quotas/config", json!({ "enable_rate_limit_response_headers": true })).await;
    let quota = json!({ "path": "pgsilo/acme/", "rate": 1, "interval": "1h" });
    server.write("sys/quotas/rate-limit/few", quota).await;
    let (mut client, _role) = session(&proxy).await;
    let within = Duration::from_secs(5);
    let said = refused(&proxy, "57P03", within).await;
    assert!(said["cause"].as_str().expect("a cause").contains("it answered 429"), "{said}");
    let held = refused(&proxy, "57P03", within).await;
    assert!(
        held["cause"].as_str().expect("a cause").contains("no credential is asked for"),
        "{held}"
    );
    lives(&mut client).await;
}
