//! Counts the leases that OpenBAO has given up on: after its sixth attempt it revokes a lease only
//! once a day, and says so in its own log alone. They are of the whole namespace, pgsilo's or not.

use std::sync::Arc;
use std::time::Duration;

use pgsilo_openbao::Error;
use tokio::time::sleep;

use super::identity::Identity;
use super::server::Server;
use crate::metrics;

/// It takes OpenBAO ten minutes to give one up.
const INTERVAL: Duration = Duration::from_secs(60);
/// Until pgsilo is logged in.
const FIRST: Duration = Duration::from_secs(1);

/// Asks now and again, for as long as the process runs.
pub(super) async fn watch(identity: Arc<Identity>, server: Arc<Server>) {
    let mut told = false;
    loop {
        let Ok(login) = identity.login() else {
            sleep(FIRST).await;
            continue;
        };
        let answer = server.irrevocable_leases(login.secret()).await;
        // What was so a while ago says nothing of now: not a number, until OpenBAO says it.
        let leases = answer.as_ref().map_or(f64::NAN, |leases| *leases as f64);
        metrics::OPENBAO_IRREVOCABLE_LEASES.set(leases);
        match answer {
            Ok(_) => {}
            Err(error @ Error::Said { .. }) if !told => {
                told = true;
                tracing::warn!(
                    %error,
                    "cannot count the leases that OpenBAO has given up on: \
                     allow sys/leases/count, as docker/openbao/pgsilo.hcl does"
                );
            }
            Err(_) => {}
        }
        sleep(INTERVAL).await;
    }
}
