//! The opening of a connection, byte by byte: protocol versions, requests for encryption,
//! cancel requests, passwords. Advisories are named where a proxy once got it wrong.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, TLS, UNIX};
use pgsilo_sandbox::testing::raw::{
    Message, Raw, gssenc_request, packet, password, ssl_request, startup, startup_of, tagged,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

async fn plain() -> Proxy {
    Proxy::with(Settings { listeners: PLAIN.to_owned() + UNIX, ..Settings::default() }).await
}

/// An AuthenticationCleartextPassword.
fn asks_password(message: &Message) -> bool {
    (message.tag, message.body.as_slice()) == (b'R', &[0, 0, 0, 3])
}

#[tokio::test]
async fn a_probe_that_sends_nothing_leaves_no_trace_in_the_log() {
    let proxy = Proxy::start().await;
    let before = proxy.lines().iter().filter(|line| line["level"] != "DEBUG").count();
    drop(Raw::tcp(proxy.address()).await);
    drop(Raw::unix(&proxy.socket()).await);
    proxy.metric_reaches("pgsilo_abandoned_total", 2.0).await;
    let after = proxy.lines().iter().filter(|line| line["level"] != "DEBUG").count();
    assert_eq!(before, after, "{:?}", proxy.lines());
}

#[tokio::test]
async fn impossible_lengths_are_refused_before_anything_is_allocated() {
    let proxy = plain().await;
    for length in [0u32, 1, 7, 10_005, 0x7fff_ffff, 0xffff_ffff] {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&length.to_be_bytes()).await;
        assert_eq!(client.fatal().await.sqlstate(), "08P01", "{length}");
    }
}

#[tokio::test]
async fn the_longest_startup_packet_is_taken() {
    let proxy = plain().await;
    let fixed = startup(&[("user", "app"), ("application_name", "")]).len();
    let long = "x".repeat(10_004 - fixed);
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app"), ("application_name", &long)])).await;
    assert!(asks_password(&client.message().await));
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app"), ("application_name", &(long + "x"))])).await;
    assert_eq!(client.fatal().await.sqlstate(), "08P01");
}

#[tokio::test]
async fn tls_after_an_ssl_request() {
    let proxy = Proxy::start().await;
    let mut client = Raw::tls(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    assert_eq!(proxy.event("started", |_| true).await["tls"], true);
}

#[tokio::test]
async fn direct_tls_needs_the_protocol_name() {
    let proxy = Proxy::start().await;
    let mut client = Raw::direct_tls(proxy.address(), &[b"postgresql"]).await.expect("TLS");
    // An SSLRequest inside TLS is answered with N, as PostgreSQL does.
    client.send(&ssl_request()).await;
    assert_eq!(client.byte().await, b'N');
    client.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");

    let mut without = Raw::direct_tls(proxy.address(), &[]).await.expect("TLS");
    assert_eq!(without.fatal().await.sqlstate(), "08P01");
    assert!(Raw::direct_tls(proxy.address(), &[b"http/1.1"]).await.is_err());
}

#[tokio::test]
async fn direct_tls_where_there_is_no_tls_is_a_malformed_packet() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0]).await;
    assert_eq!(client.fatal().await.sqlstate(), "08P01");
}

#[tokio::test]
async fn requests_for_encryption_are_declined_where_there_is_none() {
    let proxy = plain().await;
    for mut client in [Raw::tcp(proxy.address()).await, Raw::unix(&proxy.socket()).await] {
        client.send(&gssenc_request()).await;
        assert_eq!(client.byte().await, b'N');
        client.send(&ssl_request()).await;
        assert_eq!(client.byte().await, b'N');
        client.log_in(&mint::token("acme"), "acme").await;
        assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    }
}

#[tokio::test]
async fn gssapi_is_declined_and_tls_may_follow() {
    let proxy = Proxy::start().await;
    let mut tcp = TcpStream::connect(proxy.address()).await.expect("connected");
    for (request, answer) in [(gssenc_request(), b'N'), (ssl_request(), b'S')] {
        tcp.write_all(&request).await.expect("sent");
        assert_eq!(tokio::io::AsyncReadExt::read_u8(&mut tcp).await.expect("answered"), answer);
    }
    let mut client = Raw::handshake(tcp, &[]).await.expect("TLS");
    client.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
async fn encryption_may_be_asked_for_once_of_each_kind() {
    let proxy = plain().await;
    for request in [ssl_request(), gssenc_request()] {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&request).await;
        assert_eq!(client.byte().await, b'N');
        client.send(&request).await;
        assert_eq!(client.fatal().await.sqlstate(), "08P01");
    }
}

/// CVE-2021-3935, CVE-2021-43766: what somebody in the middle puts behind the request in clear
/// must not be read as if it had come through TLS.
#[tokio::test]
async fn bytes_behind_a_request_for_encryption_are_fatal() {
    let proxy = Proxy::start().await;
    for request in [ssl_request(), gssenc_request()] {
        let mut client = Raw::tcp(proxy.address()).await;
        let smuggled = [request, startup(&[("user", "evil"), ("database", "acme")])].concat();
        client.send(&smuggled).await;
        assert_eq!(client.fatal().await.sqlstate(), "08P01");
        proxy.event("refused", |event| event["reason"] == "startup_malformed").await;
    }
}

/// CVE-2026-107350: a second startup message must never be looked at.
#[tokio::test]
async fn a_second_startup_message_is_fatal() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    assert!(asks_password(&client.message().await));
    client.send(&startup(&[("user", "app"), ("database", "globex")])).await;
    assert_eq!(client.fatal().await.sqlstate(), "08P01");

    // After the login it is a message to the database, which refuses it by itself.
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client.send(&startup(&[("user", "app"), ("database", "globex")])).await;
    assert_eq!(client.message().await.sqlstate(), "08P01");
}

#[tokio::test]
async fn no_token_is_requested_in_clear() {
    let proxy = Proxy::start().await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    let error = client.fatal().await;
    assert_eq!(
        (error.sqlstate().as_str(), error.field(b'M').as_deref()),
        ("28000", Some("TLS is required"))
    );
}

#[tokio::test]
async fn tls_may_be_left_optional() {
    let listeners = TLS.to_owned() + "require_tls = false\n" + UNIX;
    let proxy = Proxy::with(Settings { listeners, ..Settings::default() }).await;
    for mut client in [Raw::tcp(proxy.address()).await, Raw::tls(proxy.address()).await] {
        client.log_in(&mint::token("acme"), "acme").await;
        assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    }
}

#[tokio::test]
async fn newer_minor_versions_and_extensions_are_negotiated_once() {
    let proxy = plain().await;
    let v = |version: u32, names: &[&str]| {
        let mut body = version.to_be_bytes().to_vec();
        body.extend_from_slice(&(names.len() as u32).to_be_bytes());
        names.iter().for_each(|name| body.extend_from_slice(format!("{name}\0").as_bytes()));
        Message { tag: b'v', body }
    };
    let user = ("user", "app");
    let cases = [
        (0x0003_0000, vec![user], None),
        (0x0003_0001, vec![user], Some(v(0x0003_0000, &[]))),
        (0x0003_0002, vec![user], None),
        (0x0003_0003, vec![user], Some(v(0x0003_0002, &[]))),
        (0x0003_270f, vec![user], Some(v(0x0003_0002, &[]))),
        (0x0003_0000, vec![user, ("_pq_.a", "1")], Some(v(0x0003_0000, &["_pq_.a"]))),
        (
            0x0003_0002,
            vec![("_pq_.b", "x"), user, ("_pq_.a", "1")],
            Some(v(0x0003_0002, &["_pq_.b", "_pq_.a"])),
        ),
    ];
    for (version, parameters, expected) in cases {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup_of(version, &parameters)).await;
        if let Some(expected) = expected {
            assert_eq!(client.message().await, expected, "{version:x}");
        }
        assert!(asks_password(&client.message().await), "{version:x}");
        client.send(&password(&mint::token("acme"))).await;
        let messages = client.until(b'Z').await;
        assert!(messages.iter().all(|message| message.tag != b'v'), "never from the database");
        let key = messages.iter().find(|message| message.tag == b'K').expect("a cancel key");
        let long = version >= 0x0003_0002;
        assert_eq!(key.body.len(), if long { 36 } else { 8 });
        assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    }
}

#[tokio::test]
async fn other_major_versions_and_replication_are_not_supported() {
    let proxy = plain().await;
    for code in [0x0001_0000, 0x0002_0000, 0x0004_0000, 0x1234_5678] {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup_of(code, &[("user", "app")])).await;
        assert_eq!(client.fatal().await.sqlstate(), "0A000", "{code:x}");
    }
    for value in ["true", "on", "1", "database", "yes"] {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("replication", value)])).await;
        assert_eq!(client.fatal().await.sqlstate(), "0A000", "{value}");
    }
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app"), ("replication", "off")])).await;
    assert!(asks_password(&client.message().await));
}

#[tokio::test]
async fn malformed_parameters_are_refused() {
    let proxy = plain().await;
    let bodies: [(&[u8], &str); 6] = [
        (b"user\0app", "08P01"),
        (b"user\0app\0", "08P01"),
        (b"user\0app\0\0trailing", "08P01"),
        (b"user\0app\0database", "08P01"),
        (b"database\0acme\0\0", "28000"),
        (b"user\0\0\0", "28000"),
    ];
    for (body, sqlstate) in bodies {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&packet(0x0003_0000, body)).await;
        assert_eq!(client.fatal().await.sqlstate(), sqlstate, "{body:?}");
    }
}

#[tokio::test]
async fn names_that_are_not_utf_8_are_bytes_and_are_logged_escaped() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&packet(0x0003_0000, b"user\0\xff\xfe\n{\"level\":\"x\"}\0\0")).await;
    client.send_password("").await;
    assert_eq!(client.fatal().await.sqlstate(), "28P01");
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["user"], "\u{fffd}\u{fffd}\\n{\\\"level\\\":\\\"x\\\"}");
}

#[tokio::test]
async fn other_settings_are_forwarded_as_they_are() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    let options = "-c test.words=a\\ b -c work_mem=7MB";
    let settings = [
        ("user", "app"),
        ("application_name", "näme"),
        ("options", options),
        ("datestyle", "SQL, DMY"),
    ];
    client.send(&startup(&settings)).await;
    client.send_password(&mint::token("acme")).await;
    client.until(b'Z').await;
    assert_eq!(client.ask("SHOW work_mem").await, "7MB");
    assert_eq!(client.ask("SHOW test.words").await, "a b");
    assert_eq!(client.ask("SHOW datestyle").await, "SQL, DMY");
    // PostgreSQL shows bytes beyond ASCII escaped; what matters is that they arrived.
    assert_eq!(client.ask("SHOW application_name").await, "n\\xc3\\xa4me");
}

/// Only a superuser may, none may while the server runs, or there is nothing like it: it is the
/// client's mistake, and the client reads of it. That a role may not connect at all is none of the
/// client's.
#[tokio::test]
async fn a_forbidden_startup_setting_is_reported_as_the_clients_error() {
    let proxy = plain().await;
    let settings = [
        ("log_statement", "all"),
        ("session_preload_libraries", "nothing"),
        ("role", "tenant_globex_app"),
        ("role", "nobody"),
        ("session_authorization", "postgres"),
        ("max_connections", "5"),
        ("is_superuser", "on"),
        ("work_mem", "much"),
        ("no_such_setting", "1"),
        ("client_encoding", "MULE_INTERNAL"),
    ];
    for (name, value) in settings {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), (name, value)])).await;
        client.send_password(&mint::token("acme")).await;
        let error = client.fatal().await;
        assert_eq!(error.sqlstate(), "22023", "{name}: {error:?}");
        let said = error.field(b'M').expect("a text");
        assert!(
            said.contains(name.trim_start_matches("session_")) || said.contains(value),
            "{said}"
        );
    }
    let refused = proxy.events_reach("refused", settings.len()).await;
    assert_eq!(refused.len(), settings.len());
    assert!(refused.iter().all(|event| event["reason"] == "setting_rejected"), "{refused:?}");
}

/// PostgreSQL takes it, but not with the longer names that pgsilo puts in the place of the
/// client's.
#[tokio::test]
async fn settings_that_fit_with_the_clients_names_only_cost_no_lease() {
    let proxy = plain().await;
    for length in [9_990, 10_004] {
        let short = |value: &str| startup(&[("user", "a"), ("application_name", value)]);
        let value = "x".repeat(length - short("").len());
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&short(&value)).await;
        client.send_password(&mint::token("acme")).await;
        let error = client.fatal().await;
        assert_eq!(error.sqlstate(), "22023", "{error:?}");
        assert!(error.field(b'M').expect("a text").contains("too long"), "{error:?}");
    }
    assert_eq!(proxy.events("leased").len(), 0);
}

/// Whatever the client, its role or its database has set: what pgsilo asks is asked with settings
/// of its own, and the client's are in force behind that.
#[tokio::test]
async fn the_clients_settings_do_not_keep_the_seal_from_being_read() {
    let proxy = plain().await;
    // As long as it has written and is not over, a deferrable transaction waits.
    let mut writer = Raw::tcp(proxy.address()).await;
    writer.log_in(&mint::token("acme"), "acme").await;
    writer.ask("BEGIN ISOLATION LEVEL SERIALIZABLE; CREATE TABLE of_mine (); SELECT 'wrote'").await;
    let deferrable = "-c default_transaction_isolation=serializable \
        -c default_transaction_read_only=on -c default_transaction_deferrable=on";
    let mut settings = vec![
        (deferrable, "default_transaction_deferrable", "on"),
        ("-c lock_timeout=12345", "lock_timeout", "12345ms"),
        ("-c statement_timeout=12345", "statement_timeout", "12345ms"),
    ];
    if writer.ask("SELECT current_setting('server_version_num')").await.as_str() >= "170000" {
        settings.push(("-c transaction_timeout=12345", "transaction_timeout", "12345ms"));
    }
    for (options, setting, value) in settings {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("options", options)])).await;
        client.send_password(&mint::token("acme")).await;
        client.until(b'Z').await;
        let begin = "BEGIN ISOLATION LEVEL READ COMMITTED";
        let shown = format!("{begin}; SELECT current_setting('{setting}')");
        assert_eq!(client.ask(&shown).await, value, "{options}");
    }
    // The shortest that there are.
    for _ in 0..20 {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app"), ("options", "-c statement_timeout=1")])).await;
        client.send_password(&mint::token("acme")).await;
        client.until(b'Z').await;
    }
    assert_eq!(proxy.events("refused").len(), 0);
}

#[tokio::test]
async fn a_token_of_16_kib_is_taken_and_a_longer_one_is_a_clear_refusal() {
    let proxy = plain().await;
    let claims = |filler: usize| serde_json::json!({ "filler": "x".repeat(filler) });
    let long = mint::token_with("acme", claims(11_900));
    assert!((16_000..=16_384).contains(&long.len()), "{}", long.len());
    let mut client = Raw::tcp(proxy.address()).await;
    client.log_in(&long, "acme").await;

    let longer = mint::token_with("acme", claims(30_000));
    let mut client = Raw::tcp(proxy.address()).await;
    client.send(&startup(&[("user", "app")])).await;
    client.send_password(&longer).await;
    let error = client.fatal().await;
    assert_eq!(error.sqlstate(), "28P01");
    let detail = error.field(b'D').expect("a DETAIL");
    assert!(detail.starts_with("The token is longer than this server takes."), "{detail}");
}

#[tokio::test]
async fn what_is_not_a_password_message_is_refused() {
    let proxy = plain().await;
    let token = mint::token("acme");
    let not_passwords = [
        tagged(b'Q', b"SELECT 1\0"),
        tagged(b'p', token.as_bytes()),
        tagged(b'p', format!("{token}\0{token}\0").as_bytes()),
        tagged(b'p', b""),
        vec![b'p', 0, 0, 0, 0],
        vec![b'p', 0xff, 0xff, 0xff, 0xff],
    ];
    for bytes in not_passwords {
        let mut client = Raw::tcp(proxy.address()).await;
        client.send(&startup(&[("user", "app")])).await;
        assert!(asks_password(&client.message().await));
        client.send_anyway(&bytes).await;
        let sqlstate = client.fatal().await.sqlstate();
        assert!(["08P01", "28P01"].contains(&sqlstate.as_str()), "{sqlstate}: {bytes:?}");
    }
}

#[tokio::test]
async fn what_is_pipelined_behind_the_password_is_kept() {
    let proxy = plain().await;
    let mut client = Raw::tcp(proxy.address()).await;
    let all = [
        startup(&[("user", "app"), ("database", "acme")]),
        password(&mint::token("acme")),
        tagged(b'Q', b"SELECT 'first'\0"),
        tagged(b'Q', b"SELECT 'second'\0"),
    ]
    .concat();
    client.send(&all).await;
    let login = client.until(b'Z').await;
    assert!(asks_password(&login[0]));
    for word in ["first", "second"] {
        let answer = client.until(b'Z').await;
        assert_eq!(&answer[1].body[6..], word.as_bytes());
    }
}

#[tokio::test]
async fn authentication_is_not_confirmed_before_the_database_is_ready() {
    // Nothing is heard of a database that is silent, so nothing may be said either.
    let silent = pgsilo_sandbox::testing::fake::silent().await;
    let limits = "login_timeout = \"1s\"\n".to_owned();
    let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
    proxy.place_acme_at(silent.port(), "").await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    client.send_password(&mint::token("acme")).await;
    assert_eq!(client.fatal().await.sqlstate(), "57014");
}
