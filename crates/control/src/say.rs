//! The ways to speak with a person: results on stdout, progress and questions on stderr, answers on stdin.
//!
//! A closed pipe is no reason to fail or to panic: a reader that stopped has stopped caring,
//! and what runs must still be stopped in order.

#![expect(clippy::disallowed_methods, reason = "a program's streams")]

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

/// One result, on stdout.
pub fn result(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", plain(text)).and_then(|()| stdout.flush());
}

/// Data that somebody keeps, on stdout: half of it would be taken for all.
///
/// # Errors
/// When it cannot be written in full.
pub fn data(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", plain(text))?;
    stdout.flush()
}

/// Rows below the names of their columns, on stdout, as wide as their widest.
///
/// # Errors
/// See [`data`].
pub fn table<const N: usize>(columns: [&str; N], rows: &[[String; N]]) -> std::io::Result<()> {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default().max(columns[column].len())
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    data(&line(columns.map(str::to_uppercase).each_ref().map(String::as_str)))?;
    rows.iter().try_for_each(|row| data(&line(row.each_ref().map(String::as_str))))
}

/// One line of progress, on stderr.
pub fn progress(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", plain(text));
}

/// The answer to a question, without the white space around it; `None` where nobody can be asked.
///
/// # Errors
/// When it cannot be read.
pub fn ask(question: &str) -> std::io::Result<Option<String>> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Ok(None);
    }
    progress(question);
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    Ok(Some(line.trim().to_owned()))
}

/// Without what would move a terminal's cursor or change its colours: texts of servers are among
/// it, and servers are not trusted.
fn plain(text: &str) -> String {
    let shown = |c: char| !c.is_control() || c == '\n' || c == '\t';
    text.chars().map(|c| if shown(c) { c } else { '\u{fffd}' }).collect()
}

/// A step that is done, and how long it took.
pub fn step(text: &str, took: Duration) {
    progress(&format!("  {text} ... {:.1} s", took.as_secs_f64()));
}
