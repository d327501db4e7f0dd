//! What is verified is a token, and there is one way to do it.

use std::time::SystemTime;

use pgsilo::token::{Issuer, Key, Token, Verifier};

fn any<T>() -> T {
    panic!()
}

fn bytes(verifier: &Verifier) {
    let _ = verifier.verify(b"a.b.c", SystemTime::now());
}

fn past_the_rules(issuer: &Issuer, token: &Token, key: &Key) {
    let _ = issuer.check_signature(token, key, any());
}

fn main() {}
