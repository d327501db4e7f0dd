//! Fetching an issuer's keys: a JSON Web Key Set from its address, or from the one that the
//! issuer's OpenID configuration names.
//!
//! These answers decide which tokens are accepted. So only https, or http to this
//! machine; no redirect elsewhere, no proxy from the environment, and every answer is bounded in
//! time and size. No body is ever printed. Only [`super::Keyring`] fetches; the configuration
//! makes fetchers.

#![expect(clippy::disallowed_types, reason = "it has the client for issuers' keys")]

use std::time::Duration;

use pgsilo_core::addresses::Addresses;
use pgsilo_core::cause::root_cause;
use pgsilo_core::coding;
use pgsilo_core::host::is_loopback;
use reqwest::{Certificate, Client, StatusCode, Url, redirect};
use serde_json::Value;
use tokio::time::timeout;

use super::keys::KeyError;
use super::strict::strict_json;

/// Of one fetch, whatever it consists of: as long as a login may be held up by it.
pub(super) const TIME_OUT: Duration = Duration::from_secs(5);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;
const MAX_REDIRECTS: usize = 3;
const WELL_KNOWN: &str = "/.well-known/openid-configuration";

/// An address that keys may be fetched from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeysUrl(Url);

/// Why an address is not one that keys may be fetched from. Shows no part of the text but its
/// host and its scheme: there may be a password in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysUrlError {
    /// Something else.
    #[error("not a URL; write it like \"https://issuer.example/jwks.json\"")]
    NotUrl,
    /// It would be sent to every server that answers.
    #[error("a URL with a user or a password; remove them")]
    Credentials,
    /// It means nothing here.
    #[error("a URL with a fragment; end it before the #")]
    Fragment,
    /// An issuer's name with a query has no place for its configuration.
    #[error("a URL with a query, so it has no OpenID configuration; use jwks_url")]
    Query,
    /// Anybody on the way could put a key of his own there.
    #[error("http to {0:?} would let the network choose the keys; use https")]
    Clear(String),
    /// Neither https nor http.
    #[error("the scheme {0:?} is not supported; use https")]
    Scheme(String),
}

impl KeysUrl {
    /// Takes https, and http to this machine.
    pub fn parse(text: &str) -> Result<KeysUrl, KeysUrlError> {
        let url = Url::parse(text).map_err(|_| KeysUrlError::NotUrl)?;
        if has_credentials(&url) {
            return Err(KeysUrlError::Credentials);
        }
        if url.fragment().is_some() {
            return Err(KeysUrlError::Fragment);
        }
        let host = url.host_str().unwrap_or_default();
        match url.scheme() {
            "https" => Ok(KeysUrl(url)),
            "http" if is_loopback(host) => Ok(KeysUrl(url)),
            "http" => Err(KeysUrlError::Clear(host.to_owned())),
            scheme => Err(KeysUrlError::Scheme(scheme.to_owned())),
        }
    }

    /// Whether there are certificates to check.
    pub fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }
}

fn has_credentials(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// Where keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeysAt {
    /// A key set.
    Jwks(KeysUrl),
    /// An OpenID provider's configuration, which names the key set.
    Discovery {
        /// What the configuration must give as its own name.
        issuer: String,
        /// Where it is.
        configuration: KeysUrl,
    },
}

impl KeysAt {
    /// OpenID Connect Discovery 1.0, section 4: the place follows from the issuer's name.
    pub fn discovery(issuer: &str) -> Result<KeysAt, KeysUrlError> {
        let name = KeysUrl::parse(issuer)?;
        if name.0.query().is_some() {
            return Err(KeysUrlError::Query);
        }
        let base = issuer.strip_suffix('/').unwrap_or(issuer);
        let configuration = KeysUrl::parse(&format!("{base}{WELL_KNOWN}"))?;
        Ok(KeysAt::Discovery { issuer: issuer.to_owned(), configuration })
    }

    /// What is asked first.
    pub fn url(&self) -> &KeysUrl {
        match self {
            KeysAt::Jwks(url) | KeysAt::Discovery { configuration: url, .. } => url,
        }
    }
}

/// Why there is no new key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// An answer other than 200.
    #[error("it answered {0}, not 200")]
    Said(u16),
    /// No connection, or one that broke.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// No whole answer in time.
    #[error("it did not answer within 5 s{0}")]
    Timeout(String),
    /// An answer in a coding that was not asked for.
    #[error("its answer is compressed ({0}), which was not requested")]
    Coded(String),
    /// An answer beyond any believable size.
    #[error("its answer is longer than 256 KiB")]
    TooLong,
    /// A redirect that is not followed.
    #[error("it redirects to another host, port or scheme, or more than 3 times")]
    Redirected,
    /// Not an OpenID configuration.
    #[error("its OpenID configuration is not a JSON object with an `issuer`")]
    NotConfiguration,
    /// Somebody else's configuration.
    #[error("its OpenID configuration is that of another issuer")]
    OtherIssuer,
    /// The configuration does not say where the keys are, or says what may not be fetched.
    #[error("its OpenID configuration has no jwks_uri that keys may be fetched from: {0}")]
    KeysElsewhere(KeysUrlError),
    /// What was fetched is no key set for this issuer.
    #[error("{0}")]
    Keys(#[from] KeyError),
    /// The HTTP client cannot be made.
    #[error("the HTTP client cannot be set up: {0}")]
    Client(String),
}

impl FetchError {
    /// What an operator can do about it.
    pub(super) fn advice(&self) -> &'static str {
        match self {
            FetchError::Said(_) => "check jwks_url, or the issuer's name, and its log",
            FetchError::Unreachable(_) | FetchError::Timeout(_) => {
                "check that the issuer runs and can be reached from here, and `ca`"
            }
            FetchError::Coded(_) => "is a gateway in between? have it leave answers as they are",
            FetchError::TooLong => "is that the address of a JSON Web Key Set?",
            FetchError::Redirected => {
                "if the new address is the issuer's, write it into the configuration"
            }
            FetchError::NotConfiguration => "is the issuer an OpenID provider? else use jwks_url",
            FetchError::OtherIssuer => {
                "`issuer` must be written as there, to the last slash; else somebody else answers"
            }
            FetchError::KeysElsewhere(_) => "the issuer must name an https address",
            FetchError::Keys(KeyError::Private(_)) => {
                "that key is no secret any more: the issuer must replace it and publish public keys"
            }
            FetchError::Keys(KeyError::Configuration) => {
                "or write discovery = true in place of jwks_url, if that is the issuer's own"
            }
            FetchError::Keys(_) => "the issuer must publish a set of public keys for `algorithms`",
            FetchError::Client(_) => "check `ca`",
        }
    }
}

/// Fetches the keys of one issuer.
#[derive(Debug)]
pub struct Fetcher {
    http: Client,
    addresses: Addresses,
    at: KeysAt,
    /// The longest time between two fetches.
    pub(super) refresh: Duration,
    /// How long keys serve after they were fetched.
    pub(super) max_stale: Duration,
}

impl Fetcher {
    /// Fetches nothing yet. `ca` is a PEM bundle of roots, `None` the system's.
    #[expect(clippy::disallowed_methods, reason = "the client for issuers' keys")]
    pub fn new(
        at: KeysAt,
        ca: Option<&[u8]>,
        refresh: Duration,
        max_stale: Duration,
    ) -> Result<Fetcher, FetchError> {
        let failed = |error: reqwest::Error| FetchError::Client(error.without_url().to_string());
        let addresses = Addresses::default();
        let mut builder = Client::builder()
            .timeout(TIME_OUT)
            // Shared by a host's addresses, and half of it is left for the question.
            .connect_timeout(TIME_OUT / 2)
            .dns_resolver(addresses.clone())
            .redirect(redirect::Policy::custom(|attempt| {
                let first = attempt.previous().first();
                match first.is_some_and(|first| may_follow(first, attempt.url())) {
                    true if attempt.previous().len() <= MAX_REDIRECTS => attempt.follow(),
                    _ => attempt.error("not followed"),
                }
            }))
            .no_proxy()
            .referer(false)
            // Between two fetches any connection would have gone stale.
            .pool_max_idle_per_host(0)
            .default_headers(coding::asks_for_none())
            .user_agent(concat!("pgsilo/", env!("CARGO_PKG_VERSION")));
        if let Some(pem) = ca {
            builder = builder.tls_certs_only(Certificate::from_pem_bundle(pem).map_err(failed)?);
        }
        let http = builder.build().map_err(failed)?;
        Ok(Fetcher { http, addresses, at, refresh, max_stale })
    }

    /// The key set as it is published now.
    pub(super) async fn fetch(&self) -> Result<Vec<u8>, FetchError> {
        let fetch = async {
            match &self.at {
                KeysAt::Jwks(url) => self.get(url).await,
                KeysAt::Discovery { issuer, configuration } => {
                    let found = self.get(configuration).await?;
                    let url = jwks_uri(&found, issuer, configuration)?;
                    self.get(&url).await
                }
            }
        };
        let fetched = timeout(TIME_OUT, fetch).await;
        fetched.unwrap_or_else(|_elapsed| Err(FetchError::Timeout(self.addresses.failed())))
    }

    async fn get(&self, url: &KeysUrl) -> Result<Vec<u8>, FetchError> {
        let lost = |error| transport(error, &self.addresses);
        let mut response = self.http.get(url.0.clone()).send().await.map_err(lost)?;
        self.addresses.served(response.remote_addr());
        if response.status() != StatusCode::OK {
            return Err(FetchError::Said(response.status().as_u16()));
        }
        if let Some(coding) = coding::of(response.headers()) {
            return Err(FetchError::Coded(coding));
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if answer.len() + chunk.len() > MAX_ANSWER {
                return Err(FetchError::TooLong);
            }
            answer.extend_from_slice(&chunk);
        }
        Ok(answer)
    }
}

/// A redirect stays where the first question went: an open redirect at the issuer must not make
/// somebody else's keys the issuer's.
fn may_follow(first: &Url, to: &Url) -> bool {
    let place = |url: &Url| {
        (url.scheme().to_owned(), url.host_str().map(str::to_owned), url.port_or_known_default())
    };
    place(first) == place(to) && !has_credentials(to)
}

/// Where an OpenID configuration says that the keys are: on any host, but over https if the
/// configuration came over https.
fn jwks_uri(configuration: &[u8], issuer: &str, from: &KeysUrl) -> Result<KeysUrl, FetchError> {
    let found = strict_json(configuration).map_err(|_| FetchError::NotConfiguration)?;
    let text = |member: &str| found.get(member).and_then(Value::as_str);
    if text("issuer").ok_or(FetchError::NotConfiguration)? != issuer {
        return Err(FetchError::OtherIssuer);
    }
    let url = KeysUrl::parse(text("jwks_uri").unwrap_or_default());
    let url = url.map_err(FetchError::KeysElsewhere)?;
    if from.is_https() && !url.is_https() {
        let host = url.0.host_str().unwrap_or_default().to_owned();
        return Err(FetchError::KeysElsewhere(KeysUrlError::Clear(host)));
    }
    Ok(url)
}

/// The library's errors print the URL and, further down, the cause.
fn transport(error: reqwest::Error, addresses: &Addresses) -> FetchError {
    if error.is_redirect() {
        return FetchError::Redirected;
    }
    let tried = addresses.failed();
    if error.is_timeout() {
        return FetchError::Timeout(tried);
    }
    FetchError::Unreachable(root_cause(&error.without_url()) + &tried)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> KeysUrl {
        KeysUrl::parse(text).expect(text)
    }

    #[test]
    fn keys_come_over_https_or_from_this_machine() {
        for good in [
            "https://issuer.example/keys?p=1",
            "https://issuer.example:8443",
            "http://localhost:1/x",
            "http://127.0.0.1:1/x",
            "http://[::1]:1/x",
        ] {
            assert!(KeysUrl::parse(good).is_ok(), "{good}");
        }
        let wrong = |text| KeysUrl::parse(text).expect_err(text);
        for bad in ["", "issuer.example", "/keys", "https://", "https://a b/"] {
            assert_eq!(wrong(bad), KeysUrlError::NotUrl, "{bad}");
        }
        assert_eq!(wrong("https://u@issuer.example"), KeysUrlError::Credentials);
        assert_eq!(wrong("https://u:p@issuer.example"), KeysUrlError::Credentials);
        assert_eq!(wrong("https://issuer.example/#a"), KeysUrlError::Fragment);
        let clear = |host: &str| KeysUrlError::Clear(host.to_owned());
        assert_eq!(wrong("http://issuer.example"), clear("issuer.example"));
        assert_eq!(wrong("http://10.0.0.1"), clear("10.0.0.1"));
        assert_eq!(wrong("http://localhost.example"), clear("localhost.example"));
        assert_eq!(wrong("http://127.0.0.1.example"), clear("127.0.0.1.example"));
        assert_eq!(wrong("file:///etc/keys"), KeysUrlError::Scheme("file".to_owned()));
    }

    #[test]
    fn the_place_of_a_configuration_follows_from_the_name() {
        for (issuer, place) in [
            ("https://a.example", "https://a.example/.well-known/openid-configuration"),
            ("https://a.example/", "https://a.example/.well-known/openid-configuration"),
            ("https://a.example/b/c", "https://a.example/b/c/.well-known/openid-configuration"),
            ("https://a.example/b/", "https://a.example/b/.well-known/openid-configuration"),
        ] {
            let at = KeysAt::discovery(issuer).expect(issuer);
            assert_eq!(at.url(), &url(place));
        }
        assert_eq!(KeysAt::discovery("https://a.example/?b=c"), Err(KeysUrlError::Query));
        assert_eq!(KeysAt::discovery("https://a.example/#c"), Err(KeysUrlError::Fragment));
        assert_eq!(KeysAt::discovery("accounts"), Err(KeysUrlError::NotUrl));
    }

    #[test]
    fn redirects_stay_where_they_began() {
        let follows = |to: &str| {
            let first = Url::parse("https://issuer.example/keys").expect("a URL");
            may_follow(&first, &Url::parse(to).expect(to))
        };
        assert!(follows("https://issuer.example/other?x#y"));
        assert!(follows("https://issuer.example:443/other"));
        for elsewhere in [
            "http://issuer.example/keys",
            "https://issuer.example:444/keys",
            "https://issuer.example./keys",
            "https://a.issuer.example/keys",
            "https://user@issuer.example/keys",
            "https://127.0.0.1/keys",
        ] {
            assert!(!follows(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn a_configuration_must_be_the_issuers_own() {
        let name = "https://issuer.example";
        let from = url("https://issuer.example/.well-known/openid-configuration");
        let read = |text: &str| jwks_uri(text.as_bytes(), name, &from);
        let keys = "https://keys.example/jwks";
        let good = format!(r#"{{"issuer":"{name}","jwks_uri":"{keys}","more":[1]}}"#);
        assert_eq!(read(&good), Ok(url(keys)));
        for (text, error) in [
            ("", FetchError::NotConfiguration),
            ("[]", FetchError::NotConfiguration),
            (r#"{"jwks_uri":"https://keys.example"}"#, FetchError::NotConfiguration),
            (r#"{"issuer":1,"jwks_uri":"https://keys.example"}"#, FetchError::NotConfiguration),
            (
                r#"{"issuer":"https://evil.example","issuer":"https://issuer.example"}"#,
                FetchError::NotConfiguration,
            ),
            (r#"{"issuer":"https://issuer.example/"}"#, FetchError::OtherIssuer),
            (r#"{"issuer":"https://ISSUER.example"}"#, FetchError::OtherIssuer),
            (
                r#"{"issuer":"https://issuer.example"}"#,
                FetchError::KeysElsewhere(KeysUrlError::NotUrl),
            ),
            (
                r#"{"issuer":"https://issuer.example","jwks_uri":"http://keys.example/"}"#,
                FetchError::KeysElsewhere(KeysUrlError::Clear("keys.example".to_owned())),
            ),
            // An issuer that is elsewhere has no business on this machine.
            (
                r#"{"issuer":"https://issuer.example","jwks_uri":"http://127.0.0.1/"}"#,
                FetchError::KeysElsewhere(KeysUrlError::Clear("127.0.0.1".to_owned())),
            ),
            (
                r#"{"issuer":"https://issuer.example","jwks_uri":"file:///keys"}"#,
                FetchError::KeysElsewhere(KeysUrlError::Scheme("file".to_owned())),
            ),
        ] {
            assert_eq!(read(text), Err(error), "{text}");
        }
        let local = url("http://127.0.0.1:1/.well-known/openid-configuration");
        let text = br#"{"issuer":"http://127.0.0.1:1","jwks_uri":"http://127.0.0.1:1/keys"}"#;
        assert!(jwks_uri(text, "http://127.0.0.1:1", &local).is_ok());
    }
}
