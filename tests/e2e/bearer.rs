//! SASL OAUTHBEARER (RFC 7628), byte by byte as PostgreSQL 18 speaks it.

use pgsilo_sandbox::testing::driver::{output, python};
use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, TLS};
use pgsilo_sandbox::testing::raw::{Raw, startup, startup_of, tagged};
use serde_json::{Value, json};

const AUTH: &str = "auth = { oauthbearer = { issuer = \"https://issuer.sandbox.invalid\", scope = \"openid\" } }\n";

async fn proxy() -> Proxy {
    let socket = "[[listener]]\nsocket = \"{dir}/.s.PGSQL.6432\"\n";
    let listeners = format!("{TLS}{AUTH}{socket}{AUTH}");
    Proxy::with(Settings { listeners, ..Settings::default() }).await
}

/// Begins, and is offered the one mechanism.
async fn begin(proxy: &Proxy) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    let offered = client.message().await;
    assert_eq!((offered.tag, &offered.body[..]), (b'R', &b"\0\0\0\x0aOAUTHBEARER\0\0"[..]));
    client
}

/// SASLInitialResponse.
fn initial(mechanism: &str, response: &[u8]) -> Vec<u8> {
    let length = (response.len() as u32).to_be_bytes();
    tagged(b'p', &[mechanism.as_bytes(), &[0], &length, response].concat())
}

fn bearer(token: &str) -> Vec<u8> {
    initial("OAUTHBEARER", format!("n,,\x01auth=Bearer {token}\x01\x01").as_bytes())
}

/// What a client without a good token is told.
async fn challenge(client: &mut Raw) -> Value {
    let message = client.message().await;
    assert_eq!((message.tag, &message.body[..4]), (b'R', &[0, 0, 0, 11][..]), "{message:?}");
    serde_json::from_slice(&message.body[4..]).expect("JSON")
}

#[tokio::test]
async fn a_bearer_token_is_all_that_is_needed() {
    let proxy = proxy().await;
    let mut client = begin(&proxy).await;
    client.send(&bearer(&mint::token("acme"))).await;
    // There is no SASLFinal: the next message lets it in.
    assert_eq!(client.message().await.body, [0; 4]);
    client.until(b'Z').await;
    assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    let started = proxy.event("started", |_| true).await;
    assert_eq!(started["subject"], "tester");

    // What a client sends behind its response waits for the session.
    let mut client = begin(&proxy).await;
    let all = [bearer(&mint::token("acme")), pgsilo_sandbox::testing::raw::query("SELECT 'early'")]
        .concat();
    client.send(&all).await;
    let messages = client.until(b'D').await;
    assert!(messages.last().expect("a row").body.ends_with(b"early"));

    // A client that waits to be asked is asked.
    let mut client = begin(&proxy).await;
    client.send(&tagged(b'p', b"OAUTHBEARER\0\xff\xff\xff\xff")).await;
    assert_eq!(client.message().await.body, [0, 0, 0, 11]);
    let said = format!("n,,\x01host=h\x01port=1\x01auth=Bearer {}\x01\x01", mint::token("acme"));
    client.send(&tagged(b'p', said.as_bytes())).await;
    client.until(b'Z').await;
}

#[tokio::test]
async fn a_client_without_a_valid_token_is_told_the_issuer_and_refused() {
    let proxy = proxy().await;
    let expired =
        json!({ "exp": mint::now() - 3600, "nbf": mint::now() - 7200, "iat": mint::now() - 7200 });
    for (response, reason) in [
        // A question, as libpq asks it.
        (initial("OAUTHBEARER", b"n,,\x01auth=\x01\x01"), "token_missing"),
        (bearer("not-a-token"), "token_invalid"),
        (bearer(&mint::token_with("acme", expired)), "token_expired"),
        (initial("OAUTHBEARER", b"n,,\x01auth=Basic YTpi\x01\x01"), "token_missing"),
    ] {
        let mut client = begin(&proxy).await;
        client.send(&response).await;
        let told = challenge(&mut client).await;
        let document = "https://issuer.sandbox.invalid/.well-known/openid-configuration";
        assert_eq!(
            told,
            json!({ "status": "invalid_token", "openid-configuration": document, "scope": "openid" })
        );
        client.send(&tagged(b'p', b"\x01")).await;
        assert_eq!(client.fatal().await.sqlstate(), "28P01");
        proxy.event("refused", |event| event["reason"] == reason).await;
    }
    // A good token that leads elsewhere is no matter of the mechanism.
    let mut client = begin(&proxy).await;
    client.send(&bearer(&mint::token("globex"))).await;
    assert_eq!(client.fatal().await.sqlstate(), "3D000");
}

#[tokio::test]
async fn protocol_violations_of_sasl_are_refused_as_postgresql_does() {
    let proxy = proxy().await;
    let token = mint::token("acme");
    for response in [
        initial("SCRAM-SHA-256", b"n,,n=,r=x"),
        initial("OAUTHBEARER", b""),
        initial("OAUTHBEARER", format!("p=x,,\x01auth=Bearer {token}\x01\x01").as_bytes()),
        initial("OAUTHBEARER", format!("n,a=root,\x01auth=Bearer {token}\x01\x01").as_bytes()),
        initial("OAUTHBEARER", format!("n,,\x01auth=Bearer {token}\x01").as_bytes()),
        initial("OAUTHBEARER", format!("n,,\x01auth=Bearer {token}\x01\x01\x01").as_bytes()),
        initial("OAUTHBEARER", b"n,,\x01host=h\x01\x01"),
        tagged(b'p', b"OAUTHBEARER\0\0\0\0\x09short"),
        tagged(b'p', b"OAUTHBEARER"),
        tagged(b'p', b""),
        tagged(b'Q', b"SELECT 1\0"),
    ] {
        let mut client = begin(&proxy).await;
        client.send(&response).await;
        assert_eq!(client.fatal().await.sqlstate(), "08P01", "{response:?}");
    }
    // However an error is answered, it is the token that was refused.
    for answer in [&b""[..], b"\x01\x01", b"n,,\x01auth=Bearer x\x01\x01"] {
        let mut client = begin(&proxy).await;
        client.send(&bearer("not-a-token")).await;
        challenge(&mut client).await;
        client.send(&tagged(b'p', answer)).await;
        assert_eq!(client.fatal().await.sqlstate(), "28P01", "{answer:?}");
    }
    assert_eq!(proxy.events("started").len(), 0);
}

#[tokio::test]
async fn a_refused_token_is_audited_though_the_client_does_not_stay_to_hear_of_it() {
    let proxy = proxy().await;
    let mut gone = begin(&proxy).await;
    gone.send(&bearer("not-a-token")).await;
    drop(gone);
    proxy.event("refused", |event| event["reason"] == "token_invalid").await;
    let mut silent = begin(&proxy).await;
    silent.send(&bearer("another")).await;
    challenge(&mut silent).await;
    assert_eq!(silent.fatal().await.sqlstate(), "28P01");
    proxy.metric_reaches("pgsilo_refusals_total{reason=\"token_invalid\"}", 2.0).await;
}

#[tokio::test]
async fn a_newer_client_is_told_the_version_first() {
    let proxy = proxy().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup_of(0x0003_270f, &[("user", "app"), ("database", "acme")])).await;
    assert_eq!(client.message().await.tag, b'v');
    assert_eq!(client.message().await.tag, b'R');
    client.send(&bearer(&mint::token("acme"))).await;
    client.until(b'Z').await;
}

/// libpq 18 itself, with the hook that applications use to hand it a token.
#[tokio::test]
async fn libpq_logs_in_with_a_token_from_its_hook() {
    let proxy = proxy().await;
    let mut command = python("libpq_bearer.py");
    command.env("PGSILO_TOKEN", mint::token("acme"));
    command.env(
        "PGSILO_CONNINFO",
        format!(
            "host=127.0.0.1 port={} user=app dbname=acme sslmode=verify-full sslrootcert={} \
         oauth_issuer=https://issuer.sandbox.invalid oauth_client_id=app require_auth=oauth",
            proxy.address().port(),
            proxy.dir().join("ca.crt").display()
        ),
    );
    let output = output(&mut command).await;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert_eq!(said.trim(), "tenant_acme", "{errors}");
}
