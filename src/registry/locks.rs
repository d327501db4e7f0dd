//! Who is kept out, whatever else is said: the locks of the registry's database. A lock takes
//! effect on logins and on running sessions.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use pgsilo_core::tenant::TenantId;
use pgsilo_registry::read::LockRow;
use tokio::sync::watch;

use super::PresentedCredential;

/// The locks in force.
#[derive(Debug)]
pub(crate) struct Locks {
    current: ArcSwap<Table>,
    generation: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    tenants: HashMap<String, Vec<Arc<Lock>>>,
    subjects: HashMap<String, Vec<Arc<Lock>>>,
    issuers: HashMap<String, Vec<Arc<Lock>>>,
    tokens: HashMap<String, Vec<Arc<Lock>>>,
    certificates: HashMap<String, Vec<Arc<Lock>>>,
    networks: Vec<(IpNet, Arc<Lock>)>,
}

/// One lock.
#[derive(Debug)]
pub(crate) struct Lock {
    id: String,
    /// Of a subject or a token: whose. `None`: of any.
    issuer: Option<String>,
    message: Option<String>,
    /// Only what was issued before.
    issued_before: Option<SystemTime>,
    expires_at: Option<SystemTime>,
    target: Target,
}

/// What is locked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Tenant(String),
    Subject(String),
    Issuer(String),
    Token(String),
    Certificate(String),
    Network(IpNet),
}

/// Why a lock of the registry's is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("{0:?} is no kind of lock that this version knows")]
    Kind(String),
    #[error("{0:?} is not a range of addresses")]
    Network(String),
}

/// A session, as far as it can be locked out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lockable<'s> {
    pub(crate) tenant: &'s TenantId,
    pub(crate) credential: PresentedCredential<'s>,
    /// `None`: a Unix socket.
    pub(crate) address: Option<IpAddr>,
}

impl Lock {
    /// Reads one of the registry's.
    ///
    /// # Errors
    /// When it is none that could be kept to.
    pub(crate) fn read(row: LockRow) -> Result<Lock, LockError> {
        let LockRow { id, kind, target, issuer, message, issued_before, expires_at, .. } = row;
        let target = match &*kind {
            "tenant" => Target::Tenant(target),
            "subject" => Target::Subject(target),
            "issuer" => Target::Issuer(target),
            "token" => Target::Token(target),
            "certificate" => Target::Certificate(target),
            "address" => {
                let alone = |_| target.parse::<IpAddr>().map(IpNet::from);
                let network = target.parse().or_else(alone);
                Target::Network(network.map_err(|_| LockError::Network(target.clone()))?)
            }
            _ => return Err(LockError::Kind(kind)),
        };
        let [issued_before, expires_at] = [issued_before, expires_at].map(|at| at.map(moment));
        Ok(Lock { id, issuer, message, issued_before, expires_at, target })
    }

    /// What those who are kept out read, beside that they are.
    pub(crate) fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// The tenant that it is on, if it is on one.
    pub(crate) fn tenant(&self) -> Option<TenantId> {
        match &self.target {
            Target::Tenant(id) => TenantId::parse(id).ok(),
            _ => None,
        }
    }

    /// As operators know it.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    fn covers(&self, credential: PresentedCredential<'_>, now: SystemTime) -> bool {
        let is_in_force = self.expires_at.is_none_or(|end| now < end);
        let issuer = self.issuer.as_deref().is_none_or(|issuer| credential.issuer == Some(issuer));
        // What does not say when it was issued cannot be of a later day.
        let early = self
            .issued_before
            .is_none_or(|before| credential.issued_at.is_none_or(|issued_at| issued_at < before));
        is_in_force && issuer && early
    }
}

/// What is too late to be said is far away: a lock that never ends does not end at once.
fn moment(seconds: f64) -> SystemTime {
    const FAR: Duration = Duration::from_secs(1 << 40);
    let since = match seconds > 0.0 {
        true => Duration::try_from_secs_f64(seconds).unwrap_or(FAR).min(FAR),
        false => Duration::ZERO,
    };
    UNIX_EPOCH + since
}

impl Locks {
    pub(crate) fn new() -> Locks {
        Locks { current: ArcSwap::default(), generation: watch::Sender::new(0) }
    }

    /// Puts these in force, in place of those before. Who subscribed is told if the change may be
    /// anybody's.
    pub(crate) fn replace<'l>(
        &self,
        locks: impl Iterator<Item = &'l Arc<Lock>>,
        is_anybodys: bool,
    ) {
        let mut table = Table::default();
        for lock in locks {
            let (into, key) = match &lock.target {
                Target::Tenant(id) => (&mut table.tenants, id),
                Target::Subject(name) => (&mut table.subjects, name),
                Target::Issuer(issuer) => (&mut table.issuers, issuer),
                Target::Token(id) => (&mut table.tokens, id),
                Target::Certificate(name) => (&mut table.certificates, name),
                Target::Network(network) => {
                    table.networks.push((*network, Arc::clone(lock)));
                    continue;
                }
            };
            into.entry(key.clone()).or_default().push(Arc::clone(lock));
        }
        self.current.store(Arc::new(table));
        if is_anybodys {
            self.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// The lock that keeps a session out at this moment, if one does.
    pub(crate) fn on(&self, session: Lockable<'_>, now: SystemTime) -> Option<Arc<Lock>> {
        let table = self.current.load();
        let Lockable { tenant, credential, address } = session;
        let of = |locks: &HashMap<String, Vec<Arc<Lock>>>, key: Option<&str>| {
            let locks = locks.get(key?)?;
            locks.iter().find(|lock| lock.covers(credential, now)).cloned()
        };
        let certificate = credential.issuer.is_none().then_some(credential.subject);
        of(&table.tenants, Some(tenant.as_str()))
            .or_else(|| of(&table.subjects, Some(credential.subject)))
            .or_else(|| of(&table.issuers, credential.issuer))
            .or_else(|| of(&table.tokens, credential.token_id))
            .or_else(|| of(&table.certificates, certificate))
            .or_else(|| {
                // An IPv4 client of a listener for both comes as an IPv6 address.
                let address = address?.to_canonical();
                let mut networks = table.networks.iter();
                let of = |(network, lock): &&(IpNet, Arc<Lock>)| {
                    network.contains(&address) && lock.covers(credential, now)
                };
                networks.find(of).map(|(_, lock)| Arc::clone(lock))
            })
    }

    /// Changes with each replacement that may be anybody's, after it is in place.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(kind: &str, target: &str) -> LockRow {
        LockRow {
            id: format!("{kind} {target}"),
            revision: 1,
            kind: kind.to_owned(),
            target: target.to_owned(),
            issuer: None,
            message: None,
            issued_before: None,
            expires_at: None,
        }
    }

    fn id(text: &str) -> TenantId {
        TenantId::parse(text).expect("an id")
    }

    /// The id of the lock that keeps a session out.
    fn kept_out(rows: Vec<LockRow>, session: Lockable<'_>) -> Option<String> {
        let locks = Locks::new();
        let all: Vec<_> =
            rows.into_iter().map(|row| Arc::new(Lock::read(row).expect("a lock"))).collect();
        locks.replace(all.iter(), true);
        locks.on(session, UNIX_EPOCH + Duration::from_secs(1000)).map(|lock| lock.id().to_owned())
    }

    #[test]
    fn each_kind_locks_what_it_names_and_nothing_else() {
        let (acme, globex) = (id("acme"), id("globex"));
        let token = PresentedCredential {
            issuer: Some("https://a"),
            subject: "ann",
            token_id: Some("t1"),
            issued_at: Some(UNIX_EPOCH + Duration::from_secs(100)),
        };
        let address = Some(IpAddr::from([10, 1, 2, 3]));
        let ann = Lockable { tenant: &acme, credential: token, address };
        let holder =
            PresentedCredential { issuer: None, subject: "dns:ann", token_id: None, ..token };
        let certified = Lockable { credential: holder, ..ann };
        for (kind, target, session, is_kept_out) in [
            ("tenant", "acme", ann, true),
            ("tenant", "globex", ann, false),
            ("tenant", "acme", Lockable { tenant: &globex, ..ann }, false),
            ("subject", "ann", ann, true),
            ("subject", "bob", ann, false),
            ("subject", "dns:ann", certified, true),
            ("issuer", "https://a", ann, true),
            ("issuer", "https://a", certified, false),
            ("token", "t1", ann, true),
            ("token", "ann", ann, false),
            ("token", "t1", certified, false),
            ("certificate", "dns:ann", certified, true),
            ("certificate", "ann", ann, false),
            ("address", "10.1.0.0/16", ann, true),
            ("address", "10.1.2.3", ann, true),
            ("address", "10.2.0.0/16", ann, false),
            ("address", "0.0.0.0/0", Lockable { address: None, ..ann }, false),
            (
                "address",
                "10.1.2.3/32",
                Lockable { address: Some("::ffff:10.1.2.3".parse().expect("one")), ..ann },
                true,
            ),
        ] {
            let found = kept_out(vec![lock("subject", "nobody"), lock(kind, target)], session);
            assert_eq!(found.is_some(), is_kept_out, "{kind} {target} {session:?}");
        }
        // Whose subject, until when, and issued before when.
        let locked = |change: fn(&mut LockRow)| {
            let mut row = lock("subject", "ann");
            change(&mut row);
            kept_out(vec![row], ann).is_some()
        };
        assert!(locked(|row| row.issuer = Some("https://a".to_owned())));
        assert!(!locked(|row| row.issuer = Some("https://b".to_owned())));
        assert!(locked(|row| row.expires_at = Some(1000.5)));
        assert!(locked(|row| row.expires_at = Some(f64::INFINITY)));
        assert!(locked(|row| row.issued_before = Some(f64::INFINITY)));
        assert!(!locked(|row| row.expires_at = Some(-1.0)));
        assert!(!locked(|row| row.expires_at = Some(1000.0)));
        assert!(locked(|row| row.issued_before = Some(100.5)));
        assert!(!locked(|row| row.issued_before = Some(100.0)));
    }

    #[test]
    fn what_cannot_be_kept_to_is_told() {
        assert!(matches!(Lock::read(lock("colour", "red")), Err(LockError::Kind(_))));
        assert!(matches!(Lock::read(lock("address", "here")), Err(LockError::Network(_))));
    }

    #[test]
    fn a_replacement_is_told_and_is_whole() {
        let locks = Locks::new();
        let told = locks.subscribe();
        let acme = id("acme");
        let credential =
            PresentedCredential { issuer: None, subject: "ann", token_id: None, issued_at: None };
        let ann = Lockable { tenant: &acme, credential, address: None };
        let lock = Arc::new(Lock::read(lock("tenant", "acme")).expect("a lock"));
        locks.replace([&lock].into_iter(), true);
        assert!(told.has_changed().expect("open") && locks.on(ann, UNIX_EPOCH).is_some());
        locks.replace([].into_iter(), false);
        assert_eq!(*told.borrow(), 1, "told where it may be anybody's");
        assert!(locks.on(ann, UNIX_EPOCH).is_none());
    }
}
