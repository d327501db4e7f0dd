//! The rules. Each says what it forbids and why; the reasons are in ARCHITECTURE.md.

use std::collections::BTreeSet;

use crate::source::{Source, blank, tests_begin};

/// The stages, in the order of `session.rs`.
const STAGES: [(&str, &str, &str); 8] = [
    // file, type, how its one constructor begins
    ("accepted", "Accepted", "async fn accept(client: &'c mut Client)"),
    ("secured", "Secured", "fn secure(mut accepted: Accepted<'c>)"),
    ("started", "Started", "fn start(secured: Secured<'c>)"),
    ("identified", "Identified", "fn identify(mut started: Started<'c>)"),
    ("routed", "Routed", "fn route(mut identified: Identified<'c>)"),
    ("leased", "Leased", "fn lease(mut routed: Routed<'c>)"),
    ("attached", "Attached", "fn attach(leased: Leased<'c>)"),
    ("spliced", "Spliced", "fn splice(attached: Attached<'c>)"),
];

/// In `session/`, and no stage; see [`stages_in_order`].
const SIDE_ROOMS: [&str; 3] = ["client", "cancelling", "authority"];

/// The parts, as the map in `lib.rs` has them: each imports only what stands in a row below.
const LAYERS: [&[&str]; 13] = [
    &["server", "admin"],
    &["config"],
    &["session"],
    &["refusal"],
    &["proxy"],
    &["sessions"],
    &["splice", "cancel", "pool"],
    &["backend", "frontend", "listener"],
    &["route"],
    &["identity"],
    &["token", "registry", "lease"],
    &["audit"],
    &["stream", "ending", "limits", "proxy_protocol", "log"],
];

/// In one row all the same.
const NEIGHBOURS: [(&str, &str); 1] = [("server", "admin")];

/// The library's files and their modules.
fn library(sources: &[Source]) -> impl Iterator<Item = (&Source, Vec<&str>)> {
    sources.iter().filter_map(|source| Some((source, source.module()?)))
}

fn names(path: &[String]) -> Vec<&str> {
    path.iter().map(String::as_str).collect()
}

/// Each part is tried alone, and parts that must agree meet in a stage and nowhere else.
pub(crate) fn layers(sources: &[Source]) -> Vec<String> {
    let row = |part: &str| LAYERS.iter().position(|row| row.contains(&part));
    let mut complaints = Vec::new();
    for (source, module) in library(sources) {
        let Some(part) = module.first() else { continue };
        let Some(own) = row(part) else {
            complaints.push(format!("{} has no place in the layers", source.path));
            continue;
        };
        for path in source.paths() {
            let ["crate", other, ..] = names(path)[..] else {
                continue;
            };
            // What lib.rs gives another name to.
            let other = match other {
                "Reason" | "Refusal" => "refusal",
                "Ending" => "ending",
                "Secret" => "secret",
                other => other,
            };
            let below = row(other).is_some_and(|row| row > own);
            if other != *part && !below && !NEIGHBOURS.contains(&(part, other)) {
                complaints.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    complaints
}

/// A stage proves what came before it and knows nothing of what comes. Three rooms stand beside
/// the stages: `client`, which proves nothing, so every stage may name it and it names none;
/// `cancelling`, the fork without a
/// token, which holds an `Accepted` and is made by `started` alone; and `authority`, what a
/// spliced session's life hangs on, which names no stage and is for `spliced` alone.
pub(crate) fn stages_in_order(sources: &[Source]) -> Vec<String> {
    let place = |room: &str| STAGES.iter().position(|(file, ..)| *file == room);
    let home = |name: &str| {
        let stage = STAGES.iter().find(|(_, stage, _)| *stage == name);
        match name {
            "Client" => Some("client"),
            "Cancelling" => Some("cancelling"),
            "Opened" => Some("started"),
            _ => stage.map(|(file, ..)| *file),
        }
    };
    let mut complaints = Vec::new();
    for (source, module) in library(sources) {
        let ["session", room] = module[..] else {
            continue;
        };
        if place(room).is_none() && !SIDE_ROOMS.contains(&room) {
            complaints.push(format!("{} is neither a stage nor a side room", source.path));
        }
        for path in source.paths() {
            let ["crate", "session", other, ..] = names(path)[..] else {
                continue;
            };
            let other = home(other).unwrap_or(other);
            let allowed = match (room, other) {
                (room, other) if room == other => true,
                ("client" | "authority", _) => false,
                (_, "client") => true,
                ("cancelling", other) => other == "accepted",
                (room, "cancelling") => room == "started",
                (room, "authority") => room == "spliced",
                (room, other) => place(other).zip(place(room)).is_some_and(|(o, r)| o < r),
            };
            if !allowed {
                complaints.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    complaints
}

/// What a stage proves is as true as its only constructor.
pub(crate) fn one_constructor(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (file, stage, constructor) in STAGES {
        let path = format!("src/session/{file}.rs");
        let Some(source) = sources.iter().find(|source| source.path == path) else {
            complaints.push(format!("{path} is not there"));
            continue;
        };
        let code = source.code();
        let squeezed = source.squeezed();
        if !code.contains(constructor) {
            complaints.push(format!("{path} has no `{constructor}`"));
        }
        let makes = |text: &str| squeezed.matches(text).count();
        let made = makes(&format!("->{stage}<"))
            + makes(&format!("->Result<{stage}<"))
            + makes("->Self")
            + makes("->Result<Self")
            + makes("->Result<Opened<");
        if made != 1 {
            complaints.push(format!("{path} makes a {stage} in {made} functions"));
        }
        let derived = format!("#[derive(Debug)]pub struct {stage}<'c>{{");
        if makes(&derived) != 1 || makes(&format!("pub struct {stage}<")) != 1 {
            complaints.push(format!("{path}: {stage} may derive Debug and nothing else"));
        }
        if squeezed.contains(&format!("for {stage}<")) {
            complaints.push(format!("{path}: {stage} implements a trait"));
        }
        let fields = squeezed.split_once(&derived).and_then(|(_, rest)| rest.split_once('}'));
        if fields.is_none_or(|(fields, _)| fields.contains("pub")) {
            complaints.push(format!("{path}: a field of {stage} is not private"));
        }
    }
    complaints
}

/// One place dials, one leases, one logs in, one verifies, one welcomes: what stands before it
/// in the chain then stands before every session. The pool does the first three once more, for a
/// route that a session had.
pub(crate) fn called_once(sources: &[Source]) -> Vec<String> {
    const CALLS: [(&str, &[&str]); 11] = [
        ("backend::dial(", &["src/pool.rs", "src/session/leased.rs"]),
        ("lessor.lease(", &["src/pool.rs", "src/session/leased.rs"]),
        (".log_in(", &["src/pool.rs", "src/session/attached.rs"]),
        ("pool.take(", &["src/session/leased.rs"]),
        ("Route{", &["src/route.rs"]),
        (".identify(", &["src/session/identified/proofs.rs"]),
        // Once more when the issuer's keys were looked at again.
        (".verify(", &["src/token.rs", "src/token.rs"]),
        ("Credential{", &["src/lease.rs"]),
        ("authentication_ok(", &["src/session/attached.rs"]),
        ("ask_password(", &["src/session/identified.rs"]),
        (".send_last(", &["src/session.rs", "src/splice.rs"]),
    ];
    // Declarations, and what is called the same: pgsilo's own login to OpenBAO.
    const NOT_MEANT: [&str; 10] = [
        "struct Credential{",
        "impl Credential{",
        "&Credential{",
        "struct Route{",
        "impl Route{",
        "for Route{",
        "let Route{",
        "fn authentication_ok(",
        "fn ask_password(",
        "self.log_in(",
    ];
    let mut complaints = Vec::new();
    for (call, places) in CALLS {
        let mut found = Vec::new();
        for (source, _) in library(sources) {
            let mut squeezed = source.squeezed().to_owned();
            for other in NOT_MEANT {
                squeezed = squeezed.replace(other, "");
            }
            found.extend(squeezed.matches(call).map(|_| source.path.as_str()));
        }
        if found != places {
            complaints.push(format!("`{call}` is in {found:?}, not in {places:?}"));
        }
    }
    complaints
}

/// One place refuses: whoever reads `session.rs` has seen every way to be turned away.
pub(crate) fn refuses_once(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (source, module) in library(sources) {
        if module == ["session"] {
            let squeezed = source.squeezed();
            let declared = squeezed.matches("}async fn refuse(").count();
            let words = squeezed.split(|c: char| !c.is_alphanumeric() && c != '_');
            let named = words.filter(|word| *word == "refuse").count();
            if (declared, named) != (1, 2) {
                complaints.push(format!("{} names refuse {named} times", source.path));
            }
        } else if source.paths().iter().any(|path| names(path) == ["crate", "session", "refuse"]) {
            complaints.push(format!("{} refuses", source.path));
        }
    }
    complaints
}

/// Purpose, invariant, caller at the top; tests at the bottom, and nothing behind them.
pub(crate) fn files_are_in_shape(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        if !source.text.starts_with("//! ") {
            complaints.push(format!("{} does not say what it is for", source.path));
        }
        let code = blank(&source.text);
        let Some(at) = tests_begin(&code) else {
            continue;
        };
        let tests = &code[at..];
        let end = match (tests.find('{'), tests.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|semicolon| open < semicolon) => {
                let mut depth = 0;
                tests.char_indices().skip_while(|(at, _)| *at < open).find_map(|(at, c)| {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    (depth == 0).then_some(at + 1)
                })
            }
            (_, semicolon) => semicolon.map(|at| at + 1),
        };
        if end.is_none_or(|end| !tests[end..].trim().is_empty()) {
            complaints.push(format!("{}: something stands behind the tests", source.path));
        }
    }
    complaints
}

/// A metric without a description is one that nobody decided on.
pub(crate) fn metrics_are_described(sources: &[Source]) -> Vec<String> {
    let described: BTreeSet<_> = described(sources).into_iter().map(|metric| metric.name).collect();
    let mut used = BTreeSet::new();
    for (source, _) in library(sources) {
        let text = without_comments(&source.text);
        let without_descriptions = text.split("describe_");
        for part in without_descriptions.enumerate().map(|(index, part)| match index {
            0 => part,
            // The rest of a description: from its end on.
            _ => part.split_once(");").map_or("", |(_, rest)| rest),
        }) {
            let names = part.split('"').filter(|text| text.starts_with("pgsilo_"));
            used.extend(names.map(str::to_owned));
        }
    }
    let mut complaints = Vec::new();
    for name in used.difference(&described) {
        complaints.push(format!("{name} is not described"));
    }
    for name in described.difference(&used) {
        complaints.push(format!("{name} is described and not used"));
    }
    complaints
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect()
}

/// A metric, as `src/admin/metrics.rs` describes it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) text: String,
}

pub(crate) fn described(sources: &[Source]) -> Vec<Metric> {
    let source = sources.iter().find(|source| source.path == "src/admin/metrics.rs");
    let text = source.map_or(String::new(), |source| without_comments(&source.text));
    let calls = text.split("describe_").skip(1).filter_map(|call| {
        let (kind, rest) = call.split_once("!(")?;
        if !["counter", "gauge", "histogram"].contains(&kind) {
            return None; // an import
        }
        let mut literals = rest.split('"').skip(1).step_by(2);
        Some(Metric {
            name: literals.next()?.to_owned(),
            kind: kind.to_owned(),
            text: literals.next()?.to_owned(),
        })
    });
    calls.collect()
}
