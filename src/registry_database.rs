//! A PostgreSQL database, as the source of the registry.
//!
//! One connection: it listens first, then reads what is newer than what was read before, then waits
//! to be told, or for the heartbeat, and reads again. So nothing falls between a reading and the
//! next, and a connection that has died silently is noticed by the heartbeat, which asks on it. What
//! is lost is made anew, with growing pauses; until then the snapshot ages. Where the login is leased,
//! the next connection is made before the lease of this one ends. Of many changes at once the result
//! is read.
//!
//! From time to time all that is held is compared with a digest of the database's: a difference is
//! a fault of ours or of somebody's hand, is logged as an error, and everything is read again.
//!
//! An entry that is not acceptable makes its tenant none, is told once and read again with each
//! change: what was in its way may have gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use pgsilo_core::backoff::Backoff;
use pgsilo_core::clock::BootTime;
use pgsilo_core::file::{MAX_SECRET, read as read_file};
use pgsilo_core::registry::{Change, News, Rejected, Snapshot};
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::TenantId;
use pgsilo_core::timeline::Timeline;
use pgsilo_registry::connection::{Database, Login};
use pgsilo_registry::read::{
    Again, ClusterRow, Digest, Position, ReadError, Reader, Reading, TenantRow,
};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use crate::lease::{LeaseError, Lessor, OwnLease};
use crate::metrics::{self, Outcome};
use crate::registry::{Grant, Lock, Registry, RegistryFile};

/// How often the connection is asked whether it still is one.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Between readings.
const PAUSE: Duration = Duration::from_millis(10);
/// Between comparisons with the database's digest.
const COMPARE: Duration = Duration::from_secs(600);
/// How many entries that were rejected are read again with a change.
const AGAIN: usize = 1000;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// Before that is tried again.
const REPLACE_RETRY: Duration = Duration::from_secs(1);

/// Where the registry's database is, and who asks there.
#[derive(Debug)]
pub struct Settings {
    /// The database.
    pub database: Database,
    /// As whom it is read.
    pub login: LoginSource,
    /// What this proxy is called there.
    pub name: String,
}

/// As whom the registry is read.
#[derive(Debug)]
pub enum LoginSource {
    /// A role that OpenBAO makes.
    Lease {
        /// Where the database engine is mounted.
        mount: String,
        /// Its role there.
        role: String,
    },
    /// A role that is there, with its password in a file: read at each login.
    Password {
        /// The role.
        user: String,
        /// The file.
        file: PathBuf,
    },
}

/// What the registry is read from.
#[derive(Debug)]
pub enum RegistrySource {
    /// A file.
    File(RegistryFile),
    /// A PostgreSQL database.
    Database(Box<RegistryDatabase>),
}

/// The registry's database. Followed for as long as the process lives.
#[derive(Debug)]
pub struct RegistryDatabase {
    settings: Settings,
    /// All is to be compared now.
    compare: Notify,
}

/// Why the registry cannot be read now.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no credential for it: {0}")]
    Lease(#[from] LeaseError),
    #[error("no password for it: {0}")]
    Password(String),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("what was read is not what is there: everything is read again")]
    Differs,
    #[error("it is empty, and the one that was read is not: is it another one?")]
    Empty,
    #[error("the task that reads it over was abandoned")]
    Abandoned,
}

/// A connection, and the lease of its login.
struct Link {
    // In the order in which they are dropped.
    reader: Reader,
    lease: Option<OwnLease>,
}

/// What has been read so far.
#[derive(Debug, Default)]
struct Held {
    /// Up to where; `None`: nothing.
    position: Option<Position>,
    /// The highest timeline that a server of the registry was on; `None`: it has one server.
    timeline: Option<Timeline>,
    /// The revision of each row, for the digest.
    rows: BTreeMap<&'static str, HashMap<Box<str>, i64>>,
    /// The locks, by id.
    locks: HashMap<String, Arc<Lock>>,
    /// Something was rejected that was not read: everything is to be.
    is_to_read_again: bool,
    /// The grants, by id.
    grants: HashMap<String, Arc<Grant>>,
    /// What was told of entries that are not acceptable, by kind and id.
    rejected: HashMap<Name, String>,
}

/// Whom a change of locks is about.
struct LockChange {
    is_anybodys: bool,
    tenants: HashSet<TenantId>,
}

/// The kind of an entry and its id, as a rejection has them.
type Name = (&'static str, String);

const CLUSTER: &str = "cluster";
const TENANT: &str = "tenant";
const CLUSTERS: &str = "clusters";
const TENANTS: &str = "tenants";
const GRANTS: &str = "grants";
const LOCKS: &str = "locks";
const KINDS: [&str; 4] = [CLUSTERS, TENANTS, GRANTS, LOCKS];

impl RegistryDatabase {
    /// Asks nothing yet.
    pub fn new(settings: Settings) -> RegistryDatabase {
        RegistryDatabase { settings, compare: Notify::new() }
    }

    /// Has everything compared with what the database says, now.
    pub(crate) fn compare_now(&self) {
        self.compare.notify_one();
    }

    /// Keeps the registry as the database has it, until this is dropped.
    pub(crate) async fn follow(&self, registry: &Registry, lessor: &Lessor) {
        let mut held = Held::default();
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        loop {
            let mut was_well = false;
            let Err(failure) = self.follow_once(registry, lessor, &mut held, &mut was_well).await;
            if was_well {
                // What has failed since then is news.
                retry.reset();
            }
            registry.mark_stale();
            metrics::REGISTRY_RELOADS.of(Outcome::Error).increment(1);
            if matches!(failure, Failure::Differs) {
                tracing::error!(error = %failure, "the registry in force was not its database's");
                held.position = None;
            } else {
                tracing::error!(error = %failure, "the registry cannot be read; what was read stays in force");
            }
            sleep(retry.pause()).await;
        }
    }

    /// `was_well` is set once there is nothing left to be done but to wait.
    async fn follow_once(
        &self,
        registry: &Registry,
        lessor: &Lessor,
        held: &mut Held,
        was_well: &mut bool,
    ) -> Result<Infallible, Failure> {
        let mut link = self.connect(lessor, held.revision(), held.timeline).await?;
        held.timeline = held.timeline.max(link.reader.timeline());
        let mut next: Option<BoxFuture<'_, Result<Link, Failure>>> = None;
        let mut replace_after = Instant::now();
        let mut compared = Instant::now();
        let mut is_to_compare = held.position.is_some();
        let mut may_be_current = false;
        loop {
            let asked = BootTime::now();
            if !(may_be_current && held.is_current(&link.reader).await?) {
                self.read(registry, held, &mut link.reader).await?;
            }
            registry.mark_fresh(asked);
            if is_to_compare || compared.elapsed() > COMPARE {
                is_to_compare = !held.compare(&mut link.reader).await?;
                compared = Instant::now();
            }
            *was_well = true;
            if next.is_none() && link.is_ending() && Instant::now() >= replace_after {
                next = Some(Box::pin(self.connect(lessor, held.revision(), held.timeline)));
            }
            // Of many changes at once the result is read.
            sleep(PAUSE).await;
            may_be_current = true;
            tokio::select! {
                () = link.reader.changed() => may_be_current = false,
                () = self.compare.notified() => is_to_compare = true,
                () = link.ending(replace_after), if next.is_none() => {}
                connected = set(&mut next) => {
                    next = None;
                    match connected {
                        // It listens from now on: what came before is to be read.
                        Ok(connected) => {
                            (link, is_to_compare) = (connected, true);
                            held.timeline = held.timeline.max(link.reader.timeline());
                        }
                        // There is time left.
                        Err(error) => {
                            tracing::warn!(%error, "the registry's next connection cannot be made yet");
                            replace_after = Instant::now() + REPLACE_RETRY;
                        }
                    }
                }
                () = sleep(HEARTBEAT) => {}
            }
        }
    }

    /// Reads what is newer, if anything is, and puts it in force.
    async fn read(
        &self,
        registry: &Registry,
        held: &mut Held,
        reader: &mut Reader,
    ) -> Result<(), Failure> {
        let reading = reader.read(held.position.as_ref(), &held.rejected()).await?;
        if held.position.as_ref() == Some(&reading.position) {
            return Ok(());
        }
        let revision = reading.position.revision;
        let (is_whole, is_empty) = (reading.is_whole, reading.tenants.is_empty());
        if is_whole && is_empty && !registry.snapshot().is_empty() {
            return Err(Failure::Empty);
        }
        self.apply(registry, held, reading).await?;
        reader.tell(revision).await?;
        Ok(())
    }

    /// A connection that listens, to a registry that can be read.
    async fn connect(
        &self,
        lessor: &Lessor,
        revision: Option<i64>,
        least: Option<Timeline>,
    ) -> Result<Link, Failure> {
        let Settings { database, login, name, .. } = &self.settings;
        let (login, lease) = match login {
            LoginSource::Lease { mount, role } => {
                // What keeps it from being logged in is told where that is tried.
                lessor.logged_in().await;
                let lease = lessor.lease_own(mount, role).await?;
                (lease.login(), Some(lease))
            }
            LoginSource::Password { user, file } => {
                let password = password(file).map_err(Failure::Password)?;
                (Login { user: user.clone(), password }, None)
            }
        };
        let reader = Reader::connect(database, &login, name, revision, least).await?;
        Ok(Link { reader, lease })
    }

    /// Puts what was read in force. That can take seconds, which others need not wait for.
    async fn apply(
        &self,
        registry: &Registry,
        held: &mut Held,
        reading: Reading,
    ) -> Result<(), Failure> {
        if reading.has_lost_history {
            tracing::error!(
                revision = reading.position.revision,
                "the registry is not the one that was read: it was restored, or has lost its newest \
                 changes in a failover; everything is read again"
            );
        }
        // First: who is kept out is so from the first moment of what is said of tenants.
        if let Some(change) = held.take_locks(&reading) {
            registry.locks().replace(held.locks.values(), change.is_anybodys);
            registry.tell_changed(change.tenants);
        }
        let granted = held.take_grants(&reading);
        if !granted.is_empty() || reading.is_whole {
            registry.grants().replace(held.grants.values());
            registry.tell_changed(granted);
        }
        let position = reading.position.clone();
        let before = registry.snapshot();
        let mut taken = std::mem::take(held);
        let made = spawn_blocking(move || {
            let change = taken.change(reading, &before);
            (taken, change)
        });
        let (taken, Change { snapshot, changed, .. }) =
            made.await.map_err(|_gone| Failure::Abandoned)?;
        *held = taken;
        registry.replace_changed(snapshot, changed);
        metrics::REGISTRY_RELOADS.of(Outcome::Ok).increment(1);
        metrics::REGISTRY_REVISION.set(position.revision as f64);
        metrics::REGISTRY_REJECTED.set(held.rejected.len() as f64);
        let is_to_read_again = std::mem::take(&mut held.is_to_read_again);
        held.position = (!is_to_read_again).then_some(position);
        Ok(())
    }
}

/// Waits for a future; for ever if there is none.
async fn set<T>(future: &mut Option<BoxFuture<'_, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl Link {
    /// Whether its lease ends, and the next must be made.
    fn is_ending(&self) -> bool {
        self.lease.as_ref().is_some_and(OwnLease::is_ending)
    }

    /// Resolves when that is so, but not before then. Has the lease renewed meanwhile.
    async fn ending(&self, not_before: Instant) {
        let Some(lease) = &self.lease else { return pending().await };
        lease.ending().await;
        sleep_until(not_before).await;
    }
}

impl Held {
    /// Up to which revision there was read.
    fn revision(&self) -> Option<i64> {
        self.position.as_ref().map(|position| position.revision)
    }

    /// Whether nothing is newer than what was read.
    async fn is_current(&self, reader: &Reader) -> Result<bool, ReadError> {
        match &self.position {
            Some(position) => reader.is_current(position).await,
            None => Ok(false),
        }
    }

    /// What is to be read again: of very many, some.
    fn rejected(&self) -> Again {
        let mut again = Again::default();
        for (kind, id) in self.rejected.keys().take(AGAIN) {
            let of_kind = if *kind == CLUSTER { &mut again.clusters } else { &mut again.tenants };
            of_kind.push(id.clone());
        }
        again
    }

    /// What a reading makes of the snapshot.
    fn change(&mut self, reading: Reading, before: &Snapshot) -> Change {
        let is_whole = reading.is_whole;
        let names = |reading: &Reading| -> HashSet<Name> {
            let clusters = reading.clusters.iter().map(|row| (CLUSTER, row.name.clone()));
            let tenants = reading.tenants.iter().map(|row| (TENANT, row.id.clone()));
            clusters.chain(tenants).collect()
        };
        let read = (!is_whole).then(|| names(&reading));
        let (news, unread) = self.take(reading, before);
        // What an entry names would be a file of ours: it names none.
        let none = |_: &Path| PathBuf::new();
        let ids = self.rows.get(TENANTS);
        let is_id = |word: &str| ids.is_some_and(|ids| ids.contains_key(word));
        let mut change = before.change(news, &is_id, &none);
        let rejected = std::mem::take(&mut change.rejected);
        self.reject(rejected.into_iter().chain(unread), read.as_ref());
        change
    }

    /// Takes a reading over: entries that are new before those that were rejected before, and what is
    /// gone. Returns those, too, of which nothing can be read.
    fn take(&mut self, reading: Reading, before: &Snapshot) -> (News, Vec<Rejected>) {
        let (mut news, mut unread) = (News::default(), Vec::new());
        if reading.is_whole {
            self.rows.clear();
            self.rejected.clear();
            news.tenants_gone.extend(before.tenants().map(|tenant| tenant.id().clone()));
            news.clusters_gone.extend(before.cluster_names().map(str::to_owned));
        }
        for gone in reading.gone {
            let Some(kind) = KINDS.into_iter().find(|kind| **kind == gone.kind) else { continue };
            self.rows.entry(kind).or_default().remove(&*gone.key);
            match kind {
                TENANTS => {
                    self.rejected.remove(&(TENANT, gone.key.clone()));
                    news.tenants_gone.extend(TenantId::parse(&gone.key));
                }
                CLUSTERS => {
                    self.rejected.remove(&(CLUSTER, gone.key.clone()));
                    news.clusters_gone.push(gone.key);
                }
                _ => {}
            }
        }
        let mut again = Vec::new();
        for ClusterRow { name, revision, entry } in reading.clusters {
            let into = [&mut news.clusters, &mut again];
            if let Err(rejected) = self.take_entry(CLUSTERS, (CLUSTER, name), revision, entry, into)
            {
                news.clusters_gone.push(rejected.id.clone());
                unread.push(rejected);
            }
        }
        news.clusters.append(&mut again);
        let mut again = Vec::new();
        for TenantRow { id, revision, entry } in reading.tenants {
            let into = [&mut news.tenants, &mut again];
            if let Err(rejected) = self.take_entry(TENANTS, (TENANT, id), revision, entry, into) {
                news.tenants_gone.extend(TenantId::parse(&rejected.id));
                unread.push(rejected);
            }
        }
        news.tenants.append(&mut again);
        for row in &reading.grants {
            self.hold(GRANTS, &row.id, row.revision);
        }
        for row in &reading.locks {
            self.hold(LOCKS, &row.id, row.revision);
        }
        (news, unread)
    }

    /// Puts an entry among those that are new, or among those that were read again.
    fn take_entry<T>(
        &mut self,
        table: &'static str,
        name: Name,
        revision: i64,
        entry: Result<T, serde_json::Error>,
        [new, again]: [&mut Vec<T>; 2],
    ) -> Result<(), Rejected> {
        let is_new = self.hold(table, &name.1, revision);
        if is_new {
            self.rejected.remove(&name);
        }
        match entry {
            Ok(entry) if is_new => new.push(entry),
            Ok(entry) => again.push(entry),
            Err(error) => {
                let ((kind, id), field) = (name, "entry".to_owned());
                return Err(Rejected { kind, id, field, what: error.to_string() });
            }
        }
        Ok(())
    }

    /// Remembers the revision of a row. Whether it is another than before.
    fn hold(&mut self, kind: &'static str, key: &str, revision: i64) -> bool {
        self.rows.entry(kind).or_default().insert(key.into(), revision) != Some(revision)
    }

    /// Takes over what a reading says of locks. Returns whom it is about, if anything has changed.
    fn take_locks(&mut self, reading: &Reading) -> Option<LockChange> {
        let rows = reading.locks.iter().map(|row| (&row.id, Lock::read(row.clone())));
        let changed = take_rows(&mut self.locks, reading, LOCKS, rows, |id, error| {
            tracing::error!(id, %error, "the registry's lock cannot be kept to");
        });
        let is_anybodys = changed.iter().any(|lock| lock.tenant().is_none());
        let tenants = changed.iter().filter_map(|lock| lock.tenant()).collect();
        (!changed.is_empty()).then_some(LockChange { is_anybodys, tenants })
    }

    /// Takes over what a reading says of grants. Returns the tenants that it is about.
    fn take_grants(&mut self, reading: &Reading) -> HashSet<TenantId> {
        let rows = reading.grants.iter().map(|row| (&row.id, Grant::read(row.clone())));
        let changed = take_rows(&mut self.grants, reading, GRANTS, rows, |id, error| {
            tracing::error!(id, %error, "the registry's grant gives nobody anything");
        });
        changed.iter().map(|grant| grant.tenant().clone()).collect()
    }

    /// Remembers what was rejected, and tells of it once. `read` is what was read, if not everything was.
    fn reject(&mut self, rejected: impl Iterator<Item = Rejected>, read: Option<&HashSet<Name>>) {
        let before = std::mem::take(&mut self.rejected);
        for Rejected { kind, id, field, what } in rejected {
            let name = (kind, id);
            let said = format!("{field}: {what}");
            if before.get(&name).is_none_or(|told| *told != said) {
                tracing::error!(
                    kind, id = name.1, %field, error = %what,
                    "the registry's entry cannot be, and is not served"
                );
            }
            self.is_to_read_again |= read.is_some_and(|read| !read.contains(&name));
            self.rejected.insert(name, said);
        }
        // What was not read is what it was.
        let unread =
            before.into_iter().filter(|(name, _)| read.is_some_and(|read| !read.contains(name)));
        for (name, said) in unread {
            self.rejected.entry(name).or_insert(said);
        }
    }

    /// Compares what was read with the database's digest. Whether it could: where something has changed
    /// meanwhile, the next reading tells of that first.
    async fn compare(&self, reader: &mut Reader) -> Result<bool, Failure> {
        let theirs = reader.digest().await?;
        if self.revision() != Some(theirs.revision) {
            return Ok(false);
        }
        let rows = self
            .rows
            .iter()
            .flat_map(|(kind, rows)| rows.iter().map(|(key, revision)| (*kind, &**key, *revision)));
        let is_same = Digest::of(theirs.revision, rows) == theirs;
        let outcome = if is_same { Outcome::Ok } else { Outcome::Error };
        metrics::REGISTRY_COMPARISONS.of(outcome).increment(1);
        if is_same { Ok(true) } else { Err(Failure::Differs) }
    }
}

/// A line. Blocks, for a small file, on the control runtime.
fn password(file: &Path) -> Result<Secret, String> {
    let bytes = read_file(file, MAX_SECRET).map_err(|error| format!("{file:?}: {error}"))?;
    let bytes = Secret::new(bytes);
    let text = bytes.expose_text().map_err(|_| format!("{file:?} is not text"))?;
    Ok(Secret::new(text.trim()))
}

/// Takes over what a reading says of one kind of rows, of which those that cannot be read are told and
/// are none. Returns those that are new, and those that are not there any more.
fn take_rows<'r, T, E>(
    held: &mut HashMap<String, Arc<T>>,
    reading: &Reading,
    kind: &str,
    rows: impl Iterator<Item = (&'r String, Result<T, E>)>,
    tell: impl Fn(&str, E),
) -> Vec<Arc<T>> {
    let mut changed = Vec::new();
    if reading.is_whole {
        changed.extend(held.drain().map(|(_, row)| row));
    }
    let gone = reading.gone.iter().filter(|gone| gone.kind == kind);
    changed.extend(gone.filter_map(|gone| held.remove(&gone.key)));
    for (id, row) in rows {
        match row {
            Ok(row) => {
                let row = Arc::new(row);
                changed.push(Arc::clone(&row));
                changed.extend(held.insert(id.clone(), row));
            }
            Err(error) => {
                tell(id, error);
                changed.extend(held.remove(id));
            }
        }
    }
    changed
}
