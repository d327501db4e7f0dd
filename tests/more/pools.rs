//! The pools of other languages; see tests/e2e/pools.rs.

use tokio::process::Command;

use crate::support::driver::{Transport, script};
use crate::support::pool::{EndedBy, lives_on};
use crate::{java, var};

fn node() -> Command {
    let mut command = Command::new("node");
    command.env("NODE_PATH", var("NODE_PATH")).arg(script("tests/more/node/pool.js"));
    command
}

#[tokio::test]
async fn node_postgres_pool_lives_on_when_its_sessions_end() {
    tokio::join!(
        lives_on("node", node(), Transport::Tls, EndedBy::Lease),
        lives_on("node", node(), Transport::Socket, EndedBy::Token),
        lives_on("node", node(), Transport::Tls, EndedBy::Pool(2)),
    );
}

#[tokio::test]
async fn hikaricp_lives_on_when_its_sessions_end() {
    let hikaricp = || java("Pool.java");
    tokio::join!(
        lives_on("hikaricp", hikaricp(), Transport::Tls, EndedBy::Lease),
        lives_on("hikaricp", hikaricp(), Transport::Tls, EndedBy::Token),
        // Less than this it does not take.
        lives_on("hikaricp", hikaricp(), Transport::Tls, EndedBy::Pool(30)),
    );
}

#[tokio::test]
async fn pgxs_pool_lives_on_when_its_sessions_end() {
    let pgx = || Command::new(var("PGSILO_PGX_POOL"));
    tokio::join!(
        lives_on("pgx", pgx(), Transport::Tls, EndedBy::Lease),
        lives_on("pgx", pgx(), Transport::Socket, EndedBy::Token),
        lives_on("pgx", pgx(), Transport::Tls, EndedBy::Pool(2)),
    );
}
