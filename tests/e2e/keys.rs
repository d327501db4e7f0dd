//! Issuers' keys that change while pgsilo runs: a new one works from its first token on, an old
//! one no longer than it should, and a wrong answer changes nothing.

use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::issuer::{CONFIGURATION, Issuer, JWKS, Wrong};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, folder};
use pgsilo_sandbox::testing::raw::{Message, Raw, startup};
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::json;

async fn with(issuers: String) -> Proxy {
    Proxy::with(Settings { issuers, ..Settings::default() }).await
}

/// Logs in and asks something.
async fn session(proxy: &Proxy, token: &str) -> Raw {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(token, "acme").await;
    assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    client
}

async fn refused(proxy: &Proxy, token: &str) -> Message {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    client.send_password(token).await;
    client.fatal().await
}

fn fetches(issuer: &Issuer, result: &str) -> String {
    format!("pgsilo_keys_fetches_total{{issuer=\"{}\",result=\"{result}\"}}", issuer.name())
}

/// Waits for fetches that began from now on.
async fn fetched(proxy: &Proxy, issuer: &Issuer, result: &str, more: f64) {
    let name = fetches(issuer, result);
    let now = proxy.metric(&name).await;
    proxy.metric_reaches(&name, now + more).await;
}

/// The first token of a new key is taken: `refresh` is five minutes, so because it asked.
async fn rotates(proxy: &Proxy, issuer: &mut Issuer, published: impl Fn(&Issuer)) {
    let _old = session(proxy, &issuer.token("old")).await;
    issuer.publish("new");
    published(issuer);
    let began = Instant::now();
    let _new = session(proxy, &issuer.token("new")).await;
    println!("the first token of a new key took {:?} to a query's answer", began.elapsed());
    let _old = session(proxy, &issuer.token("old")).await;
    assert_eq!(proxy.events("refused").len(), 0);
}

#[tokio::test]
async fn a_new_key_at_an_address_works_from_its_first_token_on() {
    let mut issuer = Issuer::start().await;
    issuer.publish("old");
    let proxy = with(issuer.with_jwks_url("")).await;
    rotates(&proxy, &mut issuer, |_| {}).await;
    assert_eq!(issuer.asked(JWKS), 2, "at the start, and for the new key");
    assert_eq!(proxy.metric(&fetches(&issuer, "ok")).await, 2.0);
    let age = format!("pgsilo_keys_age_seconds{{issuer=\"{}\"}}", issuer.name());
    assert!(proxy.metric(&age).await < 30.0);
}

/// An application that was forgotten shows tokens of a key that was withdrawn, on and on.
#[tokio::test]
async fn a_new_key_works_although_the_last_refresh_was_for_another() {
    let mut issuer = Issuer::start().await;
    issuer.publish("old");
    let proxy = with(issuer.with_jwks_url("")).await;
    assert_eq!(refused(&proxy, &issuer.forged("withdrawn")).await.sqlstate(), "28P01");
    issuer.publish("new");
    let (withdrawn, new) = (issuer.forged("withdrawn"), issuer.token("new"));
    let began = Instant::now();
    let (straggler, _new) = tokio::join!(refused(&proxy, &withdrawn), session(&proxy, &new));
    println!("a new key's first token behind a straggler's took {:?}", began.elapsed());
    assert_eq!(straggler.sqlstate(), "28P01", "its key was looked for again, too");
    assert_eq!(issuer.asked(JWKS), 3, "at the start, and twice for unknown keys");
}

#[tokio::test]
async fn a_new_key_of_a_discovered_issuer_works_from_its_first_token_on() {
    let mut issuer = Issuer::start().await;
    issuer.publish("old");
    let proxy = with(issuer.with_discovery("")).await;
    rotates(&proxy, &mut issuer, |_| {}).await;
    assert_eq!((issuer.asked(CONFIGURATION), issuer.asked(JWKS)), (2, 2));
}

#[tokio::test]
async fn a_new_key_in_a_file_works_from_its_first_token_on() {
    let mut issuer = Issuer::start().await;
    issuer.publish("old");
    let file = folder().join("jwks.json");
    issuer.write(&file);
    let proxy = with(issuer.with_file(&file)).await;
    rotates(&proxy, &mut issuer, |issuer| issuer.write(&file)).await;
    assert_eq!(issuer.asked(JWKS), 0);
    let reloads =
        |result| format!("pgsilo_file_reloads_total{{file=\"keys\",result=\"{result}\"}}");
    assert_eq!(proxy.metric(&reloads("ok")).await, 1.0);

    // What is not valid is said, and changes nothing.
    let new = file.with_extension("new");
    std::fs::write(&new, "{\"keys\":[]}").expect("written");
    std::fs::rename(&new, &file).expect("renamed, so that it is never read half");
    proxy.metric_reaches(&reloads("error"), 1.0).await;
    let said = proxy.logged(|line| line["file"] == "keys" && line["level"] == "ERROR").await;
    assert!(said["error"].as_str().expect("an error").ends_with("the set is empty"), "{said}");
    let _still = session(&proxy, &issuer.token("new")).await;
    // A key that is gone is gone within a moment, without a token that asks for another.
    issuer.withdraw("old");
    issuer.write(&file);
    proxy.metric_reaches(&reloads("ok"), 2.0).await;
    assert_eq!(refused(&proxy, &issuer.token("old")).await.sqlstate(), "28P01");
    std::fs::remove_dir_all(file.parent().expect("a folder")).expect("removed");
}

#[tokio::test]
async fn a_key_that_is_withdrawn_is_refused_after_the_refresh_and_ends_no_session() {
    let mut issuer = Issuer::start().await;
    issuer.publish("old");
    issuer.publish("new");
    let proxy = with(issuer.with_discovery("refresh = \"1s\"")).await;
    let mut running = session(&proxy, &issuer.token("old")).await;
    issuer.withdraw("old");
    fetched(&proxy, &issuer, "ok", 2.0).await;
    let message = refused(&proxy, &issuer.token("old")).await;
    assert_eq!(message.sqlstate(), "28P01");
    assert_eq!(message.field(b'M').as_deref(), Some("session token authentication failed"));
    let _new = session(&proxy, &issuer.token("new")).await;
    assert_eq!(running.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn an_issuer_that_is_down_costs_no_login_until_max_stale_and_none_after_it_is_back() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    let proxy = with(issuer.with_jwks_url("refresh = \"1s\"\nmax_stale = \"8s\"")).await;
    let mut running = session(&proxy, &issuer.token("a")).await;
    issuer.stop().await;
    // More than `refresh` after the last good one.
    fetched(&proxy, &issuer, "error", 2.0).await;
    let _meanwhile = session(&proxy, &issuer.token("a")).await;
    let said = proxy.logged(|line| line["age_seconds"].is_u64()).await;
    assert_eq!(said["level"], "ERROR");
    assert_eq!(said["issuer"], issuer.name());

    eventually("the keys to be too old", async || {
        let (status, why) = proxy.get("/readyz").await;
        (status == 503).then(|| assert_eq!(why, "no issuer's keys are usable\n"))
    })
    .await;
    let message = refused(&proxy, &issuer.token("a")).await;
    assert_eq!(message.sqlstate(), "57P03");
    assert_eq!(
        message.field(b'M').as_deref(),
        Some("session tokens cannot be verified at the moment")
    );
    // Whatever the token is worth.
    assert_eq!(refused(&proxy, &issuer.forged("none")).await.sqlstate(), "57P03");
    assert_eq!(running.ask("SELECT 'alive'").await, "alive");

    issuer.start_again().await;
    eventually("keys again", async || (proxy.get("/readyz").await.0 == 200).then_some(())).await;
    let said = proxy.logged(|line| line["failed_seconds"].is_u64()).await;
    assert_eq!((&said["level"], &said["issuer"]), (&"INFO".into(), &issuer.name().into()));
    assert_eq!(said["message"], "an issuer's keys can be fetched again");
    let _again = session(&proxy, &issuer.token("a")).await;
}

#[tokio::test]
async fn pgsilo_starts_without_its_issuer_and_one_issuers_keys_are_enough_to_be_ready() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    issuer.stop().await;
    let file = folder().join("jwks.json");
    let mut other = Issuer::start().await;
    other.publish("a");
    other.write(&file);
    let issuers = issuer.with_discovery("refresh = \"1s\"") + &other.with_file(&file);
    let proxy = with(issuers).await;
    let _others = session(&proxy, &other.token("a")).await;
    assert_eq!(refused(&proxy, &issuer.token("a")).await.sqlstate(), "57P03");
    issuer.start_again().await;
    proxy.metric_reaches(&fetches(&issuer, "ok"), 1.0).await;
    let _own = session(&proxy, &issuer.token("a")).await;
    std::fs::remove_dir_all(file.parent().expect("a folder")).expect("removed");
}

#[tokio::test]
async fn two_hundred_tokens_with_unknown_keys_make_a_fetch_in_five_seconds() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    let proxy = with(issuer.with_jwks_url("")).await;
    let before = issuer.asked(JWKS);
    let began = Instant::now();
    let mut logins = tokio::task::JoinSet::new();
    for number in 0..200 {
        let (socket, token) = (proxy.socket(), issuer.forged(&format!("random-{number}")));
        logins.spawn(async move {
            let mut client = Raw::unix(&socket).await;
            client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
            client.send_password(&token).await;
            client.fatal().await.sqlstate()
        });
    }
    let answers = logins.join_all().await;
    let took = began.elapsed();
    assert!(answers.iter().all(|sqlstate| sqlstate == "28P01"), "{answers:?}");
    let fetches = issuer.asked(JWKS) - before;
    println!("200 tokens with unknown keys: {fetches} fetches, {took:?}");
    // One at once, and another for those that came while it was made, when it may be.
    let most = 1 + usize::try_from(took.as_secs() / 5).expect("a few");
    assert!((1..=most).contains(&fetches), "{fetches} fetches in {took:?}");
    // A client with a good key does not wait.
    let _good = session(&proxy, &issuer.token("a")).await;
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_holds_a_login_no_longer_than_a_fetch() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    let proxy = with(issuer.with_discovery("")).await;
    issuer.answer(&[(JWKS, Wrong::Silence)]);
    let began = Instant::now();
    let message = refused(&proxy, &issuer.forged("random")).await;
    let took = began.elapsed();
    // By its token, not by the deadline of 10 s; and it is unknown whether there is such a key.
    assert_eq!(message.sqlstate(), "57P03");
    assert!(took > Duration::from_millis(4500), "{took:?}");
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "keys_unavailable");
    // The next one does not even wait.
    let began = Instant::now();
    assert_eq!(refused(&proxy, &issuer.forged("random")).await.sqlstate(), "57P03");
    assert!(began.elapsed() < took);
    // Who names no key, or one that is there and has not signed it, is told what is always told.
    let mut bent = issuer.token("a");
    bent.replace_range(bent.len() - 20..bent.len() - 16, "AAAA");
    assert_eq!(refused(&proxy, &bent).await.sqlstate(), "28P01");
    let _good = session(&proxy, &issuer.token("a")).await;
}

/// What an issuer, or somebody in its place, may answer: what pgsilo says of it.
fn wrong_answers(issuer: &Issuer, other: &Issuer) -> Vec<(&'static str, Wrong, &'static str)> {
    let elsewhere = "it redirects to another host, port or scheme, or more than 3 times";
    let configuration = |name: &str, jwks_uri: &str| {
        Wrong::Body(json!({ "issuer": name, "jwks_uri": jwks_uri }).to_string())
    };
    let mut private = issuer.jwks();
    private["keys"][0]["d"] = "c2VjcmV0".into();
    let mut twice = issuer.jwks();
    let again = twice["keys"][0].clone();
    twice["keys"].as_array_mut().expect("keys").push(again);
    let symmetric = json!({ "keys": [{ "kty": "oct", "k": "c2VjcmV0", "kid": "a" }] });
    let port = other.name();
    vec![
        (JWKS, Wrong::Redirect(format!("{port}{JWKS}")), elsewhere),
        (JWKS, Wrong::Redirect("https://issuer.invalid/jwks".into()), elsewhere),
        (JWKS, Wrong::Redirect(issuer.name().replace("https:", "http:") + JWKS), elsewhere),
        (JWKS, Wrong::Redirect(JWKS.into()), elsewhere),
        (CONFIGURATION, Wrong::Redirect(format!("{port}{CONFIGURATION}")), elsewhere),
        (JWKS, Wrong::Body("x".repeat(300 * 1024)), "its answer is longer than 256 KiB"),
        (JWKS, Wrong::Status(404), "it answered 404, not 200"),
        (
            JWKS,
            configuration(&issuer.name(), &format!("{}{JWKS}", issuer.name())),
            "this is an OpenID configuration, not a key set; use the address in its `jwks_uri`",
        ),
        (JWKS, Wrong::Status(204), "it answered 204, not 200"),
        (JWKS, Wrong::Silence, "it did not answer within 5 s"),
        (
            CONFIGURATION,
            configuration(&port, &format!("{port}{JWKS}")),
            "its OpenID configuration is that of another issuer",
        ),
        (
            CONFIGURATION,
            configuration(&format!("{}/", issuer.name()), &format!("{}{JWKS}", issuer.name())),
            "its OpenID configuration is that of another issuer",
        ),
        (
            CONFIGURATION,
            Wrong::Body("{}".into()),
            "its OpenID configuration is not a JSON object with an `issuer`",
        ),
        (
            CONFIGURATION,
            configuration(&issuer.name(), "http://keys.invalid/jwks"),
            "its OpenID configuration has no jwks_uri that keys may be fetched from: http to \"keys.invalid\" would let the network choose the keys; use https",
        ),
        (
            CONFIGURATION,
            configuration(&issuer.name(), &issuer.name().replace("https:", "http:")),
            "its OpenID configuration has no jwks_uri that keys may be fetched from: http to \"127.0.0.1\" would let the network choose the keys; use https",
        ),
        (
            JWKS,
            Wrong::Body(private.to_string()),
            "key 0 contains a private key; keep it secret and list only the public part",
        ),
        (JWKS, Wrong::Body(twice.to_string()), "two keys have the kid \"a\"; a kid must be unique"),
        (
            JWKS,
            Wrong::Body(symmetric.to_string()),
            "no usable key in it; key 0 (kid \"a\") is passed over: unsupported \"kty\" \"oct\"",
        ),
        (
            JWKS,
            Wrong::Body("<html>".into()),
            "not a JSON Web Key Set: expected value at line 1 column 1",
        ),
    ]
}

#[tokio::test]
async fn wrong_answers_are_logged_as_errors_and_previous_keys_stay() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    let mut other = Issuer::start().await;
    other.publish("a");
    let proxy = with(issuer.with_discovery("refresh = \"1s\"")).await;
    for (path, wrong, expected) in wrong_answers(&issuer, &other) {
        let said = count(&proxy, expected);
        issuer.answer(&[(path, wrong.clone())]);
        eventually(expected, async || (count(&proxy, expected) > said).then_some(())).await;
        let line = proxy.logged(|line| line["error"] == expected).await;
        assert_eq!((&line["level"], &line["issuer"]), (&"ERROR".into(), &issuer.name().into()));
        let _old = session(&proxy, &issuer.token("a")).await;
        issuer.answer(&[]);
        fetched(&proxy, &issuer, "ok", 1.0).await;
    }
    assert_eq!((other.asked(JWKS), other.asked(CONFIGURATION)), (0, 0), "nothing was sent there");
    assert!(proxy.metric(&fetches(&issuer, "error")).await >= 19.0);
    let log = serde_json::Value::from(proxy.lines()).to_string();
    assert!(!log.contains("c2VjcmV0"), "a body was logged");
}

fn count(proxy: &Proxy, error: &str) -> usize {
    proxy.lines().iter().filter(|line| line["error"] == error).count()
}

#[tokio::test]
async fn a_redirect_that_stays_at_the_issuer_is_followed() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    issuer.answer(&[("/moved", Wrong::Redirect(format!("{}{JWKS}", issuer.name())))]);
    let table = issuer.with_jwks_url("").replace(JWKS, "/moved");
    let proxy = with(table).await;
    let _in = session(&proxy, &issuer.token("a")).await;
    assert_eq!((issuer.asked("/moved"), issuer.asked(JWKS)), (1, 1));
}

#[tokio::test]
async fn an_issuer_with_a_certificate_of_somebody_else_is_not_believed() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    // The system's roots do not have the sandbox's.
    let table = issuer.with_jwks_url("").replace("ca = \"ca.crt\"\n", "");
    let proxy = Proxy::unready(Settings { issuers: table, ..Settings::default() }).await;
    proxy.metric_reaches(&fetches(&issuer, "error"), 1.0).await;
    assert_eq!(proxy.get("/readyz").await.0, 503);
    assert_eq!(refused(&proxy, &issuer.token("a")).await.sqlstate(), "57P03");
    assert_eq!(issuer.asked(JWKS), 0);
}

/// The reason is in the audit trail, and not in any answer.
#[tokio::test]
async fn the_cause_says_what_was_found_and_the_client_reads_nothing_of_it() {
    let mut issuer = Issuer::start().await;
    issuer.publish("a");
    let file = folder().join("jwks.json");
    issuer.write(&file);
    let proxy = with(issuer.with_file(&file)).await;
    let name = issuer.name();
    for (token, cause) in [
        (
            issuer.forged("\u{202e}b"),
            "unknown key: found \"\u{202e}b\", expected \"a\"".to_owned(),
        ),
        (
            mint::token("acme"),
            format!("unknown issuer: found \"https://issuer.sandbox.invalid\", expected \"{name}\""),
        ),
        (
            "s3cret-of-another-database".to_owned(),
            "malformed token: no JWT: an opaque access token? ask its issuer for one with an audience"
                .to_owned(),
        ),
    ] {
        let message = refused(&proxy, &token).await;
        assert_eq!(message.sqlstate(), "28P01");
        assert_eq!(message.field(b'M').as_deref(), Some("session token authentication failed"));
        let session = message.field(b'D').expect("a DETAIL");
        let event = proxy
            .event("refused", |event| session.contains(event["session"].as_str().unwrap_or("none")))
            .await;
        assert_eq!((&event["cause"], session.len()), (&cause.into(), "Session 0123456789abcdef.".len()));
    }
    let log = serde_json::Value::from(proxy.lines()).to_string();
    assert!(!log.contains("s3cret"), "a password was logged");
    std::fs::remove_dir_all(file.parent().expect("a folder")).expect("removed");
}

#[tokio::test]
async fn an_access_map_decides_what_a_claim_means() {
    let issuers = "[[issuer]]\nissuer = \"https://issuer.sandbox.invalid\"\naudience = [\"pgsilo\"]\n\
        algorithms = [\"ES256\"]\njwks = \"jwks.json\"\n\
        default_access = \"refuse\"\naccess_values = { admin = \"read-write\", viewer = \"read-only\" }\n";
    let proxy = with(issuers.to_owned()).await;
    let token = |access: &str| mint::token_with("acme", json!({ "access": access }));
    let mut viewer = session(&proxy, &token("viewer")).await;
    let mut admin = session(&proxy, &token("admin")).await;
    let role = "SELECT current_user";
    assert_eq!(viewer.ask(role).await, "tenant_acme_ro");
    assert_eq!(admin.ask(role).await, "tenant_acme_app");
    // A level's own name is no claim of this issuer's.
    assert_eq!(refused(&proxy, &token("read-write")).await.sqlstate(), "28000");
}
