//! What things of a tenant are called where both planes, or a person, look for them.

use crate::tenant::TenantId;

/// The setting by which a tenant's database says whose it is: its seal.
pub const SEAL: &str = "pgsilo.tenant";

/// PostgreSQL cuts longer names, without an error that anybody sees.
const MAX_IDENTIFIER: usize = 63;

const _: () = assert!("tenant_".len() + TenantId::MAX_LENGTH + "_broker".len() == MAX_IDENTIFIER);

/// What a tenant's things are called: in OpenBAO by its id, in PostgreSQL by a name that may say nothing
/// of it, because every role of a cluster can read the names of all others' databases and roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    id: TenantId,
    /// Of the same grammar.
    called: TenantId,
}

/// A tenant's roles in PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Owns what the tenant makes; cannot log in.
    App,
    /// May read that; cannot log in.
    ReadOnly,
    /// May connect, nothing else: every leased role is in it.
    Login,
    /// What OpenBAO logs in as, to make and drop leased roles.
    Broker,
}

impl Names {
    /// Of a tenant that PostgreSQL, too, calls by its id.
    pub fn of(id: &TenantId) -> Names {
        Names::called(id, id)
    }

    /// Of a tenant that PostgreSQL calls otherwise.
    pub fn called(id: &TenantId, name: &TenantId) -> Names {
        Names { id: id.clone(), called: name.clone() }
    }

    /// Whose they are.
    pub fn id(&self) -> &TenantId {
        &self.id
    }

    /// What PostgreSQL calls it.
    pub fn in_postgres(&self) -> &TenantId {
        &self.called
    }

    /// Its database.
    pub fn database(&self) -> String {
        format!("tenant_{}", self.called)
    }

    /// One of its roles.
    pub fn role(&self, role: Role) -> String {
        let suffix = match role {
            Role::App => "app",
            Role::ReadOnly => "ro",
            Role::Login => "login",
            Role::Broker => "broker",
        };
        format!("tenant_{}_{suffix}", self.called)
    }

    /// Where OpenBAO's database secrets engine for this tenant is mounted. It shares its workers
    /// between mounts: one tenant's revocations that are stuck do not hold another's up.
    pub fn mount(&self) -> String {
        format!("pgsilo/{}", self.id)
    }

    /// The connection to its database, in that engine.
    pub fn connection(&self) -> String {
        format!("tenant-{}", self.id)
    }

    /// The OpenBAO role to lease from: `rw`, `ro`, `migrate`.
    pub fn lease_role(&self, kind: &str) -> String {
        format!("tenant-{}-{kind}", self.id)
    }

    /// How OpenBAO is to name the roles that it leases.
    pub fn leased(&self) -> LeasedNames {
        let part = |name: &TenantId| format!("tenant-{name}-");
        match self.id == self.called {
            true => LeasedNames { replaced: None },
            false => LeasedNames { replaced: Some((part(&self.id), part(&self.called))) },
        }
    }
}

/// How OpenBAO names the roles that it leases for a tenant: after its own role, of which a part may be
/// replaced, with random characters behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeasedNames {
    /// What of the role's name, and by what.
    replaced: Option<(String, String)>,
}

impl LeasedNames {
    /// How much of the role's name is kept.
    const KEPT: usize = 42;
    /// Random characters behind it.
    const RANDOM: usize = 20;

    const BEGIN: &str = r#"{{ printf "%s-%s" (.RoleName "#;
    const END: &str = "| truncate 42) (random 20) }}";

    /// As OpenBAO's `username_template`.
    pub fn template(&self) -> String {
        let (begin, end) = (LeasedNames::BEGIN, LeasedNames::END);
        match &self.replaced {
            None => format!("{begin}{end}"),
            Some((what, by)) => format!(r#"{begin}| replace "{what}" "{by}" {end}"#),
        }
    }

    /// What a `username_template` says, if it is one of these.
    pub fn parse(template: &str) -> Option<LeasedNames> {
        let middle = template.strip_prefix(LeasedNames::BEGIN)?.strip_suffix(LeasedNames::END)?;
        if middle.is_empty() {
            return Some(LeasedNames { replaced: None });
        }
        let quoted = middle.strip_prefix("| replace ")?.strip_suffix(' ')?;
        let (what, by) = quoted.strip_prefix('"')?.strip_suffix('"')?.split_once("\" \"")?;
        let is_plain = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        };
        let replaced = Some((what.to_owned(), by.to_owned()));
        (is_plain(what) && is_plain(by)).then_some(LeasedNames { replaced })
    }

    /// What the names of one of OpenBAO's roles begin with, up to the `-` in front of what is random.
    pub fn prefix(&self, role: &str) -> String {
        let role = match &self.replaced {
            None => role.to_owned(),
            Some((what, by)) => role.replace(what, by),
        };
        role.chars().take(LeasedNames::KEPT).collect()
    }

    /// Whether OpenBAO made this name, of a role that has this [`prefix`](LeasedNames::prefix): no role of
    /// another name, or of a longer one.
    pub fn made(name: &str, prefix: &str) -> bool {
        let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
        random.is_some_and(|random| {
            random.len() == LeasedNames::RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> TenantId {
        TenantId::parse(text).unwrap()
    }

    #[test]
    fn names_of_the_longest_id_are_not_truncated() {
        let longest = "x".repeat(TenantId::MAX_LENGTH);
        let names = Names::of(&id(&longest));
        let roles = [Role::App, Role::ReadOnly, Role::Login, Role::Broker];
        let all = roles.map(|role| names.role(role));
        for name in all.iter().chain([&names.database()]) {
            assert!(name.len() <= MAX_IDENTIFIER && name.contains(&longest), "{name}");
        }
    }

    #[test]
    fn what_postgresql_shows_may_say_nothing_of_the_tenant() {
        let names = Names::called(&id("acme"), &id("k3x9"));
        assert_eq!(
            (names.mount(), names.lease_role("rw")),
            ("pgsilo/acme".into(), "tenant-acme-rw".into())
        );
        let roles =
            [Role::App, Role::ReadOnly, Role::Login, Role::Broker].map(|role| names.role(role));
        let leased = names.leased().prefix(&names.lease_role("rw"));
        assert_eq!(leased, "tenant-k3x9-rw");
        for name in roles.iter().chain([&names.database(), &leased]) {
            assert!(!name.contains("acme"), "{name}");
        }
    }

    #[test]
    fn a_template_is_read_as_it_is_written() {
        for names in [Names::of(&id("acme")), Names::called(&id("acme"), &id("k3x9"))] {
            let leased = names.leased();
            assert_eq!(LeasedNames::parse(&leased.template()), Some(leased));
        }
        let written = Names::of(&id("acme")).leased().template();
        assert_eq!(written, r#"{{ printf "%s-%s" (.RoleName | truncate 42) (random 20) }}"#);
        assert!(written.contains(&format!(
            "{}) (random {})",
            LeasedNames::KEPT,
            LeasedNames::RANDOM
        )));
        for other in [
            "",
            r#"{{ printf "%s-%s" (.RoleName | truncate 41) (random 20) }}"#,
            r#"{{ printf "%s-%s" (.RoleName | replace "a" "b" | truncate 42) (random 19) }}"#,
            r#"{{ printf "%s-%s" (.RoleName | replace "a" "" | truncate 42) (random 20) }}"#,
            r#"{{ printf "%s-%s" (.RoleName | replace "a" "b" | replace "b" "c" | truncate 42) (random 20) }}"#,
        ] {
            assert_eq!(LeasedNames::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_long_name_is_truncated_as_the_template_does() {
        let leased = Names::of(&id("acme")).leased();
        assert_eq!(leased.prefix("tenant-acme-rw"), "tenant-acme-rw");
        assert_eq!(leased.prefix(&"x".repeat(50)).len(), 42);
    }

    #[test]
    fn only_names_that_openbao_makes_are_leased_roles() {
        assert!(LeasedNames::made("tenant-acme-rw-oLSYR3pp2AYjvZsAi9pO", "tenant-acme-rw"));
        for other in [
            "tenant-acme-rw-oLSYR3pp2AYjvZsAi9p",
            "tenant-acme-rw-x-LSYR3pp2AYjvZsAi9pO",
            "tenant-acme-rwoLSYR3pp2AYjvZsAi9pO1",
            "tenant-acme-ro-oLSYR3pp2AYjvZsAi9pO",
            "tenant-acme-rw-oLSYR3pp2AYjvZsAi9p\"",
            "tenant-acme-rw",
        ] {
            assert!(!LeasedNames::made(other, "tenant-acme-rw"), "{other}");
        }
    }
}
