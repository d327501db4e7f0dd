//! Free TCP ports on loopback.
//!
//! A port that was free a moment ago can be another's now, and a server that lost such a race
//! says so as it dies. Then the next port is tried; a port that was asked for is tried once.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::process::Process;

/// A port that is free at this moment.
pub(super) fn free_port() -> Result<u16> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

/// Starts a server on `wanted` or on a free port. `attempt` gives the process that it started
/// and what came of waiting for it.
pub(super) async fn on_free_port<T>(
    wanted: Option<u16>,
    mut attempt: impl AsyncFnMut(u16) -> Result<(Arc<Process>, Result<T>)>,
) -> Result<(Arc<Process>, T, u16)> {
    let mut tries = 5;
    loop {
        let port = wanted.map_or_else(free_port, Ok)?;
        tries -= 1;
        match attempt(port).await? {
            (process, Ok(ready)) => return Ok((process, ready, port)),
            (process, Err(_)) if wanted.is_none() && tries > 0 && process.lost_its_port() => {}
            (_, Err(error)) => return Err(error),
        }
    }
}
