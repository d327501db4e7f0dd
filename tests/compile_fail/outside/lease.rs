//! Leases, credentials and their source cannot be named outside, let alone made.

fn main() {
    let _: pgsilo::lease::Lease;
    let _: pgsilo::lease::Credential;
    let _: pgsilo::lease::Lessor;
}
