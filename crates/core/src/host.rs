//! Whether a host is this machine: what may be asked over http, and nothing else may. One rule
//! for every server that pgsilo asks.

use std::net::IpAddr;

/// By name only where the name cannot mean another.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "localhost.", "localhost.example", "127.0.0.1.example", "10.0.0.1", "[::]"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
