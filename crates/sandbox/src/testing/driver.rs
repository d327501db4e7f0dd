//! Clients that are programs of their own: how they find the proxy, and what proves that they
//! ran to their end.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use super::proxy::Proxy;
use super::world::world;
use super::{mint, programs};

/// How a client reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Verified TLS.
    Tls,
    /// The Unix socket.
    Socket,
}

/// No client takes this long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(240);

/// A file beside the tests of drivers.
pub fn script(name: &str) -> PathBuf {
    programs::root().join(name)
}

/// The Python that has clients, with one of their scripts.
pub fn python(name: &str) -> Command {
    let Ok(python) = std::env::var("PGSILO_PYTHON") else {
        panic!("PGSILO_PYTHON is not set: `make clients`, then `. .tools/env`");
    };
    let mut command = Command::new(python);
    command.arg("-B").arg(script("tests/e2e/drivers").join(name));
    command
}

/// The variables that a client's script reads, with a token for acme.
pub fn told(command: &mut Command, proxy: &Proxy, transport: Transport) {
    command.env("PGSILO_TOKEN", mint::token("acme"));
    command.env("PG_SUPERUSER_DSN", world().var("PG_SUPERUSER_DSN"));
    match transport {
        Transport::Tls => command
            .env("PGSILO_HOST", proxy.address().ip().to_string())
            .env("PGSILO_PORT", proxy.address().port().to_string())
            .env("PGSILO_CA", proxy.dir().join("ca.crt")),
        Transport::Socket => command
            .env("PGSILO_HOST", proxy.dir())
            .env("PGSILO_PORT", "6432")
            .env_remove("PGSILO_CA"),
    };
}

/// Runs a program to its end.
pub async fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let name = format!("{:?}", command.as_std().get_program());
    let child = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
    match tokio::time::timeout(PATIENCE, child.wait_with_output()).await {
        Ok(output) => output.expect("waited"),
        Err(_late) => panic!("{name} does not end"),
    }
}

/// Runs a script of checks: all of them have to pass, and the last line has to say so.
pub async fn passes(command: &mut Command) {
    let output = output(command).await;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    let complete = matches!(
        last.split(' ').collect::<Vec<_>>()[..],
        [passed, "of", all, "passed"] if passed == all && all != "0"
    );
    assert!(
        output.status.success() && complete,
        "{:?}: {}\n{said}\n{errors}",
        command.as_std().get_args(),
        output.status
    );
    println!("{said}");
}

/// Waits until the proxy has seen every session to its end; how each ended.
pub async fn all_ended(proxy: &Proxy) -> Vec<Value> {
    super::eventually("all sessions to have ended", async || {
        let (started, ended) = (proxy.events("started").len(), proxy.events("ended").len());
        (started > 0 && started == ended).then_some(())
    })
    .await;
    proxy.events("ended")
}

/// Whether the proxy saw every session to its end, none of them by force, once that is true.
pub async fn all_left(proxy: &Proxy) {
    for event in all_ended(proxy).await {
        assert_eq!(event["ending"], "client_left", "{event}");
    }
}
