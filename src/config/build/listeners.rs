//! Where clients connect: TLS, a Unix socket, or clear text said in so many words.

use std::collections::BTreeSet;

use pgsilo_core::tls::{ClientAuthorities, ServerFiles};

use super::super::raw::{RawDemand, RawListener, RawListenerTls};
use super::super::{ListenAddress, ListenerTls, Proof};
use super::proofs::{Door, Known};
use super::{Build, FileError, ListenerSettings, collide};

/// What fits into `sockaddr_un` on Linux, its NUL included.
const MAX_SOCKET_PATH: usize = 108;

impl Build<'_> {
    /// `known` says what of the rest of the file listeners depend on.
    pub(super) fn listeners(
        &mut self,
        raw: Vec<RawListener>,
        known: &Known,
    ) -> Result<Vec<ListenerSettings>, FileError> {
        if raw.is_empty() {
            return self.wrong("listener", "there is none; add a [[listener]] table");
        }
        let mut listeners = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            let at = format!("listener[{index}]");
            let listener = match (&raw.address, &raw.socket) {
                (Some(_), Some(_)) => {
                    return self
                        .wrong(at, "both address and socket; give each its own [[listener]]");
                }
                (None, None) => return self.wrong(at, "neither address nor socket; add one"),
                (Some(_), None) => self.tcp(&at, raw, known)?,
                (None, Some(_)) => self.unix(&at, raw, known)?,
            };
            if listeners
                .iter()
                .any(|other: &ListenerSettings| collide(&listener.place, &other.place))
            {
                let field = match listener.place {
                    ListenAddress::Tcp(_) => "address",
                    ListenAddress::Unix { .. } => "socket",
                };
                return self.wrong(format!("{at}.{field}"), "another listener has it already");
            }
            listeners.push(listener);
        }
        Ok(listeners)
    }

    fn tcp(
        &mut self,
        at: &str,
        raw: RawListener,
        known: &Known,
    ) -> Result<ListenerSettings, FileError> {
        if raw.mode.is_some() {
            return self.wrong(format!("{at}.mode"), "only a Unix socket has a mode; remove it");
        }
        if raw.allow_uids.is_some() {
            let what = "only a Unix socket knows its peer's user; remove it";
            return self.wrong(format!("{at}.allow_uids"), what);
        }
        let Some(address) = raw.address.map(|address| address.0) else {
            return self.wrong(at, "neither address nor socket; add one");
        };
        let tls = match (raw.tls, raw.plaintext) {
            (Some(_), true) => {
                let what = "both tls and plaintext = true; keep one";
                return self.wrong(format!("{at}.plaintext"), what);
            }
            (None, false) => {
                let what = "no tls; add tls = { certificate = FILE, key = FILE }, \
                            or plaintext = true if tokens may travel in clear";
                return self.wrong(at, what);
            }
            (None, true) if raw.require_tls.is_some() => {
                let what = "there is no tls to require; remove it";
                return self.wrong(format!("{at}.require_tls"), what);
            }
            (None, true) => None,
            (Some(files), false) => Some(ListenerTls {
                server: self.listener_tls(at, &files)?,
                required: raw.require_tls.unwrap_or(true),
            }),
        };
        let in_clear = tls.as_ref().is_none_or(|tls| !tls.required);
        if in_clear && !address.ip().is_loopback() {
            let field = if tls.is_some() { "require_tls" } else { "plaintext" };
            self.warn(
                format!("{at}.{field}"),
                "tokens may travel in clear over a network: anybody on the way can use them",
            );
        }
        let sni_suffix = self.sni_suffix(at, raw.sni_suffix, tls.is_some())?;
        let balancers = self.balancers(at, raw.proxy_protocol)?;
        let place = ListenAddress::Tcp(address);
        let database_names = self.database_names(at, raw.database_names)?;
        let proof = self.proof(at, raw.auth, &Door { place: &place, tls: tls.as_ref() }, known)?;
        Ok(ListenerSettings {
            place,
            tls,
            proof,
            uids: None,
            sni_suffix,
            database_names,
            balancers,
        })
    }

    fn listener_tls(&mut self, at: &str, raw: &RawListenerTls) -> Result<ServerFiles, FileError> {
        let certificate = self.file.resolve(&raw.certificate);
        let key = self.file.resolve(&raw.key);
        if raw.client_ca.is_none() {
            let field = match (raw.client_certificate, raw.client_crl.is_empty()) {
                (None, true) => None,
                (Some(_), _) => Some("client_certificate"),
                (None, false) => Some("client_crl"),
            };
            if let Some(field) = field {
                let what = "needs client_ca, the authorities of clients' certificates";
                return self.wrong(format!("{at}.tls.{field}"), what);
            }
        }
        let clients = raw.client_ca.as_ref().map(|ca| ClientAuthorities {
            ca: self.file.resolve(ca),
            crls: raw.client_crl.iter().map(|path| self.file.resolve(path)).collect(),
            required: raw.client_certificate == Some(RawDemand::Required),
        });
        self.mind_readers(&format!("{at}.tls.key"), &key);
        Ok(ServerFiles { certificate, key, clients })
    }

    fn unix(
        &mut self,
        at: &str,
        raw: RawListener,
        known: &Known,
    ) -> Result<ListenerSettings, FileError> {
        for (present, key) in [
            (raw.tls.is_some(), "tls"),
            (raw.require_tls.is_some(), "require_tls"),
            (raw.plaintext, "plaintext"),
            (raw.sni_suffix.is_some(), "sni_suffix"),
            (raw.proxy_protocol.is_some(), "proxy_protocol"),
        ] {
            if present {
                return self.wrong(format!("{at}.{key}"), "only a TCP listener has it; remove it");
            }
        }
        let path = raw.socket.unwrap_or_default();
        if path.as_os_str().is_empty() || path.as_os_str().as_encoded_bytes().contains(&0) {
            return self
                .wrong(format!("{at}.socket"), "empty or with a NUL; name the socket's file");
        }
        let path = self.file.resolve(&path);
        if path.as_os_str().len() >= MAX_SOCKET_PATH {
            return self.wrong(
                format!("{at}.socket"),
                format_args!("longer than a socket's path can be ({} bytes)", MAX_SOCKET_PATH - 1),
            );
        }
        let mode = raw.mode.map_or(0o660, |mode| mode.0.0);
        if raw.allow_uids.as_ref().is_some_and(Vec::is_empty) {
            return self.wrong(format!("{at}.allow_uids"), "empty; no user could connect");
        }
        let uids = raw.allow_uids.map(BTreeSet::from_iter);
        let place = ListenAddress::Unix { path, mode };
        let proof = self.proof(at, raw.auth, &Door { place: &place, tls: None }, known)?;
        let lets_all_in = matches!(proof, Proof::Sidecar(_)) && uids.is_none() && mode & 0o006 != 0;
        if lets_all_in {
            self.warn(
                format!("{at}.mode"),
                "every user of this machine is let in as the token's; use \"0660\" or allow_uids",
            );
        }
        let (tls, sni_suffix, balancers) = (None, None, Vec::new());
        let database_names = self.database_names(at, raw.database_names)?;
        Ok(ListenerSettings { place, tls, proof, uids, sni_suffix, database_names, balancers })
    }
}
