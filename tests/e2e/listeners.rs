//! What a listener may be told: certificates that are renewed, hosts that name a tenant, balancers
//! that say for whom they connect.

use std::fs;
use std::net::SocketAddr;

use pgsilo_sandbox::testing::authority::Authority;
use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, TLS, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, ssl_request, startup};
use rustls::NamedGroup;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

// --- TLS ------------------------------------------------------------------------------------

/// The certificate that a client who comes now is shown.
async fn shown(address: SocketAddr, ca: &[u8]) -> Vec<u8> {
    let tcp = TcpStream::connect(address).await.expect("connected");
    let tls = Raw::shake_hands(tcp, &[b"postgresql"], "localhost", None, ca).await.expect("TLS");
    tls.get_ref().1.peer_certificates().expect("shown")[0].to_vec()
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_without_a_restart_and_sessions_go_on() {
    let proxy = Proxy::start().await;
    let address = proxy.address();
    let mut client = Raw::tls(address).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let before = shown(address, b"").await;

    let authority = Authority::new();
    let ca = authority.pem().into_bytes();
    let renewed = authority.server();
    // In between, certificate and key are no pair: said, and nothing is changed.
    fs::write(proxy.dir().join("server.crt"), &renewed.certificate).expect("written");
    let failed = "pgsilo_file_reloads_total{file=\"certificate\",result=\"error\"}";
    proxy.metric_reaches(failed, 1.0).await;
    assert_eq!(shown(address, b"").await, before);
    fs::write(proxy.dir().join("server.key"), &renewed.key).expect("written");
    proxy
        .metric_reaches("pgsilo_file_reloads_total{file=\"certificate\",result=\"ok\"}", 1.0)
        .await;
    assert_eq!(shown(address, &ca).await, renewed.der().0.to_vec());
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");

    // SIGHUP reads it in any case.
    proxy.signal(rustix::process::Signal::HUP);
    proxy
        .metric_reaches("pgsilo_file_reloads_total{file=\"certificate\",result=\"ok\"}", 2.0)
        .await;
}

#[tokio::test]
async fn post_quantum_key_exchange_is_offered_and_old_tls_is_not() {
    let proxy = Proxy::start().await;
    let tcp = TcpStream::connect(proxy.address()).await.expect("connected");
    let tls = Raw::shake_hands(tcp, &[b"postgresql"], "localhost", None, b"").await.expect("TLS");
    let connection = tls.get_ref().1;
    let group = connection.negotiated_key_exchange_group().expect("one").name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));

    // A ClientHello of TLS 1.1 gets the alert protocol_version (70).
    let mut tcp = TcpStream::connect(proxy.address()).await.expect("connected");
    tcp.write_all(&ssl_request()).await.expect("sent");
    assert_eq!(tcp.read_u8().await.expect("an answer"), b'S');
    let suites = [0xc0, 0x13, 0x00, 0x2f];
    let mut hello = vec![3, 2];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(&[0, 0, suites.len() as u8]);
    hello.extend_from_slice(&suites);
    hello.extend_from_slice(&[1, 0]);
    // Nothing else may be wrong with it: the algorithms of signatures that it knows.
    hello.extend_from_slice(&[0, 10, 0, 13, 0, 6, 0, 4, 4, 3, 4, 1]);
    let handshake = [&[1, 0, 0, hello.len() as u8][..], &hello].concat();
    let record = [&[22, 3, 1, 0, handshake.len() as u8][..], &handshake].concat();
    tcp.write_all(&record).await.expect("sent");
    let mut alert = Vec::new();
    tcp.read_to_end(&mut alert).await.expect("an alert, and the end");
    assert_eq!((alert[0], &alert[5..7]), (21, &[2, 70][..]), "{alert:?}");
}

// --- Hosts that name a tenant ---------------------------------------------------------------

/// A session over TLS with a host of that name; its database, or the refusal's reason.
async fn by_host(proxy: &Proxy, ca: &[u8], host: &str, token: &str, dbname: &str) -> String {
    let mut client = Raw::named(proxy.address(), host, ca).await.expect("TLS");
    client.send(&startup(&[("user", "app"), ("database", dbname)])).await;
    client.send_password(token).await;
    if client.message().await.tag == b'E' {
        return "refused".to_owned();
    }
    client.until(b'Z').await;
    client.ask("SELECT current_database()").await
}

#[tokio::test]
async fn a_host_may_name_the_tenant_and_must_agree_with_the_token() {
    let authority = Authority::new();
    let names = ["*.db.example", "*.x.db.example", "localhost"].map(str::to_owned);
    let pair = authority.server_of(&names);
    let ca = authority.pem().into_bytes();
    let listeners = TLS.replace("server.", "sni.") + "sni_suffix = \"DB.example\"\n";
    let files = vec![("sni.crt", pair.certificate), ("sni.key", pair.key)];
    let proxy = Proxy::with(Settings { listeners, files, ..Settings::default() }).await;

    let acme = mint::token("acme");
    let both = mint::token_with("acme", serde_json::json!({ "tenant": ["acme", "globex"] }));
    for (host, token, dbname, expected) in [
        ("acme.db.example", &acme, "acme", "tenant_acme"),
        ("ACME.DB.EXAMPLE", &acme, "app", "tenant_acme"),
        ("globex.db.example", &acme, "acme", "refused"),
        ("globex.db.example", &acme, "app", "refused"),
        ("acme.db.example", &acme, "globex", "refused"),
        ("nobody.db.example", &acme, "acme", "refused"),
        ("acme.x.db.example", &acme, "acme", "refused"),
        // It chooses among the token's tenants, and must agree with the database's name.
        ("acme.db.example", &both, "app", "tenant_acme"),
        ("globex.db.example", &both, "app", "tenant_globex"),
        ("globex.db.example", &both, "acme", "refused"),
        ("globex.db.example", &both, "globex", "tenant_globex"),
        // Any other host is unknown.
        ("localhost", &acme, "acme", "tenant_acme"),
        ("localhost", &both, "app", "refused"),
    ] {
        assert_eq!(by_host(&proxy, &ca, host, token, dbname).await, expected, "{host} {dbname}");
    }
    for event in proxy.events("refused") {
        let reason = event["reason"].as_str().expect("a reason");
        assert!(["database_unknown", "tenant_unresolved"].contains(&reason), "{event}");
    }
    // Whether a tenant of that name exists cannot be told from the answers.
    let [globex, nobody] = ["globex", "nobody"].map(async |tenant| {
        let host = format!("{tenant}.db.example");
        let mut client = Raw::named(proxy.address(), &host, &ca).await.expect("TLS");
        client.send(&startup(&[("user", "app")])).await;
        client.send_password(&acme).await;
        let told = client.fatal().await;
        let words = told.field(b'M').expect("a text").replace(tenant, "TENANT");
        (told.sqlstate(), words, told.field(b'H'))
    });
    let (globex, nobody) = (globex.await, nobody.await);
    assert_eq!(globex, nobody);
    assert_eq!(globex.1, "database \"TENANT\" does not exist");
}

// --- Balancers --------------------------------------------------------------------------------

async fn behind_a_balancer(trusted: &str, limits: &str) -> Proxy {
    let listeners = format!("{PLAIN}proxy_protocol = [\"{trusted}\"]\n{UNIX}");
    let limits = format!("{limits}drain_timeout = \"2s\"\n");
    Proxy::with(Settings { listeners, limits, ..Settings::default() }).await
}

async fn connect(proxy: &Proxy, header: &[u8]) -> Raw {
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(header).await;
    client
}

/// Version 2, as HAProxy sends it for IPv4.
fn version_2(source: [u8; 4], port: u16) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend_from_slice(&source);
    header.extend_from_slice(&[127, 0, 0, 1]);
    header.extend_from_slice(&port.to_be_bytes());
    header.extend_from_slice(&[0x19, 0x20]);
    header
}

#[tokio::test]
async fn behind_a_balancer_events_and_bounds_see_the_client() {
    let limits = "max_connections_per_address = 1\n";
    let proxy = behind_a_balancer("127.0.0.0/8", limits).await;
    let token = mint::token("acme");
    let mut first = connect(&proxy, b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 6432\r\n").await;
    first.log_in(&token, "acme").await;
    proxy.event("started", |event| event["address"] == "192.0.2.7:4711").await;
    let mut second = connect(&proxy, &version_2([192, 0, 2, 8], 4712)).await;
    second.log_in(&token, "acme").await;
    proxy.event("started", |event| event["address"] == "192.0.2.8:4712").await;
    // One more of the first client's, whatever port it comes from.
    let mut third = connect(&proxy, &version_2([192, 0, 2, 7], 4713)).await;
    assert_eq!(third.fatal().await.sqlstate(), "53300");
    proxy.event("refused", |event| event["address"] == "192.0.2.7:4713").await;
    // IPv6, and a check of the balancer's own.
    let mut sixth = connect(&proxy, b"PROXY TCP6 2001:db8::7 ::1 4714 6432\r\n").await;
    sixth.log_in(&token, "acme").await;
    proxy.event("started", |event| event["address"] == "[2001:db8::7]:4714").await;
    connect(&proxy, b"PROXY UNKNOWN\r\n").await.shutdown().await;
    assert_eq!(first.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn a_balancer_that_sends_no_header_is_refused_and_so_is_a_header_of_anybody_else() {
    let proxy = behind_a_balancer("127.0.0.0/8", "").await;
    for bytes in [
        startup(&[("user", "app")]),
        b"PROXY TCP4 192.0.2.7 127.0.0.1 4711\r\n".to_vec(),
        [b"PROXY ".to_vec(), vec![b'x'; 200]].concat(),
        [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".to_vec(), vec![0; 64]].concat(),
    ] {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send_anyway(&bytes).await;
        assert_eq!(client.fatal().await.sqlstate(), "08P01", "{bytes:?}");
    }
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["cause"], "a PROXY protocol header was expected");

    // Who is not trusted is who it is.
    let proxy = behind_a_balancer("192.0.2.0/24", "").await;
    let mut client = connect(&proxy, b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 6432\r\n").await;
    assert_eq!(client.fatal().await.sqlstate(), "08P01");
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let started = proxy.event("started", |_| true).await;
    assert!(started["address"].as_str().expect("text").starts_with("127.0.0.1:"), "{started}");
}
