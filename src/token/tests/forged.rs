//! Tokens that are refused before anything in them is believed.

use super::*;

/// Refused before anything in them is believed.
#[test]
fn forged_and_bent_tokens_are_refused() {
    use TokenError::{
        AlgorithmRefused, HeaderRefused, IssuerUnknown, KeyUnknown, Malformed, Missing,
        SignatureInvalid,
    };
    let good = claiming(&json!({}));
    let part = |n: usize| good.split('.').nth(n).unwrap().to_owned();
    let (head, body, tail) = (part(0), part(1), part(2));
    let p256 = pair(Algorithm::Es256);
    let jwk = json!({"kty": "EC", "crv": "P-256", "x": b64(&p256.public[1..33]), "y": b64(&p256.public[33..])});
    let der_signed = {
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &p256.der).unwrap();
        let rng = aws_lc_rs::rand::SystemRandom::new();
        key.sign(&rng, format!("{head}.{body}").as_bytes()).unwrap().as_ref().to_vec()
    };
    let mut flipped = signature_of(&good);
    flipped[10] ^= 1;
    let unsigned =
        |alg: &str| format!("{}.{body}.", b64(format!(r#"{{"alg":"{alg}","kid":"k1"}}"#)));
    let doubled_header = r#"{"alg":"ES256","alg":"ES256","kid":"k1"}"#;
    let text = |header: &str, payload: &str| sign_text(Algorithm::Es256, header, payload);
    let plain_header = header().to_string();
    let plain = claims().to_string();
    let twice = plain.replacen('{', r#"{"sub":"root","#, 1);
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    // The last character of a P-256 signature carries two unused bits.
    let spare_bits = {
        let last = tail.chars().last().unwrap();
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
        format!("{head}.{body}.{}{next}", &tail[..tail.len() - 1])
    };
    let cases: Vec<(&str, String, TokenError)> = vec![
        ("empty", String::new(), Missing),
        ("alg none", unsigned("none"), AlgorithmRefused),
        ("alg None", unsigned("None"), AlgorithmRefused),
        ("alg NONE", unsigned("NONE"), AlgorithmRefused),
        ("alg empty", unsigned(""), AlgorithmRefused),
        ("alg none with a signature", headed(&json!({"alg": "none"})), AlgorithmRefused),
        ("alg in lower case", headed(&json!({"alg": "es256"})), AlgorithmRefused),
        ("alg with a space", headed(&json!({"alg": "ES256 "})), AlgorithmRefused),
        ("alg absent", headed(&json!({"alg": null})), AlgorithmRefused),
        ("alg a list", headed(&json!({"alg": ["ES256"]})), AlgorithmRefused),
        ("alg of another key", headed(&json!({"alg": "RS256"})), AlgorithmRefused),
        ("alg stronger than the key's", headed(&json!({"alg": "ES384"})), AlgorithmRefused),
        (
            "alg PS256 for an RS256 key",
            headed(&json!({"alg": "PS256", "kid": "rsa"})),
            AlgorithmRefused,
        ),
        ("HS256 keyed with the PEM", hmac(p256.pem.as_bytes()), AlgorithmRefused),
        ("HS256 keyed with the PEM, trimmed", hmac(p256.pem.trim().as_bytes()), AlgorithmRefused),
        ("HS256 keyed with the point", hmac(&p256.public), AlgorithmRefused),
        ("HS256 keyed with the JWK", hmac(jwk.to_string().as_bytes()), AlgorithmRefused),
        ("HS256 keyed with nothing", hmac(b""), AlgorithmRefused),
        ("its own key", headed(&json!({"jwk": jwk})), HeaderRefused { member: "jwk" }),
        (
            "a key's address",
            headed(&json!({"jku": "https://evil.example/jwks"})),
            HeaderRefused { member: "jku" },
        ),
        (
            "a certificate's address",
            headed(&json!({"x5u": "https://evil.example"})),
            HeaderRefused { member: "x5u" },
        ),
        ("a certificate", headed(&json!({"x5c": ["AAAA"]})), HeaderRefused { member: "x5c" }),
        ("crit", headed(&json!({"crit": ["exp"], "exp": 1})), HeaderRefused { member: "crit" }),
        ("crit empty", headed(&json!({"crit": []})), HeaderRefused { member: "crit" }),
        ("b64 false", headed(&json!({"b64": false})), HeaderRefused { member: "b64" }),
        ("b64 true", headed(&json!({"b64": true})), HeaderRefused { member: "b64" }),
        ("zip", headed(&json!({"zip": "DEF"})), HeaderRefused { member: "zip" }),
        ("enc", headed(&json!({"enc": "A256GCM"})), HeaderRefused { member: "enc" }),
        ("nested", headed(&json!({"cty": "JWT"})), HeaderRefused { member: "cty" }),
        (
            "typ of a logout token",
            headed(&json!({"typ": "logout+jwt"})),
            HeaderRefused { member: "typ" },
        ),
        ("typ a number", headed(&json!({"typ": 1})), HeaderRefused { member: "typ" }),
        ("kid a number", headed(&json!({"kid": 1})), HeaderRefused { member: "kid" }),
        ("kid absent among two keys", headed(&json!({"kid": null})), KeyUnknown),
        ("kid unknown", headed(&json!({"kid": "k9"})), KeyUnknown),
        ("kid empty", headed(&json!({"kid": ""})), KeyUnknown),
        ("kid a path", headed(&json!({"kid": "../../dev/null"})), KeyUnknown),
        ("kid of another issuer", headed(&json!({"kid": "k2"})), KeyUnknown),
        ("iss wrong", claiming(&json!({"iss": "https://evil.example"})), IssuerUnknown),
        ("iss with a slash more", claiming(&json!({"iss": format!("{ISSUER}/")})), IssuerUnknown),
        ("iss absent", claiming(&json!({"iss": null})), IssuerUnknown),
        ("iss a list", claiming(&json!({"iss": [ISSUER]})), IssuerUnknown),
        (
            "iss of another issuer, whose kid it is",
            sign(
                &with(header(), &json!({"kid": "k2", "alg": "ES384"})),
                &with(claims(), &json!({"iss": "https://other.example"})),
            ),
            SignatureInvalid,
        ),
        ("signature flipped", resigned(&flipped), SignatureInvalid),
        ("signature empty", resigned([]), SignatureInvalid),
        ("signature of zeros", resigned([0; 64]), SignatureInvalid),
        ("signature of ones", resigned([255; 64]), SignatureInvalid),
        ("signature truncated", resigned(&signature_of(&good)[..63]), SignatureInvalid),
        ("signature longer", resigned([signature_of(&good), vec![0]].concat()), SignatureInvalid),
        ("signature in DER", resigned(der_signed), SignatureInvalid),
        (
            "signature of other claims",
            resigned(signature_of(&claiming(&json!({"sub": "bob"})))),
            SignatureInvalid,
        ),
        ("signature's spare bits", spare_bits, Malformed),
        ("two parts", format!("{head}.{body}"), Malformed),
        ("four parts", format!("{good}.{tail}"), Malformed),
        ("five parts", format!("{good}.{tail}.{tail}"), Malformed),
        ("a dot more", format!("{good}."), Malformed),
        ("no header", format!(".{body}.{tail}"), Malformed),
        ("no payload", format!("{head}..{tail}"), Malformed),
        ("only dots", "..".into(), Malformed),
        ("one word", "password".into(), Malformed),
        ("Bearer", format!("Bearer {good}"), Malformed),
        ("padding", format!("{}.{body}.{tail}", URL_SAFE.encode(r#"{"alg":"ES256" }"#)), Malformed),
        ("standard base64", format!("{head}.{body}.{}", "+/".repeat(43)), Malformed),
        ("space before", format!(" {good}"), Malformed),
        ("line end after", format!("{good}\n"), Malformed),
        ("NUL after", format!("{good}\0"), Malformed),
        ("space inside", format!("{head} .{body}.{tail}"), Malformed),
        ("oversized", format!("{head}.{body}{}.{tail}", "A".repeat(MAX_TOKEN_BYTES)), Malformed),
        ("duplicate header member", text(doubled_header, &plain), Malformed),
        ("duplicate claim", text(&plain_header, &twice), Malformed),
        (
            "duplicate claim, escaped",
            text(&plain_header, &plain.replacen('{', r#"{"\u0073ub":"root","#, 1)),
            Malformed,
        ),
        (
            "duplicate nested member",
            text(&plain_header, &plain.replacen('{', r#"{"app":{"a":1,"a":2},"#, 1)),
            Malformed,
        ),
        ("payload a list", text(&plain_header, "[]"), Malformed),
        ("payload a string", text(&plain_header, "\"x\""), Malformed),
        ("payload a token", text(&plain_header, &good), Malformed),
        ("payload with bytes after", text(&plain_header, &format!("{plain}x")), Malformed),
        ("payload with a comment", text(&plain_header, &format!("/**/{plain}")), Malformed),
        ("payload too deep", text(&plain_header, &deep), Malformed),
        (
            "exp NaN",
            text(&plain_header, &plain.replace(&(NOW + 600).to_string(), "NaN")),
            Malformed,
        ),
        (
            "exp infinite",
            text(&plain_header, &plain.replace(&(NOW + 600).to_string(), "1e999")),
            Malformed,
        ),
        ("header a list", text("[]", &plain), Malformed),
        ("header not JSON", text("alg=ES256", &plain), Malformed),
    ];
    for (what, token, reason) in cases {
        let rejected = verify(token).expect_err(what);
        assert_eq!(told(rejected), (reason, false), "{what}");
    }
    let latin = [b"\xff\xfe".as_slice(), good.as_bytes()].concat();
    assert_eq!(verify(latin).unwrap_err().error, Malformed);
    let not_utf8 = format!("{}.{body}.{tail}", b64(b"{\"alg\":\"ES256\",\"kid\":\"\xff\"}"));
    assert_eq!(verify(not_utf8).unwrap_err().error, Malformed);
}
