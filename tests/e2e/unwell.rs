//! When OpenBAO is unwell: sealed, stopped, or unwilling to take leases back. Running sessions
//! live on, new ones are told in time, and nothing is forgotten when it is well again.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query};
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::sync::watch;

use crate::orphans::settings_of;

/// A pgsilo in front of a sandbox of its own, with more keys of `[openbao]`.
async fn in_front_of(world: &World, more: &str) -> Proxy {
    waiting(world, "1s", more).await
}

/// The same, which waits so long for OpenBAO.
async fn waiting(world: &World, timeout: &str, more: &str) -> Proxy {
    let settings = Settings {
        openbao: format!("timeout = \"{timeout}\"\n{more}{}", settings_of(world).openbao),
        ..Settings::default()
    };
    Proxy::of(world, settings).await
}

async fn unwell() -> (World, Proxy) {
    let world = World::own().await;
    let proxy = in_front_of(&world, "").await;
    (world, proxy)
}

async fn session(world: &World, proxy: &Proxy) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token_of(world, "acme"), "acme").await;
    client
}

/// A new session is told no by OpenBAO's state, before the time for its login is over.
async fn refused(proxy: &Proxy, world: &World) {
    let error = proxy.connect(&mint::token_of(world, "acme"), "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some("57P03"), "{error:?}");
}

async fn served_again(proxy: &Proxy, world: &World) {
    let token = mint::token_of(world, "acme");
    eventually("sessions to be served again", async || proxy.connect(&token, "acme").await.ok())
        .await;
}

/// OpenBAO goes on now: within 2 s sessions are served, and however long a few logins take on this
/// machine at this moment.
async fn served_again_soon(proxy: &Proxy, world: &World) {
    let continued = Instant::now();
    served_again(proxy, world).await;
    let took = continued.elapsed();
    let again = Instant::now();
    served_again(proxy, world).await;
    let bound = Duration::from_secs(2) + 5 * again.elapsed();
    println!("served {took:?} after OpenBAO went on");
    assert!(took < bound, "{took:?}, more than {bound:?}");
}

async fn leased_roles(world: &World) -> i64 {
    world.usable_roles_like("^tenant-.*-[A-Za-z0-9]{20}$").await
}

#[tokio::test]
async fn a_sealed_or_stopped_openbao_refuses_new_sessions_at_once_and_keeps_the_old() {
    let (world, proxy) = unwell().await;
    let mut client = session(&world, &proxy).await;

    world.seal().await;
    refused(&proxy, &world).await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    world.unseal().await;
    served_again(&proxy, &world).await;

    // Stopped: it takes connections and answers nothing.
    world.signal_bao(Signal::STOP);
    refused(&proxy, &world).await;
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    // A session that ends meanwhile is revoked afterwards.
    let role = client.ask("SELECT session_user::text").await;
    drop(client);
    proxy.event("ended", |event| event["role"] == role.as_str()).await;
    world.signal_bao(Signal::CONT);
    served_again_soon(&proxy, &world).await;
    let superuser = world.superuser("postgres").await;
    eventually("the lease to be revoked", async || {
        let query = "SELECT 1 FROM pg_roles WHERE rolname = $1";
        superuser.query_opt(query, &[&role]).await.expect("asked").is_none().then_some(())
    })
    .await;
}

/// A balancer is told so, and may leave it out.
#[tokio::test]
async fn an_openbao_that_stays_sealed_or_silent_is_told_by_readyz_and_may_be_left_out() {
    let (world, proxy) = unwell().await;
    let session = session(&world, &proxy).await;
    let ready = async |status: u16, says: &str| {
        eventually(says, async || {
            let (now, said) = proxy.get("/readyz").await;
            (now == status && said.trim() == says).then_some(())
        })
        .await;
        assert_eq!(proxy.get("/readyz?exclude=openbao").await, (200, "ok\n".to_owned()));
    };
    world.seal().await;
    proxy.metric_reaches("pgsilo_openbao_available", 0.0).await;
    assert_eq!(proxy.get("/readyz").await.0, 200, "it may be over in a moment");
    ready(503, "OpenBAO is sealed").await;
    world.unseal().await;
    ready(200, "ok").await;
    proxy.metric_reaches("pgsilo_openbao_available", 1.0).await;
    world.signal_bao(Signal::STOP);
    ready(503, "OpenBAO does not answer").await;
    world.signal_bao(Signal::CONT);
    ready(200, "ok").await;
    drop(session);
}

/// As a primary that is gone without a word leaves it: OpenBAO waits for an answer, and all that
/// ask for the tenant's credentials wait with it, until the provisioner has it let go
/// (docs/runbooks.md).
#[tokio::test]
async fn a_hanging_connection_of_openbao_is_closed_by_a_reset() {
    let (world, proxy) = unwell().await;
    session(&world, &proxy).await;
    let superuser = world.superuser("postgres").await;
    let pids = "SELECT pid FROM pg_stat_activity WHERE usename = 'tenant_acme_broker'";
    let rows = superuser.query(pids, &[]).await.expect("asked");
    let signal = |signal| {
        for row in &rows {
            let pid = Pid::from_raw(row.get(0)).expect("a pid");
            kill_process(pid, signal).expect("the backend lives");
        }
    };
    assert!(!rows.is_empty());
    signal(Signal::STOP);
    refused(&proxy, &world).await;
    let provisioner = world.var("PROVISIONER_BAO_TOKEN");
    // It may be answered later, and has worked at once.
    let reset = world.bao_as(provisioner, "POST", "pgsilo/acme/reset/tenant-acme", Some(json!({})));
    let served = async {
        served_again(&proxy, &world).await;
        signal(Signal::CONT);
    };
    let ((status, answer), ()) = tokio::join!(reset, served);
    assert_eq!(status, 204, "{answer}");
}

#[tokio::test]
async fn a_query_goes_on_while_openbao_is_stopped() {
    let (world, proxy) = unwell().await;
    let mut client = session(&world, &proxy).await;
    world.signal_bao(Signal::STOP);
    client.send(&query("SELECT pg_sleep(2), 'done'")).await;
    let messages = client.until(b'Z').await;
    assert!(messages.iter().all(|message| message.tag != b'E'), "{messages:?}");
    world.signal_bao(Signal::CONT);
}

/// Half of the period of pgsilo's own token, in which that would have been renewed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openbao_stopped_for_half_a_minute_under_load_costs_no_session_and_hangs_nothing() {
    let world = World::own().await;
    // A request is given up after six times as long, which is later than OpenBAO goes on: what it
    // makes of one that was given up may have no owner (SECURITY.md).
    let proxy = waiting(&world, "8s", "").await;
    let token = mint::token_of(&world, "acme");
    let (over, _) = watch::channel(false);
    let mut busy = Vec::new();
    for _ in 0..40 {
        let client = proxy.connect(&token, "acme").await.expect("connected");
        let over = over.subscribe();
        busy.push(tokio::spawn(async move {
            let mut served = 0;
            while !*over.borrow() {
                client.simple_query("SELECT 1").await.expect("no session is lost");
                served += 1;
            }
            served
        }));
    }
    world.signal_bao(Signal::STOP);
    let stopped = Instant::now();
    let mut newcomers = 0;
    while stopped.elapsed() < Duration::from_secs(30) {
        // More than may ask at once for one role: some wait in line, and are told in time too.
        join_all((0..12).map(|_| refused(&proxy, &world))).await;
        newcomers += 12;
    }
    world.signal_bao(Signal::CONT);
    served_again_soon(&proxy, &world).await;
    assert!(proxy.metric("pgsilo_openbao_renew_failures_total").await >= 1.0, "it fell due");

    over.send_replace(true);
    for session in busy {
        assert!(session.await.expect("no session is lost") > 0);
    }
    for event in proxy.events_reach("refused", newcomers).await {
        assert_eq!(event["reason"], "lease_unavailable", "{event}");
    }
    // Credentials that were still asked for by nobody who waits are gone as well.
    eventually("no role to be left", async || (leased_roles(&world).await == 0).then_some(()))
        .await;
    assert_eq!(proxy.metric("pgsilo_revocations_pending").await, 0.0);
    for event in proxy.events("ended") {
        assert_eq!(event["ending"], "client_left", "{event}");
    }
}

#[tokio::test]
async fn a_renewal_that_fails_and_then_works_leaves_events_with_the_whole_trail() {
    let world = World::own().await;
    world.lend_acme("12s").await;
    let proxy = in_front_of(&world, "").await;
    let mut client = session(&world, &proxy).await;

    world.seal().await;
    let failed = proxy.event("renewal_failed", |_| true).await;
    world.unseal().await;
    let renewed = proxy.event("renewed_again", |_| true).await;
    let started = proxy.event("started", |_| true).await;
    for event in [&failed, &renewed] {
        for field in ["session", "address", "user", "subject", "token_id", "tenant", "role"] {
            assert!(event[field].is_string() && event[field] == started[field], "{field}: {event}");
        }
    }
    assert!(failed["cause"].as_str().expect("a cause").contains("503"), "{failed}");
    assert_eq!(failed["is_final"], false);
    assert!(renewed["remaining_seconds"].as_u64() > failed["remaining_seconds"].as_u64());
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

/// A policy that lets pgsilo lease and not give back would leave a role for each session, until
/// the database has too many: it is noticed after a few.
#[tokio::test]
async fn no_leases_are_requested_while_revocations_pile_up() {
    let world = World::own().await;
    let (_status, whole) = world.bao("GET", "sys/policies/acl/pgsilo", None).await;
    let whole = whole["data"]["policy"].as_str().expect("a policy").to_owned();
    let without = whole.replace("sys/leases/revoke", "sys/leases/revoke-not");
    assert_ne!(without, whole);
    let allow = async |policy: &str| {
        let body = Some(json!({ "policy": policy }));
        assert_eq!(world.bao("POST", "sys/policies/acl/pgsilo", body).await.0, 204);
    };
    allow(&without).await;
    let proxy = in_front_of(&world, "max_pending_revocations = 3\n").await;
    for ended in 1..=3 {
        drop(session(&world, &proxy).await);
        proxy.metric_reaches("pgsilo_revocations_pending", f64::from(ended)).await;
    }
    refused(&proxy, &world).await;
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "lease_unavailable");
    assert_eq!(event["cause"], "OpenBAO: 3 leases wait to be revoked, no more are asked for");
    assert_eq!(leased_roles(&world).await, 3);

    allow(&whole).await;
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    eventually("the roles to be gone", async || (leased_roles(&world).await == 0).then_some(()))
        .await;
    session(&world, &proxy).await;
}

/// An operator who tidies up by hand must not leave leases that can never be revoked.
#[tokio::test]
async fn a_role_that_was_dropped_by_hand_leaves_no_lease_behind() {
    let world = World::own().await;
    let proxy = in_front_of(&world, "").await;
    let mut client = session(&world, &proxy).await;
    let role = client.ask("SELECT session_user::text").await;
    let superuser = world.superuser("tenant_acme").await;
    superuser.batch_execute(&format!("DROP ROLE \"{role}\"")).await.expect("dropped");
    assert_eq!(world.leases("tenant-acme-rw").await.len(), 1);
    drop(client);
    eventually("the lease to be gone", async || {
        world.leases("tenant-acme-rw").await.is_empty().then_some(())
    })
    .await;
}

/// Both have the same to give back, to an OpenBAO that takes nothing.
#[tokio::test]
async fn a_second_signal_is_not_kept_waiting_by_an_openbao_that_hangs() {
    let (world, mut patient) = unwell().await;
    let mut hurried = in_front_of(&world, "").await;
    let mut clients = Vec::new();
    for proxy in [&patient, &hurried] {
        clients.push(session(&world, proxy).await);
    }
    world.signal_bao(Signal::STOP);
    patient.signal(Signal::TERM);
    patient.logged(|line| line["message"] == "draining").await;
    hurried.signal(Signal::TERM);
    hurried.logged(|line| line["message"] == "draining").await;
    hurried.signal(Signal::TERM);
    tokio::select! {
        biased;
        _ = patient.ended() => panic!("the one that was told once ended first"),
        ended = hurried.ended() => assert!(ended.success()),
    }
    assert_eq!(hurried.events("unrevoked").len(), 1, "what is left is told");
    world.signal_bao(Signal::CONT);
    assert!(patient.ended().await.success());
}

/// Those are the credentials that somebody will look for.
#[tokio::test]
async fn a_stop_tells_of_each_lease_that_openbao_did_not_take_back() {
    let (world, mut proxy) = unwell().await;
    let mut clients = Vec::new();
    for tenant in ["acme", "globex", "acme"] {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(&mint::token_of(&world, tenant), tenant).await;
        clients.push(client);
    }
    world.signal_bao(Signal::STOP);
    proxy.signal(Signal::TERM);
    assert!(proxy.ended().await.success());
    world.signal_bao(Signal::CONT);
    let leases = |event: &str| {
        let events = proxy.events(event);
        let mut leases: Vec<_> = events.iter().map(|one| one["lease"].to_string()).collect();
        leases.sort_unstable();
        leases
    };
    assert_eq!((leases("leased").len(), leases("revoked").len()), (3, 0));
    assert_eq!(leases("unrevoked"), leases("leased"));
}
