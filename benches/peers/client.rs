//! Logs in as any client does, in clear or under TLS, by SCRAM or with a token.

use futures_util::{StreamExt, stream};
use pgsilo_sandbox::testing::raw::{Raw, password, query, startup, tagged};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use crate::contenders::Contender;
use crate::testbed::Testbed;

/// A session with a contender; the password is computed once by a caller that opens many.
pub(crate) async fn enter(contender: &Contender, testbed: &Testbed, secret: &str) -> Raw {
    let mut client = match contender.tls {
        true => Raw::tls_of(&testbed.world, contender.address).await,
        false => Raw::tcp(contender.address).await,
    };
    client.send(&startup(&[("user", contender.user()), ("database", contender.dbname())])).await;
    let mut scram = None;
    loop {
        let message = client.message().await;
        match (message.tag, message.body.get(..4)) {
            (b'Z', _) => return client,
            (b'R', Some([0, 0, 0, 3])) => client.send(&password(secret)).await,
            (b'R', Some([0, 0, 0, 10])) => {
                let begun = ScramSha256::new(secret.as_bytes(), ChannelBinding::unsupported());
                let length = (begun.message().len() as u32).to_be_bytes();
                let first = [b"SCRAM-SHA-256\0", &length[..], begun.message()].concat();
                client.send(&tagged(b'p', &first)).await;
                scram = Some(begun);
            }
            (b'R', Some([0, 0, 0, 11])) => {
                let scram = scram.as_mut().expect("begun");
                scram.update(&message.body[4..]).expect("a good challenge");
                client.send(&tagged(b'p', scram.message())).await;
            }
            (b'R', Some([0, 0, 0, 12])) => {
                let scram = scram.as_mut().expect("begun");
                scram.finish(&message.body[4..]).expect("the real server");
            }
            (b'E', _) => panic!("refused: {}", message.sqlstate()),
            _ => {}
        }
    }
}

/// Sessions of one contender, so many logins at once.
pub(crate) async fn open(
    contender: &Contender,
    testbed: &Testbed,
    count: usize,
    at_once: usize,
) -> Vec<Raw> {
    let secret = contender.password(testbed);
    let logins = (0..count).map(|_| enter(contender, testbed, &secret));
    stream::iter(logins).buffer_unordered(at_once).collect().await
}

/// Asks for that many bytes and reads them.
pub(crate) async fn take(client: &mut Raw, bytes: usize) {
    client.send(&query(&format!("SELECT repeat('x', {bytes})"))).await;
    let answer = client.until(b'Z').await;
    let rows = answer.iter().filter(|message| message.tag == b'D');
    let taken: usize = rows.map(|row| row.body.len()).sum();
    assert!(taken >= bytes, "{taken} of {bytes} bytes");
}
