//! The words that every part shares: which tenant, and how much access.
//!
//! A [`TenantId`] is opaque and strict: a value is known to be safe in a
//! log line, an SQL identifier and a URL path segment. It is parsed once, at the edge,
//! and never validated again.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A tenant's name: `[a-z0-9][a-z0-9_-]{0,48}`. Cheap to clone. Only [`TenantId::parse`] makes one.
///
/// ```compile_fail,E0423
/// pgsilo_core::tenant::TenantId("acme".into());
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(Arc<str>);

/// Why a text is not a [`TenantId`]. Holds no part of the text: it may come from a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a tenant id is 1 to 49 of a-z 0-9 _ - and starts with a letter or a digit")]
pub struct TenantIdError;

impl TenantId {
    /// The longest id: names that are made of it are whole in PostgreSQL, which cuts longer ones
    /// ([`Names`](crate::names::Names)).
    pub const MAX_LENGTH: usize = 49;

    /// Takes exactly the texts of the grammar above; never trims or folds case.
    pub fn parse(text: &str) -> Result<TenantId, TenantIdError> {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let (first, rest) = text.as_bytes().split_first().ok_or(TenantIdError)?;
        let accepted = text.len() <= TenantId::MAX_LENGTH
            && alphanumeric(*first)
            && rest.iter().all(|b| alphanumeric(*b) || matches!(b, b'_' | b'-'));
        if accepted { Ok(TenantId(Arc::from(text))) } else { Err(TenantIdError) }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantId {
    type Err = TenantIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        TenantId::parse(text)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TenantId({})", self.0)
    }
}

impl Serialize for TenantId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for TenantId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl de::Visitor<'_> for Text {
            type Value = TenantId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a tenant id")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<TenantId, E> {
                TenantId::parse(text).map_err(|error| E::custom(format!("{text:?}: {error}")))
            }
        }

        deserializer.deserialize_str(Text)
    }
}

/// Tenants that are meant together: one, or all whose ids begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TenantPattern {
    /// This one.
    Exactly(TenantId),
    /// All that begin so; with nothing in it, every tenant.
    Prefix(String),
}

/// A text that is no [`TenantPattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither a tenant's id nor the beginning of one with a \"*\" behind it")]
pub struct TenantPatternError;

impl TenantPattern {
    /// Takes an id, or what ids begin with and a `*`: `acme`, `eu-*`, `*`.
    pub fn parse(text: &str) -> Result<TenantPattern, TenantPatternError> {
        let id = |text| TenantId::parse(text).map_err(|_| TenantPatternError);
        match text.strip_suffix('*') {
            None => id(text).map(TenantPattern::Exactly),
            Some("") => Ok(TenantPattern::Prefix(String::new())),
            Some(prefix) => {
                id(prefix).map(|prefix| TenantPattern::Prefix(prefix.0.as_ref().into()))
            }
        }
    }

    /// Whether this tenant is among them.
    pub fn matches(&self, id: &TenantId) -> bool {
        match self {
            TenantPattern::Exactly(one) => one == id,
            TenantPattern::Prefix(prefix) => id.as_str().starts_with(prefix.as_str()),
        }
    }
}

/// How much a session may do; chosen by verified claims or a grant, never by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Access {
    /// Reads the tenant's data.
    ReadOnly,
    /// Reads and writes the tenant's data.
    ReadWrite,
    /// Changes the tenant's schema too.
    Migrate,
}

/// A text that names no [`Access`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an access level is \"read-write\", \"read-only\" or \"migrate\"")]
pub struct AccessError;

impl Access {
    /// Every level, least first.
    pub const ALL: [Access; 3] = [Access::ReadOnly, Access::ReadWrite, Access::Migrate];

    /// As written in tokens and configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Access::ReadOnly => "read-only",
            Access::ReadWrite => "read-write",
            Access::Migrate => "migrate",
        }
    }
}

impl FromStr for Access {
    type Err = AccessError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Access::ALL.into_iter().find(|access| access.as_str() == text).ok_or(AccessError)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_strict() {
        let longest = "a".repeat(49);
        for good in ["a", "0", "acme", "acme-1", "a_b", "9-", longest.as_str()] {
            assert_eq!(TenantId::parse(good).unwrap().as_str(), good);
        }
        let too_long = "a".repeat(50);
        let bad = [
            "",
            "-a",
            "_a",
            "Acme",
            "a b",
            " a",
            "a ",
            "a.b",
            "a/b",
            "..",
            "a\0",
            "a\n",
            "ä",
            "аcme",
            "a'b",
            "a\"b",
            "a%2f",
            "ａ",
            too_long.as_str(),
        ];
        for bad in bad {
            assert_eq!(TenantId::parse(bad), Err(TenantIdError), "{bad:?}");
        }
    }

    #[test]
    fn patterns_are_ids_or_their_beginnings() {
        let matches = |pattern: &str, id: &str| {
            TenantPattern::parse(pattern).map(|it| it.matches(&TenantId::parse(id).unwrap()))
        };
        for (pattern, id, expected) in [
            ("acme", "acme", true),
            ("acme", "acme-2", false),
            ("eu-*", "eu-1", true),
            ("eu-*", "eu", false),
            ("eu-*", "us-eu-1", false),
            ("*", "acme", true),
        ] {
            assert_eq!(matches(pattern, id), Ok(expected), "{pattern} {id}");
        }
        for bad in ["", "**", "a*b", "*a", "-*", "Eu-*", "eu-* ", "eu.*"] {
            assert_eq!(TenantPattern::parse(bad), Err(TenantPatternError), "{bad:?}");
        }
    }

    #[test]
    fn deserializing_goes_through_parse() {
        assert_eq!(serde_json::from_str::<TenantId>("\"acme\"").unwrap().as_str(), "acme");
        assert!(serde_json::from_str::<TenantId>("\"Acme\"").is_err());
        assert!(serde_json::from_str::<TenantId>("1").is_err());
    }

    #[test]
    fn access_reads_what_it_writes() {
        for access in Access::ALL {
            assert_eq!(access.to_string().parse(), Ok(access));
        }
        assert_eq!("Read-Only".parse::<Access>(), Err(AccessError));
        assert_eq!("".parse::<Access>(), Err(AccessError));
    }
}
