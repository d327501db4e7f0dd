//! A database that does nothing but answer, for more sessions than a PostgreSQL has processes for,
//! and an OpenBAO that grants at once, for as many leases.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use pgsilo_sandbox::testing::fake;
use pgsilo_sandbox::testing::raw::tagged;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Starts one. It lets anybody in with a password in clear, is sealed for acme, and answers every
/// query with a row.
pub(crate) async fn database() -> SocketAddr {
    fake::serves(|mut tcp| async move {
        let _gone = serve_database(&mut tcp).await;
    })
    .await
}

async fn serve_database(tcp: &mut TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    fake::lets_in(tcp).await?;
    let mut asked = [0; 1024];
    loop {
        let length = tcp.read(&mut asked).await?;
        if length == 0 || asked[0] == b'X' {
            return Ok(());
        }
        let row = fake::row(&answer(&asked[..length]));
        tcp.write_all(&[row, tagged(b'C', b"SELECT 1\0"), tagged(b'Z', b"I")].concat()).await?;
    }
}

/// The seal, behind what stands in its question; else anything.
fn answer(query: &[u8]) -> String {
    let sql = String::from_utf8_lossy(query);
    match sql.contains("pg_db_role_setting") {
        true => format!("{}acme", fake::number_in(&sql)),
        false => "1".to_owned(),
    }
}

/// Starts one. Every lease is another, and lives for an hour.
pub(crate) async fn openbao() -> SocketAddr {
    fake::serves(|mut tcp| async move {
        let _gone = serve_openbao(&mut tcp).await;
    })
    .await
}

async fn serve_openbao(tcp: &mut TcpStream) -> std::io::Result<()> {
    static LEASES: AtomicU64 = AtomicU64::new(0);
    tcp.set_nodelay(true)?;
    let mut asked = Vec::new();
    loop {
        let (head, length) = loop {
            if let Some(whole) = request(&asked) {
                break whole;
            }
            if tcp.read_buf(&mut asked).await? == 0 {
                return Ok(());
            }
        };
        let number = LEASES.fetch_add(1, Ordering::Relaxed);
        let answer = match head.starts_with("GET /v1/pgsilo/acme/creds/") {
            true => json!({
                "lease_id": format!("pgsilo/acme/creds/tenant-acme-rw/{number:024}"), "lease_duration": 3600,
                "renewable": true,
                "data": { "username": format!("tenant-acme-rw-{number:020}"), "password": "any" },
            }),
            // To whatever is asked: a login, and what became of it.
            false => json!({
                "auth": {
                    "client_token": "s.stand-in", "lease_duration": 3600, "renewable": true,
                    "num_uses": 0, "token_type": "service", "orphan": true,
                },
                "data": {
                    "ttl": 3600, "expire_time": "2100-01-01T00:00:00Z", "renewable": true,
                    "num_uses": 0, "type": "service", "orphan": true, "explicit_max_ttl": 0,
                },
            }),
        };
        asked.drain(..length);
        let body = answer.to_string();
        let length = body.len();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        tcp.write_all((head + &body).as_bytes()).await?;
    }
}

/// The head of a request that is there as a whole, and its length with its body.
fn request(asked: &[u8]) -> Option<(String, usize)> {
    let end = asked.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&asked[..end]).into_owned();
    let body = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let whole = end + body.unwrap_or(0);
    (asked.len() >= whole).then_some((head, whole))
}
