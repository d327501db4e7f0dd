//! Certificates of a test's own: authorities, and what they sign.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

use super::mint;

/// Who signs.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// The files of a certificate and its key.
#[derive(Debug, Clone)]
pub struct Signed {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = named(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Writes the authority itself.
    pub fn write(&self, path: PathBuf) -> PathBuf {
        fs::write(&path, self.pem()).expect("written");
        path
    }

    /// Signs for both ends of a connection on this machine, and writes `name.crt` and `name.key`
    /// into a folder: over whatever was there, each at once, the key first.
    pub fn sign(&self, dir: &Path, name: &str) -> Signed {
        self.sign_for(dir, name, None)
    }

    /// The same, but it may be valid for a while only.
    pub fn sign_for(&self, dir: &Path, name: &str, valid: Option<Duration>) -> Signed {
        let mut params = named(name, &["localhost", "127.0.0.1"]);
        if let Some(valid) = valid {
            params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(mint::now()) + valid;
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed");
        let put = |suffix: &str, text: String| {
            let (new, path) = (dir.join("new"), dir.join(format!("{name}.{suffix}")));
            fs::write(&new, text).expect("written");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("set");
            fs::rename(&new, &path).expect("renamed");
            path
        };
        let key = put("key", key.serialize_pem());
        Signed { certificate: put("crt", certificate.pem()), key }
    }
}

fn named(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts = hosts.iter().map(|&host| host.to_owned()).collect::<Vec<_>>();
    let mut params = CertificateParams::new(hosts).expect("names");
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
