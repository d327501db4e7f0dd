//! Whose a database is, asked of the database; and how pgsilo itself asks anything there.
//!
//! The seal (`ALTER DATABASE ... SET pgsilo.tenant = 'ID'`) is a setting of the database that its
//! tenant cannot change. It is read from the catalog of a connection that is logged in, with
//! qualified names and under settings of its own: a SHOW would tell what the client's own `options`
//! say.

use std::collections::HashMap;

use aws_lc_rs::rand;
use pgsilo_core::names::SEAL;
use pgsilo_core::registry::Tenant;
use pgsilo_core::timeline::{Standing, Timeline};
use pgsilo_wire::message::{self, ErrorFields};

use super::Connection;
use super::error::BackendError;
use super::version::ServerVersion;
use crate::clusters::{Reign, Wanted};

/// How often a question is asked that the session's own time-outs cancel.
const ATTEMPTS: usize = 8;

/// Asks for the seal, from the catalog: a SHOW would tell what the client's own `options` say. The
/// client's search_path is in force, so every name is qualified; and its encoding, so that no other
/// setting is read, which might not be sayable in it.
pub(super) fn seal_query(nonce: &str) -> String {
    // Behind the name and its `=`; SQL counts from 1.
    let value = SEAL.len() + 2;
    format!(
        "SELECT '{nonce}' OPERATOR(pg_catalog.||) pg_catalog.substr(setting, {value}) \
         FROM pg_catalog.unnest((SELECT setconfig FROM pg_catalog.pg_db_role_setting \
         WHERE setrole OPERATOR(pg_catalog.=) '0'::pg_catalog.oid \
         AND setdatabase OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database \
         WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()))) AS setting \
         WHERE pg_catalog.starts_with(setting, '{SEAL}=')"
    )
}

/// Asks for the seal and, in a row of its own, for what the server is.
fn standing_query(nonce: &str) -> String {
    format!(
        "{} UNION ALL SELECT '{nonce}standing ' OPERATOR(pg_catalog.||) ({})",
        seal_query(&format!("{nonce}seal ")),
        Standing::SQL,
    )
}

impl Connection {
    /// Reads the seal, which must be the tenant's; and where the server is one of several, that it
    /// takes writes, and on which timeline, or that it is a standby where one may be. Settings that the
    /// database tells of meanwhile become part of the greeting.
    pub(super) async fn check_seal(
        &mut self,
        tenant: &Tenant,
        greeting: &mut Vec<u8>,
    ) -> Result<Option<Reign>, BackendError> {
        let mut news = Vec::new();
        let told = |setting: &[u8]| message::raw(&mut news, b'S', setting);
        let Some(cluster) = self.cluster.clone() else {
            let seals = self.ask(&[], seal_query, told).await.map_err(ended_by_setting)?;
            is_sealed_for(tenant, &seals)?;
            if !news.is_empty() {
                *greeting = told_anew(greeting, &news);
            }
            return Ok(None);
        };
        let rows = self.ask(&[], standing_query, told).await.map_err(ended_by_setting)?;
        let of = |kind: &'static [u8]| {
            rows.iter().filter_map(move |row| row.strip_prefix(kind).map(<[u8]>::to_vec))
        };
        is_sealed_for(tenant, &of(b"seal ").collect::<Vec<_>>())?;
        let standings: Vec<_> = of(b"standing ").collect();
        let standing = match &standings[..] {
            [said] => std::str::from_utf8(said).ok().and_then(Standing::parse),
            _ => None,
        };
        let standing = standing.ok_or(BackendError::Protocol("no word of what the server is"))?;
        let reign = match cluster.saw(self.redial.host(), standing) {
            Ok(Some(reign)) => reign,
            Ok(None) if self.route.wants() == Wanted::Standby => {
                let on = self.replayed_timeline().await?;
                let reign = cluster.standby(self.redial.host(), on);
                reign.ok_or(BackendError::Behind { on })?
            }
            Ok(None) => return Err(BackendError::Standby),
            Err(overtaken) => return Err(BackendError::Overtaken(overtaken.newest)),
        };
        if !news.is_empty() {
            *greeting = told_anew(greeting, &news);
        }
        Ok(Some(reign))
    }

    /// Which timeline a standby was on at its last restartpoint: a moment after its primary at the
    /// earliest, and never of a timeline that it does not follow.
    async fn replayed_timeline(&mut self) -> Result<Timeline, BackendError> {
        let question = |nonce: &str| {
            format!(
                "SELECT '{nonce}' OPERATOR(pg_catalog.||) timeline_id::pg_catalog.text \
                 FROM pg_catalog.pg_control_checkpoint()"
            )
        };
        let rows = self.ask(&[], question, |_| {}).await.map_err(ended_by_setting)?;
        let number = match &rows[..] {
            [said] => std::str::from_utf8(said).ok().and_then(|said| said.parse().ok()),
            _ => None,
        };
        number.map(Timeline).ok_or(BackendError::Protocol("no word of its timeline"))
    }

    /// Runs statements and a question behind them, each on its own but all sent at once; the rows
    /// of the last answer, each one text. `told` is given the settings that are told between, as
    /// bodies of ParameterStatus; notices about our own queries are dropped.
    ///
    /// The question is asked in a transaction of its own, with settings of its own: those of the
    /// client, its role and its database may let no statement finish, or have it wait for other
    /// transactions. One that is cancelled in spite of that, by a time-out that was in force until
    /// it was set aside, is asked again.
    ///
    /// The query contains an unpredictable value, with which every row of its answer must begin: so
    /// what is read is the answer to this query, and not to an earlier one, nor made up by an
    /// earlier session. Nothing is left unread.
    pub(super) async fn ask(
        &mut self,
        statements: &[&str],
        question: impl Fn(&str) -> String,
        mut told: impl FnMut(&[u8]),
    ) -> Result<Vec<Vec<u8>>, BackendError> {
        let mut answer = self.ask_once(statements, "BEGIN", &question, &mut told).await?;
        for _ in 1..ATTEMPTS {
            if matches!(answer, Answer::Rows(_)) {
                break;
            }
            answer = self.ask_once(&[], "ROLLBACK; BEGIN", &question, &mut told).await?;
        }
        match answer {
            Answer::Rows(rows) => Ok(rows),
            Answer::Cancelled(error) => Err(error.into()),
        }
    }

    async fn ask_once(
        &mut self,
        statements: &[&str],
        begin: &str,
        question: impl Fn(&str) -> String,
        mut told: impl FnMut(&[u8]),
    ) -> Result<Answer, BackendError> {
        let mut nonce = [0; 16];
        rand::fill(&mut nonce).map_err(|_none| BackendError::Protocol("no randomness"))?;
        let nonce = format!("{:032x}", u128::from_ne_bytes(nonce));
        let question = format!("{begin} {}; {}; COMMIT", self.own_settings(), question(&nonce));
        let mut queries = Vec::new();
        for statement in statements.iter().copied().chain([question.as_str()]) {
            message::raw(&mut queries, b'Q', &[statement.as_bytes(), &[0]].concat());
        }
        self.send(&queries).await?;
        let mut rows = Vec::new();
        let mut cancelled = None;
        let mut unanswered = statements.len() + 1;
        while unanswered > 0 || !self.unread.is_empty() {
            let (tag, body) = self.read_message().await?;
            match tag {
                b'S' => told(&body),
                b'N' => {}
                b'D' if unanswered == 1 => {
                    let row = message::parse_single_column(&body)
                        .ok_or(BackendError::Protocol("a row that is not one text"))?;
                    let own = row.strip_prefix(nonce.as_bytes());
                    rows.push(
                        own.ok_or(BackendError::Protocol("an answer to something else"))?
                            .to_owned(),
                    );
                }
                b'E' => {
                    let error = ErrorFields::parse(&body);
                    if unanswered > 1 || error.sqlstate != "57014" {
                        return Err(error.into());
                    }
                    cancelled = Some(error);
                }
                b'T' | b'D' | b'C' if unanswered > 0 => {}
                b'Z' if unanswered > 0 && (body.as_ref() == b"I" || cancelled.is_some()) => {
                    unanswered -= 1;
                }
                _ => return Err(BackendError::Protocol("an unknown message behind a query")),
            }
        }
        Ok(cancelled.map_or(Answer::Rows(rows), Answer::Cancelled))
    }

    /// Of a transaction in which no setting of the session's is in the way. What may end it comes
    /// first.
    fn own_settings(&self) -> String {
        let bounded = self.version.is_some_and(ServerVersion::bounds_transactions);
        let timeout = if bounded { "SET LOCAL transaction_timeout TO 0; " } else { "" };
        format!(
            "ISOLATION LEVEL READ COMMITTED, READ ONLY, NOT DEFERRABLE; {timeout}\
             SET LOCAL statement_timeout TO 0; SET LOCAL lock_timeout TO 0"
        )
    }
}

/// What became of a question.
enum Answer {
    Rows(Vec<Vec<u8>>),
    /// A time-out came before it could be set aside.
    Cancelled(ErrorFields),
}

/// A time-out of the session's own settings has cancelled the question, or ended the connection,
/// before it could be set aside.
fn ended_by_setting(error: BackendError) -> BackendError {
    match error {
        BackendError::Said { sqlstate, text }
            if matches!(sqlstate.as_str(), "25P03" | "25P04" | "57014" | "57P05") =>
        {
            BackendError::Setting { sqlstate, text }
        }
        other => other,
    }
}

/// A greeting with settings that were told behind it: of what is told twice, the last counts. A
/// server may tell of tens of thousands within the bound of a login.
fn told_anew(greeting: &[u8], news: &[u8]) -> Vec<u8> {
    let messages = || message::split(greeting).chain(message::split(news)).enumerate();
    let last: HashMap<_, _> =
        messages().filter_map(|(at, message)| Some((setting_told(&message)?, at))).collect();
    let mut told = Vec::with_capacity(greeting.len());
    for (at, message) in messages() {
        if setting_told(&message).is_none_or(|name| last.get(name) == Some(&at)) {
            message::raw(&mut told, message.0, message.1);
        }
    }
    told
}

/// Which setting a message tells of, if any.
fn setting_told<'m>((tag, body): &(u8, &'m [u8])) -> Option<&'m [u8]> {
    body.split(|byte| *byte == 0).next().filter(|_| *tag == b'S')
}

/// Whether the answer to [`seal_query`] is a tenant's.
pub(super) fn is_sealed_for(tenant: &Tenant, seals: &[Vec<u8>]) -> Result<(), BackendError> {
    match seals {
        [found] if *found == tenant.seal().as_bytes() => Ok(()),
        [found] => {
            let found = String::from_utf8_lossy(found).into_owned();
            Err(BackendError::SealBroken { expected: tenant.seal().to_owned(), found })
        }
        _ => Err(BackendError::Unsealed(tenant.seal().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(messages: &[(u8, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (tag, text) in messages {
            message::raw(&mut bytes, *tag, format!("{text}\0").as_bytes());
        }
        bytes
    }

    #[test]
    fn repeated_settings_replace_each_other_in_the_greeting() {
        let greeting =
            messages(&[(b'N', "welcome"), (b'S', "TimeZone\0UTC"), (b'S', "is_superuser\0off")]);
        let news = messages(&[
            (b'S', "TimeZone\0Asia/Seoul"),
            (b'S', "DateStyle\0ISO"),
            (b'S', "TimeZone\0Asia/Tokyo"),
        ]);
        let told = told_anew(&greeting, &news);
        let expected = messages(&[
            (b'N', "welcome"),
            (b'S', "is_superuser\0off"),
            (b'S', "DateStyle\0ISO"),
            (b'S', "TimeZone\0Asia/Tokyo"),
        ]);
        assert_eq!(told, expected);
        assert_eq!(told_anew(&told, &news), expected);
    }

    /// As many as a login may tell of: each is looked at twice, and not with each other.
    #[test]
    fn a_greeting_of_very_many_settings_is_told_anew() {
        let setting = |number: usize, value: &str| {
            let mut bytes = Vec::new();
            message::raw(&mut bytes, b'S', format!("s{number}\0{value}\0").as_bytes());
            bytes
        };
        let greeting: Vec<u8> = (0..100_000).flat_map(|number| setting(number, "a")).collect();
        let told = told_anew(&greeting, &setting(99_999, "b"));
        assert_eq!(told.len(), greeting.len());
        assert!(told.ends_with(&setting(99_999, "b")));
    }
}
