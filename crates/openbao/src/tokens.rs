//! Logins, and the tokens that they give.

use std::time::Duration;

use pgsilo_core::secret::Secret;
use rustify_derive::Endpoint;
use vaultrs::api::auth::approle::requests::LoginWithApproleRequest;
use vaultrs::api::auth::oidc::requests::JWTLoginRequest;
use vaultrs::api::sys::requests::UnwrapRequest;
use vaultrs::api::token::requests::{
    LookupTokenSelfRequest, RenewTokenSelfRequest, RevokeTokenSelfRequest,
};
use zeroize::Zeroize;

use crate::answers::{AuthAnswer, Data, LookupData, SecretIdData};
use crate::error::Error;
use crate::transport::{OpenBao, Request};

/// `POST auth/{mount}/login` of the certificate method. vaultrs' sends `cert_name`, which is not
/// read.
#[derive(Debug, Endpoint)]
#[endpoint(path = "auth/{self.mount}/login", method = "POST")]
struct CertificateLogin {
    #[endpoint(skip)]
    mount: String,
    /// Its role; `None`: whichever fits.
    name: Option<String>,
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
        let mut login = LoginWithApproleRequest {
            mount: mount.to_owned(),
            role_id: role_id.to_owned(),
            secret_id: text(secret_id)?,
        };
        let request = Request::of(&login);
        login.secret_id.zeroize();
        self.log_in(request?).await
    }

    /// `POST auth/{mount}/login` of the JWT and Kubernetes methods.
    ///
    /// # Errors
    /// See [`log_in_approle`](OpenBao::log_in_approle).
    pub async fn log_in_jwt(&self, mount: &str, role: &str, jwt: &Secret) -> Result<Token, Error> {
        let mut login = JWTLoginRequest {
            mount: mount.to_owned(),
            jwt: text(jwt)?,
            role: Some(role.to_owned()),
        };
        let request = Request::of(&login);
        login.jwt.zeroize();
        self.log_in(request?).await
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
        let login = CertificateLogin { mount: mount.to_owned(), name: role.map(str::to_owned) };
        let made = self.log_in(Request::of(&login)?).await?;
        self.clients().bind(&made.secret, made.ttl, client);
        Ok(made)
    }

    async fn log_in(&self, request: Request) -> Result<Token, Error> {
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
fn text(secret: &Secret) -> Result<String, Error> {
    let text = secret.expose_text();
    text.map(str::to_owned).map_err(|_invalid| Error::Client("the secret is not text".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_login_names_its_role_if_it_is_to_have_one() {
        let login = |name: Option<&str>| {
            let (mount, name) = ("cert".to_owned(), name.map(str::to_owned));
            Request::of(&CertificateLogin { mount, name }).expect("a request").shown()
        };
        let url = "POST https://gateway.example/bao/v1/auth/cert/login";
        assert_eq!(login(Some("pgsilo")), format!("{url} {{\"name\":\"pgsilo\"}}"));
        assert_eq!(login(None), url);
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
