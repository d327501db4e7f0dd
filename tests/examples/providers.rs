//! docs/providers.md: each token that it shows is signed as its header says, and verified with the
//! settings that it shows, with nothing changed but where the key comes from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey};
use pgsilo::config::Opened;
use pgsilo::token::{Claims, Rejected};
use pgsilo_core::secret::Secret;
use rcgen::{KeyPair, PKCS_RSA_SHA256};
use serde_json::Value;

use super::Folder;

/// What was shown last of each kind, on the way down the page.
#[derive(Default)]
struct Shown {
    header: Value,
    payload: Value,
    issuer: String,
    tenant: String,
}

/// A piece of the page.
enum Piece<'a> {
    /// A new provider.
    Section(&'a str),
    /// A code block, and its language.
    Code(&'a str, &'a str),
    /// The line that says what comes of what was shown.
    Verdict(&'a str),
}

fn pieces(page: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    for (number, part) in page.split("```").enumerate() {
        if number % 2 == 1 {
            let (language, code) = part.split_once('\n').unwrap();
            pieces.push(Piece::Code(language, code));
            continue;
        }
        for line in part.lines() {
            match line.strip_prefix("## ") {
                Some(provider) => pieces.push(Piece::Section(provider)),
                None if line.starts_with("It is ") => pieces.push(Piece::Verdict(line)),
                None => {}
            }
        }
    }
    pieces
}

impl Shown {
    fn see(&mut self, language: &str, code: &str) {
        match language {
            "json" => {
                let mut values = serde_json::Deserializer::from_str(code).into_iter::<Value>();
                let mut next = || values.next().unwrap().unwrap();
                (self.header, self.payload) = (next(), next());
                assert!(values.next().is_none(), "{code}");
            }
            "toml" if code.starts_with("[[issuer]]\n") => code.clone_into(&mut self.issuer),
            _ => {
                assert!(
                    language == "toml" && code.starts_with("[[tenant]]\n"),
                    "{language}: {code}"
                );
                code.clone_into(&mut self.tenant);
            }
        }
    }

    /// The examples' configuration with these settings in place of its issuer.
    fn load(&self, folder: &Folder, key: &KeyPair) -> Opened {
        folder.write("provider.pem", key.public_key_pem());
        let kid = &self.header["kid"];
        let own =
            format!("keys = [{{ kid = {kid}, algorithm = \"RS256\", pem = \"provider.pem\" }}]");
        let source = "discovery = true";
        assert_eq!(self.issuer.matches(source).count(), 1, "{}", self.issuer);
        let text = folder.read("pgsilo.toml");
        let (before, rest) = text.split_once("[[issuer]]").unwrap();
        let (_, behind) = rest.split_once("\n[registry]").unwrap();
        let issuer = self.issuer.replace(source, &own);
        folder.write("pgsilo.toml", format!("{before}{issuer}\n[registry]{behind}"));
        if !self.tenant.is_empty() {
            let text = folder.read("tenants.toml");
            assert!(self.tenant.starts_with("[[tenant]]\nid = \"acme\"\n"), "{}", self.tenant);
            let (before, behind) = text.split_once("[[tenant]]\nid = \"acme\"").unwrap();
            folder.write("tenants.toml", format!("{before}{}#{behind}", self.tenant));
        }
        let opened = folder.open().unwrap();
        assert_eq!(opened.warnings, Vec::<String>::new());
        opened
    }

    /// As it is made by its provider.
    fn sign(&self, key: &KeyPair) -> Secret {
        let part = |value: &Value| super::base64url(value.to_string().as_bytes());
        let message = format!("{}.{}", part(&self.header), part(&self.payload));
        let signing = EncodingKey::from_rsa_pem(key.serialize_pem().as_bytes()).unwrap();
        let signature =
            jsonwebtoken::crypto::sign(message.as_bytes(), &signing, Algorithm::RS256).unwrap();
        Secret::new(format!("{message}.{signature}").into_bytes())
    }

    /// A minute after it was issued.
    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.payload["iat"].as_u64().unwrap() + 60)
    }
}

/// In the page's words.
fn verdict(verified: Result<Claims, Rejected>, opened: &Opened) -> String {
    let claims = match verified {
        Ok(claims) => claims,
        Err(rejected) => return format!("It is refused: {}.", rejected.error),
    };
    let registry = opened.registry().snapshot();
    let tenants = claims.tenants(|word| registry.named(word)).unwrap();
    assert!(tenants.iter().all(|id| registry.tenant(id).is_some()), "{tenants:?}");
    let names: Vec<_> = tenants.iter().map(|id| format!("`{id}`")).collect();
    format!("It is for {}, `{}`.", names.join(" and "), claims.access())
}

#[test]
fn the_examples_of_the_providers_page_work() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/providers.md");
    let page = std::fs::read_to_string(page).unwrap();
    let key = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
    let (mut shown, mut verdicts, mut unproved) = (Shown::default(), 0, None);
    for piece in pieces(&page) {
        match piece {
            Piece::Section(provider) => {
                assert_eq!(unproved, None, "no verdict");
                (shown, unproved) = (Shown::default(), Some(provider));
            }
            Piece::Code(language, code) => shown.see(language, code),
            Piece::Verdict(line) => {
                let folder = Folder::new();
                let opened = shown.load(&folder, &key);
                let verified = opened.verifier().verify(&shown.sign(&key), shown.now());
                assert_eq!(verdict(verified, &opened), line, "{}", shown.payload);
                verdicts += 1;
                unproved = None;
            }
        }
    }
    assert_eq!(unproved, None, "no verdict");
    assert!(verdicts >= 8, "{verdicts} verdicts");
}
