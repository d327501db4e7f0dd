//! Random changes and sessions, beside a model of what the registry allows: after each change no
//! session lives that it does not allow, and each that it allows does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use pgsilo_core::tenant::Access;
use pgsilo_sandbox::testing::mint;
use pgsilo_sandbox::testing::proxy::{PLAIN, Proxy, Settings, UNIX};
use pgsilo_sandbox::testing::raw::{Raw, startup};
use pgsilo_sandbox::testing::world::world;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use super::Database;
use super::grants::ISSUER;
use super::served::{REVISION, filled};

const TENANTS: [&str; 2] = ["acme", "globex"];
const SUBJECTS: [&str; 3] = ["ann", "bob", "cleo"];

#[derive(Clone, Debug)]
enum Step {
    /// In one transaction.
    Change(Vec<Change>),
    Open(Who),
}

#[derive(Clone, Debug)]
enum Change {
    State(&'static str, &'static str),
    /// To a database that is not there.
    Move(&'static str),
    Back(&'static str),
    Remove(&'static str),
    Make(&'static str),
    Grant(&'static str, &'static str, Access),
    Revoke(&'static str, &'static str),
    Lock(&'static str, String),
    /// All.
    Unlock,
}

/// A session, or one that would be.
#[derive(Clone, Debug)]
struct Who {
    subject: &'static str,
    tenant: &'static str,
    access: Access,
    by_tcp: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let subject = || select(&SUBJECTS);
    let tenant = || select(&TENANTS);
    let access = || select(&[Access::ReadOnly, Access::ReadWrite]);
    let locked = prop_oneof![
        tenant().prop_map(|tenant| ("tenant", tenant.to_owned())),
        subject().prop_map(|subject| ("subject", subject.to_owned())),
        subject().prop_map(|subject| ("token", token_id(subject))),
        Just(("issuer", ISSUER.to_owned())),
        Just(("address", "127.0.0.0/8".to_owned())),
    ];
    // More is given than taken: else hardly a session would live.
    let change = prop_oneof![
        3 => (tenant(), select(&["active", "active", "suspended", "paused"]))
            .prop_map(|(tenant, state)| Change::State(tenant, state)),
        1 => tenant().prop_map(Change::Move),
        3 => tenant().prop_map(Change::Back),
        1 => tenant().prop_map(Change::Remove),
        3 => tenant().prop_map(Change::Make),
        6 => (subject(), tenant(), access())
            .prop_map(|(subject, tenant, access)| Change::Grant(subject, tenant, access)),
        2 => (subject(), tenant()).prop_map(|(subject, tenant)| Change::Revoke(subject, tenant)),
        2 => locked.prop_map(|(kind, target)| Change::Lock(kind, target)),
        4 => Just(Change::Unlock),
    ];
    let who = (subject(), tenant(), access(), any::<bool>())
        .prop_map(|(subject, tenant, access, by_tcp)| Who { subject, tenant, access, by_tcp });
    prop_oneof![1 => vec(change, 1..4).prop_map(Step::Change), 2 => who.prop_map(Step::Open)]
}

fn token_id(subject: &str) -> String {
    format!("token of {subject}")
}

/// What the registry says.
#[derive(Debug)]
struct Model {
    states: BTreeMap<&'static str, &'static str>,
    grants: BTreeMap<(&'static str, &'static str), Access>,
    locks: BTreeSet<(&'static str, String)>,
    moved: BTreeSet<&'static str>,
}

impl Model {
    fn allows(&self, who: &Who) -> bool {
        let Who { subject, tenant, access, by_tcp } = who;
        let is_locked = |kind, target: &str| self.locks.contains(&(kind, target.to_owned()));
        let grant = self.grants.get(&(*subject, *tenant));
        self.states.get(tenant) == Some(&"active")
            && !self.moved.contains(tenant)
            && grant.is_some_and(|granted| granted >= access)
            && !is_locked("tenant", tenant)
            && !is_locked("subject", subject)
            && !is_locked("token", &token_id(subject))
            && !is_locked("issuer", ISSUER)
            && !(*by_tcp && is_locked("address", "127.0.0.0/8"))
    }

    /// Makes a change here. What makes it in the registry.
    fn change(&mut self, change: &Change) -> String {
        match change {
            Change::State(tenant, state) => {
                if let Some(now) = self.states.get_mut(tenant) {
                    *now = state;
                }
                format!("UPDATE pgsilo.tenants SET state = '{state}' WHERE id = '{tenant}'")
            }
            Change::Move(tenant) => {
                if self.states.contains_key(tenant) {
                    self.moved.insert(tenant);
                }
                format!(
                    "UPDATE pgsilo.placements SET dbname = 'no_{tenant}' WHERE tenant = '{tenant}'"
                )
            }
            Change::Back(tenant) => {
                self.moved.remove(tenant);
                format!(
                    "UPDATE pgsilo.placements SET dbname = 'tenant_{tenant}' WHERE tenant = '{tenant}'"
                )
            }
            Change::Remove(tenant) => {
                self.states.remove(tenant);
                self.moved.remove(tenant);
                self.grants.retain(|(_, of), _| of != tenant);
                format!("DELETE FROM pgsilo.tenants WHERE id = '{tenant}'")
            }
            Change::Make(tenant) => {
                self.states.entry(tenant).or_insert("active");
                format!(
                    "INSERT INTO pgsilo.tenants (id) VALUES ('{tenant}') ON CONFLICT DO NOTHING;
                     INSERT INTO pgsilo.placements SELECT * FROM placements_before
                         WHERE tenant = '{tenant}' ON CONFLICT (tenant) DO NOTHING"
                )
            }
            Change::Grant(subject, tenant, access) => {
                if !self.states.contains_key(tenant) {
                    return "SELECT".to_owned();
                }
                let granted = self.grants.entry((*subject, *tenant)).or_insert(*access);
                *granted = (*granted).max(*access);
                format!(
                    "INSERT INTO pgsilo.grants (issuer, subject, tenant, access, reason, granted_by, granted_at)
                     VALUES ('{ISSUER}', '{subject}', '{tenant}', '{access}', 'a test', 'a test', now())"
                )
            }
            Change::Revoke(subject, tenant) => {
                self.grants.remove(&(*subject, *tenant));
                format!(
                    "DELETE FROM pgsilo.grants WHERE subject = '{subject}' AND tenant = '{tenant}'"
                )
            }
            Change::Lock(kind, target) => {
                self.locks.insert((kind, target.clone()));
                format!(
                    "INSERT INTO pgsilo.locks (kind, target, locked_by) VALUES ('{kind}', '{target}', 'a test')"
                )
            }
            Change::Unlock => {
                self.locks.clear();
                "DELETE FROM pgsilo.locks".to_owned()
            }
        }
    }
}

/// A registry, and a proxy that reads it.
struct Served {
    proxy: Proxy,
    writer: Client,
    _database: Database,
}

impl Served {
    async fn new() -> Served {
        let database = filled().await;
        let settings = Settings {
            listeners: PLAIN.to_owned() + UNIX,
            registry: database.leased("1h").await,
            issuer: "authorization = \"grant\"\n".to_owned(),
            limits: "max_sessions_per_tenant = 500\npause_timeout = \"0s\"\n".to_owned(),
            ..Settings::default()
        };
        let proxy = Proxy::with(settings).await;
        let writer = world().superuser(&database.name).await;
        let keep = "CREATE TEMP TABLE placements_before AS SELECT * FROM pgsilo.placements";
        writer.batch_execute(keep).await.expect("kept");
        Served { proxy, writer, _database: database }
    }

    /// Writes, and waits until it is in force.
    async fn write(&self, changes: &[String]) {
        let all = format!("BEGIN; {}; COMMIT", changes.join("; "));
        self.writer.batch_execute(&all).await.expect(&all);
        let revision = "SELECT revision::float8 FROM pgsilo.revision";
        let revision = self.writer.query_one(revision, &[]).await.expect("asked").get(0);
        self.proxy.metric_reaches(REVISION, revision).await;
    }

    async fn open(&self, who: &Who) -> Result<Raw, String> {
        let Who { subject, tenant, access, by_tcp } = who;
        let claims =
            json!({ "sub": subject, "jti": token_id(subject), "access": access.to_string() });
        let mut client = match by_tcp {
            true => Raw::tcp(self.proxy.address()).await,
            false => Raw::unix(&self.proxy.socket()).await,
        };
        client.send(&startup(&[("user", "app"), ("database", tenant)])).await;
        client.send_password(&mint::token_with(tenant, claims)).await;
        loop {
            let message = client.message().await;
            match message.tag {
                b'Z' => return Ok(client),
                b'E' => return Err(message.sqlstate()),
                _ => {}
            }
        }
    }

    async fn follow(&self, steps: Vec<Step>) -> Result<usize, TestCaseError> {
        let mut model = Model {
            states: TENANTS.iter().map(|tenant| (*tenant, "active")).collect(),
            grants: BTreeMap::new(),
            locks: BTreeSet::new(),
            moved: BTreeSet::new(),
        };
        let mut clean =
            vec!["DELETE FROM pgsilo.locks".to_owned(), "DELETE FROM pgsilo.grants".to_owned()];
        for tenant in TENANTS {
            clean.push(model.change(&Change::Make(tenant)));
            clean.push(model.change(&Change::Back(tenant)));
            clean.push(model.change(&Change::State(tenant, "active")));
            for subject in SUBJECTS {
                clean.push(model.change(&Change::Grant(subject, tenant, Access::ReadWrite)));
            }
        }
        self.write(&clean).await;
        let (mut living, mut lived) = (Vec::<(Who, Raw)>::new(), 0);
        for step in steps {
            match step {
                Step::Change(changes) => {
                    let changes: Vec<_> =
                        changes.iter().map(|change| model.change(change)).collect();
                    self.write(&changes).await;
                }
                Step::Open(who) => {
                    let opened = self.open(&who).await;
                    prop_assert_eq!(
                        opened.is_ok(),
                        model.allows(&who),
                        "{:?} {:?} {:?}",
                        who,
                        opened.err(),
                        model
                    );
                    if let Ok(session) = opened {
                        living.push((who, session));
                        lived += 1;
                    }
                }
            }
            let mut still = Vec::new();
            for (who, mut session) in living {
                match model.allows(&who) {
                    true => {
                        prop_assert_eq!(session.ask("SELECT 'here'").await, "here");
                        still.push((who, session));
                    }
                    false => {
                        prop_assert_eq!(session.fatal().await.sqlstate(), "57P01", "{:?}", who);
                    }
                }
            }
            living = still;
        }
        Ok(lived)
    }
}

#[test]
fn no_session_lives_that_the_registry_does_not_allow() {
    let runtime = Runtime::new().expect("a runtime");
    let served = runtime.block_on(Served::new());
    let cases = std::env::var("PROPTEST_CASES");
    let cases = cases.map_or(12, |cases| cases.parse().expect("a number"));
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let lived = AtomicUsize::new(0);
    let followed = TestRunner::new(config).run(&vec(step(), 40), |steps| {
        let sessions = runtime.block_on(served.follow(steps))?;
        lived.fetch_add(sessions, Ordering::Relaxed);
        Ok(())
    });
    if let Err(failed) = followed {
        panic!("{failed}");
    }
    let lived = lived.into_inner();
    println!("{lived} sessions lived");
    assert!(lived > 0);
    runtime.block_on(async { drop(served) });
}
