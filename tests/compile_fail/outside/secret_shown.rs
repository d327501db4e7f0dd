//! Secrets and tokens cannot be printed, compared or written out by accident.

use pgsilo::Secret;
use pgsilo::token::Token;

fn serialize<T: serde::Serialize>() {}

fn show(secret: &Secret, token: &Token) {
    let _ = format!("{secret}");
    let _ = format!("{token}");
    let _ = secret.to_string();
    let _ = &secret.0;
    let _ = &token.0;
    let _ = token.expose();
    let _ = secret == secret;
}

fn main() {
    serialize::<Secret>();
    serialize::<Token>();
}
