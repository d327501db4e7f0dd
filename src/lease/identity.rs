//! Who pgsilo is to OpenBAO: one login at a time for new leases, followed by the next before it
//! ends, while the old one lives on for the leases that it asked for.
//!
//! Logging in is single-flight: however many sessions find the login dead, one asks.

use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as Lock, PoisonError, RwLock, Weak};
use std::time::Duration;

use pgsilo_core::backoff::Backoff;
use pgsilo_core::clock::BootTime;
use pgsilo_core::file::{self, MAX_SECRET};
use pgsilo_core::secret::Secret;
use pgsilo_core::stamp::Stamp;
use pgsilo_openbao::{Error, Token};
use tokio::sync::{Mutex, Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use super::Auth;
use super::fitness::check;
use super::login::{Login, TokenState};
use super::server::{LoginError, Server};
use crate::metrics::{self, Outcome};

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// How often the files of a login method are looked at for a change.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Identity {
    server: Arc<Server>,
    auth: &'static Auth,
    /// The login for new leases, or why there is none.
    current: RwLock<Result<Arc<Login>, String>>,
    /// There may be another one.
    logged_in: Notify,
    logging_in: Mutex<()>,
    /// No more logins: pgsilo is stopping.
    closing: AtomicBool,
    /// Every login that may still hold leases.
    all: Lock<Vec<Weak<Login>>>,
    /// The method's file as it was for the newest login.
    read: Lock<Option<Stamps>>,
    /// A secret id that was unwrapped: its wrapping token works once.
    unwrapped: Mutex<Option<Unwrapped>>,
    /// Logins that are under way, abandoned ones included.
    under_way: Lock<JoinSet<()>>,
}

#[derive(Debug)]
struct Unwrapped {
    wrapping_token: Secret,
    secret_id: Secret,
}

impl Identity {
    pub(super) fn new(server: Arc<Server>, auth: &'static Auth) -> Identity {
        Identity {
            server,
            auth,
            current: RwLock::new(Err("the first login is under way".to_owned())),
            logged_in: Notify::new(),
            logging_in: Mutex::new(()),
            closing: AtomicBool::new(false),
            all: Lock::default(),
            read: Lock::default(),
            unwrapped: Mutex::default(),
            under_way: Lock::default(),
        }
    }

    /// The login to ask with, or why there is none.
    pub(super) fn login(&self) -> Result<Arc<Login>, String> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner).clone()?;
        match current.state() {
            TokenState::Invalid => Err("OpenBAO no longer knows pgsilo's token".to_owned()),
            TokenState::Expiring { at, .. } if at.remaining().is_zero() => {
                Err("pgsilo's token has ended".to_owned())
            }
            TokenState::Valid(_) | TokenState::Expiring { .. } => Ok(current),
        }
    }

    /// Waits until there is one.
    pub(super) async fn logged_in(&self) {
        loop {
            let mut set = pin!(self.logged_in.notified());
            set.as_mut().enable();
            if self.login().is_ok() {
                return;
            }
            set.await;
        }
    }

    fn set(&self, login: Result<Arc<Login>, String>) {
        if let Ok(login) = &login {
            let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|login| login.strong_count() > 0);
            all.push(Arc::downgrade(login));
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = login;
        self.logged_in.notify_waiters();
    }

    /// Keeps a login in force for as long as the process runs.
    pub(super) async fn maintain_login(self: Arc<Self>) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        while !self.is_closing() {
            let needed = match self.login() {
                Ok(login) => self.replacement_needed(&login).await,
                Err(_none) => LoginNeed::Initial,
            };
            match self.log_in(&needed).await {
                Ok(()) => retry.reset(),
                Err(error) => {
                    tracing::error!(%error, "cannot log in to OpenBAO: {}", advice(&error));
                    sleep(retry.pause().max(error.retry_after().unwrap_or_default())).await;
                }
            }
        }
    }

    /// Waits until a login should be followed: it nears its end, it is dead, or the file it
    /// came from has changed.
    async fn replacement_needed(&self, login: &Arc<Login>) -> LoginNeed {
        let mut state = login.watch();
        loop {
            if login.replacement_due().is_some_and(|due| due.remaining().is_zero()) {
                return LoginNeed::Replace(Arc::clone(login));
            }
            if self.stamp() != *self.read.lock().unwrap_or_else(PoisonError::into_inner) {
                return LoginNeed::Replace(Arc::clone(login));
            }
            let wait = login
                .replacement_due()
                .map_or(POLL_INTERVAL, |due| due.remaining().min(POLL_INTERVAL));
            tokio::select! {
                _ = state.changed() => {}
                () = sleep(wait) => {}
            }
        }
    }

    /// Changes when a file changes that a login reads.
    fn stamp(&self) -> Option<Stamps> {
        let own = self.auth.file().map(Stamp::of);
        Some((own.unwrap_or_default(), self.server.certificate_stamp()))
    }

    /// Logs in, unless another task has done so since `needed` was found.
    async fn log_in(self: &Arc<Self>, needed: &LoginNeed) -> Result<(), LoginError> {
        let _one_at_a_time = self.logging_in.lock().await;
        if self.is_closing() {
            return Ok(());
        }
        match (self.login(), needed) {
            (Ok(_), LoginNeed::Initial) => return Ok(()),
            (Ok(now), LoginNeed::Replace(then)) if !Arc::ptr_eq(&now, then) => return Ok(()),
            _ => {}
        }
        let (asked, stamp) = (BootTime::now(), self.stamp());
        let token = match self.server.present_certificate().await {
            Ok(()) => self.in_time().await,
            Err(error) => Err(error.into()),
        };
        // Only a file gives the same token twice: it was touched, or is not renewed.
        if let (Ok(token), LoginNeed::Replace(then)) = (&token, needed)
            && token.secret.expose() == then.secret().expose()
        {
            *self.read.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
            return match then.state() {
                TokenState::Valid(_) => Ok(()),
                TokenState::Expiring { .. } | TokenState::Invalid => Err(LoginError::SameToken),
            };
        }
        let outcome = if token.is_ok() { Outcome::Ok } else { Outcome::Error };
        metrics::OPENBAO_LOGINS.of(outcome).increment(1);
        match token {
            Ok(token) => {
                tracing::info!(ttl_seconds = token.ttl.as_secs(), "logged in to OpenBAO");
                if let Some(max) = token.explicit_max {
                    let max_seconds = max.as_secs();
                    tracing::warn!(
                        max_seconds,
                        "pgsilo's token has an explicit maximum, and every session under it ends then: a token_period alone would do"
                    );
                }
                *self.read.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
                self.set(Ok(Login::begin(token, asked, &self.server)));
                Ok(())
            }
            Err(error) => {
                if self.login().is_err() {
                    self.set(Err(error.to_string()));
                }
                Err(error)
            }
        }
    }

    /// A login, if it arrives in time. One that arrives too late is revoked: OpenBAO would keep it,
    /// unknown to pgsilo.
    async fn in_time(self: &Arc<Self>) -> Result<Token, LoginError> {
        let (answer, mut waiting) = oneshot::channel();
        let identity = Arc::clone(self);
        let asking = async move {
            let token = match identity.obtain().await {
                Ok(token) => token,
                Err(error) => return drop(answer.send(Err(error))),
            };
            // Its time began when it was made, not when it was looked at.
            let unused = match identity.examine(&token).await {
                Ok(explicit_max) => answer.send(Ok(Token { explicit_max, ..token })),
                Err(unfit) => answer.send(Err(unfit)).and(Err(Ok(token))),
            };
            if let Err(Ok(token)) = unused {
                identity.give_back(&token).await;
            }
        };
        {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            while under_way.try_join_next().is_some() {}
            under_way.spawn(asking);
        }
        if let Ok(Ok(answer)) = timeout(self.server.timeout(), &mut waiting).await {
            return answer;
        }
        waiting.close();
        // It may have come in this very moment.
        waiting.try_recv().unwrap_or(Err(Error::Timeout(String::new()).into()))
    }

    /// Whether a token can hold what pgsilo promises; the end of its life if it has one.
    async fn examine(&self, token: &Token) -> Result<Option<Duration>, LoginError> {
        check(&token.nature)?;
        if matches!(self.auth, Auth::TokenFile(_)) {
            return Ok(token.explicit_max);
        }
        let looked_up = self.server.look_up_self(token.secret.clone()).await?;
        check(&looked_up.nature)?;
        Ok(looked_up.explicit_max)
    }

    /// A file's token is its owner's.
    async fn give_back(&self, token: &Token) {
        if !matches!(self.auth, Auth::TokenFile(_)) {
            self.server.give_back(token).await;
        }
    }

    async fn obtain(&self) -> Result<Token, LoginError> {
        let server = &self.server;
        let token = match self.auth {
            Auth::AppRole { mount, role_id, secret_id_file, wrapped } => {
                let secret_id = read_line(secret_id_file).await?;
                match wrapped {
                    false => server.log_in_approle(mount, role_id, &secret_id).await,
                    true => {
                        let secret_id = self.unwrap(secret_id).await?;
                        server.log_in_approle(mount, role_id, &secret_id).await
                    }
                }
            }
            Auth::Jwt { mount, role, token_file } => {
                server.log_in_jwt(mount, role, &read_line(token_file).await?).await
            }
            Auth::Certificate { mount, role } => {
                server.log_in_certificate(mount, role.as_deref()).await
            }
            Auth::TokenFile(path) => server.look_up_self(read_line(path).await?).await,
        };
        token.map_err(LoginError::from)
    }

    /// Unwraps a response-wrapped secret id, once, and keeps it for later logins with the same
    /// file.
    async fn unwrap(&self, wrapping_token: Secret) -> Result<Secret, LoginError> {
        let mut unwrapped = self.unwrapped.lock().await;
        if let Some(known) = &*unwrapped
            && known.wrapping_token.expose() == wrapping_token.expose()
        {
            return Ok(known.secret_id.clone());
        }
        let secret_id = self.server.unwrap_secret_id(&wrapping_token).await?;
        *unwrapped = Some(Unwrapped { wrapping_token, secret_id: secret_id.clone() });
        Ok(secret_id)
    }

    /// After a 403: whether the login was dead and there is another one now.
    pub(super) async fn replace_if_dead(self: &Arc<Self>, used: &Arc<Login>) -> bool {
        let looked_up = self.server.look_up_self(used.secret().clone()).await;
        if !looked_up.is_err_and(|error| error.is_status(403)) {
            return false;
        }
        used.mark_invalid();
        self.log_in(&LoginNeed::Initial).await.is_ok()
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Revokes every token that pgsilo logged in for itself, and every lease with it. No other
    /// login follows.
    pub(super) async fn give_up(&self) {
        self.closing.store(true, Ordering::Release);
        // One that is under way is waited for, to be given up as well.
        drop(self.logging_in.lock().await);
        if matches!(self.auth, Auth::TokenFile(_)) {
            return;
        }
        let all: Vec<_> = {
            let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().filter_map(Weak::upgrade).collect()
        };
        for login in all {
            match self.server.revoke_self(login.secret()).await {
                Ok(()) => login.mark_invalid(),
                Err(error) => {
                    tracing::warn!(%error, "OpenBAO does not take a token of pgsilo back: its leases end with it");
                }
            }
        }
        // Abandoned logins revoke themselves.
        let mut under_way = {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *under_way)
        };
        while under_way.join_next().await.is_some() {}
    }
}

/// The files of a login: the method's own, and those of the client certificate.
type Stamps = (Stamp, Vec<Stamp>);

/// Which login is needed.
enum LoginNeed {
    /// There is none in force.
    Initial,
    /// This one is to be followed.
    Replace(Arc<Login>),
}

impl Auth {
    /// The file that the method reads.
    fn file(&self) -> Option<&Path> {
        match self {
            Auth::AppRole { secret_id_file: path, .. }
            | Auth::Jwt { token_file: path, .. }
            | Auth::TokenFile(path) => Some(path),
            Auth::Certificate { .. } => None,
        }
    }
}

async fn read_line(path: &Path) -> Result<Secret, LoginError> {
    let failed = |error| LoginError::File { path: path.to_owned(), error };
    let from = path.to_owned();
    let read =
        tokio::task::spawn_blocking(move || file::read(&from, MAX_SECRET).map(Zeroizing::new));
    let text = read.await.map_err(|error| failed(error.into()))?.map_err(failed)?;
    Ok(Secret::new(text.trim_ascii()))
}

/// What an operator can do about it.
fn advice(error: &LoginError) -> &'static str {
    let error = match error {
        LoginError::Asking(error) => error,
        LoginError::File { .. } => return "check the file that [openbao] auth names",
        LoginError::SameToken => {
            return "have [openbao] auth token_file renewed, or its sessions end";
        }
        LoginError::Unfit(_) => return "mend the role, or the token, that [openbao] auth names",
    };
    match error {
        Error::Said { status: 400, .. } => {
            "check the mount, the role and the secret that [openbao] auth names"
        }
        // A role that is locked out is told so even with the right secret.
        Error::Said { status: 403, .. } => {
            "check the mount, the role and the secret that [openbao] auth names, and that OpenBAO has \
             not locked the role out (sys/locked-users)"
        }
        Error::Said { status: 404, .. } => "is the auth method enabled there?",
        Error::Said { status: 503, .. } => "unseal it",
        Error::Said { .. } | Error::Database { .. } => "see its log",
        Error::Busy { .. } => "raise its rate limit quota",
        Error::Unreachable(_) | Error::Timeout(_) => {
            "check [openbao] address and ca, and that it runs"
        }
        Error::NotJson | Error::TooLong(_) => "is [openbao] address an OpenBAO server?",
        Error::Coded(_) => "have the gateway at [openbao] address leave answers as they are",
        Error::File { .. } => "check the files that [openbao] client_certificate names",
        Error::Client(_) => "check [openbao] ca and auth",
    }
}
