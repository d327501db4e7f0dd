//! The rules. Each says what it forbids and why; the reasons are in ARCHITECTURE.md.

use std::fs;
use std::path::Path;

use syn::{Field, FnArg, ImplItem, Item, Signature, Visibility};

use crate::source::{Source, Sources, text};

/// The stages in their order, and what runs them.
const CHAIN: [&str; 9] = [
    "accepted",
    "secured",
    "started",
    "identified",
    "routed",
    "leased",
    "attached",
    "spliced",
    "chain",
];

/// Modules of `session` beside the chain: what of it they name, and who names them.
const BESIDE: [(&str, &[&str], &[&str]); 4] = [
    // Proves nothing.
    ("client", &[], &CHAIN),
    // The fork without a token.
    ("cancelling", &["accepted", "client"], &["started", "chain"]),
    // What a spliced session's life depends on.
    ("authority", &["resources"], &["spliced"]),
    // What it owns.
    ("resources", &[], &["attached", "spliced"]),
];

/// The map of `src/lib.rs`, a layer each line, from the top.
pub(crate) fn map() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    let text = fs::read_to_string(path).expect("src/lib.rs");
    let (_, map) = text.split_once("//! The layers").expect("the map");
    let (_, map) = map.split_once("```text\n").expect("the map's first line");
    let (map, _) = map.split_once("//! ```\n").expect("the map's end");
    map.lines().map(|line| line.trim_start_matches("//! ").to_owned()).collect()
}

/// The files of the library with their modules.
fn library(sources: &Sources) -> impl Iterator<Item = (&Source, Vec<&str>)> {
    sources.iter().filter_map(|source| Some((&**source, source.module()?)))
}

/// Each part is tried alone, and parts that must agree meet in a stage and nowhere else: a part
/// imports only what stands below it on the map. What other packages may import is Cargo's to say.
pub(crate) fn layers(sources: &Sources) -> Vec<String> {
    let map = map();
    let parts = map.iter().map(|line| line.split("  ").next().unwrap_or_default());
    let layers: Vec<Vec<&str>> = parts.map(|parts| parts.split(", ").collect()).collect();
    let layer = |part: &str| layers.iter().position(|parts| parts.contains(&part));
    let mut complaints = Vec::new();
    for (source, module) in library(sources) {
        let part = module[0];
        let Some(own) = layer(part) else {
            complaints.push(format!("{} is not on the map of src/lib.rs", source.path));
            continue;
        };
        for path in source.paths() {
            let is_below = layer(&path[1]).is_some_and(|layer| layer > own);
            if path[1] != part && !is_below {
                complaints.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    complaints
}

/// A stage proves what came before it and knows nothing of what comes.
pub(crate) fn stages_in_order(sources: &Sources) -> Vec<String> {
    let place = |module: &str| CHAIN.iter().position(|stage| *stage == module);
    let beside = |module: &str| BESIDE.iter().find(|(name, ..)| *name == module);
    let may_name = |module: &str, other: &str| match (beside(module), beside(other)) {
        (Some((_, names, _)), _) => names.contains(&other),
        (None, Some((.., by))) => by.contains(&module),
        (None, None) => place(other).zip(place(module)).is_some_and(|(other, own)| other < own),
    };
    let mut complaints = Vec::new();
    for (source, module) in library(sources) {
        let ["session", module, ..] = module[..] else { continue };
        if place(module).is_none() && beside(module).is_none() {
            complaints.push(format!("{} is neither in the chain nor beside it", source.path));
        }
        for path in source.paths().iter().filter(|path| path.len() > 2 && path[1] == "session") {
            if path[2] != module && !may_name(module, &path[2]) {
                complaints.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    complaints
}

/// What a stage proves is as true as its only constructor: it takes the stage before it by value,
/// and nothing else in its file makes one. In other files private fields see to it, and that it
/// holds what cannot be cloned.
pub(crate) fn one_constructor(sources: &Sources) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut before = "&'cmutClient".to_owned();
    for file in &CHAIN[..CHAIN.len() - 1] {
        let path = format!("src/session/{file}.rs");
        let source = sources.iter().find(|source| source.path == path).expect(&path);
        let stage = file[..1].to_uppercase() + &file[1..];
        let mut functions: Vec<&Signature> = Vec::new();
        for item in &source.file.items {
            match item {
                Item::Struct(item) if item.ident == stage => {
                    let is_private = |field: &Field| matches!(field.vis, Visibility::Inherited);
                    if !item.fields.iter().all(is_private) {
                        complaints.push(format!("{path}: a field of {stage} is not private"));
                    }
                }
                Item::Impl(item) => {
                    let methods = item.items.iter().filter_map(|item| match item {
                        ImplItem::Fn(method) => Some(&method.sig),
                        _ => None,
                    });
                    functions.extend(methods);
                }
                Item::Fn(item) => functions.push(&item.sig),
                _ => {}
            }
        }
        // A fork answers with what a stage is a variant of.
        let makes = |name: &str| [stage.as_str(), "StartOutcome", "Self"].contains(&name);
        functions.retain(|of| words(&text(&of.output)).any(makes));
        let takes = |of: &Signature| match of.inputs.first() {
            Some(FnArg::Typed(first)) => {
                text(&first.ty).replace("<'_>", "").replace("<'c>", "") == before
            }
            _ => false,
        };
        if functions.len() != 1 || !takes(functions[0]) {
            complaints
                .push(format!("{path} has not one constructor, or it does not take {before}"));
        }
        before = stage;
    }
    complaints
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !is_of_word(c))
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// One place leases, one logs in, one verifies, one welcomes, one refuses: what stands before it in
/// the chain then stands before every session. The dial is beside the lease, and once more where
/// the database had no room for the login. The pool does these three, too, for a route that a
/// session had.
pub(crate) fn called_once(sources: &Sources) -> Vec<String> {
    const CALLS: [(&str, &[&str]); 9] = [
        ("dial(", &["src/pool.rs", "src/session/attached.rs", "src/session/leased.rs"]),
        ("lessor.lease(", &["src/pool.rs", "src/session/leased.rs"]),
        // pgsilo's own login to OpenBAO is called the same.
        (".log_in(", &["src/pool.rs", "src/session/attached.rs"]),
        ("pool.take(", &["src/session/leased.rs"]),
        (".identify(", &["src/session/identified/proofs.rs"]),
        // Once more when the issuer's keys were looked at again.
        (".verify(", &["src/token.rs", "src/token.rs"]),
        ("authentication_ok(", &["src/session/attached.rs"]),
        ("ask_password(", &["src/session/identified.rs"]),
        (".send_last(", &["src/session/chain.rs", "src/splice.rs"]),
    ];
    let codes: Vec<_> = library(sources)
        .map(|(source, _)| (source.path.as_str(), source.code().replace("self.log_in(", "")))
        .collect();
    let mut complaints = Vec::new();
    for (call, places) in CALLS {
        let found = codes.iter().flat_map(|(path, code)| calls(code, call).map(|_| *path));
        let found: Vec<_> = found.collect();
        if found != places {
            complaints.push(format!("`{call}` is in {found:?}, not in {places:?}"));
        }
    }
    complaints
}

/// Where a name is called, by whatever path. Spaces are gone, so a function's own `fn` is part of
/// its name.
fn calls<'a>(code: &'a str, call: &'a str) -> impl Iterator<Item = usize> + 'a {
    let begins = move |at: &usize| call.starts_with('.') || !code[..*at].ends_with(is_of_word);
    code.match_indices(call).map(|(at, _)| at).filter(begins)
}

/// Each file begins with what it is for.
pub(crate) fn files_say_what_they_are_for(sources: &Sources) -> Vec<String> {
    let silent = sources.iter().filter(|source| !source.text.starts_with("//! "));
    silent.map(|source| format!("{} does not say what it is for", source.path)).collect()
}
