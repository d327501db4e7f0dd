//! Every kind of name, and the promise that no answer depends on anybody else's tenants.

use std::fmt::Write;

use pgsilo_core::tls::Holder;
use pgsilo_wire::startup::InitialPacket;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::registry::tests::read;
use crate::token::Claims;

/// A tenant as a registry has it.
#[derive(Debug, Clone)]
struct Entry {
    id: &'static str,
    dbname: &'static str,
    names: Vec<&'static str>,
}

/// Each on a server of its own, so that two may call their databases the same.
fn registry(entries: &[Entry]) -> Snapshot {
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
    read(&text)
}

/// What a client says first; `None` where that is no startup packet.
fn startup(parameters: &[(&str, &str)]) -> Option<Startup> {
    let mut body = vec![0, 3, 0, 0];
    for (name, value) in parameters {
        body.extend([name.as_bytes(), &[0], value.as_bytes(), &[0]].concat());
    }
    body.push(0);
    match InitialPacket::parse(&body.into()) {
        Ok(InitialPacket::Startup(startup)) => Some(startup),
        _ => None,
    }
}

/// What the client states: database, user, host.
type Stated<'a> = (Option<&'a str>, &'a str, Option<&'a str>);

/// The route of a token for these tenants, which says nothing of regions.
fn resolve(
    tenants: &[&str],
    (database, user, host): Stated<'_>,
    allowed: &DatabaseNames,
    registry: &Snapshot,
) -> Option<Result<Route, RouteError>> {
    let database = database.map(|name| ("database", name));
    let parameters: Vec<_> = [("user", user)].into_iter().chain(database).collect();
    let identity = Identity::Token(Claims::of(tenants, Access::ReadOnly));
    let rules = Rules { allowed, regions: None };
    Some(Route::resolve(&identity, &startup(&parameters)?, host, registry, rules, None))
}

/// The tenant's id, or the kind of error.
fn verdict(
    tenants: &[&str],
    stated: Stated<'_>,
    allowed: &DatabaseNames,
    registry: &Snapshot,
) -> String {
    match resolve(tenants, stated, allowed, registry).expect("a startup packet") {
        Ok(route) => route.tenant().id().to_string(),
        Err(RouteError::NoTenant) => "none".to_owned(),
        Err(RouteError::Ambiguous { as_user: false, .. }) => "ambiguous".to_owned(),
        Err(RouteError::Ambiguous { as_user: true, .. }) => "ambiguous, as the user".to_owned(),
        Err(RouteError::DatabaseUnknown { .. }) => "no such database".to_owned(),
        Err(RouteError::HostUnknown { .. }) => "no such host".to_owned(),
        Err(RouteError::Closed { tenant, why, .. }) => format!("{tenant}: {why}"),
        Err(error @ (RouteError::Token(_) | RouteError::Unbound { .. })) => error.to_string(),
    }
}

fn three() -> Snapshot {
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
        // Another tenant's, an unknown one, and one that only looks like its own.
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
    // A tenant that the registry does not know has its id.
    let new = verdict(&["new"], (Some("new"), "me", None), &none, &registry);
    assert_eq!(new, "new: not in the registry");
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
fn names_that_a_listener_allows_select_no_tenant() {
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
        // With a single tenant, the name means its database.
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

    /// Whatever is stated, it leads to a tenant of the identity's or to an error; and neither
    /// depends on what else the registry has.
    #[test]
    fn a_decision_does_not_depend_on_other_tenants(
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
        let stated = (database.as_deref(), user.as_str(), host.as_deref());
        let Some(found) = resolve(&own, stated, &allowed, &registry(&one)) else { return Ok(()) };
        let same = resolve(&own, stated, &allowed, &registry(&same_for_own)).expect("as before");
        match (found, same) {
            (Ok(route), Ok(same)) => {
                let id = route.tenant().id().as_str();
                prop_assert_eq!(id, same.tenant().id().as_str());
                prop_assert!(own.contains(&id));
                prop_assert_eq!(route.access(), Access::ReadOnly);
                // It never says yes to a tenant whose host is another's.
                prop_assert!(host.is_none_or(|host| host == id));
            }
            (Err(error), Err(same)) => {
                if let RouteError::Closed { tenant, .. } = &error {
                    prop_assert!(own.contains(&tenant.as_str()));
                }
                prop_assert_eq!(error, same);
            }
            (found, same) => prop_assert!(false, "{found:?}, and with others {same:?}"),
        }
    }
}

/// One tenant, with what its entry says besides.
fn entry(changes: &[(&str, &str)]) -> Snapshot {
    let mut text = "[[tenant]]\nid = \"acme\"\nstate = \"active\"\n[tenant.placement]\nhost = \"db\"\n\
                    dbname = \"tenant_acme\"\nregion = \"eu\"\ntls = { mode = \"require\" }\n[tenant.lease]\n\
                    roles = { read-only = \"ro\", migrate = \"migrate\" }\n"
        .to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    read(&text)
}

#[test]
fn one_tenant_is_reached_only_where_it_is_served_and_for_access_that_has_a_role() {
    let regions = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
    let (anywhere, here, elsewhere) =
        (None::<BTreeSet<String>>, regions(&["eu"]), regions(&["us"]));
    let active = entry(&[]);
    let paused = entry(&[("\"active\"", "\"paused\"")]);
    let suspended = entry(&[("\"active\"", "\"suspended\"")]);
    let nowhere = entry(&[("region = \"eu\"\n", "")]);
    let long = "x".repeat(9_900);
    for (registry, regions, access, setting, expected) in [
        (&active, &anywhere, Access::ReadOnly, "1", Ok("ro")),
        (&active, &here, Access::Migrate, "1", Ok("migrate")),
        (&active, &anywhere, Access::ReadWrite, "1", Err(Closed::NoRole(Access::ReadWrite))),
        (&active, &elsewhere, Access::ReadOnly, "1", Err(Closed::OtherRegion)),
        (&nowhere, &here, Access::ReadOnly, "1", Err(Closed::NoRegion)),
        (&nowhere, &anywhere, Access::ReadOnly, "1", Ok("ro")),
        (&paused, &here, Access::ReadOnly, "1", Err(Closed::Paused)),
        (&suspended, &elsewhere, Access::ReadWrite, "1", Err(Closed::Suspended)),
        (&active, &here, Access::ReadOnly, &long, Err(Closed::SettingsTooLong { excess: 13 })),
    ] {
        let startup = startup(&[("user", "me"), ("application_name", setting)]).expect("a packet");
        let identity = Identity::Token(Claims::of(&["acme"], access));
        let rules = Rules { allowed: &DatabaseNames::default(), regions: regions.as_ref() };
        let found = Route::resolve(&identity, &startup, None, registry, rules, None);
        match (found, expected) {
            (Ok(route), expected) => assert_eq!(Ok(route.role()), expected),
            (Err(RouteError::Closed { why, tenant, .. }), expected) => {
                assert_eq!((Err(why), tenant.as_str()), (expected, "acme"));
            }
            (Err(error), _) => panic!("{error}"),
        }
    }
}

#[test]
fn words_of_an_issuer_mean_what_the_registry_says() {
    let registry = entry(&[("[tenant.placement]", "aliases = [\"/Acme\"]\n[tenant.placement]")]);
    let none = DatabaseNames::default();
    let word = |word: &str| verdict(&[word], (None, "me", None), &none, &registry);
    assert_eq!(word("/Acme"), "acme");
    assert!(word("/acme").contains("found \"/acme\""), "{}", word("/acme"));
    assert_eq!(verdict(&["/Acme", "acme"], (None, "me", None), &none, &registry), "acme");
}

#[test]
fn a_certificates_holder_is_for_the_tenant_and_access_that_the_registry_binds() {
    let binding = "[[binding]]\ncertificate = \"spiffe://example/worker\"\ntenant = \"acme\"\n\
                   access = \"migrate\"\n[[tenant]]";
    let registry = entry(&[("[[tenant]]", binding)]);
    let holder = |uri: &str| {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().expect("a URI"))];
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = parameters.self_signed(&key).expect("signed");
        Identity::Certificate(Holder::of(certificate.der()).expect("one name"))
    };
    let resolve = |uri: &str, database: &str| {
        let startup = startup(&[("user", "me"), ("database", database)]).expect("a packet");
        let rules = Rules { allowed: &DatabaseNames::default(), regions: None };
        Route::resolve(&holder(uri), &startup, None, &registry, rules, None)
    };
    let route = resolve("spiffe://example/worker", "acme").expect("bound");
    assert_eq!((route.tenant().id().as_str(), route.access()), ("acme", Access::Migrate));
    let other = resolve("spiffe://example/worker", "globex");
    assert!(matches!(other, Err(RouteError::DatabaseUnknown { .. })), "{other:?}");
    let stranger = resolve("spiffe://example/other", "acme");
    assert!(matches!(stranger, Err(RouteError::Unbound { .. })), "{stranger:?}");
}

/// Equal routes share connections: each part of one makes it another.
#[test]
fn routes_are_equal_only_in_all_of_their_parts() {
    let registry = entry(&[]);
    let again = entry(&[]);
    let route = |registry: &Snapshot, access, setting: &str, token| {
        let startup = startup(&[("user", "me"), ("application_name", setting)]).expect("a packet");
        let identity = Identity::Token(Claims::of(&["acme"], access));
        let rules = Rules { allowed: &DatabaseNames::default(), regions: None };
        Route::resolve(&identity, &startup, None, registry, rules, token).expect("a route")
    };
    let one = route(&registry, Access::ReadOnly, "a", None);
    assert_eq!(one, route(&registry, Access::ReadOnly, "a", None));
    assert_ne!(one, route(&registry, Access::Migrate, "a", None));
    assert_ne!(one, route(&registry, Access::ReadOnly, "b", None));
    assert_ne!(one, route(&registry, Access::ReadOnly, "a", Some([0; 32])));
    assert_ne!(one, route(&again, Access::ReadOnly, "a", None), "another entry, for all it knows");
}
