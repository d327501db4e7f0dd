//! Peers that vanish without a word, as when a machine loses its power or a firewall forgets a
//! connection; and readers that only pause, which are not to be mistaken for them.
//!
//! A peer vanishes here by a filter on its socket, which drops whatever arrives before TCP sees it:
//! nothing is answered any more, and no peer is told. Clients, databases, and nodes of OpenBAO.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, query, tagged};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, fake, mint, vanish};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Far below PATIENCE, and no shorter than a busy machine needs to look eight times meanwhile.
const TIMEOUT: &str = "dead_peer_timeout = \"8s\"\n";

async fn impatient() -> Proxy {
    let listeners = PLAIN.to_owned() + UNIX;
    Proxy::with(Settings { listeners, limits: TIMEOUT.to_owned(), ..Settings::default() }).await
}

/// A session with a machine that can vanish, and its backend's pid.
async fn session(proxy: &Proxy, receives: Option<u32>) -> (Raw, OwnedFd, String) {
    let socket = TcpSocket::new_v4().expect("a socket");
    if let Some(bytes) = receives {
        socket.set_recv_buffer_size(bytes).expect("set");
    }
    let tcp = socket.connect(proxy.address()).await.expect("connected");
    let machine = tcp.as_fd().try_clone_to_owned().expect("cloned");
    let mut client = Raw::over(tcp);
    client.log_in(&mint::token("acme"), "acme").await;
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    (client, machine, pid)
}

#[tokio::test]
async fn vanished_clients_are_detected_and_paused_readers_are_not_mistaken_for_them() {
    let proxy = impatient().await;
    let rows = query("SELECT repeat('x', 1000) FROM generate_series(1, 300000)");
    // Two that pause: one stops the database, of the other all is on its way.
    let (mut pausing, _machine, pid) = session(&proxy, None).await;
    pausing.send(&rows).await;
    world().waits_for(&pid, "ClientWrite").await;
    let (mut behind, _machine, pid) = session(&proxy, Some(4096)).await;
    behind.send(&query("SELECT repeat('y', 200000)")).await;
    world().waits_for(&pid, "ClientRead").await;

    // Three that vanish: idle, with a query that runs, and with an answer that they did not take.
    let (idle, machine, _pid) = session(&proxy, None).await;
    vanish(&machine);
    let (mut asking, machine, pid) = session(&proxy, None).await;
    asking.send(&query("SELECT pg_sleep(2)")).await;
    world().waits_for(&pid, "PgSleep").await;
    vanish(&machine);
    let (mut reading, machine, pid) = session(&proxy, None).await;
    reading.send(&rows).await;
    world().waits_for(&pid, "ClientWrite").await;
    vanish(&machine);

    let ended = proxy.events_reach("ended", 3).await;
    assert!(ended.iter().all(|event| event["ending"] == "client_lost"));
    proxy.metric_reaches("pgsilo_sessions_active", 2.0).await;
    // Its query was cancelled, not left to itself.
    world().has_ended(&pid).await;
    drop((idle, asking, reading));

    let messages = pausing.until(b'Z').await;
    assert_eq!(messages.iter().filter(|message| message.tag == b'D').count(), 300_000);
    let messages = behind.until(b'Z').await;
    assert_eq!(messages[1].body.len(), 6 + 200_000);
    for mut client in [pausing, behind] {
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    }
}

/// A stand-in for a database, whose machine can be made to vanish.
#[derive(Default, Clone)]
struct Database(Arc<Mutex<Vec<OwnedFd>>>);

impl Database {
    async fn serve(self, mut tcp: TcpStream) {
        let machine = tcp.as_fd().try_clone_to_owned().expect("cloned");
        let mut sink = vec![0; 65536];
        let _let_in = fake::lets_in(&mut tcp).await;
        let asked = tcp.read(&mut sink).await.unwrap_or_default();
        let question = String::from_utf8_lossy(&sink[..asked]).into_owned();
        let row = fake::row(&format!("{}acme", fake::number_in(&question)));
        let _said = tcp.write_all(&[row, tagged(b'Z', b"I")].concat()).await;
        self.0.lock().expect("no panic").push(machine);
        while matches!(tcp.read(&mut sink).await, Ok(1..)) {}
    }

    /// Waits until so many connections are logged in.
    async fn serves(&self, count: usize) {
        eventually("the logins", async || {
            (self.0.lock().expect("no panic").len() == count).then_some(())
        })
        .await;
    }

    fn vanishes(&self) {
        self.0.lock().expect("no panic").iter().for_each(vanish);
    }
}

#[tokio::test]
async fn a_vanished_database_ends_waiting_and_idle_sessions() {
    let database = Database::default();
    let serving = database.clone();
    let address = fake::serves(move |tcp| serving.clone().serve(tcp)).await;
    let proxy = impatient().await;
    proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.log_in(&mint::token("acme"), "acme").await;
        clients.push(client);
    }
    database.serves(2).await;
    database.vanishes();
    clients[0].send(&query("SELECT 1")).await;
    for mut client in clients {
        let error = client.fatal().await;
        assert_eq!(error.sqlstate(), "08006");
    }
    for number in 0..2 {
        let ended = eventually("the event", async || proxy.events("ended").get(number).cloned());
        assert_eq!(ended.await["ending"], "backend_lost");
    }
}

/// A stand-in for the address that several nodes of OpenBAO share: it passes everything on to the
/// real one. The node that serves now vanishes with its connections; a new connection gets another.
#[derive(Default, Clone)]
struct Nodes(Arc<Mutex<Vec<OwnedFd>>>);

impl Nodes {
    async fn serve(self, mut tcp: TcpStream) {
        let machine = tcp.as_fd().try_clone_to_owned().expect("cloned");
        self.0.lock().expect("no panic").push(machine);
        let address = world().var("BAO_ADDR").trim_start_matches("http://");
        let mut bao = TcpStream::connect(address).await.expect("connected");
        let _closed = tokio::io::copy_bidirectional(&mut tcp, &mut bao).await;
    }
}

#[tokio::test]
async fn a_node_of_openbao_that_vanishes_costs_one_login_and_not_one_for_each_connection_to_it() {
    let nodes = Nodes::default();
    let serving = nodes.clone();
    let address = fake::serves(move |tcp| serving.clone().serve(tcp)).await;
    let openbao = format!(
        "address = \"http://{address}\"\ntimeout = \"3s\"\n\
         auth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"secret-id\" }} }}\n"
    );
    let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
    let token = mint::token("acme");
    // They stay open, so that nothing is revoked meanwhile.
    let sessions = join_all((0..6).map(|_| proxy.connect(&token, "acme"))).await;
    assert!(sessions.iter().all(Result::is_ok));
    assert!(nodes.0.lock().expect("no panic").len() > 2, "connections are kept");

    nodes.0.lock().expect("no panic").drain(..).for_each(|machine| vanish(&machine));
    let mut served = Vec::new();
    for _ in 0..6 {
        served.push(proxy.connect(&token, "acme").await);
    }
    let refused = served.iter().filter(|session| session.is_err()).count();
    assert_eq!(refused, 1, "logins were refused");
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "lease_unavailable");
}
