//! Which version of PostgreSQL answers, and from which on it does what pgsilo relies on.

use std::fmt;

use super::reset::told;

/// A version: 16.6, 18.1. What is not released yet has no second number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServerVersion {
    major: u32,
    minor: u32,
}

/// For each major version the first minor one under which a session begins as the owner's role and
/// has that back behind `DISCARD ALL`. Older ones leave it the leased role, and those that mended
/// CVE-2024-10978 did not set the role at the login at all. Source: the release notes of 17.1 and
/// 17.2.
const FLOORS: [ServerVersion; 6] = [
    version(12, 22),
    version(13, 18),
    version(14, 15),
    version(15, 10),
    version(16, 6),
    version(17, 2),
];

const fn version(major: u32, minor: u32) -> ServerVersion {
    ServerVersion { major, minor }
}

impl ServerVersion {
    /// Of a server that says so in its greeting, in words that begin as PostgreSQL's do.
    pub(super) fn of(greeting: &[u8]) -> Option<ServerVersion> {
        let told = told(greeting)?;
        ServerVersion::parse(std::str::from_utf8(told.get("server_version")?).ok()?)
    }

    /// `16.6`, `16.6 (Debian 16.6-1)`, `18beta1`.
    fn parse(text: &str) -> Option<ServerVersion> {
        let number = |text: &str| {
            let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            text[..digits].parse().ok().map(|number: u32| (number, digits))
        };
        let (major, digits) = number(text)?;
        let rest = text[digits..].strip_prefix('.');
        let minor = rest.and_then(number).map_or(0, |(minor, _digits)| minor);
        Some(ServerVersion { major, minor })
    }

    /// The version of the same major one that is needed, if this one is older.
    pub(super) fn needs(self) -> Option<ServerVersion> {
        FLOORS.into_iter().find(|floor| floor.major == self.major && self < *floor)
    }

    /// Whether there is a `transaction_timeout`.
    pub(super) fn bounds_transactions(self) -> bool {
        self.major >= 17
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::{ServerVersion, version};

    #[test]
    fn versions_are_read_as_servers_write_them() {
        for (text, expected) in [
            ("16.6", version(16, 6)),
            ("15.18 (Debian 15.18-0+deb12u1)", version(15, 18)),
            ("18beta1", version(18, 0)),
            ("19devel", version(19, 0)),
        ] {
            assert_eq!(ServerVersion::parse(text), Some(expected), "{text}");
        }
        for text in ["", "x16", ".4", "99999999999.1"] {
            assert_eq!(ServerVersion::parse(text), None, "{text}");
        }
    }

    #[test]
    fn each_major_version_has_a_floor_of_its_own() {
        for (is, needs) in [
            (version(15, 9), Some(version(15, 10))),
            (version(16, 5), Some(version(16, 6))),
            (version(16, 6), None),
            (version(17, 0), Some(version(17, 2))),
            (version(17, 2), None),
            (version(18, 0), None),
        ] {
            assert_eq!(is.needs(), needs, "{is}");
        }
    }
}
