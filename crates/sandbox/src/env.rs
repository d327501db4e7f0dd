//! `env`: what a shell needs to know about a running sandbox, as a file it can source.
//!
//! The file is there exactly while everything it names is ready. DSNs are URIs whose parts are
//! percent-encoded, values are quoted for `sh`, so both are safe whatever a path holds.

use std::fmt::Write;
use std::path::Path;

/// Names and values, in the order of the file.
#[derive(Debug, Default)]
pub(super) struct Env(Vec<(String, String)>);

impl Env {
    pub(super) fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    /// `export NAME='value'` lines.
    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.0 {
            let _ = writeln!(text, "export {name}={}", quote(value));
        }
        text
    }
}

/// One word for `sh`, in single quotes.
pub(super) fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// A word for `sh` without quotes where it needs none.
pub(super) fn quote_if_needed(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) { value.to_owned() } else { quote(value) }
}

/// The DSN of a TCP listener, its certificate checked against `ca`.
pub(super) fn tls_dsn(token: &str, port: u16, database: &str, ca: &Path) -> String {
    format!(
        "postgresql://app:{}@127.0.0.1:{port}/{}?sslmode=verify-full&sslrootcert={}",
        encode(token),
        encode(database),
        encode_path(ca)
    )
}

/// The DSN of a Unix socket in `dir`.
pub(super) fn socket_dsn(token: &str, port: u16, database: &str, dir: &Path) -> String {
    format!(
        "postgresql://app:{}@/{}?host={}&port={port}",
        encode(token),
        encode(database),
        encode_path(dir)
    )
}

/// A path as a query's value, where `/` may stay as it is.
fn encode_path(path: &Path) -> String {
    encode(&path.to_string_lossy()).replace("%2F", "/")
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_shell() {
        let mut env = Env::default();
        let hostile = "it's $HOME `x` \"q\" \\ \n end";
        env.set("A", hostile);
        env.set("B", "");
        let script = format!("{}printf '%s|%s' \"$A\" \"$B\"", env.render());
        let shell = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), format!("{hostile}|"));
    }

    #[test]
    fn only_plain_words_go_unquoted() {
        assert_eq!(quote_if_needed("/usr/bin/psql"), "/usr/bin/psql");
        assert_eq!(quote_if_needed("/a b/psql"), "'/a b/psql'");
        assert_eq!(quote_if_needed("~x"), "'~x'");
        assert_eq!(quote_if_needed(""), "''");
    }

    #[test]
    fn a_dsn_is_encoded_and_reads_back_the_same() {
        let tls = tls_dsn("a.b-c_d", 6432, "acme", Path::new("/a b/ca&1.crt"));
        assert_eq!(
            tls,
            "postgresql://app:a.b-c_d@127.0.0.1:6432/acme?sslmode=verify-full&sslrootcert=/a%20b/ca%261.crt"
        );
        let socket = socket_dsn("t%k@n", 6432, "acme", Path::new("/tmp/pg silo"));
        assert_eq!(socket, "postgresql://app:t%25k%40n@/acme?host=/tmp/pg%20silo&port=6432");
        let read: tokio_postgres::Config = socket.parse().unwrap();
        assert_eq!(read.get_password(), Some(b"t%k@n".as_slice()));
        let hosts = [tokio_postgres::config::Host::Unix("/tmp/pg silo".into())];
        assert_eq!(read.get_hosts(), hosts);
    }
}
