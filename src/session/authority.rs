//! What a session's life hangs on: its lease, its identity and who certified that, its tenant, the
//! process. Each may say that it must end, and by when; what says so more urgently than before is heard.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::{Snapshot, State, Tenant};
use pgsilo_core::tenant::Access;
use pgsilo_core::tls::AuthorityId;
use tokio::time::sleep;

use crate::audit;
use crate::ending::Ending;
use crate::identity::Identity;
use crate::lease::{Lease, LeaseEnd};
use crate::listener::Listener;
use crate::proxy::Proxy;
use crate::sessions::Session;
use crate::splice::{Order, Orders};

/// What is left for the last words before an authority is really over.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// When to look again if nothing is known to come.
const FAR: Duration = Duration::from_secs(24 * 60 * 60);

/// The authority of one session.
pub(super) struct Authority<'s> {
    pub(super) proxy: &'static Proxy,
    pub(super) tenant: &'s Tenant,
    pub(super) lease: &'s Lease,
    pub(super) identity: &'s Identity,
    pub(super) access: Access,
    /// Where it came in.
    pub(super) listener: &'static Listener,
    /// Who certified the client there, if it showed a certificate.
    pub(super) certified_by: Option<AuthorityId>,
    /// When the token or the certificate ends.
    pub(super) expires: BootTime,
    /// What was left of that when the session began.
    pub(super) left: Duration,
    /// When the session is as old as it may become, and how old that is.
    pub(super) aged: Option<(BootTime, Duration)>,
    pub(super) session: &'s Session,
    /// The newest failure to renew the lease that an event has told of; 0: none since it was
    /// last renewed.
    pub(super) told: AtomicU32,
}

impl Orders for Authority<'_> {
    /// Resolves when the session must end sooner than `than`.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds its arguments twice")]
    fn sooner(&self, than: Option<Order>) -> impl Future<Output = Order> {
        async move {
            loop {
                // Made first: what changes behind this line is not missed.
                let changed = self.session.changed();
                let (lease, login) = self.lease.changed();
                let wake = {
                    let (end, again) = self.lease.tend();
                    self.tell_of_renewals(&end);
                    match self.next(&end, than) {
                        Next::Order(order) => return order,
                        Next::Look(wake) => again.map_or(wake, |again| again.min(wake)),
                    }
                };
                tokio::select! {
                    () = changed => {}
                    () = lease => {}
                    () = login => {}
                    () = sleep(wake.remaining()) => {}
                }
            }
        }
    }
}

/// What follows from how things stand.
enum Next {
    Order(Order),
    /// Nothing yet. Time alone changes nothing before then.
    Look(BootTime),
}

/// Something that ends the session.
struct Threat {
    /// From then on it is an order.
    from: BootTime,
    order: Order,
}

impl Authority<'_> {
    fn next(&self, end: &LeaseEnd, than: Option<Order>) -> Next {
        let now = BootTime::now();
        let threats = [
            self.drained(now),
            self.withdrawn(now),
            self.revoked(now),
            self.uncertified(now),
            Some(self.lease_ends(end)),
            self.expires(),
            self.ages(),
        ];
        let matters = |threat: &Threat| than.is_none_or(|than| threat.order.by < than.by);
        let (mut due, mut wake) = (None::<Order>, now + FAR);
        for threat in threats.into_iter().flatten().filter(matters) {
            if threat.from > now {
                wake = wake.min(threat.from);
            } else if due.is_none_or(|due| threat.order.by < due.by) {
                due = Some(threat.order);
            }
        }
        due.map_or(Next::Look(wake), Next::Order)
    }

    fn drained(&self, now: BootTime) -> Option<Threat> {
        let by = self.proxy.drained_by()?;
        Some(Threat { from: now, order: Order { ending: Ending::Drained, by } })
    }

    /// The registry no longer serves the tenant where this session is, or binds its certificate
    /// otherwise, or has another meaning for what its token calls it. A paused tenant keeps its sessions.
    fn withdrawn(&self, now: BootTime) -> Option<Threat> {
        let snapshot = self.proxy.registry().snapshot();
        let placement = self.tenant.placement();
        let serves = snapshot.tenant(self.tenant.id()).is_some_and(|now| {
            now.state() != State::Suspended && now.placement().is_same_database(placement)
        });
        let withdrawn = !serves || !self.is_still_bound(&snapshot);
        let order = Order { ending: Ending::TenantWithdrawn, by: now };
        withdrawn.then_some(Threat { from: now, order })
    }

    /// A certificate's tenant and access are what the registry binds it to; a token says its own, but
    /// maybe by an alias.
    fn is_still_bound(&self, registry: &Snapshot) -> bool {
        match self.identity {
            Identity::Token(claims) => claims.means(self.tenant.id(), |word| registry.named(word)),
            Identity::Certificate(holder) => registry
                .binding(holder.name())
                .is_some_and(|to| to.tenant == *self.tenant.id() && to.access == self.access),
        }
    }

    /// The identity was put on the list of those denied.
    fn revoked(&self, now: BootTime) -> Option<Threat> {
        let denied = self.identity.is_denied(self.proxy.sources.denied.as_ref());
        let order = Order { ending: Ending::IdentityRevoked, by: now };
        denied.then_some(Threat { from: now, order })
    }

    /// The authority that certified the client is not among the listener's any more: it would not get
    /// through its handshake now, whatever it has shown behind that.
    fn uncertified(&self, now: BootTime) -> Option<Threat> {
        let (authority, tls) = (self.certified_by.as_ref()?, self.listener.tls.as_ref()?);
        let order = Order { ending: Ending::AuthorityWithdrawn, by: now };
        (!tls.server.believes(authority)).then_some(Threat { from: now, order })
    }

    /// While the lease is still renewed, only what is left after the renewals have failed for
    /// long is a notice; the whole grace is, once its end is final.
    fn lease_ends(&self, end: &LeaseEnd) -> Threat {
        let grace = self.proxy.settings.endings.grace;
        let notice = grace.min(end.duration / if end.is_final { 3 } else { 6 });
        let order = Order { ending: Ending::LeaseEnded, by: last_words(end.at, notice) };
        Threat { from: end.at.earlier(notice), order }
    }

    /// A token is shown once and may be outlived where the operator says so; a certificate is what the
    /// client is for as long as it is connected, and no revocation list ends its sessions.
    fn expires(&self) -> Option<Threat> {
        let rules = &self.proxy.settings.endings;
        let ends = rules.end_at_expiry || matches!(self.identity, Identity::Certificate(_));
        // A session that came with a token near its end still gets most of what is left.
        let notice = rules.grace.min(self.left / 3);
        let order = Order { ending: self.identity.ending(), by: last_words(self.expires, notice) };
        ends.then_some(Threat { from: self.expires.earlier(notice), order })
    }

    /// A transaction gets until the end itself, as where a token expires.
    fn ages(&self) -> Option<Threat> {
        let (end, age) = self.aged?;
        let notice = self.proxy.settings.endings.grace.min(age / 3);
        let order = Order { ending: Ending::SessionAge, by: last_words(end, notice) };
        Some(Threat { from: end.earlier(notice), order })
    }

    /// One event for each renewal that failed, and one for the first that worked again.
    fn tell_of_renewals(&self, end: &LeaseEnd) {
        match &end.failure {
            Some(failure) if failure.number != self.told.load(Ordering::Relaxed) => {
                self.told.store(failure.number, Ordering::Relaxed);
                audit::renewal_failed(
                    &self.session.trail,
                    &failure.cause,
                    end.at.remaining(),
                    end.is_final,
                );
            }
            None if self.told.swap(0, Ordering::Relaxed) > 0 => {
                audit::renewed_again(&self.session.trail, end.at.remaining());
            }
            Some(_) | None => {}
        }
    }
}

/// A little before the end, so that the client can still be told in time.
fn last_words(end: BootTime, notice: Duration) -> BootTime {
    end.earlier(LAST_WORDS.min(notice / 2))
}
