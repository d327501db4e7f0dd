//! The pools of other languages; see tests/e2e/pools.rs.

use pgsilo_sandbox::testing::driver::{Transport, script};
use pgsilo_sandbox::testing::pool::{EndedBy, lives_on};
use tokio::process::Command;

use crate::{java, var};

/// The pool of an example in docs/pools.md.
fn node(name: &str) -> Command {
    let mut command = Command::new("node");
    command.env("NODE_PATH", var("NODE_PATH"));
    command.arg(script("tests/more/node/pool.js")).arg(name);
    command
}

async fn node_in_every_way(name: &str) {
    let run = |transport, by| async move {
        lives_on(&name.to_lowercase(), node(name), transport, by).await;
    };
    tokio::join!(
        run(Transport::Tls, EndedBy::Lease),
        run(Transport::Socket, EndedBy::Token),
        run(Transport::Tls, EndedBy::Pool(2)),
    );
}

#[tokio::test]
async fn node_postgres_pool_lives_on_when_its_sessions_end() {
    node_in_every_way("node-postgres").await;
}

#[tokio::test]
async fn knexs_pool_lives_on_when_its_sessions_end() {
    node_in_every_way("Knex").await;
}

#[tokio::test]
async fn kyselys_pool_lives_on_when_its_sessions_end() {
    node_in_every_way("Kysely").await;
}

/// Only this: of a session that ends at its BEGIN, Drizzle never gives the connection back.
#[tokio::test]
async fn drizzles_pool_retires_its_connections_in_time() {
    lives_on("drizzle", node("Drizzle"), Transport::Tls, EndedBy::Pool(2)).await;
}

#[tokio::test]
async fn djangos_connections_live_on_when_their_sessions_end() {
    let django = || {
        let mut command = Command::new(var("PGSILO_PYTHON"));
        command.arg("-B").arg(script("tests/more/suites/pool_of_django.py"));
        command.env("PGSILO_SUITES", var("PGSILO_SUITES"));
        command
    };
    tokio::join!(
        lives_on("django", django(), Transport::Tls, EndedBy::Lease),
        lives_on("django", django(), Transport::Socket, EndedBy::Token),
        lives_on("django", django(), Transport::Tls, EndedBy::Pool(2)),
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
