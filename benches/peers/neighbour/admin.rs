//! Somebody holds the admin port's places.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Attack, Held, at_once};

pub(super) const ATTACK: Attack = Attack {
    name: "admin port",
    what: "80 connections to the admin port that say nothing and 40 that send a byte of a request a second, \
           each opened again when it is closed",
    begin: |arena| {
        Box::pin(async move {
            let address = arena.proxy.admin();
            let mut tasks = JoinSet::new();
            at_once(&mut tasks, 80, move || async move {
                let Ok(mut tcp) = TcpStream::connect(address).await else { return };
                let _closed = tcp.read_to_end(&mut Vec::new()).await;
            });
            at_once(&mut tasks, 40, move || async move {
                let Ok(mut tcp) = TcpStream::connect(address).await else { return };
                let request = b"GET /livez HTTP/1.1\r\nHost: pgsilo\r\nX-Nothing: ";
                for byte in request.iter().chain(std::iter::repeat(&b'x')) {
                    if tcp.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
            Held::by(tasks)
        })
    },
};
