-- What a cluster needs once, before tenants are made in it; run by a superuser in database postgres
-- (`pgsiloctl bootstrap cluster`). May be run again.
DO $$
DECLARE
    role record;
BEGIN
    FOR role IN SELECT * FROM (VALUES
        ('pgsilo_provisioner', ''),             -- makes tenants, owns their databases; nobody logs in as it
        ('pgsilo_provisioner_broker', 'LOGIN'), -- what OpenBAO logs in as, to make logins that become it
        ('pgsilo_monitor', ''),                 -- may connect, nothing else: says what a server is
        ('pgsilo_monitor_broker', 'LOGIN'),     -- what OpenBAO logs in as, to make members of it
        ('pgsilo_template_owner', '')           -- what it owns in a template is the tenant's in its database
    ) AS roles (name, attributes) LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role.name) THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I %s', role.name, role.attributes);
        END IF;
    END LOOP;
END $$;
-- A password that it had from before works no longer.
ALTER ROLE pgsilo_provisioner NOLOGIN PASSWORD NULL
    NOSUPERUSER CREATEDB CREATEROLE NOREPLICATION NOBYPASSRLS;
ALTER ROLE pgsilo_monitor NOLOGIN PASSWORD NULL
    NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
ALTER ROLE pgsilo_template_owner NOLOGIN PASSWORD NULL
    NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
ALTER ROLE pgsilo_provisioner_broker LOGIN
    NOSUPERUSER NOCREATEDB CREATEROLE NOREPLICATION NOBYPASSRLS;
ALTER ROLE pgsilo_monitor_broker LOGIN
    NOSUPERUSER NOCREATEDB CREATEROLE NOREPLICATION NOBYPASSRLS;
ALTER ROLE pgsilo_provisioner SET search_path = pg_catalog, pg_temp;
ALTER ROLE pgsilo_provisioner_broker SET search_path = pg_catalog, pg_temp;
ALTER ROLE pgsilo_monitor_broker SET search_path = pg_catalog, pg_temp;

-- The seal; and, where PostgreSQL makes verifiers of leased passwords (hashing.sql), what keeps them out of
-- the server's log.
GRANT SET ON PARAMETER pgsilo.tenant, log_statement, log_min_error_statement, log_min_duration_statement,
    log_min_duration_sample, log_transaction_sample_rate, log_duration TO pgsilo_provisioner;
-- It gets in, and lets brokers in, when the cluster's connections are used up.
GRANT pg_use_reserved_connections TO pgsilo_provisioner WITH ADMIN TRUE;
-- For the audit: to end a session whose role is gone.
GRANT pg_signal_backend TO pgsilo_provisioner;
GRANT pgsilo_provisioner TO pgsilo_provisioner_broker WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
GRANT pg_use_reserved_connections TO pgsilo_provisioner_broker WITH ADMIN TRUE, INHERIT TRUE, SET FALSE;
GRANT pgsilo_template_owner TO pgsilo_provisioner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
GRANT pgsilo_monitor TO pgsilo_monitor_broker WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;

-- No way in for PUBLIC.
REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE postgres
    TO pgsilo_provisioner, pgsilo_provisioner_broker, pgsilo_monitor, pgsilo_monitor_broker;
