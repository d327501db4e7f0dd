//! Documents that describe a table of the code, compared with it row by row.

use std::fs;
use std::path::Path;

use pgsilo::{Ending, Reason};

use crate::rules::described;
use crate::source::sources;

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

/// The literals of each row of a table in the code: the lines behind `name! {`.
fn literals(path: &str, name: &str) -> Vec<Vec<String>> {
    let text = document(path);
    let (_, rows) = text.split_once(&format!("\n{name}! {{\n")).expect("the table");
    let (rows, _) = rows.split_once("\n}\n").expect("its end");
    let mut found: Vec<Vec<String>> = vec![Vec::new()];
    for line in rows.lines().filter(|line| !line.trim().starts_with("///")) {
        let (mut inside, mut escaped, mut literal) = (false, false, String::new());
        for c in line.chars() {
            match c {
                _ if escaped => {
                    literal.push(c);
                    escaped = false;
                }
                '\\' => escaped = true,
                '"' if inside => {
                    found.last_mut().expect("a row").push(std::mem::take(&mut literal));
                    inside = false;
                }
                '"' => inside = true,
                c if inside => literal.push(c),
                ';' => found.push(Vec::new()),
                _ => {}
            }
        }
    }
    found.retain(|row| !row.is_empty());
    found
}

#[test]
fn the_document_of_refusals_is_the_table_of_refusals() {
    let rows = table(&document("docs/refusals.md"), "Refusals");
    let code = literals("src/refusal.rs", "reasons");
    assert_eq!(code.len(), Reason::ALL.len());
    assert_eq!(rows.len(), Reason::ALL.len(), "a row for each reason");
    for ((reason, code), row) in Reason::ALL.iter().zip(code).zip(rows) {
        let text = code[2].replace("{}", "…");
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
fn the_document_of_metrics_is_what_metrics_describes() {
    let rows = table(&document("docs/metrics.md"), "Metrics");
    let code = described(&sources());
    assert!(code.len() > 15, "{code:?}");
    let documented: Vec<_> =
        rows.iter().map(|row| (row[0].as_str(), row[1].as_str(), row[3].as_str())).collect();
    let described: Vec<_> = code
        .iter()
        .map(|metric| (metric.name.as_str(), metric.kind.as_str(), metric.text.as_str()))
        .collect();
    assert_eq!(documented, described);
}

#[test]
fn the_readme_names_tests_that_are_there() {
    let readme = document("README.md");
    let (_, promises) = readme.split_once("\n## The promises").expect("the promises");
    let mut files = Vec::new();
    let mut folders = vec!["src".to_owned(), "tests".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(&folder)).expect("a folder")
        {
            let entry = entry.expect("an entry");
            let path = format!("{folder}/{}", entry.file_name().display());
            match entry.file_type().expect("a kind").is_dir() {
                true => folders.push(path),
                false if path.ends_with(".rs") => files.push(document(&path)),
                false => {}
            }
        }
    }
    let named = promises.split('`').skip(1).step_by(2);
    let mut tests = 0;
    for name in
        named.filter(|name| name.matches('_').count() > 2 && !name.contains(['/', '.', ' ']))
    {
        let written = [format!("fn {name}("), format!(" {name}:")];
        assert!(
            files.iter().any(|file| written.iter().any(|text| file.contains(text))),
            "README.md names the test {name}, which is not there"
        );
        tests += 1;
    }
    assert!(tests > 10, "the promises name {tests} tests");
}
