//! Bounds: what a slow, silent, greedy or numerous client costs, and whom it disturbs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, TLS, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, packet, query, startup, tagged};
use pgsilo_sandbox::testing::{eventually, fake, mint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

const TOO_MANY: &str = "pgsilo_refusals_total{reason=\"too_many_connections\"}";

fn limits_of(limits: &str) -> Settings {
    let listeners = PLAIN.to_owned() + UNIX;
    Settings { listeners, limits: limits.to_owned(), ..Settings::default() }
}

async fn refused(client: &mut Raw, sqlstate: &str, text: &str) {
    let error = client.fatal().await;
    assert_eq!((error.sqlstate().as_str(), error.field(b'M').as_deref()), (sqlstate, Some(text)));
}

#[tokio::test]
async fn every_stage_of_a_login_has_the_same_deadline() {
    let proxy = Proxy::with(limits_of("login_timeout = \"300ms\"\n")).await;
    let late = "canceling authentication due to timeout";
    let mut silent = Raw::tcp(proxy.address()).await;
    let mut dripping = Raw::tcp(proxy.address()).await;
    dripping.send(&startup(&[("user", "app")])[..12]).await;
    let mut tokenless = Raw::tcp(proxy.address()).await;
    tokenless.send(&startup(&[("user", "app")])).await;
    tokenless.message().await;
    tokenless.send(&[b'p', 0, 0]).await;
    for client in [&mut silent, &mut dripping, &mut tokenless] {
        refused(client, "57014", late).await;
    }
}

#[tokio::test]
async fn a_tls_handshake_that_never_ends_is_closed() {
    let settings =
        Settings { limits: "login_timeout = \"300ms\"\n".to_owned(), ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&pgsilo_sandbox::testing::raw::ssl_request()).await;
    assert_eq!(client.byte().await, b'S');
    // In the middle of a handshake there is no way to say anything.
    client.send(&[0x16, 3, 1]).await;
    client.silence().await;
}

#[tokio::test]
async fn a_startup_packet_has_a_deadline_of_its_own() {
    let listeners = TLS.to_owned() + UNIX;
    let limits = "startup_timeout = \"300ms\"\nlogin_timeout = \"60s\"\n".to_owned();
    let proxy = Proxy::with(Settings { listeners, limits, ..Settings::default() }).await;
    let mut started = Raw::unix(&proxy.socket()).await;
    started.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    let mut in_tls = Raw::tcp(proxy.address()).await;
    in_tls.send(&pgsilo_sandbox::testing::raw::ssl_request()).await;
    assert_eq!(in_tls.byte().await, b'S');
    in_tls.send(&[0x16, 3, 1]).await;
    let mut silent = Raw::tcp(proxy.address()).await;
    let mut dripping = Raw::tcp(proxy.address()).await;
    dripping.send(&startup(&[("user", "app")])[..12]).await;
    for client in [&mut silent, &mut dripping] {
        refused(client, "57014", "canceling authentication due to timeout").await;
    }
    in_tls.silence().await;
    proxy
        .event("refused", |event| {
            event["cause"].as_str().is_some_and(|cause| cause.contains("startup_timeout"))
        })
        .await;
    // Who has sent it has the rest of the time for its token.
    started.send_password(&mint::token("acme")).await;
    started.until(b'Z').await;
}

/// A database that lets anybody in, and closes cancel requests only once it is let.
#[derive(Clone)]
struct HoldsCancels {
    /// How many have come.
    came: Arc<AtomicUsize>,
    closes: watch::Sender<bool>,
}

impl HoldsCancels {
    async fn serve(self, mut tcp: TcpStream) {
        let mut sink = vec![0; 4096];
        let mut head = [0; 8];
        while tcp.peek(&mut head).await.is_ok_and(|length| (1..8).contains(&length)) {}
        if head == packet(80_877_102, &[0; 8])[..8] {
            self.came.fetch_add(1, Ordering::Relaxed);
            let mut closes = self.closes.subscribe();
            closes.wait_for(|closes| *closes).await.expect("it is kept");
            return;
        }
        let _let_in = fake::lets_in(&mut tcp).await;
        let asked = tcp.read(&mut sink).await.unwrap_or_default();
        let question = String::from_utf8_lossy(&sink[..asked]).into_owned();
        let row = fake::row(&format!("{}acme", fake::number_in(&question)));
        let _said = tcp.write_all(&[row, tagged(b'Z', b"I")].concat()).await;
        while matches!(tcp.read(&mut sink).await, Ok(1..)) {}
    }
}

/// One session's key, shown more often than there are places, to a database of the tenant's own.
#[tokio::test]
async fn cancel_requests_held_open_by_a_database_do_not_block_clients() {
    const PLACES: usize = 10;
    let database = HoldsCancels { came: Arc::default(), closes: watch::Sender::new(false) };
    let serving = database.clone();
    let address = fake::serves(move |tcp| serving.clone().serve(tcp)).await;
    let came = || database.came.load(Ordering::Relaxed);
    let proxy = Proxy::with(limits_of(&format!("max_handshakes = {PLACES}\n"))).await;
    proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
    let mut acme = Raw::tcp(proxy.address()).await;
    let welcome = acme.log_in(&mint::token("acme"), "acme").await;
    let key = welcome.iter().find(|message| message.tag == b'K').expect("a key").body.clone();
    let mut cancelling = Vec::new();
    for _ in 0..3 * PLACES {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send_anyway(&packet(80_877_102, &key)).await;
        cancelling.push(client);
    }
    eventually("a cancel request", async || (came() > 0).then_some(())).await;
    let mut globex = Raw::tcp(proxy.address()).await;
    globex.log_in(&mint::token("globex"), "globex").await;
    assert_eq!(globex.ask("SELECT 'served'").await, "served");
    assert_eq!(proxy.metric(TOO_MANY).await, 0.0);
    // Of one key one is on its way, and what came meanwhile is one more.
    assert_eq!(came(), 1);
    database.closes.send_replace(true);
    for mut client in cancelling {
        client.silence().await;
    }
    assert_eq!(came(), 2);
    let given_up = proxy.event("cancel_failed", |_| true).await;
    assert!(given_up["cause"].as_str().is_some_and(|cause| cause.contains("slot")), "{given_up}");
}

/// Whose token is good, and who may not have a session for all that, holds no place.
#[tokio::test]
async fn refused_connections_do_not_block_clients() {
    const PLACES: usize = 6;
    let proxy = Proxy::with(limits_of(&format!("max_handshakes = {PLACES}\n"))).await;
    let token = mint::token("acme");
    let refused_ones = async || {
        let mut refused = Vec::new();
        for _ in 0..PLACES {
            let mut client = Raw::tcp(proxy.address()).await;
            client.send(&startup(&[("user", "app"), ("database", "nobodys")])).await;
            client.send_password(&token).await;
            assert_eq!(client.message().await.sqlstate(), "3D000");
            // It does not close.
            refused.push(client);
        }
        refused
    };
    for _ in 0..3 {
        let _refused = refused_ones().await;
        let mut client = Raw::tcp(proxy.address()).await;
        client.log_in(&token, "acme").await;
        assert_eq!(client.ask("SELECT 'served'").await, "served");
    }
    assert_eq!(proxy.metric(TOO_MANY).await, 0.0);
}

/// What a stranger can do to a listener without proving anything.
#[derive(Clone, Copy, Debug)]
enum Stranger {
    Silent,
    Dripping,
    InTheHandshake,
    Tokenless,
}

/// Which listener somebody comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tcp,
    Unix,
}

impl Way {
    async fn logs_in(self, proxy: &Proxy) -> Raw {
        let mut client = match self {
            Way::Tcp => Raw::tls(proxy.address()).await,
            Way::Unix => Raw::unix(&proxy.socket()).await,
        };
        client.log_in(&mint::token("acme"), "acme").await;
        client
    }

    fn other(self) -> Way {
        match self {
            Way::Tcp => Way::Unix,
            Way::Unix => Way::Tcp,
        }
    }
}

impl Stranger {
    async fn comes(self, proxy: &Proxy, by: Way) -> tokio::task::JoinHandle<()> {
        let mut client = match by {
            Way::Tcp => Raw::tcp(proxy.address()).await,
            Way::Unix => Raw::unix(&proxy.socket()).await,
        };
        match self {
            Stranger::Silent => {}
            Stranger::Dripping => client.send(&startup(&[("user", "app")])[..5]).await,
            Stranger::InTheHandshake => {
                // A ClientHello that is announced.
                client.send(&[0x16, 3, 1, 1, 0, 1]).await;
            }
            Stranger::Tokenless => client.send(&startup(&[("user", "app")])).await,
        }
        tokio::spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_millis(200));
            loop {
                pace.tick().await;
                match self {
                    Stranger::Dripping | Stranger::InTheHandshake => {
                        client.send_anyway(&[0]).await;
                    }
                    Stranger::Silent | Stranger::Tokenless => {}
                }
            }
        })
    }
}

#[tokio::test]
async fn silent_strangers_do_not_block_clients() {
    const PLACES: usize = 20;
    let listeners = TLS.to_owned() + "require_tls = false\n" + UNIX;
    let limits =
        format!("max_handshakes = {PLACES}\nstartup_timeout = \"60s\"\nlogin_timeout = \"60s\"\n");
    for (stranger, way) in [
        (Stranger::Silent, Way::Tcp),
        (Stranger::Dripping, Way::Tcp),
        (Stranger::InTheHandshake, Way::Tcp),
        (Stranger::Tokenless, Way::Tcp),
        (Stranger::Silent, Way::Unix),
        (Stranger::Dripping, Way::Unix),
        (Stranger::Tokenless, Way::Unix),
    ] {
        let (listeners, limits) = (listeners.clone(), limits.clone());
        let proxy = Proxy::with(Settings { listeners, limits, ..Settings::default() }).await;
        let began = Instant::now();
        let mut strangers = Vec::new();
        for _ in 0..PLACES {
            strangers.push(stranger.comes(&proxy, way).await);
        }
        proxy.metric_reaches("pgsilo_handshakes_active", PLACES as f64).await;
        // Every place of that listener is taken; the other one's are its own.
        way.other().logs_in(&proxy).await;
        assert_eq!(proxy.metric("pgsilo_evicted_total").await, 0.0, "{stranger:?} {way:?}");
        for served in 1..=3 {
            let mut client = way.logs_in(&proxy).await;
            // None was evicted within its first second.
            assert!(began.elapsed() >= Duration::from_secs(1), "{stranger:?} {way:?}");
            assert_eq!(client.ask("SELECT 'served'").await, "served", "{stranger:?} {way:?}");
            strangers.push(stranger.comes(&proxy, way).await);
            proxy.metric_reaches("pgsilo_evicted_total", f64::from(served)).await;
        }
        strangers.iter().for_each(tokio::task::JoinHandle::abort);
        assert_eq!(proxy.metric(TOO_MANY).await, 0.0, "{stranger:?} {way:?}");
    }
}

/// Who has proved who it is keeps its place, so these are bounded as ever.
#[tokio::test]
async fn logins_under_way_are_bounded() {
    let answer = std::sync::Arc::new(tokio::sync::Notify::new());
    let answers = std::sync::Arc::clone(&answer);
    let bao = fake::openbao(move |tcp| {
        let answers = std::sync::Arc::clone(&answers);
        async move {
            answers.notified().await;
            drop(tcp);
        }
    })
    .await;
    let openbao = format!(
        "address = \"http://{bao}\"\ntimeout = \"20s\"\n\
         auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"secret-id\" }} }}\n"
    );
    let settings = limits_of("max_handshakes = 2\nlogin_timeout = \"60s\"\n");
    let proxy = Proxy::with(Settings { openbao, ..settings }).await;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
        client.send_password(&mint::token("acme")).await;
        waiting.push(client);
    }
    proxy.metric_reaches("pgsilo_stage_seconds_count{stage=\"identified\"}", 2.0).await;
    let mut third = Raw::tcp(proxy.address()).await;
    refused(&mut third, "53300", "too many connections").await;
    // Those of another listener are not theirs.
    let mut unix = Raw::unix(&proxy.socket()).await;
    unix.send(&startup(&[("user", "app")])).await;
    assert_eq!(unix.message().await.tag, b'R');
    drop(unix);
    answer.notify_waiters();
    for client in &mut waiting {
        refused(client, "57P03", "database credentials are not available at the moment").await;
    }
    drop(waiting);
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
    let mut fourth = Raw::tcp(proxy.address()).await;
    fourth.send(&startup(&[("user", "app")])).await;
    assert_eq!(fourth.message().await.tag, b'R');
}

#[tokio::test]
async fn sessions_are_bounded_in_total_and_per_tenant() {
    let proxy = Proxy::with(limits_of("max_sessions = 3\nmax_sessions_per_tenant = 2\n")).await;
    let log_in = async |tenant: &str| {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
        client.send_password(&mint::token(tenant)).await;
        client
    };
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = log_in("acme").await;
        client.until(b'Z').await;
        open.push(client);
    }
    refused(&mut log_in("acme").await, "53300", "too many connections for tenant \"acme\"").await;
    let mut globex = log_in("globex").await;
    globex.until(b'Z').await;
    refused(&mut log_in("globex").await, "53300", "too many connections").await;
    open.pop();
    proxy.metric_reaches("pgsilo_sessions_active", 2.0).await;
    log_in("acme").await.until(b'Z').await;
}

/// Five have their turn at once, and then one a second; who would wait for longer than half of
/// `login_timeout` is refused.
#[tokio::test]
async fn sessions_of_a_tenant_begin_at_its_pace_while_others_are_here() {
    let limits =
        "max_sessions_per_tenant = 5\nmax_session_rate_per_tenant = 1\nlogin_timeout = \"5s\"\n";
    let proxy = Proxy::with(limits_of(limits)).await;
    // What a client is told: in the end `Z`, or an error.
    let log_in = async |tenant: &str| {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
        client.send_password(&mint::token(tenant)).await;
        loop {
            let message = client.message().await;
            match message.tag {
                b'Z' => return None,
                b'E' => return Some((message.sqlstate(), message.field(b'M'))),
                _ => {}
            }
        }
    };
    let five_of_acme = async || join_all((0..5).map(|_| log_in("acme"))).await;
    // Alone, it has all the turns that it likes. A session's place is free before its lease is revoked.
    for round in 1..=3 {
        assert!(five_of_acme().await.iter().all(Option::is_none));
        proxy.events_reach("revoked", round * 5).await;
    }
    let mut neighbour = Raw::tcp(proxy.address()).await;
    neighbour.log_in(&mint::token("globex"), "globex").await;
    assert!(five_of_acme().await.iter().all(Option::is_none), "as many as it may have at once");
    proxy.events_reach("revoked", 20).await;
    let told = five_of_acme().await;
    let refused = told.iter().flatten().count();
    assert!((1..5).contains(&refused), "the first wait for their turns: {told:?}");
    let full = ("53300".to_owned(), Some("too many connections for tenant \"acme\"".to_owned()));
    assert!(told.into_iter().flatten().all(|told| told == full));
    for event in proxy.events_reach("refused", refused).await {
        assert_eq!(event["cause"], "the tenant's sessions begin more often than they may");
    }
    // Its neighbour's turns are its own.
    for _ in 0..3 {
        assert!(log_in("globex").await.is_none());
    }
}

#[tokio::test]
async fn a_cluster_has_so_many_sessions_of_all_its_tenants() {
    let proxy = Proxy::with(limits_of("")).await;
    let tenants = proxy.tenants();
    let socket = tenants.split("host = ").nth(1).and_then(|rest| rest.split('\n').next());
    let socket =
        socket.expect("a host").split('#').next().expect("a host").trim().trim_matches('"');
    let port = tenants.split("port = ").nth(1).and_then(|rest| rest.split('\n').next());
    let port = port.expect("a port").split('#').next().expect("a port").trim();
    proxy.reload(&format!(
        "[[cluster]]\nname = \"eu1\"\nendpoints = [\"{socket}:{port}\"]\nmax_sessions = 2\n\
         tls = {{ mode = \"disable\" }}\n\
         [[tenant]]\nid = \"acme\"\n[tenant.placement]\ncluster = \"eu1\"\ndbname = \"tenant_acme\"\n\
         [tenant.lease]\nroles = {{ read-write = \"tenant-acme-rw\" }}\n\
         [[tenant]]\nid = \"globex\"\n[tenant.placement]\ncluster = \"eu1\"\ndbname = \"tenant_globex\"\n\
         [tenant.lease]\nroles = {{ read-write = \"tenant-globex-rw\" }}\n"
    ));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    let acme = proxy.connect(&mint::token("acme"), "acme").await.expect("the first");
    let _globex = proxy.connect(&mint::token("globex"), "globex").await.expect("the second");
    for tenant in ["acme", "globex"] {
        let error = proxy.connect(&mint::token(tenant), tenant).await.expect_err("none is left");
        let error = error.as_db_error().expect("it is told").clone();
        assert_eq!((error.code().code(), error.message()), ("53300", "too many connections"));
    }
    let event = proxy.event("refused", |event| event["tenant"] == "acme").await;
    assert_eq!(event["cause"], "max_sessions of cluster eu1 is reached");
    drop(acme);
    proxy.metric_reaches("pgsilo_sessions_active", 1.0).await;
    proxy.connect(&mint::token("globex"), "globex").await.expect("a place is free");
}

#[tokio::test]
async fn connections_of_one_address_are_bounded() {
    let proxy = Proxy::with(limits_of("max_connections_per_address = 2\n")).await;
    let mut first = Raw::tcp(proxy.address()).await;
    first.log_in(&mint::token("acme"), "acme").await;
    let second = Raw::tcp(proxy.address()).await;
    proxy.metric_reaches("pgsilo_handshakes_active", 1.0).await;
    let mut third = Raw::tcp(proxy.address()).await;
    refused(&mut third, "53300", "too many connections from this address").await;
    let mut unix = Raw::unix(&proxy.socket()).await;
    unix.log_in(&mint::token("acme"), "acme").await;
    drop(second);
    proxy.metric_reaches("pgsilo_handshakes_active", 0.0).await;
    Raw::tcp(proxy.address()).await.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
pub(crate) async fn an_idle_session_is_ended_and_a_busy_one_is_not() {
    let proxy = Proxy::with(limits_of("idle_timeout = \"2s\"\n")).await;
    let mut busy = Raw::tcp(proxy.address()).await;
    busy.log_in(&mint::token("acme"), "acme").await;
    busy.send(&query("SELECT pg_sleep(3)")).await;
    let mut idle = Raw::tcp(proxy.address()).await;
    idle.log_in(&mint::token("acme"), "acme").await;
    refused(&mut idle, "57P05", "terminating connection due to idle-session timeout").await;
    let answered = busy.until(b'Z').await;
    assert!(answered.iter().all(|message| message.tag != b'E'), "{answered:?}");
    refused(&mut busy, "57P05", "terminating connection due to idle-session timeout").await;
    let endings = "pgsilo_endings_total{ending=\"idle_timeout\"}";
    proxy.metric_reaches(endings, 2.0).await;
}

#[tokio::test]
async fn a_refused_client_that_goes_on_sending_still_reads_why() {
    let proxy = Proxy::with(limits_of("")).await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app")])).await;
    client.message().await;
    // A token far beyond the bound, in full: closing at once would reset the connection.
    client.send_anyway(&pgsilo_sandbox::testing::raw::password(&"x".repeat(100_000))).await;
    refused(&mut client, "28P01", "session token authentication failed").await;
}

#[tokio::test]
async fn a_flood_of_cancel_requests_of_one_address_is_cut_off() {
    let mut proxy = Proxy::with(limits_of("")).await;
    let many = async |proxy: &Proxy| {
        for _ in 0..150 {
            let mut client = Raw::tcp(proxy.address()).await;
            client
                .send(&pgsilo_sandbox::testing::raw::packet(80_877_102, &[0, 0, 0, 1, 9, 9, 9, 9]))
                .await;
            client.silence().await;
        }
    };
    // As many at once as it takes to be faster than a hundred a second.
    let mut sent = 0;
    while !proxy.events("cancel_refused").iter().any(|event| event["reason"] == "too_many") {
        futures_util::future::join_all((0..4).map(|_| many(&proxy))).await;
        sent += 600;
    }
    // Sessions are not affected.
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    tokio::time::timeout(Duration::from_secs(10), client.ask("SELECT 'fine'"))
        .await
        .expect("in time");
    // Their events are few, and all of them are counted.
    proxy.signal(rustix::process::Signal::TERM);
    assert_eq!(proxy.ended().await.code(), Some(0));
    let events = eventually("the last events", async || {
        let events = proxy.events("cancel_refused");
        let counted: u64 = events.iter().filter_map(|event| event["count"].as_u64()).sum();
        (counted == sent).then_some(events)
    })
    .await;
    // Two causes, each told of at once, at the end, and once a minute.
    assert!(events.len() < 20, "{}", events.len());
}

/// How long the threads of a process have worked whose names begin so, in clock ticks.
fn worked(proxy: &Proxy, names: &str) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", proxy.pid())).expect("it runs");
    let stats = threads.filter_map(|thread| {
        std::fs::read_to_string(thread.expect("a thread").path().join("stat")).ok()
    });
    let of_it = stats.filter_map(|stat| {
        // pid (name) state, and ten more before the time in user mode.
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        name.starts_with(names).then(|| rest.split(' ').nth(12)?.parse::<u64>().ok())?
    });
    of_it.sum()
}

/// What a database asks for before it lets anybody in is its own to choose, and so a tenant's.
#[tokio::test]
async fn scram_hashing_does_not_run_on_event_loops() {
    let address = fake::asks_to_hash(100_000).await;
    let proxy = Proxy::with(Settings::default()).await;
    proxy.place_acme_at(address.port(), "").await;
    let token = mint::token("acme");
    let logins = join_all((0..40).map(|_| proxy.connect(&token, "acme"))).await;
    assert!(logins.iter().all(Result::is_err));
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "backend_rejected", "{event}");
    // Forty logins take the loops some time as well, but not that of four million hashes.
    let (hashing, serving) = (worked(&proxy, "pgsilo-hash"), worked(&proxy, "pgsilo-core"));
    assert!(hashing > 4 * serving, "{hashing} ticks beside {serving} of the event loops");
}
