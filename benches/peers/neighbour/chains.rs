//! A stranger shows chains of certificates that take long to be found wanting: one that is refused
//! unverified, and the dearest of those that are looked at.

use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::{Arena, Attack, Held, again};
use crate::strangers::{self, Chain};

pub(super) const REFUSED: Attack = Attack {
    name: "long chains",
    what: "a stranger shows 10 self-made certificates of one subject, each with a key of its own, 16 times a second",
    begin: |arena| Box::pin(async move { show(&arena, Chain::Keys(10)) }),
};

pub(super) const LOOKED_AT: Attack = Attack {
    name: "dear chains",
    what: "a stranger shows 4 self-made certificates of two subjects, with a key for each, 16 times a second",
    begin: |arena| Box::pin(async move { show(&arena, Chain::Pairs) }),
};

fn show(arena: &Arena, chain: Chain) -> Held {
    let made = strangers::made(chain);
    let mut config = strangers::client(Some(made));
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    let (address, config) = (arena.asking(), Arc::new(config));
    let mut tasks = JoinSet::new();
    again(&mut tasks, 16, move || {
        let config = Arc::clone(&config);
        async move {
            let Ok(tcp) = TcpStream::connect(address).await else { return };
            let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
            let shaken = TlsConnector::from(config).connect(name, tcp).await;
            // Under TLS 1.3 the refusal is read behind the client's half.
            let Ok(mut tls) = shaken else { return };
            let _closed = tls.read_to_end(&mut Vec::new()).await;
        }
    });
    Held::by(tasks)
}
