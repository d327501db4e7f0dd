//! A token's outer shape, read strictly and believed not at all.
//!
//! Three base64url parts without padding or spare bits, two JSON objects without
//! duplicate members at any depth, and a header that asks for nothing unusual. Two
//! parsers that disagree about a token are an attack; this one refuses what others may
//! read differently. Only [`super::Verifier::verify`] calls it.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{Algorithm, MAX_TOKEN_BYTES, TokenError};

/// Members that bring their own key, compress, encrypt, nest or change what is signed;
/// and `crit`, because every extension is unknown here.
const REFUSED: [&str; 9] = ["crit", "b64", "jwk", "jku", "x5u", "x5c", "zip", "enc", "cty"];

/// Both objects of a compact JWS.
pub(super) struct Parts {
    pub(super) header: Value,
    pub(super) payload: Value,
}

/// What the header may say.
pub(super) struct Header<'a> {
    pub(super) algorithm: Algorithm,
    /// As it is written: one algorithm has two names.
    pub(super) algorithm_name: &'a str,
    pub(super) key_id: Option<&'a str>,
}

pub(super) fn read(token: &[u8]) -> Result<Parts, TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Malformed);
    }
    let mut parts = token.split(|b| *b == b'.');
    let (Some(header), Some(payload), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(TokenError::Malformed);
    };
    // The signature's value is jsonwebtoken's affair, its spelling ours.
    URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Malformed)?;
    Ok(Parts { header: object(header)?, payload: object(payload)? })
}

pub(super) fn header(header: &Value) -> Result<Header<'_>, TokenError> {
    if let Some(member) = REFUSED.into_iter().find(|member| header.get(member).is_some()) {
        return Err(TokenError::HeaderRefused { member });
    }
    if header.get("typ").is_some_and(|typ| !is_jwt(typ)) {
        return Err(TokenError::HeaderRefused { member: "typ" });
    }
    let key_id = match header.get("kid") {
        None => None,
        Some(Value::String(id)) => Some(id.as_str()),
        Some(_) => return Err(TokenError::HeaderRefused { member: "kid" }),
    };
    let algorithm_name =
        header.get("alg").and_then(Value::as_str).ok_or(TokenError::AlgorithmRefused)?;
    let algorithm = algorithm_name.parse().map_err(|_| TokenError::AlgorithmRefused)?;
    Ok(Header { algorithm, algorithm_name, key_id })
}

/// RFC 7515 says that `typ` is a media type: case does not matter, `application/` may be
/// left out. Anything else (a logout token, a DPoP proof) was signed for another purpose.
fn is_jwt(typ: &Value) -> bool {
    let Some(typ) = typ.as_str() else {
        return false;
    };
    let typ = typ.to_ascii_lowercase();
    matches!(typ.strip_prefix("application/").unwrap_or(&typ), "jwt" | "at+jwt")
}

fn object(part: &[u8]) -> Result<Value, TokenError> {
    let json = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)?;
    match strict_json(&json) {
        Ok(object @ Value::Object(_)) => Ok(object),
        _ => Err(TokenError::Malformed),
    }
}

/// JSON without duplicate members. serde_json bounds the depth (128).
pub(super) fn strict_json(json: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice::<Strict>(json).map(|Strict(value)| value)
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Strict, D::Error> {
        deserializer.deserialize_any(Anything).map(Strict)
    }
}

struct Anything;

impl<'de> Visitor<'de> for Anything {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate members")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not finite"))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Strict(element)) = elements.next_element()? {
            array.push(element);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Strict(value))) = members.next_entry::<String, Strict>()? {
            if object.insert(name, value).is_some() {
                return Err(de::Error::custom("duplicate member"));
            }
        }
        Ok(Value::Object(object))
    }
}
