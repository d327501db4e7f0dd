//! OpenBAO on its bad days, with real servers: standbys, a leader that is killed, a server that
//! is killed and started again, a database or a quota that says no. And what no real server can
//! be made to do: answers that break off or never end. Sessions live on, new ones are told in
//! time.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use pgsilo_sandbox::testing::acme::{
    is_given_back, is_not_logged_in, lives, lives_to_its_end, refused, served_again, session,
    turned_away,
};
use pgsilo_sandbox::testing::bao::{Folder, Server, Shape, free_port};
use pgsilo_sandbox::testing::certificates::{Authority, Signed};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, fake, mint};
use serde_json::{Value, json};
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// What a refusal may take where a request may take a second.
const IN_TIME: Duration = Duration::from_millis(2500);

/// A pgsilo that asks the server at an address, with the login of another's making.
fn asking(address: &str, auth: &str) -> Settings {
    let openbao = format!("address = \"{address}\"\ntimeout = \"1s\"\n{auth}");
    // A busy machine has its time to renew before a session is told of its end.
    Settings { openbao, lease: "grace = \"300ms\"\n".to_owned(), ..Settings::default() }
}

fn kept() -> Shape<'static> {
    Shape { kept: true, ..Shape::default() }
}

fn periodic() -> Value {
    json!({ "token_period": "60s" })
}

#[tokio::test]
async fn a_leader_that_is_killed_costs_no_session_and_no_lease() {
    let (dir, mut leader) = (Folder::new(), Server::start(kept()).await);
    // A node that joins has a vote at once, not after ten seconds.
    let soon = json!({ "server_stabilization_time": "100ms" });
    leader.write("sys/storage/raft/autopilot/configuration", soon).await;
    let (standby, _third) = tokio::join!(leader.join(kept()), leader.join(kept()));
    leader.has_voters(3).await;
    leader.lend("15s").await;
    let auth = leader.app_role(&dir, periodic()).await;
    // A standby forwards what only the leader does.
    let proxy = Proxy::with(asking(standby.address(), &auth)).await;
    let (mut lasting, lasting_role) = session(&proxy).await;
    let (mut leaving, leaving_role) = session(&proxy).await;

    leader.kill();
    lives(&mut lasting).await;
    lives(&mut leaving).await;
    drop(leaving);
    has_recovered(&proxy, &leaving_role, (lasting, &lasting_role)).await;
}

/// OpenBAO is back: who left meanwhile has given its lease back, who stayed is renewed and gives it
/// back in the end, and pgsilo has not logged in again.
async fn has_recovered(proxy: &Proxy, left: &str, (lasting, role): (Raw, &str)) {
    served_again(proxy).await;
    is_given_back(proxy, left).await;
    let renewals = proxy.metric("pgsilo_renewals_total").await;
    proxy.metric_reaches("pgsilo_renewals_total", renewals + 1.0).await;
    lives_to_its_end(proxy, lasting, role).await;
    assert_eq!(proxy.metric("pgsilo_openbao_logins_total{result=\"ok\"}").await, 1.0);
}

/// A leader, and a standby that cannot reach the leader's cluster port: it redirects.
async fn redirecting(tls: Option<(&Authority, &Signed)>, api_addr: Option<String>) -> [Server; 2] {
    let ca = tls.map(|(authority, _)| authority.pem());
    let shape = || Shape { tls: tls.map(|(_, shown)| shown), ca: ca.as_deref(), ..kept() };
    let cluster_addr = Some(format!("https://127.0.0.1:{}", free_port()));
    let leader = Server::start(Shape { api_addr, cluster_addr, ..shape() }).await;
    let standby = leader.join(shape()).await;
    leader.lend("9s").await;
    // What it may answer itself it answers from what it has heard so far.
    eventually("the standby to hear of it and to redirect", async || {
        let (status, _) = standby.ask("GET", "pgsilo/acme/creds/tenant-acme-rw", None).await;
        (status == 307).then_some(())
    })
    .await;
    [leader, standby]
}

/// pgsilo is told of the standby alone.
async fn is_followed([leader, standby]: [Server; 2], dir: &Folder, ca: &str) {
    let auth = leader.app_role(dir, periodic()).await;
    let proxy = Proxy::with(asking(standby.address(), &format!("{ca}{auth}"))).await;
    let (client, role) = session(&proxy).await;
    proxy.metric_reaches("pgsilo_renewals_total", 1.0).await;
    lives_to_its_end(&proxy, client, &role).await;
}

#[tokio::test]
async fn a_standby_that_redirects_is_followed_to_the_leader_of_the_same_machine() {
    is_followed(redirecting(None, None).await, &Folder::new(), "").await;
}

#[tokio::test]
async fn a_standby_that_redirects_is_followed_to_the_leader_over_tls() {
    let (dir, authority) = (Folder::new(), Authority::new("OpenBAO's"));
    let shown = authority.sign(&dir, "server");
    let ca = format!("ca = \"{}\"\n", authority.write(dir.join("ca.crt")).display());
    is_followed(redirecting(Some((&authority, &shown)), None).await, &dir, &ca).await;
}

#[tokio::test]
async fn a_redirect_from_tls_to_clear_is_not_followed() {
    let (dir, authority) = (Folder::new(), Authority::new("OpenBAO's"));
    let shown = authority.sign(&dir, "server");
    let ca = authority.write(dir.join("ca.crt"));
    let came = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&came);
    let clear = fake::serves(move |_tcp| {
        counter.fetch_add(1, Ordering::Relaxed);
        std::future::ready(())
    })
    .await;
    let tls = Some((&authority, &shown));
    let [leader, standby] = redirecting(tls, Some(format!("http://{clear}"))).await;
    let auth = leader.app_role(&dir, periodic()).await;
    let openbao = format!("address = \"{}\"\nca = \"{}\"\n{auth}", standby.address(), ca.display());
    is_not_logged_in(openbao, "a redirect to http is not followed").await;
    assert_eq!(came.load(Ordering::Relaxed), 0, "not even a connection");
}

#[tokio::test]
async fn an_openbao_that_is_killed_and_started_again_finds_its_leases_kept() {
    let (dir, mut server) = (Folder::new(), Server::start(kept()).await);
    server.lend("9s").await;
    let auth = server.app_role(&dir, periodic()).await;
    let proxy = Proxy::with(asking(server.address(), &auth)).await;
    let (mut lasting, lasting_role) = session(&proxy).await;
    let (leaving, leaving_role) = session(&proxy).await;

    server.kill();
    // There is no listener: there is nothing to wait for.
    let event = refused(&proxy, "57P03", Duration::from_secs(1)).await;
    assert_eq!(event["reason"], "lease_unavailable");
    drop(leaving);
    proxy.event("ended", |event| event["role"] == leaving_role.as_str()).await;
    proxy.metric_reaches("pgsilo_revocation_failures_total", 1.0).await;
    lives(&mut lasting).await;

    server.restart().await;
    has_recovered(&proxy, &leaving_role, (lasting, &lasting_role)).await;
}

#[tokio::test]
async fn a_database_that_openbao_cannot_reach_is_temporary() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let auth = server.app_role(&dir, periodic()).await;
    let proxy = Proxy::with(asking(server.address(), &auth)).await;
    server.connect_to(&free_port().to_string()).await;
    let event = refused(&proxy, "57P03", IN_TIME).await;
    assert_eq!(event["reason"], "lease_backend_away");
    assert!(event["cause"].as_str().expect("a cause").contains("it answered 500"), "{event}");
    // Where pgsilo does not reach it either, that is what is reported, whichever fails first.
    proxy.place_acme_at(free_port(), "").await;
    for _ in 0..10 {
        assert_eq!(refused(&proxy, "08001", IN_TIME).await["reason"], "backend_unreachable");
    }
    let port = world().var("PG_PORT").parse().expect("a port");
    proxy.place_acme_at(port, "").await;
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 2.0).await;
    server.connect_to(world().var("PG_PORT")).await;
    session(&proxy).await;
}

#[tokio::test]
async fn an_exhausted_quota_is_temporary() {
    let (dir, server) = (Folder::new(), Server::start(Shape::default()).await);
    server.lend("1h").await;
    let auth = server.app_role(&dir, periodic()).await;
    let proxy = Proxy::with(asking(server.address(), &auth)).await;
    let quota = json!({ "path": "pgsilo/acme/", "rate": 1, "interval": "1h" });
    server.write("sys/quotas/rate-limit/few", quota).await;
    let (mut client, _role) = session(&proxy).await;
    let event = refused(&proxy, "57P03", IN_TIME).await;
    assert_eq!(event["reason"], "lease_unavailable");
    assert!(event["cause"].as_str().expect("a cause").contains("it answered 429"), "{event}");
    lives(&mut client).await;
    server.ask("DELETE", "sys/quotas/rate-limit/few", None).await;
    session(&proxy).await;
}

/// What a request for a credential gets.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Reset,
    CutOff,
    SlowHead,
    SlowBody,
    EndlessHead,
    HugeBody,
}

impl Fault {
    async fn commit(self, mut tcp: TcpStream) {
        const OK: &str = "HTTP/1.1 200 OK\r\n";
        let (said, again, pause) = match self {
            Fault::Reset => {
                SockRef::from(&tcp).set_linger(Some(Duration::ZERO)).expect("set");
                return;
            }
            Fault::CutOff => ("Content-Length: 400\r\n\r\n{\"lease_id\":\"data", String::new(), 0),
            Fault::SlowHead => ("X-Slow: ", "x".to_owned(), 20),
            Fault::SlowBody => ("Content-Length: 99999999\r\n\r\n{", " ".to_owned(), 20),
            Fault::EndlessHead => ("", format!("X-More: {}\r\n", "x".repeat(4000)), 0),
            Fault::HugeBody => ("Content-Length: 99999999\r\n\r\n{", " ".repeat(65536), 0),
        };
        let mut sent = tcp.write_all(format!("{OK}{said}").as_bytes()).await;
        while sent.is_ok() && !again.is_empty() {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            sent = tcp.write_all(again.as_bytes()).await;
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_is_too_long_is_refused_at_once() {
    for (fault, cause) in [
        (Fault::Reset, "Connection reset by peer"),
        (Fault::CutOff, "end of file"),
        (Fault::EndlessHead, "message head is too large"),
        (Fault::HugeBody, "longer than 256 KiB"),
    ] {
        // A machine that is slow enough has some of them wait for too long, and others for those.
        let causes = is_outlasted(fault).await;
        let told = causes.iter().filter(|text| text.contains(cause)).count();
        let is_late = |text: &&String| text.contains(LATE) || text.contains(BEHIND_OTHERS);
        let late = causes.iter().filter(is_late).count();
        assert!(told > 0 && told + late == causes.len(), "{fault:?}: {causes:#?}");
    }
}

#[tokio::test]
async fn an_answer_that_never_ends_costs_its_time_out_and_nothing_more() {
    let both = tokio::join!(is_outlasted(Fault::SlowHead), is_outlasted(Fault::SlowBody));
    for causes in <[_; 2]>::from(both) {
        // An eighth of max_concurrent_requests is asked for at once, the others wait for those.
        let late = causes.iter().filter(|text| text.contains(LATE)).count();
        assert_eq!(late, 8, "{causes:#?}");
    }
}

/// A server that hangs is not all tenants' trouble: those of one server ask for a quarter at once.
#[tokio::test]
async fn tenants_of_one_server_leave_the_others_their_slots() {
    let (_secret, settings) = at_fault(Fault::SlowBody).await;
    let third = |text: &str| {
        let (_, globex) = text.rsplit_once("[[tenant]]").expect("two tenants");
        let all = format!("{text}\n[[tenant]]{}", globex.replace("globex", "initech"));
        // The stand-in hangs at this mount.
        all.replace("\"pgsilo/globex\"", "\"pgsilo/acme\"")
            .replace("\"pgsilo/initech\"", "\"pgsilo/acme\"")
    };
    let proxy = Proxy::with(Settings { tenants: third, ..settings }).await;
    let tenants = ["acme", "globex", "initech"];
    let tokens = tenants.map(|tenant| (tenant, mint::token(tenant)));
    let logins = tokens.iter().cycle().take(60);
    join_all(logins.map(|(tenant, token)| proxy.connect(token, tenant))).await;
    let events = proxy.events_reach("refused", 60).await;
    let cause = |event: &&Value| event["cause"].as_str().is_some_and(|text| text.contains(LATE));
    let late: Vec<_> = events.iter().filter(cause).collect();
    assert_eq!(late.len(), 16, "{late:#?}");
    for tenant in tenants {
        assert!(late.iter().filter(|event| event["tenant"] == tenant).count() <= 8, "{late:#?}");
    }
}

const LATE: &str = "it did not answer in time";
const BEHIND_OTHERS: &str = "earlier requests are still waiting for its answer";

/// A pgsilo whose OpenBAO commits a fault when it is asked for a credential of acme's mount. Its secret id
/// goes with the folder.
async fn at_fault(fault: Fault) -> (Folder, Settings) {
    let dir = Folder::new();
    fs::write(dir.join("secret-id"), "a secret id").expect("written");
    let auth = format!(
        "auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"{}\" }} }}\n",
        dir.join("secret-id").display()
    );
    let stand_in = fake::openbao(move |tcp| fault.commit(tcp)).await;
    (dir, asking(&format!("http://{stand_in}"), &auth))
}

/// Twenty sessions at once are told in time, and nothing is kept. The causes of all.
async fn is_outlasted(fault: Fault) -> Vec<String> {
    let (_secret, settings) = at_fault(fault).await;
    let proxy = Proxy::with(settings).await;
    let (memory, open) = (resident(&proxy), descriptors(&proxy));
    // A tenant's requests are its own, whichever of its roles they are for.
    let tokens: Vec<_> = ["read-write", "read-only"]
        .map(|access| mint::token_with("acme", json!({ "access": access })))
        .into_iter()
        .cycle()
        .take(20)
        .collect();
    join_all(tokens.iter().map(|token| turned_away(&proxy, token, "57P03", IN_TIME))).await;
    let grown = resident(&proxy).saturating_sub(memory);
    assert!(grown < 8 << 10, "{fault:?}: grew by {grown} KiB");
    let events = eventually("every event", async || {
        Some(proxy.events("refused")).filter(|events| events.len() == 20)
    })
    .await;
    assert!(events.iter().all(|event| event["reason"] == "lease_unavailable"), "{fault:?}");
    eventually("every connection to be closed", async || {
        (descriptors(&proxy) <= open + 1).then_some(())
    })
    .await;
    events.iter().map(|event| event["cause"].as_str().expect("a cause").to_owned()).collect()
}

/// In KiB.
fn resident(proxy: &Proxy) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn descriptors(proxy: &Proxy) -> usize {
    fs::read_dir(format!("/proc/{}/fd", proxy.pid())).expect("it runs").count()
}
