//! Logins, and the tokens that they give.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use serde::Serialize;
use vaultrs::api::sys::requests::UnwrapRequest;
use vaultrs::api::token::requests::{
    LookupTokenSelfRequest, RenewTokenSelfRequest, RevokeTokenSelfRequest,
};

use crate::answers::{AuthAnswer, Data, LookupData, SecretIdData};
use crate::error::Error;
use crate::transport::{OpenBao, Request};

/// The bodies of `POST auth/{mount}/login`. vaultrs' are `String`s, which are copied and print in
/// Debug, and of the certificate method it sends `cert_name`, which is not read.
mod login {
    use serde::Serialize;

    #[derive(Serialize)]
    pub(super) struct AppRole<'a> {
        pub(super) role_id: &'a str,
        pub(super) secret_id: &'a str,
    }

    /// Of the JWT and Kubernetes methods.
    #[derive(Serialize)]
    pub(super) struct Jwt<'a> {
        pub(super) role: &'a str,
        pub(super) jwt: &'a str,
    }

    #[derive(Serialize)]
    pub(super) struct Certificate<'a> {
        /// The method's role; `None`: whichever fits.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub(super) name: Option<&'a str>,
    }
}

/// A token, with what OpenBAO said of it.
#[derive(Clone, Debug)]
pub struct Token {
    /// For requests' headers.
    pub secret: Secret,
    /// How long it lives unless renewed; zero: for ever.
    pub ttl: Duration,
    /// Whether it can be.
    pub renewable: bool,
    /// What it is.
    pub nature: Nature,
    /// What its life is bounded by, however often it is renewed, as far as that was said.
    pub explicit_max: Option<Duration>,
}

/// What OpenBAO says of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nature {
    /// How many requests it is good for; zero: any number.
    pub uses: u64,
    /// `service` or `batch`.
    pub kind: String,
    /// It has no parent, with which it would end.
    pub orphan: bool,
    /// The names of its policies.
    pub policies: Vec<String>,
}

impl OpenBao {
    /// `POST auth/{mount}/login` of the AppRole method.
    ///
    /// # Errors
    /// When OpenBAO cannot be asked, or gives no token; so of the others.
    pub async fn log_in_approle(
        &self,
        mount: &str,
        role_id: &str,
        secret_id: &Secret,
    ) -> Result<Token, Error> {
        self.log_in(mount, &login::AppRole { role_id, secret_id: text(secret_id)? }).await
    }

    /// `POST auth/{mount}/login` of the JWT and Kubernetes methods.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn log_in_jwt(&self, mount: &str, role: &str, jwt: &Secret) -> Result<Token, Error> {
        self.log_in(mount, &login::Jwt { role, jwt: text(jwt)? }).await
    }

    /// `POST auth/{mount}/login` of the certificate method.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn log_in_certificate(
        &self,
        mount: &str,
        role: Option<&str>,
    ) -> Result<Token, Error> {
        let client = self.clients().newest();
        let made = self.log_in(mount, &login::Certificate { name: role }).await?;
        self.clients().bind(&made.secret, made.ttl, client);
        Ok(made)
    }

    async fn log_in(&self, mount: &str, body: &impl Serialize) -> Result<Token, Error> {
        let request = Request::post(&format!("auth/{mount}/login"), body)?;
        let answer = self.send(&request.made_with(self.patience()), None).await?;
        Ok(answer.parse::<AuthAnswer>()?.auth.into())
    }

    /// `POST sys/wrapping/unwrap`: the secret id that a wrapping token stands for.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn unwrap_secret_id(&self, wrapping: &Secret) -> Result<Secret, Error> {
        let request = Request::of(&UnwrapRequest { token: None })?.made_with(self.patience());
        let answer = self.send(&request, Some(wrapping)).await?;
        Ok(answer.parse::<Data<SecretIdData>>()?.data.secret_id)
    }

    /// `POST auth/token/renew-self`.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn renew_self(&self, token: &Secret) -> Result<Token, Error> {
        let request = Request::of(&RenewTokenSelfRequest::default())?;
        let answer = self.send(&request, Some(token)).await?;
        let renewed = Token::from(answer.parse::<AuthAnswer>()?.auth);
        self.clients().prolong(token, renewed.ttl);
        Ok(renewed)
    }

    /// `GET auth/token/lookup-self`: what a token is, and how long it still lives.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn look_up_self(&self, token: Secret) -> Result<Token, Error> {
        let request = Request::of(&LookupTokenSelfRequest::default())?;
        let answer = self.send(&request, Some(&token)).await?;
        Ok(answer.parse::<Data<LookupData>>()?.data.of(token))
    }

    /// `POST auth/token/revoke-self`: ends a token, and every lease that was asked for with it.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn revoke_self(&self, token: &Secret) -> Result<(), Error> {
        let request = Request::of(&RevokeTokenSelfRequest::default())?;
        self.send(&request, Some(token)).await?.good().map(drop)
    }
}

/// A secret as JSON wants it.
fn text(secret: &Secret) -> Result<&str, Error> {
    secret.expose_text().map_err(|_invalid| Error::Client("the secret is not text".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_login_names_its_role_if_it_is_to_have_one() {
        let login = |name| Request::post("auth/cert/login", &login::Certificate { name });
        let shown = |name| login(name).expect("a request").shown();
        let url = "POST https://gateway.example/bao/v1/auth/cert/login";
        assert_eq!(shown(Some("pgsilo")), format!("{url} {{\"name\":\"pgsilo\"}}"));
        assert_eq!(shown(None), format!("{url} {{}}"));
    }

    #[test]
    fn a_token_speaks_for_itself() {
        let shown = |request: Result<Request, Error>| request.expect("a request").shown();
        let renewal = shown(Request::of(&RenewTokenSelfRequest::default()));
        assert_eq!(renewal, "POST https://gateway.example/bao/v1/auth/token/renew-self");
        let revocation = shown(Request::of(&RevokeTokenSelfRequest::default()));
        assert_eq!(revocation, "POST https://gateway.example/bao/v1/auth/token/revoke-self");
    }
}
