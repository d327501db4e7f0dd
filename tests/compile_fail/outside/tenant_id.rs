//! A tenant id is parsed: there is no other way to make one of a text.

use pgsilo::tenant::TenantId;

fn main() {
    let _ = TenantId("../acme".into());
}
