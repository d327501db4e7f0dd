//! docs/setup.md, pasted: its blocks run in their order in one shell, against a PostgreSQL that was
//! just made and an OpenBAO that the page itself starts. What it makes is what the sandbox makes,
//! and moves as docs/runbooks.md says. Units and alerts are read by who reads them elsewhere.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use pgsilo_sandbox::testing::programs;
use pgsilo_sandbox::testing::proxy::folder;
use pgsilo_sandbox::testing::world::world;

use crate::machine::{Machine, SUPERUSER_PASSWORD, said, succeeds};
use crate::var;

/// The blocks of a page, or of what is under one of its headings, that are marked for a shell.
fn blocks(page: &str, heading: Option<&str>) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    let text = fs::read_to_string(path).expect("the page");
    let section = match heading {
        Some(heading) => {
            let (_, section) = text.split_once(&format!("\n## {heading}\n")).expect("the heading");
            section.split("\n## ").next().expect("a section")
        }
        None => &text,
    };
    let blocks = section.split("\n```sh\n").skip(1);
    blocks.map(|block| block.split("\n```").next().expect("an end").to_owned() + "\n").collect()
}

/// The page up to its first login.
fn set_up() -> String {
    let headings = [
        "What you need",
        "A private authority",
        "PostgreSQL",
        "OpenBAO",
        "A tenant",
        "pgsilo",
        "The first login",
    ];
    headings.map(|heading| blocks("docs/setup.md", Some(heading)).concat()).concat()
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
                ~ 'tenant_acme_|pgsilo_provisioner' AND NOT m.member::regrole::text ~ 'tenant-|globex|pgsilo_.*_broker'
                AND NOT m.roleid::regrole::text ~ 'tenant-|globex|pgsilo_template_owner'
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
    let page = blocks("docs/setup.md", None).concat();
    let output = machine.reader(&page).output().expect("bash starts");
    let (out, err) = said(&output);
    let logs = || {
        let log = |name: &str| fs::read_to_string(machine.dir.join(name)).unwrap_or_default();
        format!("{}{}{}", log("pg/log"), log("bao.log"), log("pgsilo.log"))
    };
    assert!(output.status.success(), "{out}\n{err}\n{}", logs());
    for expected in
        ["TLSv1.3", "it works", "sealed again", "| acme | tenant-acme-rw-", "by its own authority"]
    {
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

    // Other users may not read secrets.
    let key = format!("pg/data-{}/pgsilo.key", machine.ports[0]);
    let secrets = ["etc/secret-id", "etc/server.key", "bao/server.key", "control/init.json", &key];
    for secret in secrets {
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

/// All of it once more, and a tenant that is as it should be.
const AGAIN: &str = r#"
    export BAO_TOKEN=$(jq -r .root_token "$CONTROL/init.json") PGSILO_ADMIN_DSN="$ADMIN_DSN"
    "$BUILT/pgsiloctl" bootstrap openbao
    "$BUILT/pgsiloctl" bootstrap registry
    "$BUILT/pgsiloctl" bootstrap cluster eu-1
    "$BUILT/pgsiloctl" tenant repair --all
    "$BUILT/pgsiloctl" tenant check "$TENANT"
"#;

/// docs/tenants.md goes on where setup.md has a cluster and an OpenBAO that nobody has made ready.
#[tokio::test]
async fn the_page_for_tenants_works_as_it_is_pasted() {
    let machine = Machine::new();
    let of_setup = |heading: &str| blocks("docs/setup.md", Some(heading));
    let (postgres, openbao) = (of_setup("PostgreSQL"), of_setup("OpenBAO"));
    assert_eq!((postgres.len(), openbao.len()), (3, 2));
    let page = [
        of_setup("What you need").concat(),
        of_setup("A private authority").concat(),
        postgres[..2].concat(),
        openbao[0].clone(),
        blocks("docs/tenants.md", None).concat(),
        of_setup("The first login")[0].clone(),
        AGAIN.to_owned(),
    ];
    let mut command = machine.reader(&page.concat());
    command.env("ADMIN_DSN", format!("postgresql://postgres:{SUPERUSER_PASSWORD}@any"));
    let output = command.output().expect("bash starts");
    let (out, err) = said(&output);
    let log = |name: &str| fs::read_to_string(machine.dir.join(name)).unwrap_or_default();
    let logs = || format!("{}{}{}", log("pg/log"), log("bao.log"), log("pgsilo.log"));
    assert!(output.status.success(), "{out}\n{err}\n{}", logs());
    for expected in [
        "would: the policy pgsilo is this version's",
        "done:  the registry has cluster eu-1",
        "acme  is made",
        "ok      read-write",
        "leaving  is removed",
        "signature       good",
        "TLSv1.3",
        "it works",
    ] {
        assert!(out.contains(expected), "{expected}: {out}\n{err}");
    }
    // What is there is recognized, authorities included.
    for part in ["OpenBAO", "the registry", "cluster eu-1"] {
        assert!(err.contains(&format!("{part} is as it should be")), "{part}: {out}\n{err}");
    }
    // All that OpenBAO has there is under TLS, and nothing says who the tenants are.
    let superuser = machine.superuser("postgres").await;
    let in_clear = "SELECT count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
        WHERE a.usename ~ '^(tenant|pgsilo)' AND NOT s.ssl";
    let in_clear: i64 = superuser.query_one(in_clear, &[]).await.expect("asked").get(0);
    assert_eq!(in_clear, 0);
    let told = "SELECT rolname FROM pg_roles WHERE rolname ~ 'acme' UNION ALL SELECT datname FROM pg_database WHERE datname ~ 'acme'";
    assert!(superuser.query(told, &[]).await.expect("asked").is_empty());
    let secrets = ["etc/secret-id", "control/provisioner.secret-id", "control/operator.secret-id"];
    for secret in secrets {
        let mode = fs::metadata(machine.dir.join(secret)).expect(secret).permissions().mode();
        assert_eq!(mode & 0o077, 0, "{secret}: {mode:o}");
    }
}

#[tokio::test]
async fn a_tenant_moves_as_the_runbook_says() {
    let machine = Machine::new();
    let [first, second] = machine.ports;
    let tenant = blocks("docs/setup.md", Some("A tenant"));
    let moving = blocks("docs/runbooks.md", Some("A tenant moves to another server"));
    assert_eq!((tenant.len(), moving.len()), (2, 4));
    let [suspend, copy, forget, place] = &moving[..] else { panic!("four blocks") };
    let server = machine.server(second).map(|(name, value)| format!("{name}='{value}'\n")).concat();
    let cluster = blocks("docs/setup.md", Some("PostgreSQL")).concat();
    // Who is in a session meanwhile loses it; who comes is told.
    let ask = r#"ask() { PGPASSWORD=$(token "$1") psql -XAt "$DSN" -v ON_ERROR_STOP=1 -c "$2"; }"#;
    let refused = "if ask read-write 'SELECT 1'; then exit 1; fi\n";
    let look = format!(
        "{ask}\nuntil ask read-write 'SELECT inet_server_port()' | grep -x {second}; do sleep 0.2; done
         ask read-only 'TABLE greetings'
         ask read-write \"INSERT INTO greetings VALUES ('moved'); SELECT tableowner FROM pg_tables WHERE tablename = 'greetings'\"
         {}",
        blocks("docs/setup.md", Some("The first login")).last().expect("the audit")
    );
    let script = [
        &set_up(),
        &server,
        &cluster,
        &tenant[0],
        suspend,
        ask,
        "\n",
        refused,
        copy,
        forget,
        &tenant[1],
        place,
        &look,
    ];
    let output =
        machine.reader(&script.map(|part| part as &str).concat()).output().expect("bash starts");
    let (out, err) = said(&output);
    assert!(output.status.success(), "{first} {out}\n{err}");
    let after = out.rsplit_once(&format!("\n{second}\n")).expect("a login at the new server").1;
    assert!(after.contains("it works\n") && after.contains("tenant_acme_app\n"), "{after}");
    assert!(err.contains("tenant \"acme\" is paused for a moment"), "{err}");
}

/// Makes the second server a standby of the first; both run.
const STANDBY: &str = r#"
    for port in "$FIRST" "$SECOND"; do pg pg_ctl -D "$DIR/pg/data-$port" -m fast -w stop; done
    as-db rm -r "$DIR/pg/data-$SECOND"
    as-db cp -a "$DIR/pg/data-$FIRST" "$DIR/pg/data-$SECOND"
    as-db touch "$DIR/pg/data-$SECOND/standby.signal"
    printf '%s\n' "port = $SECOND" "primary_conninfo = 'host=$DIR/pg port=$FIRST user=postgres password=$WORD'" \
        >>"$DIR/pg/data-$SECOND/postgresql.conf"
    for port in "$FIRST" "$SECOND"; do
        pg pg_ctl -D "$DIR/pg/data-$port" -l "$DIR/pg/log" -w start >"$DIR/pg_ctl.log"
    done
"#;

/// OpenBAO's URL names both servers, and the standby first; the registry one.
#[tokio::test]
async fn a_database_fails_over_as_the_runbook_says() {
    let machine = Machine::new();
    let [first, second] = machine.ports;
    let runbook = blocks("docs/runbooks.md", Some("A database fails over"));
    assert_eq!(runbook.len(), 2);
    let login = blocks("docs/setup.md", Some("The first login"));
    let audit = login.last().expect("the audit").replace("leases audit", "leases audit --fix");
    let ask = r#"
        ask() { PGPASSWORD=$(token read-write) psql -XAt "$DSN" -v ON_ERROR_STOP=1 -c "$1"; }
        where() { until ask 'SELECT inet_server_port()' | grep -x "$1"; do sleep 0.2; done; }
    "#;
    let fails_over = r#"
        where "$FIRST"
        pg pg_ctl -D "$DIR/pg/data-$FIRST" -m fast -w stop
        pg pg_ctl -D "$DIR/pg/data-$SECOND" -w promote
        DB_PORT=$SECOND
    "#;
    // 3: something is not judged yet, as OpenBAO is revoking what it could not before.
    let after = format!(
        "{}where \"$SECOND\"\nask 'TABLE greetings'\n{} || [ $? = 3 ]\n",
        runbook.concat(),
        audit.trim()
    );
    let script = [&set_up(), ask, STANDBY, fails_over, &after];
    let mut command = machine.reader(&script.concat());
    command.env("DB_SERVERS", format!("localhost:{second},localhost:{first}"));
    command.env("CLUSTERS", format!("localhost:{second},localhost:{first}"));
    command.env("FIRST", first.to_string()).env("SECOND", second.to_string());
    command.env("WORD", SUPERUSER_PASSWORD);
    let (out, err) = succeeds(command);
    let after = out.rsplit_once(&format!("\n{second}\n")).expect("a login at the new primary").1;
    assert!(after.contains("it works\n"), "{after}\n{err}");
}

/// Units of config/, read by systemd, with programs that are there.
#[tokio::test]
async fn systemd_reads_the_units() {
    let dir = folder();
    let built = programs::pgsilo().parent().expect("a folder").to_path_buf();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    const UNITS: [&str; 5] = [
        "pgsilo.service",
        "pgsilo-audit.service",
        "pgsilo-audit.timer",
        "pgsilo-tenant@.service",
        "pgsilo-tenant@.timer",
    ];
    for name in UNITS {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
        let unit = fs::read_to_string(config.join(name)).expect("a unit");
        let unit = unit.replace("/usr/bin/pgsilo", &format!("{}/pgsilo", built.display()));
        fs::write(dir.join(name), unit).expect("written");
        verify.arg(dir.join(name));
    }
    let (out, err) = succeeds(verify);
    fs::remove_dir_all(&dir).expect("removed");
    // An unknown key is a warning only.
    for unit in UNITS {
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
