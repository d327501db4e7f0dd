//! `pgsiloctl tenant`: which tenants there are, and whether they are served.

use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::raw::Raw;
use serde_json::Value;

use super::served::filled;
use super::{Database, said};

impl Database {
    /// `pgsiloctl tenant ...`, which works. What it has said on both streams.
    async fn tenant(&self, arguments: &[&str]) -> (String, String) {
        let output = self.try_tenant(arguments).await;
        assert!(output.status.success(), "{}", said(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), said(&output))
    }

    async fn try_tenant(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = self.program_of_operator();
        command.arg("tenant").args(arguments).args(["--tls", "disable"]);
        command.output().await.expect("it runs")
    }
}

#[tokio::test]
async fn a_tenant_is_suspended_paused_and_resumed_and_the_audit_says_by_whom() {
    let database = filled().await;
    let proxy = database.serve().await;
    let (token, other) = (mint::token("acme"), mint::token("globex"));
    let session = async |token: &str, tenant: &str| {
        let mut client = Raw::unix(&proxy.socket()).await;
        client.log_in(token, tenant).await;
        client
    };
    let mut acme = session(&token, "acme").await;
    let mut globex = session(&other, "globex").await;

    let by = ["--actor", "ann", "--reason", "unpaid"];
    let (told, progress) = database.tenant(&[&["suspend", "acme"][..], &by].concat()).await;
    assert_eq!(told, "acme  is suspended; it was active\n");
    assert!(progress.contains("in force at the one proxy"), "{progress}");
    assert_eq!(acme.fatal().await.sqlstate(), "57P01");
    let refused = async || {
        let error = proxy.connect(&token, "acme").await.expect_err("refused");
        error.code().expect("PostgreSQL's").code().to_owned()
    };
    assert_eq!(refused().await, "42501");
    let (told, _) = database.tenant(&["suspend", "acme"]).await;
    assert_eq!(told, "acme  is suspended already\n");
    let weaker = database.try_tenant(&["pause", "acme"]).await;
    assert!(said(&weaker).contains("acme is suspended, which keeps out more"), "{}", said(&weaker));

    database.tenant(&["resume", "acme"]).await;
    let mut acme = session(&token, "acme").await;
    database.tenant(&["pause", "acme"]).await;
    assert_eq!(acme.fatal().await.sqlstate(), "57P01");
    assert_eq!(refused().await, "57P03");
    assert_eq!(globex.ask("SELECT 'undisturbed'").await, "undisturbed");

    let (table, _) = database.tenant(&["list"]).await;
    let lines: Vec<_> =
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[0], ["ID", "STATE", "CLUSTER", "REGION", "DATABASE", "NAME"]);
    assert_eq!(lines[1][..2], ["acme", "paused"]);
    assert_eq!(lines[2][..2], ["globex", "active"]);
    let (paused, _) = database.tenant(&["list", "--state", "paused", "--json"]).await;
    let paused: Value = serde_json::from_str(&paused).expect("one object");
    assert_eq!((&paused["id"], &paused["database"]), (&"acme".into(), &"tenant_acme".into()));
    let (none, _) = database.tenant(&["list", "--cluster", "nowhere"]).await;
    assert_eq!(none, "there are no such tenants\n");

    let (shown, _) = database.tenant(&["show", "acme"]).await;
    assert!(shown.starts_with("id              acme\nstate           paused\n"), "{shown}");
    assert!(shown.contains(" by ann, update of tenants: unpaid\n"), "{shown}");
    let (shown, _) = database.tenant(&["show", "acme", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown).expect("an object");
    assert_eq!(shown["roles"]["read-only"], "tenant-acme-ro");
    assert_eq!(shown["changes"][2]["why"], "unpaid");
    for command in ["show", "suspend"] {
        let unknown = database.try_tenant(&[command, "nobody"]).await;
        assert_eq!(unknown.status.code(), Some(1));
        assert!(said(&unknown).contains("the registry has no tenant nobody"), "{}", said(&unknown));
    }
}
