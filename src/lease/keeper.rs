//! Keeps a lease in force for as long as its session lives: renews it at two thirds of its
//! time, with jitter, until its maximum; tries again, with growing pauses, until its real end.
//!
//! What it learns of the end is published to the session, which must be over by then.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::sync::watch::error::RecvError;
use tokio::time::sleep;

use super::login::{Login, Standing};
use super::openbao::{OpenBao, OpenBaoError};
use crate::backoff::{Backoff, spread};
use crate::clock::BootTime;

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// When a lease ends, as far as is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseEnd {
    pub(crate) at: BootTime,
    /// Of the first grant; where its login ends sooner, what was left when that became known.
    pub(crate) duration: Duration,
    /// It will not be renewed any more.
    pub(crate) is_final: bool,
    /// The newest attempt to renew it, if that failed.
    pub(crate) failure: Option<RenewalFailure>,
}

/// An attempt to renew a lease that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RenewalFailure {
    /// Which of the lease's failures it is, from 1.
    pub(crate) number: u32,
    /// For the log only.
    pub(crate) cause: Arc<str>,
}

/// Renews one lease. Runs until that is not possible any more; dropped with the lease.
pub(super) struct Keeper {
    pub(super) openbao: Arc<OpenBao>,
    /// What asked for the lease: the lease ends with it.
    pub(super) login: Arc<Login>,
    pub(super) lease_id: String,
    pub(super) end: watch::Sender<LeaseEnd>,
}

impl Keeper {
    pub(super) async fn keep(self) {
        let mut standing = self.login.watch();
        let (mut granted, mut renewal) = (BootTime::now(), BootTime::now());
        loop {
            self.heed(*standing.borrow_and_update());
            let end = self.end.borrow().clone();
            if end.is_final {
                // Its login may still end sooner.
                if threatened(&mut standing).await.is_err() {
                    return;
                }
                continue;
            }
            if granted != end.at {
                granted = end.at;
                let share = 1.0 - two_thirds_with_jitter();
                renewal = end.at.earlier(end.duration.mul_f64(share));
            }
            tokio::select! {
                () = async {
                    renewal.arrives().await;
                    self.renew(end).await;
                } => {}
                _ = threatened(&mut standing) => {}
            }
        }
    }

    /// A lease ends with the login that asked for it, at the latest.
    fn heed(&self, standing: Standing) {
        let login_ends = match standing {
            Standing::Kept(_) => return,
            Standing::Ends { at, .. } => at,
            Standing::Dead => BootTime::now(),
        };
        self.end.send_if_modified(|end| {
            let sooner = login_ends < end.at;
            if sooner {
                let left = login_ends.remaining();
                (end.at, end.is_final, end.duration) = (login_ends, true, end.duration.min(left));
            }
            sooner
        });
    }

    /// Renews, and tries again until it works or the end has come.
    async fn renew(&self, end: LeaseEnd) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        loop {
            let asked = BootTime::now();
            let error = match self.ask(end.duration).await {
                Ok((duration, renewable)) => {
                    metrics::counter!("pgsilo_renewals_total").increment(1);
                    self.end.send_replace(renewed(&end, asked, duration, renewable));
                    return;
                }
                Err(error) => error,
            };
            metrics::counter!("pgsilo_renewal_failures_total").increment(1);
            // 400: OpenBAO knows no such lease, or it is past its maximum.
            let hopeless = matches!(error, OpenBaoError::Said { status: 400, .. });
            let left = end.at.remaining();
            let is_final = hopeless || left.is_zero();
            self.end.send_modify(|end| {
                let number = end.failure.as_ref().map_or(0, |failure| failure.number) + 1;
                end.failure = Some(RenewalFailure { number, cause: error.to_string().into() });
                end.is_final = is_final;
            });
            if is_final {
                return;
            }
            sleep(retry.pause().min(left)).await;
        }
    }

    async fn ask(&self, increment: Duration) -> Result<(Duration, bool), OpenBaoError> {
        self.openbao.renew(self.login.secret(), &self.lease_id, increment).await
    }
}

/// Waits until the login ends sooner than was known. That it was renewed changes nothing here, and
/// must not cut a renewal of the lease short.
async fn threatened(standing: &mut watch::Receiver<Standing>) -> Result<(), RecvError> {
    loop {
        standing.changed().await?;
        if !matches!(*standing.borrow(), Standing::Kept(_)) {
            return Ok(());
        }
    }
}

/// A grant that is shorter than the one before, by more than rounding, has met the maximum:
/// another renewal would only be shorter still.
fn renewed(end: &LeaseEnd, asked: BootTime, granted: Duration, renewable: bool) -> LeaseEnd {
    let at = asked + granted;
    let capped = granted + Duration::from_secs(2) < end.duration || at <= end.at;
    LeaseEnd { at, duration: end.duration, is_final: capped || !renewable, failure: None }
}

/// Many leases of one moment are not renewed in one moment: 0.6 to 0.73.
fn two_thirds_with_jitter() -> f64 {
    2.0 / 3.0 + (spread() - 0.5) * 0.13
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(duration: u64, left: u64) -> LeaseEnd {
        let at = BootTime::now() + Duration::from_secs(left);
        LeaseEnd { at, duration: Duration::from_secs(duration), is_final: false, failure: None }
    }

    #[test]
    fn a_full_grant_is_renewed_again_and_a_shorter_one_is_the_last() {
        let (old, now) = (&end(3600, 1200), BootTime::now());
        let seconds = Duration::from_secs;
        assert!(!renewed(old, now, seconds(3600), true).is_final);
        assert!(renewed(old, now, seconds(3600), false).is_final);
        assert!(renewed(old, now, seconds(1800), true).is_final);
        // An answer that took its time is no smaller grant.
        assert!(!renewed(old, now.earlier(seconds(4)), seconds(3600), true).is_final);
        // A lease of ten seconds that may live for ten: nothing is gained.
        assert!(renewed(&end(10, 4), now, seconds(3), true).is_final);
    }

    #[test]
    fn renewals_are_spread_around_two_thirds() {
        for _ in 0..1000 {
            assert!((0.6..0.74).contains(&two_thirds_with_jitter()));
        }
    }
}
