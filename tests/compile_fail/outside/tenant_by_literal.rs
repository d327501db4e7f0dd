//! Tenants come from a registry that checked them.

use pgsilo::registry::{LeaseRoles, Snapshot, Tenant};

fn any<T>() -> T {
    panic!()
}

fn main() {
    let _ = Tenant { ..any() };
    let _ = LeaseRoles { ..any() };
    let _ = Snapshot { ..any() };
}
