//! Keys that change, as a token sees it.

use super::*;

/// An issuer whose keys were never fetched.
fn unfetched() -> Verifier {
    let at = KeysAt::discovery("https://issuer.example").unwrap();
    let (refresh, max_stale) = (Duration::from_secs(300), Duration::from_secs(3600));
    let mut issuer = issuer(ISSUER, Vec::new());
    issuer.algorithms = vec![Algorithm::Es256];
    issuer.keys = Keyring::fetched(Fetcher::new(at, None, refresh, max_stale).unwrap());
    Verifier::new(vec![issuer]).unwrap()
}

/// Whatever a token says of itself, it is told the same.
#[tokio::test]
async fn without_keys_every_token_of_an_issuer_is_told_the_same() {
    let verifier = unfetched();
    assert!(!verifier.has_usable_keys());
    for token in [
        claiming(&json!({})),
        claiming(&json!({"exp": 0, "aud": "other", "tenant": null})),
        headed(&json!({"kid": "unknown"})),
        headed(&json!({"kid": null})),
        headed(&json!({"alg": "RS256"})),
        resigned([0; 64]),
    ] {
        let token = Token::new(token.into_bytes());
        let expected = Err(TokenError::KeysUnavailable.into());
        assert_eq!(verifier.identify(&token).await.map(|_| ()), expected);
    }
    let others = Token::new(claiming(&json!({"iss": "https://evil.example"})).into_bytes());
    assert_eq!(verifier.verify(&others, now()).unwrap_err(), TokenError::IssuerUnknown.into());
}

#[test]
fn only_a_key_that_is_named_is_looked_for() {
    let named = |token: String| VERIFIER.named_keyring(&Token::new(token.into_bytes())).is_some();
    assert!(named(headed(&json!({"kid": "k9"}))));
    assert!(!named(headed(&json!({"kid": null}))));
    assert!(!named(headed(&json!({"kid": "k9", "jku": "https://evil.example"}))));
    assert!(!named(claiming(&json!({"iss": "https://evil.example"}))));
    assert!(!named("a.b.c".to_owned()));
}

#[test]
fn an_access_map_says_what_the_claim_means_and_nothing_else_is_taken() {
    let mut mapped = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    let values = [("admin", Access::ReadWrite), ("viewer", Access::ReadOnly)];
    mapped.access_values = Some(values.map(|(text, level)| (text.to_owned(), level)).into());
    mapped.default_access = Some(Access::ReadOnly);
    let verifier = Verifier::new(vec![mapped]).unwrap();
    let access = |changes: &Value| {
        let token = Token::new(claiming(changes).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    assert_eq!(access(&json!({"access": "admin"})), Ok(Access::ReadWrite));
    assert_eq!(access(&json!({"access": "viewer"})), Ok(Access::ReadOnly));
    assert_eq!(access(&json!({})), Ok(Access::ReadOnly));
    for unknown in ["read-write", "migrate", "Admin", "admin ", ""] {
        let verdict = access(&json!({"access": unknown}));
        assert_eq!(verdict, Err(TokenError::AccessUnknown), "{unknown:?}");
    }
}

/// Keycloak's roles are a list, and most of them are other services'.
#[test]
fn a_list_of_roles_grants_what_exactly_one_of_its_levels_grants() {
    let mut mapped = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    let values = [
        ("db-writer", Access::ReadWrite),
        ("db-owner", Access::ReadWrite),
        ("db-reader", Access::ReadOnly),
    ];
    mapped.access_values = Some(values.map(|(text, level)| (text.to_owned(), level)).into());
    mapped.access_claim = ClaimPath::parse("/realm_access/roles").unwrap();
    // Whatever a token says that finds nothing, it must not become this.
    mapped.default_access = Some(Access::Migrate);
    let verifier = Verifier::new(vec![mapped]).unwrap();
    let access = |roles: Value| {
        let token = Token::new(claiming(&json!({"realm_access": {"roles": roles}})).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    let offline = "offline_access";
    for (roles, expected) in [
        (json!(["db-reader"]), Ok(Access::ReadOnly)),
        (json!([offline, "db-reader", "uma_authorization"]), Ok(Access::ReadOnly)),
        (json!(["db-writer", offline, "db-owner", "db-writer"]), Ok(Access::ReadWrite)),
        (json!("db-reader"), Ok(Access::ReadOnly)),
        (json!(["db-reader", "db-writer"]), Err(TokenError::AccessAmbiguous)),
        (json!([]), Err(TokenError::AccessUnknown)),
        (json!([offline]), Err(TokenError::AccessUnknown)),
        (json!(["read-write"]), Err(TokenError::AccessUnknown)),
        (json!(["db-reader", 7]), Err(TokenError::AccessUnknown)),
        (json!([["db-reader"]]), Err(TokenError::AccessUnknown)),
        (json!({"db-reader": true}), Err(TokenError::AccessUnknown)),
        (json!(null), Err(TokenError::AccessUnknown)),
    ] {
        assert_eq!(access(roles.clone()), expected, "{roles}");
    }
}

#[test]
fn a_token_without_an_access_claim_is_refused_where_nothing_else_is_said() {
    let mut strict = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    strict.default_access = None;
    let verifier = Verifier::new(vec![strict]).unwrap();
    let access = |changes: &Value| {
        let token = Token::new(claiming(changes).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    assert_eq!(access(&json!({"access": "read-only"})), Ok(Access::ReadOnly));
    assert_eq!(access(&json!({})), Err(TokenError::AccessAbsent));
    assert_eq!(access(&json!({"realm_access": {"roles": ["x"]}})), Err(TokenError::AccessAbsent));
}

#[test]
fn an_issuer_speaks_for_its_own_tenants_and_grants_no_more_than_it_may() {
    let mut partner = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    partner.tenants = Some(["acme", "eu-*"].map(|text| TenantPattern::parse(text).unwrap()).into());
    partner.max_access = Some(Access::ReadWrite);
    let verifier = Verifier::new(vec![partner]).unwrap();
    let verdict = |changes: Value| {
        let token = Token::new(claiming(&changes).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.tenants().len()).map_err(|r| r.error)
    };
    for (tenant, expected) in [
        (json!("acme"), Ok(1)),
        (json!("eu-1"), Ok(1)),
        (json!(["eu-1", "acme", "eu-2"]), Ok(3)),
        (json!("acme2"), Err(TokenError::TenantBeyond)),
        (json!("eu"), Err(TokenError::TenantBeyond)),
        (json!("globex"), Err(TokenError::TenantBeyond)),
        // Not less than it asked for: none of it.
        (json!(["acme", "globex"]), Err(TokenError::TenantBeyond)),
    ] {
        assert_eq!(verdict(json!({ "tenant": tenant })), expected, "{tenant}");
    }
    assert_eq!(verdict(json!({"access": "read-only"})), Ok(1));
    let asked = Access::Migrate;
    assert_eq!(verdict(json!({"access": "migrate"})), Err(TokenError::AccessBeyond { asked }));
}
