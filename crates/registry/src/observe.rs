//! Looking at one server of a cluster: whether it takes writes, and on which timeline. Nothing else
//! is asked there.

use std::time::Duration;

use pgsilo_core::registry::{Cluster, Host};
use pgsilo_core::timeline::Standing;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use crate::connection::{self, ConnectError, Database, Login, Purpose, Server, Session};

/// From the dial to the end of the login.
const CONNECT: Duration = Duration::from_secs(2);
/// For an answer.
const ANSWER: Duration = Duration::from_secs(1);

/// Why a server's standing is not known.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// It does not let us in, cannot be reached, or says something that no server says.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not answer.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

impl ObserveError {
    /// Whether the server does not know the login, or not any more.
    pub fn is_of_login(&self) -> bool {
        self.code() == Some(&SqlState::INVALID_PASSWORD)
    }

    /// Whether the server has answered, with an error.
    pub fn is_answer(&self) -> bool {
        self.code().is_some()
    }

    fn code(&self) -> Option<&SqlState> {
        match self {
            ObserveError::Connect(ConnectError::Postgres(error)) => error.code(),
            ObserveError::Connect(_) | ObserveError::Timeout(_) => None,
        }
    }
}

/// A connection to one server.
#[derive(Debug)]
pub struct Observer(Session);

impl Observer {
    /// Connects to one of a cluster's servers, as a proxy of this name.
    ///
    /// # Errors
    /// When it does not let us in within 2 s.
    pub async fn connect(
        cluster: &Cluster,
        server: &Host,
        dbname: &str,
        login: &Login,
        name: &str,
    ) -> Result<Observer, ObserveError> {
        let database = Database { hosts: vec![server.clone()], ..Database::of(cluster, dbname) };
        let purpose = Purpose {
            application_name: name.to_owned(),
            options: "-c search_path=pg_catalog,pg_temp",
            server: Server::Any,
        };
        match timeout(CONNECT, connection::connect(&database, login, &purpose)).await {
            Ok(session) => Ok(Observer(session?)),
            Err(_elapsed) => Err(ObserveError::Timeout(CONNECT)),
        }
    }

    /// Asks what it is now.
    ///
    /// # Errors
    /// When it does not say within 1 s.
    pub async fn look(&self) -> Result<Standing, ObserveError> {
        match timeout(ANSWER, connection::standing(&self.0.client)).await {
            Ok(standing) => Ok(standing?),
            Err(_elapsed) => Err(ObserveError::Timeout(ANSWER)),
        }
    }
}
