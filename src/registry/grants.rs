//! Who may use a tenant, where its issuer's word alone is not enough (`authorization = "grant"`): the
//! grants of the registry's database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use pgsilo_core::tenant::{Access, AccessError, TenantId, TenantIdError};
use pgsilo_registry::read::GrantRow;

/// The grants in force.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    /// By whose subject.
    current: ArcSwap<HashMap<Whose, Vec<Arc<Grant>>>>,
}

/// An issuer and one of its subjects.
type Whose = (Arc<str>, Arc<str>);

/// One grant.
#[derive(Debug)]
pub(crate) struct Grant {
    id: Arc<str>,
    whose: Whose,
    tenant: TenantId,
    access: Access,
    expires_at: Option<SystemTime>,
    is_break_glass: bool,
}

/// Why a grant of the registry's is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrantError {
    #[error(transparent)]
    Tenant(#[from] TenantIdError),
    #[error(transparent)]
    Access(#[from] AccessError),
}

impl Grant {
    /// Reads one of the registry's.
    ///
    /// # Errors
    /// When it gives nobody anything.
    pub(crate) fn read(row: GrantRow) -> Result<Grant, GrantError> {
        let GrantRow { id, issuer, subject, tenant, access, expires_at, is_break_glass, .. } = row;
        let moment =
            |seconds| UNIX_EPOCH + Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Ok(Grant {
            id: id.into(),
            whose: (issuer.into(), subject.into()),
            tenant: TenantId::parse(&tenant)?,
            access: access.parse()?,
            expires_at: expires_at.map(moment),
            is_break_glass,
        })
    }

    /// As operators know it.
    pub(crate) fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// When it lapses; `None`: when it is withdrawn.
    pub(crate) fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at
    }

    /// It was taken in an emergency.
    pub(crate) fn is_break_glass(&self) -> bool {
        self.is_break_glass
    }

    /// Whose tenant.
    pub(crate) fn tenant(&self) -> &TenantId {
        &self.tenant
    }
}

impl Grants {
    /// Puts these in force, in place of those before.
    pub(crate) fn replace<'g>(&self, grants: impl Iterator<Item = &'g Arc<Grant>>) {
        let mut table: HashMap<Whose, Vec<Arc<Grant>>> = HashMap::new();
        for grant in grants {
            table.entry(grant.whose.clone()).or_default().push(Arc::clone(grant));
        }
        self.current.store(Arc::new(table));
    }

    /// Of the grants that let this subject use the tenant so at this moment, the one that lasts
    /// longest.
    pub(crate) fn of(
        &self,
        (issuer, subject): (&Arc<str>, &Arc<str>),
        tenant: &TenantId,
        access: Access,
        now: SystemTime,
    ) -> Option<Arc<Grant>> {
        let grants = self.current.load();
        let own = grants.get(&(Arc::clone(issuer), Arc::clone(subject)))?.iter();
        let fits = |grant: &&Arc<Grant>| {
            grant.tenant == *tenant
                && access <= grant.access
                && grant.expires_at.is_none_or(|end| now < end)
        };
        // One without an end lasts longest.
        own.filter(fits).max_by_key(|grant| (grant.expires_at.is_none(), grant.expires_at)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, tenant: &str, access: &str, expires_at: Option<f64>) -> GrantRow {
        GrantRow {
            id: id.to_owned(),
            revision: 1,
            issuer: "https://a".to_owned(),
            subject: "ann".to_owned(),
            tenant: tenant.to_owned(),
            access: access.to_owned(),
            expires_at,
            is_break_glass: false,
        }
    }

    #[test]
    fn a_grant_is_for_one_subject_one_tenant_so_much_access_and_so_long() {
        let grants = Grants::default();
        let rows = [
            row("short", "acme", "read-write", Some(1000.0)),
            row("long", "acme", "read-only", Some(5000.0)),
            row("ever", "globex", "migrate", None),
            row("also", "globex", "migrate", Some(9000.0)),
        ];
        let rows = rows.map(|row| Arc::new(Grant::read(row).expect("a grant")));
        grants.replace(rows.iter());
        let id = |text| TenantId::parse(text).expect("an id");
        let found = |issuer: &str, subject: &str, tenant, access, now| {
            let whose = (&Arc::from(issuer), &Arc::from(subject));
            let grant =
                grants.of(whose, &id(tenant), access, UNIX_EPOCH + Duration::from_secs(now));
            grant.map(|grant| grant.id().to_string())
        };
        for (issuer, subject, tenant, access, now, expected) in [
            ("https://a", "ann", "acme", Access::ReadOnly, 10, Some("long")),
            ("https://a", "ann", "acme", Access::ReadWrite, 10, Some("short")),
            ("https://a", "ann", "acme", Access::ReadWrite, 1000, None),
            ("https://a", "ann", "acme", Access::Migrate, 10, None),
            ("https://a", "ann", "acme", Access::ReadOnly, 5000, None),
            ("https://a", "ann", "globex", Access::ReadOnly, 10, Some("ever")),
            ("https://a", "ann", "initech", Access::ReadOnly, 10, None),
            ("https://a", "bob", "acme", Access::ReadOnly, 10, None),
            ("https://b", "ann", "acme", Access::ReadOnly, 10, None),
        ] {
            let case = format!("{issuer} {subject} {tenant} {access} {now}");
            assert_eq!(found(issuer, subject, tenant, access, now).as_deref(), expected, "{case}");
        }
        assert!(Grant::read(row("x", "No", "read-only", None)).is_err());
        assert!(Grant::read(row("x", "acme", "all", None)).is_err());
    }
}
