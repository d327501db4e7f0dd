//! What no type, visibility or lint holds, kept by reading the code; and what the documents say,
//! compared with the tables that they describe.
//!
//! Each rule is a function from all sources to complaints. Its test shows that there are none,
//! and that each planted violation leads to one: no rule passes because it sees nothing.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]
#![expect(clippy::disallowed_methods, reason = "Cargo is asked what packages are built of")]

#[path = "structure/documents.rs"]
mod documents;
#[path = "structure/packages.rs"]
mod packages;
#[path = "structure/rules.rs"]
mod rules;
#[path = "structure/source.rs"]
mod source;

use std::rc::Rc;

use source::{Source, Sources, sources};

/// The rule is kept, and notices each planted item: at the end of a file that exists, or as all of
/// one that does not. What is only said is not done.
fn holds(rule: fn(&Sources) -> Vec<String>, planted: &[(&str, &str)]) {
    let sources = sources();
    assert_eq!(rule(&sources), Vec::<String>::new());
    let complaints = |path: &str, item: &str| {
        let mut changed = sources.clone();
        changed.retain(|source| source.path != path);
        let text = sources.iter().find(|source| source.path == path).map(|source| &*source.text);
        let text = format!("{}\n{item}\n", text.unwrap_or("//! Planted."));
        changed.push(Rc::new(Source::new(path, &text)));
        changed.sort_by(|a, b| a.path.cmp(&b.path));
        rule(&changed)
    };
    assert!(!planted.is_empty());
    for (path, item) in planted {
        assert_ne!(complaints(path, item), Vec::<String>::new(), "not noticed: {item} in {path}");
        if sources.iter().any(|source| source.path == *path) {
            let said = format!("// {}", item.replace('\n', "\n// "));
            assert_eq!(complaints(path, &said), Vec::<String>::new(), "{path}");
        }
    }
}

#[test]
fn each_part_imports_only_what_stands_below_it() {
    holds(
        rules::layers,
        &[
            ("src/splice.rs", "use crate::session::Client;"),
            ("src/backend/login.rs", "use crate::proxy::Proxy;"),
            ("src/pool.rs", "use crate::config::Config;"),
            ("src/lease.rs", "use crate::refusal::Reason;"),
            ("src/lease.rs", "use crate::Refusal;"),
            ("src/token/keys.rs", "use crate::registry::Registry;"),
            ("src/registry/denied.rs", "use crate::lease::Lessor;"),
            ("src/lease/server.rs", "use crate::token::Token;"),
            ("src/token/fetch.rs", "use crate::{audit, lease::{OpenBaoError}};"),
            ("src/limits.rs", "use crate::lease::Lessor;"),
            ("src/stream.rs", "fn f() { crate::backend::dial; }"),
            ("src/stream.rs", "fn f() { tokio::select! { a = crate::backend::dial(b) => {} } }"),
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
            ("src/session/accepted.rs", "use crate::session::spliced::Spliced;"),
            ("src/session/leased.rs", "fn f(a: super::attached::Attached<'_>) {}"),
            ("src/session/routed.rs", "fn f() { super::chain::serve(a, b); }"),
            ("src/session/routed.rs", "fn f() { super::serve(a, b); }"),
            ("src/session/client.rs", "use super::accepted::Accepted;"),
            ("src/session/cancelling.rs", "use super::routed::Routed;"),
            ("src/session/routed.rs", "use super::cancelling::Cancelling;"),
            ("src/session/authority.rs", "use super::attached::Attached;"),
            ("src/session/leased.rs", "use super::authority::Authority;"),
            ("src/session/identified/proofs.rs", "use super::super::routed::Routed;"),
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
            ("src/session/spliced.rs", "fn again() -> Box<Spliced> { panic!() }"),
            ("src/session/leased.rs", "fn other() -> Result<Leased<'static>, Stop> { panic!() }"),
            ("src/session/started.rs", "impl StartOutcome<'_> { fn other() -> Self { panic!() } }"),
            (
                "src/session/attached.rs",
                "impl Default for Attached<'_> { fn default() -> Self { panic!() } }",
            ),
            (
                "src/session/attached.rs",
                "impl<'c> From<Leased<'c>> for Attached<'c> { fn from(_: Leased<'c>) -> Self {} }",
            ),
        ],
    );
}

/// What planting beside the code cannot show: the constructor and the fields.
#[test]
fn a_stage_is_made_of_the_one_before_it_and_of_nothing_else() {
    let sources = sources();
    for (sound, planted) in [
        ("fn route(mut identified: Identified<'c>)", "fn route(identified: &mut Identified<'c>)"),
        ("fn route(mut identified: Identified<'c>)", "fn route(mut started: Started<'c>)"),
        ("struct Routed<'c> {\n    ", "struct Routed<'c> {\n    pub(super) "),
    ] {
        let mut changed = sources.clone();
        let routed = changed.iter_mut().find(|source| source.path == "src/session/routed.rs");
        let routed = routed.expect("routed.rs");
        assert!(routed.text.contains(sound), "{sound}");
        *routed = Rc::new(Source::new(&routed.path, &routed.text.replacen(sound, planted, 1)));
        assert_eq!(rules::one_constructor(&changed).len(), 1, "not noticed: {planted}");
    }
}

#[test]
fn steps_that_happen_once_in_the_chain_have_one_caller() {
    holds(
        rules::called_once,
        &[
            ("src/session/routed.rs", "fn f() { backend::dial(&routed); }"),
            ("src/session/routed.rs", "use crate::backend::dial; fn f() { dial(&routed); }"),
            ("src/session/spliced.rs", "fn f() { super::leased::dial(&route); }"),
            ("src/session/attached.rs", "fn f() { proxy.lessor.lease(a, b); }"),
            ("src/server.rs", "fn f() { connection.log_in(a, b); }"),
            ("src/session/attached.rs", "fn f() { proxy.pool.take(route); }"),
            ("src/audit.rs", "fn f() { verifier.verify(a, b); }"),
            ("src/session/routed.rs", "async fn f() { verifier.identify(a).await; }"),
            ("src/server.rs", "fn f() { message::authentication_ok(out); }"),
            ("src/server.rs", "fn f() { tokio::select! { () = frontend.send_last(a) => {} } }"),
        ],
    );
}

#[test]
fn every_file_says_what_it_is_for() {
    let sources = sources();
    assert_eq!(rules::files_say_what_they_are_for(&sources), Vec::<String>::new());
    let silent = Source::new("src/new.rs", "// Not of the file.\nfn f() {}");
    assert_eq!(rules::files_say_what_they_are_for(&vec![Rc::new(silent)]).len(), 1);
}
