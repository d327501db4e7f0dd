//! What a careless operator does: each is one clear line and a documented exit code.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::{Settings, folder, write_files};

fn run(command: &str, dir: &Path) -> Output {
    Command::new(programs::pgsilo())
        .arg(command)
        .arg("--config")
        .arg(dir.join("pgsilo.toml"))
        .output()
        .expect("pgsilo runs")
}

/// Runs a command that fails; the one line that it says.
fn fails(command: &str, dir: &Path, code: i32) -> String {
    let output = run(command, dir);
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(code), "{said}");
    let lines: Vec<_> = said.lines().filter(|line| !line.starts_with('{')).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    lines[0].to_owned()
}

fn prepared() -> std::path::PathBuf {
    let dir = folder();
    write_files(&dir, &Settings::default());
    dir
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).expect("read");
    assert!(text.contains(from), "{from:?} is not in {text}");
    fs::write(path, text.replacen(from, to, 1)).expect("written");
}

#[tokio::test]
async fn check_says_ok_of_a_good_configuration() {
    let dir = prepared();
    let output = run("check", &dir);
    let said = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.ends_with(": ok, listeners: 2, tenants: 2\n"), "{said}");
}

#[tokio::test]
async fn mistakes_in_files_name_file_line_and_field() {
    let cases: [(&str, &str, &str, &[&str]); 6] = [
        (
            "pgsilo.toml",
            "[admin]\naddress",
            "[admin]\nadress",
            &["pgsilo.toml:", "admin", "adress", "address"],
        ),
        (
            "pgsilo.toml",
            "server.key",
            "no-such.key",
            &["pgsilo.toml:", "no-such.key", "No such file"],
        ),
        (
            "pgsilo.toml",
            "[openbao]",
            "[openbao]\nclient_certificate = { certificate = \"server.crt\", key = \"tenants.toml\" }",
            &["pgsilo.toml:", "openbao.client_certificate.key: ", "no private key"],
        ),
        ("pgsilo.toml", "[\"ES256\"]", "[\"HS256\"]", &["pgsilo.toml:", "HS256"]),
        ("tenants.toml", "id = \"globex\"", "id = \"acme\"", &["tenants.toml:", "acme"]),
        (
            "tenants.toml",
            "id = \"acme\"",
            "id = \"Acme!\"",
            &["tenants.toml:", "tenant[0].id", "Acme!"],
        ),
    ];
    for (file, from, to, expected) in cases {
        let dir = prepared();
        edit(&dir.join(file), from, to);
        for command in ["check", "serve"] {
            let line = fails(command, &dir, 3);
            for part in expected {
                assert!(line.contains(part), "{part:?} is not in {line:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_missing_configuration_file() {
    let line = fails("serve", &folder(), 3);
    assert!(line.contains("pgsilo.toml") && line.contains("No such file"), "{line}");
}

#[tokio::test]
async fn an_unreadable_key() {
    let dir = prepared();
    fs::write(dir.join("server.key"), "-----BEGIN NONSENSE-----\n").expect("written");
    let line = fails("check", &dir, 3);
    assert!(line.contains("server.key"), "{line}");
}

#[tokio::test]
async fn a_port_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("an address").to_string();
    let dir = prepared();
    edit(&dir.join("pgsilo.toml"), "127.0.0.1:0", &address);
    let line = fails("serve", &dir, 4);
    assert!(line.contains(&address) && line.contains("another process has it"), "{line}");
}

#[tokio::test]
async fn a_socket_in_use_and_one_that_is_left_over() {
    let dir = prepared();
    let socket = dir.join(".s.PGSQL.6432");
    let living = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
    let line = fails("serve", &dir, 4);
    assert!(line.contains("another process has it"), "{line}");
    drop(living);
    assert!(socket.exists(), "the file stays when its listener dies");
    // Now it is left over, and is replaced: the next complaint is the port's.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("an address").to_string();
    edit(
        &dir.join("pgsilo.toml"),
        "[admin]\naddress = \"127.0.0.1:0\"",
        &format!("[admin]\naddress = \"{address}\""),
    );
    assert!(fails("serve", &dir, 4).contains(&address));
}

#[tokio::test]
async fn usage_errors_have_their_own_exit_code() {
    for arguments in [&["serve", "--no-such-flag"][..], &["nonsense"], &[]] {
        let output = Command::new(programs::pgsilo()).args(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    let help = Command::new(programs::pgsilo()).arg("--help").output().expect("runs");
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes"));
}

#[tokio::test]
async fn an_unwritable_log_ends_no_session() {
    let dir = prepared();
    let socket = dir.join(".s.PGSQL.6432");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("opened");
    let mut pgsilo = Command::new(programs::pgsilo())
        .args(["serve", "--config"])
        .arg(dir.join("pgsilo.toml"))
        .stderr(full)
        .spawn()
        .expect("pgsilo starts");
    let token = pgsilo_sandbox::testing::mint::token("acme");
    let mut config = tokio_postgres::Config::new();
    config.host_path(&dir).port(6432).user("app").password(&token).dbname("acme");
    let client = pgsilo_sandbox::testing::eventually("a session", async || {
        assert!(pgsilo.try_wait().expect("waited").is_none(), "it has ended");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    })
    .await;
    client.simple_query("SELECT 1").await.expect("served");
    drop(client);
    let pid = rustix::process::Pid::from_raw(pgsilo.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told");
    assert_eq!(pgsilo.wait().expect("ended").code(), Some(0));
    assert!(!socket.exists());
}
