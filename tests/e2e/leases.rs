//! One session, one lease: made for it, gone with it, whatever way it ends.

use std::time::{Duration, Instant};

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, query, startup, tagged};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{eventually, fake, mint};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn session_role(client: &tokio_postgres::Client) -> String {
    client.query_one("SELECT session_user::text", &[]).await.expect("a row").get(0)
}

pub(crate) async fn role_is_of_no_use(role: &str) -> Duration {
    let began = Instant::now();
    eventually("the leased role to be of no use", async || {
        (world().usable_roles(&[role]).await == 0).then_some(())
    })
    .await;
    began.elapsed()
}

#[tokio::test]
async fn a_leased_role_works_during_its_session_and_not_after() {
    let proxy = Proxy::start().await;
    let superuser = world().superuser("postgres").await;
    let client = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    let role = session_role(&client).await;
    let started = proxy.event("started", |_| true).await;
    assert_eq!(started["role"], role.as_str());
    let query = "SELECT rolvaliduntil > now(), rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = $1";
    let row = superuser.query_one(query, &[&role]).await.expect("it exists");
    assert_eq!((row.get::<_, bool>(0), row.get::<_, bool>(1)), (true, false));

    drop(client);
    let took = role_is_of_no_use(&role).await;
    assert!(took < Duration::from_secs(2), "promised within 2 s, took {took:?}");
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
}

#[tokio::test]
async fn two_sessions_never_share_a_lease() {
    let proxy = Proxy::start().await;
    let token = mint::token("acme");
    let (a, b) = tokio::join!(proxy.connect(&token, "acme"), proxy.connect(&token, "acme"));
    let roles = [session_role(&a.expect("a")).await, session_role(&b.expect("b")).await];
    assert_ne!(roles[0], roles[1]);
}

#[tokio::test]
async fn a_thousand_sessions_leave_no_usable_role_and_no_lease() {
    let proxy = Proxy::start().await;
    let token = mint::token_with("globex", json!({ "access": "migrate" }));
    for _ in 0..1000 {
        let client = proxy.connect(&token, "globex").await.expect("connected");
        client.simple_query("SELECT 1").await.expect("served");
    }
    proxy.metric_reaches("pgsilo_sessions_active", 0.0).await;
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    assert_eq!(proxy.metric("pgsilo_sessions_total").await, 1000.0);
    eventually("no role to be left", async || {
        (world().usable_roles_like("^tenant-globex-migrate-").await == 0).then_some(())
    })
    .await;
    eventually("no lease to be left", async || {
        world().leases("tenant-globex-migrate").await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_during_its_login_leaves_no_lease() {
    let proxy = Proxy::start().await;
    // It is gone before OpenBAO has answered; how far the login gets is up to the machine.
    for _ in 0..20 {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.send(&startup(&[("user", "app"), ("database", "acme")])).await;
        client.send_password(&mint::token("acme")).await;
    }
    eventually("each to be over", async || {
        let over = proxy.metric("pgsilo_abandoned_total").await
            + proxy.metric("pgsilo_endings_total{ending=\"client_left\"}").await;
        (over == 20.0).then_some(())
    })
    .await;
    eventually("each lease to be revoked", async || {
        let leases = proxy.metric("pgsilo_leases_total").await;
        (proxy.metric("pgsilo_revocations_total").await == leases).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_lease_that_comes_too_late_is_revoked() {
    // Nothing listens there, so the session is over before the lease is there.
    let proxy = Proxy::start().await;
    proxy.place_acme_at(1, "").await;
    let error =
        proxy.connect(&mint::token("acme"), "acme").await.expect_err("nothing listens there");
    assert_eq!(error.code().map(|code| code.code()), Some("08001"));
    proxy.metric_reaches("pgsilo_leases_total", 1.0).await;
    proxy.metric_reaches("pgsilo_revocations_total", 1.0).await;
}

#[tokio::test]
pub(crate) async fn a_session_that_is_killed_in_the_database_gives_its_lease_back() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let role = client.ask("SELECT session_user::text").await;
    let superuser = world().superuser("postgres").await;
    superuser
        .execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1",
            &[&role],
        )
        .await
        .expect("killed");
    let error = client.fatal().await;
    assert_eq!(error.sqlstate(), "57P01", "the database's own words");
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "backend_left");
    role_is_of_no_use(&role).await;
}

#[tokio::test]
async fn a_stopping_proxy_revokes_everything_before_it_ends() {
    let mut proxy = Proxy::start().await;
    let mut idle = Raw::unix(&proxy.socket()).await;
    idle.log_in(&mint::token("acme"), "acme").await;
    let role = idle.ask("SELECT session_user::text").await;
    let mut busy = Raw::unix(&proxy.socket()).await;
    busy.log_in(&mint::token("acme"), "acme").await;
    let busy_role = busy.ask("SELECT session_user::text").await;
    let process = busy.ask("SELECT pg_backend_pid()").await;
    busy.send(&query("SELECT pg_sleep(600)")).await;
    world().waits_for(process, "PgSleep").await;

    proxy.signal(rustix::process::Signal::TERM);
    let error = idle.fatal().await;
    assert_eq!(error.sqlstate(), "57P01");
    assert_eq!(
        error.field(b'M').as_deref(),
        Some("terminating connection due to administrator command")
    );
    // The query is cancelled when its time is up; then its session is told as well.
    let messages = [busy.message().await, busy.message().await, busy.message().await];
    assert_eq!(messages.each_ref().map(|message| message.tag), [b'T', b'E', b'Z']);
    assert_eq!(messages[1].sqlstate(), "57014");
    assert_eq!(busy.fatal().await.sqlstate(), "57P01");

    assert!(proxy.ended().await.success());
    eventually("both roles to be gone", async || {
        (world().usable_roles(&[&role, &busy_role]).await == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_openbao_that_is_down_at_the_start_is_waited_for() {
    // Nothing listens there.
    let openbao =
        "address = \"http://127.0.0.1:1\"\nauth = { token_file = \"secret-id\" }\n".to_owned();
    let proxy = Proxy::unready(Settings { openbao, ..Settings::default() }).await;
    let (status, why) = proxy.get("/readyz").await;
    assert_eq!((status, why.as_str()), (503, "not logged in to OpenBAO\n"));
    assert_eq!(proxy.get("/livez").await.0, 200);
    let line = proxy.logged(|line| line["level"] == "ERROR").await;
    assert_eq!(
        line["message"],
        "cannot log in to OpenBAO: check [openbao] address and ca, and that it runs"
    );
    let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some("57P03"));
}

#[tokio::test]
async fn openbao_answers_that_make_no_sense_are_refusals() {
    const TOKEN: &[u8] = b"{\"data\":{\"ttl\":0,\"renewable\":false,\"num_uses\":0,\
        \"type\":\"service\",\"orphan\":true,\"explicit_max_ttl\":0}}";
    let answers: [(&[u8], &str); 4] = [
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\nnot json", "57P03"),
        (
            b"HTTP/1.1 403 No\r\ncontent-length: 33\r\n\r\n{\"errors\":[\"permission denied\"]} ",
            "58000",
        ),
        (b"HTTP/1.1 429 Slow\r\ncontent-length: 0\r\n\r\n", "57P03"),
        (b"gibberish\r\n\r\n", "57P03"),
    ];
    for (answer, sqlstate) in answers {
        let address = fake::serves(move |mut tcp| async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut request = vec![0; 4096];
            let n = tcp.read(&mut request).await.unwrap_or(0);
            let head = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                TOKEN.len()
            );
            let lookup = String::from_utf8_lossy(&request[..n]).contains("lookup-self");
            let bytes = if lookup { [head.as_bytes(), TOKEN].concat() } else { answer.to_vec() };
            let _said = tcp.write_all(&bytes).await;
        })
        .await;
        let openbao =
            format!("address = \"http://{address}\"\nauth = {{ token_file = \"secret-id\" }}\n");
        let proxy = Proxy::with(Settings { openbao, ..Settings::default() }).await;
        let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
        assert_eq!(error.code().map(|code| code.code()), Some(sqlstate), "{answer:?}");
    }
}

#[tokio::test]
async fn a_database_that_is_not_postgresql_is_a_refusal() {
    let banners: [&'static [u8]; 5] = [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        b"R\0\0\0\x03",
        b"R\xff\xff\xff\xff",
    ];
    for banner in banners {
        let proxy = Proxy::start().await;
        let address = fake::says(banner).await;
        proxy.place_acme_at(address.port(), "").await;
        let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
        assert_eq!(error.code().map(|code| code.code()), Some("58000"), "{banner:?}");
    }
}

/// A session that was there before could have left answers to questions that it foresaw, or a
/// database could say more than it was asked.
#[tokio::test]
async fn only_the_answer_to_the_seal_query_is_taken_for_the_seal() {
    type Answer = fn(&str) -> Vec<u8>;
    let else_ = "an answer to something else";
    let unknown = "an unknown message behind a query";
    let cases: [(Answer, &str); 6] = [
        (|_| [fake::row("acme"), tagged(b'Z', b"I")].concat(), else_),
        (
            |number| {
                let foreseen = [fake::row("acme"), tagged(b'C', b"SELECT 1\0"), tagged(b'Z', b"I")];
                [foreseen.concat(), fake::row(&format!("{number}acme")), tagged(b'Z', b"I")]
                    .concat()
            },
            else_,
        ),
        (
            |number| {
                let foreseen = [tagged(b'C', b"SELECT 0\0"), tagged(b'Z', b"I")].concat();
                [foreseen, fake::row(&format!("{number}acme")), tagged(b'Z', b"I")].concat()
            },
            unknown,
        ),
        (|number| [fake::row(&format!("{number}acme")), tagged(b'Z', b"T")].concat(), unknown),
        (
            |number| {
                let seal = fake::row(&format!("{number}acme"));
                [seal.clone(), seal, tagged(b'Z', b"I")].concat()
            },
            "the database has no seal",
        ),
        (
            |number| {
                let fatal = tagged(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0");
                [fake::row(&format!("{number}acme")), tagged(b'Z', b"I"), fatal].concat()
            },
            "57P01: terminating connection",
        ),
    ];
    for (number, (answer, cause)) in cases.into_iter().enumerate() {
        let address = fake::database(answer).await;
        let proxy = Proxy::start().await;
        proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
        proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
        let event = proxy.event("refused", |_| true).await;
        let told = event["cause"].as_str().expect("a cause");
        assert!(told.contains(cause), "{number}: {told}");
    }
}

/// Servers that are like PostgreSQL may not let anything be cancelled.
#[tokio::test]
async fn a_database_without_cancel_keys_is_served() {
    let address = fake::serves(|mut tcp| async move {
        let mut sink = [0; 4096];
        let _let_in = fake::lets_in_with(&mut tcp, b"").await;
        let asked = tcp.read(&mut sink).await.unwrap_or_default();
        let question = String::from_utf8_lossy(&sink[..asked]).into_owned();
        let seal = fake::row(&format!("{}acme", fake::number_in(&question)));
        let _said = tcp.write_all(&[seal, tagged(b'Z', b"I")].concat()).await;
        while let Ok(1..) = tcp.read(&mut sink).await {
            let _said = tcp.write_all(&[fake::row("served"), tagged(b'Z', b"I")].concat()).await;
        }
    })
    .await;
    let proxy = Proxy::start().await;
    proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
    let mut client = Raw::unix(&proxy.socket()).await;
    let welcome = client.log_in(&mint::token("acme"), "acme").await;
    assert!(welcome.iter().all(|message| message.tag != b'K'), "{welcome:?}");
    assert_eq!(client.ask("SELECT 'served'").await, "served");
    // No client has a key, and an abandoned query is not cancelled.
    client.send(&query("SELECT 1")).await;
    drop(client);
    assert_eq!(proxy.event("ended", |_| true).await["ending"], "client_left");
}

#[tokio::test]
async fn a_database_that_trusts_everybody_is_refused() {
    let ok: &'static [u8] = Box::leak(tagged(b'R', &[0, 0, 0, 0]).into_boxed_slice());
    let address = fake::says(ok).await;
    let proxy = Proxy::start().await;
    proxy.place_acme_at(address.port(), "").await;
    proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    let event = proxy.event("refused", |_| true).await;
    assert!(event["cause"].as_str().expect("a cause").contains("pg_hba.conf says trust"));
}

#[tokio::test]
async fn sessions_of_a_window_share_a_lease_and_no_others_do() {
    let lease = "scope = \"window\"\nwindow = \"60s\"\n".to_owned();
    let proxy = Proxy::with(Settings { lease, ..Settings::default() }).await;
    let role_of = async |tenant: &str, access: &str, subject: &str| {
        let token = mint::token_with(tenant, json!({ "access": access, "sub": subject }));
        let client = proxy.connect(&token, tenant).await.expect("connected");
        let role = session_role(&client).await;
        (client, role)
    };
    let (a, b) = tokio::join!(
        role_of("acme", "read-write", "alice"),
        role_of("acme", "read-write", "alice")
    );
    let reader = role_of("acme", "read-only", "alice").await;
    let other = role_of("globex", "read-write", "alice").await;
    let colleague = role_of("acme", "read-write", "Alice").await;
    assert_eq!(a.1, b.1, "asked for once, however many come at once");
    assert_ne!(a.1, reader.1, "never across access levels");
    assert_ne!(a.1, other.1, "never across tenants");
    assert_ne!(a.1, colleague.1, "never across subjects");
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 4.0);
    // It stays in force for the ones that are left.
    drop(a.0);
    proxy.metric_reaches("pgsilo_sessions_active", 4.0).await;
    b.0.simple_query("SELECT 1").await.expect("still served");
}

/// A credential is for the database that its tenant had when it was asked for.
#[tokio::test]
async fn a_window_closes_when_its_tenants_entry_changes() {
    let lease = "scope = \"window\"\nwindow = \"60s\"\n".to_owned();
    let proxy = Proxy::with(Settings { lease, ..Settings::default() }).await;
    let role = async |tenant: &str| {
        let client = proxy.connect(&mint::token(tenant), tenant).await.expect("connected");
        session_role(&client).await
    };
    let (before, other) = (role("acme").await, role("globex").await);
    assert_eq!(role("acme").await, before);
    let tenants = proxy.tenants();
    let acme = "id = \"acme\"\n";
    assert!(tenants.contains(acme));
    proxy.reload(&tenants.replacen(acme, &format!("{acme}database_names = [\"books\"]\n"), 1));
    eventually("another lease", async || (role("acme").await != before).then_some(())).await;
    assert_eq!(role("globex").await, other, "its entry says what it said");
}

#[tokio::test]
async fn a_shared_lease_goes_with_its_last_session_once_its_window_is_over() {
    let lease = "scope = \"window\"\nwindow = \"100ms\"\n".to_owned();
    let proxy = Proxy::with(Settings { lease, ..Settings::default() }).await;
    let first = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    let role = session_role(&first).await;
    // A session that begins after the window has a lease of its own.
    let later = eventually("the window to be over", async || {
        let client = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
        (session_role(&client).await != role).then_some(client)
    })
    .await;
    drop(first);
    role_is_of_no_use(&role).await;
    later.simple_query("SELECT 1").await.expect("still served");
}

#[tokio::test]
async fn a_failure_is_shared_with_those_who_wait_and_not_with_those_who_come_later() {
    let lease = "scope = \"window\"\nwindow = \"60s\"\n".to_owned();
    let proxy = Proxy::with(Settings { lease, ..Settings::default() }).await;
    let registry = proxy.tenants();
    proxy.reload(&registry.replacen("tenant-acme-rw", "tenant-acme-nobody", 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    for _ in 0..2 {
        let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
        assert_eq!(error.code().map(|code| code.code()), Some("58000"));
    }
    eventually("both to be told of", async || (proxy.events("refused").len() == 2).then_some(()))
        .await;
    proxy.reload(&registry);
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 2.0).await;
    proxy.connect(&mint::token("acme"), "acme").await.expect("served");
}

/// A session may take its leased role's own name on, give it a password that it knows, and make
/// things that others depend on. Its end must take all of that with it.
#[tokio::test]
async fn a_leased_role_cannot_make_itself_undroppable() {
    let proxy = Proxy::start().await;
    let client = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    let role = session_role(&client).await;
    for sql in [
        "CREATE SCHEMA stuck; GRANT ALL ON SCHEMA stuck TO public",
        "SET ROLE NONE; ALTER ROLE CURRENT_USER PASSWORD 'known'",
        "CREATE TABLE stuck.t (x int); GRANT ALL ON stuck.t TO public",
        "SET ROLE tenant_acme_app; CREATE VIEW stuck.v AS SELECT * FROM stuck.t",
    ] {
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    drop(client);
    role_is_of_no_use(&role).await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world().var("PG_PORT").parse().expect("a port"));
    config.user(&role).password("known").dbname("tenant_acme");
    assert!(config.connect(tokio_postgres::NoTls).await.is_err(), "the password died with it");
}

#[tokio::test]
async fn endless_notices_during_the_seal_query_are_refused() {
    // It lets everybody in, then answers the question for the seal with notices without end.
    let address = fake::serves(|mut tcp| async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let _let_in = fake::lets_in(&mut tcp).await;
        let _seal = tcp.read(&mut [0; 4096]).await;
        let text = vec![b'x'; 60_000];
        while tcp.write_all(&tagged(b'N', &text)).await.is_ok() {}
    })
    .await;
    let proxy = Proxy::start().await;
    proxy.place_acme_at(address.port(), "auth = [\"scram-sha-256\", \"password\"]\n").await;
    let error = proxy.connect(&mint::token("acme"), "acme").await.expect_err("refused");
    assert_eq!(error.code().map(|code| code.code()), Some("58000"));
    let event = proxy.event("refused", |_| true).await;
    let cause = event["cause"].as_str().expect("a cause");
    assert!(cause.ends_with("more messages during its login than are believable"), "{cause}");
}

/// A session may hold the row of its own role, and refuse to be cancelled. Its end must not wait
/// for what it holds.
#[tokio::test]
async fn a_session_cannot_keep_its_role_after_revocation() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    let role = client.ask("SELECT session_user::text").await;
    let holds = "BEGIN; SET LOCAL ROLE NONE; ALTER ROLE CURRENT_USER PASSWORD 'mine';
        SET LOCAL ROLE tenant_acme_app; SELECT 'held'";
    assert_eq!(client.ask(holds).await, "held");
    let refuses = "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(90);
        EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$";
    let process = client.ask("SELECT pg_backend_pid()").await;
    client.send(&query(refuses)).await;
    world().waits_for(process, "PgSleep").await;
    drop(client);
    role_is_of_no_use(&role).await;
    let superuser = world().superuser("postgres").await;
    let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 OR (usename IS NULL AND wait_event = 'PgSleep')";
    let left: i64 = superuser.query_one(left, &[&role]).await.expect("asked").get(0);
    assert_eq!(left, 0, "and so is its session");
}
