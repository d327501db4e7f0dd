//! A pgsilo with a listener for each way in which a driver can prove who it is, and what a client's
//! script has to know of them.

use std::fs;

use serde_json::json;
use tokio::process::Command;

use super::authority::{Authority, Pair};
use super::mint;
use super::proxy::{PLAIN, Proxy, Settings};

const HOLDER: &str = "spiffe://example.org/driver";

/// Listeners in this order: a certificate, a token bound to a certificate, a sidecar on loopback;
/// and a sidecar's socket.
pub async fn proxy() -> (Proxy, Pair) {
    let authority = Authority::new();
    let own = authority.client(HOLDER, 7);
    let asks = "[[listener]]\naddress = \"127.0.0.1:0\"\n\
        tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients.crt\" }\n";
    let sidecar = "auth = { token_file = \"token\" }\n";
    let socket = "[[listener]]\nsocket = \"{dir}/.s.PGSQL.6432\"\n";
    let listeners =
        format!("{asks}auth = \"certificate\"\n{asks}{PLAIN}{sidecar}{socket}{sidecar}");
    let bound = |tenants: &str| {
        format!(
            "{tenants}\n[[binding]]\ncertificate = \"{HOLDER}\"\ntenant = \"acme\"\n\
             access = \"read-write\"\n"
        )
    };
    let files = vec![
        ("clients.crt", authority.pem()),
        ("client.crt", own.certificate.clone()),
        ("client.key", own.key.clone()),
        ("token", mint::token("acme")),
    ];
    let settings = Settings { listeners, files, tenants: bound, ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    // For drivers that want their key in DER.
    fs::write(proxy.dir().join("client.pk8"), own.der().1.secret_der()).expect("written");
    (proxy, own)
}

/// The variables that a script reads.
pub fn told(command: &mut Command, proxy: &Proxy, own: &Pair) {
    let [certificate, bound, sidecar] = proxy.addresses()[..] else { panic!("three listeners") };
    let binding = json!({ "cnf": { "x5t#S256": own.thumbprint() } });
    command
        .env("CERTIFICATE_PORT", certificate.port().to_string())
        .env("BOUND_PORT", bound.port().to_string())
        .env("SIDECAR_PORT", sidecar.port().to_string())
        .env("SIDECAR_DIR", proxy.dir())
        .env("BOUND_TOKEN", mint::token_with("acme", binding))
        .env("PGSILO_CA", proxy.dir().join("ca.crt"))
        .env("CLIENT_CERTIFICATE", proxy.dir().join("client.crt"))
        .env("CLIENT_KEY", proxy.dir().join("client.key"))
        .env("CLIENT_KEY_DER", proxy.dir().join("client.pk8"));
}
