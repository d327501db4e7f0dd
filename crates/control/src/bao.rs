//! A small client of OpenBAO's HTTP API: one token, one call, JSON both ways.
//!
//! The control plane makes few calls, so there is one method and no retry. An error says the
//! method, the path, the status and OpenBAO's own `errors`; the token and what was sent are
//! never part of it. Loopback or private addresses only make sense without an HTTP proxy, so
//! the environment's is not used.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgsilo_core::host::is_loopback;
use pgsilo_core::secret::Secret;
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode, redirect};
use serde_json::Value;

/// OpenBAO as seen by one identity.
#[derive(Debug, Clone)]
pub struct Bao {
    http: reqwest::Client,
    address: String,
    token: Option<Secret>,
}

impl Bao {
    /// Nobody yet, at `address` (`http://127.0.0.1:8200`).
    pub fn at(address: &str) -> Result<Self> {
        Self::trusting(address, None, None)
    }

    /// Nobody yet, at `address`, whose certificate must chain to one of `ca` (PEM; `None`: the
    /// system's), in a namespace.
    pub fn trusting(address: &str, ca: Option<&[u8]>, namespace: Option<&str>) -> Result<Self> {
        ensure!(
            is_private(address),
            "{address:?} would show credentials to the network: use https, or http on loopback"
        );
        #[expect(clippy::disallowed_methods, reason = "the client for OpenBAO")]
        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(30))
            .redirect(redirect::Policy::custom(follow));
        if let Some(pem) = ca {
            let roots = reqwest::Certificate::from_pem_bundle(pem);
            builder = builder.tls_certs_only(roots.context("OpenBAO's authorities")?);
        }
        if let Some(namespace) = namespace {
            let mut headers = HeaderMap::new();
            headers.insert("X-Vault-Namespace", namespace.parse().context("the namespace")?);
            builder = builder.default_headers(headers);
        }
        let http = builder.build().context("an HTTP client")?;
        Ok(Self { http, address: address.trim_end_matches('/').to_owned(), token: None })
    }

    /// The same OpenBAO as the identity that holds `token`.
    pub fn as_token(&self, token: Secret) -> Self {
        Self { token: Some(token), ..self.clone() }
    }

    /// `GET`.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or answers with another status than 2xx; so of the others.
    pub async fn read(&self, path: &str) -> Result<Value> {
        self.call(Method::GET, path, None).await
    }

    /// `POST`.
    pub async fn write(&self, path: &str, body: Value) -> Result<Value> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.call(Method::DELETE, path, None).await.map(drop)
    }

    /// The keys below a path; none when OpenBAO knows none.
    pub async fn list(&self, path: &str) -> Result<Vec<String>> {
        let (status, answer) = self.ask(Method::GET, &format!("{path}?list=true"), None).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        let answer = believed(&Method::GET, path, status, answer)?;
        let keys = answer.pointer("/data/keys").and_then(Value::as_array);
        let keys = keys.with_context(|| format!("OpenBAO's answer to {path} has no keys"))?;
        Ok(keys.iter().filter_map(|key| key.as_str().map(str::to_owned)).collect())
    }

    /// What is at a path; `None` when OpenBAO says that there is nothing: no such entry of a secrets
    /// engine, or no such engine. Other failures have the same status.
    pub async fn find(&self, path: &str) -> Result<Option<Value>> {
        let (status, answer) = self.ask(Method::GET, path, None).await?;
        let nothing = answer["errors"].as_array().is_some_and(|errors| {
            let unrouted = |error: &Value| {
                error.as_str().is_some_and(|text| text.starts_with("no handler for route"))
            };
            errors.iter().all(unrouted)
        });
        if status == StatusCode::NOT_FOUND && nothing {
            return Ok(None);
        }
        believed(&Method::GET, path, status, answer).map(Some)
    }

    /// What OpenBAO knows of a lease: `None` only if it says that it knows no such one. Other
    /// failures have the same status.
    pub async fn look_up_lease(&self, id: &str) -> Result<Option<Value>> {
        let path = "sys/leases/lookup";
        let body = serde_json::json!({ "lease_id": id });
        let (status, answer) = self.ask(Method::POST, path, Some(body)).await?;
        let unknown = answer["errors"] == serde_json::json!(["invalid lease"]);
        if status == StatusCode::BAD_REQUEST && unknown {
            return Ok(None);
        }
        believed(&Method::POST, path, status, answer).map(Some)
    }

    /// The HTTP status of `sys/health`, whatever it says; an error when nobody answers.
    pub async fn health(&self) -> Result<u16> {
        let answer = self.http.get(format!("{}/v1/sys/health", self.address)).send().await?;
        Ok(answer.status().as_u16())
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let (status, answer) = self.ask(method.clone(), path, body).await?;
        believed(&method, path, status, answer)
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(StatusCode, Value)> {
        let mut request = self.http.request(method.clone(), format!("{}/v1/{path}", self.address));
        if let Some(token) = &self.token {
            request = request.header("X-Vault-Token", sensitive(token)?);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.with_context(|| format!("OpenBAO: {method} {path}"))?;
        let status = answer.status();
        let text = answer.text().await.with_context(|| format!("OpenBAO: {method} {path}"))?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }
}

/// A header that no log shows.
fn sensitive(token: &Secret) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_bytes(token.expose()).context("OpenBAO's token")?;
    value.set_sensitive(true);
    Ok(value)
}

/// A standby names the active server, once. The token goes there too, so it must be as private.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from_tls = attempt.previous().iter().any(|url| url.scheme() == "https");
    let to_tls = attempt.url().scheme() == "https";
    let private = is_private(attempt.url().as_str()) && (to_tls || !from_tls);
    match attempt.previous().len() {
        1 if private => attempt.follow(),
        _ => attempt.stop(),
    }
}

/// Whether nobody on a network reads what is said there.
fn is_private(address: &str) -> bool {
    let Ok(url) = reqwest::Url::parse(address) else { return false };
    let loopback = url.host_str().is_some_and(is_loopback);
    url.scheme() == "https" || (url.scheme() == "http" && loopback)
}

/// An answer, if it is a good one.
fn believed(method: &Method, path: &str, status: StatusCode, answer: Value) -> Result<Value> {
    ensure!(status.is_success(), "OpenBAO: {method} {path}: {status}: {}", reasons(&answer));
    Ok(answer)
}

/// OpenBAO's `errors`, on one line.
fn reasons(answer: &Value) -> String {
    let errors = answer["errors"].as_array().into_iter().flatten();
    let lines: Vec<_> = errors.filter_map(Value::as_str).map(str::trim).collect();
    if lines.is_empty() {
        "no reason given".to_owned()
    } else {
        lines.join("; ").replace('\n', " ")
    }
}

/// A text that an answer must have.
pub fn text<'a>(answer: &'a Value, pointer: &str) -> Result<&'a str> {
    answer
        .pointer(pointer)
        .and_then(Value::as_str)
        .with_context(|| format!("OpenBAO's answer has no {pointer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_sent_over_a_network_in_clear() {
        for good in
            ["https://bao.example", "http://127.0.0.1:8200", "http://[::1]:1", "http://localhost"]
        {
            assert!(Bao::at(good).is_ok(), "{good}");
        }
        for bad in ["http://bao.example", "http://127.0.0.1.example", "ftp://127.0.0.1", "bao", ""]
        {
            assert!(Bao::at(bad).is_err(), "{bad}");
        }
    }
}
