//! Credentials and their leases: what the data plane alone asks for.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use rustify_derive::Endpoint;
use serde::{Deserialize, Serialize};
use vaultrs::api::database::requests::{GenerateCredentialsRequest, ResetConnectionRequest};

use crate::answers::{Data, seconds};
use crate::error::Error;
use crate::transport::{OpenBao, Request};

/// `PUT sys/leases/renew`. vaultrs has nothing of `sys/leases`.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/renew", method = "PUT")]
struct RenewLease {
    lease_id: String,
    /// How long it is to live from now on, in seconds.
    increment: u64,
}

/// `PUT sys/leases/revoke`.
#[derive(Debug, Endpoint)]
#[endpoint(path = "sys/leases/revoke", method = "PUT")]
struct RevokeLease {
    lease_id: String,
    /// Whether the answer is that of the revocation. If not, OpenBAO retries until it works.
    sync: bool,
}

/// `GET sys/leases/count`.
#[derive(Debug, Endpoint, Serialize)]
#[endpoint(path = "sys/leases/count")]
struct CountLeases {
    /// `irrevocable`, or all.
    #[endpoint(query)]
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct CredsAnswer {
    lease_id: String,
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
    data: CredsData,
}

#[derive(Deserialize)]
struct CredsData {
    username: String,
    password: Secret,
}

#[derive(Deserialize)]
struct RenewAnswer {
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

#[derive(Deserialize)]
struct CountData {
    lease_count: u64,
}

/// A database credential and its lease.
#[derive(Debug)]
pub struct Granted {
    /// By which it is renewed and revoked.
    pub lease_id: String,
    /// How long it lives unless renewed.
    pub duration: Duration,
    /// Whether it can be.
    pub renewable: bool,
    /// The database role's name.
    pub username: String,
    /// And what it logs in with.
    pub password: Secret,
}

/// How long a lease lives from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// Past its maximum OpenBAO gives less than it gave before.
    pub duration: Duration,
    /// Whether it can be renewed again.
    pub renewable: bool,
}

impl OpenBao {
    /// `GET {mount}/creds/{role}`: a fresh credential.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or gives none.
    pub async fn creds(&self, token: &Secret, mount: &str, role: &str) -> Result<Granted, Error> {
        let (mount, name) = (mount.to_owned(), role.to_owned());
        let request = Request::of(&GenerateCredentialsRequest { mount, name })?;
        let answer = self.send(&request.made_with(self.patience()), Some(token)).await?;
        answer.parse::<CredsAnswer>().map(Granted::from)
    }

    /// `PUT sys/leases/renew`: for `increment` from now on, if OpenBAO gives that much.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or does not renew it.
    pub async fn renew(
        &self,
        token: &Secret,
        lease_id: &str,
        increment: Duration,
    ) -> Result<Renewed, Error> {
        let (lease_id, increment) = (lease_id.to_owned(), increment.as_secs());
        let request = Request::of(&RenewLease { lease_id, increment })?;
        let answer: RenewAnswer = self.send(&request, Some(token)).await?.parse()?;
        let RenewAnswer { lease_duration, renewable } = answer;
        Ok(Renewed { duration: seconds(lease_duration), renewable })
    }

    /// `PUT sys/leases/revoke`, asynchronously: OpenBAO retries by itself until it works.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or does not take it.
    pub async fn revoke(&self, token: &Secret, lease_id: &str) -> Result<(), Error> {
        let revocation = RevokeLease { lease_id: lease_id.to_owned(), sync: false };
        self.send(&Request::of(&revocation)?, Some(token)).await?.good().map(drop)
    }

    /// `POST {mount}/reset/{name}`: has OpenBAO make its connection to a database anew. It does that
    /// at once, and answers when all that was under way on the one before is over.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or does not do it.
    pub async fn reset_connection(
        &self,
        token: &Secret,
        mount: &str,
        name: &str,
    ) -> Result<(), Error> {
        let (mount, name) = (mount.to_owned(), name.to_owned());
        let request = Request::of(&ResetConnectionRequest { mount, name })?;
        self.send(&request, Some(token)).await?.good().map(drop)
    }

    /// `GET sys/leases/count?type=irrevocable`: of how many leases OpenBAO has given the revocation
    /// up.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or does not say.
    pub async fn irrevocable_leases(&self, token: &Secret) -> Result<u64, Error> {
        let request = Request::of(&CountLeases { kind: "irrevocable".to_owned() })?;
        let answer = self.send(&request, Some(token)).await?;
        Ok(answer.parse::<Data<CountData>>()?.data.lease_count)
    }
}

impl From<CredsAnswer> for Granted {
    fn from(answer: CredsAnswer) -> Granted {
        Granted {
            lease_id: answer.lease_id,
            duration: seconds(answer.lease_duration),
            renewable: answer.renewable,
            username: answer.data.username,
            password: answer.data.password,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_and_a_count_say_what_openbao_reads() {
        let renewal = RenewLease { lease_id: "a/b".to_owned(), increment: 60 };
        let renewal = Request::of(&renewal).expect("a request");
        let renewed = "PUT https://gateway.example/bao/v1/sys/leases/renew \
                       {\"lease_id\":\"a/b\",\"increment\":60}";
        assert_eq!(renewal.shown(), renewed);
        let count = CountLeases { kind: "irrevocable".to_owned() };
        let count = Request::of(&count).expect("a request");
        let counted = "GET https://gateway.example/bao/v1/sys/leases/count?type=irrevocable";
        assert_eq!(count.shown(), counted);
    }
}
