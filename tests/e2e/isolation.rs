//! No way leads from one tenant to another: not by names, options, keys, messages or tokens.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, packet, query, startup};
use pgsilo_sandbox::testing::world::world;
use rustix::process::Signal;
use serde_json::json;
use tokio_postgres::error::SqlState;

async fn database(client: &tokio_postgres::Client) -> String {
    client.query_one("SELECT current_database()", &[]).await.expect("a row").get(0)
}

fn state(error: &tokio_postgres::Error) -> &SqlState {
    error.code().unwrap_or_else(|| panic!("no SQLSTATE: {error:?}"))
}

#[tokio::test]
async fn each_tenant_lands_in_its_own_database() {
    let proxy = Proxy::start().await;
    let acme = proxy.connect(&mint::token("acme"), "acme").await.expect("acme");
    let globex = proxy.connect(&mint::token("globex"), "globex").await.expect("globex");
    assert_eq!(database(&acme).await, "tenant_acme");
    assert_eq!(database(&globex).await, "tenant_globex");
    let count = "SELECT count(*) FROM customers";
    let rows = [&acme, &globex].map(|client| client.query_one(count, &[]));
    let [acme, globex]: [i64; 2] = futures_util::future::join_all(rows)
        .await
        .into_iter()
        .map(|row| row.expect("rows").get(0))
        .collect::<Vec<_>>()
        .try_into()
        .expect("two");
    assert_ne!(acme, globex, "the sandbox gives them different data");
}

/// A restore into a database whose name was only almost right replaced another's tables: a name
/// that is not one of the tenant's own leads nowhere, and reads the same whosever it is.
#[tokio::test]
async fn the_name_of_a_database_agrees_or_is_refused() {
    let tenants = |text: &str| {
        text.replacen("id = \"acme\"", "id = \"acme\"\ndatabase_names = [\"legacy\"]", 1)
    };
    let listeners = UNIX.to_owned() + "database_names = [\"postgres\"]\n";
    let proxy = Proxy::with(Settings { listeners, tenants, ..Settings::default() }).await;
    let token = mint::token("acme");
    for name in ["", "app", "acme", "tenant_acme", "legacy", "postgres"] {
        let client =
            proxy.connect(&token, name).await.unwrap_or_else(|error| panic!("{name:?}: {error}"));
        assert_eq!(database(&client).await, "tenant_acme", "{name:?}");
    }
    for name in [
        "globex",
        "tenant_globex",
        "acme_staging",
        "template1",
        "ACME",
        "acme ",
        "../acme",
        "nobody",
    ] {
        let error = proxy.connect(&token, name).await.expect_err("refused");
        let error = error.as_db_error().expect("an error of the server");
        assert_eq!(error.code(), &SqlState::UNDEFINED_DATABASE);
        assert_eq!(error.message(), format!("database \"{name}\" does not exist"));
        assert_eq!(error.hint(), Some("Name the tenant as the database."));
        let event = proxy.event("refused", |event| event["database"] == name).await;
        assert_eq!(event["reason"], "database_unknown");
        assert_eq!(event["cause"], "the database named belongs to none of: acme");
    }
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 6.0, "nothing was leased for the others");
}

#[tokio::test]
async fn the_name_of_a_user_never_selects_anything() {
    let proxy = Proxy::start().await;
    for user in
        ["globex", "postgres", "tenant_globex_app", "tenant-globex-rw", "pgsilo_provisioner"]
    {
        let mut client = Raw::unix(&proxy.socket()).await;
        // Without a database PostgreSQL would take the user's name for it.
        client.send(&startup(&[("user", user)])).await;
        client.send_password(&mint::token("acme")).await;
        client.until(b'Z').await;
        assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme", "{user}");
        assert!(client.ask("SELECT session_user::text").await.starts_with("tenant-acme-rw-"));
    }
}

/// CVE-2026-107349: `options` is the database's to parse, and cannot name another database.
#[tokio::test]
async fn options_lead_nowhere_and_cannot_forge_the_seal() {
    let proxy = Proxy::start().await;
    for options in [
        "-c pgsilo.tenant=globex",
        "--pgsilo.tenant=globex",
        "-c search_path=pg_temp,public -c pgsilo.tenant=globex",
        "-c role=tenant_acme_app",
    ] {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.send(&startup(&[("user", "app"), ("database", "acme"), ("options", options)])).await;
        client.send_password(&mint::token("acme")).await;
        client.until(b'Z').await;
        assert_eq!(client.ask("SELECT current_database()").await, "tenant_acme", "{options}");
    }
    // A role that is not granted is the database's to refuse, before anybody is let in.
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app"), ("options", "-c role=tenant_globex_app")])).await;
    client.send_password(&mint::token("acme")).await;
    assert_eq!(client.fatal().await.sqlstate(), "22023");
}

#[tokio::test]
async fn a_session_cannot_widen_itself() {
    let proxy = Proxy::start().await;
    let client = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    for sql in [
        "ALTER DATABASE tenant_acme SET pgsilo.tenant = 'globex'",
        "SET ROLE tenant_globex_app",
        "SET ROLE pgsilo_provisioner",
        "SET SESSION AUTHORIZATION postgres",
        "CREATE ROLE evil SUPERUSER LOGIN",
        "CREATE DATABASE evil",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'tenant_globex'",
        "CREATE EXTENSION dblink",
    ] {
        let outcome = client.batch_execute(sql).await;
        let harmless = sql.contains("pg_terminate_backend") && outcome.is_ok();
        assert!(outcome.is_err() || harmless, "{sql}");
    }
    assert_eq!(database(&client).await, "tenant_acme");
}

#[tokio::test]
async fn a_leased_password_works_for_its_own_role_and_database_only() {
    let world = world();
    let (status, answer) = world.bao("GET", "pgsilo/acme/creds/tenant-acme-rw", None).await;
    assert_eq!(status, 200);
    let (name, secret) = (&answer["data"]["username"], &answer["data"]["password"]);
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.var("PG_PORT").parse().expect("a port"));
    config.user(name.as_str().expect("a name")).password(secret.as_str().expect("a password"));
    for dbname in ["tenant_globex", "postgres", "template1"] {
        let error = config
            .dbname(dbname)
            .connect(tokio_postgres::NoTls)
            .await
            .map(|_| ())
            .expect_err("refused");
        assert_eq!(state(&error), &SqlState::INSUFFICIENT_PRIVILEGE, "{dbname}");
    }
    config.dbname("tenant_acme").connect(tokio_postgres::NoTls).await.map(|_| ()).expect("its own");
}

#[tokio::test]
async fn the_proxy_can_lease_and_nothing_else() {
    let world = world();
    let secret_id = std::fs::read_to_string(world.dir().join("secret-id")).expect("read");
    let login = json!({ "role_id": "pgsilo", "secret_id": secret_id.trim() });
    let (_status, answer) = world.bao("POST", "auth/approle/login", Some(login)).await;
    let token = answer["auth"]["client_token"].as_str().expect("a token").to_owned();
    let ask = async |method: &str, path: &str| {
        let url = format!("{}/v1/{path}", world.var("BAO_ADDR"));
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = reqwest::Client::new().request(method, url).header("X-Vault-Token", &token);
        request.json(&json!({})).send().await.expect("answered").status().as_u16()
    };
    assert_eq!(ask("GET", "pgsilo/acme/creds/tenant-acme-ro").await, 200);
    for (method, path) in [
        ("GET", "pgsilo/acme/config/tenant-acme"),
        ("GET", "pgsilo/acme/roles/tenant-acme-rw"),
        ("POST", "pgsilo/acme/roles/tenant-acme-rw"),
        ("POST", "pgsilo/acme/rotate-root/tenant-acme"),
        ("LIST", "pgsilo/acme/roles"),
        ("LIST", "sys/leases/lookup/pgsilo/acme/creds/tenant-acme-rw"),
        ("PUT", "sys/leases/revoke-prefix/pgsilo/acme/creds"),
        ("GET", "sys/policies/acl/pgsilo"),
        ("POST", "auth/token/create"),
        ("GET", "secret/data/anything"),
    ] {
        assert_eq!(ask(method, path).await, 403, "{method} {path}");
    }
    assert_eq!(ask("POST", "auth/token/revoke-self").await, 204);
}

#[tokio::test]
async fn a_second_startup_message_does_not_move_a_session() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token("acme"), "acme").await;
    client.send(&startup(&[("user", "app"), ("database", "globex")])).await;
    assert_eq!(client.message().await.sqlstate(), "08P01");
    assert_eq!(client.next().await, None);
    let event = proxy.event("ended", |_| true).await;
    assert_eq!((&event["tenant"], &event["ending"]), (&json!("acme"), &json!("backend_left")));
}

#[tokio::test]
async fn a_cancel_key_reaches_its_own_session_only() {
    let proxy = Proxy::start().await;
    let mut victim = Raw::unix(&proxy.socket()).await;
    let login = victim.log_in(&mint::token("globex"), "globex").await;
    let key = login.iter().find(|message| message.tag == b'K').expect("a key").body.clone();
    let pid: String = victim.ask("SELECT pg_backend_pid()::text").await;
    assert_eq!(
        u32::from_be_bytes(key[..4].try_into().expect("4")).to_string(),
        pid,
        "the real pid"
    );

    victim.send(&query("SELECT pg_sleep(600)")).await;
    let watcher = world().superuser("postgres").await;
    world().waits_for(&pid, "PgSleep").await;

    // The right pid with wrong secrets, of the right and of other lengths: nothing, no answer.
    for secret in [&[0u8, 0, 0, 0][..], &[1; 32], &[0; 256], &key[4..7]] {
        let mut stranger = Raw::tcp(proxy.address()).await;
        stranger.send(&packet(80_877_102, &[&key[..4], secret].concat())).await;
        stranger.silence().await;
    }
    proxy.metric_reaches("pgsilo_cancel_requests_total{result=\"unknown_key\"}", 4.0).await;
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1::text::int AND wait_event = 'PgSleep'";
    let row = watcher.query_one(sleeping, &[&pid]).await.expect("asked");
    assert_eq!(row.get::<_, i64>(0), 1, "it sleeps on");

    // The right one works, in clear too where TLS is required, and is not answered.
    let mut canceller = Raw::tcp(proxy.address()).await;
    canceller.send(&packet(80_877_102, &key)).await;
    canceller.silence().await;
    assert_eq!(victim.message().await.tag, b'T');
    assert_eq!(victim.message().await.sqlstate(), "57014");
    victim.until(b'Z').await;
    // The event says whose query that was, and those of the wrong keys are one until it is told how
    // many followed.
    let (started, cancelled) = (proxy.served(0).await, proxy.event("cancelled", |_| true).await);
    assert_eq!(cancelled["cancelled_session"], started["session"]);
    assert_eq!(
        (&cancelled["tenant"], &cancelled["pid"]),
        (&started["tenant"], &started["backend_pid"])
    );
    assert_ne!(cancelled["session"], started["session"]);
    let refused = proxy.events("cancel_refused");
    assert_eq!(refused.len(), 1);
    assert_eq!(
        (&refused[0]["address"], &refused[0]["reason"], &refused[0]["count"]),
        (&"127.0.0.1".into(), &"unknown_key".into(), &1.into())
    );

    // It dies with its session.
    drop(victim);
    proxy.event("ended", |_| true).await;
    let mut late = Raw::tcp(proxy.address()).await;
    late.send(&packet(80_877_102, &key)).await;
    late.silence().await;
    proxy.metric_reaches("pgsilo_cancel_requests_total{result=\"unknown_key\"}", 5.0).await;
}

#[tokio::test]
async fn the_secret_of_the_database_is_not_handed_out() {
    let proxy = Proxy::start().await;
    let mut client = Raw::unix(&proxy.socket()).await;
    let login = client.log_in(&mint::token("acme"), "acme").await;
    let key = login.iter().find(|message| message.tag == b'K').expect("a key").body.clone();
    let pid = client.ask("SELECT pg_backend_pid()::text").await;
    client.send(&query("SELECT pg_sleep(600)")).await;
    // A request that is there before the query cancels nothing.
    world().waits_for(&pid, "PgSleep").await;
    // Shown to the database itself, the key is nothing.
    let address = format!("127.0.0.1:{}", world().var("PG_PORT")).parse().expect("an address");
    let mut direct = Raw::tcp(address).await;
    direct.send(&packet(80_877_102, &key)).await;
    direct.silence().await;
    // Shown to pgsilo it works: the query was running until now.
    let mut canceller = Raw::tcp(proxy.address()).await;
    canceller.send(&packet(80_877_102, &key)).await;
    canceller.silence().await;
    assert_eq!(client.message().await.tag, b'T');
    assert_eq!(client.message().await.sqlstate(), "57014");
}

#[tokio::test]
async fn several_memberships_need_a_choice_among_them() {
    let proxy = Proxy::start().await;
    let token = mint::token_with("acme", json!({ "tenant": ["acme", "globex"] }));
    for (name, lands) in [("acme", "tenant_acme"), ("globex", "tenant_globex")] {
        let client = proxy.connect(&token, name).await.expect("a member");
        assert_eq!(database(&client).await, lands);
    }
    // None named (libpq names the user's), names that are none of its tenants'.
    for (name, sqlstate, reason) in [
        ("app", SqlState::INVALID_AUTHORIZATION_SPECIFICATION, "tenant_unresolved"),
        ("No Such Thing", SqlState::UNDEFINED_DATABASE, "database_unknown"),
        ("initech", SqlState::UNDEFINED_DATABASE, "database_unknown"),
    ] {
        let error = proxy.connect(&token, name).await.expect_err("refused");
        assert_eq!(state(&error), &sqlstate, "{name}");
        let hint = error.as_db_error().and_then(|error| error.hint());
        assert_eq!(hint, Some("Name the tenant as the database."));
        proxy
            .event("refused", |event| event["reason"] == reason && event["database"] == name)
            .await;
    }
    // Who does name one, but as the user too, is told what is in the way.
    let mut config = tokio_postgres::Config::new();
    config.host_path(proxy.dir()).port(6432).user("acme").password(&token).dbname("acme");
    let error = config.connect(tokio_postgres::NoTls).await.err().expect("refused");
    assert_eq!(state(&error), &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    let hint = error.as_db_error().and_then(|error| error.hint());
    assert_eq!(hint, Some("Name the tenant as the database, and not as the user as well."));
}

#[tokio::test]
async fn access_is_what_the_token_says() {
    let proxy = Proxy::start().await;
    let reader = mint::token_with("acme", json!({ "access": "read-only" }));
    let reader = proxy.connect(&reader, "acme").await.expect("connected");
    reader.query("SELECT * FROM customers", &[]).await.expect("reads");
    let error = reader.batch_execute("DELETE FROM customers").await.expect_err("does not write");
    assert_eq!(state(&error), &SqlState::INSUFFICIENT_PRIVILEGE);
    let role: String =
        reader.query_one("SELECT session_user::text", &[]).await.expect("a row").get(0);
    assert!(role.starts_with("tenant-acme-ro-"), "{role}");

    let unknown = mint::token_with("acme", json!({ "access": "superuser" }));
    let error = proxy.connect(&unknown, "acme").await.expect_err("refused");
    assert_eq!(state(&error), &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    let event = proxy.event("refused", |_| true).await;
    let found = r#"found "superuser" at access, expected "migrate" or "read-only" or "read-write""#;
    assert_eq!(event["cause"], format!("the access claim names no access level: {found}"));
}

#[tokio::test]
async fn forged_tokens_reach_nothing() {
    let proxy = Proxy::start().await;
    let good = mint::token("acme");
    let part = |n: usize| good.split('.').nth(n).expect("a part").to_owned();
    let other = mint::token("globex");
    let mixed = format!("{}.{}.{}", part(0), other.split('.').nth(1).expect("claims"), part(2));
    // {"alg":"none","typ":"JWT"}
    let none = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", part(1));
    let cases = [
        mixed,
        none,
        format!("{}.{}.", part(0), part(1)),
        format!("{good}x"),
        good.to_uppercase(),
        mint::token_with("acme", json!({ "aud": "someone-else" })),
        mint::token_with("acme", json!({ "iss": "https://elsewhere.invalid" })),
        mint::token_with("acme", json!({ "exp": null })),
        mint::token_with("acme", json!({ "exp": (mint::now() + 600).to_string() })),
        mint::token_with("acme", json!({ "nbf": mint::now() + 600 })),
        mint::token_with("acme", json!({ "sub": null })),
        "postgres".to_owned(),
    ];
    for token in cases {
        let error = proxy.connect(&token, "acme").await.expect_err("refused");
        assert_eq!(state(&error), &SqlState::INVALID_PASSWORD);
        let text = error.as_db_error().expect("an error of the server").message();
        assert_eq!(text, "session token authentication failed");
    }
    assert_eq!(proxy.metric("pgsilo_sessions_total").await, 0.0);
    assert_eq!(proxy.metric("pgsilo_leases_total").await, 0.0, "OpenBAO was not even asked");
}

#[tokio::test]
async fn a_reload_that_suspends_a_tenant_ends_its_sessions_and_no_others() {
    let proxy = Proxy::start().await;
    let mut acme = Raw::unix(&proxy.socket()).await;
    acme.log_in(&mint::token("acme"), "acme").await;
    let mut globex = Raw::unix(&proxy.socket()).await;
    globex.log_in(&mint::token("globex"), "globex").await;

    let registry =
        proxy.tenants().replacen("id = \"acme\"", "id = \"acme\"\nstate = \"suspended\"", 1);
    proxy.reload(&registry);
    let error = acme.fatal().await;
    assert_eq!(error.sqlstate(), "57P01");
    assert_eq!(
        error.field(b'M').as_deref(),
        Some("terminating connection due to administrator command")
    );
    let event = proxy.event("ended", |_| true).await;
    assert_eq!((&event["tenant"], &event["ending"]), (&json!("acme"), &json!("tenant_withdrawn")));
    assert_eq!(globex.ask("SELECT current_database()").await, "tenant_globex");
}

#[tokio::test]
async fn an_invalid_registry_changes_nothing_and_is_logged_as_an_error() {
    let proxy = Proxy::with(Settings::default()).await;
    let mut session = Raw::unix(&proxy.socket()).await;
    session.log_in(&mint::token("acme"), "acme").await;
    let twice = proxy.tenants().replacen("id = \"globex\"", "id = \"acme\"", 1);
    proxy.reload(&twice);
    let line = proxy.logged(|line| line["level"] == "ERROR").await;
    let error = line["error"].as_str().expect("an error");
    assert!(error.contains("tenants.toml:") && error.contains("acme"), "{error}");
    assert_eq!(session.ask("SELECT current_database()").await, "tenant_acme");
    proxy.connect(&mint::token("globex"), "globex").await.expect("still served");
    proxy.signal(Signal::HUP);
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"error\"}", 2.0).await;
}
