//! Tokens that are well signed and say the wrong things: their senders may be told why.

use super::*;

/// Well signed, and still refused: the client may be told why.
#[test]
fn well_signed_tokens_must_also_say_the_right_things() {
    use TokenError::{
        AccessUnknown, AudienceWrong, ClaimInvalid, Expired, NotYetValid, TenantAbsent,
        TenantMalformed,
    };
    let invalid = |claim| ClaimInvalid { claim };
    let expired = |seconds| Expired { since: Duration::from_secs(seconds) };
    let many: Vec<String> = (0..1001).map(|n| format!("t{n}")).collect();
    let cases = [
        (json!({"aud": "other"}), AudienceWrong),
        (json!({"aud": "PGSILO"}), AudienceWrong),
        (json!({"aud": ["a", "b"]}), AudienceWrong),
        (json!({"aud": []}), AudienceWrong),
        (json!({"aud": null}), invalid("aud")),
        (json!({"aud": 1}), invalid("aud")),
        (json!({"aud": {"pgsilo": true}}), invalid("aud")),
        (json!({"aud": ["pgsilo", 1]}), invalid("aud")),
        (json!({"sub": null}), invalid("sub")),
        (json!({"sub": ""}), invalid("sub")),
        (json!({"sub": 7}), invalid("sub")),
        (json!({"sub": "a\nlevel=error"}), invalid("sub")),
        (json!({"sub": "a\u{202e}b"}), invalid("sub")),
        (json!({"sub": "é".repeat(257)}), invalid("sub")),
        (json!({"jti": ""}), invalid("jti")),
        (json!({"jti": 7}), invalid("jti")),
        (json!({"jti": "a\u{0}"}), invalid("jti")),
        (json!({"exp": null}), invalid("exp")),
        (json!({"exp": (NOW + 600).to_string()}), invalid("exp")),
        (json!({"exp": true}), invalid("exp")),
        (json!({"exp": -1}), invalid("exp")),
        (json!({"exp": -1.5}), invalid("exp")),
        (json!({"exp": 1e300}), invalid("exp")),
        (json!({"exp": u64::MAX}), invalid("exp")),
        (json!({"exp": (NOW + 600) * 1000}), invalid("exp")),
        (json!({"exp": [NOW + 600]}), invalid("exp")),
        (json!({"exp": 0}), expired(NOW)),
        (json!({"exp": NOW - 30}), expired(30)),
        (json!({"exp": NOW - 3600}), expired(3600)),
        (json!({"nbf": NOW + 31}), NotYetValid),
        (json!({"iat": NOW + 31}), NotYetValid),
        (json!({"nbf": "0"}), invalid("nbf")),
        (json!({"iat": {}}), invalid("iat")),
        (json!({"access": "admin"}), AccessUnknown),
        (json!({"access": ""}), AccessUnknown),
        (json!({"access": "Read-Write"}), AccessUnknown),
        (json!({"access": ["read-only"]}), AccessUnknown),
        (json!({"access": true}), AccessUnknown),
        (json!({"tenant": null}), TenantAbsent),
        (json!({"tenant": []}), TenantAbsent),
        (json!({"tenant": ""}), TenantMalformed),
        (json!({"tenant": 7}), TenantMalformed),
        (json!({"tenant": {"id": "acme"}}), TenantMalformed),
        (json!({"tenant": [["acme"]]}), TenantMalformed),
        (json!({"tenant": ["acme", 7]}), TenantMalformed),
        (json!({"tenant": ["acme", ""]}), TenantMalformed),
        (json!({"tenant": "acme\u{0}"}), TenantMalformed),
        (json!({"tenant": "acme\u{202e}"}), TenantMalformed),
        (json!({"tenant": "a".repeat(257)}), TenantMalformed),
        (json!({"tenant": many}), TenantMalformed),
    ];
    for (changes, reason) in cases {
        let rejected = verify(claiming(&changes)).expect_err(&changes.to_string());
        assert_eq!(rejected.error, reason, "{changes}");
        assert!(rejected.verified, "{changes}");
        let subject = changes.get("sub").is_none().then_some("alice");
        assert_eq!(rejected.subject.as_deref(), subject, "{changes}");
        let id = changes.get("jti").is_none().then_some("t-1");
        assert_eq!(rejected.token_id.as_deref(), id, "{changes}");
    }
    // The helper removes nulls; a claim that is there and null is no claim of its type.
    let plain = claims().to_string();
    for (from, to, reason) in [
        ("\"tenant\":\"acme\"", "\"tenant\":null", TenantMalformed),
        ("\"tenant\":\"acme\"", "\"tenant\":\"acme\",\"access\":null", AccessUnknown),
        ("\"sub\":\"alice\"", "\"sub\":null", invalid("sub")),
    ] {
        assert!(plain.contains(from));
        let token = sign_text(Algorithm::Es256, &header().to_string(), &plain.replace(from, to));
        assert_eq!(verify(token).unwrap_err().error, reason, "{to}");
    }
}

/// The issuer's table and the registry are asked for a word; it never becomes an id.
#[test]
fn a_tenant_is_an_id_or_a_word_that_is_known() {
    let acme = |_: &str| Some(ids(&["acme"]).remove(0));
    let long = "a".repeat(64);
    for word in ["ACME", "аcme", "acme,globex", "acme globex", " acme", "../globex", &*long] {
        for tenant in [json!(word), json!(["globex", word]), json!([word, word])] {
            let claims = verify(claiming(&json!({ "tenant": tenant }))).unwrap();
            let rejected = claims.tenants(|_| None).unwrap_err();
            assert_eq!(rejected.subject.as_deref(), Some("alice"));
            assert_eq!(told(rejected), (TokenError::TenantMalformed, true), "{tenant}");
        }
        let claims = verify(claiming(&json!({"tenant": [word, "acme", "globex"]}))).unwrap();
        assert_eq!(claims.tenants(acme).unwrap(), ids(&["acme"]), "each once");
    }
}
