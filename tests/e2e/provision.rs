//! `pgsiloctl bootstrap` and `pgsiloctl tenant create | check | prepare | delete`: tenants' whole life, against
//! a cluster and an OpenBAO that were made ready by these commands, by who may do no more than they need.

mod killed;

use std::process::Output;

use pgsilo_sandbox::testing::world::World;
use pgsilo_sandbox::testing::{eventually, mint, programs};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_postgres::{Client, Config, NoTls};

/// A sandbox whose proxy reads the registry's database.
async fn served() -> World {
    World::of_registry(&["--max-connections", "200"]).await
}

/// The same without a proxy.
async fn not_served() -> World {
    World::of_registry(&["--without-proxy", "--leased-over-tcp"]).await
}

/// `pgsiloctl`, as an operator of this sandbox runs it.
fn operator(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(programs::pgsiloctl());
    command.args(arguments).env("PGSILOCTL_CONFIG", world.var("PGSILOCTL_CONFIG"));
    command.env("BAO_TOKEN", world.var("BAO_TOKEN"));
    command.env("PGSILO_ADMIN_DSN", world.var("PG_SUPERUSER_DSN"));
    command.env_remove("PROVISIONER_DSN").env_remove("PROVISIONER_BAO_TOKEN").kill_on_drop(true);
    command
}

/// What it says on both streams, and its exit code.
async fn says(world: &World, arguments: &[&str]) -> (i32, String) {
    let output: Output = operator(world, arguments).output().await.expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("a code"), String::from_utf8(said).expect("text"))
}

async fn does(world: &World, arguments: &[&str]) -> String {
    let (code, said) = says(world, arguments).await;
    assert_eq!(code, 0, "{arguments:?}: {said}");
    said
}

async fn fails(world: &World, arguments: &[&str], expected: &str) {
    let (code, said) = says(world, arguments).await;
    assert!(code == 1 && said.contains(expected), "{arguments:?}: {code} {said}");
}

/// A session of a tenant, through the sandbox's own proxy.
async fn session(world: &World, tenant: &str) -> Result<Client, tokio_postgres::Error> {
    let port = world.var("PGSILO_PORT").parse().expect("a port");
    let token = mint::token_of(world, tenant);
    let mut config = Config::new();
    config.host_path(world.var("PGSILO_SOCKET_DIR")).port(port).user("app");
    let (client, connection) = config.password(token).dbname(tenant).connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn sqlstate(world: &World, tenant: &str) -> String {
    let error = session(world, tenant).await.expect_err("refused");
    error.code().expect("PostgreSQL's").code().to_owned()
}

/// All that a cluster, OpenBAO and the registry call by a tenant's id or a name in PostgreSQL.
async fn left_of(world: &World, name: &str) -> Vec<String> {
    let cluster = world.superuser("postgres").await;
    let names = "SELECT 'database ' || datname FROM pg_database WHERE strpos(datname, $1) > 0
        UNION ALL SELECT 'role ' || rolname FROM pg_roles WHERE strpos(rolname, $1) > 0
        UNION ALL SELECT 'setting ' || setconfig::text FROM pg_db_role_setting WHERE strpos(setconfig::text, $1) > 0
        UNION ALL SELECT 'comment ' || description FROM pg_shdescription WHERE strpos(description, $1) > 0";
    let rows = cluster.query(names, &[&name]).await.expect("asked");
    let mut left: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let (_, mounts) = world.bao("GET", "sys/mounts", None).await;
    let mounts = mounts["data"].as_object().expect("mounts").keys();
    left.extend(mounts.filter(|path| path.contains(name)).map(|path| format!("mount {path}")));
    let registry = world.superuser("pgsilo_registry").await;
    let rows = "SELECT 'tenant ' || id FROM pgsilo.tenants WHERE strpos(id, $1) > 0
        UNION ALL SELECT 'placement ' || tenant FROM pgsilo.placements WHERE strpos(dbname, $1) > 0
        UNION ALL SELECT 'prepared ' || name FROM pgsilo.prepared WHERE strpos(name, $1) > 0
        UNION ALL SELECT 'operation ' || subject FROM pgsilo.operations WHERE strpos(subject, $1) > 0 AND ended_at IS NULL";
    let rows = registry.query(rows, &[&name]).await.expect("asked");
    left.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    left
}

/// What PostgreSQL calls a tenant.
async fn database_of(world: &World, tenant: &str) -> String {
    let shown = does(world, &["tenant", "show", tenant, "--json"]).await;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown["database"].as_str().expect("a name").to_owned()
}

#[tokio::test]
async fn a_tenant_is_made_is_served_and_is_removed_with_a_certificate() {
    let world = served().await;
    let made = does(&world, &["tenant", "create", "initech", "--alias", "org_7", "--json"]).await;
    let made: Value = serde_json::from_str(made.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&made["id"], &made["cluster"]), (&json!("initech"), &json!("sandbox")));
    let database = made["database"].as_str().expect("a name").to_owned();
    let name = database.strip_prefix("tenant_").expect("its prefix").to_owned();

    let client = session(&world, "initech").await.expect("served");
    let asked = "SELECT current_database(), session_user::text, current_user::text";
    let row = client.query_one(asked, &[]).await.expect("asked");
    let leased: String = row.get(1);
    assert_eq!(row.get::<_, String>(0), database);
    assert!(leased.starts_with(&format!("tenant-{name}-rw-")), "{leased}");
    assert_eq!(row.get::<_, String>(2), format!("{database}_app"));
    // Whoever shares the cluster reads nothing of who this is.
    assert_eq!(left_of(&world, "initech").await, ["mount pgsilo/initech/", "tenant initech"]);

    let checked = does(&world, &["tenant", "check", "initech", "--json"]).await;
    let lines: Vec<Value> =
        checked.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let checks: Vec<_> = lines.iter().map(|line| (&line["check"], &line["ok"])).collect();
    let all = ["registry", "read-only", "read-write", "migrate"].map(|check| json!(check));
    assert_eq!(checks, all.iter().map(|check| (check, &Value::Bool(true))).collect::<Vec<_>>());
    does(&world, &["registry", "check"]).await;
    does(&world, &["leases", "audit", "--settle", "1s"]).await;

    // It is refused, and what it was before comes back.
    does(&world, &["tenant", "suspend", "initech"]).await;
    client.simple_query("SELECT 1").await.expect_err("its session has ended");
    let told = does(&world, &["tenant", "delete", "initech", "--grace", "1h"]).await;
    assert!(told.contains("pgsiloctl tenant undelete initech"), "{told}");
    fails(&world, &["tenant", "resume", "initech"], "is being deleted").await;
    // A second one gives no more time.
    let again = does(&world, &["tenant", "delete", "initech", "--grace", "2h"]).await;
    assert_eq!(again.lines().last(), told.lines().last());
    does(&world, &["tenant", "purge"]).await;
    assert_eq!(sqlstate(&world, "initech").await, "42501");
    does(&world, &["tenant", "undelete", "initech"]).await;
    let shown = does(&world, &["tenant", "show", "initech"]).await;
    assert!(shown.contains("state           suspended"), "{shown}");
    does(&world, &["tenant", "resume", "initech"]).await;
    let client = session(&world, "initech").await.expect("served again");
    client.batch_execute("CREATE TABLE kept (id int)").await.expect("written");

    // Not by a slip of the hand.
    fails(&world, &["tenant", "delete", "initech", "--now"], "--now needs --confirm initech").await;
    let slip = ["tenant", "delete", "initech", "--now", "--confirm", "acme"];
    fails(&world, &slip, "nothing was done").await;
    client.simple_query("SELECT 1").await.expect("it was not touched");
    let delete = [
        "tenant",
        "delete",
        "initech",
        "--now",
        "--confirm",
        "initech",
        "--reason",
        "contract ended",
    ];
    does(&world, &delete).await;
    assert!(client.is_closed() || client.simple_query("SELECT 1").await.is_err());
    assert_eq!(sqlstate(&world, "initech").await, "3D000");
    assert_eq!(left_of(&world, "initech").await, Vec::<String>::new());
    assert_eq!(left_of(&world, &name).await, Vec::<String>::new());
    let (_, leases) = world.bao("LIST", "sys/leases/lookup/pgsilo/initech", None).await;
    assert_eq!(leases["data"]["keys"], Value::Null);

    let certificate = does(&world, &["certificate", "show", "initech", "--json"]).await;
    let told = does(&world, &["certificate", "show", "initech"]).await;
    for expected in [&database, "contract ended", "pgsilo/initech", "write-ahead log"] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    let key = does(&world, &["certificate", "key"]).await;
    let check = async |certificate: &str, key: &str| {
        let (file, key_file) = (world.dir().join("certificate"), world.dir().join("key"));
        std::fs::write(&file, certificate).expect("written");
        std::fs::write(&key_file, key).expect("written");
        let paths = [file, key_file].map(|path| path.to_string_lossy().into_owned());
        // Without OpenBAO, the registry and the file of settings.
        let mut command = Command::new(programs::pgsiloctl());
        command.args(["certificate", "check", &paths[0], "--key", &paths[1]]);
        let output = command.env_clear().output().await.expect("it runs");
        (
            output.status.code(),
            String::from_utf8([output.stdout, output.stderr].concat()).expect("text"),
        )
    };
    let (code, said) = check(&certificate, &key).await;
    assert!(code == Some(0) && said.contains("signature       good"), "{said}");
    let altered = certificate.replacen("initech", "globex", 1);
    assert_ne!(altered, certificate);
    let (code, said) = check(&altered, &key).await;
    assert!(code == Some(3) && said.contains("not to be believed"), "{said}");
    let another = format!("A{}", &key[1..]);
    assert_ne!(another, key);
    assert_eq!(check(&certificate, &another).await.0, Some(3));
    for broken in ["", "{}", &certificate[..certificate.len() / 2]] {
        assert_eq!(check(broken, &key).await.0, Some(1), "{broken}");
    }
    assert_eq!(check(&certificate, "").await.0, Some(1));
    // What was signed before a rotation is proved by the key of before.
    let (status, _) =
        world.bao("POST", "pgsilo-transit/keys/certificates/rotate", Some(json!({}))).await;
    assert!((200..300).contains(&status));
    let keys = does(&world, &["certificate", "key"]).await;
    assert_eq!((keys.lines().count(), keys.lines().last()), (2, Some(key.trim())));
    assert_eq!(check(&certificate, &keys).await.0, Some(0));
    fails(&world, &["certificate", "show", "acme"], "no tenant acme was ever removed").await;

    // Its neighbours are as they were, and its id can be another's now.
    session(&world, "acme").await.expect("served");
    does(&world, &["tenant", "create", "initech"]).await;
    session(&world, "initech").await.expect("served");
}

#[tokio::test]
async fn what_cannot_be_made_is_told_before_anything_is() {
    let world = not_served().await;
    let ghost = "CREATE ROLE tenant_ghost_app";
    world.superuser("postgres").await.batch_execute(ghost).await.expect("made");
    let before = left_of(&world, "tenant_").await;
    for (arguments, expected) in [
        (&["acme"][..], "there is a tenant acme already, and it is active"),
        (&["newcomer", "--alias", "acme"], "'acme' is the id of a tenant"),
        (&["newcomer", "--on", "mars"], "the registry has no cluster mars; it has sandbox"),
        (&["newcomer", "--region", "eu"], "the registry has no cluster in eu"),
        (&["newcomer", "--region", "eu", "--on", "sandbox"], "cluster sandbox is in no region"),
        (&["newcomer", "--name", "acme"], "(sandbox, tenant_acme) already exists"),
        (&["newcomer", "--name", "ghost"], "has a role tenant_ghost_app already"),
        (&["newcomer", "--template", "template7"], "no template database template7"),
        (&["newcomer", "--template", "template1"], "template1 lets everybody use up the cluster"),
        (&["newcomer-"], "OpenBAO takes no name that ends in"),
        (&["newcomer", "--alias", ""], "--alias \"\" is not one line"),
        (&["newcomer", "--undo"], "no creation of newcomer was begun"),
    ] {
        fails(&world, &[&["tenant", "create"], arguments].concat(), expected).await;
    }
    for (wrong, expected) in [
        (&["Newcomer"][..], "a tenant id is 1 to 49 of a-z 0-9 _ -"),
        (&["newcomer", "--connections", "3"], "3 is not in 4..=65535"),
        (&["newcomer", "--allow", "everything"], "possible values: advisory-locks"),
    ] {
        let (code, said) = says(&world, &[&["tenant", "create"], wrong].concat()).await;
        assert!(code == 2 && said.contains(expected), "{said}");
    }
    let told =
        does(&world, &["tenant", "create", "newcomer", "--dry-run", "--allow", "large-objects"])
            .await;
    assert!(
        told.contains("OpenBAO's mount pgsilo/newcomer") && told.contains("large-objects"),
        "{told}"
    );
    // A mount that nobody knows anything of is nobody's to overwrite.
    let (status, _) =
        world.bao("POST", "sys/mounts/pgsilo/newcomer", Some(json!({ "type": "database" }))).await;
    assert_eq!(status, 204);
    fails(&world, &["tenant", "create", "newcomer"], "no journal says what it is").await;
    assert_eq!(left_of(&world, "tenant_").await, before);
    assert_eq!(left_of(&world, "newcomer").await, ["mount pgsilo/newcomer/"]);
}

#[tokio::test]
async fn of_two_who_make_the_same_tenant_one_makes_it_and_the_other_is_told() {
    let world = not_served().await;
    let create = ["tenant", "create", "initech"];
    let both = tokio::join!(says(&world, &create), says(&world, &create));
    let (made, told): (Vec<_>, Vec<_>) =
        [both.0, both.1].into_iter().partition(|(code, _)| *code == 0);
    assert_eq!((made.len(), told.len()), (1, 1), "{made:?} {told:?}");
    let is_told = ["is at initech already", "there is a tenant initech already"];
    assert!(is_told.iter().any(|expected| told[0].1.contains(expected)), "{told:?}");
    does(&world, &["tenant", "check", "initech"]).await;
}

#[tokio::test]
async fn databases_that_are_prepared_are_nobodys_and_are_taken_first() {
    let world = served().await;
    does(&world, &["tenant", "prepare", "--standby", "2"]).await;
    let cluster = world.superuser("postgres").await;
    let ready = "SELECT datname::text FROM pg_database WHERE datname ~ '^tenant_[0-9a-f]{16}$' AND NOT datallowconn
        AND NOT EXISTS (SELECT FROM pg_db_role_setting WHERE setdatabase = pg_database.oid) ORDER BY 1";
    let rows = cluster.query(ready, &[]).await.expect("asked");
    let ready_names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(ready_names.len(), 2);
    // Enough are there.
    does(&world, &["tenant", "prepare", "--standby", "2"]).await;
    does(&world, &["tenant", "create", "initech"]).await;
    assert!(ready_names.contains(&database_of(&world, "initech").await));
    // What has a name of its own is made anew.
    does(&world, &["tenant", "create", "umbrella", "--name", "umbrella"]).await;
    assert_eq!(database_of(&world, "umbrella").await, "tenant_umbrella");
    assert_eq!(cluster.query(ready, &[]).await.expect("asked").len(), 1);
    for tenant in ["initech", "umbrella"] {
        does(&world, &["tenant", "check", tenant]).await;
        session(&world, tenant).await.expect("served");
    }
    does(&world, &["leases", "audit", "--settle", "1s"]).await;
}

#[tokio::test]
async fn making_ready_again_changes_nothing_and_mends_what_is_not_so() {
    let world = not_served().await;
    let secret_id = world.dir().join("secret-id").to_string_lossy().into_owned();
    let openbao = ["bootstrap", "openbao", "--proxy-secret-id", &secret_id];
    let registry = ["bootstrap", "registry"];
    let server = format!("127.0.0.1:{}", world.var("PG_PORT"));
    let named = ["bootstrap", "cluster", "sandbox"];
    fails(&world, &named, "is reached in clear").await;
    let cluster = [&named[..], &["--endpoint", &server]].concat();
    let another = [
        "bootstrap",
        "cluster",
        "eu-2",
        "--tls",
        "disable",
        "--endpoint",
        &format!("localhost:{}", world.var("PG_PORT")),
    ];
    fails(&world, &another, "the registry has these servers already, as cluster sandbox").await;
    // The sandbox lets the provisioner in by a password; nobody else does.
    does(&world, &cluster).await;
    let dsn: Config = world.var("PROVISIONER_DSN").parse().expect("a DSN");
    let refused = dsn.connect(NoTls).await.err().expect("its password works no longer");
    assert_eq!(refused.code().expect("PostgreSQL's").code(), "28P01");
    for (arguments, what) in [
        (&openbao[..], "OpenBAO is as it should be"),
        (&registry, "the registry is as it should be"),
        (&cluster, "cluster sandbox is as it should be"),
    ] {
        assert_eq!(does(&world, arguments).await.trim().lines().last(), Some(what));
    }

    let superuser = world.superuser("postgres").await;
    let spoil = "ALTER ROLE pgsilo_provisioner SUPERUSER; GRANT CONNECT ON DATABASE template1 TO PUBLIC;
        ALTER DATABASE pgsilo_template ALLOW_CONNECTIONS true; ALTER ROLE pgsilo_registry_broker NOLOGIN";
    superuser.batch_execute(spoil).await.expect("spoiled");
    for (path, body) in [
        (
            "sys/policies/acl/pgsilo",
            json!({ "policy": "path \"*\" { capabilities = [\"sudo\"] }" }),
        ),
        (
            "sys/policies/acl/pgsilo-provisioner",
            json!({ "policy": "path \"*\" { capabilities = [\"sudo\"] }" }),
        ),
        ("auth/approle/role/pgsilo", json!({ "token_policies": ["pgsilo", "root-like"] })),
        (
            "pgsilo-registry/roles/proxy",
            json!({
                "db_name": "registry", "creation_statements": "CREATE ROLE \"{{name}}\" SUPERUSER LOGIN PASSWORD '{{password}}'",
            }),
        ),
    ] {
        let (status, answer) = world.bao("POST", path, Some(body)).await;
        assert!((200..300).contains(&status), "{path}: {answer}");
    }
    let dry = does(&world, &[&openbao[..], &["--dry-run"]].concat()).await;
    assert!(dry.contains("would: the policy pgsilo is this version's"), "{dry}");
    let repaired = does(&world, &openbao).await;
    for expected in ["the policy pgsilo is this version's", "pgsilo logs in with the policy pgsilo"]
    {
        assert!(repaired.contains(&format!("done:  {expected}")), "{repaired}");
    }
    let repaired = does(&world, &registry).await;
    assert!(repaired.contains("pgsilo_registry_broker makes members of"), "{repaired}");
    assert!(repaired.contains("credentials of pgsilo-registry/roles/proxy"), "{repaired}");
    let repaired = does(&world, &cluster).await;
    for expected in [
        "the provisioner and the monitor",
        "the database pgsilo_template",
        "the policy pgsilo-provisioner",
    ] {
        assert!(repaired.contains(&format!("done:  {expected}")), "{repaired}");
    }
    let as_should =
        "SELECT NOT rolsuper AND NOT has_database_privilege('public', 'template1', 'CONNECT')
            AND (SELECT NOT datallowconn FROM pg_database WHERE datname = 'pgsilo_template')
        FROM pg_roles WHERE rolname = 'pgsilo_provisioner'";
    assert!(superuser.query_one(as_should, &[]).await.expect("asked").get::<_, bool>(0));
    does(&world, &["tenant", "create", "initech"]).await;
    does(&world, &["tenant", "check", "initech"]).await;
}

/// Each of the three identities does its own, and nothing else; what they leased ends with them.
#[tokio::test]
async fn the_provisioner_and_the_operator_may_do_their_own_and_nothing_else() {
    let world = not_served().await;
    let log_in = async |role: &str| {
        let secret_id =
            std::fs::read_to_string(world.dir().join(format!("{role}.secret-id"))).expect("read");
        let body = json!({ "role_id": format!("pgsilo-{role}"), "secret_id": secret_id.trim() });
        let (status, answer) = world.bao_as("", "POST", "auth/approle/login", Some(body)).await;
        assert_eq!(status, 200, "{answer}");
        answer["auth"]["client_token"].as_str().expect("a token").to_owned()
    };
    let (provisioner, operator_token) = (log_in("provisioner").await, log_in("operator").await);
    let elsewhere = json!({
        "plugin_name": "postgresql-database-plugin", "username": "tenant_x_broker", "password": "x",
        "connection_url": "postgresql://{{username}}:{{password}}@192.0.2.1:5432/x", "verify_connection": false,
    });
    for (token, method, path, body) in [
        (&provisioner, "GET", "pgsilo/acme/creds/tenant-acme-rw", None),
        (&provisioner, "POST", "pgsilo/acme/config/tenant-x", Some(elsewhere)),
        (&provisioner, "GET", "pgsilo-monitor/creds/sandbox", None),
        (&provisioner, "GET", "pgsilo-registry/creds/proxy", None),
        (&provisioner, "POST", "sys/policies/acl/pgsilo", Some(json!({ "policy": "" }))),
        (&provisioner, "POST", "auth/approle/role/pgsilo/secret-id", Some(json!({}))),
        (&provisioner, "POST", "pgsilo-transit/keys/certificates/rotate", Some(json!({}))),
        (&provisioner, "GET", "pgsilo-transit/export/signing-key/certificates", None),
        (&operator_token, "GET", "pgsilo/acme/config/tenant-acme", None),
        (&operator_token, "GET", "pgsilo-provisioner/creds/sandbox", None),
        (&operator_token, "GET", "pgsilo-registry/creds/control", None),
        (&operator_token, "LIST", "sys/leases/lookup/pgsilo/acme/creds/tenant-acme-rw", None),
    ] {
        let (status, answer) = world.bao_as(token, method, path, body).await;
        assert_eq!(status, 403, "{method} {path}: {answer}");
    }
    // What the provisioner logs in as is no superuser, reads no tenant's data, and ends with its token.
    let (status, made) =
        world.bao_as(&provisioner, "GET", "pgsilo-provisioner/creds/sandbox", None).await;
    assert_eq!(status, 200, "{made}");
    let [user, password] =
        ["username", "password"].map(|name| made["data"][name].as_str().expect("text").to_owned());
    let port = world.var("PG_PORT").parse().expect("a port");
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user(&user).password(&password).dbname("tenant_acme");
    let (client, connection) = config.connect(NoTls).await.expect("let in");
    tokio::spawn(connection);
    let row = client
        .query_one("SELECT current_user::text, current_setting('is_superuser')", &[])
        .await
        .expect("asked");
    assert_eq!((row.get(0), row.get(1)), ("pgsilo_provisioner", "off"));
    for order in [
        "TABLE public.customers",
        "SELECT pg_read_file('/etc/passwd')",
        "COPY (SELECT 1) TO PROGRAM 'true'",
    ] {
        let error = client.batch_execute(order).await.expect_err(order);
        assert_eq!(error.code().expect("PostgreSQL's").code(), "42501", "{order}");
    }
    let (status, _) =
        world.bao_as(&provisioner, "POST", "auth/token/revoke-self", Some(json!({}))).await;
    assert_eq!(status, 204);
    let superuser = world.superuser("postgres").await;
    eventually("its login to be gone", async || {
        let there = "SELECT FROM pg_roles WHERE rolname = $1";
        superuser.query_opt(there, &[&user]).await.expect("asked").is_none().then_some(())
    })
    .await;
    client.simple_query("SELECT 1").await.expect_err("its session has ended");
    // And so do those of the commands, one that fails included.
    does(&world, &["tenant", "create", "initech"]).await;
    fails(&world, &["tenant", "create", "initech"], "there is a tenant").await;
    eventually("their logins to be gone", async || {
        let there =
            "SELECT count(*) FROM pg_roles WHERE rolname ~ '^pgsilo_(provisioner|registry)-'";
        let count: i64 = superuser.query_one(there, &[]).await.expect("asked").get(0);
        // The sandbox was made by such logins, too.
        (count == 0).then_some(())
    })
    .await;
}

/// Where PostgreSQL makes the verifiers, the passwords are in statements, and not in its log.
#[tokio::test]
async fn a_leased_password_that_postgresql_hashes_is_not_in_its_log() {
    let world = served().await;
    let superuser = world.superuser("postgres").await;
    let log_all = "ALTER SYSTEM SET log_statement = 'all'; ";
    superuser.batch_execute(log_all).await.expect("set");
    superuser.batch_execute("ALTER SYSTEM SET log_min_duration_statement = 0").await.expect("set");
    superuser.query_one("SELECT pg_reload_conf()", &[]).await.expect("reloaded");
    eventually("statements to be logged", async || {
        let all: String = world
            .superuser("postgres")
            .await
            .query_one("SHOW log_statement", &[])
            .await
            .expect("asked")
            .get(0);
        (all == "all").then_some(())
    })
    .await;
    let create =
        ["tenant", "create", "initech", "--lease-hashing", "postgres", "--name", "initech"];
    does(&world, &create).await;
    let client = session(&world, "initech").await.expect("served");
    let leased: String =
        client.query_one("SELECT session_user::text", &[]).await.expect("asked").get(0);
    let verifier = "SELECT rolpassword FROM pg_authid WHERE rolname = $1";
    let verifier: String = superuser.query_one(verifier, &[&leased]).await.expect("asked").get(0);
    assert!(verifier.starts_with("SCRAM-SHA-256$1:"), "{verifier}");
    let log = std::fs::read_to_string(world.dir().join("postgres.log")).expect("read");
    assert!(log.contains("statement:"), "nothing is logged");
    let of_roles = log.lines().filter(|line| line.contains("CREATE ROLE \"tenant-initech"));
    assert_eq!(of_roles.collect::<Vec<_>>(), Vec::<&str>::new());
    does(&world, &["tenant", "check", "initech"]).await;
}

/// What keeps a tenant's things from being dropped, or is another's, is told before anybody is refused; what
/// a neighbour grants its roles does not keep them.
#[tokio::test]
async fn only_what_is_the_tenants_is_removed_and_no_neighbour_keeps_it() {
    let world = served().await;
    does(&world, &["tenant", "create", "initech", "--name", "initech"]).await;
    let superuser = world.superuser("postgres").await;
    let delete = ["tenant", "delete", "initech", "--now", "--confirm", "initech"];
    let seal = "SELECT substr(setconfig[1], 15) FROM pg_db_role_setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = 'tenant_initech') AND setrole = 0";
    let seal: String = superuser.query_one(seal, &[]).await.expect("asked").get(0);
    let another = "ALTER DATABASE tenant_initech SET pgsilo.tenant = 'another'";
    superuser.batch_execute(another).await.expect("set");
    fails(&world, &delete, "database tenant_initech is not sealed for initech").await;
    let again = format!("ALTER DATABASE tenant_initech SET pgsilo.tenant = '{seal}'");
    superuser.batch_execute(&again).await.expect("set");
    let subscribe = "CREATE SUBSCRIPTION leads_out CONNECTION 'host=192.0.2.1' PUBLICATION p WITH (connect = false)";
    let inside = world.superuser("tenant_initech").await;
    inside.batch_execute(subscribe).await.expect("made");
    fails(&world, &delete, "the subscription leads_out: drop it").await;
    session(&world, "initech").await.expect("it was never refused");
    let unsubscribe =
        "ALTER SUBSCRIPTION leads_out SET (slot_name = NONE); DROP SUBSCRIPTION leads_out";
    for order in unsubscribe.split(';') {
        inside.batch_execute(order).await.expect("dropped");
    }
    drop(inside);

    let neighbour = session(&world, "acme").await.expect("served");
    let keep = "CREATE TABLE kept (id int); GRANT SELECT ON kept TO tenant_initech_app, tenant_initech_ro,
        tenant_initech_login, tenant_initech_broker; ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO tenant_initech_ro";
    neighbour.batch_execute(keep).await.expect("granted");
    does(&world, &delete).await;
    assert_eq!(left_of(&world, "initech").await, Vec::<String>::new());
    neighbour.batch_execute("TABLE kept").await.expect("its own table is as it was");
}

#[tokio::test]
async fn tenants_follow_a_cluster_whose_address_changes() {
    let world = not_served().await;
    does(&world, &["tenant", "create", "initech"]).await;
    let server = format!("localhost:{}", world.var("PG_PORT"));
    let cluster = ["bootstrap", "cluster", "sandbox", "--endpoint", &server];
    let told = does(&world, &cluster).await;
    assert!(
        told.contains("3 tenants of sandbox as before: run pgsiloctl tenant repair --on sandbox"),
        "{told}"
    );
    let (code, found) = says(&world, &["registry", "check"]).await;
    assert!(code == 3 && found.contains("elsewhere"), "{found}");
    let repaired = does(&world, &["tenant", "repair", "--on", "sandbox"]).await;
    assert!(repaired.contains("initech  is as it should be"), "{repaired}");
    does(&world, &["registry", "check"]).await;
    does(&world, &["tenant", "check", "initech"]).await;
    // Until then both addresses may be written; now the old one may not.
    let told = does(&world, &cluster).await;
    assert!(told.contains("done:  the policy pgsilo-provisioner"), "{told}");
    let told = does(&world, &cluster).await;
    assert_eq!(told.trim().lines().last(), Some("cluster sandbox is as it should be"));
    let (_, policy) = world.bao("GET", "sys/policies/acl/pgsilo-provisioner", None).await;
    let policy = policy["data"]["policy"].as_str().expect("text");
    assert!(policy.contains(&server) && !policy.contains("127.0.0.1"), "{policy}");
    // Repaired, too: what somebody has taken away.
    let (status, _) = world.bao("DELETE", "pgsilo/initech/roles/tenant-initech-rw", None).await;
    assert_eq!(status, 204);
    let database = database_of(&world, "initech").await;
    world
        .superuser(&database)
        .await
        .batch_execute("DROP SCHEMA pgsilo CASCADE")
        .await
        .expect("dropped");
    does(&world, &["tenant", "repair", "initech"]).await;
    does(&world, &["tenant", "check", "initech"]).await;
}

#[tokio::test]
async fn addresses_are_kept_where_nothing_is_said_of_them() {
    let world = not_served().await;
    let openbao = ["bootstrap", "openbao"];
    let from = ["--proxy-from", "127.0.0.1/32", "--control-from", "127.0.0.0/8"];
    does(&world, &[&openbao[..], &from].concat()).await;
    let told = does(&world, &openbao).await;
    assert_eq!(told.trim(), "OpenBAO is as it should be");
    for (role, from) in [
        ("pgsilo", "127.0.0.1"),
        ("pgsilo-provisioner", "127.0.0.0/8"),
        ("pgsilo-operator", "127.0.0.0/8"),
    ] {
        let (_, found) = world.bao("GET", &format!("auth/approle/role/{role}"), None).await;
        for key in ["secret_id_bound_cidrs", "token_bound_cidrs"] {
            let found = found["data"][key][0].as_str().expect("an address").to_owned();
            assert_eq!(found.trim_end_matches("/32"), from, "{role} {key}");
        }
    }
    does(&world, &["tenant", "create", "initech"]).await;
}

/// An application's schema, made once as who owns templates: each tenant's own in its database.
#[tokio::test]
async fn what_a_template_brings_is_the_tenants_own() {
    let world = served().await;
    let superuser = world.superuser("postgres").await;
    let create = "CREATE DATABASE app_template TEMPLATE pgsilo_template IS_TEMPLATE true";
    superuser.batch_execute(create).await.expect("made");
    let template = world.superuser("app_template").await;
    let schema =
        "ALTER SCHEMA public OWNER TO pgsilo_template_owner; SET ROLE pgsilo_template_owner;
        CREATE TABLE public.orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
        CREATE VIEW public.all_orders AS TABLE public.orders;
        CREATE FUNCTION public.one() RETURNS int LANGUAGE sql AS 'SELECT 1';
        INSERT INTO public.orders (what) VALUES ('the first')";
    template.batch_execute(schema).await.expect("made");
    drop(template);
    eventually("nobody to be connected to the template", async || {
        let there = "SELECT FROM pg_stat_activity WHERE datname = 'app_template'";
        superuser.query_opt(there, &[]).await.expect("asked").is_none().then_some(())
    })
    .await;
    for tenant in ["initech", "umbrella"] {
        does(&world, &["tenant", "create", tenant, "--template", "app_template"]).await;
        let client = session(&world, tenant).await.expect("served");
        let change =
            "ALTER TABLE orders ADD COLUMN more int; INSERT INTO orders (what) VALUES ('its own');
            DROP VIEW all_orders; SELECT one()";
        client.batch_execute(change).await.expect("all of it is its own");
        let database = world.superuser(&database_of(&world, tenant).await).await;
        let left =
            "SELECT count(*) FROM pg_shdepend WHERE refobjid = 'pgsilo_template_owner'::regrole
            AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
        assert_eq!(database.query_one(left, &[]).await.expect("asked").get::<_, i64>(0), 0);
        let may_read = "SELECT has_table_privilege(rolname, 'public.orders', 'SELECT')
            FROM pg_roles WHERE rolname = current_database() || '_ro'";
        assert!(database.query_one(may_read, &[]).await.expect("asked").get::<_, bool>(0));
    }
    // REASSIGN OWNED would give a tenant the template itself.
    let own = "ALTER DATABASE app_template OWNER TO pgsilo_template_owner";
    superuser.batch_execute(own).await.expect("set");
    let create = ["tenant", "create", "hooli", "--template", "app_template"];
    fails(&world, &create, "database app_template belongs to pgsilo_template_owner").await;
    superuser.batch_execute("ALTER DATABASE app_template OWNER TO postgres").await.expect("set");
    does(&world, &["tenant", "create", "hooli"]).await;
}
