//! More tokens of people who know what verifiers have been deceived with. Each is refused with its
//! reason; none is believed in any part unless its signature is good.

use super::*;

/// With the signature of the issuer over whatever is said.
fn texts(header: &str, payload: &str) -> String {
    sign_text(Algorithm::Es256, header, payload)
}

#[test]
fn unsigned_token_parts_are_parsed_strictly() {
    use TokenError::{
        AlgorithmRefused, HeaderRefused, IssuerUnknown, KeyUnknown, Malformed, SignatureInvalid,
    };
    let good = claiming(&json!({}));
    let parts: Vec<&str> = good.split('.').collect();
    let (head, body, tail) = (parts[0], parts[1], parts[2]);
    let (plain_header, plain) = (header().to_string(), claims().to_string());
    let refused = |member| HeaderRefused { member };
    let with_header = |from: &str, to: &str| texts(&plain_header.replacen(from, to, 1), &plain);
    let with_claims = |from: &str, to: &str| texts(&plain_header, &plain.replacen(from, to, 1));
    let first = |member: &str| format!("{{{member},");
    let swapped = {
        let signature = signature_of(&good);
        [&signature[32..], &signature[..32]].concat()
    };
    // RFC 7516: a direct encryption has an empty second part.
    let jwe = format!(
        "{}..{}.{}.{}",
        b64(r#"{"alg":"dir","enc":"A256GCM","kid":"k1"}"#),
        b64([0; 12]),
        b64(&plain),
        b64([0; 16])
    );
    let cases: Vec<(&str, String, TokenError)> = vec![
        ("a JWE", jwe, Malformed),
        (
            "a JWE's header before three parts",
            headed(&json!({"alg": "dir", "enc": "A256GCM"})),
            refused("enc"),
        ),
        ("alg of a key exchange", headed(&json!({"alg": "ECDH-ES"})), AlgorithmRefused),
        ("alg HS512", headed(&json!({"alg": "HS512"})), AlgorithmRefused),
        ("alg ES256K", headed(&json!({"alg": "ES256K"})), AlgorithmRefused),
        ("alg with a NUL", headed(&json!({"alg": "ES256\u{0}"})), AlgorithmRefused),
        ("alg null", with_header("\"ES256\"", "null"), AlgorithmRefused),
        (
            "alg none, kid of another issuer's key",
            headed(&json!({"alg": "none", "kid": "k2"})),
            AlgorithmRefused,
        ),
        ("jku null", with_header("{", &first("\"jku\":null")), refused("jku")),
        ("jwk null", with_header("{", &first("\"jwk\":null")), refused("jwk")),
        ("crit null", with_header("{", &first("\"crit\":null")), refused("crit")),
        ("crit b64", headed(&json!({"crit": ["b64"], "b64": false})), refused("crit")),
        (
            "jku on the issuer's own host",
            headed(&json!({"jku": format!("{ISSUER}/jwks")})),
            refused("jku"),
        ),
        (
            "jku spelled with an escape",
            with_header("{", &first(r#""jk\u0075":"https://evil.example""#)),
            refused("jku"),
        ),
        ("typ of an access token with a space", headed(&json!({"typ": "at+jwt "})), refused("typ")),
        ("typ JOSE", headed(&json!({"typ": "JOSE"})), refused("typ")),
        ("typ of a security event", headed(&json!({"typ": "secevent+jwt"})), refused("typ")),
        ("typ of a proof of possession", headed(&json!({"typ": "dpop+jwt"})), refused("typ")),
        ("typ empty", headed(&json!({"typ": ""})), refused("typ")),
        ("typ null", with_header("\"JWT\"", "null"), refused("typ")),
        ("kid with a NUL", headed(&json!({"kid": "k1\u{0}"})), KeyUnknown),
        ("kid with a line end", headed(&json!({"kid": "k1\n"})), KeyUnknown),
        ("kid in capitals", headed(&json!({"kid": "K1"})), KeyUnknown),
        ("kid an injection", headed(&json!({"kid": "' UNION SELECT 'k1"})), KeyUnknown),
        ("kid a URL", headed(&json!({"kid": "https://evil.example/key"})), KeyUnknown),
        ("kid of 10,000 characters", headed(&json!({"kid": "k".repeat(10_000)})), KeyUnknown),
        ("kid a lookalike", headed(&json!({"kid": "ｋ1"})), KeyUnknown),
        ("kid a list", headed(&json!({"kid": ["k1"]})), refused("kid")),
        ("kid null", with_header("\"k1\"", "null"), refused("kid")),
        ("kid twice", with_header("{", &first("\"kid\":\"k9\"")), Malformed),
        ("kid twice, escaped", with_header("{", &first(r#""\u006bid":"k9""#)), Malformed),
        (
            "header too deep",
            texts(
                &format!(r#"{{"alg":"ES256","a":{}{}}}"#, "[".repeat(200), "]".repeat(200)),
                &plain,
            ),
            Malformed,
        ),
        ("header empty", texts("{}", &plain), AlgorithmRefused),
        ("header null", texts("null", &plain), Malformed),
        (
            "header with a byte order mark",
            texts(&format!("\u{feff}{plain_header}"), &plain),
            Malformed,
        ),
        (
            "payload with a byte order mark",
            texts(&plain_header, &format!("\u{feff}{plain}")),
            Malformed,
        ),
        ("payload twice", texts(&plain_header, &plain.repeat(2)), Malformed),
        ("payload with a comma more", with_claims("}", ",}"), Malformed),
        ("payload in single quotes", texts(&plain_header, &plain.replace('"', "'")), Malformed),
        ("payload with a NUL behind it", texts(&plain_header, &format!("{plain}\0")), Malformed),
        ("payload with half a surrogate", with_claims("alice", r"\ud800"), Malformed),
        ("payload with a raw line end in a text", with_claims("alice", "al\nice"), Malformed),
        ("exp twice", with_claims("{", &first("\"exp\":99999999999")), Malformed),
        ("tenant twice", with_claims("{", &first("\"tenant\":\"globex\"")), Malformed),
        ("exp with a plus", with_claims("\"exp\":", "\"exp\":+"), Malformed),
        ("exp in hexadecimal", with_claims("\"exp\":", "\"exp\":0x"), Malformed),
        ("exp with a zero before it", with_claims("\"exp\":", "\"exp\":0"), Malformed),
        ("iss with a NUL", claiming(&json!({"iss": format!("{ISSUER}\u{0}")})), IssuerUnknown),
        ("iss in capitals", claiming(&json!({"iss": "HTTPS://issuer.example"})), IssuerUnknown),
        ("iss with a port", claiming(&json!({"iss": "https://issuer.example:443"})), IssuerUnknown),
        ("iss a lookalike", claiming(&json!({"iss": "https://іssuer.example"})), IssuerUnknown),
        ("iss null", with_claims(&format!("\"{ISSUER}\""), "null"), IssuerUnknown),
        ("signature with its halves swapped", resigned(swapped), SignatureInvalid),
        ("signature with padding", format!("{head}.{body}.{tail}=="), Malformed),
        ("payload with padding", format!("{head}.{body}=.{tail}"), Malformed),
        ("signature of one character", format!("{head}.{body}.A"), Malformed),
        ("line end inside", format!("{head}.{}\r\n{}.{tail}", &body[..20], &body[20..]), Malformed),
        ("tab before the signature", format!("{head}.{body}.\t{tail}"), Malformed),
        ("NUL before", format!("\0{good}"), Malformed),
        ("NUL inside", format!("{head}.\0{body}.{tail}"), Malformed),
        ("percent-encoded dots", good.replace('.', "%2e"), Malformed),
        ("fullwidth dots", good.replace('.', "．"), Malformed),
        ("two tokens", format!("{good},{good}"), Malformed),
        ("in quotes", format!("\"{good}\""), Malformed),
    ];
    assert!(cases.len() >= 40);
    for (what, token, reason) in cases {
        let rejected = verify(token).expect_err(what);
        assert_eq!(told(rejected), (reason, false), "{what}");
    }
}

/// Well signed by an issuer who is careless or does the bidding of its users.
#[test]
fn signed_token_contents_are_parsed_strictly() {
    use TokenError::{
        AccessUnknown, AudienceWrong, ClaimInvalid, Expired, NotYetValid, TenantMalformed,
    };
    let invalid = |claim| ClaimInvalid { claim };
    let cases = [
        (json!({"aud": {"0": "pgsilo"}}), invalid("aud")),
        (json!({"aud": [["pgsilo"]]}), invalid("aud")),
        (json!({"aud": "pgsilo pgsilo-eu"}), AudienceWrong),
        (json!({"aud": "pgsilo\u{0}"}), AudienceWrong),
        (json!({"aud": "*"}), AudienceWrong),
        (json!({"sub": "a".repeat(257)}), invalid("sub")),
        (json!({"sub": ["alice"]}), invalid("sub")),
        (json!({"sub": "alice\u{2028}"}), invalid("sub")),
        (json!({"sub": "\u{85}"}), invalid("sub")),
        (json!({"exp": 253_402_300_800u64}), invalid("exp")),
        (json!({"exp": 253_402_300_800.0}), invalid("exp")),
        (json!({"exp": i64::MIN}), invalid("exp")),
        (json!({"exp": {"$gt": 0}}), invalid("exp")),
        (json!({"exp": ""}), invalid("exp")),
        (json!({"nbf": -1}), invalid("nbf")),
        (json!({"nbf": false}), invalid("nbf")),
        (json!({"nbf": [0]}), invalid("nbf")),
        (json!({"nbf": 1e20}), invalid("nbf")),
        (json!({"iat": "2027-01-15T08:00:00Z"}), invalid("iat")),
        (json!({"iat": -0.5}), invalid("iat")),
        (json!({"iat": u64::MAX}), invalid("iat")),
        // At the edge, to the second and less, with a leeway of 30 s.
        (json!({"exp": NOW - 30}), Expired { since: Duration::from_secs(30) }),
        (json!({"exp": NOW as f64 - 30.5}), Expired { since: Duration::from_millis(30_500) }),
        (json!({"nbf": NOW as f64 + 30.5}), NotYetValid),
        (json!({"iat": NOW as f64 + 30.5}), NotYetValid),
        (json!({"iat": NOW + 31, "nbf": NOW}), NotYetValid),
        (json!({"access": "read-write "}), AccessUnknown),
        (json!({"access": "read-only,read-write"}), AccessUnknown),
        (json!({"access": "ｍigrate"}), AccessUnknown),
        (json!({"access": {"level": "read-only"}}), AccessUnknown),
        (json!({"tenant": "acme "}), TenantMalformed),
        (json!({"tenant": "acme\n"}), TenantMalformed),
        (json!({"tenant": "ac\u{200b}me"}), TenantMalformed),
        (json!({"tenant": "acme\u{301}"}), TenantMalformed),
        (json!({"tenant": "ａcme"}), TenantMalformed),
        (json!({"tenant": "acm\u{212f}"}), TenantMalformed),
        (json!({"tenant": "\u{202e}emca"}), TenantMalformed),
        (json!({"tenant": "ß"}), TenantMalformed),
        (json!({"tenant": "*"}), TenantMalformed),
        (json!({"tenant": "%"}), TenantMalformed),
        (json!({"tenant": "-acme"}), TenantMalformed),
        (json!({"tenant": "acme'; DROP DATABASE globex; --"}), TenantMalformed),
        (json!({"tenant": true}), TenantMalformed),
        (json!({"tenant": ["acme", "Globex"]}), TenantMalformed),
        (json!({"tenant": ["acme", null]}), TenantMalformed),
        (json!({"tenant": ["acme", ["globex"]]}), TenantMalformed),
        (json!({"tenant": vec!["acme"; 1001]}), TenantMalformed),
    ];
    let tenants = |token| {
        let claims = verify(token)?;
        claims.tenants(|_| None)
    };
    for (changes, reason) in cases {
        let rejected = tenants(claiming(&changes)).expect_err(&changes.to_string());
        assert_eq!((rejected.error, rejected.verified), (reason, true), "{changes}");
    }
    // The last moments at which these are good.
    for changes in [
        json!({"exp": NOW as f64 - 29.5}),
        json!({"nbf": NOW + 30}),
        json!({"iat": NOW as f64 + 30.0}),
        json!({"exp": 253_402_300_799u64}),
        json!({"tenant": vec!["acme"; 1000]}),
        json!({"sub": "é".repeat(256)}),
    ] {
        verify(claiming(&changes)).unwrap_or_else(|rejected| panic!("{changes}: {rejected}"));
    }
    // Numbers that a JSON writer would not write.
    let plain = claims().to_string();
    let exp = format!("\"exp\":{}", NOW + 600);
    for (text, reason) in [
        ("\"exp\":1e30", invalid("exp")),
        ("\"exp\":100000000000000000000000000000", invalid("exp")),
        ("\"exp\":-0", Expired { since: Duration::from_secs(NOW) }),
        ("\"exp\":1e-400", Expired { since: Duration::from_secs(NOW) }),
    ] {
        assert!(plain.contains(&exp));
        let token = texts(&header().to_string(), &plain.replace(&exp, text));
        assert_eq!(verify(token).expect_err(text).error, reason, "{text}");
    }
}
