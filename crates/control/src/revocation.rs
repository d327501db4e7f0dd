//! How a leased role ends: first it loses its logins, which nothing can prevent; then it is dropped,
//! if nothing depends on it. The same statements for OpenBAO, which runs them when a lease ends, and
//! for the audit, which runs them as the broker that made the role.
//!
//! Invariant: what must hold is committed before anything is tried that can fail. OpenBAO runs all
//! statements of a revocation in one transaction, so the second one ends it: a DROP ROLE that
//! fails, as any grant of another tenant makes it, would take NOLOGIN back with it. And a role that
//! is dropped in the transaction that says NOLOGIN leaves the sessions that log in at that moment.

use anyhow::{Context, Result, ensure};
use tokio_postgres::Client;

/// The role cannot log in from its COMMIT on.
const STOP: &str = include_str!("../../../docker/openbao/stop.sql");
/// Drops the role; commits by itself, so it is no part of a transaction and of no other message.
const DROP: &str = include_str!("../../../docker/openbao/drop.sql");

/// `revocation_statements`, for each role that `{{name}}` may stand for. The last one is for
/// OpenBAO, which commits when it is done.
pub(crate) const STATEMENTS: [&str; 4] = [STOP, "COMMIT", DROP, "BEGIN"];

/// Drops a login of pgsilo's own.
const LOGOUT: &str = include_str!("../../../docker/openbao/logout.sql");

/// The same for logins of pgsilo's own, which no tenant has ever had.
pub(crate) const OF_LOGINS: [&str; 4] = [STOP, "COMMIT", LOGOUT, "BEGIN"];

/// Ends the use of a role by its own broker, which the client is: nobody logs in as it afterwards,
/// nobody is logged in as it, and if nothing objects, it is gone.
///
/// # Errors
/// When it is not a name that OpenBAO makes, or the role could not even be stopped.
pub(crate) async fn run(broker: &Client, role: &str) -> Result<()> {
    // It goes into statements as it stands.
    ensure!(
        role.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
        "{role:?} is not a name that OpenBAO makes"
    );
    for (statement, what) in [(STOP, "stopping the role"), (DROP, "dropping the role")] {
        broker.batch_execute(&statement.replace("{{name}}", role)).await.context(what)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn login_is_forbidden_and_committed_before_anything_is_dropped() {
        assert!(STATEMENTS[0].contains("NOLOGIN PASSWORD NULL"));
        assert!(!STATEMENTS[0].contains("DROP"));
        assert_eq!(STATEMENTS[1], "COMMIT");
        assert!(STATEMENTS[2].contains("DROP ROLE"));
        // OpenBAO cuts a statement at each semicolon, unless it finds this word in it.
        for statement in [STATEMENTS[0], STATEMENTS[2]] {
            assert!(statement.contains("END $$"));
            assert_eq!(statement.matches("{{").count(), statement.matches("{{name}}").count());
        }
    }
}
