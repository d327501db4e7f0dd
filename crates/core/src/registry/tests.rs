//! Registry files, good and bad.

use std::fmt::Write;
use std::time::Instant;

use super::*;

/// A file of its own, removed at the end.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> File {
        let path = std::env::temp_dir().join(format!("pgsilo-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        File(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn entry(id: &str) -> String {
    format!(
        "[[tenant]]\nid = \"{id}\"\n[tenant.placement]\nhost = \"db\"\ntls = {{ mode = \"require\" }}\n\
         dbname = \"tenant_{id}\"\n[tenant.lease]\nroles = {{ read-only = \"{id}-ro\" }}\n"
    )
}

fn id(text: &str) -> TenantId {
    TenantId::parse(text).unwrap()
}

#[test]
fn an_entry_becomes_what_it_says() {
    let file = File::new("entry", &entry("acme"));
    let snapshot = Snapshot::read(&file.0, None).unwrap();
    let tenant = snapshot.tenant(&id("acme")).unwrap();
    assert_eq!(tenant.state(), State::Active);
    assert_eq!(tenant.placement().cluster.to_string(), "db:5432");
    assert_eq!(tenant.placement().cluster.auth, AuthMethods::default());
    assert_eq!(&*tenant.lease().mount, "pgsilo/acme");
    assert_eq!(tenant.lease().role(Access::ReadOnly), Some("acme-ro"));
    assert_eq!(tenant.lease().role(Access::ReadWrite), None, "never another access");
    assert_eq!(snapshot.tenants().count(), 1);
    assert!(snapshot.tenant(&id("globex")).is_none());
}

#[test]
fn hosts_are_names_or_addresses() {
    for (host, good) in [
        ("localhost", true),
        ("db_1.svc.cluster.local", true),
        ("10.0.0.1", true),
        ("::1", true),
        ("[::1]", false),
        ("", false),
        ("db 1", false),
        ("db/1", false),
        ("10.0.0", false),
        ("host=evil", false),
    ] {
        let file = File::new("hosts", &entry("acme").replace("\"db\"", &format!("{host:?}")));
        assert_eq!(Snapshot::read(&file.0, None).is_ok(), good, "{host:?}");
    }
}

#[test]
fn an_empty_registry_must_be_written_down() {
    let file = File::new("empty", "");
    let error = Snapshot::read(&file.0, None).unwrap_err().to_string();
    assert!(error.ends_with("the key \"tenant\" is missing; add it"), "{error}");
    std::fs::write(&file.0, "tenant = []\n").unwrap();
    assert!(Snapshot::read(&file.0, None).unwrap().is_empty());
}

/// What hangs on a tenant, such as connections that wait for its sessions, stays with it.
#[test]
fn a_reload_keeps_a_tenant_whose_entry_is_equal() {
    let ca = rcgen::KeyPair::generate().and_then(|key| {
        let mut authority = rcgen::CertificateParams::default();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Ok(authority.self_signed(&key)?.pem())
    });
    let ca = [ca.clone().unwrap(), ca.unwrap() + "\n"].map(|pem| pem.into_bytes());
    let ca_file = File::new("same-ca", "");
    std::fs::write(&ca_file.0, &ca[0]).unwrap();
    let verified = entry("acme").replace(
        "{ mode = \"require\" }",
        &format!("{{ mode = \"verify-full\", ca = {:?} }}", ca_file.0),
    );
    let file = File::new("same", &(verified.clone() + &entry("globex")));
    let mut snapshot = Snapshot::read(&file.0, None).unwrap();
    let mut stays = |text: &str| {
        std::fs::write(&file.0, text).unwrap();
        let next = Snapshot::read(&file.0, Some(&snapshot)).unwrap();
        let before = std::mem::replace(&mut snapshot, next);
        ["acme", "globex"].map(|tenant| {
            let [before, after] =
                [&before, &snapshot].map(|snapshot| snapshot.tenant(&id(tenant)).unwrap());
            Arc::ptr_eq(&before, &after)
        })
    };
    let both = verified.clone() + &entry("globex");
    assert_eq!(stays(&both), [true, true]);
    assert_eq!(stays(&(entry("globex") + "# a comment\n" + &verified)), [true, true]);
    for (from, to) in [
        ("\"db\"", "\"db2\""),
        ("tenant_acme", "tenant_acme_2"),
        ("acme-ro", "acme-ro2"),
        ("id = \"acme\"", "id = \"acme\"\nstate = \"paused\""),
        ("id = \"acme\"", "id = \"acme\"\ndatabase_names = [\"shop\"]"),
        ("mode = \"verify-full\"", "mode = \"verify-ca\""),
        ("mode = \"verify-full\"", "mode = \"verify-full\", server_name = \"db3\""),
        ("mode = \"verify-full\"", "mode = \"verify-full\", channel_binding = \"require\""),
        ("roles = {", "mount = \"elsewhere\"\nroles = {"),
        ("[tenant.lease]", "region = \"eu\"\n[tenant.lease]"),
        (
            "[tenant.lease]",
            "auth = [\"scram-sha-256\"]\n[tenant.limits]\nmax_sessions = 3\n[tenant.lease]",
        ),
    ] {
        let changed = verified.replacen(from, to, 1);
        assert_ne!(changed, verified, "{from}");
        assert_eq!(stays(&(changed + &entry("globex"))), [false, true], "{to}");
        assert_eq!(stays(&both), [false, true], "and back: {to}");
    }
    std::fs::write(&ca_file.0, &ca[1]).unwrap();
    assert_eq!(stays(&both), [false, true], "another authority");
}

/// The time is printed, not asserted: in release, 100,000 take about two seconds.
#[test]
fn many_tenants_share_their_tls_settings() {
    let mut text = String::new();
    for n in 0..2000 {
        write!(text, "{}", entry(&format!("t{n}"))).unwrap();
    }
    let file = File::new("many", &text);
    let start = Instant::now();
    let snapshot = Snapshot::read(&file.0, None).unwrap();
    println!("2000 tenants in {:?}", start.elapsed());
    assert_eq!(snapshot.len(), 2000);
    let mut shared = snapshot.tenants().map(|tenant| match &tenant.placement().cluster.tls {
        PlacementTls::Enabled { config, .. } => Arc::as_ptr(config),
        PlacementTls::Disable => unreachable!("all have TLS"),
    });
    let first = shared.next().unwrap();
    assert!(shared.all(|config| config == first));
}

#[test]
fn an_alias_means_one_tenant_and_is_no_tenants_id() {
    let tenant = |id: &str, aliases: &str| {
        entry(id)
            .replace("[tenant.placement]", &format!("aliases = [{aliases}]\n[tenant.placement]"))
    };
    let file = File::new(
        "aliases",
        &(tenant("acme", r#""org_Ab1", "/acme", "initech""#) + &tenant("globex", "")),
    );
    let snapshot = Snapshot::read(&file.0, None).unwrap();
    for (word, meant) in [
        ("acme", Some("acme")),
        ("org_Ab1", Some("acme")),
        ("/acme", Some("acme")),
        // An id's form, and no tenant's id.
        ("initech", Some("acme")),
        ("globex", Some("globex")),
        ("org_ab1", None),
        ("/acme/", None),
        ("", None),
    ] {
        assert_eq!(snapshot.named(word), meant.map(id), "{word:?}");
    }
    assert!(snapshot.tenant(&id("initech")).is_none());
    for (first, second, line, wrong) in [
        (
            r#""x", "x""#,
            "",
            3,
            "tenant[0].aliases[1]: \"x\" is already an alias of acme; aliases are unique",
        ),
        (
            r#""x""#,
            r#""y", "x""#,
            12,
            "tenant[1].aliases[1]: \"x\" is already an alias of acme; aliases are unique",
        ),
        (
            r#""globex""#,
            "",
            3,
            "tenant[0].aliases[0]: \"globex\" is a tenant's id, which means that tenant",
        ),
        (
            "",
            r#""acme""#,
            12,
            "tenant[1].aliases[0]: \"acme\" is a tenant's id, which means that tenant",
        ),
        (
            r#""acme""#,
            "",
            3,
            "tenant[0].aliases[0]: \"acme\" is a tenant's id, which means that tenant",
        ),
        (
            r#""""#,
            "",
            3,
            "tenant[0].aliases[0]: \"\" is not one: 1 to 256 characters, none of them controls or marks of direction",
        ),
        (
            r#""a\u202e""#,
            "",
            3,
            "tenant[0].aliases[0]: \"a\\u{202e}\" is not one: 1 to 256 characters, none of them controls or marks of direction",
        ),
    ] {
        let file = File::new("aliases-wrong", &(tenant("acme", first) + &tenant("globex", second)));
        let error = Snapshot::read(&file.0, None).unwrap_err().to_string();
        assert!(error.ends_with(&format!(".toml:{line}: {wrong}")), "{error}");
    }
}

#[test]
fn a_reload_reports_the_tenants_that_changed() {
    let all = entry("acme") + &entry("globex") + &entry("initech");
    let file = File::new("changes", &all);
    let mut before = Snapshot::read(&file.0, None).unwrap();
    let binding = |tenant: &str, access: &str| {
        format!(
            "[[binding]]\ncertificate = \"spiffe://x/y\"\ntenant = \"{tenant}\"\naccess = \"{access}\"\n"
        )
    };
    let with_alias = |id: &str| {
        let placed = format!("id = \"{id}\"\n");
        all.replace(&placed, &format!("{placed}aliases = [\"/word\"]\n"))
    };
    for (text, expected) in [
        (all.clone(), &[][..]),
        (all.replace("\"tenant_acme\"", "\"acme\""), &["acme"]),
        (all.clone(), &["acme"]),
        (entry("acme") + &entry("initech"), &["globex"]),
        (all.clone() + &entry("hooli"), &["globex", "hooli"]),
        (all.clone(), &["hooli"]),
        (with_alias("acme"), &["acme"]),
        (with_alias("globex"), &["acme", "globex"]),
        (all.clone() + &binding("acme", "read-only"), &["acme", "globex"]),
        (all.clone() + &binding("acme", "read-write"), &["acme"]),
        (all.clone() + &binding("initech", "read-write"), &["acme", "initech"]),
    ] {
        std::fs::write(&file.0, &text).unwrap();
        let now = Snapshot::read(&file.0, Some(&before)).unwrap();
        let mut changed: Vec<_> = now.changes(&before).into_iter().collect();
        changed.sort();
        assert_eq!(changed, expected.iter().map(|text| id(text)).collect::<Vec<_>>(), "{text}");
        before = now;
    }
}

mod changes {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn entry(entry: &Value, bindings: &Value) -> Entry {
        Entry::read(entry, bindings).unwrap()
    }

    /// What is said of a tenant, of words of which there are few: many are in each other's way.
    fn said() -> impl Strategy<Value = (usize, Value, Value)> {
        let words = ["t0", "t1", "t2", "shop", "org"];
        let few = |of: usize| vec(0..of, 0..3);
        let place = (0..3_usize, option::of(0..3_usize), option::of(0..5_usize));
        let all = (0..4_usize, place, 0..3_usize, few(5), few(5), few(3), option::of(0..3_usize));
        all.prop_map(move |(id, (db, cluster, seal), role, aliases, names, certificates, state)| {
            let pick = |picked: Vec<usize>| {
                let picked: BTreeSet<_> = picked.into_iter().map(|word| words[word]).collect();
                json!(picked)
            };
            let tenant = format!("t{id}");
            let states = ["active", "paused", "suspended"];
            let mut placement = json!({ "dbname": format!("d{db}"), "seal": seal.map(|word| words[word]) });
            match cluster {
                Some(number) => placement["cluster"] = format!("c{number}").into(),
                None => {
                    placement["host"] = "db0".into();
                    placement["tls"] = json!({ "mode": "require" });
                }
            }
            let entry = json!({
                "id": tenant,
                "state": states[state.unwrap_or_default()],
                "aliases": pick(aliases),
                "database_names": pick(names),
                "placement": placement,
                "lease": { "mount": "m", "roles": { "read-only": format!("r{role}") } },
            });
            let certificates: BTreeSet<_> = certificates.into_iter().collect();
            let bindings: Vec<_> = certificates
                .iter()
                .map(|number| json!({ "certificate": format!("dns:c{number}"), "tenant": tenant, "access": "read-only" }))
                .collect();
            (id, entry, json!(bindings))
        })
    }

    /// What is said of a cluster, if it is there: it has servers, of which there are few.
    fn cluster() -> impl Strategy<Value = (usize, Option<Value>)> {
        let servers = vec(0..4_usize, 1..=1);
        (0..3_usize, option::weighted(0.8, (servers, any::<bool>()))).prop_map(|(number, said)| {
            let said = said.map(|(servers, is_eu)| {
                let servers: Vec<_> =
                    servers.iter().map(|number| format!("db{number}:5432")).collect();
                json!({
                    "name": format!("c{number}"), "endpoints": servers,
                    "region": is_eu.then_some("eu"), "tls": { "mode": "require" },
                })
            });
            (number, said)
        })
    }

    /// All that a snapshot says, in an order.
    fn told(snapshot: &Snapshot) -> Vec<String> {
        let Index {
            tenants,
            clusters,
            servers,
            lone_servers,
            aliases,
            bindings,
            places,
            seals,
            roles,
            names,
            ..
        } = &snapshot.index;
        let mut told: Vec<_> = tenants.values().map(|tenant| format!("{tenant:?}")).collect();
        told.extend(clusters.iter().map(|entry| format!("cluster {entry:?}")));
        told.extend(servers.iter().map(|entry| format!("server {entry:?}")));
        told.extend(lone_servers.iter().map(|entry| format!("lone {entry:?}")));
        told.extend(aliases.iter().map(|entry| format!("alias {entry:?}")));
        told.extend(bindings.iter().map(|entry| format!("binding {entry:?}")));
        told.extend(places.iter().map(|entry| format!("place {entry:?}")));
        told.extend(seals.iter().map(|entry| format!("seal {entry:?}")));
        told.extend(roles.iter().map(|entry| format!("role {entry:?}")));
        told.extend(names.iter().map(|entry| format!("name {entry:?}")));
        told.sort();
        told
    }

    proptest! {
        /// However it came about, a snapshot is that of the entries that are in it.
        #[test]
        fn a_changed_snapshot_is_the_one_that_its_entries_make(
            steps in vec((vec(said(), 0..3), vec(0..4_usize, 0..2), vec(cluster(), 0..2)), 1..12)
        ) {
            let mut snapshot = Snapshot::empty();
            let mut said: BTreeMap<usize, (Value, Value)> = BTreeMap::new();
            let mut clusters_said: BTreeMap<usize, Value> = BTreeMap::new();
            for (entries, gone, clusters) in steps {
                // A source says one thing of a tenant at a time, and of a cluster.
                let mut entries: BTreeMap<_, _> =
                    entries.into_iter().map(|(id, entry, bindings)| (id, (entry, bindings))).collect();
                let clusters: BTreeMap<_, _> = clusters.into_iter().collect();
                let gone: Vec<_> = gone.into_iter().filter(|id| !entries.contains_key(id)).collect();
                let mut news = News {
                    tenants_gone: gone.iter().map(|number| id(&format!("t{number}"))).collect(),
                    ..News::default()
                };
                for (number, said) in &clusters {
                    match said {
                        Some(said) => news.clusters.push(serde_json::from_value(said.clone()).unwrap()),
                        None => news.clusters_gone.push(format!("c{number}")),
                    }
                    clusters_said.remove(number);
                }
                clusters_said.extend(clusters.iter().filter_map(|(n, said)| Some((*n, said.clone()?))));
                // Of every other tenant of such a cluster it says what it said, or nothing.
                for (number, (one, bindings)) in &said {
                    let of = one["placement"]["cluster"].as_str().unwrap_or_default();
                    let is_of_one = clusters.keys().any(|cluster| of == format!("c{cluster}"));
                    if is_of_one && number % 2 == 0 && !gone.contains(number) {
                        entries.entry(*number).or_insert_with(|| (one.clone(), bindings.clone()));
                    }
                }
                news.tenants = entries.values().map(|(one, bindings)| entry(one, bindings)).collect();
                let ids: BTreeSet<_> = said.keys().chain(entries.keys()).map(|n| format!("t{n}")).collect();
                let is_id = |word: &str| ids.contains(word);
                let Change { snapshot: next, changed, rejected } =
                    snapshot.change(news, &is_id, &Path::to_path_buf);
                // No tenant's id becomes another's word, be the tenant acceptable or not.
                for (alias, owner) in next.aliases().filter(|(_, owner)| changed.contains(owner)) {
                    prop_assert!(!ids.contains(alias), "{alias} of {owner}");
                }
                prop_assert_eq!(&changed, &next.changes(&snapshot));
                for number in &gone {
                    said.remove(number);
                }
                said.extend(entries);
                for one in &rejected {
                    let number = one.id[1..].parse::<usize>().unwrap();
                    if one.kind == "cluster" {
                        prop_assert!(next.cluster(&one.id).is_none(), "{:?}", one);
                        clusters_said.remove(&number);
                    } else {
                        prop_assert!(next.tenant(&id(&one.id)).is_none(), "{:?}", one);
                        said.remove(&number);
                    }
                }
                let (tenants, bindings): (Vec<_>, Vec<_>) = said.values().cloned().unzip();
                let bindings: Vec<_> =
                    bindings.iter().flat_map(|of| of.as_array().unwrap().clone()).collect();
                let clusters: Vec<_> = clusters_said.values().cloned().collect();
                let whole = json!({ "cluster": clusters, "tenant": tenants, "binding": bindings });
                let whole = serde_json::from_value(whole).unwrap();
                let whole = Snapshot::of(whole, None, &Path::to_path_buf).unwrap();
                prop_assert_eq!(told(&next), told(&whole));
                snapshot = next;
            }
        }
    }

    #[test]
    fn a_rejected_entry_is_told_with_its_field_and_takes_nothing_of_the_other() {
        let one = |id: &str, db: &str, role: &str| {
            let tenant = json!({
                "id": id,
                "placement": { "host": "db", "dbname": db, "tls": { "mode": "require" } },
                "lease": { "mount": "m", "roles": { "read-only": role } },
            });
            entry(&tenant, &json!([]))
        };
        let none = &Path::to_path_buf;
        let news = |entry: Entry| News { tenants: vec![entry], ..News::default() };
        let first =
            Snapshot::empty().change(news(one("acme", "d1", "r1")), &|_| false, none).snapshot;
        for (rejected, field, what) in [
            (
                one("globex", "d1", "r2"),
                "placement.dbname",
                "\"d1\" on db:5432 is already the database of acme; tenants never share one",
            ),
            (
                one("globex", "d2", "R1"),
                "lease.roles.read-only",
                "\"R1\" of \"m\" is tenant \"acme\"'s; tenants never share a role",
            ),
            (
                one("Globex", "d2", "r2"),
                "id",
                "\"Globex\" is not one: a tenant id is 1 to 49 of a-z 0-9 _ - and starts with a letter or a digit",
            ),
        ] {
            let change = first.change(news(rejected), &|_| false, none);
            let told = &change.rejected[0];
            assert_eq!((&*told.field, &*told.what), (field, what));
            assert_eq!((change.changed.len(), change.snapshot.len()), (0, 1));
            // The role is still acme's.
            let again = change.snapshot.change(news(one("hooli", "d3", "r1")), &|_| false, none);
            assert_eq!(again.rejected.len(), 1);
        }
    }
}
