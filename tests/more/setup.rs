//! docs/setup.md, pasted: its blocks run in their order in one shell, against a PostgreSQL that was just
//! made and an OpenBAO that the page itself starts. What it makes is what the sandbox makes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::support::bao::free_port;
use crate::support::proxy::folder;
use crate::support::world::world;
use crate::var;

const SUPERUSER_PASSWORD: &str = "for-tests-on-loopback-only";

/// What a machine has before the page begins: a folder for everything, a PostgreSQL that runs, programs.
struct Machine {
    dir: PathBuf,
    db_port: u16,
    /// Whom PostgreSQL runs as.
    account: u32,
    /// Ends all that was started, when this process ends at the latest.
    watchdog: Child,
}

/// Starts, stops or starts again a part, as systemd does elsewhere; each is a file in `bin`.
const SCRIPTS: [(&str, &str); 4] = [
    // The server runs as an account of its own where we are root.
    (
        "pg",
        r#"as=; [ "$(id -u)" != 0 ] || as="setpriv --reuid=$ACCOUNT --regid=$ACCOUNT --clear-groups"
           cd / && exec $as "$DIR/pg/native/bin/$1" "${@:2}""#,
    ),
    (
        "restart-db",
        r#"pg pg_ctl -D "$DIR/pg/data" -l "$DIR/pg/log" -w -m fast restart >"$DIR/pg_ctl.log""#,
    ),
    // As the page's drop-in for its unit has it.
    (
        "start-bao",
        r#"PGSSLROOTCERT="$DIR/bao/db-ca.crt" bao server -config "$DIR/bao/openbao.hcl" >"$DIR/bao.log" 2>&1 & echo $! >"$DIR/bao.pid""#,
    ),
    (
        "start-pgsilo",
        r#"pgsilo check --config "$DIR/etc/pgsilo.toml"
           pgsilo serve --config "$DIR/etc/pgsilo.toml" >"$DIR/pgsilo.log" 2>&1 & echo $! >"$DIR/pgsilo.pid""#,
    ),
];

/// Waits for the end of its standard input.
const WATCHDOG: &str = r#"cat >/dev/null
    for part in pgsilo bao; do [ ! -e "$DIR/$part.pid" ] || kill "$(cat "$DIR/$part.pid")"; done
    pg pg_ctl -D "$DIR/pg/data" -m immediate -w stop >/dev/null
    cd / && rm -rf "$DIR""#;

impl Machine {
    fn new() -> Machine {
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
            db_port: free_port(),
            account,
        };
        machine.watchdog =
            machine.bash(WATCHDOG).stdin(Stdio::piped()).spawn().expect("bash starts");
        machine.start_database();
        machine
    }

    /// As a package would have left it: passwords everywhere, no TLS.
    fn start_database(&self) {
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
        succeeds(self.bash(
            r#"pg initdb -D "$DIR/pg/data" -U postgres --auth=scram-sha-256 --pwfile="$DIR/pg/password" \
                   --encoding=UTF8 --locale=C --no-sync
               printf '%s\n' "port = $DB_PORT" "unix_socket_directories = '$DIR/pg'" \
                   "listen_addresses = ''" "fsync = off" >>"$DIR/pg/data/postgresql.conf"
               pg pg_ctl -D "$DIR/pg/data" -l "$DIR/pg/log" -w start"#,
        ));
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
        command.env("DB_PORT", self.db_port.to_string());
        for name in ["PGPASSWORD", "PGHOST", "PGPORT", "PGUSER", "BAO_ADDR", "BAO_TOKEN"] {
            command.env_remove(name);
        }
        command
    }

    /// A shell in which what the page leaves to its reader is this machine's.
    fn reader(&self, script: &str) -> Command {
        let dir = self.dir.display();
        let mut command = self.bash(script);
        let built = Path::new(env!("CARGO_BIN_EXE_pgsilo")).parent().expect("a folder");
        command.env("BUILT", built);
        let (bao, cluster, pgsilo, admin) = (free_port(), free_port(), free_port(), free_port());
        // A standby in front that is down, as after a failover.
        let servers = format!("localhost:{},localhost:{}", free_port(), self.db_port);
        let superuser = format!(
            "env PGPASSWORD={SUPERUSER_PASSWORD} psql -h {dir}/pg -p {} -U postgres",
            self.db_port
        );
        for (name, value) in [
            ("BIN", format!("{dir}/bin")),
            ("ETC", format!("{dir}/etc")),
            ("CONTROL", format!("{dir}/control")),
            ("CREDENTIALS", format!("{dir}/etc")),
            ("START_PGSILO", "start-pgsilo".to_owned()),
            ("DB_SERVERS", servers),
            ("PGDATA", format!("{dir}/pg/data")),
            ("DB_CONF", format!("{dir}/pg/data")),
            ("DB_ACCOUNT", self.account.to_string()),
            ("DB_SUPERUSER", superuser),
            ("RESTART_DB", "restart-db".to_owned()),
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

    async fn superuser(&self, dbname: &str) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(self.dir.join("pg"))
            .port(self.db_port)
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

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn succeeds(mut command: Command) -> (String, String) {
    let output = command.output().expect("it starts");
    let (out, err) = said(&output);
    assert!(output.status.success(), "{out}\n{err}");
    (out, err)
}

/// The blocks of a page that are marked for a shell, as one script.
fn pasted(page: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    let text = fs::read_to_string(path).expect("the page");
    let blocks = text.split("\n```sh\n").skip(1);
    blocks.map(|block| block.split("\n```").next().expect("an end").to_owned() + "\n").collect()
}

/// What a cluster has of tenant acme: roles and their memberships, the database, and what is in it.
async fn tenant(
    cluster: &tokio_postgres::Client,
    database: &tokio_postgres::Client,
) -> Vec<String> {
    const CLUSTER: &str = "
        SELECT format('role %s login=%s createrole=%s super=%s config=%s', rolname, rolcanlogin,
            rolcreaterole, rolsuper, (SELECT setconfig FROM pg_db_role_setting WHERE setrole = r.oid))
            FROM pg_roles r WHERE rolname ~ '^tenant_acme_'
        UNION ALL SELECT format('%s in %s by %s admin=%s inherit=%s set=%s', m.member::regrole,
            m.roleid::regrole, m.grantor::regrole, admin_option, inherit_option, set_option)
            FROM pg_auth_members m WHERE (m.member::regrole::text || ' ' || m.roleid::regrole::text)
                ~ 'tenant_acme_|pgsilo_provisioner' AND NOT m.member::regrole::text ~ 'tenant-|globex'
                AND NOT m.roleid::regrole::text ~ 'tenant-|globex'
        UNION ALL SELECT format('database by %s acl=%s config=%s', datdba::regrole,
            (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(datacl) a),
            (SELECT setconfig FROM pg_db_role_setting WHERE setdatabase = d.oid AND setrole = 0))
            FROM pg_database d WHERE datname = 'tenant_acme' ORDER BY 1";
    const DATABASE: &str = "
        SELECT format('schema %s of %s acl=%s', nspname, nspowner::regrole, nspacl) FROM pg_namespace
            WHERE nspname IN ('public', 'pgsilo')
        UNION ALL SELECT format('default %s acl=%s', defaclobjtype, defaclacl) FROM pg_default_acl
        UNION ALL SELECT format('function %s of %s definer=%s config=%s acl=%s %s', oid::regprocedure,
            proowner::regrole, prosecdef, proconfig, proacl, md5(prosrc)) FROM pg_proc
            WHERE pronamespace = 'pgsilo'::regnamespace OR pronamespace = 'pg_catalog'::regnamespace
                AND proname ~ '^(lo_(creat|create|from_bytea|import)|pg_logical_emit_message)$'
        UNION ALL SELECT format('view %s of %s acl=%s', relname, relowner::regrole, relacl) FROM pg_class
            WHERE relnamespace = 'pgsilo'::regnamespace ORDER BY 1";
    let mut lines = Vec::new();
    for (client, query) in [(cluster, CLUSTER), (database, DATABASE)] {
        let rows = client.query(query, &[]).await.expect("asked");
        lines.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    }
    lines
}

#[tokio::test]
async fn the_page_for_setting_up_works_as_it_is_pasted() {
    let machine = Machine::new();
    let output = machine.reader(&pasted("docs/setup.md")).output().expect("bash starts");
    let (out, err) = said(&output);
    let logs = || {
        let log = |name: &str| fs::read_to_string(machine.dir.join(name)).unwrap_or_default();
        format!("{}{}{}", log("pg/log"), log("bao.log"), log("pgsilo.log"))
    };
    assert!(output.status.success(), "{out}\n{err}\n{}", logs());
    for expected in ["TLSv1.3", "it works", "sealed again", "| acme | tenant-acme-rw-"] {
        assert!(out.contains(expected), "{expected}: {out}\n{err}");
    }
    assert!(!out.contains("the seal is not looked at"), "{out}");
    assert!(err.contains("the database reached is not the tenant's"), "{err}");

    // OpenBAO's connection is under TLS, too: pg_hba.conf takes no other, and the server says so.
    let superuser = machine.superuser("postgres").await;
    let secured = "SELECT s.ssl, s.version FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
        WHERE a.usename = 'tenant_acme_broker'";
    let row = &superuser.query(secured, &[]).await.expect("asked")[0];
    assert_eq!((row.get(0), row.get(1)), (true, "TLSv1.3"));

    // Nobody else may read what is secret.
    for secret in [
        "etc/secret-id",
        "etc/server.key",
        "bao/server.key",
        "pg/data/pgsilo.key",
        "control/init.json",
    ] {
        let mode = fs::metadata(machine.dir.join(secret)).expect(secret).permissions().mode();
        assert_eq!(mode & 0o077, 0, "{secret}: {mode:o}");
    }

    // What the page has made is what the sandbox makes.
    let page = tenant(&superuser, &machine.superuser("tenant_acme").await).await;
    let sandbox = world().superuser("postgres").await;
    let sandbox = tenant(&sandbox, &world().superuser("tenant_acme").await).await;
    assert!(page.len() > 20, "{page:#?}");
    assert_eq!(page, sandbox);
}

/// Units of config/, read by systemd, with programs that are there.
#[tokio::test]
async fn systemd_reads_the_units() {
    let dir = folder();
    let built = Path::new(env!("CARGO_BIN_EXE_pgsilo")).parent().expect("a folder");
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for name in ["pgsilo.service", "pgsilo-audit.service", "pgsilo-audit.timer"] {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
        let unit = fs::read_to_string(config.join(name)).expect("a unit");
        let unit = unit.replace("/usr/bin/pgsilo", &format!("{}/pgsilo", built.display()));
        fs::write(dir.join(name), unit).expect("written");
        verify.arg(dir.join(name));
    }
    let (out, err) = succeeds(verify);
    fs::remove_dir_all(&dir).expect("removed");
    // An unknown key is a warning only.
    for unit in ["pgsilo.service", "pgsilo-audit.service", "pgsilo-audit.timer"] {
        assert!(!err.contains(unit), "{out}{err}");
    }
}

/// config/alerts.yml is Prometheus' and sees an outage.
#[tokio::test]
async fn prometheus_reads_the_alerts_and_they_see_an_outage() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for arguments in
        [["check", "rules", "config/alerts.yml"], ["test", "rules", "tests/more/alerts.yml"]]
    {
        let mut promtool = Command::new(var("PGSILO_PROMTOOL"));
        promtool.args(arguments).current_dir(root);
        succeeds(promtool);
    }
}
