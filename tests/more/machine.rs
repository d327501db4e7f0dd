//! A machine before docs/setup.md begins: PostgreSQL servers as a package leaves them, and what
//! starts parts as systemd does elsewhere. Whatever the page starts ends with this process at the
//! latest.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use pgsilo_sandbox::testing::bao::free_port;
use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::folder;
use pgsilo_sandbox::testing::world::world;

use crate::var;

pub(crate) const SUPERUSER_PASSWORD: &str = "for-tests-on-loopback-only";

/// What a machine has before the page begins: a folder for everything, a PostgreSQL that runs,
/// programs.
pub(crate) struct Machine {
    pub(crate) dir: PathBuf,
    /// Of the database server, and of another one that a tenant can move to.
    pub(crate) ports: [u16; 2],
    /// A port without a listener.
    unused: u16,
    /// Whom PostgreSQL runs as.
    account: u32,
    /// Ends all that was started, when this process ends at the latest.
    watchdog: Child,
}

/// Starts, stops or starts again a part, as systemd does elsewhere; each is a file in `bin`.
const SCRIPTS: [(&str, &str); 7] = [
    // The server runs as an account of its own where we are root.
    (
        "as-db",
        r#"as=; [ "$(id -u)" != 0 ] || as="setpriv --reuid=$ACCOUNT --regid=$ACCOUNT --clear-groups"
           cd / && exec $as "$@""#,
    ),
    ("pg", r#"exec as-db "$DIR/pg/native/bin/$1" "${@:2}""#),
    (
        "restart-db",
        r#"pg pg_ctl -D "$DIR/pg/$1" -l "$DIR/pg/log" -w -m fast restart >"$DIR/pg_ctl.log""#,
    ),
    // As the page's drop-in for its unit has it.
    (
        "start-bao",
        r#"PGSSLROOTCERT="$DIR/bao/db-ca.crt" bao server -config "$DIR/bao/openbao.hcl" >"$DIR/bao.log" 2>&1 & echo $! >"$DIR/bao.pid""#,
    ),
    // Its port is free again when it has ended.
    (
        "restart-pgsilo",
        r#"pid=$(cat "$DIR/pgsilo.pid"); kill "$pid"
           while readlink "/proc/$pid/exe" >/dev/null; do sleep 0.1; done; start-pgsilo"#,
    ),
    ("reload-pgsilo", r#"kill -HUP "$(cat "$DIR/pgsilo.pid")""#),
    (
        "start-pgsilo",
        r#"pgsilo check --config "$DIR/etc/pgsilo.toml"
           pgsilo serve --config "$DIR/etc/pgsilo.toml" >"$DIR/pgsilo.log" 2>&1 & echo $! >"$DIR/pgsilo.pid""#,
    ),
];

/// Waits for the end of its standard input.
const WATCHDOG: &str = r#"cat >/dev/null
    for part in pgsilo bao; do [ ! -e "$DIR/$part.pid" ] || kill "$(cat "$DIR/$part.pid")"; done
    for data in "$DIR"/pg/data-*; do pg pg_ctl -D "$data" -m immediate -w stop >/dev/null || true; done
    cd / && rm -rf "$DIR""#;

impl Machine {
    pub(crate) fn new() -> Machine {
        let dir = folder();
        let root = rustix::process::geteuid().is_root();
        let account = if root { 65534 } else { rustix::process::geteuid().as_raw() };
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).expect("opened");
        for part in ["bin", "pg"] {
            fs::create_dir(dir.join(part)).expect("made");
        }
        for (name, script) in SCRIPTS {
            let path = dir.join("bin").join(name);
            fs::write(&path, format!("#!/usr/bin/env bash\nset -euo pipefail\n{script}\n"))
                .expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("runnable");
        }
        std::os::unix::fs::symlink(var("PGSILO_BAO"), dir.join("bin/bao")).expect("linked");
        let mut machine = Machine {
            watchdog: Command::new("true").spawn().expect("true starts"),
            dir,
            ports: [free_port(), free_port()],
            unused: free_port(),
            account,
        };
        machine.watchdog =
            machine.bash(WATCHDOG).stdin(Stdio::piped()).spawn().expect("bash starts");
        machine.install();
        for port in machine.ports {
            machine.start_database(port);
        }
        machine
    }

    fn install(&self) {
        let pg = self.dir.join("pg");
        fs::write(pg.join("password"), SUPERUSER_PASSWORD).expect("written");
        let copy = Command::new("cp")
            .arg("-a")
            .arg(var("PGSILO_POSTGRES_TLS"))
            .arg(pg.join("native"))
            .status();
        assert!(copy.expect("cp starts").success());
        let own = Command::new("chown").arg("-R").arg(self.account.to_string()).arg(&pg).status();
        assert!(own.expect("chown starts").success());
        chown(&pg, Some(self.account), None).expect("owned");
    }

    /// As a package would have left it: passwords everywhere, no TLS.
    fn start_database(&self, port: u16) {
        let mut command = self.bash(
            r#"pg initdb -D "$DIR/pg/data-$PORT" -U postgres --auth=scram-sha-256 --pwfile="$DIR/pg/password" \
                   --encoding=UTF8 --locale=C --no-sync
               printf '%s\n' "port = $PORT" "unix_socket_directories = '$DIR/pg'" \
                   "listen_addresses = ''" "fsync = off" >>"$DIR/pg/data-$PORT/postgresql.conf"
               pg pg_ctl -D "$DIR/pg/data-$PORT" -l "$DIR/pg/log" -w start"#,
        );
        command.env("PORT", port.to_string());
        succeeds(command);
    }

    /// A shell on this machine that stops at the first failure, as a person would.
    fn bash(&self, script: &str) -> Command {
        let dir = self.dir.display();
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).stdin(Stdio::null());
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        let path = std::env::var("PATH").expect("a PATH");
        command.env("PATH", format!("{dir}/bin:{path}"));
        command.env("DIR", &self.dir).env("ACCOUNT", self.account.to_string());
        for name in ["PGPASSWORD", "PGHOST", "PGPORT", "PGUSER", "BAO_ADDR", "BAO_TOKEN"] {
            command.env_remove(name);
        }
        command
    }

    /// A shell in which what the page leaves to its reader is this machine's.
    pub(crate) fn reader(&self, script: &str) -> Command {
        let dir = self.dir.display();
        let mut command = self.bash(script);
        let built = programs::pgsilo().parent().expect("a folder").to_path_buf();
        command.env("BUILT", built);
        let (bao, cluster, pgsilo, admin) = (free_port(), free_port(), free_port(), free_port());
        for (name, value) in self.server(self.ports[0]) {
            command.env(name, value);
        }
        let clusters = self.ports.map(|port| self.servers(port)).join(" ");
        for (name, value) in [
            ("BIN", format!("{dir}/bin")),
            ("ETC", format!("{dir}/etc")),
            ("CONTROL", format!("{dir}/control")),
            ("CREDENTIALS", format!("{dir}/etc")),
            ("START_PGSILO", "start-pgsilo".to_owned()),
            ("RELOAD_PGSILO", "reload-pgsilo".to_owned()),
            ("RESTART_PGSILO", "restart-pgsilo".to_owned()),
            ("CLUSTERS", clusters),
            ("DB_ACCOUNT", self.account.to_string()),
            ("DUMP", self.as_superuser("pg_dump", self.ports[0])),
            ("RESTORE", self.as_superuser("pg_restore", self.ports[1])),
            ("BAO_PORT", bao.to_string()),
            ("BAO_CLUSTER_PORT", cluster.to_string()),
            ("BAO_ETC", format!("{dir}/bao")),
            ("BAO_DATA", format!("{dir}/bao/data")),
            ("BAO_ACCOUNT", rustix::process::geteuid().as_raw().to_string()),
            ("START_BAO", "start-bao".to_owned()),
            ("PGSILO_PORT", pgsilo.to_string()),
            ("ADMIN", format!("127.0.0.1:{admin}")),
        ] {
            command.env(name, value);
        }
        command
    }

    /// What the page calls a database server of this machine.
    pub(crate) fn server(&self, port: u16) -> [(&'static str, String); 6] {
        let data = format!("{}/pg/data-{port}", self.dir.display());
        [
            ("DB_PORT", port.to_string()),
            ("DB_SERVERS", self.servers(port)),
            ("PGDATA", data.clone()),
            ("DB_CONF", data),
            ("DB_SUPERUSER", self.as_superuser("psql", port)),
            ("RESTART_DB", format!("restart-db data-{port}")),
        ]
    }

    /// Another one in front, without a listener, as after a failover.
    fn servers(&self, port: u16) -> String {
        format!("localhost:{},localhost:{port}", self.unused)
    }

    /// A program of PostgreSQL's, of a version with the server, as its superuser.
    fn as_superuser(&self, program: &str, port: u16) -> String {
        let (program, dir) = (world().pg_program(program), self.dir.display());
        format!(
            "env PGPASSWORD={SUPERUSER_PASSWORD} PGHOST={dir}/pg PGPORT={port} PGUSER=postgres PGSSLMODE=disable {}",
            program.display()
        )
    }

    pub(crate) async fn superuser(&self, dbname: &str) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(self.dir.join("pg"))
            .port(self.ports[0])
            .user("postgres")
            .password(SUPERUSER_PASSWORD)
            .dbname(dbname)
            .connect(tokio_postgres::NoTls)
            .await
            .expect("superuser logs in");
        tokio::spawn(connection);
        client
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        let _status = self.watchdog.wait();
    }
}

pub(crate) fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

pub(crate) fn succeeds(mut command: Command) -> (String, String) {
    let output = command.output().expect("it starts");
    let (out, err) = said(&output);
    assert!(output.status.success(), "{out}\n{err}");
    (out, err)
}
