//! A tenant's database asks for as many iterations of SCRAM as it may. The database is the
//! attacker, so it stands in for one: it says its first message and is given the proof.

use std::sync::Arc;

use pgsilo_sandbox::testing::fake;
use pgsilo_sandbox::testing::raw::tagged;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Attack, Held, again};

pub(super) const ATTACK: Attack = Attack {
    name: "SCRAM iterations",
    what: "a tenant's database asks for 100,000 iterations; 16 logins of that tenant a second",
    begin: |arena| {
        Box::pin(async move {
            let database = fake::serves(|mut tcp| async move {
                let _gone = challenge(&mut tcp).await;
            })
            .await;
            arena.proxy.place_acme_at(database.port(), "").await;
            let mut tasks = JoinSet::new();
            again(&mut tasks, 16, move || {
                let arena = Arc::clone(&arena);
                async move { drop(arena.log_in("acme").await) }
            });
            Held::by(tasks)
        })
    },
};

async fn challenge(tcp: &mut TcpStream) -> std::io::Result<()> {
    let mut asked = [0; 4096];
    let _startup = tcp.read(&mut asked).await?;
    tcp.write_all(&tagged(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")).await?;
    let length = tcp.read(&mut asked).await?;
    let first = String::from_utf8_lossy(&asked[..length]).into_owned();
    let nonce = first.rsplit("r=").next().unwrap_or_default();
    let first = format!("r={nonce}more,s=c2FsdHNhbHRzYWx0c2FsdA==,i=100000");
    tcp.write_all(&tagged(b'R', &[b"\0\0\0\x0b", first.as_bytes()].concat())).await?;
    let _proof = tcp.read(&mut asked).await?;
    Ok(())
}
