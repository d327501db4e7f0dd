//! What puts keys in force, what does not, and for how long.

use std::fs;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::KeyPair;
use serde_json::{Value, json};

use super::*;
use crate::token::{KeysAt, KeysUrl};

/// Short: the machine may have been started a minute ago.
const REFRESH: Duration = Duration::from_secs(10);

fn jwk(kid: &str) -> Value {
    let point = KeyPair::generate().unwrap().public_key_raw().to_vec();
    let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
    json!({"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": kid})
}

fn set(kids: &[&str]) -> String {
    json!({"keys": kids.iter().map(|kid| jwk(kid)).collect::<Vec<_>>()}).to_string()
}

fn kids(ring: &Keyring) -> Vec<String> {
    let set = ring.in_force();
    let keys = set.iter().flat_map(|set| &set.keys);
    keys.map(|key| key.id().unwrap_or("none").to_owned()).collect()
}

fn fetched() -> Keyring {
    let at = KeysAt::Jwks(KeysUrl::parse("https://issuer.example/jwks").unwrap());
    let mut ring = Keyring::fetched(Fetcher::new(at, None, REFRESH, 2 * REFRESH).unwrap());
    ring.settle(&[Algorithm::Es256]).unwrap();
    ring
}

/// A key set's file in a folder of its own.
struct File(PathBuf);

impl File {
    fn new(name: &str) -> File {
        let dir = std::env::temp_dir().join(format!("pgsilo-keys-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        File(dir.join("jwks.json"))
    }

    fn write(&self, text: &str) {
        let new = self.0.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.0).unwrap();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(self.0.parent().unwrap());
    }
}

#[test]
fn a_new_set_takes_the_old_ones_place_as_a_whole() {
    let ring = fetched();
    assert!(ring.in_force().is_none(), "nothing before the first fetch");
    ring.replace("i", set(&["a", "b"]).as_bytes(), BootTime::now()).unwrap();
    assert_eq!(kids(&ring), ["a", "b"]);
    ring.replace("i", set(&["b", "c"]).as_bytes(), BootTime::now()).unwrap();
    assert_eq!(kids(&ring), ["b", "c"]);
}

#[test]
fn a_set_that_is_not_valid_changes_nothing() {
    let ring = fetched();
    ring.replace("i", set(&["a"]).as_bytes(), BootTime::now()).unwrap();
    let mut private = jwk("b");
    private["d"] = "AAAA".into();
    let mut prime = jwk("b");
    prime["p"] = "AAAA".into();
    let other = json!({"kty": "OKP", "crv": "Ed25519", "kid": "e",
        "x": URL_SAFE_NO_PAD.encode(KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().public_key_raw())});
    for (json, error) in [
        (json!({"keys": [jwk("b"), private]}), KeyError::Private(1)),
        (json!({"keys": [prime]}), KeyError::Private(0)),
        (json!({"keys": [jwk("b"), jwk("b")]}), KeyError::DuplicateKey("b".to_owned())),
        (json!({"keys": [other]}), KeyError::NoneFits),
        (json!({"keys": []}), KeyError::NoKey("the set is empty".to_owned())),
    ] {
        let refused = ring.replace("i", json.to_string().as_bytes(), BootTime::now());
        assert_eq!(refused, Err(error));
        assert_eq!(kids(&ring), ["a"]);
    }
    for text in ["", "{", "[]", "{\"keys\":[],\"keys\":[]}", "<html>"] {
        let refused = ring.replace("i", text.as_bytes(), BootTime::now());
        assert!(matches!(refused, Err(KeyError::NotJwks(_))), "{text}");
        assert_eq!(kids(&ring), ["a"]);
    }
}

#[test]
fn fetched_keys_serve_for_max_stale_and_no_longer() {
    let ring = fetched();
    let some = Duration::from_secs(5);
    ring.replace("i", set(&["a"]).as_bytes(), BootTime::now().earlier(2 * REFRESH - some)).unwrap();
    assert_eq!(kids(&ring), ["a"]);
    assert!(ring.age().unwrap() >= 2 * REFRESH - some);
    ring.replace("i", set(&["a"]).as_bytes(), BootTime::now().earlier(2 * REFRESH + some)).unwrap();
    assert!(ring.in_force().is_none());
    ring.replace("i", set(&["a"]).as_bytes(), BootTime::now()).unwrap();
    assert_eq!(kids(&ring), ["a"]);
    assert!(ring.age().unwrap() < some);
}

#[test]
fn a_file_is_read_again_when_it_changes_and_not_before() {
    let file = File::new("changes");
    file.write(&set(&["a"]));
    let (opened, first) = KeyFile::open(file.0.clone()).unwrap();
    let mut ring = Keyring::file(opened, first.keys);
    ring.settle(&[Algorithm::Es256]).unwrap();
    assert!(!ring.reload("i", false).unwrap().unwrap());
    assert!(ring.reload("i", true).unwrap().unwrap(), "in any case");
    file.write(&set(&["b"]));
    assert_eq!(kids(&ring), ["a"]);
    assert!(ring.reload("i", false).unwrap().unwrap());
    assert_eq!(kids(&ring), ["b"]);

    for bad in ["", "{\"keys\":[]}"] {
        file.write(bad);
        assert!(ring.reload("i", false).unwrap().is_err());
        assert!(!ring.reload("i", false).unwrap().unwrap(), "said once");
        assert_eq!(kids(&ring), ["b"], "for ever: it has no source");
    }
    fs::remove_file(&file.0).unwrap();
    let gone = ring.reload("i", false).unwrap().unwrap_err();
    assert!(matches!(gone, KeyFileError::Unreadable { .. }), "{gone}");
    let failing = ring.age().unwrap();
    assert!(failing > Duration::ZERO);
    file.write(&set(&["c"]));
    assert!(ring.reload("i", false).unwrap().unwrap());
    assert_eq!((kids(&ring), ring.age().unwrap()), (vec!["c".to_owned()], Duration::ZERO));
}

#[test]
fn listed_keys_do_not_change() {
    let mut ring = Keyring::listed(KeySet::from_jwks(set(&["a"]).as_bytes()).unwrap().keys);
    ring.settle(&[Algorithm::Es256]).unwrap();
    assert!(
        ring.reload("i", true).is_none() && ring.refresh_gate().is_none() && ring.age().is_none()
    );
}

#[test]
fn text_of_an_issuer_is_logged_as_one_short_line() {
    assert_eq!(cut("a\nb\u{1b}[31m"), "ab[31m");
    assert_eq!(cut(&"é".repeat(1000)).chars().count(), MAX_WORDS);
}
