//! Before pgsilo serves, and what it says then: signals that come too early, bounds that the system
//! does not allow, certificates that are of no use, answers in a coding that was not requested.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use pgsilo_sandbox::testing::acme::is_not_logged_in;
use pgsilo_sandbox::testing::authority::Authority;
use pgsilo_sandbox::testing::bao::Folder;
use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::{Proxy, Settings, TLS, UNIX, write_files};
use pgsilo_sandbox::testing::{fake, mint};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The configuration is a pipe here: it is known when pgsilo begins to read it, and it is not done
/// before somebody writes.
#[test]
fn a_signal_before_the_start_is_over_waits_for_it() {
    let dir = Folder::new();
    write_files(&dir, &Settings::default());
    let config = dir.join("pgsilo.toml");
    let text = fs::read(&config).expect("read");
    fs::remove_file(&config).expect("removed");
    mkfifoat(CWD, &config, Mode::RUSR | Mode::WUSR).expect("a pipe");
    let mut command = Command::new(programs::pgsilo());
    command.arg("serve").arg("--config").arg(&config).stderr(Stdio::piped());
    let mut pgsilo = command.spawn().expect("pgsilo starts");
    let pid = Pid::from_raw(pgsilo.id() as i32).expect("a pid");
    // Returns when the other end is open, too.
    let mut pipe = fs::OpenOptions::new().write(true).open(&config).expect("it is read");
    kill_process(pid, Signal::HUP).expect("it lives");
    pipe.write_all(&text).expect("it lives still");
    drop(pipe);
    let lines = BufReader::new(pgsilo.stderr.take().expect("piped")).lines();
    let mut lines = lines.map_while(Result::ok);
    let says = |line: &String, words: &str| line.contains(words);
    assert!(lines.any(|line| says(&line, "pgsilo serves")), "{:?}", pgsilo.wait());
    assert!(lines.any(|line| says(&line, "registry reloaded")), "the signal is not lost");
    kill_process(pid, Signal::TERM).expect("it lives");
    lines.for_each(drop);
    assert!(pgsilo.wait().expect("waited").success());
}

#[tokio::test]
async fn too_few_descriptors_cause_a_warning() {
    let (before, words) = ("ulimit -n 9000;".to_owned(), "this process may have 9000");
    let limits = "max_sessions = 4000\nmax_handshakes = 100\n".to_owned();
    let settings = Settings { before, limits, ..Settings::default() };
    let proxy = Proxy::with(settings.clone()).await;
    let needs = "need 9100 descriptors";
    let line = proxy.logged(|line| {
        line["message"].as_str().is_some_and(|text| text.contains(needs) && text.contains(words))
    });
    assert_eq!(line.await["level"], "WARN");
    let limits = settings.limits.replace("4000", "3900");
    let proxy = Proxy::with(Settings { limits, ..settings }).await;
    let descriptors =
        |line: &Value| line["message"].as_str().is_some_and(|m| m.contains("descriptors"));
    assert!(!proxy.lines().iter().any(descriptors), "8,900 would do");
}

#[tokio::test]
async fn an_expired_certificate_is_served_with_a_warning_until_renewed() {
    let (authority, hour) = (Authority::new(), Duration::hours(1));
    let now = OffsetDateTime::now_utc();
    let end = now - hour;
    let expired = authority.server_within(now - hour * 2, end);
    let files = vec![("own.crt", expired.certificate), ("own.key", expired.key)];
    let listeners = TLS.replace("server.", "own.") + UNIX;
    let settings = Settings { listeners, files, ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let metric = "pgsilo_certificate_not_after_timestamp_seconds{listener=\"127.0.0.1:0\"}";
    assert_eq!(proxy.metric(metric).await, end.unix_timestamp() as f64);
    let says = async |words: &str| {
        let line = proxy.logged(|line| line.to_string().contains(words)).await;
        assert_eq!(line["level"], "WARN", "{line}");
    };
    says("the certificate has expired").await;
    // A client that does not check it is served.
    let dsn = format!(
        "host=127.0.0.1 port={} user=app dbname=acme sslmode=require",
        proxy.address().port()
    );
    let psql = pgsilo_sandbox::testing::world::world().var("PSQL").to_owned();
    let password = mint::token("acme");
    let served = tokio::process::Command::new(psql)
        .args(["-XAtc", "SELECT current_database()", &dsn])
        .env("PGPASSWORD", password)
        .output();
    let served = served.await.expect("psql runs");
    assert_eq!(String::from_utf8_lossy(&served.stdout).trim(), "tenant_acme", "{served:?}");

    for (begin, end, said) in [
        (now + hour, now + hour * 2, Some("the certificate is not valid yet")),
        (now - hour, now + hour, None),
    ] {
        let renewed = authority.server_within(begin, end);
        fs::write(proxy.dir().join("own.key"), renewed.key).expect("written");
        fs::write(proxy.dir().join("own.crt"), renewed.certificate).expect("written");
        proxy.metric_reaches(metric, end.unix_timestamp() as f64).await;
        if let Some(said) = said {
            says(said).await;
        }
    }
}

/// A server that answers everything in a coding, and what it was asked.
async fn compressing() -> (std::net::SocketAddr, Arc<Mutex<String>>) {
    let asked = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&asked);
    let address = fake::serves(move |mut tcp| {
        let heard = Arc::clone(&heard);
        async move {
            let mut request = vec![0; 4096];
            let length = tcp.read(&mut request).await.unwrap_or(0);
            *heard.lock().expect("heard") += &String::from_utf8_lossy(&request[..length]);
            let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: gzip\r\n\
                Content-Length: 3\r\n\r\n\x1f\x8b\x08";
            let _said = tcp.write_all(answer).await;
        }
    })
    .await;
    (address, asked)
}

#[tokio::test]
async fn uncompressed_answers_are_requested_and_compressed_ones_refused() {
    const CAUSE: &str = "its answer is compressed (gzip), which was not requested";
    let wants_none = |asked: &Mutex<String>| {
        let asked = asked.lock().expect("heard").to_ascii_lowercase();
        assert!(asked.contains("\r\naccept-encoding: identity\r\n"), "{asked}");
    };
    let (address, asked) = compressing().await;
    let openbao =
        format!("address = \"http://{address}\"\nauth = {{ token_file = \"secret-id\" }}\n");
    is_not_logged_in(openbao, CAUSE).await;
    wants_none(&asked);

    let (address, asked) = compressing().await;
    let issuers = format!(
        "[[issuer]]\nissuer = \"https://issuer.example\"\naudience = [\"pgsilo\"]\n\
         algorithms = [\"ES256\"]\njwks_url = \"http://{address}/keys\"\n"
    );
    let proxy = Proxy::unready(Settings { issuers, ..Settings::default() }).await;
    proxy.logged(|line| line["error"].as_str().is_some_and(|text| text.contains(CAUSE))).await;
    wants_none(&asked);
}
