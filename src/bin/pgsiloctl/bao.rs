//! A small client of OpenBAO's HTTP API: one token, one call, JSON both ways.
//!
//! The control plane makes few calls, so there is one method and no retry. An error says the
//! method, the path, the status and OpenBAO's own `errors`; the token and what was sent are
//! never part of it. Loopback or private addresses only make sense without an HTTP proxy, so
//! the environment's is not used.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::Method;
use serde_json::Value;

use crate::secret::Secret;

/// OpenBAO as seen by one identity.
#[derive(Debug, Clone)]
pub(crate) struct Bao {
    http: reqwest::Client,
    address: String,
    token: Option<Secret>,
}

impl Bao {
    /// Nobody yet, at `address` (`http://127.0.0.1:8200`).
    pub(crate) fn at(address: &str) -> Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(30))
            .build()
            .context("an HTTP client")?;
        Ok(Self { http, address: address.trim_end_matches('/').to_owned(), token: None })
    }

    /// The same OpenBAO as the identity that holds `token`.
    pub(crate) fn as_token(&self, token: Secret) -> Self {
        Self { token: Some(token), ..self.clone() }
    }

    pub(crate) async fn read(&self, path: &str) -> Result<Value> {
        self.call(Method::GET, path, None).await
    }

    pub(crate) async fn write(&self, path: &str, body: Value) -> Result<Value> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// The HTTP status of `sys/health`, whatever it says; an error when nobody answers.
    pub(crate) async fn health(&self) -> Result<u16> {
        let answer = self.http.get(format!("{}/v1/sys/health", self.address)).send().await?;
        Ok(answer.status().as_u16())
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let mut request = self.http.request(method.clone(), format!("{}/v1/{path}", self.address));
        if let Some(token) = &self.token {
            request = request.header("X-Vault-Token", token.expose());
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.with_context(|| format!("OpenBAO: {method} {path}"))?;
        let status = answer.status();
        let text = answer.text().await.with_context(|| format!("OpenBAO: {method} {path}"))?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if !status.is_success() {
            bail!("OpenBAO: {method} {path}: {status}: {}", reasons(&value));
        }
        Ok(value)
    }
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
pub(crate) fn text<'a>(answer: &'a Value, pointer: &str) -> Result<&'a str> {
    answer
        .pointer(pointer)
        .and_then(Value::as_str)
        .with_context(|| format!("OpenBAO's answer has no {pointer}"))
}
