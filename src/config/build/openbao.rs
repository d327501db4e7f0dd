//! Where credentials come from, and as whom pgsilo asks for them.

use std::net::IpAddr;

use super::super::raw::{RawAuth, RawOpenbao};
use super::{Build, FileError};
use crate::{lease, tls};

impl Build<'_> {
    pub(super) fn openbao(&mut self, raw: RawOpenbao) -> Result<lease::Settings, FileError> {
        let address = self.openbao_address(&raw.address)?;
        let ca = match raw.ca.map(|ca| self.file.resolve(&ca)) {
            Some(_) if address.starts_with("http:") => {
                return self
                    .wrong("openbao.ca", "http has no certificates; remove it or use https");
            }
            Some(path) => {
                Some(tls::roots_pem(&path).or_else(|error| self.wrong("openbao.ca", error))?)
            }
            None => None,
        };
        if raw.timeout.0.is_zero() {
            return self
                .wrong("openbao.timeout", "zero; a request needs some time, such as \"5s\"");
        }
        if raw.max_concurrent_requests == 0 {
            return self
                .wrong("openbao.max_concurrent_requests", "zero; no lease could be asked for");
        }
        Ok(lease::Settings {
            address,
            ca,
            auth: self.openbao_auth(raw.auth)?,
            timeout: raw.timeout.0,
            max_concurrent_requests: raw.max_concurrent_requests,
        })
    }

    fn openbao_address(&self, text: &str) -> Result<String, FileError> {
        const FIELD: &str = "openbao.address";
        // Not shown where it may hold a password.
        let secret = "a URL with a user or a password; remove them and use openbao.auth";
        if text.contains('@') {
            return self.wrong(FIELD, secret);
        }
        let Ok(url) = reqwest::Url::parse(text) else {
            let example = "write it like \"https://127.0.0.1:8200\"";
            return self.wrong(FIELD, format_args!("{text:?} is not a URL; {example}"));
        };
        if url.query().is_some() || url.fragment().is_some() {
            return self.wrong(
                FIELD,
                format_args!("{text:?} has a query or a fragment; end it after the port"),
            );
        }
        let host = url.host_str().unwrap_or_default();
        match url.scheme() {
            "https" => {}
            "http" if is_loopback(host) => {}
            "http" => {
                return self.wrong(
                    FIELD,
                    format_args!(
                        "http to {host:?} would show credentials to the network; use https"
                    ),
                );
            }
            scheme => {
                return self.wrong(
                    FIELD,
                    format_args!("the scheme {scheme:?} is not supported; use https"),
                );
            }
        }
        Ok(text.trim_end_matches('/').to_owned())
    }

    fn openbao_auth(&mut self, raw: RawAuth) -> Result<lease::Auth, FileError> {
        match (raw.approle, raw.token_file) {
            (Some(_), Some(_)) => {
                self.wrong("openbao.auth", "both approle and token_file; keep one")
            }
            (None, None) => self.wrong("openbao.auth", "neither approle nor token_file; add one"),
            (Some(approle), None) => {
                if approle.role_id.is_empty() {
                    return self
                        .wrong("openbao.auth.approle.role_id", "empty; write the role's id");
                }
                let field = "openbao.auth.approle.secret_id_file";
                let secret_id_file = self.secret_file(field, &approle.secret_id_file)?;
                Ok(lease::Auth::AppRole { role_id: approle.role_id, secret_id_file })
            }
            (None, Some(path)) => {
                Ok(lease::Auth::TokenFile(self.secret_file("openbao.auth.token_file", &path)?))
            }
        }
    }
}

/// By name only where the name cannot mean another machine.
fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
