//! More real clients, unchanged: each script says itself what it checks.

use pgsilo_sandbox::testing::driver::{Transport, all_left, passes, script, told};
use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::ways;
use tokio::process::Command;

use crate::{java, var};

async fn node(transport: Transport) {
    let proxy = Proxy::start().await;
    let mut command = Command::new("node");
    command.env("NODE_PATH", var("NODE_PATH")).arg(script("tests/more/node/checks.js"));
    told(&mut command, &proxy, transport);
    passes(&mut command).await;
    all_left(&proxy).await;
}

#[tokio::test]
async fn node_postgres_over_tls() {
    node(Transport::Tls).await;
}

#[tokio::test]
async fn node_postgres_over_the_socket() {
    node(Transport::Socket).await;
}

#[tokio::test]
async fn jdbc_over_tls() {
    let proxy = Proxy::start().await;
    let mut command = java("Checks.java");
    told(&mut command, &proxy, Transport::Tls);
    passes(&mut command).await;
    all_left(&proxy).await;
}

#[tokio::test]
async fn node_postgres_in_every_way_that_needs_no_password() {
    let (proxy, own) = ways::proxy().await;
    let mut command = Command::new("node");
    command.env("NODE_PATH", var("NODE_PATH")).arg(script("tests/more/node/ways.js"));
    ways::told(&mut command, &proxy, &own);
    passes(&mut command).await;
    all_left(&proxy).await;
}

#[tokio::test]
async fn jdbc_in_every_way_that_needs_no_password() {
    let (proxy, own) = ways::proxy().await;
    let mut command = java("Ways.java");
    ways::told(&mut command, &proxy, &own);
    passes(&mut command).await;
    all_left(&proxy).await;
}
