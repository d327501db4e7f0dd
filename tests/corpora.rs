//! Replays the fuzz targets' corpora: what a fuzzer once learned is tried in every test run.

#![expect(clippy::expect_used, reason = "what a test needs may panic")]

use std::fs;
use std::path::Path;

#[path = "../fuzz/targets.rs"]
mod targets;

/// A folder with fewer files than this was not checked out, or not filled.
const LEAST: usize = 15;

/// Runs a target over each file of its corpus, and over each with its end cut off.
#[expect(clippy::print_stdout, reason = "shown when a target panics")]
fn replay(corpus: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(corpus);
    let mut replayed = 0;
    for entry in fs::read_dir(&folder).expect("a corpus") {
        let path = entry.expect("a file of the corpus").path();
        let bytes = fs::read(&path).expect("a file of the corpus");
        println!("{}, {} bytes", path.display(), bytes.len());
        target(&bytes);
        for cut in [1, 2, 5] {
            target(&bytes[..bytes.len().saturating_sub(cut)]);
        }
        replayed += 1;
    }
    assert!(replayed >= LEAST, "{corpus}: only {replayed} files");
}

#[test]
fn every_first_packet_of_the_corpus_is_read_or_refused() {
    replay("startup", targets::startup);
}

#[test]
fn every_message_of_a_database_in_the_corpus_is_read_or_refused() {
    replay("backend_messages", targets::backend_messages);
}

#[test]
fn every_token_of_the_corpus_is_verified_or_rejected() {
    replay("token", targets::token);
}

#[test]
fn every_stream_of_the_corpus_is_counted_the_same_however_it_is_cut() {
    replay("frame_counter", targets::frame_counter);
}

#[test]
fn every_response_of_the_corpus_is_read_or_refused() {
    replay("sasl", targets::sasl);
}

#[test]
fn every_header_of_the_corpus_is_read_or_refused() {
    replay("balancer", targets::balancer);
}

/// The seeds named for what is good are good: the corpus tries more than the refusals.
#[test]
fn the_good_tokens_of_the_corpus_are_verified_and_the_others_are_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/token");
    let mut good = 0;
    for entry in fs::read_dir(folder).expect("a corpus") {
        let path = entry.expect("a file of the corpus").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let bytes = fs::read(&path).expect("a file of the corpus");
        let expected = name.starts_with("good") || GOOD.contains(&name.as_str());
        assert_eq!(targets::is_verified(&bytes), expected, "{name}");
        good += usize::from(expected);
    }
    assert!(good > 4, "only {good} good tokens");
}

/// Unusual, and right.
const GOOD: [&str; 2] = ["expired_within_leeway", "expires_fraction"];
