//! Bare relays: they move bytes between a client and a server in one way or another, and do nothing
//! else. `ONLY=relays make bench` measures pgsilo's relay beside them, to know what the way of
//! moving costs.
//!
//! ```text
//! pgsilo-relays scratch|splice|uring LISTEN_PORT SERVER_PORT THREADS
//! ```

mod polled;
mod uring;

use std::error::Error;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::str::FromStr;

/// Bytes that are moved at once.
const CHUNK: usize = 64 * 1024;

/// Takes connections, each with one to the server, on a thread of its own.
trait Worker {
    fn take(&self, client: TcpStream, server: TcpStream) -> std::io::Result<()>;
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, listen, server, threads] = &arguments[..] else {
        return Err(
            "usage: pgsilo-relays scratch|splice|uring LISTEN_PORT SERVER_PORT THREADS".into()
        );
    };
    let workers: Vec<Box<dyn Worker>> = (0..usize::from_str(threads)?)
        .map(|_| -> Result<Box<dyn Worker>, Box<dyn Error>> {
            Ok(match kind.as_str() {
                "scratch" => Box::new(polled::Polled::start(polled::Way::Scratch)?),
                "splice" => Box::new(polled::Polled::start(polled::Way::Splice)?),
                "uring" => Box::new(uring::Uring::start()?),
                other => return Err(format!("no such relay: {other}").into()),
            })
        })
        .collect::<Result<_, _>>()?;
    let server: u16 = server.parse()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, listen.parse()?))?;
    // One after the other: each worker has as many, or one more.
    for (client, worker) in listener.incoming().zip(workers.iter().cycle()) {
        let (client, server) = (client?, TcpStream::connect((Ipv4Addr::LOCALHOST, server))?);
        for tcp in [&client, &server] {
            tcp.set_nodelay(true)?;
        }
        worker.take(client, server)?;
    }
    Ok(())
}
