//! A verifier is made of issuers that were checked.

use pgsilo::token::Verifier;

fn any<T>() -> T {
    panic!()
}

fn main() {
    let _ = Verifier { ..any() };
}
