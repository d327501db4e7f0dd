//! What operators read of a token that is not taken, and what even they do not.

use super::*;

fn said(token: impl Into<Vec<u8>>) -> String {
    verify(token).unwrap_err().to_string()
}

#[test]
fn rejections_name_expected_and_found_values() {
    let own = r#""https://exact.example" or "https://issuer.example" or "https://other.example""#;
    let exact = |changes: Value| {
        let base = json!({"iss": "https://exact.example", "aud": "pgsilo", "sub": "a", "exp": NOW,
            "app": {"tenants": "acme"}});
        sign(&json!({"alg": "ES256", "kid": "only"}), &with(base, &changes))
    };
    for (token, expected) in [
        (claiming(&json!({"aud": "other"})), r#"wrong audience: found "other" at aud, expected "pgsilo" or "pgsilo-eu""#.to_owned()),
        (claiming(&json!({"aud": ["a", "account"]})), r#"wrong audience: found ["a","account"] at aud, expected "pgsilo" or "pgsilo-eu""#.to_owned()),
        (claiming(&json!({"aud": null})), r#"claim "aud" is missing or invalid: found nothing at aud, expected "pgsilo" or "pgsilo-eu""#.to_owned()),
        (claiming(&json!({"iss": "https://evil.example/"})), format!(r#"unknown issuer: found "https://evil.example/", expected {own}"#)),
        (claiming(&json!({"iss": null})), format!("unknown issuer: found nothing, expected {own}")),
        (headed(&json!({"alg": "HS256"})), r#"algorithm refused: found "HS256", expected "ES256" or "RS256"; of its key, expected "ES256""#.to_owned()),
        (headed(&json!({"alg": "RS256"})), r#"algorithm refused: found "RS256", expected "ES256" or "RS256"; of its key, expected "ES256""#.to_owned()),
        (headed(&json!({"kid": "k9"})), r#"unknown key: found "k9", expected "k1" or "rsa""#.to_owned()),
        (headed(&json!({"kid": null})), r#"unknown key: found nothing, expected "k1" or "rsa""#.to_owned()),
        (headed(&json!({"typ": "logout+jwt"})), r#"header member "typ" is refused: found "logout+jwt", expected "JWT" or "at+jwt""#.to_owned()),
        (headed(&json!({"jku": "https://evil.example"})), r#"header member "jku" is refused"#.to_owned()),
        (resigned([0; 64]), r#"invalid signature: not that of the key "k1""#.to_owned()),
        (claiming(&json!({"exp": "soon"})), r#"claim "exp" is missing or invalid: found "soon""#.to_owned()),
        (claiming(&json!({"nbf": NOW + 31})), format!("not valid yet: nbf: found {}; iat: found {}", NOW + 31, NOW - 10)),
        (claiming(&json!({"access": ["admin"]})), r#"the access claim names no access level: found ["admin"] at access, expected "migrate" or "read-only" or "read-write""#.to_owned()),
        (claiming(&json!({"tenant": null})), "no tenant claim: found nothing at tenant".to_owned()),
        (claiming(&json!({"tenant": 7})), "malformed tenant claim: found 7 at tenant".to_owned()),
        (exact(json!({"app": {"role/level": "x", "tenants": "acme"}, "exp": NOW + 60})), r#"the access claim names no access level: found "x" at /app/role~1level, expected "migrate" or "read-only" or "read-write""#.to_owned()),
        (exact(json!({"exp": NOW})), "expired 0 s ago".to_owned()),
    ] {
        assert_eq!(said(token), expected);
    }
    let claims = verify(claiming(&json!({"tenant": ["acme", "/globex"]}))).unwrap();
    let rejected = claims.tenants(|_| None).unwrap_err();
    assert_eq!(rejected.to_string(), r#"malformed tenant claim: found "/globex""#);
}

#[test]
fn a_malformed_token_is_described_by_shape_without_its_bytes() {
    let good = claiming(&json!({}));
    let opaque = "no JWT: an opaque access token? ask its issuer for one with an audience";
    let three = "three parts as a JWT has them, but not base64url without padding, or not strict JSON objects";
    for (password, expected) in [
        ("hunter2".to_owned(), opaque),
        ("s3cret.hunter2".to_owned(), opaque),
        ("v2.local.hunter2.s3cret".to_owned(), opaque),
        ("hunter2.s3cret.hunter2".to_owned(), three),
        ("bnVsbA.aHVudGVyMg.hunter2".to_owned(), three),
        (format!("{good}.hunter2.s3cret"), "no signed JWT: an encrypted one (JWE)?"),
        (format!("Bearer {good}"), "it begins with \"Bearer\", which is not part of a token"),
        (format!("{good}\n"), "white space around a token, or in it, is not part of it"),
    ] {
        assert_eq!(said(password), format!("malformed token: {expected}"));
    }
}

#[test]
fn text_of_others_is_truncated() {
    let long = "\u{202e}x\"\n".repeat(1000);
    let many: Vec<String> = (0..300).map(|n| format!("{n}-{}", "y".repeat(50))).collect();
    for token in [
        claiming(&json!({ "iss": long })),
        claiming(&json!({ "aud": many })),
        claiming(&json!({ "access": many })),
        claiming(&json!({ "tenant": { "deep": long } })),
        headed(&json!({ "kid": long })),
        headed(&json!({ "alg": long })),
        headed(&json!({ "typ": long })),
    ] {
        let said = said(token);
        assert!(
            said.chars().count() < 400 && said.contains("...") && !said.contains('\n'),
            "{said}"
        );
    }
    // However many would do.
    let keys = (0..50).map(|n| key(&format!("k{n}"), Algorithm::Es256)).collect();
    let verifier = Verifier::new(vec![issuer(ISSUER, keys)]).unwrap();
    let token = Secret::new(headed(&json!({"kid": "none"})).into_bytes());
    let said = verifier.verify(&token, now()).unwrap_err().to_string();
    assert_eq!(
        said,
        r#"unknown key: found "none", expected "k0" or "k1" or "k10" or "k11" or "k12", ..."#
    );
}
