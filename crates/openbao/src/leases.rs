//! Credentials and their leases, as the data plane asks for them.

use std::time::Duration;

use pgsilo_core::secret::Secret;

use crate::answers::{CountData, CredsAnswer, Data, RenewAnswer};
use crate::error::Error;
use crate::requests::{CountLeases, GenerateCredentialsRequest, RenewLease, RevokeLease};
use crate::transport::{OpenBao, Request};

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
        Ok(Renewed { duration: Duration::from_secs(lease_duration), renewable })
    }

    /// `PUT sys/leases/revoke`, asynchronously: OpenBAO retries by itself until it works.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or does not take it.
    pub async fn revoke(&self, token: &Secret, lease_id: &str) -> Result<(), Error> {
        let revocation = RevokeLease { lease_id: lease_id.to_owned(), sync: false };
        self.send(&Request::of(&revocation)?, Some(token)).await?.good().map(drop)
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
