//! Connection pools, unchanged and set up as docs/pools.md says, live on when pgsilo ends their
//! sessions. Each is a script in drivers/ that says itself what it checks; `make test-all` adds
//! those of other languages.

use pgsilo_sandbox::testing::driver::{Transport, python};
use pgsilo_sandbox::testing::pool::{EndedBy, lives_on};

/// All at once: they wait most of the time.
async fn in_every_way(name: &str) {
    let run = |transport, by| lives_on(name, python(&format!("pool_of_{name}.py")), transport, by);
    tokio::join!(
        run(Transport::Tls, EndedBy::Lease),
        run(Transport::Socket, EndedBy::Token),
        run(Transport::Tls, EndedBy::Pool(2)),
        run(Transport::Socket, EndedBy::Age(36)),
    );
}

#[tokio::test]
async fn sqlalchemys_pool_lives_on_when_its_sessions_end() {
    in_every_way("sqlalchemy").await;
}

#[tokio::test]
async fn psycopgs_pool_lives_on_when_its_sessions_end() {
    in_every_way("psycopg").await;
}
