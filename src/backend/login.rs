//! The login to a tenant's database with a leased credential.
//!
//! Invariant: an [`Attachment`] exists only after the server proved that it knows the credential
//! (SCRAM's server signature; md5 and cleartext only where the placement allows them) and after its
//! catalog named the tenant that was asked for (`seal.rs`). None of a server's text reaches a
//! client.

use std::sync::Arc;
use std::time::Duration;

use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::Tenant;
use pgsilo_wire::message::{self, Authentication, ErrorFields};
use pgsilo_wire::startup;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::ScramSha256;
use tokio::time::{sleep, timeout};

use super::binding::Exchange;
use super::error::BackendError;
use super::hashing::hash;
use super::idle::{Attachment, History};
use super::messages::closed;
use super::version::ServerVersion;
use super::{Connection, Process};
use crate::clusters::Reign;
use crate::lease::Credential;

/// PostgreSQL's default is 4096; the count is the server's to choose and ours to pay for.
const MAX_SCRAM_ITERATIONS: u32 = 100_000;
/// How long a role that was just made is waited for at a standby, each time it is not there yet; milliseconds.
const REPLAYED: [u64; 6] = [5, 10, 20, 40, 80, 160];
/// How long a process that has refused a login may take to be gone.
const GONE: Duration = Duration::from_secs(1);

impl Connection {
    /// Logs in as the leased role, with the route's settings, and reads the seal. One that is
    /// refused for want of connections is one itself for a moment, which is waited for; and so is the
    /// role at a standby, which has it a moment after the primary.
    pub(crate) async fn log_in(
        mut self,
        credential: &Credential,
    ) -> Result<Attachment, BackendError> {
        let mut pauses = REPLAYED.into_iter();
        loop {
            let error = match self.begin(credential).await {
                Ok((process, greeting, history, reign)) => {
                    let stream = self.into_stream()?;
                    return Ok(Attachment { stream, process, greeting, history, reign });
                }
                Err(error) => error,
            };
            if error.full_scope().is_some() {
                let _best_effort = timeout(GONE, closed(&mut self.stream)).await;
            }
            let is_the_servers = error.full_scope().is_some() || error.may_be_the_servers();
            let Some(cluster) = self.at_standby().filter(|_| is_the_servers).cloned() else {
                return Err(error);
            };
            let host = self.redial.host().clone();
            let again = match pauses.next().filter(|_| error.is_unknown_role()) {
                Some(pause) => {
                    sleep(Duration::from_millis(pause)).await;
                    self.dialled_again().await.ok()
                }
                None => None,
            };
            match again {
                Some(again) => self = again,
                None => {
                    cluster.was_no_use(&host);
                    return Err(BackendError::OfNoUse(Box::new(error)));
                }
            }
        }
    }

    async fn begin(
        &mut self,
        credential: &Credential,
    ) -> Result<(Process, Vec<u8>, History, Option<Reign>), BackendError> {
        let tenant = Arc::clone(self.route.tenant());
        let dbname = &tenant.placement().dbname;
        let packet = startup::encode(credential.username(), dbname, self.route.settings())?;
        self.send(&packet).await?;
        let is_bound = self.authenticate(credential, &tenant).await?;
        let (process, mut greeting) = self.read_greeting().await?;
        self.check_version(&greeting)?;
        let now = BootTime::now();
        let reign = self.check_seal(&tenant, &mut greeting).await?;
        let version = self.version;
        let history = History { opened: now, sealed: now, sessions: 0, is_bound, version };
        Ok((process, greeting, history, reign))
    }

    /// Whether the login is bound to its TLS channel.
    async fn authenticate(
        &mut self,
        credential: &Credential,
        tenant: &Tenant,
    ) -> Result<bool, BackendError> {
        let auth = &tenant.placement().cluster.auth;
        let is_bound = match self.read_authentication().await? {
            Authentication::Sasl(offered) => self.scram(credential, &offered).await?,
            Authentication::Md5Password(salt) if auth.md5 => {
                let hash = md5_hash(
                    credential.username().as_bytes(),
                    credential.password().expose(),
                    salt,
                );
                self.send_password(hash.as_bytes()).await?;
                false
            }
            Authentication::CleartextPassword if auth.password => {
                self.send_password(credential.password().expose()).await?;
                false
            }
            Authentication::Md5Password(_) => return Err(BackendError::MethodRefused("md5")),
            Authentication::CleartextPassword => {
                return Err(BackendError::MethodRefused("a password in clear"));
            }
            Authentication::Ok => return Err(BackendError::Trusting),
            Authentication::Other(code) => return Err(BackendError::MethodUnknown(code)),
            Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => {
                return Err(BackendError::Protocol("SASL goes on before it began"));
            }
        };
        match self.read_authentication().await? {
            Authentication::Ok => Ok(is_bound),
            _ => Err(BackendError::Protocol("a second authentication request")),
        }
    }

    /// SCRAM-SHA-256-PLUS or SCRAM-SHA-256, as the channel and its placement have it; whether it is
    /// bound to the channel.
    async fn scram(
        &mut self,
        credential: &Credential,
        offered: &[String],
    ) -> Result<bool, BackendError> {
        let Exchange { mechanism, header, is_bound } = self.channel().exchange(offered)?;
        let mut scram = ScramSha256::new(credential.password().expose(), header);
        let mut first = mechanism.as_bytes().to_vec();
        first.push(0);
        first.extend_from_slice(&(scram.message().len() as u32).to_be_bytes());
        first.extend_from_slice(scram.message());
        self.send_tagged(b'p', &first).await?;

        let Authentication::SaslContinue(challenge) = self.read_authentication().await? else {
            return Err(BackendError::Protocol("no SCRAM challenge"));
        };
        let iterations = scram_iterations(&challenge)
            .ok_or(BackendError::Protocol("a SCRAM challenge without iterations"))?;
        if iterations > MAX_SCRAM_ITERATIONS {
            return Err(BackendError::Iterations(iterations));
        }
        let update = move || scram.update(&challenge).map(|()| scram);
        let tenant = Arc::clone(self.route.tenant());
        let mut scram = hash(tenant.id(), update).await?.map_err(BackendError::Scram)?;
        self.send_tagged(b'p', scram.message()).await?;

        let Authentication::SaslFinal(last) = self.read_authentication().await? else {
            return Err(BackendError::Protocol("no SCRAM server signature"));
        };
        scram.finish(&last).map_err(BackendError::Scram)?;
        Ok(is_bound)
    }

    /// All that comes between AuthenticationOk and the first ReadyForQuery.
    async fn read_greeting(&mut self) -> Result<(Process, Vec<u8>), BackendError> {
        let mut greeting = Vec::with_capacity(512);
        let mut key = None;
        loop {
            let (tag, body) = self.read_message().await?;
            match tag {
                b'S' | b'N' => message::raw(&mut greeting, tag, &body),
                b'K' => {
                    let parsed = message::parse_backend_key_data(&body);
                    key = Some(parsed.ok_or(BackendError::Protocol("a malformed cancel key"))?);
                }
                b'E' => return Err(refused_setting(ErrorFields::parse(&body))),
                b'Z' => break,
                _ => return Err(BackendError::Protocol("an unknown message during login")),
            }
        }
        Ok((Process { key, redial: self.redial.clone() }, greeting))
    }

    /// Takes note of the server's version, and refuses one under which a leased role does not
    /// become its owner's. One that says nothing of its version is a fork; one that does is taken
    /// at its word.
    fn check_version(&mut self, greeting: &[u8]) -> Result<(), BackendError> {
        self.version = ServerVersion::of(greeting);
        match self.version.and_then(|is| Some((is, is.needs()?))) {
            Some((is, needs)) => Err(BackendError::Outdated { is, needs }),
            None => Ok(()),
        }
    }
}

/// After the authentication PostgreSQL applies the client's settings, and says of one that is
/// wrong: invalid_parameter_value, undefined_object, undefined_file (a library to load) or, of
/// `options`, syntax_error (`process_startup_options` in `postinit.c`). insufficient_privilege and
/// cant_change_runtime_param may be about other things, so they count only where `guc.c` says them:
/// what it says of the database's own settings, and of the role's, are warnings.
fn refused_setting(fields: ErrorFields) -> BackendError {
    let ErrorFields { sqlstate, text, routine } = fields;
    let of_settings = || routine.starts_with("set_config") || routine.starts_with("call_");
    match sqlstate.as_str() {
        // The client's encoding is one, and the database's cannot be converted to it.
        "0A000" if routine == "InitializeClientEncoding" => {
            BackendError::Setting { sqlstate, text }
        }
        "22023" | "42704" | "42601" | "58P01" => BackendError::Setting { sqlstate, text },
        "42501" | "55P02" if of_settings() => BackendError::Setting { sqlstate, text },
        _ => ErrorFields { sqlstate, text, routine }.into(),
    }
}

/// The `i=` attribute of a SCRAM server-first-message (RFC 5802, section 7).
fn scram_iterations(challenge: &[u8]) -> Option<u32> {
    let mut attributes = challenge.split(|byte| *byte == b',');
    let count = attributes.find_map(|attribute| attribute.strip_prefix(b"i="))?;
    std::str::from_utf8(count).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::scram_iterations;

    #[test]
    fn iterations_are_read_from_the_challenge() {
        assert_eq!(scram_iterations(b"r=abc,s=QSXCR+Q6sek8bf92,i=4096"), Some(4096));
        assert_eq!(scram_iterations(b"r=i=7,s=x,i=99999999999"), None);
        assert_eq!(scram_iterations(b"r=abc"), None);
    }
}
