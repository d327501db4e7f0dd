//! What became of a tenant's database, as OpenBAO tells it when it could make no credential there.
//!
//! OpenBAO answers 500 to whatever its database plugin reports: a database that is down, one that
//! is full, a statement with an error. Only the words differ. They are those of OpenBAO 2.7's
//! plugin, and of the client of PostgreSQL in it, which puts the database's own SQLSTATE last; that
//! is believed, and of the database's words nothing is. What is not surely one of these is none of
//! them: it stays what OpenBAO did not say why. Called for each answer of 500.

/// How a database kept OpenBAO from making a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseFault {
    /// OpenBAO gets no connection to it, or lost the one that it had. It will pass.
    Away,
    /// It is starting or stopping.
    NotReady,
    /// It has no connection left for OpenBAO.
    Full(FullScope),
    /// It does not take OpenBAO's login or the role's statements, or OpenBAO is not to use it: an
    /// operator must act.
    Refused,
}

/// What has no connection left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullScope {
    /// The server.
    Server,
    /// One database or one role, or it is not known which.
    Tenant,
}

/// What a plugin's error is wrapped in.
const WRAPPED: &str = "1 error occurred: * ";
/// No connection could be made.
const CONNECTING: &str = "unable to start transaction: failed to connect to `";
/// A connection broke while a statement was under way.
const BROKEN: &str = "failed to execute query: unexpected EOF";
/// Of SQLSTATEs, the classes that do not pass by themselves: what cannot be done, who may not do
/// it, what is not there.
const LASTING: [&str; 10] = ["0A", "0L", "0P", "22", "23", "28", "2B", "3D", "3F", "42"];

/// What an answer of 500 says of the tenant's database, if that is sure. `words` are OpenBAO's, in
/// one line.
pub(crate) fn fault(words: &str) -> Option<DatabaseFault> {
    let cause = words.strip_prefix(WRAPPED)?.trim_end();
    if is_not_to_be_used(cause) {
        return Some(DatabaseFault::Refused);
    }
    let connecting = cause.starts_with(CONNECTING);
    match (sqlstate(cause), connecting) {
        (None, true) => {
            let unreached = [": dial error: ", ": hostname resolving error: "];
            unreached.iter().any(|how| cause.contains(how)).then_some(DatabaseFault::Away)
        }
        (None, false) => (cause == BROKEN).then_some(DatabaseFault::Away),
        (Some("57P03"), true) => Some(DatabaseFault::NotReady),
        (Some("53300"), true) => Some(DatabaseFault::Full(full_scope(cause))),
        // The database does not take connections, as an operator has it.
        (Some("55000"), true) => Some(DatabaseFault::Refused),
        (Some("57P01" | "57P02"), _) => Some(DatabaseFault::Away),
        (Some(code), _) => {
            let lasts = LASTING.iter().any(|class| code.starts_with(class));
            lasts.then_some(DatabaseFault::Refused)
        }
    }
}

/// What OpenBAO finds in its own configuration.
fn is_not_to_be_used(cause: &str) -> bool {
    cause.starts_with("failed to find entry for connection with name: ")
        || (cause.starts_with('"') && cause.ends_with("\" is not an allowed role"))
}

/// The SQLSTATE behind all words.
fn sqlstate(cause: &str) -> Option<&str> {
    let (_, code) = cause.strip_suffix(')')?.rsplit_once(" (SQLSTATE ")?;
    (code.len() == 5 && code.bytes().all(|byte| byte.is_ascii_alphanumeric())).then_some(code)
}

/// PostgreSQL says it in its language; what is not understood is taken for the smaller thing.
fn full_scope(cause: &str) -> FullScope {
    const SERVER: [&str; 2] = [
        "FATAL: sorry, too many clients already",
        "FATAL: remaining connection slots are reserved",
    ];
    match SERVER.iter().any(|words| cause.contains(words)) {
        true => FullScope::Server,
        false => FullScope::Tenant,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As it came from OpenBAO 2.7.2 and PostgreSQL 18.4.
    fn said(cause: &str) -> Option<DatabaseFault> {
        let words = format!("1 error occurred:\n\t* {cause}\n\n");
        fault(&words.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    fn at_login(cause: &str) -> Option<DatabaseFault> {
        said(&format!(
            "unable to start transaction: failed to connect to `user=broker database=tenant_a`: {cause}"
        ))
    }

    #[test]
    fn an_unreachable_or_starting_database_is_temporary() {
        let away = Some(DatabaseFault::Away);
        let server = "127.0.0.1:5432 (127.0.0.1)";
        for cause in [
            format!("{server}: dial error: dial tcp 127.0.0.1:5432: connect: connection refused"),
            "\n\t[::1]:5432 (localhost): dial error: dial tcp [::1]:5432: connect: connection refused\
                 \n\t127.0.0.1:5432 (localhost): dial error: dial tcp 127.0.0.1:5432: i/o timeout"
                .to_owned(),
            "hostname resolving error: lookup db.invalid on 192.0.2.53:53: no such host".to_owned(),
        ] {
            assert_eq!(at_login(&cause), away, "{cause}");
        }
        assert_eq!(said("failed to execute query: unexpected EOF"), away);
        let stopped = "FATAL: terminating connection due to administrator command (SQLSTATE 57P01)";
        assert_eq!(said(&format!("failed to execute query: {stopped}")), away);
        let starting = "server error: FATAL: the database system is starting up (SQLSTATE 57P03)";
        assert_eq!(at_login(&format!("{server}: {starting}")), Some(DatabaseFault::NotReady));
    }

    #[test]
    fn a_full_server_and_a_full_share_are_told_apart() {
        let full =
            |text: &str| at_login(&format!("h: server error: FATAL: {text} (SQLSTATE 53300)"));
        let [of_server, of_one] =
            [FullScope::Server, FullScope::Tenant].map(|scope| Some(DatabaseFault::Full(scope)));
        assert_eq!(full("sorry, too many clients already"), of_server);
        let reserved =
            "remaining connection slots are reserved for roles with the SUPERUSER attribute";
        assert_eq!(full(reserved), of_server);
        assert_eq!(full("too many connections for role \"broker\""), of_one);
        assert_eq!(full("too many connections for database \"tenant_a\""), of_one);
        assert_eq!(full("tut mir leid, schon zu viele Verbindungen"), of_one);
    }

    #[test]
    fn lasting_database_faults_are_told_apart() {
        let refused = Some(DatabaseFault::Refused);
        for cause in [
            "h: failed SASL auth: FATAL: password authentication failed for user \"broker\" (SQLSTATE 28P01)",
            "h: server error: FATAL: role \"broker\" is not permitted to log in (SQLSTATE 28000)",
            "h: server error: FATAL: permission denied for database \"tenant_a\" (SQLSTATE 42501)",
            "h: server error: FATAL: database \"tenant_a\" does not exist (SQLSTATE 3D000)",
            "h: server error: FATAL: database \"tenant_a\" is not currently accepting connections (SQLSTATE 55000)",
        ] {
            assert_eq!(at_login(cause), refused, "{cause}");
        }
        for cause in [
            "failed to execute query: ERROR: syntax error at or near \"ROL\" (SQLSTATE 42601)",
            "failed to execute query: ERROR: role \"nosuch\" does not exist (SQLSTATE 42704)",
            "failed to find entry for connection with name: \"tenant-a\"",
            "\"tenant-a-rw\" is not an allowed role",
        ] {
            assert_eq!(said(cause), refused, "{cause}");
        }
    }

    #[test]
    fn uncertain_errors_are_not_classified() {
        for cause in [
            "",
            "context deadline exceeded",
            "failed to execute query: ERROR: tuple concurrently updated (SQLSTATE XX000)",
            "failed to execute query: ERROR: canceling statement due to statement timeout (SQLSTATE 57014)",
            "failed to execute query: ERROR: cannot execute CREATE ROLE in a read-only transaction (SQLSTATE 25006)",
            // Raised by a statement, whatever it may say.
            "failed to execute query: ERROR: sorry, too many clients already (SQLSTATE 53300)",
            "failed to execute query: ERROR: the database system is starting up (SQLSTATE 57P03)",
            "failed to execute query: ERROR: is not an allowed role (SQLSTATE 28P01) (SQLSTATE P0001)",
        ] {
            assert_eq!(said(cause), None, "{cause}");
        }
        assert_eq!(at_login("h: tls error: server refused TLS connection"), None);
        assert_eq!(fault("internal error"), None);
        let two =
            "2 errors occurred: * failed to execute query: unexpected EOF * unable to rollback";
        assert_eq!(fault(two), None);
    }
}
