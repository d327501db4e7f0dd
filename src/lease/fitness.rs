//! Whether a token of OpenBAO's can keep what pgsilo promises of the leases under it: that a
//! session is ended by what it is told of and by nothing else, and that what it leased goes when it
//! ends.
//!
//! OpenBAO says what a token is when it is made and when it is looked up. What cannot keep the
//! promises is refused at the login, and not when sessions are cut off. Called by
//! the identity for pgsilo's own tokens, and for each session's under session authority.

use pgsilo_openbao::Nature;

/// Why a token is not taken, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    /// With its last use OpenBAO revokes a token, and every lease with it.
    #[error(
        "its token ends after {0} uses, and every session with it: set token_num_uses=0 for the role"
    )]
    Uses(u64),
    /// Such a token cannot be revoked or renewed, and the leases under it are not its own.
    #[error(
        "its token is of type {0:?}, which can be neither renewed nor revoked: set token_type=service for the role"
    )]
    Kind(String),
    /// It ends when its parent does, without notice.
    #[error(
        "its token ends with the one that it was made with, and every session with it: make it with -orphan"
    )]
    Child,
    /// It may do anything.
    #[error("its token is a root token: give pgsilo one with the policy docker/openbao/pgsilo.hcl")]
    Root,
}

/// Whether OpenBAO can end it, and the leases under it with it.
pub(super) fn is_revocable(token: &Nature) -> bool {
    token.kind == "service"
}

/// That a session may hang on it.
///
/// # Errors
/// When OpenBAO would end it by itself, or could not end it when pgsilo asks for that.
pub(super) fn check(token: &Nature) -> Result<(), Unfit> {
    if token.uses > 0 {
        return Err(Unfit::Uses(token.uses));
    }
    if !is_revocable(token) {
        return Err(Unfit::Kind(token.kind.clone()));
    }
    if !token.orphan {
        return Err(Unfit::Child);
    }
    match token.policies.iter().any(|policy| policy == "root") {
        true => Err(Unfit::Root),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_break_promises_are_refused_with_advice() {
        let fit = Nature {
            uses: 0,
            kind: "service".into(),
            orphan: true,
            policies: vec!["pgsilo".into()],
        };
        assert_eq!(check(&fit), Ok(()));
        let refused = |unfit: &Nature, advice: &str| {
            let said = check(unfit).unwrap_err().to_string();
            assert!(said.contains(advice), "{said}");
        };
        refused(&Nature { uses: 10, ..fit.clone() }, "token_num_uses=0");
        refused(&Nature { kind: "batch".into(), ..fit.clone() }, "token_type=service");
        refused(&Nature { orphan: false, ..fit.clone() }, "-orphan");
        refused(&Nature { policies: vec!["root".into()], ..fit }, "pgsilo.hcl");
    }
}
