//! Claims are of one verified token: they cannot be copied, made up, read or prolonged.

use std::time::SystemTime;

use pgsilo::token::Claims;

fn clone<T: Clone>() {}
fn default<T: Default>() {}
fn deserialize<T: serde::de::DeserializeOwned>() {}

fn prolong(claims: &mut Claims) {
    claims.expires_at = SystemTime::now();
}

fn main() {
    clone::<Claims>();
    default::<Claims>();
    deserialize::<Claims>();
}
