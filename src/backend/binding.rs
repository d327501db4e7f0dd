//! Whether a login is bound to its TLS channel: what is said to a database that asks for SCRAM.
//!
//! A man in the middle has TLS with pgsilo and TLS with the database, and relays the login. The
//! database's certificate is not his, so a proof over its hash (RFC 5929, `tls-server-end-point`)
//! is not good for his channel. What he can do is take the offer of it away, or present a
//! certificate that has no such hash; so over TLS only a server whose certificate was verified in
//! full is told that pgsilo could not have bound it (`n`, RFC 5802, section 6).

use pgsilo_core::registry::ChannelBinding;
use postgres_protocol::authentication::sasl::{
    ChannelBinding as Header, SCRAM_SHA_256, SCRAM_SHA_256_PLUS,
};

use super::error::BackendError;

/// What there is to bind a login to.
#[derive(Debug)]
pub(super) enum Channel {
    /// No TLS.
    Clear,
    /// TLS with a server.
    Tls {
        /// Of its certificate, where the certificate's signature has a hash to take.
        end_point: Option<Vec<u8>>,
        /// Its chain and its name were good: there is no man in the middle.
        verified_in_full: bool,
        /// What the placement says.
        demand: ChannelBinding,
    },
}

/// How SCRAM is done.
pub(super) struct Exchange {
    pub(super) mechanism: &'static str,
    pub(super) header: Header,
    pub(super) is_bound: bool,
}

impl Channel {
    /// How SCRAM is done with a server that offers these mechanisms.
    ///
    /// # Errors
    /// When it offers none that will do, or the login cannot be bound and must be.
    pub(super) fn exchange(self, offered: &[String]) -> Result<Exchange, BackendError> {
        let offers = |name| offered.iter().any(|mechanism| mechanism == name);
        let plain = |header| match offers(SCRAM_SHA_256) {
            true => Ok(Exchange { mechanism: SCRAM_SHA_256, header, is_bound: false }),
            false => Err(BackendError::MethodRefused("a SASL mechanism other than SCRAM-SHA-256")),
        };
        let offers_plus = offers(SCRAM_SHA_256_PLUS);
        match self {
            Channel::Clear => plain(Header::unsupported()),
            Channel::Tls { end_point: Some(hash), .. } if offers_plus => Ok(Exchange {
                mechanism: SCRAM_SHA_256_PLUS,
                header: Header::tls_server_end_point(hash),
                is_bound: true,
            }),
            Channel::Tls { demand: ChannelBinding::Require, .. } if !offers_plus => {
                Err(BackendError::Unbound("the database does not offer SCRAM-SHA-256-PLUS"))
            }
            // `y`: I could, and you do not seem to. A server that did offer it knows better.
            Channel::Tls { .. } if !offers_plus => plain(Header::unrequested()),
            // PostgreSQL offers it whatever its certificate is, so `y` would be refused.
            Channel::Tls { verified_in_full: true, demand: ChannelBinding::Prefer, .. } => {
                plain(Header::unsupported())
            }
            Channel::Tls { .. } => Err(BackendError::Unbound(
                "the signature of the database's certificate has no hash to bind to (Ed25519, \
                 say; RFC 5929): have it signed with RSA or ECDSA",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use postgres_protocol::authentication::sasl::ScramSha256;

    use super::*;

    /// Every channel that there is, and what is said to a server: the mechanism and the first byte
    /// of the GS2 header.
    #[test]
    fn unbound_is_said_over_tls_only_after_full_verification() {
        use ChannelBinding::{Prefer, Require};
        const PLUS: &[&str] = &["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"];
        const PLAIN: &[&str] = &["SCRAM-SHA-256"];
        for (has_hash, verified_in_full, demand, offered, said) in [
            (true, true, Prefer, PLUS, Some("p")),
            (true, true, Require, PLUS, Some("p")),
            (true, false, Prefer, PLUS, Some("p")),
            (true, false, Require, PLUS, Some("p")),
            (true, true, Prefer, PLAIN, Some("y")),
            (true, true, Require, PLAIN, None),
            (true, false, Prefer, PLAIN, Some("y")),
            (true, false, Require, PLAIN, None),
            (false, true, Prefer, PLUS, Some("n")),
            (false, true, Require, PLUS, None),
            (false, false, Prefer, PLUS, None),
            (false, false, Require, PLUS, None),
            (false, true, Prefer, PLAIN, Some("y")),
            (false, true, Require, PLAIN, None),
            (false, false, Prefer, PLAIN, Some("y")),
            (false, false, Require, PLAIN, None),
            (true, true, Prefer, &["OAUTHBEARER"], None),
        ] {
            let end_point = has_hash.then(|| vec![7; 32]);
            let channel = Channel::Tls { end_point, verified_in_full, demand };
            let what = format!("{channel:?} {offered:?}");
            let offered: Vec<_> = offered.iter().map(|&name| name.to_owned()).collect();
            let header = channel.exchange(&offered).ok().map(|exchange| {
                assert_eq!(exchange.is_bound, exchange.mechanism == SCRAM_SHA_256_PLUS);
                let scram = ScramSha256::new(b"", exchange.header);
                String::from_utf8_lossy(&scram.message()[..1]).into_owned()
            });
            assert_eq!(header.as_deref(), said, "{what}");
        }
    }
}
