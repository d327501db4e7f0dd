//! A tenant id is parsed, and parsing may fail: it is no conversion.

use pgsilo::tenant::TenantId;

fn from<A, B: From<A>>() {}

fn main() {
    from::<String, TenantId>();
    from::<&'static str, TenantId>();
}
