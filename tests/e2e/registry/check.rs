//! `pgsiloctl registry check`: what the registry, the databases and OpenBAO do not say alike.

use std::collections::BTreeSet;
use std::process::Output;

use pgsilo_sandbox::testing::world::world;
use serde_json::Value;

use super::served::filled;
use super::{Database, said};

impl Database {
    async fn check(&self, arguments: &[&str]) -> Output {
        let mut command = self.program_of_operator();
        command.args(["registry", "check", "--json", "--tls", "disable"]).args(arguments);
        for name in ["PROVISIONER_DSN", "BAO_ADDR", "PROVISIONER_BAO_TOKEN"] {
            command.env(name, world().var(name));
        }
        command.output().await.expect("it runs")
    }
}

#[tokio::test]
async fn each_disagreement_is_found_and_says_what_mends_it() {
    let database = filled().await;
    let sound = database.check(&[]).await;
    assert_eq!(
        sound.status.code(),
        Some(0),
        "{}{}",
        String::from_utf8_lossy(&sound.stdout),
        said(&sound)
    );

    let stray = Database::create().await;
    let plant = format!(
        "INSERT INTO pgsilo.tenants (id, regions) VALUES ('initech', NULL);
         INSERT INTO pgsilo.placements (tenant, cluster, dbname, seal, mount, roles)
             SELECT 'initech', cluster, '{}', 'initech', 'pgsilo/none', '{{\"read-write\": \"r\"}}'
             FROM pgsilo.placements WHERE tenant = 'acme';
         UPDATE pgsilo.placements SET seal = 'another', roles = roles - 'read-only' WHERE tenant = 'acme';
         UPDATE pgsilo.placements SET mount = 'pgsilo/acme',
             roles = '{{\"read-only\": \"tenant-acme-ro\", \"migrate\": \"tenant-none\"}}' WHERE tenant = 'globex'",
        stray.name
    );
    database.control().await.batch_execute(&plant).await.expect("planted");
    let owner = database.as_role("pgsilo_registry_owner").await;
    let forge = "ALTER TABLE pgsilo.audit DISABLE TRIGGER ALL;
        UPDATE pgsilo.audit SET actor = 'somebody else' WHERE number = 3;
        ALTER TABLE pgsilo.tenants DISABLE TRIGGER USER; UPDATE pgsilo.tenants SET regions = '{mars}' WHERE id = 'globex'";
    owner.batch_execute(forge).await.expect("forged");

    let found = database.check(&[]).await;
    assert_eq!(found.status.code(), Some(3), "{}", said(&found));
    let lines: Vec<Value> = String::from_utf8_lossy(&found.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let kinds: BTreeSet<_> = lines
        .iter()
        .map(|line| {
            (line["finding"].as_str().expect("a kind"), line["tenant"].as_str().expect("whose"))
        })
        .collect();
    let expected = [
        ("audit_broken", ""),
        ("elsewhere", "globex"),
        ("misplaced", "globex"),
        ("no_engine", "initech"),
        ("no_role", "globex"),
        ("open_to_all", "initech"),
        ("seal_differs", "acme"),
        ("seal_missing", "initech"),
    ];
    assert_eq!(kinds, BTreeSet::from(expected), "{lines:?}");
    assert!(lines.iter().all(|line| !line["mend"].as_str().expect("a mend").is_empty()));
    let one = database.check(&["--tenant", "acme"]).await;
    assert!(!String::from_utf8_lossy(&one.stdout).contains("initech"), "{}", said(&one));
}

#[tokio::test]
async fn an_openbao_that_would_not_follow_a_failover_is_found() {
    let database = filled().await;
    let more = "UPDATE pgsilo.clusters SET endpoints = endpoints || '{db2.invalid:5432}';
        UPDATE pgsilo.placements SET connection = 'called-so' WHERE tenant = 'globex'";
    database.control().await.batch_execute(more).await.expect("planted");
    let found = database.check(&[]).await;
    assert_eq!(found.status.code(), Some(3), "{}", said(&found));
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let told = |tenant: &str, what: &str| {
        let all = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let of_tenant =
            all.filter(|line| line["tenant"] == tenant && line["finding"] == "stays_behind");
        of_tenant.filter(|line| line["what"].as_str().expect("what").contains(what)).count()
    };
    for tenant in ["acme", "globex"] {
        assert!(told(tenant, "does not name db2.invalid:5432") > 0, "{text}");
        assert!(told(tenant, "takes no writes") > 0, "{text}");
    }
    assert!(told("globex", "connect anew") > 0 && told("acme", "connect anew") == 0, "{text}");
}
