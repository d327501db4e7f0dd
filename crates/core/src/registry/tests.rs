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
    assert_eq!(tenant.placement().host.to_string(), "db:5432");
    assert_eq!(tenant.placement().auth, AuthMethods::default());
    assert_eq!(tenant.lease().mount, "pgsilo/acme");
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
    let mut shared = snapshot.tenants().map(|tenant| match &tenant.placement().tls {
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
