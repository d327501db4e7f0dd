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
        let token = Secret::new(token.into_bytes());
        let expected = Err(TokenError::KeysUnavailable.into());
        assert_eq!(verifier.identify(&token).await.map(|_| ()), expected);
    }
    let others = Secret::new(claiming(&json!({"iss": "https://evil.example"})).into_bytes());
    assert_eq!(
        told(verifier.verify(&others, now()).unwrap_err()),
        (TokenError::IssuerUnknown, false)
    );
}

#[test]
fn only_tokens_that_name_a_key_of_a_known_issuer_request_a_refresh() {
    let named = |token: String| VERIFIER.named_keyring(&Secret::new(token.into_bytes())).is_some();
    assert!(named(headed(&json!({"kid": "k9"}))));
    assert!(!named(headed(&json!({"kid": null}))));
    assert!(!named(headed(&json!({"kid": "k9", "jku": "https://evil.example"}))));
    assert!(!named(claiming(&json!({"iss": "https://evil.example"}))));
    assert!(!named("a.b.c".to_owned()));
}
