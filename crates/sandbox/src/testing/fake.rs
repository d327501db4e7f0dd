//! Stand-ins for faults that a real server cannot be made to show: a TCP listener that answers
//! each connection as it is told.

use std::net::SocketAddr;
use std::sync::Arc;

use super::raw::tagged;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server that reads once, then says fixed bytes, then closes.
pub async fn says(answer: &'static [u8]) -> SocketAddr {
    serves(move |mut tcp| async move {
        let mut sink = [0; 4096];
        let _asked = tcp.read(&mut sink).await;
        let _said = tcp.write_all(answer).await;
    })
    .await
}

/// A server that takes connections and never says a word.
pub async fn silent() -> SocketAddr {
    serves(|mut tcp| async move {
        let mut sink = [0; 4096];
        while matches!(tcp.read(&mut sink).await, Ok(1..)) {}
    })
    .await
}

/// What a database does that lets anybody in who has a password, up to its ReadyForQuery.
pub async fn lets_in(tcp: &mut TcpStream) -> std::io::Result<()> {
    lets_in_with(tcp, &tagged(b'K', &[0, 0, 0, 9, 1, 2, 3, 4])).await
}

/// With this in the place of its BackendKeyData.
pub async fn lets_in_with(tcp: &mut TcpStream, key: &[u8]) -> std::io::Result<()> {
    let mut sink = [0; 4096];
    let _startup = tcp.read(&mut sink).await?;
    tcp.write_all(&tagged(b'R', &[0, 0, 0, 3])).await?;
    let _password = tcp.read(&mut sink).await?;
    tcp.write_all(&[&tagged(b'R', &[0; 4]), key, &tagged(b'Z', b"I")].concat()).await
}

/// A database that asks for so many iterations of SCRAM's hash, and closes once it has an answer.
pub async fn asks_to_hash(iterations: u32) -> SocketAddr {
    serves(move |mut tcp| async move {
        let mut said = vec![0; 4096];
        let _startup = tcp.read(&mut said).await;
        let _said = tcp.write_all(&tagged(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")).await;
        let length = tcp.read(&mut said).await.unwrap_or_default();
        let first = String::from_utf8_lossy(&said[..length]);
        let number = first.rsplit("r=").next().unwrap_or_default();
        let challenge = format!("\0\0\0\x0br={number}more,s=c2FsdA==,i={iterations}");
        let _said = tcp.write_all(&tagged(b'R', challenge.as_bytes())).await;
        let _proof = tcp.read(&mut said).await;
    })
    .await
}

/// The number in the question whose a database is, which each row of an answer must begin with.
pub fn number_in(question: &str) -> &str {
    question.split('\'').nth(1).unwrap_or_default()
}

/// A database that lets anybody in who has a password, and answers as told when it is asked whose
/// it is: it is given the number that each row of its answer must begin with.
pub async fn database(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> SocketAddr {
    let answer = Arc::new(answer);
    serves(move |mut tcp| {
        let answer = Arc::clone(&answer);
        async move {
            let mut sink = [0; 4096];
            let _let_in = lets_in(&mut tcp).await;
            let asked = tcp.read(&mut sink).await.unwrap_or_default();
            let question = String::from_utf8_lossy(&sink[..asked]).into_owned();
            let _said = tcp.write_all(&answer(number_in(&question))).await;
            let _query = tcp.read(&mut sink).await;
        }
    })
    .await
}

/// A DataRow of one text.
pub fn row(text: &str) -> Vec<u8> {
    let length = (text.len() as u32).to_be_bytes();
    tagged(b'D', &[&b"\0\x01"[..], &length, text.as_bytes()].concat())
}

/// A server that treats each connection as told.
pub async fn serves<F>(treat: impl Fn(TcpStream) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let treat = Arc::new(treat);
    tokio::spawn(async move {
        while let Ok((tcp, _from)) = listener.accept().await {
            tokio::spawn(treat(tcp));
        }
    });
    address
}

/// An OpenBAO that gives out logins, and treats each request for a credential as told.
pub async fn openbao<F>(treat: impl Fn(TcpStream) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    // A login, and what became of it.
    const LOGIN: &str = r#"{
        "auth": { "client_token": "s.stand-in", "lease_duration": 3600, "renewable": true,
            "num_uses": 0, "token_type": "service", "orphan": true },
        "data": { "ttl": 3600, "expire_time": "2100-01-01T00:00:00Z", "renewable": true,
            "num_uses": 0, "type": "service", "orphan": true, "explicit_max_ttl": 0 }
    }"#;
    let treat = Arc::new(treat);
    serves(move |mut tcp| {
        let treat = Arc::clone(&treat);
        async move {
            let mut asked = Vec::new();
            while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                if !matches!(tcp.read_buf(&mut asked).await, Ok(1..)) {
                    return;
                }
            }
            if asked.starts_with(b"GET /v1/pgsilo/acme/creds/") {
                return treat(tcp).await;
            }
            let length = LOGIN.len();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{LOGIN}"
            );
            let _said = tcp.write_all(answer.as_bytes()).await;
            // To close with bytes unread would be a reset.
            let _closed = tcp.shutdown().await;
            while matches!(tcp.read_buf(&mut asked).await, Ok(1..)) {}
        }
    })
    .await
}
