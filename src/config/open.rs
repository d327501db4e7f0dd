//! What a configuration names, read, and made into what a proxy is started with.
//!
//! Errors and warnings have their places in the configuration's file. Nothing is fetched, nothing
//! is started.

mod names;

use std::collections::HashSet;
use std::path::Path;

use pgsilo_core::tls::{self, OfClients, ServerFiles, TlsError};
use pgsilo_openbao::{ClientCertificate, OpenBao};
use rustls_pki_types::UnixTime;

use super::build::Build;
use super::{Config, FileError, ListenerSettings, Opened, RegistrySettings, Sources, WORDS};
use crate::lease::Authority;
use crate::listener::Listener;
use crate::registry::{Denied, Registry, RegistryFile};
use crate::registry_database::{RegistryDatabase, RegistrySource};
use crate::token::{Issuer, IssuerFault, KeySource, KeysAt, Verifier};

pub(super) fn open(config: Config) -> Result<Opened, FileError> {
    let Config { proxy, openbao, admin, cores, file, .. } = config;
    let mut build = Build { file: &file, warnings: config.warnings };
    let listeners = config.listeners.into_iter().enumerate();
    let listeners: Vec<_> = listeners
        .map(|(index, listener)| build.listener(&format!("listener[{index}]"), listener))
        .collect::<Result<_, _>>()?;
    let named = names::tenants_of(&config.issuers);
    let issuers = config.issuers.iter().map(|issuer| issuer.issuer.to_string()).collect();
    let verifier = build.verifier(config.issuers)?;
    let openbao = build.client_of_openbao(openbao)?;
    let denied = config.denied.as_deref().map(|path| build.denied(path, issuers)).transpose()?;
    // Last: it is the file that can be large.
    let (registry_source, registry) = build.read_registry(config.registry)?;
    // What a database says is not known here.
    if registry.is_read() {
        let snapshot = registry.snapshot();
        build.mind_shared_servers(&snapshot, &proxy.limits.times);
        build.mind_names(&snapshot);
        build.mind_lookalikes(&snapshot);
        build.mind_unknown_tenants(&snapshot, &named);
        build.mind_databases_in_clear(&snapshot);
        let is_sessions = matches!(proxy.lease.authority, Authority::Session { .. });
        build.mind_unwatched_clusters(&snapshot, is_sessions);
        if is_sessions && snapshot.has_aliases() {
            build.warn("registry.file", WORDS);
        }
        build.mind_listeners(&snapshot, &listeners);
    }
    let warnings = build.warnings;
    let sources = Sources { listeners, verifier, registry, registry_source, denied };
    Ok(Opened { sources, settings: proxy, openbao, admin, cores, warnings })
}

impl Build<'_> {
    fn listener(&mut self, at: &str, settings: ListenerSettings) -> Result<Listener, FileError> {
        let files = settings.tls.as_ref().map(|tls| tls.server.clone());
        let listener = settings.open().or_else(|error| {
            let field = files.as_ref().map_or("certificate", |files| field_of(&error, files));
            self.wrong(format!("{at}.tls.{field}"), error)
        })?;
        if let Some((files, tls)) = files.zip(listener.tls.as_ref()) {
            for complaint in tls.server.complaints(UnixTime::now()) {
                let field = of_clients(&complaint.file, &files).unwrap_or("certificate");
                self.warn(format!("{at}.tls.{field}"), complaint);
            }
        }
        Ok(listener)
    }

    fn verifier(&mut self, issuers: Vec<Issuer<KeySource>>) -> Result<Verifier, FileError> {
        let (mut opened, mut fields) = (Vec::new(), Vec::new());
        for (index, issuer) in issuers.into_iter().enumerate() {
            let field = match &issuer.keys {
                KeySource::Listed(_) => "keys",
                KeySource::File(_) => "jwks",
                KeySource::Fetched { at: KeysAt::Jwks(_), .. } => "jwks_url",
                KeySource::Fetched { at: KeysAt::Discovery { .. }, .. } => "discovery",
            };
            let of_keys = format!("issuer[{index}].{field}");
            let (issuer, warnings) = issuer.open().or_else(|error| self.wrong(&of_keys, error))?;
            for warning in warnings {
                self.warn(&of_keys, warning);
            }
            opened.push(issuer);
            fields.push(field);
        }
        Verifier::new(opened).or_else(|error| {
            let field = match error.fault {
                IssuerFault::Unnamed | IssuerFault::Duplicate => "issuer",
                IssuerFault::NoAudience => "audience",
                IssuerFault::NoAlgorithms | IssuerFault::NoKey => "algorithms",
                IssuerFault::DuplicateKey(_) => fields[error.issuer],
                IssuerFault::Leeway => "leeway",
                IssuerFault::NoLifetime => "max_lifetime",
            };
            self.wrong(format!("issuer[{}].{field}", error.issuer), error)
        })
    }

    /// Made here, where what it is made of has a line; it connects to nothing yet.
    fn client_of_openbao(&self, settings: pgsilo_openbao::Settings) -> Result<OpenBao, FileError> {
        const SHOWN: &str = "openbao.client_certificate";
        let mut field = "openbao.address";
        if let Some(ClientCertificate { certificate, key }) = settings.identity.clone() {
            // The HTTP client names no file where they are no chain and its key.
            let files = ServerFiles { certificate, key, clients: None };
            if let Err(error) = tls::Server::open(files.clone()) {
                return self.wrong(format!("{SHOWN}.{}", field_of(&error, &files)), error);
            }
            field = SHOWN;
        }
        OpenBao::new(settings).or_else(|error| self.wrong(field, error))
    }

    fn denied(&self, path: &Path, issuers: HashSet<String>) -> Result<Denied, FileError> {
        Denied::open(path, issuers).map_err(|error| self.of_a_file("registry.denied", error))
    }

    /// A database is not asked yet.
    fn read_registry(
        &self,
        settings: RegistrySettings,
    ) -> Result<(RegistrySource, Registry), FileError> {
        match settings {
            RegistrySettings::File(path) => {
                let opened = RegistryFile::open(&path);
                let (file, registry) =
                    opened.map_err(|error| self.of_a_file("registry.file", error))?;
                Ok((RegistrySource::File(file), registry))
            }
            RegistrySettings::Database(settings) => {
                let database = Box::new(RegistryDatabase::new(settings));
                Ok((RegistrySource::Database(database), Registry::unread()))
            }
        }
    }

    /// A file that cannot be read is the configuration's error; one with errors is its own.
    fn of_a_file(&self, field: &str, error: FileError) -> FileError {
        match error.line() {
            None => self.file.wrong(field, error),
            Some(_) => error,
        }
    }
}

/// Which of the files of TLS an error is about.
fn field_of(error: &TlsError, files: &ServerFiles) -> &'static str {
    let of_the_key = match error {
        TlsError::NoKey { .. } | TlsError::BadKey { .. } | TlsError::KeyMismatch { .. } => true,
        TlsError::NoCertificate { .. } | TlsError::BadCertificate { .. } => false,
        // The certificate is read first.
        error => error.file() != Some(&files.certificate),
    };
    let own = if of_the_key { "key" } else { "certificate" };
    error.file().and_then(|file| of_clients(file, files)).unwrap_or(own)
}

/// The same for a file that is about clients' certificates.
fn of_clients(file: &Path, files: &ServerFiles) -> Option<&'static str> {
    Some(match files.of_clients(file)? {
        OfClients::Authorities => "client_ca",
        OfClients::RevocationList => "client_crl",
    })
}
