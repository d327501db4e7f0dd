//! Leased passwords that can be told apart from any other text: long, and of one alphabet. So a
//! search of a log for passwords needs to know none of them.

use serde_json::{Value, json};

use super::world::World;

/// What the sandbox's roles make passwords by, where it is written.
pub const POLICY_PATH: &str = "sys/policies/password/tests";
const POLICY: &str = "tests";
/// Consonants: no word, no number and nothing in hexadecimal has many in a row.
const ALPHABET: &str = "BCDFGHJKLMNPQRSTVWXZ";
/// Of a password, 138 bits.
const LENGTH: usize = 32;
/// What is taken for one, whole or cut. Random letters and digits have so many consonants in a row
/// once in 10^12 times.
const TELLING: usize = 24;

/// The policy's text.
pub fn policy() -> Value {
    let rule = format!("rule \"charset\" {{ charset = \"{ALPHABET}\" }}");
    json!({ "policy": format!("length = {LENGTH}\n{rule}\n") })
}

/// Whether a leased password stands in a text.
pub fn is_in(text: &str) -> bool {
    text.split(|c| !ALPHABET.contains(c)).any(|run| run.len() >= TELLING)
}

/// Has a sandbox's roles make such passwords.
pub(super) async fn mark(world: &World) {
    let (status, answer) = world.bao("POST", POLICY_PATH, Some(policy())).await;
    assert_eq!(status, 204, "{answer}");
    for tenant in ["acme", "globex"] {
        for kind in ["rw", "ro", "migrate"] {
            let path = format!("pgsilo/{tenant}/roles/tenant-{tenant}-{kind}");
            let (_status, mut role) = world.bao("GET", &path, None).await;
            role["data"]["credential_config"] = json!({ "password_policy": POLICY });
            let (status, answer) = world.bao("POST", &path, Some(role["data"].take())).await;
            assert_eq!(status, 204, "{path}: {answer}");
        }
    }
}

#[test]
fn a_password_in_a_log_is_noticed() {
    let password = ALPHABET.repeat(2)[..LENGTH].to_owned();
    assert!(is_in(&password) && is_in(&format!("{{\"cause\":\"{}\"}}", &password[..TELLING])));
    assert!(!is_in(&password[..TELLING - 1]) && !is_in(&password.to_lowercase()));
    assert!(!is_in("PGSILO-CONNECTIONS BCDFGHJKLMNPQRSTVWX0ZBCDFGHJKLMN"));
}
