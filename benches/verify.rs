//! `cargo bench --bench verify`: what verifying a token costs, for each algorithm: all of it, from
//! the bytes that a client sent to claims. On one core, as a login does it.

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header};
use pgsilo::token::{Algorithm, ClaimPath, Issuer, Key, Keyring, Verifier};
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::Access;
use rcgen::{
    KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256,
    RsaKeySize,
};
use serde_json::json;

const ISSUER: &str = "https://issuer.example";
/// Of a service that issues tokens now; RSA keys have 2048 bits.
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::Rs256, Algorithm::Ps256, Algorithm::Es256, Algorithm::Es384, Algorithm::EdDsa];

/// A verifier of one key, and a token that it verifies.
struct Signed {
    algorithm: Algorithm,
    verifier: Verifier,
    token: String,
}

fn signed(algorithm: Algorithm) -> &'static Signed {
    static ALL: OnceLock<Vec<Signed>> = OnceLock::new();
    let all = ALL.get_or_init(|| ALGORITHMS.map(sign).into());
    all.iter().find(|signed| signed.algorithm == algorithm).expect("one of ours")
}

fn sign(algorithm: Algorithm) -> Signed {
    let pair = match algorithm {
        Algorithm::Es256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
        Algorithm::Es384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
        Algorithm::EdDsa => KeyPair::generate_for(&PKCS_ED25519),
        _ => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048),
    };
    let pair = pair.expect("a key");
    let pem = pair.serialize_pem();
    let signing = match algorithm {
        Algorithm::Es256 | Algorithm::Es384 => EncodingKey::from_ec_pem(pem.as_bytes()),
        Algorithm::EdDsa => EncodingKey::from_ed_pem(pem.as_bytes()),
        _ => EncodingKey::from_rsa_pem(pem.as_bytes()),
    };
    let mut header = Header::new(algorithm.into());
    header.kid = Some("2026-01".to_owned());
    let now = now();
    let claims = json!({
        "iss": ISSUER, "aud": "pgsilo", "sub": "alice@acme", "jti": "298ffde9dbc34cdd17ad7b9449cff634",
        "iat": now, "nbf": now, "exp": now + 3600, "tenant": "acme", "access": "read-write",
    });
    let token = jsonwebtoken::encode(&header, &claims, &signing.expect("a key")).expect("signed");
    let key = Key::from_pem("2026-01", algorithm, pair.public_key_pem().as_bytes());
    let claim = |name| ClaimPath::parse(name).expect("a claim's name");
    let issuer = Issuer {
        issuer: ISSUER.into(),
        audience: vec!["pgsilo".into()],
        algorithms: vec![algorithm],
        keys: Keyring::listed(vec![key.expect("a public key")]),
        audience_claim: claim("aud"),
        tenant_claim: claim("tenant"),
        tenant_values: None,
        access_claim: claim("access"),
        access_values: None,
        default_access: Some(Access::ReadOnly),
        tenants: None,
        max_access: None,
        needs_grant: false,
        max_lifetime: None,
        leeway: Duration::from_secs(30),
    };
    Signed { algorithm, verifier: Verifier::new(vec![issuer]).expect("an issuer"), token }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

#[divan::bench(args = ALGORITHMS)]
fn verify(bencher: divan::Bencher<'_, '_>, algorithm: Algorithm) {
    let Signed { verifier, token, .. } = signed(algorithm);
    bencher
        .with_inputs(|| Secret::new(token.clone().into_bytes()))
        .bench_values(|token| verifier.verify(&token, SystemTime::now()).expect("verified"));
}

/// A token whose signature is not right: what an attacker costs.
#[divan::bench(args = ALGORITHMS)]
fn reject(bencher: divan::Bencher<'_, '_>, algorithm: Algorithm) {
    let Signed { verifier, token, .. } = signed(algorithm);
    let mut forged = token.clone().into_bytes();
    let at = forged.len() - 10;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    bencher
        .with_inputs(|| Secret::new(forged.clone()))
        .bench_values(|token| verifier.verify(&token, SystemTime::now()).expect_err("rejected"));
}

fn main() {
    divan::main();
}
