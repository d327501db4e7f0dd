//! Client certificates: as who a session is, and as what a token is bound to.

use std::fs;
use std::sync::Arc;

use pgsilo_sandbox::testing::authority::{Authority, Pair};
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query, startup};
use pgsilo_sandbox::testing::{eventually, fake, mint};
use serde_json::json;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
        let mut client = connect(&proxy, &authority.client(uri, 7), tenant).await;
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
    assert_eq!(client.fatal().await.sqlstate(), "3D000");
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "database_unknown");
}

#[tokio::test]
async fn a_certificate_without_or_with_another_tenants_binding_is_refused() {
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
    ends_with_its_certificate("").await;
}

/// That is for tokens: nothing else would end a certificate's sessions.
#[tokio::test]
async fn a_session_ends_with_its_certificate_where_it_may_outlive_a_token() {
    ends_with_its_certificate("end_at_expiry = false\n").await;
}

async fn ends_with_its_certificate(lease: &str) {
    let authority = Authority::new();
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\naccess = \"read-write\"\n"
        )
    };
    let settings = Settings {
        listeners: format!("{ASKS}auth = \"certificate\"\n"),
        files: vec![("clients.crt", authority.pem())],
        tenants: bound,
        lease: lease.to_owned(),
        ..Settings::default()
    };
    let proxy = Proxy::with(settings).await;
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

/// A resumed session would bring along a certificate that is not checked again.
#[tokio::test]
async fn tls_sessions_are_not_resumed() {
    let authority = Authority::new();
    let proxy = asking(&authority, "", str::to_owned).await;
    let own = authority.client(BILLING, 7);
    let kinds = Raw::handshakes_of_one_client(proxy.address(), &own, 3).await;
    assert_eq!(kinds, [rustls::HandshakeKind::Full; 3]);
}

const FAILED: &str = "pgsilo_tls_failures_total";

/// A search for a path among certificates of one subject takes longer than is left for it, and
/// anybody can make them.
#[tokio::test]
async fn a_chain_of_many_certificates_is_turned_away_and_is_not_searched() {
    let authority = Authority::new();
    let proxy = asking(&authority, "", str::to_owned).await;
    for (count, said) in [
        (10, "10 certificates were shown beside the peer's own; 4 may be"),
        (5, "5 certificates were shown beside the peer's own; 4 may be"),
        (4, "certificates of one subject and different keys were shown"),
    ] {
        let forged = Authority::self_made(&[], BILLING, count);
        assert!(broken(&mut connect(&proxy, &forged, "acme").await).await);
        proxy
            .logged(|line| {
                line["message"] == "a client's TLS handshake failed"
                    && line["error"].as_str().is_some_and(|error| error.contains(said))
            })
            .await;
    }
    proxy.metric_reaches(FAILED, 3.0).await;
    // Real ones: as many as are looked at, and one more.
    let token = mint::token("acme");
    let mut client =
        Raw::certified(proxy.address(), &authority.below(BILLING, 4)).await.expect("TLS");
    client.log_in(&token, "acme").await;
    assert!(broken(&mut connect(&proxy, &authority.below(BILLING, 5), "acme").await).await);
    proxy.metric_reaches(FAILED, 4.0).await;
}

/// A tenant's own database may show as much as it likes.
#[tokio::test]
async fn a_database_that_shows_many_certificates_is_refused_and_they_are_not_searched() {
    let authority = Authority::new();
    for (count, cause) in [
        (10, "10 certificates were shown beside the peer's own"),
        (4, "certificates of one subject and different keys were shown"),
    ] {
        let shown = Authority::self_made(&["localhost"], BILLING, count);
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(shown.chain(), shown.der().1)
        .expect("a pair");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let address = fake::serves(move |mut tcp| {
            let acceptor = acceptor.clone();
            async move {
                let mut request = [0; 8];
                tcp.read_exact(&mut request).await.expect("an SSLRequest");
                tcp.write_all(b"S").await.expect("answered");
                let _refused = acceptor.accept(tcp).await;
            }
        })
        .await;
        let files = vec![("db-ca.crt", authority.pem())];
        let proxy = Proxy::with(Settings { files, ..Settings::default() }).await;
        for (number, mode) in ["verify-ca", "verify-full"].into_iter().enumerate() {
            proxy.reload(&format!(
                "[[tenant]]\nid = \"acme\"\n[tenant.placement]\nhost = \"localhost\"\n\
                 port = {}\ndbname = \"tenant_acme\"\n\
                 tls = {{ mode = \"{mode}\", ca = \"db-ca.crt\" }}\n\
                 [tenant.lease]\nroles = {{ read-write = \"tenant-acme-rw\" }}\n",
                address.port()
            ));
            let reloads = (number + 1) as f64;
            proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", reloads).await;
            let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
            assert_eq!(error.code().map(|code| code.code()), Some("08001"));
            let event =
                eventually("its event", async || proxy.events("refused").get(number).cloned())
                    .await;
            let said = event["cause"].as_str().expect("a cause");
            assert!(said.contains(cause), "{said}");
        }
    }
}

const READ_AGAIN: &str = "pgsilo_file_reloads_total{file=\"certificate\",result=\"ok\"}";
const NOT_READ: &str = "pgsilo_file_reloads_total{file=\"certificate\",result=\"error\"}";

/// Puts a whole new file in the place of one of a proxy's.
fn replace(proxy: &Proxy, name: &str, text: &str) {
    let new = proxy.dir().join("new");
    fs::write(&new, text).expect("written");
    fs::rename(new, proxy.dir().join(name)).expect("renamed");
}

/// A partner's own certificate is no authority: it would sign for everybody else's names.
#[tokio::test]
async fn a_leaf_among_the_authorities_is_refused_and_certifies_no_client() {
    let (proxy, authority) = by_certificate().await;
    let partner = Authority::pretended();
    replace(&proxy, "clients.crt", &(authority.pem() + &partner.pem()));
    proxy.metric_reaches(NOT_READ, 1.0).await;
    let line = proxy.logged(|line| line["file"] == "certificate").await;
    let said = line["error"].as_str().expect("an error");
    assert!(said.contains("clients.crt") && said.contains("CN=a partner"), "{said}");
    assert!(said.contains("is no authority's"), "{said}");
    let forged = partner.client(BILLING, 7);
    assert!(broken(&mut connect(&proxy, &forged, "acme").await).await);
    connect(&proxy, &authority.client(BILLING, 7), "acme").await.until(b'Z').await;
}

#[tokio::test]
pub(crate) async fn an_authority_that_is_replaced_loses_its_sessions_and_no_others() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = vec![("clients.crt", old.pem() + &new.pem())];
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{BILLING}\"\ntenant = \"acme\"\naccess = \"read-write\"\n"
        )
    };
    let listeners = format!("{ASKS}auth = \"certificate\"\n{ASKS}");
    let proxy =
        Proxy::with(Settings { listeners, files, tenants: bound, ..Settings::default() }).await;
    let by_token = proxy.addresses()[1];

    let mut ends = Vec::new();
    let mut lives = Vec::new();
    for (authority, sessions) in [(&old, &mut ends), (&new, &mut lives)] {
        let own = authority.client(BILLING, 7);
        let mut client = connect(&proxy, &own, "acme").await;
        client.until(b'Z').await;
        sessions.push(client);
        // Whatever it has shown behind its handshake.
        let bound = mint::token_with("acme", json!({ "cnf": { "x5t#S256": own.thumbprint() } }));
        for token in [bound, mint::token("acme")] {
            let mut client = Raw::certified(by_token, &own).await.expect("TLS");
            client.log_in(&token, "acme").await;
            sessions.push(client);
        }
    }
    let mut client = Raw::tls(by_token).await;
    client.log_in(&mint::token("acme"), "acme").await;
    lives.push(client);

    replace(&proxy, "clients.crt", &new.pem());
    for client in &mut ends {
        let told = client.fatal().await;
        assert_eq!(told.sqlstate(), "57P01");
        assert_eq!(
            told.field(b'M').as_deref(),
            Some("terminating connection because its client certificate is no longer trusted")
        );
    }
    proxy.metric_reaches("pgsilo_endings_total{ending=\"authority_withdrawn\"}", 3.0).await;
    for client in &mut lives {
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    }
    assert!(broken(&mut connect(&proxy, &old.client(BILLING, 7), "acme").await).await);
}

#[tokio::test]
async fn a_revocation_list_of_the_future_is_in_force_when_that_has_come() {
    let authority = Authority::new();
    let listeners =
        ASKS.replace("clients.crt\" }", "clients.crt\", client_crl = [\"clients.crl\"] }");
    let files = vec![("clients.crt", authority.pem()), ("clients.crl", authority.revoked(&[1]))];
    let proxy = Proxy::with(Settings { listeners, files, ..Settings::default() }).await;
    let own = authority.client(BILLING, 2);
    let now = OffsetDateTime::now_utc();
    let early =
        authority.revoked_within(&[1, 2], now + Duration::seconds(4), now + Duration::hours(1));
    replace(&proxy, "clients.crl", &early);
    proxy.metric_reaches(NOT_READ, 1.0).await;
    let said = proxy.logged(|line| line["file"] == "certificate").await;
    assert!(said["error"].as_str().is_some_and(|said| said.contains("of the future")), "{said}");
    assert!(!broken(&mut connect(&proxy, &own, "acme").await).await, "the one before holds");
    // The file does not change any more.
    proxy.metric_reaches(READ_AGAIN, 1.0).await;
    assert!(broken(&mut connect(&proxy, &own, "acme").await).await);
}
