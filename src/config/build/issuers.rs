//! Whose tokens are believed: their names, rules and keys.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use pgsilo_core::file::MAX_PEM;
use pgsilo_core::tenant::{Access, TenantId, TenantPattern};
use pgsilo_core::tls;

use super::super::WORDS;
use super::super::raw::{RawAuthorization, RawIssuer, RawKey};
use super::{Build, FileError};
use crate::token::{Algorithm, ClaimPath, Issuer, Key, KeySource, KeysAt, KeysUrl};

/// Where the access level is, if nothing else is said.
const ACCESS: &str = "access";
/// No access level, for a token that has none.
const REFUSE: &str = "refuse";
const REFRESH: Duration = Duration::from_secs(5 * 60);
/// More often than any issuer changes keys, or so rarely that a removed one works on and on.
const REFRESHES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);
const MAX_STALE: Duration = Duration::from_secs(86_400);

impl Build<'_> {
    pub(super) fn issuers(
        &mut self,
        raw: Vec<RawIssuer>,
    ) -> Result<Vec<Issuer<KeySource>>, FileError> {
        if raw.is_empty() {
            return self.wrong("issuer", "there is none; add an [[issuer]] table");
        }
        self.mind_each_other(&raw);
        let issuers = raw.into_iter().enumerate();
        issuers.map(|(index, raw)| self.issuer(&format!("issuer[{index}]"), raw)).collect()
    }

    fn issuer(&mut self, at: &str, raw: RawIssuer) -> Result<Issuer<KeySource>, FileError> {
        let mut algorithms = Vec::with_capacity(raw.algorithms.len());
        for (index, name) in raw.algorithms.iter().enumerate() {
            algorithms.push(self.algorithm(&format!("{at}.algorithms[{index}]"), name)?);
        }
        let keys = self.keys(at, &raw)?;
        self.mind_claims(at, &raw);
        let default_access = self.default_access(at, &raw)?;
        let max_access = self.max_access(at, &raw, default_access)?;
        let claim = |key: &str, text: &str| {
            let wrong = |error| {
                self.file.wrong(&format!("{at}.{key}"), format_args!("{text:?} is {error}"))
            };
            ClaimPath::parse(text).map_err(wrong)
        };
        let tenants = self.tenants(at, raw.tenants)?;
        Ok(Issuer {
            audience_claim: claim("audience_claim", &raw.audience_claim)?,
            tenant_claim: claim("tenant_claim", &raw.tenant_claim)?,
            tenant_values: self.tenant_values(at, raw.tenant_values, tenants.as_deref())?,
            access_claim: claim("access_claim", raw.access_claim.as_deref().unwrap_or(ACCESS))?,
            access_values: self.access_values(at, raw.access_values)?,
            default_access,
            tenants: tenants.map(Into::into),
            max_access,
            needs_grant: raw.authorization == RawAuthorization::Grant,
            max_lifetime: raw.max_lifetime.map(|max| max.0),
            issuer: raw.issuer.into(),
            audience: raw.audience,
            algorithms,
            keys,
            leeway: raw.leeway.0,
        })
    }

    /// One whose tokens may name any tenant beside another: a partner's issuer would speak for all.
    fn mind_each_other(&mut self, raw: &[RawIssuer]) {
        let unbound = |(_, issuer): &(usize, &RawIssuer)| issuer.tenants.is_none();
        let unbound: Vec<_> = raw.iter().enumerate().filter(unbound).collect();
        if let [_, .., (last, _)] = unbound[..] {
            let what = "several issuers may name any tenant; say with `tenants` whose tokens are \
                        each one's to issue";
            self.warn(format!("issuer[{last}]"), what);
        }
    }

    /// Of issuers whose tokens are shown to OpenBAO.
    pub(super) fn mind_words(&mut self, raw: &[RawIssuer]) {
        for (index, _) in raw.iter().enumerate().filter(|(_, raw)| raw.tenant_values.is_some()) {
            self.warn(format!("issuer[{index}].tenant_values"), WORDS);
        }
    }

    fn mind_claims(&mut self, at: &str, raw: &RawIssuer) {
        let access = raw.access_claim.as_deref();
        for (key, claim) in [
            ("audience_claim", Some(&*raw.audience_claim)),
            ("tenant_claim", Some(&*raw.tenant_claim)),
            ("access_claim", access),
        ] {
            let Some(claim) = claim else { continue };
            // A name of its own that begins like a URL is usual (OpenID Connect Core 1.0, 5.1.2).
            if claim.contains('.') && !claim.starts_with('/') && !claim.contains("://") {
                let pointer = claim.replace('.', "/");
                let what = format!(
                    "{claim:?} is one claim of that whole name; a claim inside another is written \
                     \"/{pointer}\""
                );
                self.warn(format!("{at}.{key}"), what);
            }
        }
        let words = raw.access_values.iter().flatten();
        let is_split = |(word, _): &(&String, &String)| word.contains(' ');
        for (word, _) in words.filter(is_split) {
            let what = "is found in a list only: a claim that is one text is split at its blanks";
            self.warn(format!("{at}.access_values.{word}"), what);
        }
        if raw.audience.iter().any(|audience| audience == "account") {
            let what = "\"account\" is in every token of a Keycloak realm; \
                        have it issue tokens with an audience of pgsilo's own";
            self.warn(format!("{at}.audience"), what);
        }
    }

    /// What a token without the access claim may do. Who says where the access is must say it: a
    /// claim's name with a typing error finds nothing.
    fn default_access(&self, at: &str, raw: &RawIssuer) -> Result<Option<Access>, FileError> {
        let field = format!("{at}.default_access");
        match raw.default_access.as_deref() {
            Some(REFUSE) => Ok(None),
            Some(level) => level.parse().map(Some).or_else(|_| {
                let levels = "\"refuse\", \"read-only\", \"read-write\" or \"migrate\"";
                self.wrong(field, format_args!("{level:?} is not one; use {levels}"))
            }),
            None => {
                let written = [
                    ("access_claim", raw.access_claim.is_some()),
                    ("access_values", raw.access_values.is_some()),
                ];
                match written.into_iter().find(|(_, is_written)| *is_written) {
                    Some((key, _)) => self.wrong(
                        format!("{at}.{key}"),
                        "needs default_access, for a token without that claim: \"refuse\", or an \
                         access level",
                    ),
                    None => Ok(Some(Access::ReadWrite)),
                }
            }
        }
    }

    /// The most that tokens may grant; what could never be granted is a mistake.
    fn max_access(
        &self,
        at: &str,
        raw: &RawIssuer,
        default: Option<Access>,
    ) -> Result<Option<Access>, FileError> {
        let Some(text) = &raw.max_access else { return Ok(None) };
        let field = format!("{at}.max_access");
        let max: Access = match text.parse() {
            Ok(max) => max,
            Err(error) => return self.wrong(field, format_args!("{text:?} is not one: {error}")),
        };
        if default.is_some_and(|default| default > max) {
            let what = "default_access is more; write a lower one (left out, it is \"read-write\")";
            return self.wrong(field, what);
        }
        let levels = raw.access_values.iter().flatten();
        let beyond = |level: &String| level.parse::<Access>().is_ok_and(|level| level > max);
        match levels.into_iter().find(|(_, level)| beyond(level)) {
            Some((value, _)) => {
                let what = "more than max_access: such a token would always be refused";
                self.wrong(format!("{at}.access_values.{value}"), what)
            }
            None => Ok(Some(max)),
        }
    }

    fn tenants(
        &self,
        at: &str,
        raw: Option<Vec<String>>,
    ) -> Result<Option<Vec<TenantPattern>>, FileError> {
        let Some(raw) = raw else { return Ok(None) };
        if raw.is_empty() {
            return self.wrong(
                format!("{at}.tenants"),
                "empty; list ids, or beginnings of ids such as \"eu-*\"",
            );
        }
        let pattern = |(index, text): (usize, &String)| {
            TenantPattern::parse(text).or_else(|error| {
                self.wrong(format!("{at}.tenants[{index}]"), format_args!("{text:?} is {error}"))
            })
        };
        raw.iter().enumerate().map(pattern).collect::<Result<_, _>>().map(Some)
    }

    /// What an issuer's words mean; a tenant that it may not name is a mistake.
    fn tenant_values(
        &self,
        at: &str,
        raw: Option<BTreeMap<String, String>>,
        own: Option<&[TenantPattern]>,
    ) -> Result<Option<BTreeMap<String, TenantId>>, FileError> {
        let Some(raw) = raw else { return Ok(None) };
        let field = format!("{at}.tenant_values");
        if raw.is_empty() || raw.contains_key("") {
            return self.wrong(field, "empty; write it like { \"/acme\" = \"acme\" }");
        }
        let tenant = |(value, id): (String, String)| {
            let field = format!("{field}.{value}");
            let id = TenantId::parse(&id)
                .or_else(|error| self.wrong(&field, format_args!("{id:?} is not one: {error}")))?;
            if own.is_some_and(|own| !own.iter().any(|pattern| pattern.matches(&id))) {
                let what = "not among `tenants`: such a token would always be refused";
                return self.wrong(&field, what);
            }
            Ok((value, id))
        };
        raw.into_iter().map(tenant).collect::<Result<_, _>>().map(Some)
    }

    fn algorithm(&self, field: &str, name: &str) -> Result<Algorithm, FileError> {
        name.parse().or_else(|error| self.wrong(field, format_args!("{name:?} is {error}")))
    }

    fn access_values(
        &self,
        at: &str,
        raw: Option<BTreeMap<String, String>>,
    ) -> Result<Option<BTreeMap<String, Access>>, FileError> {
        let Some(raw) = raw else { return Ok(None) };
        let field = format!("{at}.access_values");
        if raw.is_empty() || raw.contains_key("") {
            return self.wrong(field, "empty; write it like { admin = \"read-write\" }");
        }
        let level = |(value, level): (String, String)| {
            let level = level.parse().or_else(|error| {
                let field = format!("{field}.{value}");
                self.wrong(field, format_args!("{level:?} is not one: {error}"))
            })?;
            Ok((value, level))
        };
        raw.into_iter().map(level).collect::<Result<_, _>>().map(Some)
    }

    fn keys(&self, at: &str, raw: &RawIssuer) -> Result<KeySource, FileError> {
        let (listed, file) = (raw.keys.as_deref(), raw.jwks.as_deref());
        match (listed, file, raw.jwks_url.as_deref(), raw.discovery) {
            (Some(listed), None, None, false) => {
                self.not_fetched(at, raw)?;
                Ok(KeySource::Listed(self.listed_keys(at, listed)?))
            }
            (None, Some(path), None, false) => {
                self.not_fetched(at, raw)?;
                Ok(KeySource::File(self.file.resolve(path)))
            }
            (None, None, Some(url), false) => {
                let field = format!("{at}.jwks_url");
                let url = KeysUrl::parse(url).or_else(|error| self.wrong(&field, error))?;
                self.fetched_keys(at, raw, KeysAt::Jwks(url))
            }
            (None, None, None, true) => {
                let keys = KeysAt::discovery(&raw.issuer);
                let keys = keys.or_else(|error| {
                    let field = format!("{at}.discovery");
                    self.wrong(field, format_args!("`issuer` is no place to ask: {error}"))
                })?;
                self.fetched_keys(at, raw, keys)
            }
            (None, None, None, false) => self.wrong(
                at,
                "no keys; add jwks = FILE, keys = [...], jwks_url = URL or discovery = true",
            ),
            _several => self
                .wrong(at, "several sources of keys; keep one of jwks, keys, jwks_url, discovery"),
        }
    }

    /// What says how to fetch makes no sense where nothing is.
    fn not_fetched(&self, at: &str, raw: &RawIssuer) -> Result<(), FileError> {
        for (key, is_there) in [
            ("refresh", raw.refresh.is_some()),
            ("max_stale", raw.max_stale.is_some()),
            ("ca", raw.ca.is_some()),
        ] {
            if is_there {
                let what = "only with jwks_url or discovery; remove it";
                return self.wrong(format!("{at}.{key}"), what);
            }
        }
        Ok(())
    }

    fn listed_keys(&self, at: &str, listed: &[RawKey]) -> Result<Vec<Key>, FileError> {
        if listed.is_empty() {
            return self.wrong(format!("{at}.keys"), "empty; list at least one key");
        }
        let mut keys = Vec::with_capacity(listed.len());
        for (index, key) in listed.iter().enumerate() {
            let at = format!("{at}.keys[{index}]");
            if key.kid.is_empty() {
                return self.wrong(format!("{at}.kid"), "empty; it must equal the token's `kid`");
            }
            let algorithm = self.algorithm(&format!("{at}.algorithm"), &key.algorithm)?;
            let path = self.file.resolve(&key.pem);
            let pem = self.read(&format!("{at}.pem"), &path, MAX_PEM)?;
            let key = Key::from_pem(&key.kid, algorithm, &pem);
            keys.push(key.or_else(|error| {
                self.wrong(format!("{at}.pem"), format_args!("{path:?}: {error}"))
            })?);
        }
        Ok(keys)
    }

    /// Nothing is fetched here: what can be wrong without that, is said.
    fn fetched_keys(
        &self,
        at: &str,
        raw: &RawIssuer,
        keys: KeysAt,
    ) -> Result<KeySource, FileError> {
        let refresh = raw.refresh.map_or(REFRESH, |refresh| refresh.0);
        if !REFRESHES.contains(&refresh) {
            return self.wrong(format!("{at}.refresh"), "out of range; use \"1s\" to \"24h\"");
        }
        let max_stale = raw.max_stale.map_or(MAX_STALE, |max_stale| max_stale.0);
        if max_stale < refresh * 2 {
            let what = "less than twice `refresh`: one failed fetch would end every login";
            return self.wrong(format!("{at}.max_stale"), what);
        }
        let field = format!("{at}.ca");
        let ca = match &raw.ca {
            Some(_) if !keys.url().is_https() => {
                return self.wrong(field, "http has no certificates; remove it or use https");
            }
            Some(path) => {
                let pem = tls::roots_pem(&self.file.resolve(path));
                Some(pem.or_else(|error| self.wrong(&field, error))?)
            }
            None => None,
        };
        Ok(KeySource::Fetched { at: keys, ca, refresh, max_stale })
    }
}
