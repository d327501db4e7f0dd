//! `pgsiloctl leases audit`: it finds what pgsilo and OpenBAO lost, takes back just that, and
//! leaves running sessions alone. It works with the provisioner's rights, as an operator would.

use std::process::Output;

use pgsilo_sandbox::testing::driver::output;
use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::Raw;
use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint};
use serde_json::{Value, json};
use tokio::process::Command;

pub(crate) async fn world_and_proxy() -> (World, Proxy) {
    let world = World::own().await;
    let proxy = Proxy::of(&world, settings_of(&world)).await;
    (world, proxy)
}

/// Of a proxy that leases from that world's OpenBAO.
pub(crate) fn settings_of(world: &World) -> Settings {
    let openbao = format!(
        "address = \"{}\"\nauth = {{ approle = {{ role_id = \"pgsilo\", secret_id_file = \"{}\" }} }}\n",
        world.var("BAO_ADDR"),
        world.dir().join("secret-id").display()
    );
    Settings { openbao, ..Settings::default() }
}

pub(crate) fn command(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(programs::pgsiloctl());
    command.args(["leases", "audit", "--settle", "1s"]).args(arguments);
    for name in ["PGSILO_REGISTRY", "PROVISIONER_DSN", "PROVISIONER_BAO_TOKEN", "BAO_ADDR"] {
        command.env(name, world.var(name));
    }
    command
}

/// Its exit code and findings.
pub(crate) async fn audit(world: &World, arguments: &[&str]) -> (i32, Vec<Value>) {
    audited(&mut command(world, arguments)).await
}

/// The same of a command.
pub(crate) async fn audited(command: &mut Command) -> (i32, Vec<Value>) {
    let output = output(command.arg("--json")).await;
    let said = text(&output.stdout);
    let objects = said.lines().map(|line| serde_json::from_str(line).expect("an object a line"));
    let (findings, unseen): (Vec<Value>, Vec<Value>) =
        objects.partition(|object: &Value| object["unseen"].is_null());
    let said = text(&output.stderr);
    for one in unseen {
        let what = one["unseen"].as_str().expect("what");
        assert!(said.contains(&format!("pgsiloctl: error: {what}: ")), "{said}");
    }
    assert!(said.contains(&format!(": {} finding", findings.len())), "{said}");
    (code(&output), findings)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

async fn session(world: &World, proxy: &Proxy) -> (Raw, String) {
    let mut client = Raw::unix(&proxy.socket()).await;
    client.log_in(&mint::token_of(world, "acme"), "acme").await;
    let role = client.ask("SELECT session_user::text").await;
    (client, role)
}

/// An unused credential, as an operator leases one by hand: its role and its lease.
async fn lease_by_hand(world: &World) -> (String, String) {
    let (status, answer) = world.bao("GET", "pgsilo/acme/creds/tenant-acme-rw", None).await;
    assert_eq!(status, 200);
    let text = |pointer| answer.pointer(pointer).and_then(Value::as_str).expect("text").to_owned();
    (text("/data/username"), text("/lease_id"))
}

async fn roles(world: &World) -> Vec<String> {
    let superuser = world.superuser("postgres").await;
    let query = "SELECT rolname::text FROM pg_roles WHERE rolname ~ '^tenant-.*-[A-Za-z0-9]{20}$'";
    let rows = superuser.query(query, &[]).await.expect("asked");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn an_audit_of_a_healthy_deployment_finds_nothing() {
    let (world, proxy) = world_and_proxy().await;
    assert_eq!(audit(&world, &[]).await, (0, vec![]));
    let mut sessions = Vec::new();
    for _ in 0..12 {
        sessions.push(session(&world, &proxy).await);
    }
    assert_eq!(audit(&world, &["--fix"]).await, (0, vec![]));
    for (client, _role) in &mut sessions {
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    }
}

/// Makes OpenBAO forget leases and leave their roles, as one restored from a backup does.
async fn forget_leases(world: &World) {
    let statements = revoke_with(world, json!(["SELECT 1"])).await;
    let all = "sys/leases/revoke-prefix/pgsilo/acme/creds/tenant-acme-rw";
    assert_eq!(world.bao("PUT", all, Some(json!({ "sync": true }))).await.0, 204);
    revoke_with(world, statements).await;
}

/// Changes how OpenBAO revokes acme's read-write leases; how it did before.
async fn revoke_with(world: &World, statements: Value) -> Value {
    let role = "pgsilo/acme/roles/tenant-acme-rw";
    let (_status, answer) = world.bao("GET", role, None).await;
    let mut changed = answer["data"].clone();
    let before = std::mem::replace(&mut changed["revocation_statements"], statements);
    assert_eq!(world.bao("POST", role, Some(changed)).await.0, 204);
    before
}

#[tokio::test]
async fn a_role_that_no_lease_explains_is_dropped_with_its_sessions_and_nothing_else() {
    let (world, proxy) = world_and_proxy().await;
    let (mut lost, role) = session(&world, &proxy).await;
    lost.ask("CREATE TABLE kept AS SELECT 7 AS n; SELECT 'made'").await;
    forget_leases(&world).await;
    assert_eq!(lost.ask("SELECT 'alive'").await, "alive", "nothing has ended it");
    // One of the same moment whose lease is in force.
    let (mut kept, _) = session(&world, &proxy).await;

    let (code, findings) = audit(&world, &["--tenant", "globex"]).await;
    assert_eq!((code, findings), (0, vec![]), "another tenant's");
    // Which of two in use has no lease cannot be told by their ends, so nothing is touched.
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!(code, 3, "{findings:?}");
    assert_eq!(
        (&findings[0]["finding"], &findings[0]["unexplained"]),
        (&json!("doubtful"), &json!(1))
    );
    assert_eq!(kept.ask("SELECT 'alive'").await, "alive");
    let pid: u32 = kept.ask("SELECT pg_backend_pid()::text").await.parse().expect("a pid");
    drop(kept);
    proxy.event("ended", |event| event["backend_pid"] == pid).await;
    eventually("its role to be gone", async || (roles(&world).await.len() == 1).then_some(()))
        .await;

    let (code, findings) = audit(&world, &["--fix"]).await;
    let expected = json!({
        "tenant": "acme", "finding": "orphan_role", "role": role, "sessions": 1,
        "outcome": "mended",
    });
    assert_eq!((code, findings), (0, vec![expected]));
    assert_eq!(lost.fatal().await.sqlstate(), "57P01");
    assert_eq!(roles(&world).await, Vec::<String>::new());
    let owner = "SELECT tableowner::text FROM pg_tables WHERE tablename = 'kept'";
    let (mut after, _) = session(&world, &proxy).await;
    assert_eq!(after.ask(owner).await, "tenant_acme_app");
    // The provisioner is a member of no tenant's role afterwards.
    let superuser = world.superuser("postgres").await;
    let member = "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member
        WHERE r.rolname = 'pgsilo_provisioner' AND (m.set_option OR m.inherit_option)
            AND m.roleid NOT IN
                ('pg_signal_backend'::regrole, 'pg_use_reserved_connections'::regrole)";
    assert_eq!(superuser.query_one(member, &[]).await.expect("asked").get::<_, i64>(0), 0);
}

#[tokio::test]
async fn a_lease_that_no_session_uses_is_found_and_revoked_with_its_role() {
    let (world, _proxy) = world_and_proxy().await;
    let (role, lease) = lease_by_hand(&world).await;
    let (code, findings) = audit(&world, &[]).await;
    assert_eq!(code, 3);
    let expected = json!({
        "tenant": "acme", "finding": "idle_roles", "roles": [role], "leases": [lease],
        "exact": true, "outcome": "left",
    });
    assert_eq!(findings, [expected]);
    assert_eq!(roles(&world).await, [role], "an audit alone changes nothing");

    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")));
    assert_eq!(roles(&world).await, Vec::<String>::new());
    assert_eq!(world.leases("tenant-acme-rw").await, Vec::<String>::new());
}

#[tokio::test]
async fn an_idle_role_is_dropped_and_sessions_of_the_same_moment_stay() {
    let (world, proxy) = world_and_proxy().await;
    let mut sessions = vec![session(&world, &proxy).await];
    let (unused, _lease) = lease_by_hand(&world).await;
    sessions.push(session(&world, &proxy).await);

    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!(code, 0, "{findings:?}");
    assert_eq!((&findings[0]["roles"], &findings[0]["exact"]), (&json!([unused]), &json!(false)));
    let mut left = roles(&world).await;
    let mut used: Vec<_> = sessions.iter().map(|(_, role)| role.clone()).collect();
    left.sort();
    used.sort();
    assert_eq!(left, used);
    for (client, _role) in &mut sessions {
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    }
    // Its lease is one of three: it is told, and not guessed.
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["finding"]), (3, &json!("surplus")));
    drop(sessions);
    eventually("the sessions' leases to be gone", async || {
        (world.leases("tenant-acme-rw").await.len() == 1).then_some(())
    })
    .await;
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["finding"]), (0, &json!("roleless_lease")));
    assert_eq!(world.leases("tenant-acme-rw").await, Vec::<String>::new());
}

#[tokio::test]
async fn an_audit_reports_what_it_cannot_reach_and_checks_the_rest() {
    let (world, _proxy) = world_and_proxy().await;
    lease_by_hand(&world).await;
    // globex, the other one, is nowhere.
    let registry = std::fs::read_to_string(world.var("PGSILO_REGISTRY")).expect("read");
    let (acme, globex) = registry.split_once("id = \"globex\"").expect("both tenants");
    let port = format!("port = {}", world.var("PG_PORT"));
    let globex = globex.replace(&port, "port = 1");
    let broken = world.dir().join("broken.toml");
    std::fs::write(&broken, format!("{acme}id = \"globex\"{globex}")).expect("written");
    let registry = broken.to_str().expect("UTF-8");
    let outcome = output(&mut command(&world, &["--registry", registry])).await;
    let (said, progress) = (text(&outcome.stdout), text(&outcome.stderr));
    assert_eq!(code(&outcome), 1);
    assert!(said.starts_with("acme  idle_roles  tenant-acme-rw-"), "{said}");
    assert!(
        progress.contains("tenant globex: logging in to 127.0.0.1:1/tenant_globex"),
        "{progress}"
    );

    // Each mistake has its line, and none shows a secret.
    let password = world.var("PROVISIONER_DSN").split([':', '@']).nth(2).expect("a password");
    let wrong: [(&[&str], &str); 5] = [
        (&["--tenant", "nobody"], "no tenant \"nobody\""),
        (&["--registry", "/nonexistent"], "/nonexistent"),
        (&["--bao", "http://bao.example"], "use https"),
        (&["--provisioner", "postgresql://pgsilo_provisioner@h"], "no password"),
        (&["--bao-token-file", "/nonexistent"], "/nonexistent"),
    ];
    for (arguments, expected) in wrong {
        let outcome = output(&mut command(&world, arguments)).await;
        let progress = text(&outcome.stderr);
        assert_eq!(code(&outcome), 1, "{arguments:?}");
        assert!(progress.contains(expected), "{arguments:?}: {progress}");
        assert!(!progress.contains(password), "{progress}");
    }
    let mut stranger = command(&world, &[]);
    let outcome = output(stranger.env("PROVISIONER_BAO_TOKEN", "s.wrong")).await;
    assert_eq!(code(&outcome), 1);
    assert!(text(&outcome.stderr).contains("403"), "{}", text(&outcome.stderr));
    assert!(!text(&outcome.stderr).contains("s.wrong"));
}

/// Roles and leases are told to belong together by VALID UNTIL. Without it all would be accused.
#[tokio::test]
async fn a_role_whose_statements_set_no_valid_until_is_not_judged() {
    let (world, proxy) = world_and_proxy().await;
    let (_status, answer) = world.bao("GET", "pgsilo/acme/roles/tenant-acme-ro", None).await;
    let mut changed = answer["data"].clone();
    changed["renew_statements"] = json!(["SELECT 1"]);
    world.bao("POST", "pgsilo/acme/roles/tenant-acme-ro", Some(changed)).await;
    let (mut client, _role) = session(&world, &proxy).await;
    let outcome = output(&mut command(&world, &["--fix"])).await;
    assert_eq!(code(&outcome), 1);
    let said = text(&outcome.stderr);
    assert!(said.contains("role tenant-acme-ro of OpenBAO cannot be audited"), "{said}");
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

#[tokio::test]
async fn the_provisioner_may_take_tenants_leases_back_and_read_no_credential() {
    let world = World::own().await;
    let (_role, lease) = lease_by_hand(&world).await;
    let ask = async |method: &str, path: &str, body: Option<Value>| {
        let url = format!("{}/v1/{path}", world.var("BAO_ADDR"));
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let token = world.var("PROVISIONER_BAO_TOKEN");
        let mut request =
            reqwest::Client::new().request(method, url).header("X-Vault-Token", token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        request.send().await.expect("answered").status().as_u16()
    };
    for (method, path, body) in [
        ("GET", "pgsilo/acme/creds/tenant-acme-rw", None),
        ("PUT", "sys/leases/lookup", Some(json!({ "lease_id": "auth/approle/login/x" }))),
        ("LIST", "sys/leases/lookup/auth/approle/login", None),
        ("PUT", "sys/leases/revoke", Some(json!({ "lease_id": lease }))),
        ("PUT", "sys/leases/revoke-prefix/pgsilo/acme/creds/tenant-acme-rw", Some(json!({}))),
        ("PUT", "sys/leases/revoke-force/pgsilo/acme/creds/tenant-acme-rw", Some(json!({}))),
        ("PUT", "sys/leases/revoke/auth/approle/login/x", Some(json!({}))),
        ("LIST", "auth/token/accessors", None),
    ] {
        assert_eq!(ask(method, path, body).await, 403, "{method} {path}");
    }
    let lookup = Some(json!({ "lease_id": lease }));
    assert_eq!(ask("PUT", "sys/leases/lookup", lookup).await, 200);
    let revoke = format!("sys/leases/revoke/{lease}");
    assert_eq!(ask("PUT", &revoke, Some(json!({ "sync": true }))).await, 204);
}

/// It is revoked all the same, and dropped when nothing depends on it any more.
#[tokio::test]
async fn a_role_that_somebody_holds_on_to_is_stopped_and_told_and_dropped_later() {
    let (world, proxy) = world_and_proxy().await;
    let (mut client, role) = session(&world, &proxy).await;
    // As its own name it makes what somebody else then holds a lock on.
    client.ask("CREATE SCHEMA stuck; GRANT ALL ON SCHEMA stuck TO public; SELECT 'made'").await;
    client.ask("SET ROLE NONE; CREATE TABLE stuck.t (n int); SELECT 'made'").await;
    let holder = world.superuser("tenant_acme").await;
    holder.batch_execute("BEGIN; LOCK TABLE stuck.t").await.expect("locked");
    drop(client);
    proxy.event("ended", |event| event["role"] == role.as_str()).await;
    proxy.metric_reaches("pgsilo_revocations_pending", 0.0).await;
    eventually("its lease to be revoked", async || {
        world.leases("tenant-acme-rw").await.is_empty().then_some(())
    })
    .await;
    assert_eq!(roles(&world).await, [role.as_str()], "it waits for the lock");
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["finding"]), (1, &json!("stopped_role")));
    let why = findings[0]["outcome"]["failed"].as_str().expect("why");
    assert!(why.contains("nobody can log in: objects depend on it"), "{why}");
    assert_eq!(roles(&world).await, [role.as_str()]);
    holder.batch_execute("ROLLBACK").await.expect("let go");
    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
    assert_eq!(roles(&world).await, Vec::<String>::new());
}

/// An audit that could not tell says so, and has not succeeded.
#[tokio::test]
async fn a_role_that_may_be_of_a_lease_that_openbao_cannot_revoke_is_told() {
    let (world, _proxy) = world_and_proxy().await;
    let (lost, _lease) = lease_by_hand(&world).await;
    forget_leases(&world).await;
    // One whose revocation does not work.
    revoke_with(&world, json!(["SELECT 1 / 0"])).await;
    let (stuck, lease) = lease_by_hand(&world).await;
    let revoke = json!({ "lease_id": lease, "sync": false });
    assert_eq!(world.bao("PUT", "sys/leases/revoke", Some(revoke)).await.0, 202);

    let (code, findings) = audit(&world, &["--fix"]).await;
    assert_eq!((code, findings.len()), (3, 1), "{findings:?}");
    let mut told = vec![lost.as_str(), stuck.as_str()];
    told.sort_unstable();
    let mut roles_told: Vec<_> =
        findings[0]["roles"].as_array().expect("roles").iter().filter_map(Value::as_str).collect();
    roles_told.sort_unstable();
    assert_eq!(roles_told, told);
    assert_eq!(
        (&findings[0]["finding"], &findings[0]["outcome"]),
        (&json!("undecided"), &json!("left"))
    );
    assert_eq!(findings[0]["leases"], json!([lease]));
    assert_eq!(roles(&world).await.len(), 2, "nothing is done that may be wrong");
}

/// Sessions that end all the time are leases that are being revoked all the time.
#[tokio::test]
async fn a_busy_tenants_orphan_is_found_and_dropped() {
    let (world, proxy) = world_and_proxy().await;
    let (lost, _lease) = lease_by_hand(&world).await;
    forget_leases(&world).await;
    let churn = async {
        loop {
            drop(session(&world, &proxy).await);
        }
    };
    let audits = async {
        // Leases of the same moment may be its: it is told as the orphan of none, or as idle.
        let (code, findings) = audit(&world, &[]).await;
        assert_eq!(code, 3, "{findings:?}");
        assert!(findings[0].to_string().contains(&lost), "{findings:?}");
        let (code, findings) = audit(&world, &["--fix"]).await;
        assert_eq!((code, &findings[0]["outcome"]), (0, &json!("mended")), "{findings:?}");
        assert!(!roles(&world).await.contains(&lost));
    };
    tokio::select! {
        () = audits => {}
        () = churn => {}
    }
}

/// Renewals and logins go on while it looks.
#[tokio::test]
async fn concurrent_sessions_are_never_reported_by_an_audit() {
    let world = World::own().await;
    let (_status, answer) = world.bao("GET", "pgsilo/acme/roles/tenant-acme-rw", None).await;
    let mut changed = answer["data"].clone();
    changed["default_ttl"] = "4s".into();
    changed["max_ttl"] = "1h".into();
    assert_eq!(world.bao("POST", "pgsilo/acme/roles/tenant-acme-rw", Some(changed)).await.0, 204);
    let lease = "scope = \"window\"\nwindow = \"1s\"\n".to_owned();
    let settings = Settings { lease, ..settings_of(&world) };
    let proxy = Proxy::of(&world, settings).await;
    let mut long = Vec::new();
    for _ in 0..4 {
        long.push(session(&world, &proxy).await);
    }
    let audits = async {
        for _ in 0..6 {
            assert_eq!(audit(&world, &["--fix"]).await, (0, vec![]));
        }
    };
    let churn = async {
        loop {
            drop(session(&world, &proxy).await);
        }
    };
    tokio::select! {
        () = audits => {}
        () = churn => {}
    }
    proxy.metric_reaches("pgsilo_renewals_total", 4.0).await;
    for (client, _role) in &mut long {
        assert_eq!(client.ask("SELECT 'alive'").await, "alive");
    }
}

#[tokio::test]
async fn roles_with_another_username_template_are_not_judged() {
    let (world, proxy) = world_and_proxy().await;
    let (mut client, _role) = session(&world, &proxy).await;
    let other = json!({
        "username_template": "{{ .RoleName }}-{{ random 12 }}", "verify_connection": false,
    });
    let (status, answer) = world.bao("POST", "pgsilo/acme/config/tenant-acme", Some(other)).await;
    assert!((200..300).contains(&status), "{answer}");
    let outcome = output(&mut command(&world, &["--fix"])).await;
    assert_eq!(code(&outcome), 1);
    let said = text(&outcome.stderr);
    assert!(said.contains("username_template of its database is not"), "{said}");
    assert_eq!(client.ask("SELECT 'alive'").await, "alive");
}

/// A server that was taken over asks for the provisioner's password itself.
#[tokio::test]
async fn the_provisioners_password_is_not_given_to_a_server_over_a_network() {
    let (world, _proxy) = world_and_proxy().await;
    let registry = std::fs::read_to_string(world.var("PGSILO_REGISTRY")).expect("read");
    let elsewhere = registry.replace("host = \"127.0.0.1\"", "host = \"192.0.2.1\"");
    assert_ne!(elsewhere, registry);
    let file = world.dir().join("elsewhere.toml");
    std::fs::write(&file, elsewhere).expect("written");
    let registry = file.to_str().expect("UTF-8");
    let outcome = output(&mut command(&world, &["--registry", registry])).await;
    assert_eq!(code(&outcome), 1);
    assert!(text(&outcome.stderr).contains("its placement has no TLS"));
}
