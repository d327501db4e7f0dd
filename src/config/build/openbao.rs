//! Where credentials come from, and as whom pgsilo asks for them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use pgsilo_core::file::MAX_PEM;
use pgsilo_core::host::is_loopback;
use pgsilo_core::tenant::Access;
use pgsilo_core::tls;
use pgsilo_openbao::{Bounds, ClientCertificate};

use super::super::raw::{
    RawAppRole, RawAuth, RawAuthority, RawClientCertificate, RawJwtLogin, RawLease, RawOpenbao,
    RawScope, RawSession,
};
use super::{Build, FileError};
use crate::lease;

/// Where Kubernetes puts a pod's service account token.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// More at once than any OpenBAO answers.
const MAX_REQUESTS: usize = 10_000;
/// Of one request; a credential's answer is waited for six times as long. Longer, and an audit
/// could not tell any more which lease made which role.
const MAX_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer, and a credential would be shared by sessions that have nothing to do with each other.
const MAX_WINDOW: Duration = Duration::from_secs(60);

impl Build<'_> {
    pub(super) fn openbao(
        &mut self,
        raw: RawOpenbao,
        lease: RawLease,
        max_sessions: usize,
    ) -> Result<(pgsilo_openbao::Settings, lease::Settings), FileError> {
        let (address, socket) = self.openbao_address(&raw.address)?;
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
        if raw.timeout.0 > MAX_TIMEOUT {
            return self.wrong("openbao.timeout", "too long; at most 20s");
        }
        if raw.max_concurrent_requests > MAX_REQUESTS {
            return self.wrong(
                "openbao.max_concurrent_requests",
                format_args!("out of range; at most {MAX_REQUESTS}"),
            );
        }
        if raw.max_concurrent_requests == 0 {
            return self
                .wrong("openbao.max_concurrent_requests", "zero; no lease could be asked for");
        }
        if raw.max_pending_revocations == Some(0) {
            return self
                .wrong("openbao.max_pending_revocations", "zero; no lease could be asked for");
        }
        let window = self.window(&lease)?;
        let identity = self.client_certificate(raw.client_certificate)?;
        let shows_certificate = identity.is_some();
        let server = pgsilo_openbao::Settings {
            address,
            socket,
            ca,
            identity,
            namespace: self.namespace(raw.namespace)?,
            timeout: raw.timeout.0,
            max_idle_connections: raw.max_concurrent_requests,
            bounds: Bounds::DATA,
        };
        let lease = lease::Settings {
            authority: self.authority(raw.auth, lease, shows_certificate)?,
            window,
            max_concurrent_requests: raw.max_concurrent_requests,
            // All sessions may end at once, and as many come again before theirs are revoked.
            max_pending_revocations: raw
                .max_pending_revocations
                .unwrap_or(max_sessions.saturating_mul(2)),
        };
        Ok((server, lease))
    }

    fn window(&self, lease: &RawLease) -> Result<Option<Duration>, FileError> {
        let window = lease.window.0;
        match lease.scope {
            RawScope::Session => Ok(None),
            RawScope::Window if (Duration::from_millis(1)..=MAX_WINDOW).contains(&window) => {
                Ok(Some(window))
            }
            RawScope::Window => {
                self.wrong("lease.window", "out of range; use \"1ms\" to \"60s\", such as \"10s\"")
            }
        }
    }

    fn client_certificate(
        &mut self,
        raw: Option<RawClientCertificate>,
    ) -> Result<Option<ClientCertificate>, FileError> {
        let Some(RawClientCertificate { certificate, key }) = raw else { return Ok(None) };
        let certificate = self.file.resolve(&certificate);
        let field = "openbao.client_certificate.certificate";
        self.read(field, &certificate, MAX_PEM)?;
        let key = self.secret_file("openbao.client_certificate.key", &key)?;
        Ok(Some(ClientCertificate { certificate, key }))
    }

    fn namespace(&self, raw: Option<String>) -> Result<Option<String>, FileError> {
        match raw {
            Some(name) if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) => {
                self.wrong("openbao.namespace", "not a namespace; write it like \"team-a\"")
            }
            name => Ok(name),
        }
    }

    fn authority(
        &mut self,
        auth: Option<RawAuth>,
        lease: RawLease,
        shows_certificate: bool,
    ) -> Result<lease::Authority, FileError> {
        match (lease.authority, lease.session, auth) {
            (RawAuthority::Proxy, None, Some(auth)) => {
                Ok(lease::Authority::Proxy(self.openbao_auth(auth, shows_certificate)?))
            }
            (RawAuthority::Proxy, None, None) => {
                self.wrong("openbao.auth", "missing; pgsilo needs a way to log in to OpenBAO")
            }
            (RawAuthority::Proxy, Some(_), _) => {
                self.wrong("lease.session", "only with authority = \"session\"")
            }
            (RawAuthority::Session, _, Some(_)) => self.wrong(
                "openbao.auth",
                "remove it: with authority = \"session\" pgsilo itself does not log in to OpenBAO",
            ),
            (RawAuthority::Session, None, None) => {
                self.wrong("lease.session", "missing; name the roles of OpenBAO's JWT method")
            }
            (RawAuthority::Session, Some(session), None) => self.session_authority(session),
        }
    }

    fn session_authority(&self, raw: RawSession) -> Result<lease::Authority, FileError> {
        let mount = self.mount("lease.session.mount", raw.mount, "jwt")?;
        if raw.roles.is_empty() {
            return self.wrong("lease.session.roles", "empty; name a role for each access");
        }
        let mut roles = BTreeMap::new();
        for (access, role) in raw.roles {
            let field = format!("lease.session.roles.{access}");
            let access = match access.parse::<Access>() {
                Ok(access) => access,
                Err(error) => return self.wrong(field, error),
            };
            if role.is_empty() {
                return self.wrong(field, "empty; write the role's name");
            }
            roles.insert(access, role);
        }
        Ok(lease::Authority::Session { mount, roles })
    }

    /// Mounts go into a URL's path.
    pub(super) fn mount(
        &self,
        field: &str,
        raw: Option<String>,
        default: &str,
    ) -> Result<String, FileError> {
        let mount = raw.unwrap_or_else(|| default.to_owned());
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./".contains(&byte);
        let parts_are_names = mount.split('/').all(|part| !matches!(part, "" | "." | ".."));
        match parts_are_names && mount.bytes().all(plain) {
            true => Ok(mount),
            false => self
                .wrong(field, format_args!("{mount:?} is not a mount; write it like {default:?}")),
        }
    }

    fn openbao_address(&self, text: &str) -> Result<(String, Option<PathBuf>), FileError> {
        const FIELD: &str = "openbao.address";
        if let Some(path) = text.strip_prefix("unix:") {
            let socket = PathBuf::from(path);
            return match socket.is_absolute() {
                true => Ok(("http://localhost".to_owned(), Some(socket))),
                false => {
                    self.wrong(FIELD, "not an absolute path; write it like \"unix:/run/bao.sock\"")
                }
            };
        }
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
        Ok((text.trim_end_matches('/').to_owned(), None))
    }

    fn openbao_auth(
        &mut self,
        raw: RawAuth,
        shows_certificate: bool,
    ) -> Result<lease::Auth, FileError> {
        let RawAuth { approle, kubernetes, jwt, certificate, token_file } = raw;
        match (approle, kubernetes, jwt, certificate, token_file) {
            (Some(approle), None, None, None, None) => self.approle(approle),
            (None, Some(login), None, None, None) => {
                self.jwt_login("kubernetes", Some(SERVICE_ACCOUNT), login)
            }
            (None, None, Some(login), None, None) => self.jwt_login("jwt", None, login),
            (None, None, None, Some(_), None) if !shows_certificate => self.wrong(
                "openbao.auth.certificate",
                "needs openbao.client_certificate, the certificate to show",
            ),
            (None, None, None, Some(login), None) => {
                let mount = self.mount("openbao.auth.certificate.mount", login.mount, "cert")?;
                Ok(lease::Auth::Certificate { mount, role: login.role })
            }
            (None, None, None, None, Some(path)) => {
                Ok(lease::Auth::TokenFile(self.secret_file("openbao.auth.token_file", &path)?))
            }
            (None, None, None, None, None) => self.wrong(
                "openbao.auth",
                "empty; add one of approle, kubernetes, jwt, certificate, token_file",
            ),
            _several => self.wrong(
                "openbao.auth",
                "several methods; keep one of approle, kubernetes, jwt, certificate, token_file",
            ),
        }
    }

    fn approle(&mut self, raw: RawAppRole) -> Result<lease::Auth, FileError> {
        if raw.role_id.is_empty() {
            return self.wrong("openbao.auth.approle.role_id", "empty; write the role's id");
        }
        let mount = self.mount("openbao.auth.approle.mount", raw.mount, "approle")?;
        let field = "openbao.auth.approle.secret_id_file";
        let secret_id_file = self.secret_file(field, &raw.secret_id_file)?;
        let (role_id, wrapped) = (raw.role_id, raw.wrapped);
        Ok(lease::Auth::AppRole { mount, role_id, secret_id_file, wrapped })
    }

    fn jwt_login(
        &mut self,
        method: &str,
        usual_file: Option<&str>,
        raw: RawJwtLogin,
    ) -> Result<lease::Auth, FileError> {
        let field = format!("openbao.auth.{method}");
        let mount = self.mount(&format!("{field}.mount"), raw.mount, method)?;
        let Some(path) = raw.token_file.or(usual_file.map(PathBuf::from)) else {
            return self.wrong(format!("{field}.token_file"), "missing; name the file of the JWT");
        };
        let token_file = self.secret_file(&format!("{field}.token_file"), &path)?;
        Ok(lease::Auth::Jwt { mount, role: raw.role, token_file })
    }
}
