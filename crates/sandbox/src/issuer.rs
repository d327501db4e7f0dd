//! The sandbox's token issuer: an ES256 key, its JSON Web Key Set, and minting.
//!
//! It stands in for a real identity provider and is not part of the proxy. The private key
//! lies in the sandbox's folder, readable by its owner, so that `pgsilo-sandbox token` can
//! mint for a sandbox that runs. A new key is made at each start.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use pgsilo_core::secret::random_hex;
use serde_json::{Map, Value, json};

use crate::files;

/// The `iss` of its tokens.
pub(super) const ISSUER: &str = "https://issuer.sandbox.invalid";
/// The `aud` of its tokens.
pub(super) const AUDIENCE: &str = "pgsilo";

/// The key that signs tokens.
#[derive(Debug)]
pub(super) struct Issuer {
    key: EncodingKey,
    kid: String,
}

/// What a token shall say.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) subject: String,
    /// One: a text claim. Several: a list.
    pub(super) tenants: Vec<String>,
    /// `None`: no such claim.
    pub(super) access: Option<&'static str>,
    pub(super) ttl: Duration,
    /// The token ended an hour ago.
    pub(super) expired: bool,
    /// Claims to set over the others; null takes one away.
    pub(super) claims: Vec<(String, Value)>,
}

impl Issuer {
    /// Makes a key and writes `issuer.key` and `jwks.json` into `dir`.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let pem = pair.serialize_pem();
        let key = EncodingKey::from_ec_pem(pem.as_bytes()).context("the issuer's key")?;
        let kid = format!("sandbox-{}", random_hex::<4>()?);
        let mut jwk =
            Jwk::from_encoding_key(&key, Algorithm::ES256).context("the issuer's public key")?;
        jwk.common.key_id = Some(kid.clone());
        files::write_private(&dir.join("issuer.key"), &pem)?;
        files::write(&dir.join("issuer.pem"), &pair.public_key_pem())?;
        let set = serde_json::to_string_pretty(&json!({ "keys": [jwk] }))?;
        files::write(&dir.join("jwks.json"), &format!("{set}\n"))?;
        Ok(Self { key, kid })
    }

    /// The key that a running sandbox wrote into `dir`.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let key = EncodingKey::from_ec_pem(read("issuer.key")?.as_bytes()).context("issuer.key")?;
        let set: Value = serde_json::from_str(&read("jwks.json")?).context("jwks.json")?;
        let kid = set["keys"][0]["kid"].as_str().context("jwks.json has no key id")?;
        Ok(Self { key, kid: kid.to_owned() })
    }

    pub(super) fn mint(&self, options: &Options) -> Result<String> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.clone());
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = claims(options, now, &random_hex::<16>()?);
        jsonwebtoken::encode(&header, &claims, &self.key).context("signing the token")
    }
}

fn claims(options: &Options, now: u64, id: &str) -> Map<String, Value> {
    let ttl = options.ttl.as_secs();
    let issued = if options.expired { now.saturating_sub(3600 + ttl) } else { now };
    let tenant = match options.tenants.as_slice() {
        [one] => json!(one),
        several => json!(several),
    };
    let mut claims = Map::new();
    let mut set = |name: &str, value: Value| claims.insert(name.to_owned(), value);
    set("iss", json!(ISSUER));
    set("aud", json!(AUDIENCE));
    set("sub", json!(options.subject));
    set("tenant", tenant);
    set("jti", json!(id));
    set("iat", json!(issued));
    set("nbf", json!(issued));
    set("exp", json!(issued.saturating_add(ttl)));
    if let Some(access) = options.access {
        set("access", json!(access));
    }
    for (name, value) in &options.claims {
        if value.is_null() {
            claims.remove(name);
        } else {
            claims.insert(name.clone(), value.clone());
        }
    }
    claims
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::jwk::JwkSet;
    use jsonwebtoken::{DecodingKey, Validation, decode, decode_header};

    use super::*;

    fn options(tenants: &[&str]) -> Options {
        Options {
            subject: "alice@acme".to_owned(),
            tenants: tenants.iter().map(|&tenant| tenant.to_owned()).collect(),
            access: None,
            ttl: Duration::from_secs(900),
            expired: false,
            claims: Vec::new(),
        }
    }

    fn verify(dir: &Path, token: &str) -> jsonwebtoken::errors::Result<Map<String, Value>> {
        let set: JwkSet =
            serde_json::from_slice(&std::fs::read(dir.join("jwks.json")).unwrap()).unwrap();
        let kid = decode_header(token)?.kid.unwrap();
        let key = DecodingKey::from_jwk(set.find(&kid).unwrap())?;
        let mut validation = Validation::new(Algorithm::ES256);
        validation.validate_nbf = true;
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub", "nbf"]);
        decode(token, &key, &validation).map(|data| data.claims)
    }

    #[test]
    fn a_minted_token_verifies_against_the_written_key_set_until_it_expires() {
        let dir = files::make_unique_dir(&std::env::temp_dir(), 0o700).unwrap();
        let created = Issuer::create(&dir).unwrap();
        let opened = Issuer::open(&dir).unwrap();
        for issuer in [&created, &opened] {
            let claims = verify(&dir, &issuer.mint(&options(&["acme"])).unwrap()).unwrap();
            assert_eq!(claims["tenant"], "acme");
            assert_eq!(claims["sub"], "alice@acme");
            assert!(!claims.contains_key("access"));
        }
        let expired = Options { expired: true, ..options(&["acme"]) };
        assert!(verify(&dir, &opened.mint(&expired).unwrap()).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn minted_claims_match_the_options() {
        let several = Options {
            access: Some("read-only"),
            claims: vec![("aud".to_owned(), json!("another")), ("exp".to_owned(), Value::Null)],
            ..options(&["acme", "globex"])
        };
        let claims = claims(&several, 1_000_000, "id");
        assert_eq!(claims["tenant"], json!(["acme", "globex"]));
        assert_eq!(claims["access"], "read-only");
        assert_eq!(claims["aud"], "another");
        assert!(!claims.contains_key("exp"));
    }
}
