//! Tokens of the sandbox's issuer, good and bad.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::world::{World, world};

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The claims of a good token for a tenant.
pub fn claims(tenant: &str) -> Value {
    json!({
        "iss": "https://issuer.sandbox.invalid", "aud": "pgsilo", "sub": "tester",
        "jti": format!("test-{:x}", now()), "iat": now(), "nbf": now(), "exp": now() + 600,
        "tenant": tenant,
    })
}

/// A good token for a tenant.
pub fn token(tenant: &str) -> String {
    sign(world(), &claims(tenant))
}

/// A good token of another sandbox's issuer.
pub fn token_of(world: &World, tenant: &str) -> String {
    sign(world, &claims(tenant))
}

/// A good token but for some claims: `null` takes one away.
pub fn token_with(tenant: &str, changes: Value) -> String {
    let mut claims = claims(tenant);
    let object = claims.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => object.remove(name),
            value => object.insert(name.clone(), value.clone()),
        };
    }
    sign(world(), &claims)
}

/// A good token but for one claim, which is `null`.
pub fn token_with_null(tenant: &str, claim: &str) -> String {
    let mut claims = claims(tenant);
    claims[claim] = Value::Null;
    sign(world(), &claims)
}

/// A token of another sandbox's issuer, with these claims over those of a good one.
pub fn signed_by(world: &World, changes: Value) -> String {
    let mut claims = claims("acme");
    for (name, value) in changes.as_object().expect("an object") {
        claims[name] = value.clone();
    }
    sign(world, &claims)
}

fn sign(world: &World, claims: &Value) -> String {
    let dir = world.dir();
    let pem = std::fs::read(dir.join("issuer.key")).expect("the issuer's key");
    let jwks = std::fs::read(dir.join("jwks.json")).expect("the issuer's key set");
    let jwks: Value = serde_json::from_slice(&jwks).expect("JSON");
    let mut header = Header::new(Algorithm::ES256);
    header.kid = jwks["keys"][0]["kid"].as_str().map(str::to_owned);
    let key = EncodingKey::from_ec_pem(&pem).expect("a key");
    jsonwebtoken::encode(&header, claims, &key).expect("signed")
}
