//! Makes a connection that a session has left as good as new, or finds that it is not.
//!
//! `DISCARD ALL` and `RESET ROLE` must both succeed. Then what the greeting told is asked for
//! again, and the seal: if either is not what a new session would find, the connection is closed.
//! Every row of the answer must begin with a random number that was made for the question
//! (`seal.rs`), so that what a session left behind cannot answer in the database's place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use pgsilo_wire::message;
use tokio::time::timeout;

use super::seal::{is_sealed_for, seal_query};
use super::{Attachment, BackendError, Connection, History, Route};

/// How long a reset may take before the connection is closed instead: it was idle.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);

impl Attachment {
    /// Resets a connection that a session has left, between two messages and outside a transaction.
    /// What the next session will be told in its greeting must still be true, or the connection is
    /// not as a new one would be; and its role may still connect and be what it is.
    ///
    /// `DISCARD ALL` ends cursors, prepared statements, settings, LISTEN, advisory locks, plans,
    /// temporary tables, sequences' state; docs/operations.md says what it does not reach. It may
    /// not stand in one query with others, and of the role that a login begins with, where one is
    /// set for the user, not every fork keeps: so that is set again.
    ///
    /// # Errors
    /// It is lost, the database refused, or something is not as it was: it may not be used again.
    pub(crate) async fn reset(self, route: &Arc<Route>) -> Result<Attachment, BackendError> {
        let Attachment { stream, process, greeting, history, reign } = self;
        let told = told(&greeting)
            .ok_or(BackendError::Protocol("a setting that cannot be asked for by its name"))?;
        let mut connection = Connection::new(stream, route, process.redial.clone());
        connection.version = history.version;
        let names: Vec<&str> = told.keys().copied().collect();
        let question = |nonce: &str| {
            format!(
                "RESET ROLE; SELECT '{nonce}' OPERATOR(pg_catalog.||) name \
                 OPERATOR(pg_catalog.||) '=' OPERATOR(pg_catalog.||) pg_catalog.current_setting(name) \
                 FROM pg_catalog.unnest('{{{}}}'::pg_catalog.text[]) AS name \
                 WHERE pg_catalog.pg_has_role(session_user, current_user, 'MEMBER') \
                 AND pg_catalog.has_database_privilege(session_user, \
                 pg_catalog.current_database(), 'CONNECT'); {}",
                names.join(","),
                seal_query(nonce)
            )
        };
        // What a reset reports of settings goes back to what was reported at first.
        let reset = connection.ask(&["DISCARD ALL"], question, |_setting| {});
        let asked = BootTime::now();
        let answer = match timeout(RESET_TIMEOUT, reset).await {
            Ok(answer) => answer?,
            Err(_elapsed) => return Err(BackendError::Protocol("a reset that takes too long")),
        };
        let is_true = |row: &Vec<u8>| {
            let mut parts = row.splitn(2, |byte| *byte == b'=');
            let name = parts.next().and_then(|name| std::str::from_utf8(name).ok());
            name.is_some_and(|name| told.get(name).copied() == parts.next())
        };
        let changed = BackendError::Protocol("settings that a reset does not bring back");
        let Some((now, seals)) = answer.split_at_checked(told.len()) else { return Err(changed) };
        if !now.iter().all(is_true) {
            return Err(changed);
        }
        is_sealed_for(route.tenant(), seals)?;
        let history = History { sealed: asked, sessions: history.sessions + 1, ..history };
        Ok(Attachment { stream: connection.into_stream()?, process, greeting, history, reign })
    }
}

/// Each setting that a greeting tells of, and its value; `None` if a name is not one of
/// PostgreSQL's, or there is none.
pub(super) fn told(greeting: &[u8]) -> Option<BTreeMap<&str, &[u8]>> {
    let mut told = BTreeMap::new();
    for (tag, body) in message::split(greeting) {
        if tag != b'S' {
            continue;
        }
        let mut parts = body.split(|byte| *byte == 0);
        let (name, value) = (std::str::from_utf8(parts.next()?).ok()?, parts.next()?);
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        told.insert(name, value);
    }
    (!told.is_empty()).then_some(told)
}

#[cfg(test)]
mod tests {
    use super::told;
    use pgsilo_wire::message;

    fn greeting(settings: &[(&str, &str)]) -> Vec<u8> {
        let mut greeting = Vec::new();
        for (name, value) in settings {
            message::raw(&mut greeting, b'S', format!("{name}\0{value}\0").as_bytes());
        }
        greeting
    }

    #[test]
    fn the_last_value_of_a_repeated_setting_counts() {
        let greeting =
            greeting(&[("TimeZone", "UTC"), ("DateStyle", "ISO"), ("TimeZone", "Asia/Tokyo")]);
        let told = told(&greeting).expect("names");
        assert_eq!(told.len(), 2);
        assert_eq!(told["TimeZone"], b"Asia/Tokyo");
    }

    #[test]
    fn a_setting_whose_name_needs_quoting_is_not_queried() {
        for name in ["a'b", "a\\b", "a,b", "{a}", "a b", "\u{e9}", ""] {
            assert_eq!(told(&greeting(&[(name, "x")])), None, "{name:?}");
        }
    }
}
