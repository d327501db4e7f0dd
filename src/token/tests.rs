//! Every algorithm with fresh keys, every way we know to forge or bend a token, and
//! random damage. Times are relative to one fixed `now`.

use std::sync::{LazyLock, OnceLock};
use std::time::UNIX_EPOCH;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;
use rcgen::{
    KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256,
};
use serde_json::json;

use super::*;

mod explained;
mod forged;
mod hostile;
mod keyset;
mod rotation;
mod settings;
mod unfit;

const NOW: u64 = 1_800_000_000;
const ISSUER: &str = "https://issuer.example";

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

struct Pair {
    pem: String,
    public: Vec<u8>,
    signing: EncodingKey,
    der: Vec<u8>,
}

fn pair(algorithm: Algorithm) -> &'static Pair {
    static RSA: OnceLock<Pair> = OnceLock::new();
    static P256: OnceLock<Pair> = OnceLock::new();
    static P384: OnceLock<Pair> = OnceLock::new();
    static ED: OnceLock<Pair> = OnceLock::new();
    let new = |kind, signing: fn(&[u8]) -> jsonwebtoken::errors::Result<EncodingKey>| {
        let key = KeyPair::generate_for(kind).unwrap();
        Pair {
            pem: key.public_key_pem(),
            public: key.public_key_raw().to_vec(),
            signing: signing(key.serialize_pem().as_bytes()).unwrap(),
            der: key.serialize_der(),
        }
    };
    match algorithm {
        Algorithm::Es256 => {
            P256.get_or_init(|| new(&PKCS_ECDSA_P256_SHA256, EncodingKey::from_ec_pem))
        }
        Algorithm::Es384 => {
            P384.get_or_init(|| new(&PKCS_ECDSA_P384_SHA384, EncodingKey::from_ec_pem))
        }
        Algorithm::EdDsa => ED.get_or_init(|| new(&PKCS_ED25519, EncodingKey::from_ed_pem)),
        _ => RSA.get_or_init(|| new(&PKCS_RSA_SHA256, EncodingKey::from_rsa_pem)),
    }
}

fn key(id: &str, algorithm: Algorithm) -> Key {
    Key::from_pem(id, algorithm, pair(algorithm).pem.as_bytes()).unwrap()
}

fn issuer(name: &str, keys: Vec<Key>) -> Issuer {
    Issuer {
        issuer: name.into(),
        audience: vec!["pgsilo".into(), "pgsilo-eu".into()],
        algorithms: keys.iter().flat_map(Key::algorithms).copied().collect(),
        keys: Keyring::listed(keys),
        audience_claim: ClaimPath::parse("aud").unwrap(),
        tenant_claim: ClaimPath::parse("tenant").unwrap(),
        tenant_values: None,
        access_claim: ClaimPath::parse("access").unwrap(),
        access_values: None,
        default_access: Some(Access::ReadWrite),
        tenants: None,
        max_access: None,
        needs_grant: false,
        max_lifetime: None,
        leeway: Duration::from_secs(30),
    }
}

/// Two keys of one issuer, one of another, one issuer with a single key.
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let two = issuer(ISSUER, vec![key("k1", Algorithm::Es256), key("rsa", Algorithm::Rs256)]);
    let other = issuer("https://other.example", vec![key("k2", Algorithm::Es384)]);
    let mut exact = issuer("https://exact.example", vec![key("only", Algorithm::Es256)]);
    exact.leeway = Duration::ZERO;
    exact.tenant_claim = ClaimPath::parse("/app/tenants").unwrap();
    exact.access_claim = ClaimPath::parse("/app/role~1level").unwrap();
    Verifier::new(vec![two, other, exact]).unwrap()
});

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn header() -> Value {
    json!({"alg": "ES256", "typ": "JWT", "kid": "k1"})
}

fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": "pgsilo", "sub": "alice", "jti": "t-1",
        "iat": NOW - 10, "nbf": NOW - 10, "exp": NOW + 600, "tenant": "acme",
    })
}

/// `base` with `changes` over it; null removes.
fn with(mut base: Value, changes: &Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            base.as_object_mut().unwrap().remove(name);
        } else {
            base[name] = value.clone();
        }
    }
    base
}

/// Signs exactly these texts, whatever they are.
fn sign_text(algorithm: Algorithm, header: &str, payload: &str) -> String {
    let message = format!("{}.{}", b64(header), b64(payload));
    let signing = &pair(algorithm).signing;
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), signing, algorithm.into()).unwrap();
    format!("{message}.{signature}")
}

fn sign(header: &Value, payload: &Value) -> String {
    sign_text(Algorithm::Es256, &header.to_string(), &payload.to_string())
}

/// A well-signed token with these changes to the usual claims.
fn claiming(changes: &Value) -> String {
    sign(&header(), &with(claims(), changes))
}

fn headed(changes: &Value) -> String {
    sign(&with(header(), changes), &claims())
}

fn hmac(secret: &[u8]) -> String {
    let message = format!("{}.{}", b64(r#"{"alg":"HS256","kid":"k1"}"#), b64(claims().to_string()));
    let secret = EncodingKey::from_secret(secret);
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &secret, jsonwebtoken::Algorithm::HS256);
    format!("{message}.{}", signature.unwrap())
}

fn verify_at(token: impl Into<Vec<u8>>, now: SystemTime) -> Result<Claims, Rejected> {
    VERIFIER.verify(&Secret::new(token), now)
}

fn verify(token: impl Into<Vec<u8>>) -> Result<Claims, Rejected> {
    verify_at(token, now())
}

/// Why, and whether the signature was good. Of another nothing is believed.
fn told(rejected: Rejected) -> (TokenError, bool) {
    let believed = rejected.subject.is_some() || rejected.token_id.is_some();
    assert!(rejected.verified || !believed, "{rejected:?}");
    (rejected.error, rejected.verified)
}

fn ids(texts: &[&str]) -> Vec<TenantId> {
    texts.iter().map(|text| TenantId::parse(text).unwrap()).collect()
}

/// A valid token with its signature replaced.
fn resigned(signature: impl AsRef<[u8]>) -> String {
    let token = claiming(&json!({}));
    let (message, _) = token.rsplit_once('.').unwrap();
    format!("{message}.{}", b64(signature))
}

fn signature_of(token: &str) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(token.rsplit_once('.').unwrap().1).unwrap()
}

#[test]
fn a_good_token_becomes_its_claims() {
    let claims = verify(claiming(&json!({"tenant": ["acme", "globex", "acme"]}))).unwrap();
    assert_eq!(claims.issuer(), ISSUER);
    assert_eq!(claims.subject(), "alice");
    assert_eq!(claims.token_id(), Some("t-1"));
    assert_eq!(claims.tenants(|_| None).unwrap(), ids(&["acme", "globex"]));
    assert_eq!(claims.access(), Access::ReadWrite);
    assert_eq!(claims.expires_at(), now() + Duration::from_secs(630), "exp and the leeway");
}

#[test]
fn every_algorithm_verifies_with_its_own_key_and_no_other() {
    for algorithm in Algorithm::ALL {
        let verifier = Verifier::new(vec![issuer(ISSUER, vec![key("k", algorithm)])]).unwrap();
        for used in Algorithm::ALL {
            let header = format!(r#"{{"alg":"{used}","kid":"k"}}"#);
            let token = sign_text(used, &header, &claims().to_string());
            let verdict = verifier.verify(&Secret::new(token.into_bytes()), now());
            if used == algorithm {
                verdict.unwrap();
            } else {
                assert_eq!(verdict.unwrap_err().error, TokenError::AlgorithmRefused, "{used}");
            }
        }
    }
}

/// RFC 9864 has a name of its own for what is called EdDSA.
#[test]
fn ed25519_has_two_names() {
    let verifier = Verifier::new(vec![issuer(ISSUER, vec![key("k", Algorithm::EdDsa)])]).unwrap();
    let verify = |token: String| verifier.verify(&Secret::new(token.into_bytes()), now());
    let named = |name: &str| {
        let header = format!(r#"{{"alg":"{name}","kid":"k"}}"#);
        sign_text(Algorithm::EdDsa, &header, &claims().to_string())
    };
    assert_eq!(verify(named("EdDSA")).unwrap().subject(), "alice");
    assert_eq!(verify(named("Ed25519")).unwrap().subject(), "alice");
    let mut forged = named("Ed25519").into_bytes();
    let at = forged.len() - 20;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    let forged = verify(String::from_utf8(forged).unwrap()).unwrap_err();
    assert_eq!(told(forged), (TokenError::SignatureInvalid, false));
    for other in ["Ed448", "ed25519", "ED25519"] {
        let refused = verify(named(other)).unwrap_err();
        assert_eq!(told(refused), (TokenError::AlgorithmRefused, false), "{other}");
    }
    let expired = with(claims(), &json!({"exp": NOW - 60}));
    let header = r#"{"alg":"Ed25519","kid":"k"}"#;
    let expired = verify(sign_text(Algorithm::EdDsa, header, &expired.to_string())).unwrap_err();
    assert!(expired.verified && matches!(expired.error, TokenError::Expired { .. }));
    // The key of another kind, and a P-256 signature under that name.
    let foreign = sign_text(Algorithm::Es256, header, &claims().to_string());
    assert_eq!(told(verify(foreign).unwrap_err()), (TokenError::SignatureInvalid, false));
    let other = headed(&json!({"alg": "Ed25519"}));
    assert_eq!(
        told(super::tests::verify(other).unwrap_err()),
        (TokenError::AlgorithmRefused, false)
    );
}

#[test]
fn unusual_but_correct_tokens_are_taken() {
    let exact = json!({
        "iss": "https://exact.example", "aud": ["x", "pgsilo-eu"], "sub": "älice", "exp": NOW as f64 + 0.5,
        "app": {"tenants": ["acme"], "role/level": "read-only"},
    });
    let taken = verify(sign(&json!({"alg": "ES256"}), &exact)).unwrap();
    assert_eq!(taken.access(), Access::ReadOnly);
    assert_eq!(taken.token_id(), None);
    for changes in [
        json!({"typ": null}),
        json!({"typ": "at+jwt"}),
        json!({"typ": "application/AT+JWT"}),
        json!({"typ": "jwt"}),
        json!({"x5t": "AAAA", "unknown": {"a": 1}}),
    ] {
        verify(headed(&changes)).unwrap();
    }
    for changes in [
        json!({"jti": null, "iat": null, "nbf": null}),
        json!({"exp": NOW - 29}),
        json!({"nbf": NOW + 30, "iat": NOW + 30}),
        json!({"access": "migrate"}),
        json!({"tenant": (0..1000).map(|n| format!("t{n}")).collect::<Vec<_>>()}),
        json!({"deep": [[[{"a": [1.5, -1, true]}]]]}),
    ] {
        verify(claiming(&changes)).unwrap();
    }
}

/// Else a forger could learn from the answers what is in a token, or what is expected.
#[test]
fn claims_are_not_judged_before_the_signature() {
    for changes in [json!({"exp": 0}), json!({"exp": [1]}), json!({"aud": "x"}), json!({"sub": 1})]
    {
        let mut token = claiming(&changes).into_bytes();
        let at = token.len() - 20;
        token[at] = if token[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(
            told(verify(token).unwrap_err()),
            (TokenError::SignatureInvalid, false),
            "{changes}"
        );
    }
}

#[test]
fn without_leeway_a_token_ends_at_its_exp() {
    let exact = |changes: &Value| {
        let base = json!({"iss": "https://exact.example", "aud": "pgsilo", "sub": "a", "exp": NOW, "app": {"tenants": "acme"}});
        sign(&json!({"alg": "ES256", "kid": "only"}), &with(base, changes))
    };
    let at = |token: String, millis: i64| {
        let offset = Duration::from_millis(millis.unsigned_abs());
        verify_at(token, if millis < 0 { now() - offset } else { now() + offset })
    };
    assert!(at(exact(&json!({})), -1).is_ok());
    assert_eq!(
        at(exact(&json!({})), 0).unwrap_err().error,
        TokenError::Expired { since: Duration::ZERO }
    );
    assert!(at(exact(&json!({"exp": NOW as f64 + 0.25})), 249).is_ok());
    assert!(at(exact(&json!({"exp": NOW as f64 + 0.25})), 250).is_err());
    assert!(at(exact(&json!({"nbf": NOW - 1})), -1000).is_ok());
    assert_eq!(
        at(exact(&json!({"nbf": NOW - 1})), -1001).unwrap_err().error,
        TokenError::NotYetValid
    );
    assert!(verify_at(exact(&json!({})), UNIX_EPOCH - Duration::from_secs(1)).is_ok());
}

#[test]
fn issuers_must_make_sense() {
    let fault = |change: fn(&mut Issuer)| {
        let mut wrong = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
        change(&mut wrong);
        let other = issuer("https://other.example", vec![key("k1", Algorithm::Es256)]);
        let error = Verifier::new(vec![other, wrong]).unwrap_err();
        assert_eq!(error.issuer, 1);
        error.fault
    };
    assert_eq!(fault(|i| i.issuer = "".into()), IssuerFault::Unnamed);
    assert_eq!(fault(|i| i.issuer = "https://other.example".into()), IssuerFault::Duplicate);
    assert_eq!(fault(|i| i.audience.clear()), IssuerFault::NoAudience);
    assert_eq!(fault(|i| i.audience.push(String::new())), IssuerFault::NoAudience);
    assert_eq!(fault(|i| i.algorithms.clear()), IssuerFault::NoAlgorithms);
    assert_eq!(fault(|i| i.algorithms = vec![Algorithm::Rs256]), IssuerFault::NoKey);
    assert_eq!(fault(|i| i.keys = Keyring::listed(Vec::new())), IssuerFault::NoKey);
    assert_eq!(fault(|i| i.leeway = Duration::from_secs(301)), IssuerFault::Leeway);
    assert_eq!(fault(|i| i.max_lifetime = Some(Duration::ZERO)), IssuerFault::NoLifetime);
    assert_eq!(
        fault(|i| {
            let twice = vec![key("k1", Algorithm::Es256), key("k1", Algorithm::Es256)];
            i.keys = Keyring::listed(twice);
        }),
        IssuerFault::DuplicateKey("k1".into())
    );
    let empty = Verifier::new(Vec::new()).unwrap();
    assert!(empty.is_empty());
    let token = Secret::new(claiming(&json!({})).into_bytes());
    assert_eq!(told(empty.verify(&token, now()).unwrap_err()), (TokenError::IssuerUnknown, false));
}

#[test]
fn claim_paths_are_names_or_pointers() {
    for good in ["tenant", "https://example.com/tenant", "/app/tenants", "/a~1b/~0", "a~b"] {
        assert!(ClaimPath::parse(good).is_ok(), "{good:?}");
    }
    for bad in ["", "/", "/a~", "/a~2"] {
        assert!(ClaimPath::parse(bad).is_err(), "{bad:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_verify(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(verify(bytes).is_err());
    }

    #[test]
    fn random_parts_never_verify(header in ".{0,80}", payload in ".{0,80}", tail in proptest::collection::vec(any::<u8>(), 0..80)) {
        let token = format!("{}.{}.{}", b64(header), b64(payload), b64(tail));
        prop_assert!(verify(token).is_err());
    }

    #[test]
    fn a_damaged_token_never_verifies(at in any::<prop::sample::Index>(), byte in any::<u8>(), kind in 0..4) {
        static GOOD: LazyLock<String> = LazyLock::new(|| claiming(&json!({})));
        let mut token = GOOD.clone().into_bytes();
        let at = at.index(token.len());
        match kind {
            0 => { token[at] = byte; }
            1 => { token.remove(at); }
            2 => { token.insert(at, byte); }
            _ => token.truncate(at),
        }
        prop_assume!(token != GOOD.as_bytes());
        prop_assert!(verify(token).is_err());
    }
}

/// A session is one tenant's, and a token may name a thousand.
#[test]
fn a_session_keeps_its_tenants_id_of_a_token_and_all_words_where_it_is_not_named_by_its_id() {
    let id = |text: &str| TenantId::parse(text).unwrap();
    let known = |word: &str| (word == "org_1").then(|| id("globex"));
    let mut claims = Claims::of(&["initech", "acme", "org_1", "hooli"], Access::ReadOnly);
    claims.settle_on(&id("globex"));
    assert_eq!(claims.tenants.len(), 4, "its alias may come to mean another");
    assert!(claims.means(&id("globex"), known) && claims.means(&id("acme"), known));
    claims.settle_on(&id("acme"));
    assert_eq!(claims.tenants.len(), 1);
    assert!(claims.means(&id("acme"), |_| None));
    assert!(!claims.means(&id("hooli"), known) && !claims.means(&id("globex"), known));
}
