//! How clients of a listener prove who they are, and what a listener believes of those before it.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use pgsilo_core::file::{self, MAX_SECRET};
use pgsilo_core::tls::ServerFiles;
use serde_json::json;
use zeroize::Zeroizing;

use super::super::raw::{RawNames, RawProof};
use super::super::{DatabaseNames, ListenAddress, ListenerTls, Proof};
use super::{Build, FileError};
use crate::token::SourceSettings;

/// What of the rest of the file a listener depends on.
pub(super) struct Known {
    /// The configured issuers' names.
    pub(super) issuers: HashSet<String>,
    /// Whether leases are asked for with each session's own token.
    pub(super) needs_tokens: bool,
}

/// Where clients come in.
pub(super) struct Door<'a> {
    pub(super) place: &'a ListenAddress,
    pub(super) tls: Option<&'a ListenerTls<ServerFiles>>,
}

impl Build<'_> {
    pub(super) fn proof(
        &mut self,
        at: &str,
        raw: RawProof,
        door: &Door<'_>,
        known: &Known,
    ) -> Result<Proof<SourceSettings>, FileError> {
        match raw {
            RawProof::Password => Ok(Proof::Password),
            RawProof::Oauthbearer { issuer, scope } => self.bearer(at, &issuer, &scope, known),
            RawProof::Certificate => self.certificate(at, door, known),
            RawProof::TokenFile(path) => {
                let field = format!("{at}.auth.token_file");
                self.mind_neighbours(&field, door)?;
                Ok(Proof::Sidecar(SourceSettings::File(self.token_file(&field, &path)?)))
            }
            RawProof::Exec { command, refresh } => {
                let field = format!("{at}.auth.exec.command");
                self.mind_neighbours(&field, door)?;
                if command.first().is_none_or(String::is_empty) {
                    return self.wrong(field, "empty; name the program and its arguments");
                }
                Ok(Proof::Sidecar(SourceSettings::Command { words: command, refresh: refresh.0 }))
            }
        }
    }

    /// RFC 7628, 3.2.2; libpq takes the document's address from it.
    fn bearer(
        &self,
        at: &str,
        issuer: &str,
        scope: &str,
        known: &Known,
    ) -> Result<Proof<SourceSettings>, FileError> {
        let field = format!("{at}.auth.oauthbearer.issuer");
        if !known.issuers.contains(issuer) {
            return self.wrong(field, format_args!("{issuer:?} has no [[issuer]] table"));
        }
        if !issuer.starts_with("https://") {
            let what = "not an https URL; clients read its discovery document";
            return self.wrong(field, format_args!("{issuer:?} is {what}"));
        }
        let document = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let challenge = json!({
            "status": "invalid_token", "openid-configuration": document, "scope": scope,
        });
        Ok(Proof::Bearer { challenge: challenge.to_string().into_bytes() })
    }

    fn certificate(
        &self,
        at: &str,
        door: &Door<'_>,
        known: &Known,
    ) -> Result<Proof<SourceSettings>, FileError> {
        let field = format!("{at}.auth");
        let shown = door.tls.is_some_and(|tls| tls.required && tls.server.clients.is_some());
        if !shown {
            return self
                .wrong(field, "certificate needs tls with client_ca, and no client in clear");
        }
        if known.needs_tokens {
            let what = "certificate has no token to show to OpenBAO, \
                        which lease.authority = \"session\" needs";
            return self.wrong(field, what);
        }
        Ok(Proof::Certificate)
    }

    /// It is read at each login, and may be written after pgsilo has started.
    fn token_file(&mut self, field: &str, path: &Path) -> Result<PathBuf, FileError> {
        let path = self.file.resolve(path);
        match file::read(&path, MAX_SECRET).map(Zeroizing::new) {
            Ok(token) if token.trim_ascii().is_empty() => {
                let what = format_args!("{path:?} is empty: sessions are refused until it is not");
                self.warn(field, what);
            }
            Ok(_) => self.mind_readers(field, &path),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let what = format_args!("{path:?} is not there: sessions are refused until it is");
                self.warn(field, what);
            }
            Err(error) => {
                return self.wrong(field, format_args!("cannot read {path:?}: {error}"));
            }
        }
        Ok(path)
    }

    /// Every client that reaches a sidecar is let in.
    fn mind_neighbours(&mut self, field: &str, door: &Door<'_>) -> Result<(), FileError> {
        match door.place {
            ListenAddress::Unix { .. } => Ok(()),
            ListenAddress::Tcp(address) if address.ip().is_loopback() => {
                self.warn(
                    field,
                    "every user of this machine is let in; a Unix socket can tell them apart",
                );
                Ok(())
            }
            ListenAddress::Tcp(_) => self.wrong(
                field,
                "anybody who reaches this address would be let in; use a Unix socket or loopback",
            ),
        }
    }

    /// With its dot in front, in lower case.
    pub(super) fn sni_suffix(
        &self,
        at: &str,
        raw: Option<String>,
        has_tls: bool,
    ) -> Result<Option<String>, FileError> {
        let field = format!("{at}.sni_suffix");
        let Some(raw) = raw else { return Ok(None) };
        if !has_tls {
            return self.wrong(field, "only with tls: clients name a host in its handshake");
        }
        let suffix = raw.trim_start_matches('.').to_ascii_lowercase();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let is_host = suffix.split('.').all(|label| !label.is_empty() && label.bytes().all(plain));
        match is_host {
            true => Ok(Some(format!(".{suffix}"))),
            false => self
                .wrong(field, format_args!("{raw:?} is not a domain such as \"db.example.com\"")),
        }
    }

    pub(super) fn database_names(
        &mut self,
        at: &str,
        raw: Option<RawNames>,
    ) -> Result<DatabaseNames, FileError> {
        let field = format!("{at}.database_names");
        match raw {
            None => Ok(DatabaseNames::default()),
            Some(RawNames::Any) => {
                let what = "a client that means another database lands in its token's tenant; \
                            list the names that clients cannot be told to change";
                self.warn(field, what);
                Ok(DatabaseNames::Any)
            }
            Some(RawNames::Only(names))
                if names.is_empty() || names.iter().any(String::is_empty) =>
            {
                self.wrong(field, "empty; list names such as \"postgres\", or remove it")
            }
            Some(RawNames::Only(names)) => Ok(DatabaseNames::Only(names)),
        }
    }

    pub(super) fn balancers(
        &mut self,
        at: &str,
        raw: Option<Vec<String>>,
    ) -> Result<Vec<IpNet>, FileError> {
        let field = format!("{at}.proxy_protocol");
        let Some(raw) = raw else { return Ok(Vec::new()) };
        if raw.is_empty() {
            return self.wrong(field, "empty; name the balancers' networks, or remove it");
        }
        let mut networks = Vec::with_capacity(raw.len());
        for (index, text) in raw.iter().enumerate() {
            let network =
                text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            match network {
                Ok(network) if network.prefix_len() == 0 => {
                    self.warn(
                        format!("{field}[{index}]"),
                        "everybody may say where they come from",
                    );
                }
                Ok(_) => {}
                Err(_) => {
                    return self.wrong(
                        format!("{field}[{index}]"),
                        format_args!("{text:?} is not a network such as \"10.0.0.0/8\""),
                    );
                }
            }
            networks.extend(network);
        }
        Ok(networks)
    }
}
