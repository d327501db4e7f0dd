//! A relay in front of a real server that takes all that it is sent to the server at once, and
//! holds answers back until it is told to let go: a network, or a server, that is slow at the worst
//! moment.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A relay that runs for as long as the test does.
#[derive(Debug)]
pub struct Slow {
    pub address: SocketAddr,
    holds: watch::Sender<bool>,
}

impl Slow {
    /// In front of a server at `HOST:PORT`; it holds back at first.
    pub async fn before(server: &str) -> Slow {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let holds = watch::Sender::new(true);
        let (server, held) = (server.to_owned(), holds.subscribe());
        tokio::spawn(async move {
            while let Ok((client, _from)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.expect("the server is there");
                tokio::spawn(relay(client, server, held.clone()));
            }
        });
        Slow { address, holds }
    }

    /// From here on it is as fast as any.
    pub fn lets_go(&self) {
        self.holds.send_replace(false);
    }
}

/// The server sees no client leave: it answers, whether or not one still waits.
async fn relay(client: TcpStream, server: TcpStream, mut held: watch::Receiver<bool>) {
    let ((mut asks, mut hears), (mut answers, mut takes)) =
        (client.into_split(), server.into_split());
    let asking = tokio::spawn(async move {
        let _gone = tokio::io::copy(&mut asks, &mut takes).await;
        takes
    });
    let mut chunk = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = answers.read(&mut chunk).await {
        let _let_go = held.wait_for(|held| !held).await.is_ok();
        let _gone = hears.write_all(&chunk[..length]).await;
    }
    let _closed = hears.shutdown().await;
    let _gone = asking.await;
}
