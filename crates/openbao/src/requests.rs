//! What the control plane asks of OpenBAO. vaultrs' own request types where they are right, and
//! these where it has none, or one that lacks what OpenBAO reads.

use pgsilo_core::secret::Secret;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use rustify::errors::ClientError;
use rustify_derive::Endpoint;
use serde::Serialize;
use serde_json::Value;

use crate::json;

pub use rustify::Endpoint;
pub use vaultrs::api::auth::approle::requests::{GenerateNewSecretIDRequest, SetAppRoleRequest};
pub use vaultrs::api::database::requests::{
    DeleteConnectionRequest, DeleteRoleRequest, ReadConnectionRequest, ReadRoleRequest,
    RotateRootRequest, SetRoleRequest,
};
pub use vaultrs::api::sys::requests::{
    DisableEngineRequest, EnableAuthRequest, EnableEngineRequest,
    GetConfigurationOfTheSecretEngineRequest,
};
pub use vaultrs::api::token::requests::CreateOrphanTokenRequest;

/// `POST sys/leases/revoke/{lease_id}`. vaultrs has nothing of `sys/leases`. OpenBAO has a path
/// without the id, too, of which a policy cannot say which leases it is for.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/revoke/{self.lease_id}", method = "POST")]
pub struct RevokeLeaseAt {
    /// Its id.
    #[endpoint(skip)]
    pub lease_id: String,
    /// Whether the answer is that of the revocation. If not, OpenBAO retries until it works.
    pub sync: bool,
}

/// `POST sys/leases/revoke-prefix/{prefix}`: all leases below a path.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/revoke-prefix/{self.prefix}", method = "POST")]
pub struct RevokeLeases {
    /// A path: `pgsilo/acme/creds/tenant-acme-rw`.
    #[endpoint(skip)]
    pub prefix: String,
    /// As in [`RevokeLeaseAt`].
    pub sync: bool,
}

/// `POST sys/leases/lookup`.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/lookup", method = "POST")]
pub struct LookUpLease {
    /// Its id.
    pub lease_id: String,
}

/// `GET sys/leases/lookup/{prefix}?list=true`: gateways let GET through, and not every one lets
/// LIST.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/lookup/{self.prefix}")]
pub struct ListLeases {
    /// As in [`RevokeLeases`].
    #[endpoint(skip)]
    pub prefix: String,
    /// Always.
    #[endpoint(query)]
    list: bool,
}

impl ListLeases {
    /// Of the leases below a path.
    pub fn below(prefix: impl Into<String>) -> ListLeases {
        ListLeases { prefix: prefix.into(), list: true }
    }
}

/// `GET {path}?list=true` of any path, as [`ListLeases`].
#[derive(Debug, Endpoint)]
#[endpoint(path = "{self.path}")]
pub struct List {
    /// Below `/v1/`.
    #[endpoint(skip)]
    pub path: String,
    /// Always.
    #[endpoint(query)]
    list: bool,
}

impl List {
    /// Of what is below a path.
    pub fn below(path: impl Into<String>) -> List {
        List { path: path.into(), list: true }
    }
}

/// `POST sys/capabilities-self`: what a token may do.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/capabilities-self", method = "POST")]
pub struct CapabilitiesSelf {
    /// Of which paths.
    pub paths: Vec<String>,
}

/// `POST sys/policies/acl/{name}`. vaultrs' lacks `expiration`.
#[derive(Debug, Default, Endpoint)]
#[endpoint(path = "sys/policies/acl/{self.name}", method = "POST")]
pub struct SetPolicy {
    /// Its name.
    #[endpoint(skip)]
    pub name: String,
    /// In HCL.
    pub policy: String,
    /// When it ends by itself (RFC 3339); `None`: never.
    pub expiration: Option<String>,
}

/// `DELETE sys/policies/acl/{name}`.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/policies/acl/{self.name}", method = "DELETE")]
pub struct DeletePolicy {
    /// Its name.
    #[endpoint(skip)]
    pub name: String,
}

/// `GET sys/policies/acl?list=true`, as [`ListLeases`].
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/policies/acl")]
pub struct ListPolicies {
    /// Always.
    #[endpoint(query)]
    list: bool,
}

impl Default for ListPolicies {
    fn default() -> ListPolicies {
        ListPolicies { list: true }
    }
}

/// `POST {mount}/config/{name}`: a database of the database engine. vaultrs' lacks
/// `password_authentication` and whatever else a configuration was made with, and its password
/// prints in Debug.
#[derive(Debug)]
pub struct SetDatabaseConfig<'a> {
    /// Where the engine is.
    pub mount: &'a str,
    /// The configuration's name.
    pub name: &'a str,
    /// Everything but the password: an object.
    pub settings: &'a Value,
    /// What OpenBAO logs in with.
    pub password: &'a Secret,
}

impl Endpoint for SetDatabaseConfig<'_> {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        format!("{}/config/{}", self.mount, self.name)
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::POST
    }

    fn body(&self) -> Result<Option<Vec<u8>>, ClientError> {
        #[derive(Serialize)]
        struct Body<'a> {
            password: &'a str,
            #[serde(flatten)]
            settings: &'a Value,
        }
        let invalid = |source| ClientError::DataParseError { source };
        let password = self.password.expose_text().map_err(|error| invalid(error.into()))?;
        let body = Body { password, settings: self.settings };
        let mut json = json::written(&body).map_err(|error| invalid(error.into()))?;
        Ok(Some(std::mem::take(&mut *json)))
    }
}

/// `GET` of any path, for what has no type.
#[derive(Debug, Endpoint)]
#[endpoint(path = "{self.path}")]
pub struct Read {
    /// Below `/v1/`.
    #[endpoint(skip)]
    pub path: String,
}

/// `POST` to any path, for what has no type. Not for secrets: it prints in Debug.
#[derive(Debug)]
pub struct Write<'a> {
    /// Below `/v1/`.
    pub path: &'a str,
    /// JSON.
    pub body: &'a Value,
}

impl Endpoint for Write<'_> {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        self.path.to_owned()
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::POST
    }

    fn body(&self) -> Result<Option<Vec<u8>>, ClientError> {
        Ok(Some(self.body.to_string().into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::transport::Request;

    #[test]
    fn leases_are_listed_with_get() {
        let list = Request::of(&ListLeases::below("pgsilo/acme/creds/x")).expect("a request");
        let listed =
            "GET https://gateway.example/bao/v1/sys/leases/lookup/pgsilo/acme/creds/x?list=true";
        assert_eq!(list.shown(), listed);
    }
}
