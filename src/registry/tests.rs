//! What a reload leaves in force, good or bad.

use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::FutureExt;

use super::*;

/// A registry of that text.
pub(crate) fn read(text: &str) -> Snapshot {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = format!("pgsilo-registry-{}-{number}.toml", std::process::id());
    let path = std::env::temp_dir().join(file);
    std::fs::write(&path, text).expect("written");
    let snapshot = Snapshot::read(&path, None).expect("a registry");
    std::fs::remove_file(&path).expect("removed");
    snapshot
}

/// A tenant's entry.
pub(crate) fn entry(id: &str) -> String {
    format!(
        "[[tenant]]\nid = \"{id}\"\n[tenant.placement]\nhost = \"db\"\ntls = {{ mode = \"require\" }}\n\
         dbname = \"tenant_{id}\"\n[tenant.lease]\nroles = {{ read-only = \"{id}-ro\" }}\n"
    )
}

fn id(text: &str) -> TenantId {
    TenantId::parse(text).unwrap()
}

#[test]
fn a_failed_reload_keeps_the_old_snapshot_and_tells_its_age() {
    let file = std::env::temp_dir().join(format!("pgsilo-{}-reload.toml", std::process::id()));
    std::fs::write(&file, entry("acme")).unwrap();
    let (source, registry) = RegistryFile::open(&file).unwrap();
    let before = registry.snapshot();
    assert_eq!(registry.stale_for(), None);

    std::fs::write(&file, "").unwrap();
    source.reload(&registry).unwrap_err();
    let first = registry.stale_for().unwrap();
    source.reload(&registry).unwrap_err();
    assert!(registry.stale_for().unwrap() >= first, "the first failure counts");
    assert!(Arc::ptr_eq(&before, &registry.snapshot()));
    assert!(registry.changed().now_or_never().is_none());

    std::fs::write(&file, entry("acme") + &entry("globex")).unwrap();
    assert_eq!(source.reload(&registry).unwrap(), 2);
    assert_eq!(registry.stale_for(), None);
    assert_eq!(registry.changed().now_or_never().unwrap(), HashSet::from([id("globex")]));
    assert!(registry.changed().now_or_never().is_none(), "they are told once");
    assert!(registry.snapshot().tenant(&id("globex")).is_some());
    assert!(before.tenant(&id("globex")).is_none(), "a snapshot never changes");
    std::fs::remove_file(&file).unwrap();
}
