//! Documents that describe a table of the code, compared with it row by row.

use std::fs;
use std::path::Path;

use pgsilo::metrics::descriptions;
use pgsilo::{Ending, Reason};

use crate::rules::map;
use crate::source::files;

fn document(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path)
}

/// The rows of the first table under a heading, without the code marks.
fn table(text: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).expect("the heading");
    let lines = section.lines().skip_while(|line| !line.starts_with('|'));
    let rows = lines.take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let cells = row.trim_matches('|').split(" | ");
        cells.map(|cell| cell.trim().replace('`', "")).collect()
    })
    .collect()
}

#[test]
fn the_document_of_refusals_is_the_table_of_refusals() {
    let rows = table(&document("docs/refusals.md"), "Refusals");
    assert_eq!(rows.len(), Reason::ALL.len(), "a row for each reason");
    for (reason, row) in Reason::ALL.iter().zip(rows) {
        let text = reason.text().replace("{}", "…");
        let level = reason.level().to_string().to_lowercase();
        let expected = [reason.label(), reason.sqlstate(), level.as_str(), text.as_str()];
        assert_eq!(row[..4], expected, "{reason:?}");
        assert!(row[4].len() > 10, "{reason:?}: say when, and what to do");
    }
}

#[test]
fn the_document_of_refusals_has_every_ending() {
    let rows = table(&document("docs/refusals.md"), "Endings");
    assert_eq!(rows.len(), Ending::ALL.len(), "a row for each ending");
    for (ending, row) in Ending::ALL.iter().zip(rows) {
        let (sqlstate, text) = ending.told().unwrap_or(("", ""));
        let level = ending.level().to_string().to_lowercase();
        let expected = [ending.label(), sqlstate, level.as_str(), text];
        assert_eq!(row[..4], expected, "{ending:?}");
        assert!(row[4].len() > 10, "{ending:?}: say when");
    }
}

#[test]
fn the_document_of_metrics_is_the_table_of_metrics() {
    let rows = table(&document("docs/metrics.md"), "Metrics");
    let metrics = descriptions();
    assert_eq!(rows.len(), metrics.len(), "a row for each metric");
    for (metric, row) in metrics.iter().zip(rows) {
        let name = metric.name;
        assert_eq!([&row[0], &row[1], &row[3]], [name, metric.kind, metric.text]);
        let labels: Vec<&str> = row[2].split("; ").filter(|label| !label.is_empty()).collect();
        assert_eq!(labels.len(), metric.labels.len(), "{name}: {labels:?}");
        for (label, (known, values)) in labels.iter().zip(&metric.labels) {
            let (label, listed) = label.split_once(": ").unwrap_or((label, ""));
            assert_eq!(label, *known, "{name}");
            let listed: Vec<&str> = listed.split(", ").collect();
            // Those of refusals and endings have a page of their own; a histogram has what it was
            // given.
            match metric.kind {
                _ if values.is_empty() || listed == [""] => {}
                "counter" => assert_eq!(listed, *values, "{name}"),
                _ => assert!(listed.iter().all(|value| values.contains(value)), "{name}"),
            }
        }
    }
}

#[test]
fn the_map_of_the_layers_is_the_same_in_both_places() {
    let architecture = document("ARCHITECTURE.md");
    let map = map().join("\n");
    assert!(architecture.contains(&format!("```\n{map}\n```")), "{map}");
}

#[test]
fn the_promises_name_tests_that_are_there() {
    let promises = document("docs/promises.md");
    let files = files(&["src", "tests", "crates"]);
    let named = promises.split('`').skip(1).step_by(2);
    let mut tests = 0;
    for name in
        named.filter(|name| name.matches('_').count() > 2 && !name.contains(['/', '.', ' ']))
    {
        let written = [format!("fn {name}("), format!(" {name}:")];
        assert!(
            files.iter().any(|(_, file)| written.iter().any(|text| file.contains(text))),
            "docs/promises.md names the test {name}, which is not there"
        );
        tests += 1;
    }
    assert!(tests > 10, "the promises name {tests} tests");
}

/// Values of a label in an alert's expression: `reason="a"`, `reason=~"a|b"`.
fn values<'a>(alert: &'a str, label: &str) -> Vec<&'a str> {
    let label = format!("{label}=");
    let marked = alert.match_indices(&label).map(|(at, label)| &alert[at + label.len()..]);
    let quoted =
        marked.filter_map(|rest| rest.trim_start_matches('~').strip_prefix('"')?.split('"').next());
    quoted.flat_map(|values| values.split('|')).collect()
}

#[test]
fn alerts_name_existing_metrics_and_cover_every_error() {
    let (alerts, runbooks) = (document("config/alerts.yml"), document("docs/runbooks.md"));
    let metrics = descriptions();
    let mut reasons = Vec::new();
    let rules: Vec<&str> = alerts.split("- alert: ").skip(1).collect();
    assert!(rules.len() > 20, "{}", rules.len());
    for rule in rules {
        let (name, rest) = rule.split_once('\n').expect("a name");
        assert!(runbooks.contains(&format!("\n### {name}\n")), "{name} has no runbook");
        let expression = rest.lines().find(|line| line.contains("expr: ")).expect("an expression");
        let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for metric in words.filter(|word| word.starts_with("pgsilo_")) {
            let metric = metric.trim_end_matches("_bucket");
            assert!(metrics.iter().any(|known| known.name == metric), "{name}: {metric}");
        }
        for ending in values(expression, "ending") {
            assert!(Ending::ALL.iter().any(|known| known.label() == ending), "{name}: {ending}");
        }
        reasons.extend(values(expression, "reason"));
    }
    for reason in &reasons {
        assert!(Reason::ALL.iter().any(|known| known.label() == *reason), "{reason}");
    }
    for reason in Reason::ALL {
        let is_error = reason.level().to_string() == "ERROR";
        assert!(!is_error || reasons.contains(&reason.label()), "no alert for {}", reason.label());
    }
    for title in runbooks.split("\n### ").skip(1).filter_map(|rest| rest.lines().next()) {
        assert!(alerts.contains(&format!("- alert: {title}\n")), "no alert {title}");
    }
}

/// A heading as it is linked to: in lower case, words joined by dashes, all else left out.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_of_the_documents_have_targets() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).expect("docs");
    let mut pages: Vec<String> =
        docs.map(|page| format!("docs/{}", page.expect("a page").file_name().display())).collect();
    pages.retain(|page| page.ends_with(".md"));
    pages.extend(
        ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md"].map(str::to_owned),
    );
    let mut links = 0;
    for page in pages {
        let text = document(&page);
        let folder = root.join(&page).parent().expect("a folder").to_owned();
        for rest in text.split("](").skip(1) {
            let link = rest.split(')').next().expect("a link");
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { root.join(&page) } else { folder.join(file) };
            assert!(target.exists(), "{page}: {link}");
            links += 1;
            if !heading.is_empty() {
                let target = fs::read_to_string(&target).expect("a page");
                let mut headings = target.lines().filter(|line| line.starts_with('#'));
                let found =
                    headings.any(|line| anchor(line.trim_start_matches('#').trim()) == heading);
                assert!(found, "{page}: {link}");
            }
        }
    }
    assert!(links > 50, "{links}");
}
