//! OpenBAO restored from a backup: brokers' passwords have been rotated since, and leases and
//! tenants made that it knows nothing of. The audit says what there is to do, and does what it can.

use pgsilo_sandbox::testing::bao::{Server, Shape};
use pgsilo_sandbox::testing::passwords;
use pgsilo_sandbox::testing::world::World;
use serde_json::{Value, json};

use crate::orphans::{audited, command};

const PROVISIONER: &str = include_str!("../../docker/openbao/provisioner.hcl");
const KINDS: [&str; 3] = ["rw", "ro", "migrate"];

/// Tells an OpenBAO of a tenant of a sandbox, as the provisioner does.
async fn describe(world: &World, bao: &Server, tenant: &str) {
    bao.write(&format!("sys/mounts/pgsilo/{tenant}"), json!({ "type": "database" })).await;
    let password = format!("told-{}", std::process::id());
    let superuser = world.superuser("postgres").await;
    let set = format!("ALTER ROLE tenant_{tenant}_broker PASSWORD '{password}'");
    superuser.batch_execute(&set).await.expect("set");
    let config = json!({
        "plugin_name": "postgresql-database-plugin",
        "connection_url": format!(
            "postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{}/tenant_{tenant}?sslmode=disable",
            world.var("PG_PORT")
        ),
        "username": format!("tenant_{tenant}_broker"),
        "password": password,
        "password_authentication": "scram-sha-256",
        "allowed_roles": [format!("tenant-{tenant}-*")],
        "username_template": "{{ printf \"%s-%s\" (.RoleName | truncate 42) (random 20) }}",
    });
    bao.write(&format!("pgsilo/{tenant}/config/tenant-{tenant}"), config).await;
    bao.write(passwords::POLICY_PATH, passwords::policy()).await;
    rotate(bao, tenant).await;
    for kind in KINDS {
        let role = format!("pgsilo/{tenant}/roles/tenant-{tenant}-{kind}");
        let (_status, answer) = world.bao("GET", &role, None).await;
        bao.write(&role, answer["data"].clone()).await;
    }
}

async fn rotate(bao: &Server, tenant: &str) {
    bao.write(&format!("pgsilo/{tenant}/rotate-root/tenant-{tenant}"), json!({})).await;
}

async fn lease(bao: &Server, tenant: &str) -> (u16, Value) {
    bao.ask("GET", &format!("pgsilo/{tenant}/creds/tenant-{tenant}-rw"), None).await
}

/// How many leased roles there are, of any use or none.
async fn leased(world: &World) -> i64 {
    let superuser = world.superuser("postgres").await;
    let query = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^tenant-.*-[A-Za-z0-9]{20}$'";
    superuser.query_one(query, &[]).await.expect("asked").get(0)
}

/// The finding about acme's lease that no session uses, how many roles of acme's are told of, and
/// what else is found. Of roles that were made long after the lease, as on a slow machine, each is
/// told of by itself.
fn of_acme(findings: &[Value]) -> (Value, usize, Vec<&str>) {
    let (mut idle, mut roles, mut others) = (Value::Null, 0, Vec::new());
    for finding in findings {
        match (finding["finding"].as_str(), finding["tenant"].as_str()) {
            (Some("idle_roles"), Some("acme")) => {
                roles += finding["roles"].as_array().map_or(0, Vec::len);
                idle = finding.clone();
            }
            (Some("orphan_role"), Some("acme")) => roles += 1,
            (other, _) => others.extend(other),
        }
    }
    (idle, roles, others)
}

fn kinds(findings: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<_> = findings.iter().filter_map(|one| one["finding"].as_str()).collect();
    kinds.sort_unstable();
    kinds
}

#[tokio::test]
async fn an_audit_after_a_restore_of_openbao_says_what_to_do_and_repairs_it() {
    let world = World::own().await;
    let mut bao = Server::start(Shape { kept: true, ..Shape::default() }).await;
    let policy = PROVISIONER.replace("DATABASE", &format!("127.0.0.1:{}", world.var("PG_PORT")));
    bao.write("sys/policies/acl/provisioner", json!({ "policy": policy })).await;
    let wish = json!({ "policies": ["provisioner"], "no_default_policy": true });
    let made = bao.write("auth/token/create-orphan", wish).await;
    let token = made["auth"]["client_token"].as_str().expect("a token").to_owned();
    describe(&world, &bao, "acme").await;
    assert_eq!(lease(&bao, "acme").await.0, 200);
    bao.back_up().await;
    // What the backup does not know.
    rotate(&bao, "acme").await;
    assert_eq!(lease(&bao, "acme").await.0, 200);
    describe(&world, &bao, "globex").await;
    assert_eq!(lease(&bao, "globex").await.0, 200);
    bao.restore().await;
    assert_eq!(leased(&world).await, 3);
    assert_eq!(lease(&bao, "acme").await.0, 500, "it has another password than PostgreSQL");

    let address = bao.address().to_owned();
    let audit = async |arguments: &[&str]| {
        let mut command = command(&world, arguments);
        command.env("BAO_ADDR", &address).env("PROVISIONER_BAO_TOKEN", &token);
        audited(&mut command).await
    };
    let unknown = vec!["unknown_to_openbao"; 3];
    let (code, findings) = audit(&[]).await;
    let (idle, roles, others) = of_acme(&findings);
    assert_eq!(
        (code, idle.is_null(), roles, others),
        (3, false, 2, unknown.clone()),
        "{findings:?}"
    );
    // The password is what keeps it from revoking.
    let (code, findings) = audit(&["--fix"]).await;
    let (idle, roles, others) = of_acme(&findings);
    assert_eq!((code, roles, others), (1, 2, unknown.clone()), "{findings:?}");
    let why = idle["outcome"]["failed"].as_str().expect("why");
    assert!(why.contains("28P01"), "{why}");
    let (code, findings) = audit(&["--fix", "--new-broker-passwords"]).await;
    let (idle, _, others) = of_acme(&findings);
    assert_eq!((code, others), (3, unknown), "{findings:?}");
    assert_eq!(idle["outcome"], "mended", "{findings:?}");
    assert_eq!(leased(&world).await, 1, "globex's, which is not judged");
    let (status, answer) = lease(&bao, "acme").await;
    assert_eq!(status, 200, "acme is served again");
    let given_back = json!({ "lease_id": answer["lease_id"], "sync": true });
    bao.write("sys/leases/revoke", given_back).await;

    // As the finding asks for.
    describe(&world, &bao, "globex").await;
    let (code, findings) = audit(&["--fix"]).await;
    assert_eq!((code, kinds(&findings)), (0, vec!["orphan_role"]), "{findings:?}");
    assert_eq!(leased(&world).await, 0);
    assert_eq!(audit(&[]).await, (0, vec![]));
}
