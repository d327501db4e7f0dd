//! Leases: database credentials from OpenBAO, each for one session, revoked when that ends.
//!
//! Invariant: a credential that OpenBAO gave out has one owner, which sessions have through a
//! [`Lease`], and dropping that owner hands the lease's id to the revoker, whatever became of the
//! session in between. Only the session's `Leased` stage asks for a lease, and the pool for a later
//! session.
//!
//! # The life of a lease
//!
//! 1. *Requested.* A session waits for one of `max_concurrent_requests` places and for OpenBAO's
//!    answer, for no longer than `[openbao] timeout` in all. Requests for one tenant take an eighth
//!    of the places at most, those for one cluster's tenants a quarter: a database, or a server, that
//!    hangs delays no other. The request runs on a task of its own and is seen to its end: if the
//!    session has gone, dropping the answer revokes the lease. With `scope = "window"` sessions of
//!    one subject share a lease (`window.rs`), until the last has ended.
//! 2. *Renewed* at about two thirds of its time, with jitter, until its maximum (`renewer.rs`). A
//!    lease has no task and no timer of its own: the session that holds it starts the renewal when
//!    that is due, and the renewal runs in the background. An idle connection's lease is not
//!    renewed.
//! 3. *Revoked* when it is dropped: asynchronously (`sync: false`, which OpenBAO retries), at most
//!    16 at once, tried again until the lease would have ended by itself (`revoker.rs`). No
//!    revocation is turned away; while `max_pending_revocations` wait, no lease is requested.
//!    OpenBAO's revocation statement drops the role, and ends its sessions that still run.
//! 4. *Ended with its token*, whatever becomes of pgsilo. A lease is a child of the OpenBAO token
//!    that requested it: pgsilo's own login, or under session authority a token made of the
//!    client's for that lease alone. So make these tokens short and periodic.
//!
//! # The life of a login
//!
//! A token that OpenBAO would end by itself takes its sessions with it, so it is refused at the
//! login (`fitness.rs`). A login is renewed, from a quarter of its time on, for as long as a lease
//! holds it. One that nears its maximum is followed by another, and its sessions are ended before
//! it ends (`login.rs`, `identity.rs`). A login whose answer comes too late is given back.
//!
//! # When OpenBAO fails
//!
//! What fails is tried again after pauses that grow and differ, so that not all requests come in
//! one moment when OpenBAO is back (`backoff.rs` in `crates/core`). Where it answers that it is
//! asked too often (429), the next attempt waits for what `Retry-After` says, up to 30 s (less
//! where a lease or a login has less time left), and so do new requests for the same role. Renewals
//! that got this answer go first: while one is to be tried again, no lease is requested, unless
//! none has got through for 30 s (`precedence.rs`). A failed renewal is an audit event of its
//! session, and so is the first that works again.

mod fitness;
mod given_up;
mod health;
mod identity;
mod login;
mod own;
mod precedence;
mod renewer;
mod revoker;
mod server;
mod window;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::pending;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use pgsilo_core::backoff::spread;
use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::ClusterKey;
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::{Access, TenantId};
use pgsilo_openbao::{Granted, OpenBao, Token};
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;
use tokio::sync::{AcquireError, Semaphore};
use tokio::time::{Instant as Deadline, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

pub(crate) use health::Trouble;
pub(crate) use own::OwnLease;
pub(crate) use pgsilo_openbao::{DatabaseFault, Error as OpenBaoError, FullScope};
pub(crate) use renewer::LeaseEnd;

use crate::audit::{self, Asker, SessionId};
use crate::metrics;
use fitness::Unfit;
use health::Health;
use identity::Identity;
use login::Login;
use renewer::Renewer;
use revoker::{Revocation, Revoker};
use server::{Server, retry_after};
use window::{Sharers, Windows};

/// How long OpenBAO is waited for when it is to make another connection.
const RECONNECT: Duration = Duration::from_millis(300);

/// As whom OpenBAO is asked, for what and how often; made by [`crate::config`].
#[derive(Debug)]
pub struct Settings {
    /// Whose authority leases are asked for with.
    pub authority: Authority,
    /// How long a lease is shared with sessions that begin after its own; `None`: never.
    pub window: Option<Duration>,
    /// Leases asked for at once.
    pub max_concurrent_requests: usize,
    /// Leases that may wait to be revoked before no more are asked for.
    pub max_pending_revocations: usize,
}

/// Whose authority leases are asked for with.
#[derive(Debug)]
pub enum Authority {
    /// pgsilo's own.
    Proxy(Auth),
    /// The client's: its session token is exchanged for an OpenBAO token, which reads only its
    /// tenant's credentials. pgsilo itself has no login at OpenBAO.
    Session {
        /// Where the JWT method is mounted: `jwt`.
        mount: String,
        /// The method's role for each access.
        roles: BTreeMap<Access, String>,
    },
}

/// A login method. Files are read at each login, and a change of one is a reason to log in.
#[derive(Debug)]
pub enum Auth {
    /// A role id and a secret id.
    AppRole {
        /// Where it is mounted: `approle`.
        mount: String,
        /// The role's public id.
        role_id: String,
        /// A file that holds the secret id.
        secret_id_file: PathBuf,
        /// The file holds a wrapping token instead.
        wrapped: bool,
    },
    /// A JWT of pgsilo's own, or a Kubernetes service account's.
    Jwt {
        /// Where it is mounted: `jwt`, `kubernetes`.
        mount: String,
        /// The method's role.
        role: String,
        /// A file that holds the JWT.
        token_file: PathBuf,
    },
    /// The client certificate that is shown to OpenBAO.
    Certificate {
        /// Where it is mounted: `cert`.
        mount: String,
        /// The method's role; `None`: whichever fits.
        role: Option<String>,
    },
    /// A file that holds an OpenBAO token, as `bao agent` writes it.
    TokenFile(PathBuf),
}

/// A database role's name and password, as OpenBAO made them for one session.
#[derive(Debug)]
pub(crate) struct Credential {
    username: Arc<str>,
    password: Secret,
}

impl Credential {
    /// The role's name, to be shared.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.username
    }

    /// The role's name; not secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
    }

    /// Its password, for the login and nothing else.
    pub(crate) fn password(&self) -> &Secret {
        &self.password
    }
}

/// A session's hold on a credential. The credential is in force until the last hold is dropped;
/// there is only one, unless `lease.scope` says otherwise.
#[derive(Debug)]
pub(crate) struct Lease(Arc<LeaseInner>);

/// A credential that is in force until this is dropped.
#[derive(Debug)]
struct LeaseInner {
    credential: Credential,
    renewer: Arc<Renewer>,
    asker: Asker,
    /// The login was made for this lease alone, and goes with it.
    with_login: bool,
    revoker: Revoker,
}

/// Why no credential could be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// Another attempt may succeed.
    #[error("OpenBAO: {0}")]
    Unavailable(OpenBaoError),
    /// An operator must act.
    #[error("OpenBAO: {0}")]
    Denied(OpenBaoError),
    /// OpenBAO could not make one at the tenant's database.
    #[error("OpenBAO: {error}")]
    Database { fault: DatabaseFault, error: OpenBaoError },
    /// The session's login breaks promises.
    #[error("OpenBAO: {0}")]
    Unfit(Unfit),
    /// pgsilo itself has no OpenBAO token.
    #[error("not logged in to OpenBAO: {0}")]
    NotLoggedIn(String),
    /// No role of the JWT method is configured for this access.
    #[error("[lease.session] roles has none for {0} access")]
    NoRole(Access),
    /// Earlier requests for the same credentials, or too many for others, are still under way.
    #[error("OpenBAO: earlier requests are still waiting for its answer")]
    Crowded,
    /// OpenBAO is asked too often, and others come first, or it said when to come again.
    #[error("OpenBAO is asked too often: no credential is asked for within the next {} s", .0.as_secs_f32().ceil())]
    Held(Duration),
    /// OpenBAO does not revoke leases: with more of them, more would stay unrevoked.
    #[error("OpenBAO: {0} leases wait to be revoked, no more are asked for")]
    Unrevoked(usize),
    /// The session that asked for all of a window was told so.
    #[error("{0}")]
    Shared(Arc<LeaseError>),
    /// The cluster has failed over meanwhile: the credential would be one of its primary before.
    #[error("the cluster has failed over while OpenBAO was asked for a credential")]
    Overtaken,
    /// The task that asked was cancelled: the runtime is going down.
    #[error("the request to OpenBAO was abandoned")]
    Abandoned,
}

impl LeaseError {
    /// What it is where it was shared.
    pub(crate) fn at_bottom(&self) -> &LeaseError {
        match self {
            LeaseError::Shared(error) => error,
            error => error,
        }
    }

    /// What has no connection left, where the database said that to OpenBAO.
    pub(crate) fn full_scope(&self) -> Option<FullScope> {
        match self.at_bottom() {
            LeaseError::Database { fault: DatabaseFault::Full(scope), .. } => Some(*scope),
            _ => None,
        }
    }

    /// Whether OpenBAO was asked and did not answer in time.
    pub(crate) fn is_unanswered(&self) -> bool {
        matches!(self.at_bottom(), LeaseError::Unavailable(OpenBaoError::Timeout(_)))
    }

    /// Whether the cause may be the tenant's database: OpenBAO was told
    /// so, or does not say why, or is waited for while it may be trying.
    pub(crate) fn may_be_the_databases(&self) -> bool {
        match self.at_bottom() {
            LeaseError::Unavailable(
                OpenBaoError::Said { status: 500, .. } | OpenBaoError::Timeout(_),
            )
            | LeaseError::Database { fault: DatabaseFault::Away, .. }
            | LeaseError::Crowded => true,
            LeaseError::Unavailable(_)
            | LeaseError::Database { .. }
            | LeaseError::Denied(_)
            | LeaseError::Unfit(_)
            | LeaseError::NotLoggedIn(_)
            | LeaseError::NoRole(_)
            | LeaseError::Held(_)
            | LeaseError::Unrevoked(_)
            | LeaseError::Shared(_)
            | LeaseError::Overtaken
            | LeaseError::Abandoned => false,
        }
    }
}

/// Where leases come from. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lessor {
    server: Arc<Server>,
    health: Health,
    source: Source,
    revoker: Revoker,
    windows: Option<Windows>,
    /// Nobody's requests take all slots: a database or a server that hangs must not keep others waiting.
    lines: Arc<Mutex<HashMap<Line, Weak<Semaphore>>>>,
    slots: Arc<Semaphore>,
    slot_count: usize,
    /// How long a session waits for an answer.
    patience: Duration,
    runtime: Handle,
}

/// Where the login for a lease comes from.
#[derive(Clone, Debug)]
enum Source {
    Proxy(Arc<Identity>),
    Session(JwtMethod),
}

/// OpenBAO's method for sessions' tokens: where it is mounted, and its role for each access.
#[derive(Clone, Copy, Debug)]
struct JwtMethod {
    mount: &'static str,
    roles: &'static BTreeMap<Access, String>,
}

/// As whom a lease is requested. Which it is follows from [`Settings::authority`], so only a
/// [`Lessor`] makes one. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Authorization(Whom);

#[derive(Clone, Debug)]
enum Whom {
    Proxy(Arc<Identity>),
    Session(JwtMethod, Arc<Secret>),
}

impl Authorization {
    /// A hash of the session's token, where the lease is asked for with that.
    pub(crate) fn token(&self) -> Option<[u8; 32]> {
        match &self.0 {
            Whom::Proxy(_) => None,
            Whom::Session(_, token) => Some(token.sha256()),
        }
    }
}

/// What a lease is asked for, and on whose behalf.
#[derive(Debug)]
pub(crate) struct Request<'r> {
    pub(crate) tenant: &'r TenantId,
    /// Where its database is.
    pub(crate) cluster: &'r ClusterKey,
    pub(crate) mount: &'r str,
    pub(crate) role: &'r str,
    pub(crate) access: Access,
    /// For the audit trail; `None`: for a prewarmed connection.
    pub(crate) session: Option<SessionId>,
    /// Whose session it is; `None`: of none yet. Only sessions of one subject share a lease.
    pub(crate) subject: Option<Subject<'r>>,
    /// As whom.
    pub(crate) authorization: Authorization,
    /// Cancelled once the answer would be worth nothing; `None`: it always is.
    pub(crate) until: Option<CancellationToken>,
}

/// Whose requests take a part of all slots at most.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Line {
    Tenant(TenantId),
    Cluster(ClusterKey),
    /// pgsilo's own, by their path.
    Own(String),
}

/// A role of the database engine, and where that is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Role {
    mount: String,
    name: String,
    /// At which cluster its credentials are made, if it is a tenant's.
    cluster: Option<ClusterKey>,
}

impl Role {
    /// Where its credentials are.
    fn path(&self) -> String {
        format!("{}/creds/{}", self.mount, self.name)
    }
}

/// Whose a session is: who says so, if that is an issuer, and the name.
pub(crate) type Subject<'r> = (Option<&'r str>, &'r str);

impl Lessor {
    /// Starts its tasks (login, revocation) on `runtime`. They talk to OpenBAO in the background:
    /// that it is down is no reason not to start. A session waits for the client's timeout.
    pub(crate) fn start(settings: &'static Settings, openbao: OpenBao, runtime: Handle) -> Lessor {
        let patience = openbao.timeout();
        let server = Arc::new(Server::new(openbao));
        let revoker = Revoker::new(Arc::clone(&server), settings.max_pending_revocations, &runtime);
        let source = match &settings.authority {
            Authority::Proxy(auth) => {
                let identity = Arc::new(Identity::new(Arc::clone(&server), auth));
                runtime.spawn(Arc::clone(&identity).maintain_login());
                runtime.spawn(given_up::watch(Arc::clone(&identity), Arc::clone(&server)));
                Source::Proxy(identity)
            }
            Authority::Session { mount, roles } => {
                runtime.spawn(Arc::clone(&server).watch_certificate());
                Source::Session(JwtMethod { mount, roles })
            }
        };
        let slots = Arc::new(Semaphore::new(settings.max_concurrent_requests));
        let windows = settings.window.map(|length| Windows::new(length, runtime.clone()));
        let (lines, slot_count) = (Arc::default(), settings.max_concurrent_requests);
        let health = Health::default();
        runtime.spawn(health.clone().watch(Arc::clone(&server)));
        Lessor {
            server,
            health,
            source,
            revoker,
            windows,
            lines,
            slots,
            slot_count,
            patience,
            runtime,
        }
    }

    /// Whether pgsilo is logged in to OpenBAO, as far as it knows.
    pub(crate) fn is_ready(&self) -> bool {
        match &self.source {
            Source::Proxy(identity) => identity.login().is_ok(),
            Source::Session(_) => true,
        }
    }

    /// Waits until pgsilo is logged in to OpenBAO; for ever where it has no login of its own.
    pub(crate) async fn logged_in(&self) {
        match &self.source {
            Source::Proxy(identity) => identity.logged_in().await,
            Source::Session(_) => std::future::pending().await,
        }
    }

    /// What keeps OpenBAO from making credentials, as far as it says so itself and it lasts.
    pub(crate) fn trouble(&self) -> Option<Trouble> {
        self.health.trouble()
    }

    /// As whom to ask for a session that was let in with this token.
    pub(crate) fn authorization(&self, token: Secret) -> Authorization {
        Authorization(match &self.source {
            Source::Proxy(identity) => Whom::Proxy(Arc::clone(identity)),
            Source::Session(method) => Whom::Session(*method, Arc::new(token)),
        })
    }

    /// As whom to ask without any session's token: pgsilo itself. `None` where each session asks
    /// with its own.
    pub(crate) fn own_authorization(&self) -> Option<Authorization> {
        match &self.source {
            Source::Proxy(identity) => Some(Authorization(Whom::Proxy(Arc::clone(identity)))),
            Source::Session(_) => None,
        }
    }

    /// A hold on a credential: a fresh one, or where it may be shared that of the window.
    pub(crate) async fn lease(&self, request: Request<'_>) -> Result<Lease, LeaseError> {
        let Request {
            tenant,
            cluster,
            mount,
            role,
            access,
            session,
            subject,
            authorization,
            until,
        } = request;
        let role =
            Role { mount: mount.to_owned(), name: role.to_owned(), cluster: Some(cluster.clone()) };
        let asker = Asker { tenant: Some(tenant.clone()), access, session };
        let held = match self.windows.as_ref().zip(subject) {
            None => self.clone().ask_on(role, asker, authorization, until).await.map(Arc::new)?,
            Some((windows, (issuer, name))) => {
                let sharers = Sharers {
                    tenant: tenant.clone(),
                    role: role.clone(),
                    access,
                    subject: (issuer.map(Into::into), name.into()),
                    token: authorization.token(),
                };
                let ask = || self.clone().ask_on(role, asker, authorization, until).boxed();
                windows.join(sharers, ask).await.map_err(LeaseError::Shared)?
            }
        };
        Ok(Lease(held))
    }

    /// A credential for pgsilo itself.
    pub(crate) async fn lease_own(&self, mount: &str, role: &str) -> Result<OwnLease, LeaseError> {
        let none = || LeaseError::NotLoggedIn("pgsilo has no login of its own".to_owned());
        let authorization = self.own_authorization().ok_or_else(none)?;
        let role = Role { mount: mount.to_owned(), name: role.to_owned(), cluster: None };
        let asker = Asker { tenant: None, access: Access::ReadOnly, session: None };
        let held = self.clone().ask_on(role, asker, authorization, None).await?;
        Ok(OwnLease(Lease(Arc::new(held))))
    }

    /// Has OpenBAO drop its connection to a tenant's database, and make another. Not under session
    /// authority: it is pgsilo's own login that may.
    ///
    /// # Errors
    /// When OpenBAO refuses that. One that does not answer soon does it all the same: it waits
    /// for what is under way on the connection before.
    pub(crate) async fn reconnect(&self, mount: &str, connection: &str) -> Result<(), LeaseError> {
        let Source::Proxy(identity) = &self.source else { return Ok(()) };
        let login = identity.login().map_err(LeaseError::NotLoggedIn)?;
        let asking = self.server.reset_connection(login.secret(), mount, connection);
        match timeout(RECONNECT, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_elapsed) => Ok(()),
        }
    }

    /// Asks for a credential: `GET {mount}/creds/{role}`. Waiting in line and for the answer has
    /// one bound; a request that was sent is completed even if the session has gone.
    async fn ask_on(
        self,
        role: Role,
        asker: Asker,
        authorization: Authorization,
        until: Option<CancellationToken>,
    ) -> Result<LeaseInner, LeaseError> {
        if self.revoker.is_full() {
            return Err(LeaseError::Unrevoked(self.revoker.pending()));
        }
        let (path, deadline) = (role.path(), Deadline::now() + self.patience);
        self.give_way(&path, deadline).await?;
        let in_line = async {
            let line = match &asker.tenant {
                Some(tenant) => Line::Tenant(tenant.clone()),
                None => Line::Own(path.clone()),
            };
            let own = self.line(line, 8).acquire_owned().await?;
            let clusters = match &role.cluster {
                Some(cluster) => {
                    Some(self.line(Line::Cluster(cluster.clone()), 4).acquire_owned().await?)
                }
                None => None,
            };
            Ok((own, clusters, Arc::clone(&self.slots).acquire_owned().await?))
        };
        let places = match timeout_at(deadline, in_line).await {
            Ok(Ok(places)) => places,
            Ok(Err::<_, AcquireError>(_closed)) => return Err(LeaseError::Abandoned),
            Err(_elapsed) => return Err(LeaseError::Crowded),
        };
        let asking = self.runtime.clone().spawn(async move {
            let mut asking = pin!(self.ask(&role, asker, authorization, deadline));
            let overtaken = async {
                match until {
                    Some(until) => until.cancelled_owned().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                // The permits are returned when the lease has an owner or is revoked.
                held = &mut asking => return held.map(|held| (held, places)),
                () = overtaken => {}
            }
            // Others need not wait for what is worth nothing; it is revoked when it comes.
            drop(places);
            drop(asking.await);
            Err(LeaseError::Overtaken)
        });
        match timeout_at(deadline, asking).await {
            Ok(Ok(result)) => result.map(|(held, _places)| held),
            Ok(Err(_cancelled)) => Err(LeaseError::Abandoned),
            Err(_elapsed) => Err(LeaseError::Unavailable(OpenBaoError::Timeout(String::new()))),
        }
    }

    /// Waits until it may be asked for a role's credentials, if that is in time.
    async fn give_way(&self, path: &str, deadline: Deadline) -> Result<(), LeaseError> {
        while let Some(wait) = self.server.precedence().wait(path) {
            if Deadline::now() + wait > deadline {
                return Err(LeaseError::Held(wait));
            }
            // Those who waited do not all come in one moment.
            sleep(wait.mul_f64(1.0 + spread() / 10.0)).await;
        }
        Ok(())
    }

    /// One line, with so large a part of all slots.
    fn line(&self, line: Line, part: usize) -> Arc<Semaphore> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&line).and_then(Weak::upgrade) {
            return line;
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let made = Arc::new(Semaphore::new((self.slot_count / part).max(1)));
        lines.insert(line, Arc::downgrade(&made));
        made
    }

    async fn ask(
        self,
        asked_for: &Role,
        asker: Asker,
        Authorization(whom): Authorization,
        deadline: Deadline,
    ) -> Result<LeaseInner, LeaseError> {
        let (began, asked) = (Instant::now(), BootTime::now());
        let with_login = matches!(whom, Whom::Session(..));
        let result = match whom {
            Whom::Proxy(identity) => self.ask_as_proxy(&identity, asked_for).await,
            Whom::Session(JwtMethod { mount, roles }, token) => {
                let access = asker.access;
                let role = roles.get(&access).ok_or(LeaseError::NoRole(access))?;
                let asked = BootTime::now();
                let login = self.server.log_in_jwt(mount, role, &token).await;
                drop(token);
                match login {
                    Ok(login) => self.ask_as_session(login, asked, asked_for, deadline).await,
                    Err(error) => Err(error.into()),
                }
            }
        };
        metrics::LEASE_TIME.record(began.elapsed());
        if let Err(LeaseError::Unavailable(error)) = &result
            && let Some(after) = retry_after(error)
        {
            self.server.precedence().role_waits(&asked_for.path(), after);
        }
        let (granted, login) = result?;
        metrics::LEASES.increment(1);
        audit::leased(&asker, &granted.username, &granted.lease_id);
        let duration = granted.duration;
        let end = LeaseEnd {
            at: asked + duration,
            duration,
            is_final: !granted.renewable,
            failure: None,
        };
        let lease_id = granted.lease_id.into();
        let renewer = Renewer::new(self.server, login, lease_id, self.runtime, end);
        let credential =
            Credential { username: granted.username.into(), password: granted.password };
        Ok(LeaseInner { credential, renewer, asker, with_login, revoker: self.revoker })
    }

    /// A 403 means a dead token or a forbidden path. Only the former is worth a second try.
    async fn ask_as_proxy(
        &self,
        identity: &Arc<Identity>,
        role: &Role,
    ) -> Result<Grant, LeaseError> {
        let login = identity.login().map_err(LeaseError::NotLoggedIn)?;
        let error = match self.creds(&login, role).await {
            Err(error) if error.is_status(403) => error,
            other => return Ok((other?, login)),
        };
        if !identity.replace_if_dead(&login).await {
            return Err(LeaseError::Denied(error));
        }
        let login = identity.login().map_err(LeaseError::NotLoggedIn)?;
        Ok((self.creds(&login, role).await?, login))
    }

    /// The login that the session's own token became is for this lease alone, and goes with it. One
    /// that arrived too late, or that breaks promises, is revoked at once.
    async fn ask_as_session(
        &self,
        login: Token,
        asked: BootTime,
        role: &Role,
        deadline: Deadline,
    ) -> Result<Grant, LeaseError> {
        let fit = match Deadline::now() > deadline {
            true => Err(OpenBaoError::Timeout(String::new()).into()),
            false => fitness::check(&login.nature).map_err(LeaseError::Unfit),
        };
        let error = match fit {
            Ok(()) => {
                let kept = Login::begin(login.clone(), asked, &self.server);
                match self.creds(&kept, role).await {
                    Ok(granted) => return Ok((granted, kept)),
                    Err(error) => error.into(),
                }
            }
            Err(error) => error,
        };
        // The session is told meanwhile.
        let server = Arc::clone(&self.server);
        self.runtime.spawn(async move { server.give_back(&login).await });
        Err(error)
    }

    async fn creds(&self, login: &Login, role: &Role) -> Result<Granted, OpenBaoError> {
        self.server.creds(login.secret(), &role.mount, &role.name).await
    }

    /// The registry says something else of these tenants: no later session shares a lease that was
    /// asked for before.
    pub(crate) fn forget_tenants(&self, changed: &HashSet<TenantId>) {
        if let Some(windows) = &self.windows {
            windows.forget_tenants(changed);
        }
    }

    /// Some leases may be of a server that is the primary no more: no later session shares one that was
    /// asked for before.
    pub(crate) fn forget_windows(&self) {
        if let Some(windows) = &self.windows {
            windows.forget();
        }
    }

    /// Waits until no request is under way, then gives up pgsilo's own logins: one request that
    /// revokes every lease at once. Where there is none to give up, or OpenBAO does not take it,
    /// waits until the leases that were handed back are revoked one by one. Each takes a third of
    /// `patience` at most.
    pub(crate) async fn close(&self, patience: Duration) {
        if let Some(windows) = &self.windows {
            windows.forget();
        }
        let all = u32::try_from(self.slot_count).unwrap_or(u32::MAX);
        let _granted_and_handed_back = timeout(patience / 3, self.slots.acquire_many(all)).await;
        if let Source::Proxy(identity) = &self.source
            && timeout(patience / 3, identity.give_up()).await.is_err()
        {
            tracing::warn!("OpenBAO does not take pgsilo's token back: its leases end with it");
        }
        if timeout(patience / 3, self.revoker.idle()).await.is_err() {
            let pending = self.revoker.pending();
            tracing::warn!(pending, "stopping with leases that are not revoked one by one");
            self.revoker.give_up().await;
        }
    }
}

/// What OpenBAO granted, and the login that it was granted to.
type Grant = (Granted, Arc<Login>);

impl From<OpenBaoError> for LeaseError {
    fn from(error: OpenBaoError) -> LeaseError {
        match error {
            OpenBaoError::Said { status: 400..=499, .. } => LeaseError::Denied(error),
            OpenBaoError::Said { .. }
            | OpenBaoError::Unreachable(_)
            | OpenBaoError::Timeout(_)
            | OpenBaoError::NotJson
            | OpenBaoError::Coded(_)
            | OpenBaoError::Busy { .. }
            | OpenBaoError::TooLong(_) => LeaseError::Unavailable(error),
            OpenBaoError::Database { fault, .. } => LeaseError::Database { fault, error },
            OpenBaoError::File { .. } | OpenBaoError::Client(_) => LeaseError::Denied(error),
        }
    }
}

impl Lease {
    /// For the login, and nothing else.
    pub(crate) fn credential(&self) -> &Credential {
        &self.0.credential
    }

    /// Renews it in the background if it is time to. Returns when it ends, and when to call this
    /// again if nothing [has changed](Lease::changed) sooner. Its holder must.
    pub(crate) fn poll_renewal(&self) -> (LeaseEnd, Option<BootTime>) {
        self.0.renewer.poll_renewal()
    }

    /// Resolve when [`Lease::poll_renewal`] has something new to return; created before that call,
    /// they miss nothing. Two, not one future of both: a session holds them for as long as it is
    /// idle.
    pub(crate) fn changed(&self) -> (Notified<'_>, Notified<'_>) {
        self.0.renewer.changed()
    }
}

impl Drop for LeaseInner {
    fn drop(&mut self) {
        self.renewer.stop();
        let renewer = Arc::clone(&self.renewer);
        let (asker, role) = (self.asker.clone(), Arc::clone(self.credential.name()));
        self.revoker.revoke(Revocation { renewer, asker, role, with_login: self.with_login });
    }
}
