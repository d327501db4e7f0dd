//! A tenant takes the cluster's lock table: by advisory locks if it may, else by savepoints within
//! each other, each of which has written something and so holds a lock of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Attack, Held, at_once, in_force};

const SESSIONS: usize = 2;

pub(super) const ATTACK: Attack = Attack {
    name: "lock table",
    what: "2 sessions of a tenant take advisory locks where they may, else nest savepoints that write, \
           until the lock table is full, and hold them; again as soon as they are ended",
    begin: |arena| {
        Box::pin(async move {
            let mut tasks = JoinSet::new();
            let full = Arc::new(Notify::new());
            let taken = Arc::clone(&full);
            at_once(&mut tasks, SESSIONS, move || {
                let (arena, taken) = (Arc::clone(&arena), Arc::clone(&taken));
                async move {
                    let Ok(client) = arena.log_in("acme").await else { return };
                    take(&client, &taken).await;
                }
            });
            in_force(full.notified()).await;
            Held::by(tasks)
        })
    },
};

async fn take(client: &Client, full: &Notify) {
    let advisory = "SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) n";
    let refused = client.batch_execute(advisory).await.err();
    let savepoints = "SAVEPOINT s; INSERT INTO held VALUES (1);".repeat(100);
    let mut said = refused;
    if said.as_ref().is_some_and(|error| error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)) {
        let begin = "CREATE TABLE IF NOT EXISTS held (n int); BEGIN";
        said = client.batch_execute(begin).await.err();
        while said.is_none() {
            said = client.batch_execute(&savepoints).await.err();
        }
    }
    if said.is_some_and(|error| error.code() == Some(&SqlState::OUT_OF_MEMORY)) {
        full.notify_one();
    }
    while !client.is_closed() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
