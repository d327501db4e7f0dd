//! OpenBAO's HTTP API, as far as pgsilo needs it: each request is one function.
//!
//! A small client of our own over a well-kept HTTP library: the client library for this API
//! drops lease ids and prints tokens in Debug. Nothing here reads a proxy from the environment
//! or prints a body that could hold a secret: only OpenBAO's `errors`. A redirect is followed
//! once, for a standby that names the active server, and never from https to http.

mod answers;
mod database;
mod shown;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::addresses::Addresses;
use pgsilo_core::backoff::Backoff;
use pgsilo_core::cause::root_cause;
use pgsilo_core::coding;
use pgsilo_core::file::{self, MAX_PEM};
use pgsilo_core::host::is_loopback;
use pgsilo_core::secret::Secret;
use pgsilo_core::stamp::Stamp;
use reqwest::header::{LOCATION, RETRY_AFTER};
use reqwest::{Certificate, Client, Identity, Method, Response, StatusCode, redirect};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::Settings;
use super::fitness::{Nature, Unfit};
use super::precedence::{LONGEST, Precedence};
use answers::{
    AuthAnswer, CountAnswer, CredsAnswer, Errors, LookupAnswer, RenewAnswer, UnwrapAnswer,
};
pub(crate) use database::{DatabaseFault, Fullness};
use shown::Shown;

/// Between attempts to give a token back that is not used.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// How often that is tried.
const GIVING_BACK: u32 = 5;
/// How often the client certificate is looked at under session authority.
const LOOK: Duration = Duration::from_secs(2);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// Room that no usual answer outgrows: growing would leave a copy of it behind.
const USUAL_ANSWER: usize = 16 * 1024;
/// How much of OpenBAO's own words goes to the log, in characters.
const MAX_WORDS: usize = 300;

/// What went wrong between pgsilo and OpenBAO.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenBaoError {
    /// An answer other than 2xx.
    #[error("it answered {status}{}{words}", if words.is_empty() { "" } else { ": " })]
    Said { status: u16, words: String },
    /// It could not make a credential at the tenant's database.
    #[error("it answered 500: {words}")]
    Database { fault: DatabaseFault, words: String },
    /// It is asked too often, and says when to come again, if it does.
    #[error("it answered 429{}{words}", if words.is_empty() { "" } else { ": " })]
    Busy { after: Option<Duration>, words: String },
    /// No connection, or one that broke.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("it did not answer in time{0}")]
    Timeout(String),
    /// An answer that is not what the API promises.
    #[error("its answer is not the JSON that was expected")]
    NotJson,
    /// An answer in a coding that was not asked for.
    #[error("its answer is compressed ({0}), which nobody asked for: is a gateway in between?")]
    Coded(String),
    /// An answer beyond any believable size.
    #[error("its answer is longer than 256 KiB")]
    TooLong,
    /// A file of the login method.
    #[error("cannot read {path:?}: {error}")]
    File { path: PathBuf, error: std::io::Error },
    /// A token is to be followed, and its file has no other.
    #[error("the token file still holds the token that ends soon")]
    SameToken,
    /// OpenBAO let pgsilo in, with a token that breaks promises.
    #[error("{0}")]
    Unfit(#[from] Unfit),
    /// The HTTP client cannot be made, or what is configured would not do.
    #[error("it cannot be asked as configured: {0}")]
    Client(String),
}

impl OpenBaoError {
    /// How long not to ask again, where it says that it is asked too often.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            OpenBaoError::Busy { after, .. } => Some(after.unwrap_or_default().min(LONGEST)),
            _ => None,
        }
    }
}

/// pgsilo's own token, with what OpenBAO said of it.
#[derive(Clone, Debug)]
pub(super) struct BaoToken {
    pub(super) secret: Secret,
    /// How long it lives unless renewed; zero: for ever.
    pub(super) ttl: Duration,
    pub(super) renewable: bool,
    pub(super) nature: Nature,
    /// What its life is bounded by, however often it is renewed, as far as that was said.
    pub(super) explicit_max: Option<Duration>,
}

/// A database credential and its lease.
pub(super) struct Granted {
    pub(super) lease_id: String,
    pub(super) duration: Duration,
    pub(super) renewable: bool,
    pub(super) username: String,
    pub(super) password: Secret,
}

#[derive(Debug)]
pub(super) struct OpenBao {
    http: Shown<Client>,
    addresses: Addresses,
    settings: &'static Settings,
    precedence: Precedence,
}

impl OpenBao {
    pub(super) fn new(settings: &'static Settings) -> Result<OpenBao, OpenBaoError> {
        let addresses = Addresses::default();
        let http = Shown::new(client(settings, &addresses)?);
        Ok(OpenBao { http, addresses, settings, precedence: Precedence::default() })
    }

    /// Who asks first.
    pub(super) fn precedence(&self) -> &Precedence {
        &self.precedence
    }

    /// How long an answer is waited for.
    pub(super) fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    /// Reads the client certificate again, if one is shown.
    pub(super) async fn present_certificate(&self) -> Result<(), OpenBaoError> {
        if self.settings.identity.is_none() {
            return Ok(());
        }
        let (settings, addresses) = (self.settings, self.addresses.clone());
        let made = tokio::task::spawn_blocking(move || client(settings, &addresses)).await;
        let failed = |error: tokio::task::JoinError| OpenBaoError::Client(error.to_string());
        self.http.replace(made.map_err(failed)??);
        Ok(())
    }

    /// Changes when a file of the client certificate does.
    pub(super) fn certificate_stamp(&self) -> Vec<Stamp> {
        let files = self.settings.identity.iter().flat_map(|own| [&own.certificate, &own.key]);
        files.map(|path| Stamp::of(path)).collect()
    }

    /// Under session authority nobody logs in for pgsilo itself, so its certificate is looked
    /// after here.
    pub(super) async fn keep_certificate(self: Arc<Self>) {
        let mut read = self.certificate_stamp();
        loop {
            sleep(LOOK).await;
            let now = self.certificate_stamp();
            if now != read {
                match self.present_certificate().await {
                    Ok(()) => read = now,
                    Err(error) => tracing::warn!(%error, "the certificate before stays in use"),
                }
            }
        }
    }

    /// How long an answer is waited for that makes something: much longer than anybody waits for
    /// what it makes, as one that is lost on its way is a token or a lease without an owner.
    fn patience(&self) -> Option<Duration> {
        Some(self.settings.timeout * 6)
    }

    /// `GET sys/health`: the status that tells how it is. Of the server, not of a namespace; asked without a
    /// token, through whatever stands before it.
    pub(super) async fn health(&self) -> Result<u16, OpenBaoError> {
        let url = format!("{}/v1/sys/health?standbyok=true", self.settings.address);
        let asked = self.http.of(None).get(url).send().await;
        Ok(asked.map_err(|error| self.lost(error))?.status().as_u16())
    }

    /// `GET {mount}/creds/{role}`: a fresh credential.
    pub(super) async fn creds(&self, token: &Secret, path: &str) -> Result<Granted, OpenBaoError> {
        let request = self.request_within(self.patience(), Method::GET, path, Some(token), None);
        let body = request.await?;
        let answer: CredsAnswer = parse(&body)?;
        Ok(Granted {
            lease_id: answer.lease_id,
            duration: Duration::from_secs(answer.lease_duration),
            renewable: answer.renewable,
            username: answer.data.username,
            password: answer.data.password,
        })
    }

    /// `PUT sys/leases/renew`: how long the lease lives from now on, and whether it may be
    /// renewed again. Past its maximum OpenBAO gives less than it gave before.
    pub(super) async fn renew(
        &self,
        token: &Secret,
        lease_id: &str,
        increment: Duration,
    ) -> Result<(Duration, bool), OpenBaoError> {
        let body = json!({ "lease_id": lease_id, "increment": increment.as_secs() });
        let body = self.request(Method::PUT, "sys/leases/renew", Some(token), Some(&body)).await?;
        let answer: RenewAnswer = parse(&body)?;
        Ok((Duration::from_secs(answer.lease_duration), answer.renewable))
    }

    /// `PUT sys/leases/revoke`, asynchronously: OpenBAO retries by itself until it works.
    pub(super) async fn revoke(&self, token: &Secret, lease_id: &str) -> Result<(), OpenBaoError> {
        let body = json!({ "lease_id": lease_id, "sync": false });
        self.request(Method::PUT, "sys/leases/revoke", Some(token), Some(&body)).await?;
        Ok(())
    }

    /// `GET sys/leases/count?type=irrevocable`: of how many leases OpenBAO has given the revocation up.
    pub(super) async fn irrevocable_leases(&self, token: &Secret) -> Result<u64, OpenBaoError> {
        let path = "sys/leases/count?type=irrevocable";
        let body = self.request(Method::GET, path, Some(token), None).await?;
        Ok(parse::<CountAnswer>(&body)?.data.lease_count)
    }

    /// `POST auth/{mount}/login` of the AppRole method.
    pub(super) async fn log_in_approle(
        &self,
        mount: &str,
        role_id: &str,
        secret_id: &Secret,
    ) -> Result<BaoToken, OpenBaoError> {
        let secret_id = text(secret_id)?;
        self.log_in(mount, &json!({ "role_id": role_id, "secret_id": secret_id })).await
    }

    /// `POST auth/{mount}/login` of the JWT and Kubernetes methods.
    pub(super) async fn log_in_jwt(
        &self,
        mount: &str,
        role: &str,
        jwt: &Secret,
    ) -> Result<BaoToken, OpenBaoError> {
        self.log_in(mount, &json!({ "role": role, "jwt": text(jwt)? })).await
    }

    /// `POST auth/{mount}/login` of the certificate method.
    pub(super) async fn log_in_certificate(
        &self,
        mount: &str,
        role: Option<&str>,
    ) -> Result<BaoToken, OpenBaoError> {
        let http = self.http.newest();
        let made = self.log_in(mount, &json!({ "name": role })).await?;
        self.http.keep_for(&made.secret, made.ttl, http);
        Ok(made)
    }

    async fn log_in(
        &self,
        mount: &str,
        body: &serde_json::Value,
    ) -> Result<BaoToken, OpenBaoError> {
        let path = format!("auth/{mount}/login");
        let request = self.request_within(self.patience(), Method::POST, &path, None, Some(body));
        let body = request.await?;
        Ok(parse::<AuthAnswer>(&body)?.auth.into())
    }

    /// `POST sys/wrapping/unwrap`: the secret id that a wrapping token stands for.
    pub(super) async fn unwrap_secret_id(&self, wrapping: &Secret) -> Result<Secret, OpenBaoError> {
        let (path, body) = ("sys/wrapping/unwrap", json!({}));
        let request =
            self.request_within(self.patience(), Method::POST, path, Some(wrapping), Some(&body));
        let body = request.await?;
        Ok(parse::<UnwrapAnswer>(&body)?.data.secret_id)
    }

    /// `POST auth/token/renew-self`.
    pub(super) async fn renew_self(&self, token: &Secret) -> Result<BaoToken, OpenBaoError> {
        let path = "auth/token/renew-self";
        let body = self.request(Method::POST, path, Some(token), Some(&json!({}))).await?;
        let renewed = BaoToken::from(parse::<AuthAnswer>(&body)?.auth);
        self.http.prolong(token, renewed.ttl);
        Ok(renewed)
    }

    /// `GET auth/token/lookup-self`: what a token is, and how long it still lives.
    pub(super) async fn look_up_self(&self, token: Secret) -> Result<BaoToken, OpenBaoError> {
        let path = "auth/token/lookup-self";
        let body = self.request(Method::GET, path, Some(&token), None).await?;
        Ok(parse::<LookupAnswer>(&body)?.data.of(token))
    }

    /// Gives back a token that nothing was leased with, as best it can: it is tried a few times,
    /// and after that the token lives until its own end, as one that cannot be revoked does.
    pub(super) async fn give_back(&self, token: &BaoToken) {
        if !token.nature.is_revocable() {
            return;
        }
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        for _ in 1..GIVING_BACK {
            if self.revoke_self(&token.secret).await.is_ok() {
                return;
            }
            sleep(retry.pause()).await;
        }
        if let Err(error) = self.revoke_self(&token.secret).await {
            tracing::warn!(%error, "a token that pgsilo does not use is left to its own end");
        }
    }

    /// `POST auth/token/revoke-self`.
    pub(super) async fn revoke_self(&self, token: &Secret) -> Result<(), OpenBaoError> {
        let path = "auth/token/revoke-self";
        self.request(Method::POST, path, Some(token), Some(&json!({}))).await?;
        Ok(())
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        token: Option<&Secret>,
        body: Option<&serde_json::Value>,
    ) -> Result<Zeroizing<Vec<u8>>, OpenBaoError> {
        self.request_within(None, method, path, token, body).await
    }

    async fn request_within(
        &self,
        patience: Option<Duration>,
        method: Method,
        path: &str,
        token: Option<&Secret>,
        body: Option<&serde_json::Value>,
    ) -> Result<Zeroizing<Vec<u8>>, OpenBaoError> {
        let url = format!("{}/v1/{path}", self.settings.address);
        let response = self.send(patience, &method, &url, token, body).await?;
        let response = match self.redirect(&response, &url)? {
            Some(active) => self.send(patience, &method, &active, token, body).await?,
            None => response,
        };
        refuse_cached(&response)?;
        if let Some(coding) = coding::of(response.headers()) {
            return Err(OpenBaoError::Coded(coding));
        }
        self.read(response).await
    }

    async fn send(
        &self,
        patience: Option<Duration>,
        method: &Method,
        url: &str,
        token: Option<&Secret>,
        body: Option<&serde_json::Value>,
    ) -> Result<Response, OpenBaoError> {
        let mut request = self.http.of(token).request(method.clone(), url);
        request = request.header("X-Vault-Request", "true");
        if let Some(patience) = patience {
            request = request.timeout(patience);
        }
        if let Some(namespace) = &self.settings.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            request = request.header("X-Vault-Token", header_value(token)?);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let answered = request.send().await.map_err(|error| self.lost(error))?;
        self.addresses.served(answered.remote_addr());
        Ok(answered)
    }

    async fn read(&self, mut response: Response) -> Result<Zeroizing<Vec<u8>>, OpenBaoError> {
        let (status, after) = (response.status(), retry_after(&response));
        let mut answer = Zeroizing::new(Vec::with_capacity(USUAL_ANSWER));
        while let Some(chunk) = response.chunk().await.map_err(|error| self.lost(error))? {
            if answer.len() + chunk.len() > MAX_ANSWER {
                return Err(OpenBaoError::TooLong);
            }
            answer.extend_from_slice(&chunk);
        }
        match status.is_success() {
            true => Ok(answer),
            false => Err(said(status, after, &answer)),
        }
    }

    /// The library's errors print the URL and, further down, the cause.
    fn lost(&self, error: reqwest::Error) -> OpenBaoError {
        let tried = self.addresses.failed();
        if error.is_timeout() {
            return OpenBaoError::Timeout(tried);
        }
        OpenBaoError::Unreachable(root_cause(&error.without_url()) + &tried)
    }

    /// Where a standby says that the active server is. The same request goes there, its token
    /// with it, so only TLS will do, or loopback for who is on loopback already.
    fn redirect(&self, response: &Response, from: &str) -> Result<Option<String>, OpenBaoError> {
        let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
        let (StatusCode::TEMPORARY_REDIRECT, Some(Ok(to))) =
            (response.status(), location.map(reqwest::Url::parse))
        else {
            return Ok(None);
        };
        let stays_local = from.starts_with("http:") && to.host_str().is_some_and(is_loopback);
        match to.scheme() {
            "https" => Ok(Some(to.into())),
            "http" if stays_local => Ok(Some(to.into())),
            scheme => Err(OpenBaoError::Said {
                status: StatusCode::TEMPORARY_REDIRECT.as_u16(),
                words: format!("a redirect to {scheme} is not followed; mend its api_addr"),
            }),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the client for OpenBAO")]
fn client(settings: &Settings, addresses: &Addresses) -> Result<Client, OpenBaoError> {
    let failed = |error: reqwest::Error| OpenBaoError::Client(error.without_url().to_string());
    let mut builder = Client::builder()
        .timeout(settings.timeout)
        // Shared by a host's addresses, and half of it is left for the question.
        .connect_timeout(settings.timeout / 2)
        .dns_resolver(addresses.clone())
        // A node that vanished leaves connections behind that answer nothing. So a request waits on one
        // for no longer than its time, and none is used again that has been idle for so long: whoever
        // comes after the first that waited in vain gets a new one.
        .tcp_user_timeout(settings.timeout)
        .tcp_keepalive(settings.timeout)
        .tcp_keepalive_interval(settings.timeout)
        .pool_idle_timeout(settings.timeout)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .pool_max_idle_per_host(settings.max_concurrent_requests)
        .tcp_nodelay(true)
        .default_headers(coding::asks_for_none())
        .user_agent(concat!("pgsilo/", env!("CARGO_PKG_VERSION")));
    if let Some(pem) = &settings.ca {
        builder = builder.tls_certs_only(Certificate::from_pem_bundle(pem).map_err(failed)?);
    }
    if let Some(socket) = &settings.socket {
        builder = builder.unix_socket(socket.as_path());
    }
    if let Some(identity) = &settings.identity {
        let read = |path: &PathBuf| {
            let bytes = file::read(path, MAX_PEM);
            bytes.map_err(|error| OpenBaoError::File { path: path.clone(), error })
        };
        let mut pem = Zeroizing::new(read(&identity.certificate)?);
        pem.push(b'\n');
        pem.extend_from_slice(&Zeroizing::new(read(&identity.key)?));
        builder = builder.identity(Identity::from_pem(&pem).map_err(failed)?);
    }
    builder.build().map_err(failed)
}

/// An agent with a cache gives the answer to one session's request to the next one's, too: two
/// sessions would have one lease, and it would be gone for both when the first of them ends.
fn refuse_cached(response: &Response) -> Result<(), OpenBaoError> {
    let cache = response.headers().get("x-cache").and_then(|cache| cache.to_str().ok());
    match cache.is_some_and(|cache| cache.trim_start().to_ascii_uppercase().starts_with("HIT")) {
        true => Err(OpenBaoError::Client(
            "the agent at [openbao] address answers from its cache; turn that off".into(),
        )),
        false => Ok(()),
    }
}

/// A secret as JSON wants it.
fn text(secret: &Secret) -> Result<&str, OpenBaoError> {
    std::str::from_utf8(secret.expose())
        .map_err(|_invalid| OpenBaoError::Client("the secret is not text".into()))
}

fn header_value(token: &Secret) -> Result<reqwest::header::HeaderValue, OpenBaoError> {
    let mut value = reqwest::header::HeaderValue::from_bytes(token.expose())
        .map_err(|_invalid| OpenBaoError::Client("the token is not one line of text".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, OpenBaoError> {
    serde_json::from_slice(body).map_err(|_error| OpenBaoError::NotJson)
}

/// In seconds, as OpenBAO says it (RFC 9110, 10.2.3).
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn said(status: StatusCode, after: Option<Duration>, body: &[u8]) -> OpenBaoError {
    let errors = parse::<Errors>(body).map(|answer| answer.errors).unwrap_or_default();
    let all = errors.join("; ").split_whitespace().collect::<Vec<_>>().join(" ");
    let words = all.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect();
    if status == StatusCode::TOO_MANY_REQUESTS {
        return OpenBaoError::Busy { after, words };
    }
    let failed = (status == StatusCode::INTERNAL_SERVER_ERROR).then(|| database::fault(&all));
    match failed.flatten() {
        Some(fault) => OpenBaoError::Database { fault, words },
        None => OpenBaoError::Said { status: status.as_u16(), words },
    }
}
