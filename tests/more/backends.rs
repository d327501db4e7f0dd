//! Databases behind TLS, other login methods, a Unix socket, PostgreSQL 15 and 16.5: what pgsilo
//! accepts of a placement's server, and what it refuses before it has sent anything worth having.

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::tagged;
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, fake, mint};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::OnceCell;
use tokio_postgres::error::SqlState;

use crate::cluster::{Authority, Certificate, Cluster, METHODS, placed};
use crate::middle::{Middle, Tampering};
use crate::var;

/// A PostgreSQL 18 whose ECDSA certificate names `localhost` and nothing else.
async fn cluster() -> &'static Cluster {
    static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
    CLUSTER
        .get_or_init(|| async {
            let authority = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256);
            Cluster::start(&var("PGSILO_POSTGRES_TLS"), authority.certify("localhost")).await
        })
        .await
}

async fn accepted(proxy: &Proxy) -> tokio_postgres::Client {
    match proxy.connect(&mint::token("acme"), "acme").await {
        Ok(client) => client,
        Err(error) => panic!("refused: {error}: {:?}", proxy.events("refused")),
    }
}

/// The login is refused with that SQLSTATE; what the audit event says of the cause.
async fn refused(proxy: &Proxy, sqlstate: &str) -> String {
    let error = match proxy.connect(&mint::token("acme"), "acme").await {
        Err(error) => error,
        Ok(_client) => panic!("the login was accepted"),
    };
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(error.code().map(SqlState::code), Some(sqlstate), "{event}");
    assert_eq!(event["sqlstate"], sqlstate);
    event["cause"].as_str().expect("a cause").to_owned()
}

fn tcp(host: &str, port: u16, tls: &str) -> String {
    format!("host = \"{host}\"\nport = {port}\ntls = {{ {tls} }}\n")
}

fn contains(bytes: &[u8], part: &str) -> bool {
    bytes.windows(part.len()).any(|window| window == part.as_bytes())
}

// --- TLS that is accepted ----------------------------------------------------------------

#[tokio::test]
async fn every_mode_reaches_a_server_that_it_should_believe() {
    let cluster = cluster().await;
    let ca = cluster.ca();
    let ca = format!("ca = \"{}\"", ca.display());
    for (host, tls) in [
        ("localhost", ca.clone()), // verify-full is the default
        ("localhost", format!("mode = \"verify-full\", {ca}")),
        ("127.0.0.1", format!("server_name = \"localhost\", {ca}")),
        ("127.0.0.1", format!("mode = \"verify-ca\", {ca}")),
        ("127.0.0.1", "mode = \"require\"".to_owned()),
    ] {
        let proxy = cluster.proxy("scram", &tcp(host, cluster.port, &tls)).await;
        let client = accepted(&proxy).await;
        let row = client
            .query_one("SELECT current_database()::text, pg_backend_pid()", &[])
            .await
            .expect("a row");
        assert_eq!(row.get::<_, &str>(0), "tenant_scram");
        let pid: i32 = row.get(1);
        let superuser = cluster.superuser().await;
        let query = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = $1";
        let row = superuser.query_one(query, &[&pid]).await.expect("a row");
        assert_eq!((row.get(0), row.get(1)), (true, "TLSv1.3"), "{tls}");
        let authenticated = format!("[{pid}] LOG:  connection authenticated: identity=");
        let log = cluster.log();
        let line = log.lines().find(|line| line.contains(&authenticated)).expect("logged");
        assert!(line.contains("method=scram-sha-256"), "{line}");
        assert_eq!(proxy.served(0).await["channel_binding"], true, "{tls}");
    }
}

/// Under TLS and on a Unix socket as well, a connection is opened on one event loop and used on
/// another.
#[tokio::test]
async fn a_prewarmed_connection_is_taken_over_tls_and_unix_sockets() {
    let cluster = cluster().await;
    let tls = tcp("localhost", cluster.port, &format!("ca = \"{}\"", cluster.ca().display()));
    let unix = format!("socket = \"{}\"\n", cluster.socket().display());
    for (placement, check_delay) in [(&tls, "0s"), (&tls, "60s"), (&unix, "0s"), (&unix, "60s")] {
        let pool = format!(
            "max_idle_per_tenant = 1\nidle_timeout = \"60s\"\ncheck_delay = \"{check_delay}\"\n"
        );
        let settings = Settings { pool, ..Settings::default() };
        let proxy = cluster.proxy_with("scram", placement, settings).await;
        drop((accepted(&proxy).await, accepted(&proxy).await));
        // Each core gets every other session.
        for number in 2..6 {
            proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
            let client = accepted(&proxy).await;
            assert_eq!(proxy.served(number).await["pooled"], true, "{placement}");
            let sql = "SELECT repeat('x', 100000), pg_backend_pid()";
            let row = client.query_one(sql, &[]).await.expect("a row");
            assert_eq!(row.get::<_, &str>(0).len(), 100_000);
            cancels(cluster, &client).await;
        }
        assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"check_failed\"}").await, 0.0);
        // One that was closed meanwhile is detected, whether or not its seal is read.
        proxy.metric_reaches("pgsilo_pool_idle_connections", 1.0).await;
        let is_prewarmed = |line: &Value| line["message"] == "connection prewarmed";
        let waiting = proxy.lines().into_iter().rfind(is_prewarmed).expect("logged");
        let sql = format!("SELECT pg_terminate_backend({}, 10000)", waiting["pid"]);
        let row = cluster.superuser().await.query_one(&sql, &[]).await.expect("terminated");
        assert!(row.get::<_, bool>(0));
        accepted(&proxy).await.query_one("SELECT 1", &[]).await.expect("a row");
        assert_eq!(proxy.served(6).await["pooled"], false, "{placement}");
        assert_eq!(proxy.metric("pgsilo_pool_closed_total{reason=\"check_failed\"}").await, 1.0);
    }
}

#[tokio::test]
async fn a_query_is_cancelled_over_tls() {
    let cluster = cluster().await;
    let tls = format!("ca = \"{}\"", cluster.ca().display());
    let proxy = cluster.proxy("scram", &tcp("localhost", cluster.port, &tls)).await;
    let client = accepted(&proxy).await;
    cancels(cluster, &client).await;
}

async fn cancels(cluster: &Cluster, client: &tokio_postgres::Client) {
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("a pid").get(0);
    let superuser = cluster.superuser().await;
    let cancel = async {
        eventually("the query to run", async || {
            let sleeps = "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
            superuser.query_opt(sleeps, &[&pid]).await.expect("asked")
        })
        .await;
        client.cancel_token().cancel_query(tokio_postgres::NoTls).await.expect("sent");
    };
    let (slept, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), cancel);
    assert_eq!(slept.expect_err("cancelled").code(), Some(&SqlState::QUERY_CANCELED));
}

// --- TLS that is not ---------------------------------------------------------------------

/// A server that shows this certificate is refused, and has heard nothing inside TLS.
async fn not_believed(certificate: &Certificate, tls: &str, cause: &str) {
    let cluster = cluster().await;
    let middle =
        Middle::start(certificate, &cluster.certificate, cluster.port, Tampering::None).await;
    let proxy = cluster.proxy("scram", &tcp("localhost", middle.address.port(), tls)).await;
    let said = refused(&proxy, "08001").await;
    assert!(said.contains(cause), "{said}");
    eventually("the handshake to fail", async || (!middle.handshakes().is_empty()).then_some(()))
        .await;
    assert_eq!(middle.handshakes(), [false]);
    assert_eq!(middle.seen(), b"");
}

#[tokio::test]
async fn an_authority_that_is_not_the_placements() {
    let cluster = cluster().await;
    let ca = cluster.ca();
    let other = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256).certify("localhost");
    for mode in ["verify-full", "verify-ca"] {
        let tls = format!("mode = \"{mode}\", ca = \"{}\"", ca.display());
        not_believed(&other, &tls, "invalid peer certificate").await;
    }
}

#[tokio::test]
async fn a_certificate_for_another_host() {
    let cluster = cluster().await;
    let authority = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256);
    let other = authority.certify("other.example");
    let ca = cluster.ca().with_file_name("other-ca.crt");
    std::fs::write(&ca, &other.ca).expect("written");
    let tls = format!("ca = \"{}\"", ca.display());
    not_believed(&other, &tls, "not valid for name \"localhost\"").await;
}

#[tokio::test]
async fn an_expired_certificate() {
    let cluster = cluster().await;
    let authority = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256);
    let old = authority.certify_until("localhost", 2021);
    let ca = cluster.ca().with_file_name("old-ca.crt");
    std::fs::write(&ca, &old.ca).expect("written");
    for mode in ["verify-full", "verify-ca"] {
        let tls = format!("mode = \"{mode}\", ca = \"{}\"", ca.display());
        not_believed(&old, &tls, "expired").await;
    }
}

#[tokio::test]
async fn a_server_without_tls_is_never_spoken_to_in_clear() {
    // The sandbox's own server has none.
    let dsn = world().var("PG_SUPERUSER_DSN");
    let config: tokio_postgres::Config = dsn.parse().expect("a DSN");
    let port = config.get_ports()[0];
    let ca = cluster().await.ca();
    for tls in [
        "mode = \"require\"".to_owned(),
        format!("mode = \"verify-ca\", ca = \"{}\"", ca.display()),
        format!("ca = \"{}\"", ca.display()),
    ] {
        let placement = format!("dbname = \"tenant_acme\"\n{}", tcp("127.0.0.1", port, &tls));
        let proxy = placed("tenant-acme-rw", &placement).await;
        let said = refused(&proxy, "08001").await;
        assert!(said.contains("does not offer TLS, which its placement asks for"), "{said}");
    }
}

#[tokio::test]
async fn bytes_in_front_of_the_handshake() {
    // CVE-2021-23222: what came in clear must not be read as if it had come inside TLS.
    let address = fake::says(b"SR\0\0\0\x08\0\0\0\0").await;
    let placement = tcp("localhost", address.port(), "mode = \"require\"");
    let proxy = cluster().await.proxy("scram", &placement).await;
    let said = refused(&proxy, "08001").await;
    assert!(said.contains("TLS with"), "{said}");
}

// --- Channel binding ---------------------------------------------------------------------

/// The login goes through somebody who has the server's own certificate, and so sees which
/// mechanism is used, without being noticed.
async fn plus_is_used(algorithm: &'static rcgen::SignatureAlgorithm) {
    let certificate = Authority::new(algorithm).certify("localhost");
    let cluster = Cluster::start(&var("PGSILO_POSTGRES_TLS"), certificate.clone()).await;
    let middle = Middle::start(&certificate, &certificate, cluster.port, Tampering::None).await;
    let tls = format!("ca = \"{}\"", cluster.ca().display());
    let proxy = cluster.proxy("scram", &tcp("localhost", middle.address.port(), &tls)).await;
    let client = accepted(&proxy).await;
    assert!(client.simple_query("SELECT 1").await.is_ok());
    let seen = middle.seen();
    assert!(contains(&seen, "SCRAM-SHA-256-PLUS\0"));
    assert!(contains(&seen, "p=tls-server-end-point,,"));
    assert_eq!(proxy.served(0).await["channel_binding"], true);
    drop(client);
}

#[tokio::test]
async fn scram_is_bound_to_an_rsa_certificate() {
    plus_is_used(&rcgen::PKCS_RSA_SHA256).await;
}

#[tokio::test]
async fn scram_is_bound_to_an_rsa_certificate_signed_with_sha512() {
    plus_is_used(&rcgen::PKCS_RSA_SHA512).await;
}

#[tokio::test]
async fn scram_is_bound_to_an_ecdsa_p256_certificate() {
    plus_is_used(&rcgen::PKCS_ECDSA_P256_SHA256).await;
}

#[tokio::test]
async fn scram_is_bound_to_an_ecdsa_p384_certificate() {
    plus_is_used(&rcgen::PKCS_ECDSA_P384_SHA384).await;
}

/// `require` believes any certificate, and `verify-ca` any name; the login must not. Somebody shows
/// `own` in front of a server.
async fn somebody_in_the_middle(
    server: &Cluster,
    own: &Certificate,
    tls: &str,
    tampering: Tampering,
) -> (String, Vec<u8>) {
    let middle = Middle::start(own, &server.certificate, server.port, tampering).await;
    let placement = tcp("localhost", middle.address.port(), tls);
    let proxy = server.proxy("scram", &placement).await;
    let said = refused(&proxy, "58000").await;
    assert!(proxy.events("started").is_empty());
    let seen = middle.seen();
    // The seal's query would show that the login went through.
    assert!(!contains(&seen, "pg_db_role_setting"));
    // Who could not be bound is never told so: it is how one asks to be relayed.
    assert!(!contains(&seen, "n,,n="), "{tls}");
    (said, seen)
}

#[tokio::test]
async fn a_man_in_the_middle_of_mode_require_cannot_relay_a_login() {
    let own = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256).certify("localhost");
    for tls in ["mode = \"require\"", "mode = \"require\", channel_binding = \"prefer\""] {
        let (_, seen) = somebody_in_the_middle(cluster().await, &own, tls, Tampering::None).await;
        assert!(contains(&seen, "p=tls-server-end-point,,"));
    }
}

#[tokio::test]
async fn stripping_scram_plus_is_detected() {
    let own = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256).certify("localhost");
    let tls = "mode = \"require\", channel_binding = \"prefer\"";
    let (_, seen) = somebody_in_the_middle(cluster().await, &own, tls, Tampering::StripPlus).await;
    // "I could, and you do not seem to": the server knows better.
    assert!(contains(&seen, "SCRAM-SHA-256\0"));
    assert!(contains(&seen, "y,,n="));
    // By default nothing is said at all.
    let (said, seen) =
        somebody_in_the_middle(cluster().await, &own, "mode = \"require\"", Tampering::StripPlus)
            .await;
    assert!(said.contains("does not offer SCRAM-SHA-256-PLUS"), "{said}");
    assert!(!contains(&seen, "SCRAM-SHA-256"));
}

/// An Ed25519 signature has no hash that a certificate could be hashed with, so a login cannot be
/// bound to one: a man in the middle chooses to present such a certificate.
#[tokio::test]
async fn a_man_in_the_middle_with_an_unbindable_certificate_is_refused() {
    let own = Authority::new(&rcgen::PKCS_ED25519).certify("localhost");
    for (tls, tampering, cause) in [
        ("mode = \"require\"", Tampering::None, "has no hash to bind to"),
        ("mode = \"require\"", Tampering::StripPlus, "does not offer SCRAM-SHA-256-PLUS"),
        (
            "mode = \"require\", channel_binding = \"prefer\"",
            Tampering::None,
            "has no hash to bind to",
        ),
        // `y`: the server itself refuses it.
        (
            "mode = \"require\", channel_binding = \"prefer\"",
            Tampering::StripPlus,
            "SCRAM channel binding negotiation error",
        ),
    ] {
        let (said, _) = somebody_in_the_middle(cluster().await, &own, tls, tampering).await;
        assert!(said.contains(cause), "{tls}: {said}");
    }
}

/// The same with `verify-ca`, where the authority itself signs with Ed25519, and has certified
/// somebody else as well; with `verify-full`, the server is who it is.
#[tokio::test]
async fn a_database_that_cannot_be_bound_to_must_be_verified_in_full() {
    let authority = Authority::new(&rcgen::PKCS_ED25519);
    let server = Cluster::start(&var("PGSILO_POSTGRES_TLS"), authority.certify("localhost")).await;
    let other = authority.certify("other.example");
    let ca = format!("ca = \"{}\"", server.ca().display());
    for tls in [
        format!("mode = \"verify-ca\", {ca}"),
        format!("mode = \"verify-ca\", {ca}, channel_binding = \"prefer\""),
        "mode = \"require\"".to_owned(),
    ] {
        let (said, _) = somebody_in_the_middle(&server, &other, &tls, Tampering::None).await;
        assert!(said.contains("has no hash to bind to"), "{said}");
        // Nor without anybody in the middle: it cannot be told.
        let proxy = server.proxy("scram", &tcp("localhost", server.port, &tls)).await;
        refused(&proxy, "58000").await;
    }
    let proxy = server.proxy("scram", &tcp("localhost", server.port, &ca)).await;
    drop(accepted(&proxy).await);
    assert_eq!(proxy.served(0).await["channel_binding"], false);
    let must = format!("{ca}, channel_binding = \"require\"");
    let proxy = server.proxy("scram", &tcp("localhost", server.port, &must)).await;
    let said = refused(&proxy, "58000").await;
    assert!(said.contains("has no hash to bind to"), "{said}");
}

// --- Methods -----------------------------------------------------------------------------

#[tokio::test]
async fn weaker_methods_only_where_the_placement_allows_them() {
    let cluster = cluster().await;
    for (method, cause) in [
        ("md5", "the database asked for md5, which the placement's `auth` does not allow"),
        ("password", "the database asked for a password in clear, which"),
    ] {
        for tls in ["mode = \"disable\"", "mode = \"require\", channel_binding = \"prefer\""] {
            let placement = tcp("127.0.0.1", cluster.port, tls);
            let proxy = cluster.proxy(method, &placement).await;
            let said = refused(&proxy, "58000").await;
            assert!(said.contains(cause), "{said}");

            let others = format!("{placement}auth = [\"scram-sha-256\"]\n");
            let proxy = cluster.proxy(method, &others).await;
            refused(&proxy, "58000").await;

            let allowed = format!("{placement}auth = [\"scram-sha-256\", \"{method}\"]\n");
            let proxy = cluster.proxy(method, &allowed).await;
            let client = accepted(&proxy).await;
            let row =
                client.query_one("SELECT current_database()::text", &[]).await.expect("a row");
            assert_eq!(row.get::<_, String>(0), format!("tenant_{method}"));
        }
    }
}

#[tokio::test]
async fn a_server_that_trusts_everybody_is_refused() {
    let cluster = cluster().await;
    let all = METHODS.map(|method| if method == "scram" { "scram-sha-256" } else { method });
    let auth = format!("auth = {:?}\n", &all[..3]);
    for auth in ["", &auth] {
        let placement = tcp("127.0.0.1", cluster.port, "mode = \"disable\"") + auth;
        let proxy = cluster.proxy("trust", &placement).await;
        let said = refused(&proxy, "58000").await;
        assert!(said.contains("pg_hba.conf says trust"), "{said}");
    }
}

#[tokio::test]
async fn a_server_that_takes_tls_only_is_not_reached_in_clear() {
    let cluster = cluster().await;
    let placement = tcp("127.0.0.1", cluster.port, "mode = \"disable\"");
    let proxy = cluster.proxy("scram", &placement).await;
    let said = refused(&proxy, "58000").await;
    assert!(said.contains("no encryption"), "{said}");
}

#[tokio::test]
async fn a_placement_on_a_unix_socket() {
    let cluster = cluster().await;
    let placement = format!("socket = \"{}\"\n", cluster.socket().display());
    let proxy = cluster.proxy("scram", &placement).await;
    let client = accepted(&proxy).await;
    let row = client.query_one("SELECT inet_server_addr() IS NULL", &[]).await.expect("a row");
    assert!(row.get::<_, bool>(0));
    cancels(cluster, &client).await;
}

#[tokio::test]
async fn postgresql_15_is_a_backend_like_any_other() {
    let certificate = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256).certify("localhost");
    let cluster = Cluster::start(&var("PGSILO_POSTGRES_15"), certificate).await;
    let tls = format!("ca = \"{}\"", cluster.ca().display());
    let proxy = cluster.proxy("scram", &tcp("localhost", cluster.port, &tls)).await;
    let client = accepted(&proxy).await;
    let row = client.query_one("SHOW server_version", &[]).await.expect("a row");
    assert!(row.get::<_, &str>(0).starts_with("15."));
    cancels(&cluster, &client).await;
    drop((client, proxy));
}

/// Under 16.5 a session does not begin as the role that is set for its leased one.
#[tokio::test]
async fn a_postgresql_that_is_too_old_is_refused_with_what_is_needed() {
    let certificate = Authority::new(&rcgen::PKCS_ECDSA_P256_SHA256).certify("localhost");
    let cluster = Cluster::start(&var("PGSILO_POSTGRES_16_5"), certificate).await;
    let tls = format!("ca = \"{}\"", cluster.ca().display());
    let proxy = cluster.proxy("scram", &tcp("localhost", cluster.port, &tls)).await;
    let said = refused(&proxy, "58000").await;
    assert!(said.contains("PostgreSQL 16.5") && said.contains("16.6 is needed"), "{said}");
}

// --- The count of SCRAM's iterations -----------------------------------------------------

/// A server whose SCRAM asks for so many iterations; it accepts no login, and fails the one
/// where it gets an answer.
async fn asks_for_iterations(count: &'static str) -> std::net::SocketAddr {
    fake::serves(move |mut tcp| async move {
        let length = tcp.read_u32().await.expect("a length");
        let mut startup = vec![0; length as usize - 4];
        tcp.read_exact(&mut startup).await.expect("a startup packet");
        let offer = tagged(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
        tcp.write_all(&offer).await.expect("sent");
        let mut first = [0; 1024];
        let n = tcp.read(&mut first).await.expect("a first message");
        let text = String::from_utf8_lossy(&first[..n]).into_owned();
        let (_, nonce) = text.split_once("r=").expect("a nonce");
        let challenge = format!("r={nonce}server,s=c2FsdHNhbHQ=,i={count}");
        let challenge = [&[0, 0, 0, 11][..], challenge.as_bytes()].concat();
        tcp.write_all(&tagged(b'R', &challenge)).await.expect("sent");
        let mut proof = [0; 1024];
        if let Ok(1..) = tcp.read(&mut proof).await {
            let error = tagged(b'E', b"SFATAL\0C28P01\0Mgot an answer\0\0");
            tcp.write_all(&error).await.expect("sent");
        }
    })
    .await
}

#[tokio::test]
async fn a_server_that_asks_for_too_many_iterations() {
    for (count, cause) in [
        ("100001", "asked for 100001 SCRAM iterations"),
        ("4294967295", "asked for 4294967295 SCRAM iterations"),
        ("99999999999", "without iterations"),
        ("100000", "got an answer"),
    ] {
        let address = asks_for_iterations(count).await;
        let placement = tcp("127.0.0.1", address.port(), "mode = \"disable\"");
        let proxy = cluster().await.proxy("scram", &placement).await;
        let said = refused(&proxy, "58000").await;
        assert!(said.contains(cause), "{said}");
    }
}
