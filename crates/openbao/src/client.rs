//! OpenBAO as one identity: what the control plane alone asks, with one token.
//!
//! An error says the request and OpenBAO's own errors, in one line; what was sent is never part of
//! it. Where OpenBAO says that there is nothing, that is no error: other failures may have the same
//! status.

mod answers;

use std::sync::Arc;

use pgsilo_core::secret::Secret;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::answers::{AuthAnswer, Data, SecretIdData};
use crate::error::Error;
use crate::requests::{
    DeleteConnectionRequest, DeleteRoleRequest, DisableEngineRequest, EnableEngineRequest,
    Endpoint, GenerateNewSecretIDRequest, GetConfigurationOfTheSecretEngineRequest, List,
    ListLeases, ListPolicies, LookUpLease, Read, ReadConnectionRequest, ReadRoleRequest,
    RevokeLeaseAt, RotateRootRequest, SetDatabaseConfig, Write,
};
use crate::settings::Settings;
use crate::tokens::Token;
use crate::transport::{Answer, OpenBao, Request};

pub use answers::{Credential, DatabaseConfig, DatabaseRole, LeaseInfo};
use answers::{CredentialAnswer, EngineData, ListData};

/// OpenBAO as one identity. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    openbao: Arc<OpenBao>,
    token: Option<Secret>,
}

/// What was asked, and why it was not answered well.
#[derive(Debug, thiserror::Error)]
#[error("OpenBAO: {request}: {error}")]
pub struct Failure {
    request: String,
    error: Error,
}

impl Failure {
    /// Why.
    pub fn error(&self) -> &Error {
        &self.error
    }
}

impl Client {
    /// Without a token: what OpenBAO answers to anybody.
    ///
    /// # Errors
    /// When the settings would not do.
    pub fn new(settings: Settings) -> Result<Client, Error> {
        Ok(Client { openbao: Arc::new(OpenBao::new(settings)?), token: None })
    }

    /// The same OpenBAO as the identity that holds `token`.
    pub fn as_token(&self, token: Secret) -> Client {
        Client { token: Some(token), ..self.clone() }
    }

    /// The server itself.
    pub fn openbao(&self) -> &OpenBao {
        &self.openbao
    }

    /// Sends a request whose answer says no more than that it was done.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or answers with another status than 2xx; so of the others.
    pub async fn run(&self, request: &impl Endpoint) -> Result<(), Failure> {
        self.send(request, |answer| answer.good().map(drop)).await
    }

    /// What a request answers.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn ask<T: DeserializeOwned>(&self, request: &impl Endpoint) -> Result<T, Failure> {
        self.send(request, Answer::parse).await
    }

    /// What a request answers in `data`; `None` when OpenBAO says that there is nothing: no such
    /// entry of an engine, or no such engine.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn find<T: DeserializeOwned>(
        &self,
        request: &impl Endpoint,
    ) -> Result<Option<T>, Failure> {
        let found = |answer: Answer| match answer.is_nothing() {
            true => Ok(None),
            false => answer.parse::<Data<T>>().map(|answer| Some(answer.data)),
        };
        self.send(request, found).await
    }

    /// `GET` of any path; for what has no type.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn read(&self, path: &str) -> Result<Value, Failure> {
        self.ask(&Read { path: path.to_owned() }).await
    }

    /// The `data` that a `GET` of any path answers, if there is something; for what has no type.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn look(&self, path: &str) -> Result<Option<Value>, Failure> {
        self.find(&Read { path: path.to_owned() }).await
    }

    /// `POST` to any path; for what has no type. The answer is `null` where it is empty.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn write(&self, path: &str, body: Value) -> Result<Value, Failure> {
        let json = |answer: Answer| match answer.is_empty() {
            true => answer.good().map(|_empty| Value::Null),
            false => answer.parse(),
        };
        self.send(&Write { path, body: &body }, json).await
    }

    /// What there is below a path.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn list(&self, path: &str) -> Result<Vec<String>, Failure> {
        let found = self.find::<ListData>(&List::below(path)).await?;
        Ok(found.map(|list| list.keys).unwrap_or_default())
    }

    /// The ids of the leases below a path, as far as they are below it.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn leases(&self, prefix: &str) -> Result<Vec<String>, Failure> {
        let found = self.find::<ListData>(&ListLeases::below(prefix)).await?;
        Ok(found.map(|list| list.keys).unwrap_or_default())
    }

    /// The names of all policies.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn policies(&self) -> Result<Vec<String>, Failure> {
        let found = self.find::<ListData>(&ListPolicies::default()).await?;
        Ok(found.map(|list| list.keys).unwrap_or_default())
    }

    /// What OpenBAO knows of a lease; `None` only if it says that it knows no such one.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn lease(&self, lease_id: &str) -> Result<Option<LeaseInfo>, Failure> {
        let known = |answer: Answer| match answer.says(400, "invalid lease") {
            true => Ok(None),
            false => answer.parse::<Data<LeaseInfo>>().map(|answer| Some(answer.data)),
        };
        self.send(&LookUpLease { lease_id: lease_id.to_owned() }, known).await
    }

    /// Revokes a lease and waits until it is gone.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn revoke_lease(&self, lease_id: &str) -> Result<(), Failure> {
        self.run(&RevokeLeaseAt { lease_id: lease_id.to_owned(), sync: true }).await
    }

    /// The same of a lease of one's own: by the path that needs no more than its id.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn revoke_own_lease(&self, lease_id: &str) -> Result<(), Failure> {
        let body = serde_json::json!({ "lease_id": lease_id, "sync": true });
        self.write("sys/leases/revoke", body).await.map(drop)
    }

    /// Renews a lease, for as long as it was made for.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn renew_lease(&self, lease_id: &str) -> Result<(), Failure> {
        let path = format!("sys/leases/renew/{lease_id}");
        self.write(&path, Value::Object(serde_json::Map::new())).await.map(drop)
    }

    /// The type of the secrets engine at a path, if there is one.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn engine(&self, path: &str) -> Result<Option<String>, Failure> {
        let request = GetConfigurationOfTheSecretEngineRequest { path: path.to_owned() };
        let none = format!("No secret engine mount at {path}/");
        let known = |answer: Answer| match answer.says(400, &none) {
            true => Ok(None),
            false => answer.parse::<Data<EngineData>>().map(|answer| Some(answer.data.kind)),
        };
        self.send(&request, known).await
    }

    /// Mounts an engine.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn mount_engine(&self, path: &str, kind: &str) -> Result<(), Failure> {
        let (path, engine_type) = (path.to_owned(), Some(kind.to_owned()));
        self.run(&EnableEngineRequest { path, engine_type, ..Default::default() }).await
    }

    /// Unmounts an engine. Whatever it holds ends: its leases are revoked before OpenBAO answers.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn unmount(&self, path: &str) -> Result<(), Failure> {
        self.run(&DisableEngineRequest { path: path.to_owned() }).await
    }

    /// A login at a database, made for whoever asks: it ends with its lease.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn credential(&self, mount: &str, role: &str) -> Result<Credential, Failure> {
        let path = format!("{mount}/creds/{role}");
        Ok(self.ask::<CredentialAnswer>(&Read { path }).await?.into())
    }

    /// A database's configuration, if there is one.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn database_config(
        &self,
        mount: &str,
        name: &str,
    ) -> Result<Option<DatabaseConfig>, Failure> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        self.find(&ReadConnectionRequest { mount, name }).await
    }

    /// Writes one: an object of all its settings but the password.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn set_database_config(
        &self,
        mount: &str,
        name: &str,
        settings: &Value,
        password: &Secret,
    ) -> Result<(), Failure> {
        self.run(&SetDatabaseConfig { mount, name, settings, password }).await
    }

    /// Deletes one, and the password that only OpenBAO knows.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn delete_database_config(&self, mount: &str, name: &str) -> Result<(), Failure> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        self.run(&DeleteConnectionRequest { mount, name }).await
    }

    /// Has OpenBAO give its login at a database a password that it alone knows.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn rotate_root(&self, mount: &str, name: &str) -> Result<(), Failure> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        self.run(&RotateRootRequest { mount, name }).await
    }

    /// How credentials of a role are made, if there is such a role.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn database_role(
        &self,
        mount: &str,
        name: &str,
    ) -> Result<Option<DatabaseRole>, Failure> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        self.find(&ReadRoleRequest { mount, name }).await
    }

    /// Deletes one.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn delete_database_role(&self, mount: &str, name: &str) -> Result<(), Failure> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        self.run(&DeleteRoleRequest { mount, name }).await
    }

    /// One more secret id of an AppRole.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn new_secret_id(&self, mount: &str, role_name: &str) -> Result<Secret, Failure> {
        let (mount, role_name) = (mount.to_owned(), role_name.to_owned());
        let request = GenerateNewSecretIDRequest { mount, role_name, ..Default::default() };
        Ok(self.ask::<Data<SecretIdData>>(&request).await?.data.secret_id)
    }

    /// Logs in by an AppRole.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn log_in_approle(
        &self,
        mount: &str,
        role_id: &str,
        secret_id: &Secret,
    ) -> Result<Client, Failure> {
        let made = self.openbao.log_in_approle(mount, role_id, secret_id).await;
        let request = format!("POST auth/{mount}/login");
        let token = made.map_err(|error| Failure { request, error })?;
        Ok(self.as_token(token.secret))
    }

    /// Renews the token.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn renew_own_token(&self) -> Result<(), Failure> {
        let Some(token) = &self.token else { return Ok(()) };
        let renewed = self.openbao.renew_self(token).await;
        let request = "POST auth/token/renew-self".to_owned();
        renewed.map(drop).map_err(|error| Failure { request, error })
    }

    /// Ends the token, and every lease that was asked for with it.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn log_out(&self) -> Result<(), Failure> {
        let Some(token) = &self.token else { return Ok(()) };
        let ended = self.openbao.revoke_self(token).await;
        let request = "POST auth/token/revoke-self".to_owned();
        ended.map_err(|error| Failure { request, error })
    }

    /// The token that a request makes.
    ///
    /// # Errors
    /// See [`run`](Client::run).
    pub async fn new_token(&self, request: &impl Endpoint) -> Result<Token, Failure> {
        Ok(self.ask::<AuthAnswer>(request).await?.auth.into())
    }

    async fn send<T>(
        &self,
        request: &impl Endpoint,
        read: impl FnOnce(Answer) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let answered = async {
            let request = Request::of(request)?;
            self.openbao.send(&request, self.token.as_ref()).await.and_then(read)
        };
        answered.await.map_err(|error| Failure { request: described(request), error })
    }
}

fn described(request: &impl Endpoint) -> String {
    let method: reqwest::Method = request.method().into();
    format!("{method} {}", request.path().trim().trim_matches('/'))
}
