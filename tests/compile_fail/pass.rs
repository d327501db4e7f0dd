//! What may be done: so the cases beside this one fail for their own reasons.

use std::time::SystemTime;

use pgsilo::session::{Accepted, Attached, Routed};
use pgsilo::tenant::TenantId;
use pgsilo::token::{Token, TokenError, Verifier};
use pgsilo::wire::startup::{MAX_BODY, Opening};
use pgsilo::{Ending, Reason, Secret};

fn named(_: Option<(Accepted<'_>, Routed<'_>, Attached<'_>)>) {}

fn main() {
    named(None);
    assert!(TenantId::parse("acme").is_ok() && TenantId::parse("../acme").is_err());
    let nobody = Verifier::new(Vec::new()).expect("nobody is believed");
    let rejected = nobody.verify(&Token::new(b"a.b.c".to_vec()), SystemTime::now());
    assert_eq!(rejected.expect_err("nobody signed it").error, TokenError::Malformed);
    assert!(Opening::parse(&vec![0; MAX_BODY + 1].into()).is_err());
    assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(..)");
    assert!(!Reason::ALL.is_empty() && !Ending::ALL.is_empty());
}
