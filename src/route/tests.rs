//! Every kind of name, and the promise that no answer depends on anybody else's tenants.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::registry::Registry;

/// A tenant as a registry has it.
#[derive(Debug, Clone)]
struct Entry {
    id: &'static str,
    dbname: &'static str,
    names: Vec<&'static str>,
}

/// Each on a server of its own, so that two may call their databases the same.
fn registry(entries: &[Entry]) -> Arc<Snapshot> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let mut text = "tenant = []\n".to_owned();
    if !entries.is_empty() {
        text.clear();
    }
    for Entry { id, dbname, names } in entries {
        write!(
            text,
            "[[tenant]]\nid = \"{id}\"\ndatabase_names = {names:?}\n[tenant.placement]\n\
             host = \"{id}\"\ndbname = \"{dbname}\"\ntls = {{ mode = \"require\" }}\n\
             [tenant.lease]\nroles = {{ read-only = \"ro\" }}\n"
        )
        .expect("written");
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = format!("pgsilo-route-{}-{number}.toml", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(file);
    std::fs::write(&path, text).expect("written");
    let snapshot = Registry::open(&path).expect("a registry").snapshot();
    std::fs::remove_file(&path).expect("removed");
    snapshot
}

fn ids(names: &[&str]) -> Vec<TenantId> {
    names.iter().map(|name| TenantId::parse(name).expect("an id")).collect()
}

/// The tenant's id, or the kind of error.
fn verdict(
    tenants: &[&str],
    stated: (Option<&str>, &str, Option<&str>),
    allowed: &DatabaseNames,
    registry: &Snapshot,
) -> String {
    let (database, user, host) = stated;
    let stated = Stated { database: database.map(str::as_bytes), user: user.as_bytes(), host };
    match choose(&ids(tenants), &stated, allowed, registry) {
        Ok(id) => id.to_string(),
        Err(RouteError::NoTenant) => "none".to_owned(),
        Err(RouteError::Ambiguous { as_user: false, .. }) => "ambiguous".to_owned(),
        Err(RouteError::Ambiguous { as_user: true, .. }) => "ambiguous, as the user".to_owned(),
        Err(RouteError::DatabaseUnknown { .. }) => "no such database".to_owned(),
        Err(RouteError::HostUnknown { .. }) => "no such host".to_owned(),
    }
}

fn three() -> Arc<Snapshot> {
    registry(&[
        Entry { id: "acme", dbname: "tenant_acme", names: vec!["app", "legacy"] },
        Entry { id: "globex", dbname: "tenant_globex", names: vec!["app"] },
        Entry { id: "initech", dbname: "tenant_acme", names: vec![] },
    ])
}

#[test]
fn a_name_agrees_or_is_refused() {
    let (registry, none) = (three(), DatabaseNames::default());
    for (database, expected) in [
        // What says nothing.
        (None, "acme"),
        (Some(""), "acme"),
        (Some("me"), "acme"),
        // What is its own.
        (Some("acme"), "acme"),
        (Some("tenant_acme"), "acme"),
        (Some("app"), "acme"),
        (Some("legacy"), "acme"),
        // Another's, nobody's, and what only looks like its own.
        (Some("globex"), "no such database"),
        (Some("tenant_globex"), "no such database"),
        (Some("initech"), "no such database"),
        (Some("acme_staging"), "no such database"),
        (Some("postgres"), "no such database"),
        (Some("ACME"), "no such database"),
        (Some("acme "), "no such database"),
        (Some("../acme"), "no such database"),
    ] {
        let found = verdict(&["acme"], (database, "me", None), &none, &registry);
        assert_eq!(found, expected, "{database:?}");
    }
    // A tenant that the registry does not know has its id; the Routed stage says that it is unknown.
    assert_eq!(verdict(&["new"], (Some("new"), "me", None), &none, &registry), "new");
    assert_eq!(verdict(&["new"], (Some("x"), "me", None), &none, &registry), "no such database");
    assert_eq!(verdict(&[], (None, "me", None), &none, &registry), "none");
}

#[test]
fn among_several_only_a_name_of_exactly_one_chooses() {
    let registry = three();
    let none = DatabaseNames::default();
    let all = ["acme", "globex", "initech"];
    for (database, expected) in [
        (None, "ambiguous"),
        (Some("me"), "ambiguous"),
        (Some("acme"), "acme"),
        (Some("globex"), "globex"),
        (Some("tenant_globex"), "globex"),
        (Some("legacy"), "acme"),
        // Of two of them.
        (Some("app"), "ambiguous"),
        (Some("tenant_acme"), "ambiguous"),
        (Some("nobody"), "no such database"),
    ] {
        let found = verdict(&all, (database, "me", None), &none, &registry);
        assert_eq!(found, expected, "{database:?}");
    }
    // The user's name says nothing, even if it is a tenant's.
    let as_user = verdict(&all, (Some("acme"), "acme", None), &none, &registry);
    assert_eq!(as_user, "ambiguous, as the user");
    // It is no tenant of theirs, and another name as the user would not help.
    assert_eq!(verdict(&all, (Some("me"), "me", None), &none, &registry), "ambiguous");
    // Of the two that it could mean, the token has one.
    let two = ["globex", "initech"];
    assert_eq!(verdict(&two, (Some("app"), "me", None), &none, &registry), "globex");
}

#[test]
fn what_a_listener_allows_says_nothing() {
    let registry = three();
    let postgres = DatabaseNames::Only(vec!["postgres".to_owned()]);
    for (allowed, database, one, two) in [
        (&postgres, "postgres", "acme", "ambiguous"),
        (&postgres, "template1", "no such database", "no such database"),
        (&postgres, "globex", "no such database", "globex"),
        (&DatabaseNames::Any, "anything", "acme", "ambiguous"),
        // Their own id is a name, or nothing could choose.
        (&DatabaseNames::Any, "globex", "acme", "globex"),
        (&DatabaseNames::Any, "tenant_globex", "acme", "ambiguous"),
        (&DatabaseNames::Only(vec!["globex".to_owned()]), "globex", "acme", "globex"),
    ] {
        let stated = (Some(database), "me", None);
        assert_eq!(verdict(&["acme"], stated, allowed, &registry), one, "{database}");
        assert_eq!(verdict(&["acme", "globex"], stated, allowed, &registry), two, "{database}");
    }
}

/// A database elsewhere may be called as a tenant is.
#[test]
fn an_id_means_its_own_tenant_whatever_others_call_their_databases() {
    let registry = registry(&[
        Entry { id: "acme", dbname: "globex", names: vec![] },
        Entry { id: "globex", dbname: "postgres", names: vec!["app"] },
    ]);
    let none = DatabaseNames::default();
    let both = ["acme", "globex"];
    for (tenants, database, host, expected) in [
        (&both[..], "globex", None, "globex"),
        (&both, "acme", None, "acme"),
        (&both, "app", None, "globex"),
        // Whoever has no other one means its database.
        (&both[..1], "globex", None, "acme"),
        (&both[1..], "globex", None, "globex"),
        // The host has chosen.
        (&both, "globex", Some("acme"), "acme"),
        (&both, "acme", Some("globex"), "no such database"),
    ] {
        let found = verdict(tenants, (Some(database), "me", host), &none, &registry);
        assert_eq!(found, expected, "{tenants:?} {database} {host:?}");
    }
    // A listener for which every name is none does not have a host's tenant under another's id.
    let any = (Some("acme"), "me", Some("globex"));
    assert_eq!(verdict(&both, any, &DatabaseNames::Any, &registry), "no such database");
}

#[test]
fn a_host_agrees_or_chooses_and_the_database_agrees_with_it() {
    let (registry, none) = (three(), DatabaseNames::default());
    let two = ["acme", "globex"];
    for (tenants, host, database, expected) in [
        (&two[..1], "acme", None, "acme"),
        (&two[..1], "acme", Some("tenant_acme"), "acme"),
        (&two[..1], "acme", Some("globex"), "no such database"),
        (&two[..1], "globex", None, "no such host"),
        (&two[..1], "nobody", None, "no such host"),
        (&two[..1], "a.b", Some("acme"), "no such host"),
        (&two[..1], "", Some("acme"), "no such host"),
        (&two, "acme", None, "acme"),
        (&two, "globex", Some("me"), "globex"),
        (&two, "globex", Some("app"), "globex"),
        (&two, "globex", Some("acme"), "no such database"),
        (&two, "initech", Some("acme"), "no such host"),
    ] {
        let found = verdict(tenants, (database, "me", Some(host)), &none, &registry);
        assert_eq!(found, expected, "{host} {database:?}");
    }
}

const IDS: [&str; 4] = ["acme", "globex", "initech", "postgres"];
const NAMES: [&str; 7] = ["app", "legacy", "tenant_acme", "tenant_globex", "nobody", "me", "Acme"];

/// Each of the ids, if it is there at all.
fn entries() -> impl Strategy<Value = Vec<Option<Entry>>> {
    let dbname = prop_oneof![select(&NAMES[..]), select(&IDS[..])];
    let entry = proptest::option::of((dbname, vec(select(&NAMES[..]), 0..3)));
    vec(entry, IDS.len()).prop_map(|entries| {
        let with_id = |(id, entry): (&'static str, Option<(&'static str, _)>)| {
            entry.map(|(dbname, names)| Entry { id, dbname, names })
        };
        IDS.into_iter().zip(entries).map(with_id).collect()
    })
}

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        select(&IDS[..]).prop_map(str::to_owned),
        select(&NAMES[..]).prop_map(str::to_owned),
        ".{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is stated, it leads to a tenant of the identity's or to an error; and neither depends
    /// on what else the registry has.
    #[test]
    fn nobody_elses_tenants_make_a_difference(
        own in proptest::sample::subsequence(&IDS[..], 0..=IDS.len()),
        (one, other) in (entries(), entries()),
        database in proptest::option::of(any_name()),
        user in any_name(),
        host in proptest::option::of(any_name()),
        allowed in prop_oneof![
            Just(DatabaseNames::Any),
            vec(any_name(), 0..3).prop_map(DatabaseNames::Only),
        ],
    ) {
        let is_own = |entry: &Entry| own.contains(&entry.id);
        let mut same_for_own: Vec<_> = one.iter().flatten().filter(|e| is_own(e)).cloned().collect();
        same_for_own.extend(other.into_iter().flatten().filter(|e| !is_own(e)));
        let one: Vec<_> = one.into_iter().flatten().collect();
        let tenants = ids(&own);
        let stated = Stated {
            database: database.as_ref().map(String::as_bytes),
            user: user.as_bytes(),
            host: host.as_deref(),
        };
        let verdict = choose(&tenants, &stated, &allowed, &registry(&one));
        prop_assert_eq!(&verdict, &choose(&tenants, &stated, &allowed, &registry(&same_for_own)));
        if let Ok(id) = verdict {
            prop_assert!(tenants.contains(id));
            // It never says yes to a tenant whose host is another's.
            prop_assert!(host.is_none_or(|host| host == id.as_str()));
        }
    }
}
