//! A tenant keeps its leases from being revoked: what its leased roles have made is locked by
//! another session of its own, so that each revocation waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::{Client, Error};

use super::arena::Arena;
use super::{Attack, Held};

const SESSIONS: usize = 60;

pub(super) const ATTACK: Attack = Attack {
    name: "stuck revocations",
    what: "60 sessions of a tenant leave tables of their leased roles' own, which another session of the \
           tenant locks; it locks them again as soon as it is ended",
    begin: |arena| {
        Box::pin(async move {
            let mut tasks = JoinSet::new();
            let mut sessions = Vec::new();
            let prepare = "CREATE SCHEMA IF NOT EXISTS stuck; GRANT ALL ON SCHEMA stuck TO PUBLIC";
            if let Ok(client) = arena.log_in("acme").await {
                let _made = client.batch_execute(prepare).await;
            }
            for number in 0..SESSIONS {
                if let Ok(client) = leave(&arena, number).await {
                    sessions.push(client);
                }
            }
            tasks.spawn(async move {
                let mut sessions = Some(sessions);
                loop {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    let Ok(locker) = arena.log_in("acme").await else { continue };
                    lock(&locker).await;
                    // Only now are their leases given back.
                    drop(sessions.take());
                    while !locker.is_closed() {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            });
            Held::by(tasks)
        })
    },
};

/// A session whose leased role has a table of its own.
async fn leave(arena: &Arc<Arena>, number: usize) -> Result<Client, Error> {
    let client = arena.log_in("acme").await?;
    let table = format!("stuck.t{number}");
    let sql = format!(
        "SET ROLE NONE; DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (n int); GRANT ALL ON {table} TO PUBLIC"
    );
    client.batch_execute(&sql).await?;
    Ok(client)
}

/// Locks what is left of them, each on its own: some are gone, and some are being dropped.
async fn lock(client: &Client) {
    let _begun = client.batch_execute("BEGIN; SET LOCAL lock_timeout = '100ms'").await;
    for number in 0..SESSIONS {
        let lock = format!("SAVEPOINT s; LOCK TABLE stuck.t{number} IN ACCESS SHARE MODE");
        if client.batch_execute(&lock).await.is_err() {
            let _back = client.batch_execute("ROLLBACK TO SAVEPOINT s").await;
        }
    }
}
