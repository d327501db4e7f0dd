//! A stranger opens connections and says nothing.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Attack, Held, at_once, in_force};

/// Of the places that there are, as they are seen taken.
const MOST: f64 = 990.0;

pub(super) const ATTACK: Attack = Attack {
    name: "silent handshakes",
    what: "1200 connections (max_handshakes is 1000) that say nothing, each opened again when it is closed",
    begin: |arena| {
        Box::pin(async move {
            let address = arena.address();
            let mut tasks = JoinSet::new();
            at_once(&mut tasks, 1200, move || async move {
                let Ok(mut tcp) = TcpStream::connect(address).await else { return };
                let _closed = tcp.read_to_end(&mut Vec::new()).await;
            });
            in_force(async {
                while arena.proxy.metric("pgsilo_handshakes_active").await < MOST {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
            .await;
            Held::by(tasks)
        })
    },
};
