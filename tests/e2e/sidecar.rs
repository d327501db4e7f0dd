//! A sidecar: the application shows nothing, pgsilo has the token itself.

use std::fs;

use pgsilo_sandbox::testing::proxy::{Proxy, Settings};
use pgsilo_sandbox::testing::raw::{Raw, startup};
use pgsilo_sandbox::testing::{eventually, mint};
use rustix::process::Signal;
use serde_json::json;
use tokio_postgres::NoTls;

/// A socket whose sessions are those of a token in a file.
pub(crate) async fn with_file(token: &str, more: &str) -> Proxy {
    let listeners = format!(
        "[[listener]]\nsocket = \"{{dir}}/.s.PGSQL.6432\"\nauth = {{ token_file = \"token\" }}\n{more}"
    );
    let files = vec![("token", token.to_owned())];
    Proxy::with(Settings { listeners, files, ..Settings::default() }).await
}

/// Connects as an application without any password does.
async fn connect(proxy: &Proxy) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    connect_to(proxy, "app").await
}

/// The same of one that names a database.
async fn connect_to(
    proxy: &Proxy,
    dbname: &str,
) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(proxy.dir()).port(6432).user("app").dbname(dbname);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn database(client: &tokio_postgres::Client) -> String {
    client.query_one("SELECT current_database()", &[]).await.expect("a row").get(0)
}

fn state(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("", |code| code.code())
}

#[tokio::test]
async fn an_application_needs_no_password_and_a_token_that_is_renewed_no_restart() {
    let proxy = with_file(&format!("{}\n", mint::token("acme")), "").await;
    let first = connect(&proxy).await.expect("connected");
    assert_eq!(database(&first).await, "tenant_acme");
    // As Kubernetes does it: a new file, renamed over.
    let renewed = proxy.dir().join("renewed");
    fs::write(&renewed, mint::token("globex")).expect("written");
    fs::rename(&renewed, proxy.dir().join("token")).expect("renamed");
    assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_globex");
    assert_eq!(database(&first).await, "tenant_acme");
    // It is verified like any other.
    let old =
        json!({ "exp": mint::now() - 3600, "nbf": mint::now() - 7200, "iat": mint::now() - 7200 });
    fs::write(proxy.dir().join("token"), mint::token_with("acme", old)).expect("written");
    assert_eq!(state(&connect(&proxy).await.expect_err("expired")), "28P01");
    fs::remove_file(proxy.dir().join("token")).expect("removed");
    assert_eq!(state(&connect(&proxy).await.expect_err("not there")), "57P03");
    let event = proxy.event("refused", |event| event["reason"] == "token_unavailable").await;
    assert!(event["cause"].as_str().expect("a cause").starts_with("cannot read the token file"));
}

#[tokio::test]
async fn a_missing_token_file_does_not_prevent_the_start() {
    let listeners =
        "[[listener]]\nsocket = \"{dir}/.s.PGSQL.6432\"\nauth = { token_file = \"token\" }\n";
    let settings = Settings { listeners: listeners.to_owned(), ..Settings::default() };
    let proxy = Proxy::with(settings).await;
    let says = |words: &str| {
        let words = words.to_owned();
        proxy.logged(move |line| line["message"].as_str().is_some_and(|said| said.contains(&words)))
    };
    assert_eq!(says("is not there: sessions are refused until it is").await["level"], "WARN");
    assert_eq!(state(&connect(&proxy).await.expect_err("no token")), "57P03");
    assert_eq!(proxy.event("refused", |_| true).await["reason"], "token_unavailable");
    fs::write(proxy.dir().join("token"), mint::token("acme")).expect("written");
    assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_acme");
}

#[tokio::test]
async fn a_command_prints_the_token_and_is_run_again_when_it_was_refused() {
    let dir = std::env::temp_dir().join(format!("pgsilo-e2e-exec-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    let (token, runs) = (dir.join("token"), dir.join("runs"));
    fs::write(&token, mint::token("acme")).expect("written");
    let listeners = format!(
        "[[listener]]\nsocket = \"{{dir}}/.s.PGSQL.6432\"\n\
         auth = {{ exec = {{ command = [\"sh\", \"-c\", \"echo run >> {}; cat {}\"], refresh = \"1h\" }} }}\n",
        runs.display(),
        token.display()
    );
    let settings = Settings { listeners, ..Settings::default() };
    let proxy = Proxy::with(settings.clone()).await;
    for _ in 0..3 {
        assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_acme");
    }
    let lines = || fs::read_to_string(&runs).expect("read").lines().count();
    assert_eq!(lines(), 1, "once for all of them");
    // What it printed is refused: the next login runs it again.
    proxy.reload(&proxy.tenants().replacen("id = \"acme\"", "id = \"other\"", 1));
    proxy.metric_reaches("pgsilo_registry_reloads_total{result=\"ok\"}", 1.0).await;
    assert_eq!(state(&connect(&proxy).await.expect_err("acme is unknown")), "3D000");
    assert_eq!(lines(), 1, "that is not the token's fault");
    drop(proxy);

    fs::write(&token, mint::token_with("globex", json!({ "aud": "others" }))).expect("written");
    let proxy = Proxy::with(settings.clone()).await;
    assert_eq!(state(&connect(&proxy).await.expect_err("of another audience")), "28P01");
    fs::write(&token, mint::token("globex")).expect("written");
    assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_globex");
    assert_eq!(lines(), 3, "once for each token");
    drop(proxy);

    // However many wait for one that fails, it runs once.
    fs::remove_file(&token).expect("removed");
    let proxy = Proxy::with(settings).await;
    for outcome in futures_util::future::join_all((0..8).map(|_| connect(&proxy))).await {
        assert_eq!(state(&outcome.expect_err("no token")), "57P03");
    }
    assert_eq!(lines(), 4);
    fs::remove_dir_all(&dir).expect("removed");
}

/// Whether a process runs, or was not buried, whose command line has a marker.
fn running(marker: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("processes");
    processes.flatten().any(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(marker)
    })
}

/// The children that a process has not buried.
fn children(of: u32) -> String {
    let threads = fs::read_dir(format!("/proc/{of}/task")).expect("threads");
    let children =
        threads.flatten().map(|thread| fs::read_to_string(thread.path().join("children")));
    children.map(Result::unwrap_or_default).collect::<String>().trim().to_owned()
}

/// A command that hangs, and one beside it that it has started.
async fn hanging(marker: &str, limits: &str) -> Proxy {
    let script = format!("sleep {marker} & sleep {marker}; echo never");
    let listeners = format!(
        "[[listener]]\nsocket = \"{{dir}}/.s.PGSQL.6432\"\n\
         auth = {{ exec = {{ command = [\"sh\", \"-c\", \"{script}\"], refresh = \"1h\" }} }}\n"
    );
    let limits = format!("drain_timeout = \"2s\"\n{limits}");
    Proxy::with(Settings { listeners, limits, ..Settings::default() }).await
}

#[tokio::test]
async fn a_command_and_what_it_has_started_end_with_the_login_that_waits_for_them() {
    // A command line of our own, on a machine that may run several of these tests.
    let marker = format!("{}.25", 500_000 + std::process::id());
    let gone = async |proxy: &Proxy| {
        eventually("the command's processes to be gone", async || {
            (!running(&marker) && children(proxy.pid()).is_empty()).then_some(())
        })
        .await;
    };
    // It takes too long.
    let proxy = hanging(&marker, "").await;
    assert_eq!(state(&connect(&proxy).await.expect_err("late")), "57P03");
    gone(&proxy).await;
    drop(proxy);
    // The login takes too long.
    let proxy = hanging(&marker, "login_timeout = \"500ms\"\n").await;
    assert_eq!(state(&connect(&proxy).await.expect_err("late")), "57014");
    gone(&proxy).await;
    drop(proxy);
    // pgsilo is stopped meanwhile, and told twice.
    let mut proxy = hanging(&marker, "").await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app")])).await;
    eventually("the command to run", async || running(&marker).then_some(())).await;
    proxy.signal(Signal::TERM);
    proxy.logged(|line| line["message"] == "draining").await;
    proxy.signal(Signal::TERM);
    proxy.ended().await;
    eventually("the command's processes to be gone", async || (!running(&marker)).then_some(()))
        .await;
}

/// Six clients and a file of 400 MB in the token's place: each would have held all of it.
#[tokio::test]
async fn a_token_file_is_read_no_further_than_a_token_can_be_long() {
    let proxy = with_file(&mint::token("acme"), "").await;
    assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_acme");
    let most = || {
        let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("read");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    let before = most();
    let file = fs::File::create(proxy.dir().join("token")).expect("created");
    file.set_len(400 << 20).expect("made long");
    let outcomes = futures_util::future::join_all((0..6).map(|_| connect(&proxy))).await;
    let grown = most() - before;
    assert!(grown < 64 << 10, "{grown} KiB more than before");
    for outcome in outcomes {
        assert_eq!(state(&outcome.expect_err("no token")), "57P03");
    }
    let event = proxy.event("refused", |_| true).await;
    let cause = event["cause"].as_str().expect("a cause");
    assert!(cause.contains("longer than such a file may be, 65600 bytes"), "{cause}");
}

#[tokio::test]
async fn an_application_that_cannot_be_told_may_name_any_database() {
    let proxy = with_file(&mint::token("acme"), "").await;
    assert_eq!(state(&connect_to(&proxy, "orders").await.expect_err("refused")), "3D000");
    let proxy = with_file(&mint::token("acme"), "database_names = \"any\"\n").await;
    for name in ["orders", "postgres", "globex"] {
        let client = connect_to(&proxy, name).await.expect("connected");
        assert_eq!(database(&client).await, "tenant_acme", "{name}");
    }
    // That is said once at the start.
    let warned = proxy.logged(|line| line["level"] == "WARN").await.to_string();
    assert!(warned.contains("listener[0].database_names"), "{warned}");
}

#[tokio::test]
async fn only_the_users_that_may_be_there_are_let_in() {
    let me = rustix::process::getuid().as_raw();
    let token = mint::token("acme");
    let proxy = with_file(&token, &format!("allow_uids = [{me}]\n")).await;
    assert_eq!(database(&connect(&proxy).await.expect("connected")).await, "tenant_acme");
    let proxy = with_file(&token, &format!("allow_uids = [{}]\n", me + 1)).await;
    let mut client = Raw::unix(&proxy.socket()).await;
    client.send(&startup(&[("user", "app")])).await;
    let refused = client.fatal().await;
    assert_eq!(refused.field(b'M').as_deref(), Some("peer authentication failed"));
    let event = proxy.event("refused", |_| true).await;
    assert_eq!(event["reason"], "peer_forbidden");
    assert_eq!(event["cause"], format!("user id {me} is not in allow_uids"));
    eventually("nothing to be leased", async || {
        (proxy.metric("pgsilo_leases_total").await == 0.0).then_some(())
    })
    .await;
}
