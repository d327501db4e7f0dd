//! One scenario for every reason of the table of refusals, on real parts where they can be
//! made to show it. Each asserts the bytes that the client got, the metric and the audit event.
//! A reason without a scenario does not compile: `scenario` has no `_` arm.

use pgsilo::Reason;
use pgsilo_sandbox::testing::issuer::Issuer;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Message, Raw, startup, startup_of, tagged};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, fake, mint};
use rustix::process::Signal;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{certificates, denied, log, sidecar};

/// What the client is to read.
struct Told {
    text: &'static str,
    hint: Option<&'static str>,
    /// Connections that must stay open until everything is checked.
    _open: Vec<Raw>,
}

fn told(text: &'static str) -> Told {
    Told { text, hint: None, _open: Vec::new() }
}

/// Provokes a refusal; answers with the pgsilo that refused, what the client got, and what it
/// should have got.
async fn scenario(reason: Reason) -> (Proxy, Message, Told) {
    const TOKEN: &str = "session token authentication failed";
    match reason {
        Reason::StartupMalformed => {
            let proxy = Proxy::start().await;
            let mut client = Raw::tcp(proxy.address()).await;
            client.send(&[0, 0, 0, 3, 1, 2, 3]).await;
            let message = client.fatal().await;
            (proxy, message, told("invalid startup packet"))
        }
        Reason::ProtocolUnsupported => {
            let proxy = Proxy::start().await;
            let mut client = Raw::tcp(proxy.address()).await;
            client.send(&startup_of(0x0002_0000, &[("user", "app")])).await;
            let text = "unsupported frontend protocol 2.0: server supports 3.0 to 3.2";
            let message = client.fatal().await;
            (proxy, message, told(text))
        }
        Reason::UserMissing => {
            let proxy = Proxy::start().await;
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("database", "acme")])).await;
            let message = client.fatal().await;
            (proxy, message, told("no user name specified in startup packet"))
        }
        Reason::ReplicationRefused => {
            let proxy = Proxy::start().await;
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("user", "app"), ("replication", "true")])).await;
            let message = client.fatal().await;
            (proxy, message, told("replication connections are not supported"))
        }
        Reason::TlsRequired => {
            let proxy = Proxy::start().await;
            let mut client = Raw::tcp(proxy.address()).await;
            client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
            let hint = Some("Connect with sslmode=require or stricter.");
            let message = client.fatal().await;
            (proxy, message, Told { hint, ..told("TLS is required") })
        }
        Reason::ShuttingDown => shutting_down().await,
        Reason::TooManyConnections => {
            let limits = "max_sessions_per_tenant = 1\n".to_owned();
            let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
            let _first = proxy.connect(&mint::token("acme"), "acme").await.expect("the first one");
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("too many connections for tenant \"acme\""))
        }
        Reason::LoginTimeout => {
            let limits = "login_timeout = \"200ms\"\n".to_owned();
            let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
            let mut client = Raw::tcp(proxy.address()).await;
            client.send(&[0, 0]).await;
            let message = client.fatal().await;
            (proxy, message, told("canceling authentication due to timeout"))
        }
        Reason::PeerForbidden => {
            let proxy =
                sidecar::with_file(&mint::token("acme"), "allow_uids = [4294967294]\n").await;
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("user", "app")])).await;
            let message = client.fatal().await;
            (proxy, message, told("peer authentication failed"))
        }
        Reason::CertificateMissing => {
            let (proxy, _authority) = certificates::by_certificate().await;
            let mut client = Raw::tls(proxy.address()).await;
            client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
            let message = client.fatal().await;
            (proxy, message, told("connection requires a valid client certificate"))
        }
        Reason::CertificateUnbound => {
            let (proxy, authority) = certificates::by_certificate().await;
            let own = authority.client("spiffe://example.org/nobody", 7);
            let message = certificates::connect(&proxy, &own, "acme").await.fatal().await;
            (proxy, message, told("the client certificate is bound to no tenant"))
        }
        Reason::TokenUnavailable => {
            let proxy = sidecar::with_file("to be removed", "").await;
            std::fs::remove_file(proxy.dir().join("token")).expect("removed");
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("user", "app")])).await;
            let message = client.fatal().await;
            (proxy, message, told("the session token is not available at the moment"))
        }
        Reason::TokenUnbound => {
            let proxy = Proxy::start().await;
            let hash = "A".repeat(43);
            let token = mint::token_with("acme", json!({ "cnf": { "x5t#S256": hash } }));
            let message = refused_token(&proxy, &token, "acme").await;
            let hint = Some("Connect with the client certificate that the token was issued for.");
            let text = "the session token is bound to another client certificate";
            (proxy, message, Told { hint, ..told(text) })
        }
        Reason::IdentityRevoked => {
            let proxy = denied::with_list("[[denied]]\nsubject = \"tester\"\n").await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the identity shown has been revoked"))
        }
        Reason::AccessLocked => {
            let (proxy, _database) =
                crate::registry::served::with_lock("tenant", "acme", "ask Ann").await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("access is locked: ask Ann"))
        }
        Reason::GrantMissing => {
            let (proxy, _database) = crate::registry::grants::serve().await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("access to tenant \"acme\" was not granted"))
        }
        Reason::TokenMissing => {
            let proxy = Proxy::start().await;
            let message = refused_token(&proxy, "", "acme").await;
            (proxy, message, told(TOKEN))
        }
        Reason::TokenInvalid => {
            let proxy = Proxy::start().await;
            let mut token = mint::token("acme");
            // The signature's last character but one: the last holds padding bits.
            let at = token.len() - 2;
            let other = if token.as_bytes()[at] == b'A' { "B" } else { "A" };
            token.replace_range(at..=at, other);
            let message = refused_token(&proxy, &token, "acme").await;
            (proxy, message, told(TOKEN))
        }
        Reason::TokenExpired => {
            let proxy = Proxy::start().await;
            let times = json!({ "iat": mint::now() - 7200, "nbf": mint::now() - 7200, "exp": mint::now() - 3600 });
            let token = mint::token_with("acme", times);
            let hint = Some("Get a new token and connect again.");
            let message = refused_token(&proxy, &token, "acme").await;
            assert!(message.field(b'D').expect("a DETAIL").starts_with("The token expired 36"));
            (proxy, message, Told { hint, ..told("session token has expired") })
        }
        Reason::KeysUnavailable => {
            let mut issuer = Issuer::start().await;
            issuer.publish("a");
            issuer.stop().await;
            let issuers = issuer.with_discovery("");
            let proxy = Proxy::unready(Settings { issuers, ..Settings::default() }).await;
            let message = refused_token(&proxy, &issuer.token("a"), "acme").await;
            (proxy, message, told("session tokens cannot be verified at the moment"))
        }
        Reason::TenantUnresolved => {
            let proxy = Proxy::start().await;
            let token = mint::token_with("acme", json!({ "tenant": null }));
            let message = refused_token(&proxy, &token, "acme").await;
            (proxy, message, told("the session token does not resolve to one tenant"))
        }
        Reason::TenantForbidden => {
            let tenants = |text: &str| text.replacen(", migrate = \"tenant-acme-migrate\"", "", 1);
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let token = mint::token_with("acme", json!({ "access": "migrate" }));
            let message = refused_token(&proxy, &token, "acme").await;
            (proxy, message, told("the session token does not allow this tenant or access"))
        }
        Reason::DatabaseUnknown => {
            let proxy = Proxy::start().await;
            let message = refused_token(&proxy, &mint::token("acme"), "globex").await;
            let hint = Some("Name the tenant as the database.");
            (proxy, message, Told { hint, ..told("database \"globex\" does not exist") })
        }
        Reason::TenantUnknown => {
            let proxy = Proxy::start().await;
            let message = refused_token(&proxy, &mint::token("initech"), "initech").await;
            (proxy, message, told("tenant \"initech\" does not exist"))
        }
        Reason::TenantSuspended => {
            let tenants = |text: &str| {
                text.replacen("id = \"acme\"", "id = \"acme\"\nstate = \"suspended\"", 1)
            };
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("tenant \"acme\" is suspended"))
        }
        Reason::TenantPaused => {
            let tenants =
                |text: &str| text.replacen("id = \"acme\"", "id = \"acme\"\nstate = \"paused\"", 1);
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("tenant \"acme\" is paused for a moment"))
        }
        Reason::TenantDeleting => {
            let tenants = |text: &str| {
                text.replacen("id = \"acme\"", "id = \"acme\"\nstate = \"deleting\"", 1)
            };
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("tenant \"acme\" is being deleted"))
        }
        Reason::ResidencyRefused => {
            let registry = "regions = [\"eu\"]\n".to_owned();
            let tenants = |text: &str| {
                text.replacen(
                    "dbname = \"tenant_acme\"",
                    "dbname = \"tenant_acme\"\nregion = \"us\"",
                    1,
                )
            };
            let proxy = Proxy::with(Settings { registry, tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("tenant \"acme\" may not be served from here"))
        }
        Reason::RegistryStale => {
            let registry = "max_staleness = \"1ms\"\n".to_owned();
            let proxy = Proxy::with(Settings { registry, ..Settings::default() }).await;
            proxy.reload("not a registry");
            proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"error\"}", 1.0).await;
            eventually("the registry to be stale", async || {
                (proxy.metric("pgsilo_registry_stale_seconds").await > 0.001).then_some(())
            })
            .await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the tenant registry is out of date"))
        }
        Reason::AuditUnavailable => {
            let (proxy, message) = log::without_an_audit().await;
            (proxy, message, told("sessions cannot be audited at the moment"))
        }
        Reason::LeaseUnavailable => {
            let address = fake::says(b"HTTP/1.1 503 Sealed\r\ncontent-length: 0\r\n\r\n").await;
            let openbao = format!(
                "address = \"http://{address}\"\nauth = {{ token_file = \"secret-id\" }}\n"
            );
            let proxy = Proxy::unready(Settings { openbao, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("database credentials are not available at the moment"))
        }
        Reason::LeaseBackendAway => {
            const SAID: &str = "{\"errors\":[\"1 error occurred:\\n\\t* unable to start transaction: \
                failed to connect to `user=broker database=tenant_acme`: 127.0.0.1:1 (127.0.0.1): \
                dial error: dial tcp 127.0.0.1:1: connect: connection refused\\n\\n\"]}";
            let address = fake::openbao(|mut tcp| async move {
                let head = "HTTP/1.1 500 Internal Server Error\r\nConnection: close";
                let answer = format!("{head}\r\nContent-Length: {}\r\n\r\n{SAID}", SAID.len());
                let _said = tcp.write_all(answer.as_bytes()).await;
            })
            .await;
            let openbao = format!(
                "address = \"http://{address}\"\nauth = {{ token_file = \"secret-id\" }}\n"
            );
            let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the tenant's database is not available at the moment"))
        }
        Reason::LeaseDenied => {
            let tenants = |text: &str| text.replacen("tenant-acme-rw", "someone-elses-role", 1);
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("database credentials were denied"))
        }
        Reason::BackendUnreachable => {
            // Nothing listens there, and nothing can: the sandbox has the port on 127.0.0.1 only.
            let tenants =
                |text: &str| text.replacen("host = \"127.0.0.1\"", "host = \"127.0.0.9\"", 1);
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("could not connect to the tenant's database"))
        }
        Reason::BackendFull => {
            let proxy =
                backend_says(b"SFATAL\0C53300\0Msorry, too many clients already, tenant-acme\0\0")
                    .await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the tenant's database has too many connections"))
        }
        Reason::BackendNotReady => {
            let proxy =
                backend_says(b"SFATAL\0C57P03\0Mthe database system is starting up\0\0").await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the tenant's database is not accepting connections"))
        }
        Reason::BackendRejected => {
            // A database that the leased role may not connect to.
            let tenants =
                |text: &str| text.replacen("dbname = \"tenant_acme\"", "dbname = \"postgres\"", 1);
            let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
            let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
            (proxy, message, told("the tenant's database did not accept the session"))
        }
        Reason::SettingRejected => {
            let proxy = Proxy::start().await;
            let mut client = Raw::unix(&proxy.socket()).await;
            client.send(&startup(&[("user", "app"), ("options", "-c work_mem=lots")])).await;
            client.send_password(&mint::token("acme")).await;
            let message = client.fatal().await;
            (proxy, message, told("invalid value for parameter \"work_mem\": \"lots\""))
        }
        Reason::SealBroken => seal_broken().await,
        Reason::Internal => internal().await,
    }
}

/// Logs in over the Unix socket and is refused.
async fn refused_token(proxy: &Proxy, token: &str, dbname: &str) -> Message {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", dbname)])).await;
    client.send_password(token).await;
    client.fatal().await
}

/// A session in a transaction keeps the proxy up while it drains.
async fn shutting_down() -> (Proxy, Message, Told) {
    let limits = "drain_timeout = \"30s\"\n".to_owned();
    let proxy = Proxy::with(Settings { limits, ..Settings::default() }).await;
    let mut busy = Raw::unix(&proxy.socket()).await;
    busy.log_in(&mint::token("acme"), "acme").await;
    assert_eq!(busy.ask("BEGIN; SELECT 'in a transaction'").await, "in a transaction");
    proxy.signal(Signal::TERM);
    proxy.logged(|line| line["message"] == "draining").await;
    assert_eq!(proxy.get("/readyz").await.0, 503);
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
    let message = client.fatal().await;
    (proxy, message, Told { _open: vec![busy], ..told("the proxy is shutting down") })
}

/// acme's row names globex's database, which acme's leased role may, by mistake, connect to.
async fn seal_broken() -> (Proxy, Message, Told) {
    let database = "misplaced";
    let superuser = world().superuser("postgres").await;
    for sql in [
        format!("CREATE DATABASE {database}"),
        format!("ALTER DATABASE {database} SET pgsilo.tenant = 'globex'"),
        format!("GRANT CONNECT ON DATABASE {database} TO tenant_acme_login"),
    ] {
        superuser.batch_execute(&sql).await.expect("prepared");
    }
    let tenants =
        |text: &str| text.replacen("dbname = \"tenant_acme\"", "dbname = \"misplaced\"", 1);
    let proxy = Proxy::with(Settings { tenants, ..Settings::default() }).await;
    let message = refused_token(&proxy, &mint::token("acme"), "acme").await;
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["cause"], "the database is sealed for tenant \"globex\", not for acme");
    superuser
        .batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)"))
        .await
        .expect("dropped");
    (proxy, message, told("the database reached is not the tenant's"))
}

/// A process that is out of descriptors when it dials.
async fn internal() -> (Proxy, Message, Told) {
    let before = "ulimit -n 64;".to_owned();
    let proxy = Proxy::with(Settings { before, ..Settings::default() }).await;
    // Clients that log in take the descriptors; each waits for the last of them at its password.
    let mut waiting = Vec::new();
    loop {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
        let full = proxy.logged(|line| line["message"] == "cannot accept connections");
        tokio::select! {
            asked = client.message() => assert_eq!(asked.tag, b'R'),
            _line = full => break,
        }
        waiting.push(client);
        assert!(waiting.len() < 64, "the bound on descriptors is not in force");
    }
    // A descriptor that came free meanwhile is taken by a session that is then kept open.
    let mut kept = Vec::new();
    loop {
        let mut client = waiting.pop().expect("one that was accepted");
        client.send(&pgsilo_sandbox::testing::raw::password(&mint::token("acme"))).await;
        let message = client.message().await;
        if message.tag == b'R' {
            client.until(b'Z').await;
            kept.push(client);
            continue;
        }
        assert_eq!(message.field(b'S').as_deref(), Some("FATAL"));
        assert_eq!(client.next().await, None, "nothing follows a refusal");
        return (proxy, message, told("internal error"));
    }
}

/// A pgsilo whose acme lives on a server that refuses every login with this error.
async fn backend_says(error: &'static [u8]) -> Proxy {
    let answer: &'static [u8] = Box::leak(tagged(b'E', error).into_boxed_slice());
    let address = fake::says(answer).await;
    let proxy = Proxy::start().await;
    proxy.place_acme_at(address.port(), "").await;
    proxy
}

async fn check(reason: Reason) {
    let (proxy, message, told) = scenario(reason).await;
    assert_eq!(message.sqlstate(), reason.sqlstate());
    assert_eq!(message.field(b'M').as_deref(), Some(told.text));
    assert_eq!(message.field(b'H').as_deref(), told.hint);

    let event = proxy.event("refused", |event| event["reason"] == reason.label()).await;
    assert_eq!(event["sqlstate"], reason.sqlstate());
    assert_eq!(event["level"], reason.level().as_str());
    let session = event["session"].as_str().expect("a session id");
    let detail = message.field(b'D').expect("a DETAIL");
    assert!(detail.ends_with(&format!("Session {session}.")), "{detail}");
    let cause = event["cause"].as_str().expect("a cause");
    assert!(!cause.is_empty());

    let metric = format!("pgsilo_refusals_total{{reason=\"{}\"}}", reason.label());
    if reason == Reason::Internal {
        return; // the HTTP endpoint has no descriptor either
    }
    assert_eq!(proxy.metric(&metric).await, 1.0);
}

macro_rules! refusals {
    ($($test:ident: $reason:ident;)+) => {
        $(#[tokio::test] async fn $test() { check(Reason::$reason).await; })+

        /// The list of tests below the table: a reason that is missing here is a test missing.
        #[test]
        fn every_reason_has_a_test() {
            let tested = [$(Reason::$reason),+];
            for reason in Reason::ALL {
                assert!(tested.contains(reason), "{reason:?}");
            }
        }
    };
}

refusals! {
    a_malformed_startup_packet: StartupMalformed;
    protocol_2: ProtocolUnsupported;
    no_user: UserMissing;
    replication: ReplicationRefused;
    a_session_in_clear_where_tls_is_required: TlsRequired;
    a_stopping_proxy: ShuttingDown;
    one_session_too_many: TooManyConnections;
    a_login_that_takes_too_long: LoginTimeout;
    a_peer_that_may_not_be_there: PeerForbidden;
    no_client_certificate: CertificateMissing;
    a_client_certificate_of_nobody: CertificateUnbound;
    a_sidecar_without_its_token: TokenUnavailable;
    a_token_of_another_certificate: TokenUnbound;
    a_token_on_the_list: IdentityRevoked;
    a_tenant_with_a_lock: AccessLocked;
    a_subject_without_a_grant: GrantMissing;
    an_empty_password: TokenMissing;
    a_broken_signature: TokenInvalid;
    an_expired_token: TokenExpired;
    an_issuer_whose_keys_were_never_fetched: KeysUnavailable;
    a_token_without_a_tenant: TenantUnresolved;
    an_access_that_the_tenant_has_no_role_for: TenantForbidden;
    a_database_of_another_tenant: DatabaseUnknown;
    a_tenant_that_nobody_knows: TenantUnknown;
    a_suspended_tenant: TenantSuspended;
    a_paused_tenant: TenantPaused;
    a_tenant_that_is_being_deleted: TenantDeleting;
    a_placement_in_another_region: ResidencyRefused;
    a_registry_that_is_stale: RegistryStale;
    an_audit_that_nobody_reads: AuditUnavailable;
    an_openbao_that_is_sealed: LeaseUnavailable;
    a_database_that_openbao_cannot_reach: LeaseBackendAway;
    an_openbao_that_says_no: LeaseDenied;
    a_database_server_that_is_not_there: BackendUnreachable;
    a_database_that_is_full: BackendFull;
    a_database_that_is_starting: BackendNotReady;
    a_database_that_refuses_the_lease: BackendRejected;
    a_setting_that_the_database_refuses: SettingRejected;
    a_database_sealed_for_another_tenant: SealBroken;
    a_process_out_of_descriptors: Internal;
}
