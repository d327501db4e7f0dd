//! Somebody does not read pgsilo's log, and strangers make it longer.

use pgsilo_sandbox::testing::raw::{password, startup};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Attack, Held, again};

pub(super) const ATTACK: Attack = Attack {
    name: "log not read",
    what: "the reader of pgsilo's stderr, a pipe, is stopped; a stranger is refused 50 times a second",
    begin: |arena| {
        Box::pin(async move {
            let reader = Pid::from_raw(arena.reader()).expect("a pid");
            kill_process(reader, Signal::STOP).expect("it lives");
            let mut tasks = JoinSet::new();
            let address = arena.address();
            again(&mut tasks, 50, move || async move {
                let Ok(mut tcp) = TcpStream::connect(address).await else { return };
                let token = "x".repeat(1000);
                let login = [startup(&[("user", &token), ("database", &token)]), password(&token)];
                let _sent = tcp.write_all(&login.concat()).await;
                let _refused = tcp.read_to_end(&mut Vec::new()).await;
            });
            Held::by(tasks).ending(move || {
                let _gone = kill_process(reader, Signal::CONT);
            })
        })
    },
};
