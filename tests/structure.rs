//! What the code must never do, kept by reading it, and what the documents say, compared with
//! the tables that they describe.
//!
//! Each rule is a function from all sources to complaints. Its test shows that there are none,
//! and that each planted violation leads to one: no rule passes because it sees nothing.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]

#[path = "structure/documents.rs"]
mod documents;
#[path = "structure/rules.rs"]
mod rules;
#[path = "structure/source.rs"]
mod source;

use source::{Source, sources};

/// A rule: what is wrong, one line each.
type Rule = fn(&[Source]) -> Vec<String>;

/// The rule is kept, and notices each planted line: at the top of a file that exists, or as all
/// of one that does not.
fn holds(rule: Rule, planted: &[(&str, &str)]) {
    let sources = sources();
    assert_eq!(rule(&sources), Vec::<String>::new());
    assert!(!planted.is_empty());
    for (path, line) in planted {
        let mut changed = sources.clone();
        match changed.iter_mut().find(|source| source.path == *path) {
            Some(source) => plant(source, line),
            None => {
                changed.push(Source::new((*path).to_owned(), format!("//! Planted.\n{line}\n")));
            }
        }
        assert!(!rule(&changed).is_empty(), "not noticed: {line:?} in {path}");
    }
    // What is only said is not done.
    for (path, line) in planted {
        let mut changed = sources.clone();
        let source = changed.iter_mut().find(|source| source.path == *path);
        if let Some(source) = source.filter(|_| !line.starts_with('#')) {
            plant(source, &format!("//! {}", line.replace('\n', "\n//! ")));
            assert_eq!(rule(&changed), Vec::<String>::new(), "a comment: {line:?}");
        }
    }
}

fn plant(source: &mut Source, line: &str) {
    *source = Source::new(source.path.clone(), format!("{line}\n{}", source.text));
}

#[test]
fn each_part_imports_only_what_stands_below_it() {
    holds(
        rules::layers,
        &[
            ("src/splice.rs", "use crate::session::Client;"),
            ("src/backend.rs", "use crate::session::Leased;"),
            ("src/backend.rs", "use crate::session::Routed;"),
            ("src/backend/login.rs", "use crate::session::Route;"),
            ("src/pool.rs", "use crate::session::Routed;"),
            ("src/splice.rs", "use crate::session::Route;"),
            ("src/lease.rs", "use crate::refusal::Reason;"),
            ("src/lease.rs", "use crate::Refusal;"),
            ("src/token/keys.rs", "use crate::registry::Tenant;"),
            ("src/registry/denied.rs", "use crate::lease::Lessor;"),
            ("src/lease/openbao.rs", "use crate::token::Token;"),
            ("src/token/fetch.rs", "use crate::lease::OpenBaoError;"),
            ("src/limits.rs", "use crate::lease::Lessor;"),
            ("src/stream.rs", "use crate::config::Config;"),
            ("src/stream.rs", "fn f() { crate::backend::dial; }"),
            ("src/config/build.rs", "use super::super::server::serve;"),
            ("src/new.rs", "use std::fmt;"),
        ],
    );
}

#[test]
fn a_stage_imports_only_earlier_ones() {
    holds(
        rules::stages_in_order,
        &[
            ("src/session/started.rs", "use super::identified::Identified;"),
            ("src/session/accepted.rs", "use crate::session::Spliced;"),
            ("src/session/leased.rs", "fn f(a: super::attached::Attached<'_>) {}"),
            ("src/session/client.rs", "use super::accepted::Accepted;"),
            ("src/session/client.rs", "use super::secured::Secured;"),
            ("src/session/cancelling.rs", "use super::routed::Routed;"),
            ("src/session/routed.rs", "use super::cancelling::Cancelling;"),
            ("src/session/authority.rs", "use super::attached::Held;"),
            ("src/session/leased.rs", "use super::authority::Authority;"),
            ("src/session/new.rs", "use std::fmt;"),
        ],
    );
}

#[test]
fn a_stage_has_one_constructor_that_takes_its_predecessor_by_value() {
    holds(
        rules::one_constructor,
        &[
            ("src/session/routed.rs", "fn again<'c>() -> Routed<'c> { panic!() }"),
            ("src/session/leased.rs", "fn other() -> Result<Leased<'static>, Stop> { panic!() }"),
            ("src/session/attached.rs", "impl Default for Attached<'_> {}"),
            ("src/session/attached.rs", "impl<'c> From<Leased<'c>> for Attached<'c> {}"),
            ("src/session/spliced.rs", "#[derive(Clone)] pub struct Spliced<'c> {}"),
        ],
    );
}

#[test]
fn what_happens_once_in_the_chain_is_called_once() {
    holds(
        rules::called_once,
        &[
            ("src/session/routed.rs", "fn f() { backend::dial(&routed); }"),
            ("src/session/attached.rs", "fn f() { proxy.lessor.lease(a, b); }"),
            ("src/server.rs", "fn f() { connection.log_in(a, b); }"),
            ("src/pool.rs", "fn f() { Route { tenant, role, access, settings } }"),
            ("src/session/attached.rs", "fn f() { proxy.pool.take(route); }"),
            ("src/audit.rs", "fn f() { verifier.verify(a, b); }"),
            ("src/session/routed.rs", "async fn f() { verifier.identify(a).await; }"),
            ("src/backend.rs", "fn f() { Credential { username, password }; }"),
            ("src/server.rs", "fn f() { message::authentication_ok(out); }"),
            ("src/server.rs", "fn f() { frontend.send_last(a); }"),
        ],
    );
}

#[test]
fn one_place_refuses() {
    holds(
        rules::refuses_once,
        &[
            ("src/session.rs", "fn f() { refuse(client, refusal); }"),
            ("src/session/routed.rs", "fn f() { super::refuse(client, refusal); }"),
            ("src/server/listen.rs", "use crate::session::refuse;"),
        ],
    );
}

#[test]
fn every_file_says_what_it_is_for_and_ends_with_its_tests() {
    holds(
        rules::files_are_in_shape,
        &[
            ("src/new.rs", "fn f() {}\n#[cfg(test)]\nmod tests {}\nfn g() {}"),
            ("src/splice.rs", "use std::fmt;"),
        ],
    );
}

#[test]
fn every_metric_is_described_and_every_described_one_is_used() {
    holds(
        rules::metrics_are_described,
        &[
            ("src/audit.rs", "fn f() { metrics::counter!(\"pgsilo_new_total\").increment(1); }"),
            ("src/audit.rs", "fn f() { gauge!(\"pgsilo_new\").set(1); }"),
            ("src/admin/metrics.rs", "fn f() { describe_gauge!(\"pgsilo_new\", \"New\"); }"),
        ],
    );
}
