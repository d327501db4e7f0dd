//! How OpenBAO is asked: over an HTTP client of our own, with a bound on everything.
//!
//! A [`Request`] is what an endpoint says of itself, made ready to be sent; an [`Answer`] is what
//! came back, whatever its status. The callers decide what follows from it.

#![expect(clippy::disallowed_types, reason = "it has the client for OpenBAO")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgsilo_core::addresses::Addresses;
use pgsilo_core::cause::root_cause;
use pgsilo_core::coding;
use pgsilo_core::file::{self, MAX_PEM};
use pgsilo_core::host::is_loopback;
use pgsilo_core::secret::Secret;
use pgsilo_core::stamp::Stamp;
use reqwest::header::{CONTENT_TYPE, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Certificate, Client, Identity, Method, Response, StatusCode, Url, redirect};
use rustify::Endpoint;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vaultrs::api::sys::requests::ReadHealthRequest;
use zeroize::Zeroizing;

use crate::answers::{Errors, seconds};
use crate::clients_by_token::ClientsByToken;
use crate::error::Error;
use crate::fault;
use crate::json;
use crate::settings::{Bounds, Settings};

/// Room that no usual answer outgrows: growing would leave a copy of it behind.
const USUAL_ANSWER: usize = 16 * 1024;

/// A server, or a cluster, of OpenBAO's, and how it is reached.
#[derive(Debug)]
pub struct OpenBao {
    http: ClientsByToken<Client>,
    base: Url,
    addresses: Addresses,
    namespace: Option<HeaderValue>,
    settings: Arc<Settings>,
}

/// What is asked. It has no Debug: its body may hold a secret.
pub(crate) struct Request {
    method: Method,
    /// Segments below `/v1/`.
    path: String,
    query: Option<String>,
    /// Wiped when it was sent.
    body: Bytes,
    /// How long its answer is waited for, if that is not the usual time.
    patience: Option<Duration>,
}

/// What was answered, whatever the status.
pub(crate) struct Answer {
    status: StatusCode,
    after: Option<Duration>,
    body: Zeroizing<Vec<u8>>,
    bounds: Bounds,
}

impl Request {
    /// What an endpoint says of itself.
    ///
    /// # Errors
    /// When it says no path, or one that would be another where it arrives.
    pub(crate) fn of(endpoint: &impl Endpoint) -> Result<Request, Error> {
        // Errors of these hold at most what JSON or a query cannot hold.
        let unfit = |_error| Error::Client("the request cannot be written".into());
        let body = endpoint.body().map_err(unfit)?.unwrap_or_default();
        Ok(Request {
            method: endpoint.method().into(),
            path: path(&endpoint.path())?,
            query: endpoint.query().map_err(unfit)?,
            body: Bytes::from_owner(Zeroizing::new(body)),
            patience: None,
        })
    }

    /// `POST` of a body that holds a secret. Of an endpoint's body rustify makes copies.
    ///
    /// # Errors
    /// As of [`of`](Request::of).
    pub(crate) fn post(to: &str, body: &impl Serialize) -> Result<Request, Error> {
        let unfit = |_error| Error::Client("the request cannot be written".into());
        Ok(Request {
            method: Method::POST,
            path: path(to)?,
            query: None,
            body: Bytes::from_owner(json::written(body).map_err(unfit)?),
            patience: None,
        })
    }

    /// The same, with a patience of its own.
    pub(crate) fn made_with(self, patience: Duration) -> Request {
        Request { patience: Some(patience), ..self }
    }

    fn url(&self, base: &Url) -> Result<Url, Error> {
        let mut url = base.clone();
        match url.path_segments_mut() {
            Ok(mut segments) => {
                segments.pop_if_empty().push("v1").extend(self.path.split('/'));
            }
            Err(()) => return Err(Error::Client("its address has no path".into())),
        }
        url.set_query(self.query.as_deref());
        Ok(url)
    }
}

#[cfg(test)]
impl Request {
    /// Its method, its URL and its body.
    pub(crate) fn shown(&self) -> String {
        let base = Url::parse("https://gateway.example/bao/").expect("a URL");
        let (url, body) = (self.url(&base).expect("a URL"), String::from_utf8_lossy(&self.body));
        format!("{} {url} {body}", self.method).trim_end().to_owned()
    }
}

impl Answer {
    /// Its body, where the status is 2xx.
    pub(crate) fn good(self) -> Result<Zeroizing<Vec<u8>>, Error> {
        match self.status.is_success() {
            true => Ok(self.body),
            false => Err(self.refused()),
        }
    }

    /// What it says, where the status is 2xx.
    pub(crate) fn parse<T: DeserializeOwned>(self) -> Result<T, Error> {
        serde_json::from_slice(&self.good()?).map_err(|_error| Error::NotJson)
    }

    fn errors(&self) -> Option<Vec<String>> {
        serde_json::from_slice::<Errors>(&self.body).ok().map(|answer| answer.errors)
    }

    /// OpenBAO's `errors`, in one line.
    fn refused(self) -> Error {
        let all = self.errors().unwrap_or_default().join("; ");
        let all = all.split_whitespace().collect::<Vec<_>>().join(" ");
        let words = all.chars().filter(|c| !c.is_control()).take(self.bounds.words).collect();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            return Error::Busy { after: self.after, words };
        }
        let failed = (self.status == StatusCode::INTERNAL_SERVER_ERROR).then(|| fault::fault(&all));
        match failed.flatten() {
            Some(fault) => Error::Database { fault, words },
            None => Error::Said { status: self.status.as_u16(), words },
        }
    }
}

/// What the control plane asks of an answer.
#[cfg(feature = "control")]
impl Answer {
    /// Whether there is no body.
    pub(crate) fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    /// Whether OpenBAO itself says that there is nothing: no entry of that name, or no engine
    /// there. A gateway that knows no such path says something else.
    pub(crate) fn is_nothing(&self) -> bool {
        let unrouted = |error: &String| error.starts_with("no handler for route");
        self.status == StatusCode::NOT_FOUND
            && self.errors().is_some_and(|errors| errors.iter().all(unrouted))
    }

    /// Whether it is an error of this status, and of these words alone.
    pub(crate) fn says(&self, status: u16, words: &str) -> bool {
        self.status.as_u16() == status && self.errors().is_some_and(|errors| errors == [words])
    }
}

impl OpenBao {
    /// Asks nothing yet.
    ///
    /// # Errors
    /// When the address would show tokens to a network, the namespace cannot be sent, or the HTTP
    /// client cannot be made of the settings.
    pub fn new(settings: Settings) -> Result<OpenBao, Error> {
        let base = Url::parse(&settings.address).ok().filter(is_private).ok_or_else(|| {
            let address = &settings.address;
            Error::Client(format!(
                "{address:?} would show credentials to the network: use https, or http on loopback"
            ))
        })?;
        let namespace = settings.namespace.as_deref().map(|name| {
            let unfit = |_invalid| Error::Client(format!("{name:?} is no namespace"));
            HeaderValue::from_str(name).map_err(unfit)
        });
        let namespace = namespace.transpose()?;
        let addresses = Addresses::default();
        let http = ClientsByToken::new(client(&settings, &addresses)?);
        Ok(OpenBao { http, base, addresses, namespace, settings: Arc::new(settings) })
    }

    /// How long an answer is waited for.
    pub fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    /// How long an answer is waited for that makes something: much longer than anybody waits for
    /// what it makes, as one that is lost on its way is a token or a lease without an owner.
    pub(crate) fn patience(&self) -> Duration {
        self.settings.timeout * 6
    }

    pub(crate) fn clients(&self) -> &ClientsByToken<Client> {
        &self.http
    }

    /// Reads the client certificate again, if one is shown.
    ///
    /// # Errors
    /// When it cannot be read, or is none: the one before stays in use.
    pub async fn present_certificate(&self) -> Result<(), Error> {
        if self.settings.identity.is_none() {
            return Ok(());
        }
        let (settings, addresses) = (Arc::clone(&self.settings), self.addresses.clone());
        let made = tokio::task::spawn_blocking(move || client(&settings, &addresses)).await;
        let failed = |error: tokio::task::JoinError| Error::Client(error.to_string());
        self.http.replace(made.map_err(failed)??);
        Ok(())
    }

    /// Changes when a file of the client certificate does.
    pub fn certificate_stamp(&self) -> Vec<Stamp> {
        let files = self.settings.identity.iter().flat_map(|own| [&own.certificate, &own.key]);
        files.map(|path| Stamp::of(path)).collect()
    }

    /// `GET sys/health`: the status that tells how it is; of a standby 200 where that is
    /// `standby_ok`, else 429. Of the server, not of a namespace; asked without a token, through
    /// whatever stands before it.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn health(&self, standby_ok: bool) -> Result<u16, Error> {
        let standbyok = standby_ok.then_some(true);
        let request = Request::of(&ReadHealthRequest { standbyok, ..Default::default() })?;
        let asked = self.http.of(None).get(request.url(&self.base)?).send().await;
        Ok(asked.map_err(|error| self.lost(error))?.status().as_u16())
    }

    /// Asks once, and once more where a standby says to ask the active server.
    ///
    /// # Errors
    /// When there is no answer that can be believed.
    pub(crate) async fn send(
        &self,
        request: &Request,
        token: Option<&Secret>,
    ) -> Result<Answer, Error> {
        let url = request.url(&self.base)?;
        let response = self.send_to(url.clone(), request, token).await?;
        let response = match redirect(&response, &url)? {
            Some(active) => self.send_to(active, request, token).await?,
            None => response,
        };
        refuse_cached(&response)?;
        if let Some(coding) = coding::of(response.headers()) {
            return Err(Error::Coded(coding));
        }
        self.read(response).await
    }

    async fn send_to(
        &self,
        url: Url,
        request: &Request,
        token: Option<&Secret>,
    ) -> Result<Response, Error> {
        let mut asking = self.http.of(token).request(request.method.clone(), url);
        asking = asking.header("X-Vault-Request", "true");
        if let Some(patience) = request.patience {
            asking = asking.timeout(patience);
        }
        if let Some(namespace) = &self.namespace {
            asking = asking.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            asking = asking.header("X-Vault-Token", header_value(token)?);
        }
        if !request.body.is_empty() {
            asking = asking.header(CONTENT_TYPE, "application/json").body(request.body.clone());
        }
        let answered = asking.send().await.map_err(|error| self.lost(error))?;
        self.addresses.served(answered.remote_addr());
        Ok(answered)
    }

    async fn read(&self, mut response: Response) -> Result<Answer, Error> {
        let (status, after, bounds) =
            (response.status(), retry_after(&response), self.settings.bounds);
        let mut body = Zeroizing::new(Vec::with_capacity(USUAL_ANSWER));
        while let Some(chunk) = response.chunk().await.map_err(|error| self.lost(error))? {
            if body.len() + chunk.len() > bounds.answer {
                return Err(Error::TooLong(bounds.answer));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, after, body, bounds })
    }

    /// The library's errors print the URL and, further down, the cause.
    fn lost(&self, error: reqwest::Error) -> Error {
        let tried = self.addresses.failed();
        if error.is_timeout() {
            return Error::Timeout(tried);
        }
        Error::Unreachable(root_cause(&error.without_url()) + &tried)
    }
}

/// A path as it is sent. Some of vaultrs' begin with a tab.
fn path(said: &str) -> Result<String, Error> {
    let path = said.trim().trim_matches('/');
    match path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        true => Err(Error::Client(format!("{path:?} is no path of its API"))),
        false => Ok(path.to_owned()),
    }
}

/// Whether a network cannot read what is said there.
fn is_private(url: &Url) -> bool {
    let loopback = url.host_str().is_some_and(is_loopback);
    url.scheme() == "https" || (url.scheme() == "http" && loopback)
}

/// Where a standby says that the active server is. The same request goes there, its token
/// with it, so only TLS will do, or loopback for who is on loopback already.
fn redirect(response: &Response, from: &Url) -> Result<Option<Url>, Error> {
    let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
    let (StatusCode::TEMPORARY_REDIRECT, Some(Ok(to))) =
        (response.status(), location.map(Url::parse))
    else {
        return Ok(None);
    };
    match is_private(&to) && (to.scheme() == "https" || from.scheme() == "http") {
        true => Ok(Some(to)),
        false => Err(Error::Said {
            status: StatusCode::TEMPORARY_REDIRECT.as_u16(),
            words: format!("a redirect to {} is not followed; mend its api_addr", to.scheme()),
        }),
    }
}

#[expect(clippy::disallowed_methods, reason = "the client for OpenBAO")]
fn client(settings: &Settings, addresses: &Addresses) -> Result<Client, Error> {
    let failed = |error: reqwest::Error| Error::Client(root_cause(&error.without_url()));
    let mut builder = Client::builder()
        .timeout(settings.timeout)
        // Shared by a host's addresses, and half of it is left for the question.
        .connect_timeout(settings.timeout / 2)
        .dns_resolver(addresses.clone())
        // A node that vanished leaves connections behind that answer nothing. So a request waits on
        // one for no longer than its time, and none is used again that has been idle for so long:
        // after the first request that timed out, the next one gets a new one.
        .tcp_user_timeout(settings.timeout)
        .tcp_keepalive(settings.timeout)
        .tcp_keepalive_interval(settings.timeout)
        .pool_idle_timeout(settings.timeout)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .pool_max_idle_per_host(settings.max_idle_connections)
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
            bytes.map_err(|error| Error::File { path: path.clone(), error })
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
fn refuse_cached(response: &Response) -> Result<(), Error> {
    let cache = response.headers().get("x-cache").and_then(|cache| cache.to_str().ok());
    match cache.is_some_and(|cache| cache.trim_start().to_ascii_uppercase().starts_with("HIT")) {
        true => Err(Error::Client(
            "the agent at its address answers from its cache; turn that off".into(),
        )),
        false => Ok(()),
    }
}

fn header_value(token: &Secret) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::from_bytes(token.expose())
        .map_err(|_invalid| Error::Client("the token is not one line of text".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// In seconds, as OpenBAO says it (RFC 9110, 10.2.3).
fn retry_after(response: &Response) -> Option<Duration> {
    let told = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(seconds(told))
}

#[cfg(test)]
mod tests {
    use super::*;

    use rustify_derive::Endpoint;

    #[derive(Debug, Endpoint)]
    #[endpoint(path = "{self.path}")]
    struct At {
        #[endpoint(skip)]
        path: &'static str,
    }

    #[test]
    fn a_request_goes_to_its_configured_address_only() {
        let shown = |path| Request::of(&At { path }).map(|request| request.shown());
        let url = |path| shown(path).expect("a request");
        assert_eq!(url("\tsys/auth/"), "GET https://gateway.example/bao/v1/sys/auth");
        assert_eq!(url("a?b#c%2f/d"), "GET https://gateway.example/bao/v1/a%3Fb%23c%252f/d");
        for elsewhere in ["", "/", "a/../b", "a/./b", "a//b", ".."] {
            assert!(shown(elsewhere).is_err(), "{elsewhere}");
        }
    }

    #[test]
    fn a_token_is_never_sent_over_a_network_in_clear() {
        let made = |address: &str| OpenBao::new(Settings::for_control(address));
        for good in
            ["https://bao.example", "http://127.0.0.1:8200", "http://[::1]:1", "http://localhost"]
        {
            assert!(made(good).is_ok(), "{good}");
        }
        for bad in ["http://bao.example", "http://127.0.0.1.example", "ftp://127.0.0.1", "bao", ""]
        {
            assert!(made(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_namespace_that_cannot_be_sent_is_refused_at_once() {
        let made = |namespace: &str| {
            let namespace = Some(namespace.to_owned());
            OpenBao::new(Settings { namespace, ..Settings::for_control("https://bao.example") })
        };
        assert!(made("team-a/blue").is_ok());
        for bad in ["a\nb", "a\0"] {
            let error = made(bad).expect_err(bad).to_string();
            assert!(error.ends_with(&format!("{bad:?} is no namespace")), "{error}");
        }
    }

    fn answer(status: u16, body: &str) -> Answer {
        let status = StatusCode::from_u16(status).expect("a status");
        let body = Zeroizing::new(body.as_bytes().to_vec());
        Answer { status, after: None, body, bounds: Bounds { answer: 1000, words: 20 } }
    }

    #[cfg(feature = "control")]
    #[test]
    fn only_a_404_of_openbao_means_not_found() {
        let unrouted = r#"{"errors":["no handler for route \"a/b\". route entry not found."]}"#;
        for (status, body, nothing) in [
            (404, r#"{"errors":[]}"#, true),
            (404, unrouted, true),
            (404, r#"{"errors":["unsupported path"]}"#, false),
            (404, "<html>not found</html>", false),
            (403, r#"{"errors":[]}"#, false),
            (200, r#"{"errors":[]}"#, false),
        ] {
            assert_eq!(answer(status, body).is_nothing(), nothing, "{status} {body}");
        }
    }

    #[test]
    fn error_texts_of_openbao_are_one_truncated_line() {
        let said = |status, body: &str| answer(status, body).refused().to_string();
        assert_eq!(said(400, r#"{"errors":["a\n\tb","c\u0007"]}"#), "it answered 400: a b; c");
        assert_eq!(said(403, &format!(r#"{{"errors":["{}"]}}"#, "x".repeat(50))).len(), 37);
        assert_eq!(said(502, "<html>secret</html>"), "it answered 502");
        assert_eq!(said(429, r#"{"errors":["quota"]}"#), "it answered 429: quota");
    }
}
