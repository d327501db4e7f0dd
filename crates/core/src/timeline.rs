//! Timelines: which history a server writes. Each promotion begins one with a higher number, so of
//! two servers of a cluster that both take writes, the one with the higher number was promoted later
//! (PostgreSQL's documentation, "Timelines").

use std::fmt;

/// The number of a timeline; the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a server is among those of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It takes writes, on that timeline.
    Primary(Timeline),
    /// It replays those of another.
    Standby,
}

impl Standing {
    /// An expression of SQL whose value, a text, says which: in any session, whatever its
    /// search_path. (A WAL file's name begins with its timeline, in hexadecimal digits; a server that
    /// was just promoted writes on the new one before `pg_control_checkpoint` tells of it.)
    pub const SQL: &'static str = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' \
         ELSE pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END";

    /// Reads that value.
    pub fn parse(text: &str) -> Option<Standing> {
        if text == "standby" {
            return Some(Standing::Standby);
        }
        let digits = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u32::from_str_radix(text, 16).ok().filter(|number| digits && *number > 0);
        number.map(|number| Standing::Primary(Timeline(number)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_is_read_from_what_a_server_says() {
        assert_eq!(Standing::parse("standby"), Some(Standing::Standby));
        assert_eq!(Standing::parse("0000000B"), Some(Standing::Primary(Timeline(11))));
        for wrong in ["", "00000000", "B", "+000000B", "0000000B0", "0000000G"] {
            assert_eq!(Standing::parse(wrong), None, "{wrong}");
        }
    }
}
