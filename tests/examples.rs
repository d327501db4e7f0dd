//! The example configurations load, and every mistake has its one-line error.
//!
//! The examples are copied into a folder with freshly made certificates, keys and
//! secrets of the names that they use. A mistake is one edit of an example; its whole
//! error text is compared, with the folder's path left out.

#![expect(clippy::unwrap_used, reason = "what a test sets up may panic")]
#![expect(clippy::disallowed_methods, reason = "the examples name files of a folder of their own")]

#[path = "examples/edits.rs"]
mod edits;
#[path = "examples/providers.rs"]
mod providers;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use edits::{MISTAKES, WARNINGS};
use pgsilo::config::{Auth, Authority, Config, ListenAddress, LogFormat, Opened, TimeLimits};
use pgsilo_core::registry::{Host, OwnLimits, PlacementTls, State};
use pgsilo_core::tenant::{Access, TenantId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, SerialNumber,
};

/// A folder that holds the examples and what they name; removed at the end.
struct Folder(PathBuf);

/// Made once: name and content of every file.
fn made() -> &'static [(&'static str, String)] {
    static MADE: OnceLock<Vec<(&str, String)>> = OnceLock::new();
    MADE.get_or_init(|| {
        let ca = CertifiedIssuer::self_signed(ca_params(), KeyPair::generate().unwrap()).unwrap();
        let namesake =
            CertifiedIssuer::self_signed(ca_params(), KeyPair::generate().unwrap()).unwrap();
        let mut old = CertificateParams::new(Vec::new()).unwrap();
        old.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        old.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let old = old.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["localhost".into()]).unwrap();
        let leaf = leaf.signed_by(&key, &ca).unwrap();
        let within = |begin, end| {
            let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
            params.not_before = rcgen::date_time_ymd(begin, 1, 1);
            params.not_after = rcgen::date_time_ymd(end, 1, 1);
            params.signed_by(&key, &ca).unwrap().pem()
        };
        let signer = KeyPair::generate().unwrap();
        vec![
            ("pgsilo.toml", include_str!("../config/pgsilo.toml").into()),
            ("tenants.toml", include_str!("../config/tenants.toml").into()),
            ("denied.toml", include_str!("../config/denied.toml").into()),
            ("clients-ca.crt", ca.pem()),
            ("clients.crl", crl(&ca, 2020, 2099)),
            ("old.crl", crl(&ca, 2020, 2021)),
            ("forged.crl", crl(&namesake, 2020, 2099)),
            ("old-ca.crt", old.pem()),
            ("token", "e30.e30.e30\n".into()),
            ("server.crt", leaf.pem() + &ca.pem()),
            ("expired.crt", within(2020, 2021)),
            ("early.crt", within(2098, 2099)),
            ("server.key", key.serialize_pem()),
            ("mutual.crt", leaf.pem() + &ca.pem()),
            ("mutual.key", key.serialize_pem()),
            ("other.key", KeyPair::generate().unwrap().serialize_pem()),
            ("db-ca.crt", ca.pem()),
            ("openbao-ca.crt", ca.pem()),
            ("issuer-ca.crt", ca.pem()),
            ("secret-id", "e2c1\n".into()),
            ("bao-token", "s.token\n".into()),
            ("issuer.pem", signer.public_key_pem()),
            ("jwks.json", jwks(&signer, "2026-01", "")),
            ("twice.json", jwks(&signer, "a", &(jwk(&signer, "a", "") + ","))),
            ("private.json", jwks(&signer, "a", r#"{"kty":"EC","d":"AA"},"#)),
            ("symmetric.json", r#"{"keys":[{"kty":"oct","k":"AA"}]}"#.into()),
            ("empty", String::new()),
        ]
    })
}

/// Of all authorities here.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A revocation list that revokes nothing.
fn crl(ca: &CertifiedIssuer<'_, KeyPair>, from: i32, until: i32) -> String {
    let list = CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(from, 1, 1),
        next_update: rcgen::date_time_ymd(until, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(ca).unwrap().pem().unwrap()
}

fn jwk(key: &KeyPair, kid: &str, more: &str) -> String {
    let point = key.public_key_raw();
    let (x, y) = (base64url(&point[1..33]), base64url(&point[33..]));
    format!(r#"{{"kty":"EC","crv":"P-256","kid":"{kid}","x":"{x}","y":"{y}"{more}}}"#)
}

fn jwks(key: &KeyPair, kid: &str, before: &str) -> String {
    format!(r#"{{"keys":[{before}{}]}}"#, jwk(key, kid, r#","use":"sig""#))
}

fn base64url(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pgsilo-examples-{}-{count}", std::process::id());
        let folder = Folder(std::env::temp_dir().join(name));
        std::fs::create_dir_all(&folder.0).unwrap();
        for (name, text) in made() {
            folder.write(name, text);
        }
        folder
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap()
    }

    /// Edits whichever example holds `from`, which must be there exactly once.
    fn edit(&self, from: &str, to: &str) {
        let names = ["pgsilo.toml", "tenants.toml"];
        let found: Vec<_> = names.iter().filter(|name| self.read(name).contains(from)).collect();
        assert_eq!(found.len(), 1, "{from:?} must be in one example");
        let text = self.read(found[0]);
        assert_eq!(text.matches(from).count(), 1, "{from:?} must be there once");
        self.write(found[0], text.replace(from, to));
    }

    fn load(&self) -> Result<Config, String> {
        Config::load(&self.0.join("pgsilo.toml")).map_err(|error| self.bare(&error.to_string()))
    }

    fn open(&self) -> Result<Opened, String> {
        self.load()?.open().map_err(|error| self.bare(&error.to_string()))
    }

    fn bare(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.0.display()), "")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_examples_load_and_mean_what_they_say() {
    let folder = Folder::new();
    let config = folder.load().unwrap();
    let [tcp, unix] = config.listeners.as_slice() else { panic!("{:?}", config.listeners) };
    assert!(tcp.tls.as_ref().unwrap().required && unix.tls.is_none());
    let (ListenAddress::Tcp(address), ListenAddress::Unix { path, mode }) =
        (&tcp.place, &unix.place)
    else {
        panic!("{:?}", config.listeners);
    };
    assert_eq!(address.to_string(), "127.0.0.1:6432");
    assert_eq!(path.to_str(), Some("/run/pgsilo/.s.PGSQL.6432"));
    assert_eq!(*mode, 0o660);
    assert_eq!(config.proxy.max_staleness, None);
    assert!(!config.proxy.endings.end_when_stale);
    assert_eq!(config.proxy.regions, None);
    assert_eq!(config.openbao.address, "https://127.0.0.1:8200");
    assert!(config.openbao.ca.is_none());
    let Authority::Proxy(Auth::AppRole { mount, role_id, secret_id_file, wrapped: false }) =
        &config.proxy.lease.authority
    else {
        panic!()
    };
    assert_eq!(mount, "approle");
    assert_eq!((role_id.as_str(), secret_id_file), ("pgsilo", &folder.0.join("secret-id")));
    assert_eq!(config.openbao.timeout, Duration::from_secs(5));
    assert_eq!(config.proxy.limits.max_sessions_per_tenant, Some(80));
    assert_eq!(config.proxy.limits.max_connections_per_address, None);
    let hour = Some(Duration::from_secs(3600));
    let times = TimeLimits { idle_in_transaction: hour, ..TimeLimits::default() };
    assert_eq!(config.proxy.limits.times, times);
    assert_eq!(config.admin.unwrap().to_string(), "127.0.0.1:9432");
    assert_eq!(config.log.format, LogFormat::Json);
    assert!(config.cores >= 1);

    let opened = config.open().unwrap();
    assert_eq!(opened.warnings, Vec::<String>::new());
    assert!(!opened.verifier().is_empty());
    let tenants = opened.registry().snapshot();
    assert_eq!(tenants.len(), 2);
    let acme = tenants.tenant(&TenantId::parse("acme").unwrap()).unwrap();
    assert_eq!(acme.state(), State::Active);
    assert_eq!(
        acme.placement().cluster.endpoints[0],
        Host::Tcp { host: "db1.internal".into(), port: 5432 }
    );
    assert!(matches!(
        acme.placement().cluster.tls,
        PlacementTls::Enabled { server_name: None, .. }
    ));
    assert_eq!(acme.placement().cluster.region.as_deref(), Some("eu-central"));
    assert_eq!(acme.lease().role(Access::ReadOnly), Some("tenant-acme-ro"));
    assert_eq!(acme.lease().role(Access::Migrate), None);
    let own = OwnLimits { transaction: Some(Duration::from_secs(600)), ..OwnLimits::default() };
    assert_eq!(acme.limits(), &OwnLimits { max_sessions: Some(20), ..own });
    let globex = tenants.tenant(&TenantId::parse("globex").unwrap()).unwrap();
    assert!(matches!(globex.placement().cluster.tls, PlacementTls::Disable));
    assert!(matches!(globex.placement().cluster.endpoints[0], Host::Unix(_)));
    assert_eq!(globex.limits(), &OwnLimits::default());
}

#[test]
fn the_readmes_configuration_needs_nothing_more() {
    let folder = Folder::new();
    let readme = include_str!("../README.md");
    let (_, block) = readme.split_once("\n```toml\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    folder.write("pgsilo.toml", block);
    assert_eq!(folder.open().unwrap().warnings, Vec::<String>::new());
}

/// Every table that has defaults, left out, means what the example shows.
#[test]
fn defaults_are_those_of_the_example() {
    let folder = Folder::new();
    let full = folder.load().unwrap();
    let text = folder.read("pgsilo.toml");
    let (kept, _) = text.split_once("[limits]").unwrap();
    let optional = ["tenant_claim", "leeway", "timeout", "max_concurrent", "mode"];
    let kept = kept.lines().filter(|line| !optional.iter().any(|key| line.starts_with(key)));
    folder.write("pgsilo.toml", kept.collect::<Vec<_>>().join("\n"));
    let short = folder.load().unwrap();
    assert_eq!(short.proxy.limits, full.proxy.limits);
    assert_eq!(short.log, full.log);
    assert_eq!(short.cores, full.cores);
    assert_eq!(short.openbao.timeout, full.openbao.timeout);
    assert_eq!(short.proxy.lease.max_concurrent_requests, full.proxy.lease.max_concurrent_requests);
    // As its comment says; the default is made of another bound.
    assert_eq!(short.proxy.lease.max_pending_revocations, 20_000);
    assert_eq!(format!("{:?}", short.listeners[1]), format!("{:?}", full.listeners[1]));
    let settings = |config: &Config| {
        let text = format!("{:?}", config.issuers);
        text[text.find("tenant_claim").unwrap()..].to_owned()
    };
    assert_eq!(settings(&short), settings(&full));
    // Where nothing is said of access, a token without the claim "access" is for read-write.
    let access = ["access_claim", "default_access"];
    let text = folder.read("pgsilo.toml");
    let silent = text.lines().filter(|line| !access.iter().any(|key| line.starts_with(key)));
    folder.write("pgsilo.toml", silent.collect::<Vec<_>>().join("\n"));
    let silent = settings(&folder.load().unwrap());
    assert_eq!(
        silent,
        settings(&full).replace("default_access: None", "default_access: Some(ReadWrite)")
    );
    assert_eq!(short.admin, None, "no admin table, no admin port");
}

/// The lines that the examples carry as comments.
#[test]
fn the_commented_alternatives_load_too() {
    let alternatives = [
        vec![("# require_tls = true ", "require_tls = false ")],
        vec![
            ("jwks = \"jwks.json\"", ""),
            ("# keys = [", "keys = ["),
            ("tenant_claim = \"tenant\"", "tenant_claim = \"/app/tenants\""),
        ],
        vec![
            ("jwks = \"jwks.json\"", ""),
            ("# jwks_url", "jwks_url"),
            ("# refresh", "refresh"),
            ("# max_stale = ", "max_stale = "),
            ("# ca = \"issuer", "ca = \"issuer"),
        ],
        vec![("jwks = \"jwks.json\"", ""), ("# discovery", "discovery")],
        vec![
            ("# access_values", "access_values"),
            ("# tenants = [", "tenants = ["),
            ("# max_access", "max_access"),
            ("# max_lifetime", "max_lifetime"),
            ("# audience_claim", "audience_claim"),
            ("# tenant_values", "tenant_values"),
            ("# aliases", "aliases"),
        ],
        vec![
            ("jwks = \"jwks.json\"", "jwks_url = \"http://127.0.0.1:8080/keys\"\nrefresh = \"1s\""),
            ("# max_stale = \"24h\"", "max_stale = \"2s\""),
        ],
        vec![
            ("# max_staleness", "max_staleness"),
            ("# stale_sessions", "stale_sessions"),
            ("# regions", "regions"),
        ],
        vec![
            ("# [[cluster]]", "[[cluster]]"),
            ("# name = \"eu-1\"", "name = \"eu-1\""),
            ("# endpoints", "endpoints"),
            ("# monitor", "monitor"),
            ("socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname", "cluster = \"eu-1\"\ndbname"),
        ],
        vec![
            ("file = \"tenants.toml\"", ""),
            ("# postgres = {", "postgres = {"),
            ("# authorization", "authorization"),
        ],
        vec![("# ca = \"openbao", "ca = \"openbao")],
        vec![
            ("auth = { approle", "# auth = { approle"),
            ("# auth = { token_file = \"bao", "auth = { token_file = \"bao"),
        ],
        vec![
            ("auth = { approle", "# auth = { approle"),
            ("# auth = { jwt", "auth = { jwt"),
            ("pgsilo.jwt", "secret-id"),
        ],
        vec![
            ("auth = { approle", "# auth = { approle"),
            ("# auth = { certificate", "auth = { certificate"),
            (
                "# client_certificate = { certificate = \"pgsilo.crt\", key = \"pgsilo.key\" }",
                "client_certificate = { certificate = \"server.crt\", key = \"server.key\" }",
            ),
        ],
        vec![
            ("auth = { approle", "# auth = { approle"),
            ("authority = \"proxy\"", "authority = \"session\""),
            ("# [lease.session]", "[lease.session]"),
            ("# roles = { read-write", "roles = { read-write"),
        ],
        vec![("https://127.0.0.1:8200", "unix:/run/bao/agent.sock"), ("# namespace", "namespace")],
        vec![
            ("tls = { mode = \"verify-full\"", "# "),
            ("# tls = { server_name", "tls = { server_name"),
            ("# auth = [\"scram", "auth = [\"scram"),
        ],
        vec![("# max_pending_revocations", "max_pending_revocations")],
        vec![
            ("tls = { certificate = \"server.crt\"", "# "),
            ("# tls = { key = \"mutual.key\"", "tls = { key = \"mutual.key\""),
            ("auth = \"password\" ", "# "),
            ("# auth = \"certificate\"", "auth = \"certificate\""),
            ("# sni_suffix", "sni_suffix"),
            ("# database_names = [", "database_names = ["),
            ("# proxy_protocol", "proxy_protocol"),
        ],
        vec![
            ("auth = \"password\" ", "# "),
            ("# auth = { oauthbearer", "auth = { oauthbearer"),
            ("# allow_uids", "allow_uids"),
            ("# auth = { token_file = \"token\"", "auth = { token_file = \"token\""),
            ("# denied", "denied"),
        ],
        vec![("# auth = { exec", "auth = { exec")],
        vec![
            ("mode = \"verify-full\", ca = \"db-ca.crt\"", "mode = \"disable\""),
            ("host = \"db1.internal\"", "host = \"::1\""),
        ],
        vec![("https://127.0.0.1:8200", "http://[::1]:8200/")],
    ];
    for edits in alternatives {
        let folder = Folder::new();
        for (from, to) in &edits {
            folder.edit(from, to);
        }
        let config = folder.load().unwrap_or_else(|error| panic!("{edits:?}: {error}"));
        assert!(!config.openbao.address.ends_with('/'));
        let opened = folder.open().unwrap_or_else(|error| panic!("{edits:?}: {error}"));
        assert_eq!(opened.warnings, Vec::<String>::new());
    }
}

#[test]
fn every_mistake_has_its_line() {
    let mut wrong = String::new();
    for (from, to, expected) in MISTAKES {
        let folder = Folder::new();
        folder.edit(from, to);
        let error = folder.open().map(|_| "it loads".to_owned()).unwrap_or_else(|error| error);
        if error != *expected {
            wrong.push_str(&format!("{from} -> {to}\n  got      {error}\n  expected {expected}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn reuse_needs_a_pool() {
    let folder = Folder::new();
    folder.edit("max_idle = 100", "max_idle = 0");
    assert!(folder.load().is_ok());
    folder.edit("reuse = \"never\"", "reuse = \"reset\"");
    assert_eq!(
        folder.load().map(|_| ()),
        Err("pgsilo.toml:142: pool.reuse: \"reset\", but pool.max_idle is 0; no connection could be kept".to_owned())
    );
}

/// A window's credential is one subject's, and a connection is handed on with its credential.
#[test]
fn reuse_and_windows_exclude_each_other() {
    let folder = Folder::new();
    folder.edit("scope = \"session\"", "scope = \"window\"");
    assert!(folder.load().is_ok());
    folder.edit("reuse = \"never\"", "reuse = \"reset\"");
    let error = folder.load().map(|_| ()).expect_err("refused");
    assert!(error.starts_with("pgsilo.toml:142: pool.reuse: \"reset\" would give"), "{error}");
}

/// Under session authority OpenBAO reads the token for itself.
#[test]
fn issuers_own_values_cause_a_warning_under_session_authority() {
    let folder = Folder::new();
    for (from, to) in [
        ("auth = { approle", "# auth = { approle"),
        ("authority = \"proxy\"", "authority = \"session\""),
        ("# [lease.session]", "[lease.session]"),
        ("# roles = { read-write", "roles = { read-write"),
        ("# tenant_values", "tenant_values"),
        ("# aliases", "aliases"),
    ] {
        folder.edit(from, to);
    }
    let said = folder.open().unwrap().warnings;
    let fields: Vec<_> = said.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(fields, ["issuer[0].tenant_values", "registry.file"], "{said:?}");
    assert!(
        said.iter().all(|line| line.ends_with("its role must know the same words")),
        "{said:?}"
    );
}

#[test]
fn unwise_settings_cause_warnings() {
    let mut wrong = String::new();
    for (from, to, expected) in WARNINGS {
        let folder = Folder::new();
        folder.edit(from, to);
        let opened = folder.open().unwrap_or_else(|error| panic!("{from} -> {to}: {error}"));
        let said = folder.bare(&opened.warnings.join(" | "));
        if said != *expected {
            wrong.push_str(&format!("{from} -> {to}\n  got      {said}\n  expected {expected}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn world_readable_secrets_cause_a_warning() {
    let folder = Folder::new();
    for name in ["secret-id", "server.key"] {
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(folder.0.join(name), open).unwrap();
    }
    let said: Vec<_> =
        folder.open().unwrap().warnings.iter().map(|line| folder.bare(line)).collect();
    assert_eq!(
        said,
        [
            "pgsilo.toml:13: listener[0].tls.key: \"server.key\" can be read by every user; use chmod 600",
            "pgsilo.toml:79: openbao.auth.approle.secret_id_file: \"secret-id\" can be read by every user; use chmod 600",
        ]
    );
}

#[test]
fn binary_files_are_reported() {
    let folder = Folder::new();
    folder.write("pgsilo.toml", b"# fine\n# \xff\n");
    assert_eq!(folder.open().unwrap_err(), "pgsilo.toml:2: not UTF-8; save the file as UTF-8");
    let missing = Config::load(&folder.0.join("missing.toml")).unwrap_err().to_string();
    assert_eq!(
        folder.bare(&missing),
        "missing.toml: cannot read the file: No such file or directory (os error 2)"
    );
    let directory = Config::load(&folder.0).unwrap_err().to_string();
    assert!(directory.ends_with(": cannot read the file: Is a directory (os error 21)"));
    folder.write("pgsilo.toml", "");
    assert_eq!(
        folder.open().unwrap_err(),
        "pgsilo.toml:1: the key \"registry\" is missing; add it"
    );
}
