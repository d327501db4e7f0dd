//! pgsiloctl
fn main() {}
