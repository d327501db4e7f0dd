//! What is killed at any step of its journal is finished, or taken back, by running it again.

use pgsilo_sandbox::testing::eventually;
use pgsilo_sandbox::testing::world::World;
use tokio_postgres::Client;

use super::{does, fails, left_of, not_served, operator, served, session};

/// The key of the lock that a step waits for.
const GATE: i64 = 42;

/// The registry, whose journal waits at a gate before it takes a step's end, or an operation's.
struct Gate {
    registry: Client,
}

impl Gate {
    async fn new(world: &World) -> Gate {
        let registry = world.superuser("pgsilo_registry").await;
        let gate = format!(
            "CREATE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
             BEGIN PERFORM pg_advisory_xact_lock({GATE}); RETURN NEW; END $$;
             SELECT pg_advisory_lock({GATE})"
        );
        registry.batch_execute(&gate).await.expect("made");
        Gate { registry }
    }

    /// Runs a command until its journal is to say that it has passed a step, and kills it there: the step
    /// is done, and nobody knows. `end`: that all of it has ended.
    async fn kill_at(&self, world: &World, arguments: &[&str], step: &str) {
        let condition = match step {
            "end" => "NEW.ended_at IS NOT NULL".to_owned(),
            step => format!("NEW.step = '{step}' AND OLD.step IS DISTINCT FROM NEW.step"),
        };
        let close = format!(
            "CREATE TRIGGER gate BEFORE UPDATE ON pgsilo.operations FOR EACH ROW
                 WHEN ({condition}) EXECUTE FUNCTION public.gate()"
        );
        self.registry.batch_execute(&close).await.expect("closed");
        let mut child = operator(world, arguments).spawn().expect("it starts");
        let waits = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = $1::int8::oid AND NOT granted";
        eventually(&format!("{arguments:?} to reach {step}"), async || {
            if let Ok(Some(status)) = child.try_wait() {
                panic!("{arguments:?} ended before {step}: {status}");
            }
            self.registry.query_opt(waits, &[&GATE]).await.expect("asked")
        })
        .await;
        child.kill().await.expect("killed");
        // Its server process hears of it only when it next looks.
        let end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks
            WHERE locktype = 'advisory' AND objid = $1::int8::oid AND NOT granted";
        self.registry.query(end, &[&GATE]).await.expect("ended");
        self.registry
            .batch_execute("DROP TRIGGER gate ON pgsilo.operations")
            .await
            .expect("opened");
        eventually("nobody else to be at it", async || {
            let others = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid() AND database = (
                SELECT oid FROM pg_database WHERE datname = current_database())";
            self.registry.query(others, &[]).await.expect("asked").is_empty().then_some(())
        })
        .await;
    }
}

const CREATE: [&str; 7] = ["database", "roles", "contents", "opening", "mount", "broker", "leases"];

#[tokio::test]
async fn a_creation_that_is_killed_at_any_step_is_finished_by_the_next() {
    let world = served().await;
    let gate = Gate::new(&world).await;
    for step in CREATE.iter().chain(&["end"]) {
        let id = format!("made-{step}");
        let create = ["tenant", "create", &id, "--alias", &format!("alias-{step}")];
        gate.kill_at(&world, &create, step).await;
        session(&world, &id).await.expect_err("it is not served before all of it is there");
        fails(
            &world,
            &["tenant", "create", &id, "--name", "another"],
            "with other options has not ended",
        )
        .await;
        let told = does(&world, &["tenant", "create", &id, "--dry-run"]).await;
        assert!(told.contains("would go on with"), "{told}");
        session(&world, &id).await.expect_err("nothing was made");
        does(&world, &["tenant", "create", &id]).await;
        does(&world, &["tenant", "check", &id]).await;
        session(&world, &id).await.expect("served");
        does(&world, &["tenant", "delete", &id, "--now", "--confirm", &id]).await;
        assert_eq!(left_of(&world, &id).await, Vec::<String>::new(), "{step}");
    }
    // Of none of them anything is left under the names that PostgreSQL knew.
    let left = left_of(&world, "tenant_").await;
    let of_others = left.iter().filter(|one| !one.contains("acme") && !one.contains("globex"));
    assert_eq!(of_others.collect::<Vec<_>>(), Vec::<&String>::new());
    does(&world, &["leases", "audit", "--settle", "1s"]).await;
}

#[tokio::test]
async fn a_creation_that_is_killed_at_any_step_is_taken_back_whole() {
    let world = not_served().await;
    let gate = Gate::new(&world).await;
    let before = left_of(&world, "tenant").await;
    for step in CREATE {
        let id = format!("undone-{step}");
        gate.kill_at(&world, &["tenant", "create", &id], step).await;
        // And so is what is killed while it is taken back.
        for back in ["leases", "broker", "mount", "database", "roles"] {
            gate.kill_at(&world, &["tenant", "create", &id, "--undo"], back).await;
        }
        fails(&world, &["tenant", "create", &id], "is being taken back").await;
        does(&world, &["tenant", "create", &id, "--undo"]).await;
        assert_eq!(left_of(&world, &id).await, Vec::<String>::new(), "{step}");
        assert_eq!(left_of(&world, "tenant").await, before, "{step}");
        does(&world, &["tenant", "create", &id, "--name", &id]).await;
        does(&world, &["tenant", "delete", &id, "--now", "--confirm", &id]).await;
    }
}

#[tokio::test]
async fn a_removal_that_is_killed_at_any_step_is_finished_by_the_next() {
    let world = served().await;
    let gate = Gate::new(&world).await;
    for step in ["shut", "leases", "lease_roles", "broker", "mount", "database", "roles", "end"] {
        let id = format!("gone-{step}");
        does(&world, &["tenant", "create", &id, "--name", &id]).await;
        let client = session(&world, &id).await.expect("served");
        client.batch_execute("CREATE TABLE kept (id int)").await.expect("written");
        let delete = ["tenant", "delete", &id, "--now", "--confirm", &id];
        gate.kill_at(&world, &delete, step).await;
        session(&world, &id).await.expect_err("it is refused");
        fails(&world, &["tenant", "undelete", &id], "cannot be taken back").await;
        fails(&world, &["tenant", "create", &id], "").await;
        // Nobody has it served again meanwhile, or forgotten.
        for order in [
            "UPDATE pgsilo.tenants SET state = 'active', delete_after = NULL",
            "DELETE FROM pgsilo.tenants",
        ] {
            let order = format!("{order} WHERE id = '{id}'");
            let error = gate.registry.batch_execute(&order).await.expect_err("refused");
            let said = error.as_db_error().expect("PostgreSQL's").message().to_owned();
            assert!(said.contains("has begun"), "{said}");
        }
        does(&world, &["tenant", "purge"]).await;
        assert_eq!(left_of(&world, &id).await, Vec::<String>::new(), "{step}");
        does(&world, &["certificate", "show", &id]).await;
    }
    does(&world, &["leases", "audit", "--settle", "1s"]).await;
}

#[tokio::test]
async fn a_preparation_that_is_killed_is_finished_by_the_next() {
    let world = not_served().await;
    let gate = Gate::new(&world).await;
    for (number, step) in (1..).zip(["database", "roles", "contents", "end"]) {
        let number = number.to_string();
        let prepare = ["tenant", "prepare", "--standby", &number];
        gate.kill_at(&world, &prepare, step).await;
        does(&world, &prepare).await;
        let there = "SELECT count(*) FROM pgsilo.prepared";
        let there: i64 = gate.registry.query_one(there, &[]).await.expect("asked").get(0);
        assert_eq!(there.to_string(), number, "{step}");
    }
    let databases = "SELECT count(*) FROM pg_database WHERE datname ~ '^tenant_[0-9a-f]{16}$'";
    let databases: i64 = gate.registry.query_one(databases, &[]).await.expect("asked").get(0);
    assert_eq!(databases, 4);
    does(&world, &["tenant", "create", "initech"]).await;
    does(&world, &["tenant", "check", "initech"]).await;
}

#[tokio::test]
async fn of_two_with_one_name_none_has_the_others_database() {
    let world = not_served().await;
    let gate = Gate::new(&world).await;
    gate.kill_at(&world, &["tenant", "create", "first", "--name", "one"], "database").await;
    let second = ["tenant", "create", "second", "--name", "one"];
    fails(&world, &second, "").await;
    // Where nothing of it is there yet, the journal alone knows.
    let superuser = world.superuser("postgres").await;
    superuser.batch_execute("DROP DATABASE tenant_one").await.expect("dropped");
    fails(&world, &second, "another that is called so there is being made").await;
    does(&world, &["tenant", "create", "first", "--undo"]).await;
    does(&world, &second).await;
    does(&world, &["tenant", "check", "second"]).await;
}

/// What is left of logins whose commands were killed, and of a token that lasts.
#[tokio::test]
async fn logins_end_with_the_command_also_where_the_token_lasts() {
    let world = not_served().await;
    let path = world.dir().join("lasting.token");
    std::fs::write(&path, world.var("PROVISIONER_BAO_TOKEN")).expect("written");
    let settings = std::fs::read_to_string(world.var("PGSILOCTL_CONFIG")).expect("read");
    let lasting: String = settings
        .lines()
        .map(|line| match line.starts_with("provisioner = ") {
            true => "provisioner = { token_file = \"lasting.token\" }\n".to_owned(),
            false => format!("{line}\n"),
        })
        .collect();
    let file = world.dir().join("lasting.toml");
    std::fs::write(&file, lasting).expect("written");
    let file = file.to_string_lossy();
    does(&world, &["tenant", "create", "initech", "--config", &file]).await;
    does(&world, &["leases", "audit", "--settle", "1s", "--config", &file]).await;
    let superuser = world.superuser("postgres").await;
    eventually("no login to be left", async || {
        let left = "SELECT FROM pg_roles WHERE rolname ~ '^pgsilo_(provisioner|registry)-' AND rolcanlogin";
        superuser.query(left, &[]).await.expect("asked").is_empty().then_some(())
    })
    .await;
}
