//! Client certificates: as who a session is, and as what a token is bound to.

use std::fs;

use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::support::authority::{Authority, Pair};
use crate::support::proxy::{Proxy, Settings};
use crate::support::raw::{Raw, query, startup};
use crate::support::{eventually, mint};

const BILLING: &str = "spiffe://example.org/ns/app/sa/billing";
const REPORTS: &str = "spiffe://example.org/ns/app/sa/reports";

const ASKS: &str = "[[listener]]\naddress = \"127.0.0.1:0\"\n\
    tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients.crt\" }\n";

/// A listener that asks for certificates, with more keys of its table.
async fn asking(authority: &Authority, more: &str, tenants: fn(&str) -> String) -> Proxy {
    let files = vec![("clients.crt", authority.pem())];
    let listeners = format!("{ASKS}{more}");
    Proxy::with(Settings { listeners, files, tenants, ..Settings::default() }).await
}

/// By its certificate alone: no password is asked for.
pub(crate) async fn by_certificate() -> (Proxy, Authority) {
    let authority = Authority::new();
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\n\
             access = \"read-write\"\n[[binding]]\ncertificate = \"{REPORTS}\"\n\
             tenant = \"globex\"\naccess = \"read-only\"\n"
        )
    };
    let proxy = asking(&authority, "auth = \"certificate\"\n", bound).await;
    (proxy, authority)
}

pub(crate) async fn connect(proxy: &Proxy, own: &Pair, dbname: &str) -> Raw {
    let mut client = Raw::certified(proxy.address(), own).await.expect("TLS");
    client.send_anyway(&startup(&[("user", "app"), ("database", dbname)])).await;
    client
}

#[tokio::test]
async fn a_certificate_leads_to_the_tenant_that_it_is_bound_to_and_to_no_other() {
    let (proxy, authority) = by_certificate().await;
    for (uri, tenant, role) in [(BILLING, "acme", "rw"), (REPORTS, "globex", "ro")] {
        let mut client = connect(&proxy, &authority.client(uri, 7), "app").await;
        assert_eq!(client.message().await.body, [0; 4], "let in without a password");
        client.until(b'Z').await;
        assert_eq!(client.ask("SELECT current_database()").await, format!("tenant_{tenant}"));
        let session_role = client.ask("SELECT session_user::text").await;
        assert!(session_role.starts_with(&format!("tenant-{tenant}-{role}-")), "{session_role}");
        let started = proxy.event("started", |event| event["subject"] == uri).await;
        assert_eq!((&started["tenant"], &started["issuer"]), (&json!(tenant), &json!("")));
    }
    // The client never chooses.
    let mut client = connect(&proxy, &authority.client(BILLING, 7), "globex").await;
    assert_eq!(client.fatal().await.sqlstate(), "28000");
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "tenant_forbidden");
}

#[tokio::test]
async fn a_certificate_that_names_nobody_or_somebody_elses_is_refused() {
    let (proxy, authority) = by_certificate().await;
    let stranger = "spiffe://example.org/ns/app/sa/billing/x";
    let mut client = connect(&proxy, &authority.client(stranger, 7), "acme").await;
    assert_eq!(client.fatal().await.sqlstate(), "28000");
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(
        (&event["reason"], &event["subject"]),
        (&json!("certificate_unbound"), &json!(stranger))
    );
    // Another authority's, of the right name.
    let mut client = connect(&proxy, &Authority::new().client(BILLING, 7), "acme").await;
    assert!(broken(&mut client).await, "turned away in the handshake");
    // Expired, and of the right authority.
    let past = OffsetDateTime::now_utc() - Duration::minutes(1);
    let mut client = connect(&proxy, &authority.client_until(BILLING, 7, past), "acme").await;
    assert!(broken(&mut client).await, "turned away in the handshake");
    assert_eq!(proxy.events("started").len(), 0);
}

/// Whether TLS itself ended it: nothing of PostgreSQL's protocol was said.
async fn broken(client: &mut Raw) -> bool {
    client.first_byte().await.is_err()
}

#[tokio::test]
async fn a_revoked_certificate_is_turned_away_without_a_restart() {
    let authority = Authority::new();
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\naccess = \"read-write\"\n"
        )
    };
    let listeners = ASKS
        .replace("clients.crt\" }", "clients.crt\", client_crl = [\"clients.crl\"] }")
        + "auth = \"certificate\"\n";
    let files = vec![("clients.crt", authority.pem()), ("clients.crl", authority.revoked(&[1]))];
    let settings = Settings { listeners, files, tenants: bound, ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let (good, bad) = (authority.client(BILLING, 2), authority.client(BILLING, 1));
    assert!(broken(&mut connect(&proxy, &bad, "acme").await).await);
    let mut client = connect(&proxy, &good, "acme").await;
    client.until(b'Z').await;

    fs::write(proxy.dir().join("clients.crl"), authority.revoked(&[1, 2])).expect("written");
    proxy
        .metric_reaches("pgsilo_file_reloads_total{file=\"certificate\",result=\"ok\"}", 1.0)
        .await;
    assert!(broken(&mut connect(&proxy, &good, "acme").await).await);
    assert_eq!(client.ask("SELECT 'alive'").await, "alive", "a running session is not ended");

    // A list that is none changes nothing.
    fs::write(proxy.dir().join("clients.crl"), "garbage").expect("written");
    let failed = "pgsilo_file_reloads_total{file=\"certificate\",result=\"error\"}";
    proxy.metric_reaches(failed, 1.0).await;
    assert!(broken(&mut connect(&proxy, &good, "acme").await).await);
    assert!(!broken(&mut connect(&proxy, &authority.client(BILLING, 3), "acme").await).await);
}

#[tokio::test]
pub(crate) async fn a_session_ends_with_its_certificate() {
    let authority = Authority::new();
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\naccess = \"read-write\"\n"
        )
    };
    let proxy = asking(&authority, "auth = \"certificate\"\n", bound).await;
    let end = OffsetDateTime::now_utc() + Duration::seconds(4);
    let own = authority.client_until(BILLING, 7, end);
    let mut idle = connect(&proxy, &own, "acme").await;
    idle.until(b'Z').await;
    let mut busy = connect(&proxy, &own, "acme").await;
    busy.until(b'Z').await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    assert_eq!(busy.message().await.tag, b'T');
    assert_eq!(busy.message().await.sqlstate(), "57014");
    assert_eq!(busy.message().await.tag, b'Z');
    for client in [&mut idle, &mut busy] {
        let told = client.fatal().await;
        assert_eq!(
            told.field(b'M').as_deref(),
            Some("terminating connection because its client certificate expired")
        );
    }
    assert!(OffsetDateTime::now_utc() <= end);
    proxy.metric_reaches("pgsilo_endings_total{ending=\"certificate_expired\"}", 2.0).await;
}

#[tokio::test]
async fn a_bound_token_works_over_its_own_certificate_only() {
    let authority = Authority::new();
    let proxy = asking(&authority, "", str::to_owned).await;
    let (own, other) = (authority.client(BILLING, 1), authority.client(BILLING, 2));
    let bound = mint::token_with("acme", json!({ "cnf": { "x5t#S256": own.thumbprint() } }));
    let mut client = Raw::certified(proxy.address(), &own).await.expect("TLS");
    client.log_in(&bound, "acme").await;
    assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme");
    // A token that is not bound is good over any, or none.
    let mut client = Raw::certified(proxy.address(), &other).await.expect("TLS");
    client.log_in(&mint::token("acme"), "acme").await;

    let mut stolen = Raw::certified(proxy.address(), &other).await.expect("TLS");
    refused(&mut stolen, &bound, "28P01").await;
    refused(&mut Raw::tls(proxy.address()).await, &bound, "28P01").await;
    eventually("both events", async || (proxy.events("refused").len() == 2).then_some(())).await;
    for event in proxy.events("refused") {
        assert_eq!(
            (&event["reason"], &event["subject"]),
            (&json!("token_unbound"), &json!("tester"))
        );
    }
    // What cannot be checked here is not passed over.
    let hash = own.thumbprint();
    for cnf in [
        json!({}),
        json!({ "jkt": hash }),
        json!({ "x5t#S256": hash, "jkt": hash }),
        json!({ "x5t#S256": "AAAA" }),
        json!({ "x5t#S256": format!("{hash}=") }),
        json!({ "x5t#S256": 7 }),
        json!("x5t#S256"),
        json!(null),
    ] {
        let changes = json!({ "cnf": cnf });
        // `null` takes the claim away in `token_with`: it is written by itself.
        let token = if cnf.is_null() {
            mint::token_with_null("acme", "cnf")
        } else {
            mint::token_with("acme", changes)
        };
        let mut client = Raw::certified(proxy.address(), &own).await.expect("TLS");
        refused(&mut client, &token, "28P01").await;
    }
}

async fn refused(client: &mut Raw, token: &str, sqlstate: &str) {
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    client.send_password(token).await;
    assert_eq!(client.fatal().await.sqlstate(), sqlstate);
}

#[tokio::test]
async fn without_a_list_that_is_in_force_no_certificate_of_an_authority_is_believed() {
    let (known, other) = (Authority::new(), Authority::new());
    let past = OffsetDateTime::now_utc() - Duration::minutes(1);
    let listeners =
        ASKS.replace("clients.crt\" }", "clients.crt\", client_crl = [\"clients.crl\"] }");
    let files =
        vec![("clients.crt", known.pem() + &other.pem()), ("clients.crl", known.revoked(&[]))];
    let proxy = Proxy::with(Settings { listeners, files, ..Settings::default() }).await;
    let (own, others) = (known.client(BILLING, 1), other.client(BILLING, 1));
    assert!(!broken(&mut connect(&proxy, &own, "acme").await).await);
    assert!(broken(&mut connect(&proxy, &others, "acme").await).await, "its authority has no list");
    fs::write(proxy.dir().join("clients.crl"), known.revoked_until(&[], past)).expect("written");
    proxy
        .metric_reaches("pgsilo_file_reloads_total{file=\"certificate\",result=\"ok\"}", 1.0)
        .await;
    assert!(broken(&mut connect(&proxy, &own, "acme").await).await, "its list is out of date");
    // Without a certificate nothing is to be looked up.
    let mut client = Raw::tls(proxy.address()).await;
    client.log_in(&mint::token("acme"), "acme").await;
}

#[tokio::test]
async fn a_binding_that_is_withdrawn_or_changed_ends_its_sessions_and_no_others() {
    let (proxy, authority) = by_certificate().await;
    let mut sessions = Vec::new();
    for uri in [BILLING, REPORTS] {
        let mut client = connect(&proxy, &authority.client(uri, 7), "app").await;
        client.until(b'Z').await;
        sessions.push(client);
    }
    let less = proxy
        .tenants()
        .replace("access = \"read-write\"\n[[binding]]", "access = \"read-only\"\n[[binding]]");
    assert_ne!(less, proxy.tenants());
    proxy.reload(&less);
    let told = sessions.remove(0).fatal().await;
    assert_eq!(told.sqlstate(), "57P01");
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "tenant_withdrawn");
    assert_eq!(sessions[0].ask("SELECT 'alive'").await, "alive");
    let none = less.split("[[binding]]").next().expect("the tenants").to_owned();
    proxy.reload(&none);
    assert_eq!(sessions[0].fatal().await.sqlstate(), "57P01");
}

#[tokio::test]
async fn a_stolen_certificate_is_withdrawn_and_its_successor_is_good() {
    let authority = Authority::new();
    let listeners = format!("{ASKS}auth = \"certificate\"\n");
    let files = vec![("clients.crt", authority.pem()), ("denied.toml", "denied = []\n".to_owned())];
    let tenants = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\naccess = \"read-write\"\n"
        )
    };
    let registry = "denied = \"denied.toml\"\n".to_owned();
    let proxy =
        Proxy::with(Settings { listeners, files, tenants, registry, ..Settings::default() }).await;
    // Valid since an hour ago.
    let stolen = authority.client(BILLING, 7);
    let mut thief = connect(&proxy, &stolen, "acme").await;
    thief.until(b'Z').await;
    let half_an_hour_ago = OffsetDateTime::now_utc() - Duration::minutes(30);
    let (date, (hour, minute, second)) =
        (half_an_hour_ago.date(), half_an_hour_ago.time().as_hms());
    let list = format!(
        "[[denied]]\nsubject = \"{BILLING}\"\nissued_before = {date}T{hour:02}:{minute:02}:{second:02}Z\n"
    );
    let new = proxy.dir().join("denied.new");
    fs::write(&new, list).expect("written");
    fs::rename(new, proxy.dir().join("denied.toml")).expect("renamed");
    assert_eq!(thief.fatal().await.sqlstate(), "57P01");
    assert_eq!(connect(&proxy, &stolen, "acme").await.fatal().await.sqlstate(), "28P01");
    let successor =
        authority.client_since(BILLING, 8, OffsetDateTime::now_utc() - Duration::minutes(1));
    connect(&proxy, &successor, "acme").await.until(b'Z').await;
}

/// A resumed session would bring along a certificate that nobody looks at again.
#[tokio::test]
async fn tls_sessions_are_not_resumed() {
    let authority = Authority::new();
    let proxy = asking(&authority, "", str::to_owned).await;
    let own = authority.client(BILLING, 7);
    let kinds = Raw::handshakes_of_one_client(proxy.address(), &own, 3).await;
    assert_eq!(kinds, [rustls::HandshakeKind::Full; 3]);
}
