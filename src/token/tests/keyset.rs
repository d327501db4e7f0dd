//! Which keys are taken, and from what.

use super::*;

#[test]
fn a_key_set_keeps_what_can_verify() {
    let (p256, p384, ed) = (pair(Algorithm::Es256), pair(Algorithm::Es384), pair(Algorithm::EdDsa));
    let (x, y) = (b64(&p256.public[1..33]), b64(&p256.public[33..]));
    let rsa = jsonwebtoken::jwk::Jwk::from_encoding_key(
        &pair(Algorithm::Rs256).signing,
        jsonwebtoken::Algorithm::RS256,
    )
    .unwrap();
    let rsa = with(serde_json::to_value(rsa).unwrap(), &json!({"alg": null, "kid": "rsa"}));
    let set = json!({"keys": [
        {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "a", "alg": "ES256", "use": "sig"},
        {"kty": "EC", "crv": "P-384", "x": b64(&p384.public[1..49]), "y": b64(&p384.public[49..]), "kid": "b", "key_ops": ["verify"]},
        {"kty": "OKP", "crv": "Ed25519", "x": b64(&ed.public), "kid": "c"},
        rsa,
        {"kty": "oct", "k": "AAAA", "kid": "s", "alg": "HS256"},
        {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "d", "use": "enc"},
        {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "e", "key_ops": ["sign"]},
        {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "f", "alg": "ES384"},
        {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "g", "alg": "HS256"},
        {"kty": "EC", "crv": "P-521", "x": x, "y": y, "kid": "h"},
        {"kty": "EC", "crv": "P-256", "x": y, "y": x, "kid": "i"},
        {"kty": "EC", "crv": "P-256", "x": x, "kid": "j"},
        {"kty": "OKP", "crv": "X25519", "x": b64(&ed.public), "kid": "k"},
        {"kty": "RSA", "n": b64([0xff; 128]), "e": "AQAB", "kid": "l"},
        {"kty": "RSA", "n": b64([0xff; 256]), "e": "AQ", "kid": "m"},
        {"kty": "AKP", "kid": "n"},
        {"kid": 1, "kty": "EC"},
    ]});
    let read = KeySet::from_jwks(set.to_string().as_bytes()).unwrap();
    let ids: Vec<_> = read.keys.iter().filter_map(Key::id).collect();
    assert_eq!(ids, ["a", "b", "c", "rsa"]);
    assert_eq!(read.keys[3].algorithms().len(), 6, "an RSA key that does not say");
    assert_eq!(read.warnings.len(), 13, "{:#?}", read.warnings);
    assert_eq!(read.warnings[0], "key 4 (kid \"s\") is passed over: unsupported \"kty\" \"oct\"");
    assert_eq!(
        read.warnings[9],
        "key 13 (kid \"l\") is passed over: an RSA key of 1024 bits; it must have 2048 to 8192"
    );

    let mut settings = issuer(ISSUER, read.keys);
    settings.algorithms =
        vec![Algorithm::Rs256, Algorithm::Ps384, Algorithm::Es256, Algorithm::EdDsa];
    let verifier = Verifier::new(vec![settings]).unwrap();
    for (algorithm, id, good) in [
        (Algorithm::Es256, "a", true),
        (Algorithm::Es384, "b", false),
        (Algorithm::EdDsa, "c", true),
        (Algorithm::Rs256, "rsa", true),
        (Algorithm::Ps384, "rsa", true),
        (Algorithm::Ps256, "rsa", false),
    ] {
        let token = sign_text(
            algorithm,
            &format!(r#"{{"alg":"{algorithm}","kid":"{id}"}}"#),
            &claims().to_string(),
        );
        assert_eq!(verifier.verify(&Secret::new(token), now()).is_ok(), good, "{algorithm} {id}");
    }
}

#[test]
fn bad_key_sets_are_errors() {
    let p256 = pair(Algorithm::Es256);
    let jwk = json!({"kty": "EC", "crv": "P-256", "x": b64(&p256.public[1..33]), "y": b64(&p256.public[33..]), "kid": "a"});
    let read = |set: Value| KeySet::from_jwks(set.to_string().as_bytes()).unwrap_err();
    assert_eq!(read(json!({"keys": []})), KeyError::NoKey("the set is empty".into()));
    assert_eq!(read(json!({"keys": [jwk, jwk]})), KeyError::DuplicateKey("a".into()));
    assert_eq!(read(json!({"keys": [with(jwk, &json!({"d": "AAAA"}))]})), KeyError::Private(0));
    assert!(matches!(read(json!({"keys": ["a"]})), KeyError::NotJwks(_)));
    assert!(matches!(read(json!([])), KeyError::NotJwks(_)));
    assert!(matches!(KeySet::from_jwks(b"{").unwrap_err(), KeyError::NotJwks(_)));
    let configuration = json!({"issuer": ISSUER, "jwks_uri": "https://issuer.example/jwks"});
    assert_eq!(read(configuration), KeyError::Configuration);
}

#[test]
fn a_pem_key_must_be_public_and_fit_its_algorithm() {
    let p256 = pair(Algorithm::Es256);
    let read = |algorithm, pem: &str| Key::from_pem("k", algorithm, pem.as_bytes()).unwrap_err();
    assert_eq!(read(Algorithm::Es384, &p256.pem), KeyError::Misfit(Algorithm::Es384));
    assert_eq!(read(Algorithm::Rs256, &p256.pem), KeyError::Misfit(Algorithm::Rs256));
    assert_eq!(read(Algorithm::Es256, ""), KeyError::NotPem);
    let own = KeyPair::generate().unwrap();
    assert_eq!(read(Algorithm::Es256, &own.serialize_pem()), KeyError::NotPem);
    let certificate = rcgen::CertificateParams::default().self_signed(&own).unwrap().pem();
    assert_eq!(read(Algorithm::Es256, &certificate), KeyError::NotPem);
}
