//! The login to a tenant's database with a leased credential, and the reading of its seal.
//!
//! Invariant: an [`Attachment`] exists only after the server proved that it knows the
//! credential (SCRAM's server signature; md5 and cleartext only where the placement allows
//! them) and after its catalog named the tenant that was asked for. Everything a server says
//! before that is bounded, and none of its text reaches a client.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;
use bytes::Bytes;
use pgsilo_core::clock::BootTime;
use pgsilo_core::registry::Tenant;
use pgsilo_core::tenant::TenantId;
use pgsilo_wire::message::{self, Authentication, ErrorFields};
use pgsilo_wire::startup::{self, StartupError};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::ScramSha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::binding::Exchange;
use super::hashing::{HashError, hash};
use super::version::ServerVersion;
use super::{Connection, Process, Route};
use crate::lease::{Credential, Fullness};
use crate::stream::{self, Stream};

/// The longest message that a database may send before its first ReadyForQuery, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// The most that all of its messages may come to before then, or until a question of ours is answered,
/// in bytes.
const MAX_LOGIN: usize = 256 * 1024;
/// PostgreSQL's default is 4096; the count is the server's to choose and ours to pay for.
const MAX_SCRAM_ITERATIONS: u32 = 100_000;
/// How long a process that has refused a login may take to be gone.
const GONE: Duration = Duration::from_secs(1);

/// A message's tag and length.
const HEADER: usize = 5;
/// How often a question is asked that the session's own time-outs cancel.
const ATTEMPTS: usize = 8;
/// Room that is made before a read, in bytes: for the answer to a login, or to a question.
const READ_AT_ONCE: usize = 4096;

/// Asks for the seal, from the catalog: a SHOW would tell what the client's own `options` say. The
/// client's search_path is in force, so every name is qualified; and its encoding, so that no other
/// setting is read, which might not be sayable in it.
pub(super) fn seal_query(nonce: &str) -> String {
    format!(
        "SELECT '{nonce}' OPERATOR(pg_catalog.||) pg_catalog.substr(setting, 15) \
         FROM pg_catalog.unnest((SELECT setconfig FROM pg_catalog.pg_db_role_setting \
         WHERE setrole OPERATOR(pg_catalog.=) '0'::pg_catalog.oid \
         AND setdatabase OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database \
         WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()))) AS setting \
         WHERE pg_catalog.starts_with(setting, 'pgsilo.tenant=')"
    )
}

/// A logged-in connection to a database that is the tenant's.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) stream: Stream,
    pub(crate) process: Process,
    /// ParameterStatus and notices as they came, for the client.
    pub(crate) greeting: Vec<u8>,
    pub(crate) past: Past,
}

/// What has become of a connection since it was logged in on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    pub(crate) made: BootTime,
    /// When its database was last asked whose it is, and said so.
    pub(crate) sealed: BootTime,
    /// How many sessions have had it before.
    pub(crate) sessions: u32,
    /// Whether its login was bound to its TLS channel.
    pub(crate) is_bound: bool,
    /// Of the server, if it has said so.
    pub(super) version: Option<ServerVersion>,
}

/// An [`Attachment`] that waits for its session, on no event loop.
#[derive(Debug)]
pub(crate) struct Parked {
    stream: stream::Parked,
    process: Process,
    greeting: Vec<u8>,
    past: Past,
}

impl Attachment {
    /// Leaves the event loop. Nothing is read until it is resumed.
    pub(crate) fn park(self) -> io::Result<Parked> {
        let Attachment { stream, process, greeting, past } = self;
        Ok(Parked { stream: stream.park()?, process, greeting, past })
    }
}

impl Parked {
    /// Tells the database that nobody will use it, and waits until its place there is free: its process
    /// gives that back before its end closes the connection.
    pub(crate) async fn say_goodbye(self) -> io::Result<()> {
        let mut stream = self.stream.resume()?;
        stream.write_all(&message::TERMINATE).await?;
        stream.shutdown().await?;
        closed(&mut stream).await
    }

    /// The database's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Comes to the event loop that this runs on, if the connection still lives and its database is
    /// sealed for the tenant of the route, which must be the one that it was dialled for. What the
    /// database said of that lately counts, if it has said nothing since then.
    pub(crate) async fn resume(
        self,
        route: &Arc<Route>,
        lately: Duration,
    ) -> Result<Attachment, BackendError> {
        let Parked { stream, process, mut greeting, mut past } = self;
        if past.sealed.elapsed() < lately && stream.is_silent() {
            return Ok(Attachment { stream: stream.resume()?, process, greeting, past });
        }
        let stream = stream.resume()?;
        let mut connection = Connection::new(stream, route, process.redial.clone());
        connection.version = past.version;
        // What a reload has changed meanwhile is told here as well, and becomes part of the greeting.
        past.sealed = BootTime::now();
        connection.check_seal(route.tenant().id(), &mut greeting).await?;
        Ok(Attachment { stream: connection.into_stream()?, process, greeting, past })
    }
}

/// Reads until the database has closed.
async fn closed(stream: &mut Stream) -> io::Result<()> {
    let mut sink = [0; 64];
    while stream.read(&mut sink).await? > 0 {}
    Ok(())
}

/// Why a login to a database failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    #[error("the database closed the connection during login: {0}")]
    Lost(#[from] io::Error),
    #[error("the database broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the leased name or a setting cannot be sent: {0}")]
    Unsendable(#[from] StartupError),
    #[error("the database asked for {0}, which the placement's `auth` does not allow")]
    MethodRefused(&'static str),
    #[error("the database asked for authentication method {0}, which is not supported")]
    MethodUnknown(u32),
    #[error("the database let the session in without a password: its pg_hba.conf says trust")]
    Trusting,
    #[error("the database asked for {0} SCRAM iterations; at most 100000 are done")]
    Iterations(u32),
    #[error(
        "SCRAM cannot be bound to the TLS channel, which the placement's `tls` asks for \
         (channel_binding): {0}"
    )]
    Unbound(&'static str),
    #[error("SCRAM failed: {0}")]
    Scram(io::Error),
    #[error("SCRAM cannot be computed here: {0}")]
    Hashing(#[from] HashError),
    #[error("the database said {sqlstate}: {text}")]
    Said { sqlstate: String, text: String },
    #[error("the database said 53300: {text}")]
    Full { whose: Fullness, text: String },
    #[error("the database refused a startup setting: {sqlstate}: {text}")]
    Setting { sqlstate: String, text: String },
    #[error(
        "PostgreSQL {is} does not keep the role that a leased role is set to become: {needs} is needed"
    )]
    Outdated { is: ServerVersion, needs: ServerVersion },
    #[error("the database has no seal; `ALTER DATABASE ... SET pgsilo.tenant = '{0}'` seals it")]
    Unsealed(TenantId),
    #[error("the database is sealed for tenant {found:?}, not for {expected}")]
    SealBroken { expected: TenantId, found: String },
}

impl From<ErrorFields> for BackendError {
    fn from(ErrorFields { sqlstate, text, routine }: ErrorFields) -> BackendError {
        match sqlstate.as_str() {
            "53300" => BackendError::Full { whose: fullness(&routine), text },
            _ => BackendError::Said { sqlstate, text },
        }
    }
}

/// A server with no connection left says so before it looks at the database (`InitProcess` in `proc.c`,
/// `ProcessStartupPacket` where even the processes are used up) or keeps the last ones back
/// (`InitPostgres` in `postinit.c`); limits of a database or a role are looked at elsewhere.
fn fullness(routine: &str) -> Fullness {
    match routine {
        "InitProcess" | "InitPostgres" | "ProcessStartupPacket" | "BackendInitialize" => {
            Fullness::OfServer
        }
        _ => Fullness::OfOne,
    }
}

impl BackendError {
    /// Whether the database ended the session because nobody asked anything.
    pub(crate) fn ended_for_idling(&self) -> bool {
        match self {
            BackendError::Said { sqlstate, .. } | BackendError::Setting { sqlstate, .. } => {
                sqlstate == "57P05"
            }
            _ => false,
        }
    }

    /// Whose connections are used up, if that is why.
    pub(crate) fn fullness(&self) -> Option<Fullness> {
        match self {
            BackendError::Full { whose, .. } => Some(*whose),
            _ => None,
        }
    }
}

impl Connection {
    /// Logs in as the leased role, with the route's settings, and reads the seal. One that is refused for
    /// want of connections is one itself for a moment, which is waited for.
    pub(crate) async fn log_in(
        mut self,
        credential: &Credential,
    ) -> Result<Attachment, BackendError> {
        match self.begin(credential).await {
            Ok((process, greeting, past)) => {
                Ok(Attachment { stream: self.into_stream()?, process, greeting, past })
            }
            Err(error) => {
                if error.fullness().is_some() {
                    let _best_effort = timeout(GONE, closed(&mut self.stream)).await;
                }
                Err(error)
            }
        }
    }

    async fn begin(
        &mut self,
        credential: &Credential,
    ) -> Result<(Process, Vec<u8>, Past), BackendError> {
        let tenant = Arc::clone(self.route.tenant());
        let dbname = &tenant.placement().dbname;
        let packet = startup::encode(credential.username(), dbname, self.route.settings())?;
        self.send(&packet).await?;
        let is_bound = self.authenticate(credential, &tenant).await?;
        let (process, mut greeting) = self.read_greeting().await?;
        self.check_version(&greeting)?;
        let now = BootTime::now();
        self.check_seal(tenant.id(), &mut greeting).await?;
        let version = self.version;
        let past = Past { made: now, sealed: now, sessions: 0, is_bound, version };
        Ok((process, greeting, past))
    }

    /// Whether the login is bound to its TLS channel.
    async fn authenticate(
        &mut self,
        credential: &Credential,
        tenant: &Tenant,
    ) -> Result<bool, BackendError> {
        let auth = &tenant.placement().auth;
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

    /// Takes note of the server's version, and refuses one under which a leased role does not become
    /// its owner's. One that says nothing of its version is a fork; one that does is taken at its word.
    fn check_version(&mut self, greeting: &[u8]) -> Result<(), BackendError> {
        self.version = ServerVersion::of(greeting);
        match self.version.and_then(|is| Some((is, is.needs()?))) {
            Some((is, needs)) => Err(BackendError::Outdated { is, needs }),
            None => Ok(()),
        }
    }

    async fn check_seal(
        &mut self,
        tenant: &TenantId,
        greeting: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        let mut news = Vec::new();
        let told = |setting: &[u8]| message::raw(&mut news, b'S', setting);
        let seals = self.ask(&[], seal_query, told).await.map_err(ended_by_setting)?;
        is_sealed_for(tenant, &seals)?;
        if !news.is_empty() {
            *greeting = told_anew(greeting, &news);
        }
        Ok(())
    }

    /// Runs statements and a question behind them, each on its own but all sent at once; the rows of
    /// the last answer, each one text. `told` is given the settings that are told between, as bodies of
    /// ParameterStatus; notices of our own questions are nobody's.
    ///
    /// The question is asked in a transaction of its own, with settings of its own: those of the client,
    /// its role and its database may let no statement finish, or have it wait for other transactions. One
    /// that is cancelled in spite of that, by a time-out that was in force until it was set aside, is
    /// asked again.
    ///
    /// The question is made of something that nobody can know, and every row of its answer must begin
    /// with that: so what is read is the answer to this question, and not to one that was asked here
    /// before, nor the invention of whoever was here before. Nothing is left unread.
    pub(super) async fn ask(
        &mut self,
        statements: &[&str],
        question: impl Fn(&str) -> String,
        mut told: impl FnMut(&[u8]),
    ) -> Result<Vec<Vec<u8>>, BackendError> {
        let mut answer = self.ask_once(statements, "BEGIN", &question, &mut told).await?;
        for _ in 1..ATTEMPTS {
            if matches!(answer, Answer::Rows(_)) {
                break;
            }
            answer = self.ask_once(&[], "ROLLBACK; BEGIN", &question, &mut told).await?;
        }
        match answer {
            Answer::Rows(rows) => Ok(rows),
            Answer::Cancelled(error) => Err(error.into()),
        }
    }

    async fn ask_once(
        &mut self,
        statements: &[&str],
        begin: &str,
        question: impl Fn(&str) -> String,
        mut told: impl FnMut(&[u8]),
    ) -> Result<Answer, BackendError> {
        let mut nonce = [0; 16];
        rand::fill(&mut nonce).map_err(|_none| BackendError::Protocol("no randomness"))?;
        let nonce = format!("{:032x}", u128::from_ne_bytes(nonce));
        let question = format!("{begin} {}; {}; COMMIT", self.own_settings(), question(&nonce));
        let mut queries = Vec::new();
        for statement in statements.iter().copied().chain([question.as_str()]) {
            message::raw(&mut queries, b'Q', &[statement.as_bytes(), &[0]].concat());
        }
        self.send(&queries).await?;
        let mut rows = Vec::new();
        let mut cancelled = None;
        let mut unanswered = statements.len() + 1;
        while unanswered > 0 || !self.unread.is_empty() {
            let (tag, body) = self.read_message().await?;
            match tag {
                b'S' => told(&body),
                b'N' => {}
                b'D' if unanswered == 1 => {
                    let row = message::parse_single_column(&body)
                        .ok_or(BackendError::Protocol("a row that is not one text"))?;
                    let own = row.strip_prefix(nonce.as_bytes());
                    rows.push(
                        own.ok_or(BackendError::Protocol("an answer to something else"))?
                            .to_owned(),
                    );
                }
                b'E' => {
                    let error = ErrorFields::parse(&body);
                    if unanswered > 1 || error.sqlstate != "57014" {
                        return Err(error.into());
                    }
                    cancelled = Some(error);
                }
                b'T' | b'D' | b'C' if unanswered > 0 => {}
                b'Z' if unanswered > 0 && (body.as_ref() == b"I" || cancelled.is_some()) => {
                    unanswered -= 1;
                }
                _ => return Err(BackendError::Protocol("an unknown message behind a query")),
            }
        }
        Ok(cancelled.map_or(Answer::Rows(rows), Answer::Cancelled))
    }

    /// Of a transaction in which no setting of the session's is in the way. What may end it comes first.
    fn own_settings(&self) -> String {
        let bounded = self.version.is_some_and(ServerVersion::bounds_transactions);
        let timeout = if bounded { "SET LOCAL transaction_timeout TO 0; " } else { "" };
        format!(
            "ISOLATION LEVEL READ COMMITTED, READ ONLY, NOT DEFERRABLE; {timeout}\
             SET LOCAL statement_timeout TO 0; SET LOCAL lock_timeout TO 0"
        )
    }

    async fn read_authentication(&mut self) -> Result<Authentication, BackendError> {
        loop {
            let (tag, body) = self.read_message().await?;
            return match tag {
                b'R' => Authentication::parse(&body)
                    .ok_or(BackendError::Protocol("a malformed authentication request")),
                b'E' => Err(ErrorFields::parse(&body).into()),
                b'N' => continue,
                _ => Err(BackendError::Protocol("not an answer that PostgreSQL gives to a login")),
            };
        }
    }

    /// The next message. What has come behind it waits for the next call.
    async fn read_message(&mut self) -> Result<(u8, Bytes), BackendError> {
        self.fill(HEADER).await?;
        let tag = self.unread[0];
        let length = u32::from_be_bytes([1, 2, 3, 4].map(|at| self.unread[at]));
        let length = (length as usize)
            .checked_sub(4)
            .filter(|length| *length <= MAX_MESSAGE)
            .ok_or(BackendError::Protocol("a message of an impossible length"))?;
        self.heard += HEADER + length;
        if self.heard > MAX_LOGIN {
            return Err(BackendError::Protocol(
                "more messages during its login than are believable",
            ));
        }
        self.fill(HEADER + length).await?;
        let message = self.unread.split_to(HEADER + length).freeze();
        Ok((tag, message.slice(HEADER..)))
    }

    /// Reads until that many bytes are there, and what comes with them.
    async fn fill(&mut self, bytes: usize) -> io::Result<()> {
        while self.unread.len() < bytes {
            self.unread.reserve(READ_AT_ONCE.max(bytes - self.unread.len()));
            if self.stream.read_buf(&mut self.unread).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<(), BackendError> {
        let body = zeroize::Zeroizing::new([password, &[0]].concat());
        self.send_tagged(b'p', &body).await
    }

    async fn send_tagged(&mut self, tag: u8, body: &[u8]) -> Result<(), BackendError> {
        let mut packet = zeroize::Zeroizing::new(Vec::with_capacity(body.len() + 5));
        message::raw(&mut packet, tag, body);
        self.send(&packet).await
    }

    async fn send(&mut self, packet: &[u8]) -> Result<(), BackendError> {
        self.stream.write_all(packet).await?;
        self.stream.flush().await?;
        Ok(())
    }
}

/// What became of a question.
enum Answer {
    Rows(Vec<Vec<u8>>),
    /// A time-out came before it could be set aside.
    Cancelled(ErrorFields),
}

/// A time-out of the session's own settings has cancelled the question, or ended the connection, before it
/// could be set aside.
fn ended_by_setting(error: BackendError) -> BackendError {
    match error {
        BackendError::Said { sqlstate, text }
            if matches!(sqlstate.as_str(), "25P03" | "25P04" | "57014" | "57P05") =>
        {
            BackendError::Setting { sqlstate, text }
        }
        other => other,
    }
}

/// A greeting with settings that were told behind it: of what is told twice, the last counts.
fn told_anew(greeting: &[u8], news: &[u8]) -> Vec<u8> {
    let messages: Vec<_> = message::split(greeting).chain(message::split(news)).collect();
    let mut told = Vec::with_capacity(greeting.len());
    for (at, message) in messages.iter().enumerate() {
        let name = setting_told(message);
        if name.is_none() || messages[at + 1..].iter().all(|later| setting_told(later) != name) {
            message::raw(&mut told, message.0, message.1);
        }
    }
    told
}

/// Which setting a message tells of, if any.
fn setting_told<'m>((tag, body): &(u8, &'m [u8])) -> Option<&'m [u8]> {
    body.split(|byte| *byte == 0).next().filter(|_| *tag == b'S')
}

/// Whether the answer to [`seal_query`] is a tenant's.
pub(super) fn is_sealed_for(tenant: &TenantId, seals: &[Vec<u8>]) -> Result<(), BackendError> {
    match seals {
        [found] if *found == tenant.as_str().as_bytes() => Ok(()),
        [found] => {
            let found = String::from_utf8_lossy(found).into_owned();
            Err(BackendError::SealBroken { expected: tenant.clone(), found })
        }
        _ => Err(BackendError::Unsealed(tenant.clone())),
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
    use super::{scram_iterations, told_anew};
    use pgsilo_wire::message;

    fn messages(messages: &[(u8, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (tag, text) in messages {
            message::raw(&mut bytes, *tag, format!("{text}\0").as_bytes());
        }
        bytes
    }

    #[test]
    fn a_greeting_that_is_told_anew_does_not_grow() {
        let greeting =
            messages(&[(b'N', "welcome"), (b'S', "TimeZone\0UTC"), (b'S', "is_superuser\0off")]);
        let news = messages(&[
            (b'S', "TimeZone\0Asia/Seoul"),
            (b'S', "DateStyle\0ISO"),
            (b'S', "TimeZone\0Asia/Tokyo"),
        ]);
        let told = told_anew(&greeting, &news);
        let expected = messages(&[
            (b'N', "welcome"),
            (b'S', "is_superuser\0off"),
            (b'S', "DateStyle\0ISO"),
            (b'S', "TimeZone\0Asia/Tokyo"),
        ]);
        assert_eq!(told, expected);
        assert_eq!(told_anew(&told, &news), expected);
    }

    #[test]
    fn iterations_are_read_from_the_challenge() {
        assert_eq!(scram_iterations(b"r=abc,s=QSXCR+Q6sek8bf92,i=4096"), Some(4096));
        assert_eq!(scram_iterations(b"r=i=7,s=x,i=99999999999"), None);
        assert_eq!(scram_iterations(b"r=abc"), None);
    }
}
