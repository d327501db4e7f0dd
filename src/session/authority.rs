//! What a session depends on: its lease, its identity and who certified that, its tenant, the
//! process. Each may terminate it by a deadline; an earlier deadline replaces a later one.
//!
//! A session ends when pgsilo stops, the registry withdraws, pauses or locks its tenant or gives its token's
//! word or its certificate to another, it is locked, its identity is put on the list of those denied, its authority is
//! withdrawn, its database fails over to another server, its lease or its identity ends, or it is as old as it may be. `decision.rs` decides
//! the deadline. Its clock is CLOCK_BOOTTIME, which goes on in a suspended machine: setting the
//! wall clock neither lengthens nor shortens a session. `splice/moment.rs` chooses the moment.
//! docs/refusals.md has every ending.

mod decision;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::{Snapshot, State};
use pgsilo_core::tls::AuthorityId;
use tokio::time::sleep;

use super::resources::SessionResources;
use crate::audit;
use crate::identity::Identity;
use crate::lease::LeaseEnd;
use crate::listener::Listener;
use crate::proxy::Proxy;
use crate::registry::{Grant, Lockable};
use crate::sessions::Session;
use crate::splice::{Termination, Terminator};
use decision::{Decision, Facts};

/// The authority of one session.
pub(super) struct Authority<'s> {
    pub(super) proxy: &'static Proxy,
    pub(super) resources: &'s SessionResources,
    /// Where it came in.
    pub(super) listener: &'static Listener,
    /// Who certified the client there, if it showed a certificate.
    pub(super) certified_by: Option<Box<AuthorityId>>,
    /// When the token or the certificate ends.
    pub(super) expires: BootTime,
    /// How old the session may become.
    pub(super) max_age: Option<Duration>,
    pub(super) session: &'s Session,
    /// The newest failure to renew the lease that an event has told of; 0: none since it was
    /// last renewed.
    pub(super) told: AtomicU32,
}

impl Terminator for Authority<'_> {
    /// Resolves when the session must end sooner than `current`.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds its arguments twice")]
    fn next_before(&self, current: Option<Termination>) -> impl Future<Output = Termination> {
        async move {
            loop {
                // Subscribed first: no change after this line is missed.
                let changed = self.session.changed();
                let (lease, login) = self.resources.lease.changed();
                let wake = {
                    let (end, again) = self.resources.lease.poll_renewal();
                    self.tell_of_renewals(&end);
                    match self.next(&end, current) {
                        Decision::Terminate(termination) => return termination,
                        Decision::Recheck(wake) => again.map_or(wake, |again| again.min(wake)),
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

impl Authority<'_> {
    fn next(&self, end: &LeaseEnd, current: Option<Termination>) -> Decision {
        let rules = &self.proxy.settings.endings;
        // A token is shown once and may be outlived where the operator says so; a certificate is
        // what the client is for as long as it is connected, and no revocation list ends its
        // sessions.
        let identity = &*self.resources.identity;
        let ends = rules.end_at_expiry || matches!(identity, Identity::Certificate(_));
        let began = self.session.began;
        let grant = self.grant();
        let state = self.state();
        let is_served = matches!(state, Some(State::Active | State::Paused));
        let pause_timeout = self.proxy.limits().pause_timeout;
        let paused = (state == Some(State::Paused)).then_some(pause_timeout);
        let facts = Facts {
            drained_by: self.proxy.drained_by(),
            withdrawn: !is_served,
            revoked: identity.is_denied(self.proxy.sources.denied.as_ref()),
            locked: self.is_locked(),
            ungranted: matches!(grant, Some(None)),
            uncertified: self.is_uncertified(),
            overtaken: self.is_overtaken(),
            stale: rules.end_when_stale && self.proxy.too_stale().is_some(),
            paused,
            lease: end,
            expires: ends.then(|| (self.expires, self.expires.since(began), identity.ending())),
            granted: grant.flatten().and_then(|grant| {
                let at = BootTime::at(grant.expires_at()?);
                Some((at, at.since(began)))
            }),
            aged: self.max_age.map(|age| (began + age, age)),
            grace: rules.grace,
        };
        facts.decide(BootTime::now(), current)
    }

    /// What the registry says of its tenant; `None`: it does not have the tenant where this session is
    /// any more, or binds its certificate otherwise, or has another meaning for what its token calls it.
    fn state(&self) -> Option<State> {
        let snapshot = self.proxy.registry().snapshot();
        let tenant = &self.resources.tenant;
        let placement = tenant.placement();
        let now = snapshot.tenant(tenant.id())?;
        let is_there = now.is_at_home() && now.placement().is_same_database(placement);
        (is_there && self.is_still_bound(&snapshot)).then(|| now.state())
    }

    /// The grant that it needs, if it needs one.
    fn grant(&self) -> Option<Option<Arc<Grant>>> {
        let SessionResources { identity, tenant, access, .. } = self.resources;
        self.proxy.grant(identity, tenant.id(), *access)
    }

    /// Another server of the cluster has become the primary since it began.
    fn is_overtaken(&self) -> bool {
        let SessionResources { reign, tenant, .. } = self.resources;
        match reign {
            Some(reign) => reign.is_over(),
            None => self.proxy.clusters.may_have_left(&tenant.placement().cluster),
        }
    }

    /// The registry has a lock on its tenant, its identity or its client's address.
    fn is_locked(&self) -> bool {
        let credential = self.resources.identity.credential();
        let address = self.session.trail.ip();
        let session = Lockable { tenant: self.resources.tenant.id(), credential, address };
        self.proxy.registry().locks().on(session, SystemTime::now()).is_some()
    }

    /// A certificate's tenant and access are what the registry binds it to; a token says its own,
    /// but maybe by an alias.
    fn is_still_bound(&self, registry: &Snapshot) -> bool {
        let SessionResources { identity, tenant, access, .. } = self.resources;
        match &**identity {
            Identity::Token(claims) => claims.means(tenant.id(), |word| registry.named(word)),
            Identity::Certificate(holder) => registry
                .binding(holder.name())
                .is_some_and(|to| to.tenant == *tenant.id() && to.access == *access),
        }
    }

    /// The authority that certified the client is not among the listener's any more: it would not
    /// get through its handshake now, whatever it has shown behind that.
    fn is_uncertified(&self) -> bool {
        let certified = self.certified_by.as_ref().zip(self.listener.tls.as_ref());
        certified.is_some_and(|(authority, tls)| !tls.server.believes(authority))
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
