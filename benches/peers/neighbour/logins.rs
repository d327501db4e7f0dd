//! A tenant logs in again and again, as an application does whose pool is broken: as many at once as
//! it may have sessions, each a new one as soon as it is in or refused.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::{Attack, Held};

const SESSIONS: usize = 80;
/// Until the first of all are in.
const BEGUN: Duration = Duration::from_secs(3);
/// What is refused at once is not tried a thousand times a second.
const REST: Duration = Duration::from_millis(2);

pub(super) const ATTACK: Attack = Attack {
    name: "logins",
    what: "80 clients of a tenant log in, ask once and leave, each again at once",
    begin: |arena| {
        Box::pin(async move {
            let mut tasks = JoinSet::new();
            for _ in 0..SESSIONS {
                let arena = Arc::clone(&arena);
                tasks.spawn(async move {
                    loop {
                        if let Ok(client) = arena.log_in("acme").await {
                            let _answer = client.batch_execute("SELECT 1").await;
                        }
                        tokio::time::sleep(REST).await;
                    }
                });
            }
            // Those that it may begin at once have begun.
            tokio::time::sleep(BEGUN).await;
            Held::by(tasks)
        })
    },
};
