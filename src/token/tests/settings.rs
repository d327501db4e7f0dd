//! What an issuer's settings make of its claims.

use super::*;

/// What a verifier with these settings says to changed claims.
fn judged(change: impl FnOnce(&mut Issuer)) -> impl Fn(&Value) -> Result<Claims, TokenError> {
    let mut changed = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    change(&mut changed);
    let verifier = Verifier::new(vec![changed]).unwrap();
    move |changes| {
        let token = Secret::new(claiming(changes).into_bytes());
        verifier.verify(&token, now()).map_err(|rejected| rejected.error)
    }
}

#[test]
fn an_access_map_says_what_the_claim_means_and_nothing_else_is_taken() {
    let mut mapped = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    let values = [("admin", Access::ReadWrite), ("viewer", Access::ReadOnly)];
    mapped.access_values = Some(values.map(|(text, level)| (text.to_owned(), level)).into());
    mapped.default_access = Some(Access::ReadOnly);
    let verifier = Verifier::new(vec![mapped]).unwrap();
    let access = |changes: &Value| {
        let token = Secret::new(claiming(changes).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    assert_eq!(access(&json!({"access": "admin"})), Ok(Access::ReadWrite));
    assert_eq!(access(&json!({"access": "viewer"})), Ok(Access::ReadOnly));
    assert_eq!(access(&json!({})), Ok(Access::ReadOnly));
    for unknown in ["read-write", "migrate", "Admin", "admin ", " admin", ""] {
        let verdict = access(&json!({"access": unknown}));
        assert_eq!(verdict, Err(TokenError::AccessUnknown), "{unknown:?}");
    }
}

/// Keycloak's roles are a list, and most of them are other services'.
#[test]
fn roles_and_scopes_add_up_and_others_are_passed_over() {
    let mut mapped = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    let values = [
        ("db-writer", Access::ReadWrite),
        ("db-owner", Access::ReadWrite),
        ("db-reader", Access::ReadOnly),
        ("Senior Reader", Access::ReadOnly),
    ];
    mapped.access_values = Some(values.map(|(text, level)| (text.to_owned(), level)).into());
    mapped.access_claim = ClaimPath::parse("/realm_access/roles").unwrap();
    // Whatever a token says that finds nothing, it must not become this.
    mapped.default_access = Some(Access::Migrate);
    let verifier = Verifier::new(vec![mapped]).unwrap();
    let access = |roles: Value| {
        let token = Secret::new(claiming(&json!({"realm_access": {"roles": roles}})).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    let offline = "offline_access";
    for (roles, expected) in [
        (json!(["db-reader"]), Ok(Access::ReadOnly)),
        (json!([offline, "db-reader", "uma_authorization"]), Ok(Access::ReadOnly)),
        (json!(["db-writer", offline, "db-owner", "db-writer"]), Ok(Access::ReadWrite)),
        (json!("db-reader"), Ok(Access::ReadOnly)),
        (json!(["db-reader", "db-writer", "db-reader"]), Ok(Access::ReadWrite)),
        (json!(["db-writer", "db-reader"]), Ok(Access::ReadWrite)),
        (json!("openid db-reader profile"), Ok(Access::ReadOnly)),
        (json!("db-reader db-writer db-reader"), Ok(Access::ReadWrite)),
        (json!("https://api.example/db db-reader"), Ok(Access::ReadOnly)),
        (json!("Senior Reader"), Ok(Access::ReadOnly)),
        (json!([offline, "Senior Reader"]), Ok(Access::ReadOnly)),
        (json!(["openid db-reader"]), Err(TokenError::AccessUnknown)),
        (json!("openid  db-reader"), Err(TokenError::AccessUnknown)),
        (json!(" db-reader"), Err(TokenError::AccessUnknown)),
        (json!("db-reader "), Err(TokenError::AccessUnknown)),
        (json!("openid\tdb-reader"), Err(TokenError::AccessUnknown)),
        (json!("openid\u{a0}db-reader"), Err(TokenError::AccessUnknown)),
        (json!("db-reader \"db-writer\""), Err(TokenError::AccessUnknown)),
        (json!("openid,db-reader"), Err(TokenError::AccessUnknown)),
        (json!("openid profile"), Err(TokenError::AccessUnknown)),
        (json!(""), Err(TokenError::AccessUnknown)),
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
        let token = Secret::new(claiming(changes).into_bytes());
        verifier.verify(&token, now()).map(|claims| claims.access()).map_err(|r| r.error)
    };
    assert_eq!(access(&json!({"access": "read-only"})), Ok(Access::ReadOnly));
    assert_eq!(access(&json!({})), Err(TokenError::AccessAbsent));
    assert_eq!(access(&json!({"realm_access": {"roles": ["x"]}})), Err(TokenError::AccessAbsent));
}

#[test]
fn an_issuer_speaks_for_its_own_tenants_and_grants_no_more_than_it_may() {
    let mut partner = issuer(ISSUER, vec![key("k1", Algorithm::Es256)]);
    let own = ["acme", "eu-*"].map(|text| TenantPattern::parse(text).unwrap());
    partner.tenants = Some(Arc::new(own));
    partner.max_access = Some(Access::ReadWrite);
    let verifier = Verifier::new(vec![partner]).unwrap();
    let verdict = |changes: Value| {
        let token = Secret::new(claiming(&changes).into_bytes());
        // Wherever the registry sends a word, the tenant must be one that the issuer may name.
        let known = |word: &str| match word {
            "/acme" => Some(ids(&["acme"]).remove(0)),
            "/globex" | "eu-globex" => Some(ids(&["globex"]).remove(0)),
            _ => None,
        };
        let claims = verifier.verify(&token, now()).map_err(|rejected| rejected.error)?;
        claims.tenants(known).map(|tenants| tenants.len()).map_err(|rejected| rejected.error)
    };
    for (tenant, expected) in [
        (json!("acme"), Ok(1)),
        (json!("eu-1"), Ok(1)),
        (json!(["eu-1", "acme", "eu-2"]), Ok(3)),
        (json!("acme2"), Err(TokenError::TenantBeyond)),
        (json!("eu"), Err(TokenError::TenantBeyond)),
        (json!("globex"), Err(TokenError::TenantBeyond)),
        (json!("/acme"), Ok(1)),
        (json!(["/acme", "acme"]), Ok(1)),
        (json!("/globex"), Err(TokenError::TenantBeyond)),
        (json!("eu-globex"), Err(TokenError::TenantBeyond)),
        (json!(["/acme", "/globex"]), Err(TokenError::TenantBeyond)),
        // Not less than it asked for: none of it.
        (json!(["acme", "globex"]), Err(TokenError::TenantBeyond)),
    ] {
        assert_eq!(verdict(json!({ "tenant": tenant })), expected, "{tenant}");
    }
    assert_eq!(verdict(json!({"access": "read-only"})), Ok(1));
    let asked = Access::Migrate;
    assert_eq!(verdict(json!({"access": "migrate"})), Err(TokenError::AccessBeyond { asked }));
}

/// What stands where a claim should be is not taken for nothing.
#[test]
fn a_claim_path_through_a_non_object_is_an_error() {
    let path = |text| ClaimPath::parse(text).unwrap();
    let access = judged(|issuer| issuer.access_claim = path("/realm_access/roles"));
    let granted = |changes| access(&changes).map(|claims| claims.access());
    assert_eq!(granted(json!({})), Ok(Access::ReadWrite), "the default");
    assert_eq!(granted(json!({"realm_access": {}})), Ok(Access::ReadWrite));
    for held in [json!("roles"), json!(7), json!(["roles"]), json!(true)] {
        let verdict = granted(json!({ "realm_access": held }));
        assert_eq!(verdict, Err(TokenError::AccessUnknown), "{held}");
    }
    let tenant = judged(|issuer| issuer.tenant_claim = path("/app/tenants"));
    let named = |changes| tenant(&changes).map(|_| ());
    assert_eq!(named(json!({"app": {"tenants": "acme"}})), Ok(()));
    assert_eq!(named(json!({})), Err(TokenError::TenantAbsent));
    assert_eq!(named(json!({"app": "acme"})), Err(TokenError::TenantMalformed));
    let audience = judged(|issuer| issuer.audience_claim = path("/app/client"));
    let ours = |changes| audience(&changes).map(|_| ());
    assert_eq!(ours(json!({"app": {"client": "pgsilo"}})), Ok(()));
    let invalid = Err(TokenError::ClaimInvalid { claim: "aud" });
    assert_eq!(ours(json!({"app": "pgsilo"})), invalid);
}

/// Cognito's access tokens have no `aud`.
#[test]
fn another_claim_may_say_for_whom_a_token_is_and_aud_must_agree() {
    let ours = judged(|issuer| issuer.audience_claim = ClaimPath::parse("client_id").unwrap());
    let ours = |changes| ours(&changes).map(|_| ());
    let (wrong, absent) = (TokenError::AudienceWrong, TokenError::ClaimInvalid { claim: "aud" });
    for (changes, expected) in [
        (json!({"aud": null, "client_id": "pgsilo"}), Ok(())),
        (json!({"aud": ["x", "pgsilo-eu"], "client_id": "pgsilo"}), Ok(())),
        (json!({"aud": null, "client_id": "other"}), Err(wrong.clone())),
        (json!({"aud": "other", "client_id": "pgsilo"}), Err(wrong.clone())),
        (json!({"aud": [], "client_id": "pgsilo"}), Err(wrong)),
        // Its ID token.
        (json!({"aud": "pgsilo"}), Err(absent.clone())),
        (json!({"aud": 7, "client_id": "pgsilo"}), Err(absent.clone())),
        (json!({"aud": null, "client_id": 7}), Err(absent)),
    ] {
        assert_eq!(ours(changes.clone()), expected, "{changes}");
    }
}

#[test]
fn a_tokens_life_has_a_bound_where_its_issuer_has_one() {
    let hour = Duration::from_secs(3600);
    let judge = judged(|issuer| issuer.max_lifetime = Some(hour));
    let lives = |changes| judge(&changes).map(|_| ());
    let beyond = |seconds| {
        let lifetime = Duration::from_secs(seconds);
        Err(TokenError::LifetimeBeyond { lifetime })
    };
    let invalid = Err(TokenError::ClaimInvalid { claim: "iat" });
    for (changes, expected) in [
        (json!({}), Ok(())),
        (json!({"iat": NOW - 600, "exp": NOW + 3000}), Ok(())),
        (json!({"iat": NOW - 600, "exp": NOW + 3001}), beyond(3601)),
        // Little is left of it, and still it was made to live too long.
        (json!({"iat": NOW - 86_400, "exp": NOW + 60}), beyond(86_460)),
        // The leeway is for clocks, and not for lives.
        (json!({"iat": NOW + 10, "exp": NOW + 3620}), beyond(3610)),
        (json!({"iat": null}), invalid.clone()),
        (json!({"iat": "0"}), invalid),
    ] {
        assert_eq!(lives(changes.clone()), expected, "{changes}");
    }
}

/// With a map its words are the only ones; what they mean is not for a registry to say.
#[test]
fn a_tenant_map_says_what_the_claims_words_mean_and_nothing_else_is_taken() {
    let tenant = |text: &str| ids(&[text]).remove(0);
    let judge = judged(|issuer| {
        let values = [("/acme", "acme"), ("org_Ab1", "acme"), ("/globex", "globex")];
        issuer.tenant_values = Some(values.map(|(word, id)| (word.to_owned(), tenant(id))).into());
    });
    let tenants = |named| {
        let claims = judge(&json!({ "tenant": named }))?;
        claims.tenants(|_| panic!("nobody else is asked")).map_err(|rejected| rejected.error)
    };
    for (named, expected) in [
        (json!("/acme"), Ok(ids(&["acme"]))),
        (json!(["org_Ab1", "/acme"]), Ok(ids(&["acme"]))),
        (json!(["/admins", "/globex", "/acme"]), Ok(ids(&["globex", "acme"]))),
        (json!(["acme", "/globex"]), Ok(ids(&["globex"]))),
        (json!("acme"), Err(TokenError::TenantMalformed)),
        (json!("/ACME"), Err(TokenError::TenantMalformed)),
        (json!(["/admins"]), Err(TokenError::TenantMalformed)),
        (json!(["/acme", 7]), Err(TokenError::TenantMalformed)),
        (json!([]), Err(TokenError::TenantAbsent)),
    ] {
        assert_eq!(tenants(named.clone()), expected, "{named}");
    }
}
