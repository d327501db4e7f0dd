//! A certificate authority of the sandbox's own and the proxy's certificate.
//!
//! The authority's key is dropped as soon as the certificate is signed: a client that trusts this
//! sandbox's `ca.crt` trusts one certificate, for this machine's loopback names.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

use crate::files;

/// Writes `ca.crt`, `server.crt` and `server.key` into `dir`.
pub(super) fn create(dir: &Path) -> Result<()> {
    let mut params = named("pgsilo sandbox authority", Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;

    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut params = named("localhost", names.to_vec())?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &authority)?;

    files::write(&dir.join("ca.crt"), &authority.pem())?;
    files::write(&dir.join("server.crt"), &certificate.pem())?;
    files::write_private(&dir.join("server.key"), &key.serialize_pem())
}

fn named(common_name: &str, names: Vec<String>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(names).context("certificate names")?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2099, 1, 1);
    Ok(params)
}
