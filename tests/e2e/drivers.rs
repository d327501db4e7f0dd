//! Real clients, unchanged, over verified TLS and over the Unix socket: psql, pgbench,
//! tokio-postgres here; psycopg and asyncpg in scripts beside this file.
//!
//! A client that is not there fails its test. `make test-all` adds those that need more than a
//! fresh machine has.

use std::path::{Path, PathBuf};
use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, poll_fn};
use futures_util::{SinkExt, StreamExt, TryStreamExt};
use pgsilo_sandbox::testing::driver::{Transport, all_left, output, passes, python, told};
use pgsilo_sandbox::testing::proxy::Proxy;
use pgsilo_sandbox::testing::raw::{Io, Raw};
use pgsilo_sandbox::testing::world::world;
use pgsilo_sandbox::testing::{mint, ways};
use serde_json::json;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, SimpleQueryMessage};

// --- psql and pgbench --------------------------------------------------------------------

/// Every copy of a PostgreSQL program on this machine, and how it can reach a proxy: the one
/// beside the server always, over the socket at least; another on the PATH where there is one.
async fn copies(name: &str) -> Vec<(PathBuf, Vec<Transport>)> {
    let mut programs = vec![world().pg_program(name)];
    let path = std::env::var_os("PATH").expect("a PATH");
    programs.extend(
        std::env::split_paths(&path)
            .map(|folder| folder.join(name))
            .find(|program| program.is_file()),
    );
    let mut copies = Vec::new();
    for program in programs {
        let mut transports = vec![Transport::Socket];
        if has_tls(&program.with_file_name("psql")).await {
            transports.push(Transport::Tls);
        }
        copies.push((program, transports));
    }
    copies
}

/// A libpq without TLS says so before it looks for the socket, which is not there.
async fn has_tls(psql: &Path) -> bool {
    let dsn = "host=/nonexistent dbname=x user=x sslmode=verify-full";
    let output = output(Command::new(psql).args(["-X", "-w", dsn])).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nonexistent") || said.contains("not compiled in"), "{said}");
    !said.contains("not compiled in")
}

fn dsn(proxy: &Proxy, transport: Transport) -> String {
    let token = mint::token("acme");
    match transport {
        Transport::Tls => proxy.tls_dsn(&token, "acme"),
        Transport::Socket => proxy.socket_dsn(&token, "acme"),
    }
}

/// Runs a program that has to succeed; what it printed.
async fn succeeds(command: &mut Command) -> String {
    let output = output(command).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}\n{said}\n{errors}", command.as_std());
    said
}

#[tokio::test]
async fn psql_runs_a_script() {
    let proxy = Proxy::start().await;
    for (psql, transports) in copies("psql").await {
        for transport in transports {
            let file = proxy.dir().join("copied");
            let _from_the_copy_before = std::fs::remove_file(&file);
            let sql = proxy.dir().join("script.sql");
            let text = format!(
                "\\set ON_ERROR_STOP on\n\
                 \\conninfo\n\
                 SELECT current_database() AS db, current_user AS role \\gset\n\
                 \\echo db=:db role=:role\n\
                 CREATE TEMP TABLE lines (n int, t text);\n\
                 INSERT INTO lines SELECT n, 'line ' || n FROM generate_series(1, 1000) n;\n\
                 \\copy lines TO '{file}' (FORMAT csv)\n\
                 \\copy lines FROM '{file}' (FORMAT csv)\n\
                 SELECT 'rows=' || count(*) FROM lines;\n\
                 COPY (SELECT 'copied out') TO STDOUT;\n\
                 COPY lines FROM STDIN;\n\
                 7\tseven\n\
                 \\.\n\
                 SELECT 'sevens=' || count(*) FROM lines WHERE n = 7;\n\
                 \\d lines\n\
                 SELECT 1 AS described \\gdesc\n\
                 BEGIN; SAVEPOINT a; ROLLBACK TO a; COMMIT;\n\
                 \\c acme\n\
                 SELECT 'still ' || current_database();\n\
                 SELECT format('SELECT %s', n) FROM generate_series(1, 3) n \\gexec\n",
                file = file.display()
            );
            std::fs::write(&sql, text).expect("written");
            let mut command = Command::new(&psql);
            command.args(["-X", "-w", "-A", "-t", &dsn(&proxy, transport), "-f"]);
            let said = succeeds(command.arg(&sql)).await;
            for expected in [
                "db=tenant_acme role=tenant_acme_app",
                "COPY 1000",
                "rows=2000",
                "copied out",
                "sevens=3",
                "described|integer",
                "still tenant_acme",
            ] {
                assert!(said.contains(expected), "no {expected:?} in {said}");
            }
            // psql 18 prints a table, older ones a sentence.
            let told = ["Database|acme", "to database \"acme\" as user \"app\""];
            assert!(told.iter().any(|told| said.contains(told)), "\\conninfo: {said}");
        }
    }
    all_left(&proxy).await;
}

/// By its id, by its database's name, and to what is no tenant's: psql says that there is no such
/// database, where it would have said "You are now connected to".
#[tokio::test]
async fn psql_cannot_connect_on_to_another_tenant() {
    let proxy = Proxy::start().await;
    for (psql, transports) in copies("psql").await {
        for transport in transports {
            for name in ["globex", "tenant_globex", "nobody"] {
                let sql = proxy.dir().join("other.sql");
                let text = format!("\\c {name}\nSELECT 'somewhere ' || 'else';\n");
                std::fs::write(&sql, text).expect("written");
                let mut command = Command::new(&psql);
                command.args(["-X", "-w", "-A", "-t", &dsn(&proxy, transport), "-f"]);
                let output = output(command.arg(&sql)).await;
                let said = String::from_utf8_lossy(&output.stdout);
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(!output.status.success(), "{said}");
                let expected = format!("FATAL:  database \"{name}\" does not exist");
                assert!(errors.contains(&expected), "{errors}");
                assert!(!said.contains("somewhere else"), "{said}");
                let refused = proxy.event("refused", |event| event["database"] == name).await;
                assert_eq!(refused["reason"], "database_unknown");
            }
        }
    }
    all_left(&proxy).await;
}

/// What once replaced a tenant's tables: a restore into a database of which the token knows
/// nothing. And a dump of "all databases", which was one tenant's, several times.
#[tokio::test]
async fn pg_restore_and_pg_dumpall_stop_at_an_unknown_database() {
    let proxy = Proxy::start().await;
    let acme = proxy.connect(&mint::token("acme"), "acme").await.expect("connected");
    acme.batch_execute("CREATE TABLE kept AS SELECT generate_series(1, 7)").await.expect("made");
    let dump = proxy.dir().join("kept.dump");
    let dump = dump.to_str().expect("UTF-8");
    // Those of the server's version: another one's refuse to dump it.
    let to = |program: &str, name: &str| {
        let mut command = Command::new(world().pg_program(program));
        let token = mint::token("acme");
        command.args(["-w", "-d", &proxy.socket_dsn(&token, name)]);
        // pg_dumpall does not tell the password of its DSN to the pg_dump that it runs.
        command.env("PGPASSWORD", token);
        command
    };
    succeeds(to("pg_dump", "acme").args(["-Fc", "-t", "kept", "-f", dump])).await;
    for name in ["acme_staging", "globex"] {
        // An empty table in the place of the one that is there.
        let mut restore = to("pg_restore", name);
        let output = output(restore.args(["--clean", "--schema-only", dump])).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        let row = acme.query_one("SELECT count(*) FROM kept", &[]).await.expect("counted");
        assert_eq!(row.get::<_, i64>(0), 7, "the tenant's own table is as it was: {errors}");
        assert!(!output.status.success(), "{errors}");
        let expected = format!("database \"{name}\" does not exist");
        assert!(errors.contains(&expected), "{errors}");
    }
    let mut all = to("pg_dumpall", "acme");
    let output = output(all.args(["--no-role-passwords", "-l", "acme"])).await;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    assert!(errors.contains("does not exist"), "{errors}");
    acme.batch_execute("DROP TABLE kept").await.expect("dropped");
}

#[tokio::test]
async fn pgbench_fails_no_transaction_in_any_mode() {
    let proxy = Proxy::start().await;
    for (pgbench, transports) in copies("pgbench").await {
        for transport in transports {
            let bench = |arguments: &[&str]| {
                let mut command = Command::new(&pgbench);
                command.args(arguments).arg(dsn(&proxy, transport));
                command
            };
            succeeds(&mut bench(&["-i", "-q", "-s", "1"])).await;
            for mode in ["simple", "extended", "prepared"] {
                let mode = format!("--protocol={mode}");
                for (shape, transactions) in [
                    (&["-S", "-t", "200"][..], "1600/1600"),
                    (&["-N", "-t", "20"], "160/160"),
                    (&["-S", "-C", "-t", "5"], "40/40"),
                ] {
                    let mut command = bench(&["-n", "-c", "8", "-j", "2", &mode]);
                    let said = succeeds(command.args(shape)).await;
                    let done = format!("number of transactions actually processed: {transactions}");
                    assert!(said.contains(&done), "{said}");
                    assert!(said.contains("number of failed transactions: 0 "), "{said}");
                }
            }
            succeeds(&mut bench(&["-i", "-I", "d"])).await;
        }
    }
    all_left(&proxy).await;
}

/// By its certificate and with a token bound to it where it has TLS, and through a sidecar.
#[tokio::test]
async fn psql_in_every_way_that_needs_no_password() {
    let (proxy, own) = ways::proxy().await;
    let [certificate, bound, sidecar] = proxy.addresses()[..] else { panic!("three listeners") };
    let shown = {
        let file = |name: &str| proxy.dir().join(name).display().to_string();
        let (ca, certificate, key) = (file("ca.crt"), file("client.crt"), file("client.key"));
        format!("sslmode=verify-full sslrootcert={ca} sslcert={certificate} sslkey={key}")
    };
    let token = mint::token_with("acme", json!({ "cnf": { "x5t#S256": own.thumbprint() } }));
    for (psql, transports) in copies("psql").await {
        let lands = async |dsn: String| {
            let dsn = format!("user=app dbname=acme {dsn}");
            let ask = ["-X", "-w", "-A", "-t", "-c", "SELECT current_database()", dsn.as_str()];
            assert_eq!(succeeds(Command::new(&psql).args(ask)).await.trim(), "tenant_acme");
        };
        lands(format!("host={} port=6432", proxy.dir().display())).await;
        lands(format!("host=127.0.0.1 port={} sslmode=disable", sidecar.port())).await;
        if transports.contains(&Transport::Tls) {
            lands(format!("host=127.0.0.1 port={} {shown}", certificate.port())).await;
            lands(format!("host=127.0.0.1 port={} password={token} {shown}", bound.port())).await;
        }
    }
    all_left(&proxy).await;
}

// --- Python ------------------------------------------------------------------------------

async fn python_passes(name: &str, transport: Transport) {
    let proxy = Proxy::start().await;
    let mut command = python(name);
    told(&mut command, &proxy, transport);
    passes(&mut command).await;
    all_left(&proxy).await;
}

#[tokio::test]
async fn psycopg_over_tls() {
    python_passes("psycopg_checks.py", Transport::Tls).await;
}

#[tokio::test]
async fn psycopg_over_the_socket() {
    python_passes("psycopg_checks.py", Transport::Socket).await;
}

#[tokio::test]
async fn asyncpg_over_tls() {
    python_passes("asyncpg_checks.py", Transport::Tls).await;
}

#[tokio::test]
async fn asyncpg_over_the_socket() {
    python_passes("asyncpg_checks.py", Transport::Socket).await;
}

#[tokio::test]
async fn psycopg_and_asyncpg_in_every_way_that_needs_no_password() {
    let (proxy, own) = ways::proxy().await;
    let mut command = python("ways.py");
    ways::told(&mut command, &proxy, &own);
    passes(&mut command).await;
    all_left(&proxy).await;
}

// --- tokio-postgres ----------------------------------------------------------------------

type Messages = mpsc::UnboundedReceiver<AsyncMessage>;

/// A connection's bytes: TLS is made here, as tokio-postgres leaves it to others.
async fn open(proxy: &Proxy, transport: Transport) -> Box<dyn Io> {
    match transport {
        Transport::Tls => Raw::tls(proxy.address()).await,
        Transport::Socket => Raw::unix(&proxy.socket()).await,
    }
    .into_inner()
}

/// A session, with the notices and notifications that it gets.
async fn connect(proxy: &Proxy, transport: Transport) -> (Client, Messages) {
    let mut config = Config::new();
    config.user("app").password(mint::token("acme")).dbname("acme");
    let (client, mut connection) =
        config.connect_raw(open(proxy, transport).await, NoTls).await.expect("logged in");
    let (sender, messages) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            let _nobody_listens = sender.send(message);
        }
    });
    (client, messages)
}

async fn tokio_postgres(transport: Transport) {
    let proxy = Proxy::start().await;
    let (client, messages) = connect(&proxy, transport).await;
    queries(&client).await;
    pipelining(&client).await;
    copies_rows(&client).await;
    notifications(&client, messages).await;
    cancels(&proxy, &client, transport).await;
    large_values(&client).await;
    drop(client);
    all_left(&proxy).await;
}

async fn queries(client: &Client) {
    let answers = client
        .simple_query("SELECT 1; SELECT 'two'; CREATE TEMP TABLE t (n int8 PRIMARY KEY, b bytea)")
        .await
        .expect("answered");
    let rows: Vec<_> = answers
        .iter()
        .filter_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        })
        .collect();
    assert_eq!(rows, ["1", "two"]);
    let insert = client
        .prepare_typed("INSERT INTO t VALUES ($1, $2)", &[Type::INT8, Type::BYTEA])
        .await
        .expect("prepared");
    for n in 0..100_i64 {
        assert_eq!(client.execute(&insert, &[&n, &vec![0_u8; 10]]).await.expect("run"), 1);
    }
    let error = client.execute(&insert, &[&7_i64, &None::<Vec<u8>>]).await.expect_err("twice");
    assert_eq!(error.code(), Some(&SqlState::UNIQUE_VIOLATION));
    let mut rows = pin!(client.query_raw("SELECT n FROM t", None::<i64>).await.expect("rows"));
    let mut sum = 0;
    while let Some(row) = rows.try_next().await.expect("a row") {
        sum += row.get::<_, i64>(0);
    }
    assert_eq!(sum, 4950);
}

async fn pipelining(client: &Client) {
    let statement = client.prepare("SELECT $1::int8 * 2").await.expect("prepared");
    let asked = (0..1000_i64).map(|n| {
        let statement = &statement;
        async move { client.query_one(statement, &[&n]).await.map(|row| row.get::<_, i64>(0)) }
    });
    for (n, answer) in join_all(asked).await.into_iter().enumerate() {
        assert_eq!(answer.expect("answered"), 2 * n as i64);
    }
    // An error in the middle is the error of one statement only.
    let (before, wrong, after) = tokio::join!(
        client.query_one("SELECT 1", &[]),
        client.query_one("SELECT 1 / 0", &[]),
        client.query_one("SELECT 2", &[]),
    );
    assert_eq!(before.expect("answered").get::<_, i32>(0), 1);
    assert_eq!(wrong.expect_err("wrong").code(), Some(&SqlState::DIVISION_BY_ZERO));
    assert_eq!(after.expect("answered").get::<_, i32>(0), 2);
}

async fn copies_rows(client: &Client) {
    client.batch_execute("CREATE TEMP TABLE copied (n int, t text)").await.expect("made");
    let mut sink =
        pin!(client.copy_in::<_, Bytes>("COPY copied FROM STDIN").await.expect("copying"));
    for chunk in 0..100 {
        let mut rows = BytesMut::new();
        for n in chunk * 1000..(chunk + 1) * 1000 {
            rows.extend_from_slice(format!("{n}\trow {n}\n").as_bytes());
        }
        sink.send(rows.freeze()).await.expect("sent");
    }
    assert_eq!(sink.finish().await.expect("copied"), 100_000);
    let mut stream = pin!(client.copy_out("COPY copied TO STDOUT").await.expect("copying"));
    let mut lines = 0;
    while let Some(chunk) = stream.next().await {
        lines += chunk.expect("a chunk").iter().filter(|byte| **byte == b'\n').count();
    }
    assert_eq!(lines, 100_000);
}

async fn notifications(client: &Client, mut messages: Messages) {
    client
        .batch_execute("LISTEN news; NOTIFY news, 'extra'; DO $$BEGIN RAISE NOTICE 'psst'; END$$")
        .await
        .expect("run");
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("a pid").get(0);
    let (mut noticed, mut notified) = (false, false);
    while !(noticed && notified) {
        match messages.recv().await.expect("the connection lives") {
            AsyncMessage::Notice(notice) => noticed |= notice.message() == "psst",
            AsyncMessage::Notification(notify) => {
                assert_eq!((notify.channel(), notify.payload()), ("news", "extra"));
                assert_eq!(notify.process_id(), pid);
                notified = true;
            }
            _ => {}
        }
    }
}

async fn cancels(proxy: &Proxy, client: &Client, transport: Transport) {
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("a pid").get(0);
    for n in 0..3_i32 {
        let cancel = async {
            world().waits_for(pid, "PgSleep").await;
            let token = client.cancel_token();
            token.cancel_query_raw(open(proxy, transport).await, NoTls).await.expect("sent");
        };
        let (slept, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), cancel);
        assert_eq!(slept.expect_err("cancelled").code(), Some(&SqlState::QUERY_CANCELED));
        let row = client.query_one("SELECT $1::int4", &[&n]).await.expect("the next one is not");
        assert_eq!(row.get::<_, i32>(0), n);
    }
}

async fn large_values(client: &Client) {
    let value: Vec<u8> = (0..64_usize << 20).map(|n| (n % 251) as u8).collect();
    let row = client.query_one("SELECT $1::bytea", &[&value]).await.expect("answered");
    assert!(row.get::<_, &[u8]>(0) == value, "not what was sent");
}

#[tokio::test]
async fn tokio_postgres_over_tls() {
    tokio_postgres(Transport::Tls).await;
}

#[tokio::test]
async fn tokio_postgres_over_the_socket() {
    tokio_postgres(Transport::Socket).await;
}
