//! pgsilo's relay beside bare ones, which do nothing but move bytes: through one buffer of a
//! thread, by splice(2), by io_uring. Not for goals: to know what the way of moving costs.

use std::process::Command;

use pgsilo_sandbox::testing::bao::free_port;
use pgsilo_sandbox::testing::proxy::folder;

use crate::Plan;
use crate::contenders::{Contender, Contenders, Peer, processors};
use crate::report::Report;
use crate::testbed::{Testbed, variable};
use crate::{copies, queries};

/// What benches/relays knows, and what it is called here.
const KINDS: [(&str, &str); 3] =
    [("scratch", "bare buffer"), ("splice", "bare splice"), ("uring", "bare uring")];

pub(crate) async fn run(
    plan: Plan,
    testbed: &Testbed,
    contenders: &Contenders,
    report: &mut Report,
) {
    let mut all = vec![contenders.direct, contenders.haproxy, contenders.pgsilo];
    let mut running = Vec::new();
    for (kind, name) in KINDS {
        let (contender, peer) = start(kind, name, testbed).await;
        all.push(contender);
        running.push(peer);
    }
    for clients in [1, 8, 32] {
        queries::tell(plan, testbed, &all, clients, report);
    }
    copies::out(plan, testbed, &all, report);
    copies::into(plan, testbed, &all, report);
}

async fn start(kind: &str, name: &'static str, testbed: &Testbed) -> (Contender, Peer) {
    let port = free_port();
    let mut command = Command::new(variable("PGSILO_RELAYS"));
    command.args([kind, &port.to_string(), &testbed.port().to_string(), &processors().to_string()]);
    let peer = Peer::start(command, folder(), port).await;
    (peer.contender(name, false), peer)
}
