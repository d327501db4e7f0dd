//! Issuers' public keys: which there are, and what each may be used for.
//!
//! The algorithms of a key follow from the key itself (its `alg`, or its type and curve)
//! and are narrowed to what its issuer allows, before any token is seen. Symmetric keys
//! cannot be expressed. A key is checked when it is loaded: size, curve, point.
//! The configuration makes keys; [`super::Verifier`] uses them.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Map, Value};
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};
use x509_parser::public_key::PublicKey;

use super::strict::strict_json;

/// RFC 7518 demands 2048; aws-lc stops at 8192.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Members that only a private key has (RFC 7518, and the AKP keys of newer algorithms).
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "priv"];

/// What RFC 9864 calls EdDSA with the curve Ed25519, the only one that is taken here.
pub(super) const ED25519_NAME: &str = "Ed25519";

/// The asymmetric signature algorithms. There is no `none` and no HMAC to be confused by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are RFC 7518's")]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

/// A text that names no [`Algorithm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not one of RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 EdDSA Ed25519")]
pub struct AlgorithmError;

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Algorithm; 9] = [
        Algorithm::Rs256,
        Algorithm::Rs384,
        Algorithm::Rs512,
        Algorithm::Ps256,
        Algorithm::Ps384,
        Algorithm::Ps512,
        Algorithm::Es256,
        Algorithm::Es384,
        Algorithm::EdDsa,
    ];

    /// As RFC 7518 writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::Rs256 => "RS256",
            Algorithm::Rs384 => "RS384",
            Algorithm::Rs512 => "RS512",
            Algorithm::Ps256 => "PS256",
            Algorithm::Ps384 => "PS384",
            Algorithm::Ps512 => "PS512",
            Algorithm::Es256 => "ES256",
            Algorithm::Es384 => "ES384",
            Algorithm::EdDsa => "EdDSA",
        }
    }
}

impl FromStr for Algorithm {
    type Err = AlgorithmError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == ED25519_NAME {
            return Ok(Algorithm::EdDsa);
        }
        Algorithm::ALL.into_iter().find(|alg| alg.as_str() == text).ok_or(AlgorithmError)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Algorithm> for jsonwebtoken::Algorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Rs256 => Self::RS256,
            Algorithm::Rs384 => Self::RS384,
            Algorithm::Rs512 => Self::RS512,
            Algorithm::Ps256 => Self::PS256,
            Algorithm::Ps384 => Self::PS384,
            Algorithm::Ps512 => Self::PS512,
            Algorithm::Es256 => Self::ES256,
            Algorithm::Es384 => Self::ES384,
            Algorithm::EdDsa => Self::EdDSA,
        }
    }
}

/// Why a key cannot be used. For operators; holds no key material.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a JWK Set at all.
    #[error("not a JSON Web Key Set: {0}")]
    NotJwks(String),
    /// What an OpenID provider says of itself, which only names the place of its keys.
    #[error("this is an OpenID configuration, not a key set; use the address in its `jwks_uri`")]
    Configuration,
    /// Somebody published a secret.
    #[error("key {0} contains a private key; keep it secret and list only the public part")]
    Private(usize),
    /// Nothing of the set can verify a signature.
    #[error("no usable key in it; {0}")]
    NoKey(String),
    /// Usable keys, none of them for the issuer's algorithms.
    #[error("no key in it fits the issuer's `algorithms`")]
    NoneFits,
    /// Two usable keys of one id.
    #[error("two keys have the kid {0:?}; a kid must be unique")]
    DuplicateKey(String),
    /// No `PUBLIC KEY` section.
    #[error("not a public key in PEM; it must have a PUBLIC KEY section")]
    NotPem,
    /// The key is of another kind than its algorithm.
    #[error("the key does not fit the algorithm {0}")]
    Misfit(Algorithm),
    /// Its kind, curve or `alg` is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// A number that cannot be one of this kind of key.
    #[error("the key's numbers are invalid")]
    Invalid,
    /// Too small to be safe, or too large to be served.
    #[error("an RSA key of {0} bits; it must have 2048 to 8192")]
    RsaSize(usize),
}

/// One public key and what it may be used for.
#[derive(Debug)]
pub struct Key {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

/// What a JWK Set came to.
#[derive(Debug)]
pub struct KeySet {
    /// The keys that can verify signatures, at least one.
    pub keys: Vec<Key>,
    /// One line for each key that was passed over, and why.
    pub warnings: Vec<String>,
}

impl KeySet {
    /// Reads a JWK Set (RFC 7517). Keys that cannot verify our algorithms are passed over
    /// with a warning, as the RFC wants; private keys and duplicate ids are errors.
    pub fn from_jwks(json: &[u8]) -> Result<KeySet, KeyError> {
        let set = strict_json(json).map_err(|error| KeyError::NotJwks(error.to_string()))?;
        let listed = set.get("keys").and_then(Value::as_array);
        let listed = listed.ok_or_else(|| match set.get("jwks_uri") {
            Some(_) => KeyError::Configuration,
            None => KeyError::NotJwks("no array \"keys\"".into()),
        })?;
        let mut read = KeySet { keys: Vec::new(), warnings: Vec::new() };
        for (index, jwk) in listed.iter().enumerate() {
            let jwk = jwk.as_object();
            let jwk = jwk.ok_or(KeyError::NotJwks(format!("key {index} is not an object")))?;
            if PRIVATE.iter().any(|member| jwk.contains_key(*member)) {
                return Err(KeyError::Private(index));
            }
            match Key::from_jwk(jwk) {
                Ok(key) => read.keys.push(key),
                Err(error) => {
                    let id = jwk.get("kid").map(|id| format!(" (kid {id})")).unwrap_or_default();
                    read.warnings.push(format!("key {index}{id} is passed over: {error}"));
                }
            }
        }
        unique(&read.keys).map_err(KeyError::DuplicateKey)?;
        if read.keys.is_empty() {
            let why = read.warnings.into_iter().next();
            return Err(KeyError::NoKey(why.unwrap_or("the set is empty".into())));
        }
        Ok(read)
    }
}

/// Fails with the id that two keys share.
pub(super) fn unique(keys: &[Key]) -> Result<(), String> {
    let mut seen = HashSet::new();
    match keys.iter().filter_map(Key::id).find(|id| !seen.insert(*id)) {
        Some(id) => Err(id.to_owned()),
        None => Ok(()),
    }
}

/// The keys that can be used, with nothing but the algorithms that are allowed.
pub(super) fn narrow(mut keys: Vec<Key>, allowed: &[Algorithm]) -> Vec<Key> {
    for key in &mut keys {
        key.algorithms.retain(|algorithm| allowed.contains(algorithm));
    }
    keys.retain(|key| !key.algorithms.is_empty());
    keys
}

/// One line for each key that no token can choose, or that none may use.
pub(crate) fn idle(keys: &[Key], allowed: &[Algorithm]) -> Vec<String> {
    let idle = keys.iter().filter_map(|key| match key.id() {
        None if keys.len() > 1 => {
            Some("a key without kid beside others is never chosen".to_owned())
        }
        id if !key.algorithms.iter().any(|algorithm| allowed.contains(algorithm)) => {
            let id = id.unwrap_or_default();
            Some(format!("the key with the kid {id:?} fits none of `algorithms` and is never used"))
        }
        _usable => None,
    });
    idle.collect()
}

impl Key {
    /// Reads a `PUBLIC KEY` section. Certificates and private keys are refused: what
    /// jsonwebtoken makes of them is luck.
    pub fn from_pem(id: &str, algorithm: Algorithm, pem: &[u8]) -> Result<Key, KeyError> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| KeyError::NotPem)?;
        let (_, info) = SubjectPublicKeyInfo::from_der(&der).map_err(|_| KeyError::Invalid)?;
        let bits: &[u8] = &info.subject_public_key.data;
        let (algorithms, decoding) = match info.algorithm.algorithm.to_id_string().as_str() {
            "1.2.840.113549.1.1.1" => match info.parsed() {
                Ok(PublicKey::RSA(key)) => rsa(key.modulus, key.exponent)?,
                _ => return Err(KeyError::Invalid),
            },
            "1.2.840.10045.2.1" => {
                let curve = info.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
                match curve.map(|oid| oid.to_id_string()).as_deref() {
                    Some("1.2.840.10045.3.1.7") => ec(Algorithm::Es256, bits)?,
                    Some("1.3.132.0.34") => ec(Algorithm::Es384, bits)?,
                    _ => return Err(KeyError::Unsupported("an unsupported curve".into())),
                }
            }
            "1.3.101.112" => ed25519(bits)?,
            _ => return Err(KeyError::Unsupported("an unsupported kind of key".into())),
        };
        if !algorithms.contains(&algorithm) {
            return Err(KeyError::Misfit(algorithm));
        }
        Ok(Key { id: Some(id.to_owned()), algorithms: vec![algorithm], decoding })
    }

    fn from_jwk(jwk: &Map<String, Value>) -> Result<Key, KeyError> {
        let unsupported = |what: String| Err(KeyError::Unsupported(what));
        if jwk.get("use").is_some_and(|usage| usage != "sig") {
            return unsupported("its \"use\" is not \"sig\"".into());
        }
        let verifies = |operations: &Value| {
            operations.as_array().is_some_and(|all| all.iter().any(|one| one == "verify"))
        };
        if jwk.get("key_ops").is_some_and(|operations| !verifies(operations)) {
            return unsupported("its \"key_ops\" lack \"verify\"".into());
        }
        let id = match jwk.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return unsupported("its \"kid\" is not a string".into()),
        };
        let text = |member: &str| jwk.get(member).and_then(Value::as_str).unwrap_or_default();
        let bytes =
            |member: &str| URL_SAFE_NO_PAD.decode(text(member)).map_err(|_| KeyError::Invalid);
        let (mut algorithms, decoding) = match (text("kty"), text("crv")) {
            ("RSA", _) => rsa(&bytes("n")?, &bytes("e")?)?,
            ("EC", "P-256") => ec(Algorithm::Es256, &point(&bytes("x")?, &bytes("y")?, 32)?)?,
            ("EC", "P-384") => ec(Algorithm::Es384, &point(&bytes("x")?, &bytes("y")?, 48)?)?,
            ("OKP", "Ed25519") => ed25519(&bytes("x")?)?,
            ("EC" | "OKP", curve) => return unsupported(format!("unsupported \"crv\" {curve:?}")),
            (kind, _) => return unsupported(format!("unsupported \"kty\" {kind:?}")),
        };
        if let Some(alg) = jwk.get("alg") {
            let only = alg.as_str().and_then(|alg| alg.parse::<Algorithm>().ok());
            let Some(only) = only else {
                return unsupported(format!("unsupported \"alg\" {alg}"));
            };
            if !algorithms.contains(&only) {
                return Err(KeyError::Misfit(only));
            }
            algorithms = vec![only];
        }
        Ok(Key { id, algorithms, decoding })
    }

    /// Its `kid`.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// What it may verify. More than one only for an RSA key that does not say.
    pub fn algorithms(&self) -> &[Algorithm] {
        &self.algorithms
    }

    pub(super) fn decoding(&self) -> &DecodingKey {
        &self.decoding
    }
}

type Usable = Result<(Vec<Algorithm>, DecodingKey), KeyError>;

fn rsa(modulus: &[u8], exponent: &[u8]) -> Usable {
    let strip = |number: &[u8]| {
        let zeros = number.iter().take_while(|b| **b == 0).count();
        number[zeros..].to_vec()
    };
    let (n, e) = (strip(modulus), strip(exponent));
    let bits = n.first().map_or(0, |first| n.len() * 8 - first.leading_zeros() as usize);
    if !RSA_BITS.contains(&bits) {
        return Err(KeyError::RsaSize(bits));
    }
    let odd = |number: &[u8]| number.last().is_some_and(|last| last & 1 == 1);
    // An exponent of 1 would make every message its own signature; aws-lc stops at 33 bits.
    if !odd(&n) || !odd(&e) || e == [1] || e.len() > 5 {
        return Err(KeyError::Invalid);
    }
    let algorithms = Algorithm::ALL[..6].to_vec();
    Ok((algorithms, DecodingKey::from_rsa_raw_components(&n, &e)))
}

fn point(x: &[u8], y: &[u8], length: usize) -> Result<Vec<u8>, KeyError> {
    if x.len() != length || y.len() != length {
        return Err(KeyError::Invalid);
    }
    Ok([&[4], x, y].concat())
}

/// Only uncompressed points, and only those on the curve.
fn ec(algorithm: Algorithm, point: &[u8]) -> Usable {
    let (fixed, length) = match algorithm {
        Algorithm::Es384 => (&ECDSA_P384_SHA384_FIXED, 97),
        _ => (&ECDSA_P256_SHA256_FIXED, 65),
    };
    if point.len() != length || point.first() != Some(&4) {
        return Err(KeyError::Invalid);
    }
    ParsedPublicKey::new(fixed, point).map_err(|_| KeyError::Invalid)?;
    Ok((vec![algorithm], DecodingKey::from_ec_der(point)))
}

fn ed25519(key: &[u8]) -> Usable {
    if key.len() != 32 {
        return Err(KeyError::Invalid);
    }
    ParsedPublicKey::new(&ED25519, key).map_err(|_| KeyError::Invalid)?;
    Ok((vec![Algorithm::EdDsa], DecodingKey::from_ed_der(key)))
}
