//! Where clients connect, what is asked of them there, and what they are shown.
//!
//! [`ListenerSettings`] is what the configuration says; a [`Listener`] with its default parameters
//! has read the files that it names. It binds nothing: `server` does.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use pgsilo_core::tls::{self, ServerFiles, TlsError};

use crate::route::DatabaseNames;
use crate::token::{Source, SourceSettings};

/// Where clients connect, and what is asked of them there. `T` and `S` are its TLS and its source of
/// tokens: opened, or the settings that say where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener<T = tls::Server, S = Source> {
    /// What to bind.
    pub place: ListenAddress,
    /// `None`: a Unix socket, or the file says `plaintext = true`.
    pub tls: Option<ListenerTls<T>>,
    /// How clients prove who they are.
    pub proof: Proof<S>,
    /// Who may use a Unix socket, by user id; `None`: every user that may open its file.
    pub uids: Option<BTreeSet<u32>>,
    /// What follows a tenant's id in the host that a client names in TLS: `.db.example.com`.
    pub sni_suffix: Option<String>,
    /// Names of databases that say nothing here.
    pub database_names: DatabaseNames,
    /// Who says on whose behalf it connects (PROXY protocol).
    pub balancers: Vec<IpNet>,
}

/// A listener as the configuration says it.
pub type ListenerSettings = Listener<ServerFiles, SourceSettings>;

/// How clients of a listener prove who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof<S> {
    /// A token, sent as the password.
    Password,
    /// A token, sent as SASL OAUTHBEARER.
    Bearer {
        /// What a client without a good token is told: JSON of RFC 7628, 3.2.2.
        challenge: Vec<u8>,
    },
    /// The client's certificate, bound to a tenant by the registry.
    Certificate,
    /// Nothing: pgsilo has the token itself.
    Sidecar(S),
}

/// What a listener binds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix {
        /// The socket's path.
        path: PathBuf,
        /// The permissions of the socket file.
        mode: u32,
    },
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => address.fmt(f),
            ListenAddress::Unix { path, .. } => path.display().fmt(f),
        }
    }
}

/// TLS at a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerTls<S> {
    /// Certificate, key, and whose certificates clients may show: the files, or what they came to.
    pub server: S,
    /// Whether a session in clear is refused.
    pub required: bool,
}

impl ListenerSettings {
    /// Reads the files of its TLS. Blocks.
    ///
    /// # Errors
    /// When they are no chain and its key, or no authorities and their lists.
    pub(crate) fn open(self) -> Result<Listener, TlsError> {
        let open = |tls: ListenerTls<ServerFiles>| {
            let server = tls::Server::open(tls.server)?;
            Ok(ListenerTls { server, required: tls.required })
        };
        let proof = match self.proof {
            Proof::Password => Proof::Password,
            Proof::Bearer { challenge } => Proof::Bearer { challenge },
            Proof::Certificate => Proof::Certificate,
            Proof::Sidecar(source) => Proof::Sidecar(Source::new(source)),
        };
        Ok(Listener {
            place: self.place,
            tls: self.tls.map(open).transpose()?,
            proof,
            uids: self.uids,
            sni_suffix: self.sni_suffix,
            database_names: self.database_names,
            balancers: self.balancers,
        })
    }
}
