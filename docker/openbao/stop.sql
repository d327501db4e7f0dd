-- What ends a leased role's use, whatever becomes of the role itself: nobody logs in as it from its
-- COMMIT on. The first of four revocation_statements: this, COMMIT, drop.sql, BEGIN.
-- VALID UNTIL says when that was; drop.sql and `pgsiloctl leases audit` count from it. A role that is
-- gone is no failure: a lease whose revocation can never work would stay for ever.
DO $$
DECLARE
    stopped boolean := NOT EXISTS (
        SELECT FROM pg_catalog.pg_roles WHERE rolname = '{{name}}' AND rolcanlogin);
    session pg_catalog.int4;
BEGIN
    -- Tenants make operators and functions in this database: none of theirs is found.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
    -- Its sessions may hold the role's row, or change it meanwhile (ALTER ROLE CURRENT_USER PASSWORD),
    -- which fails this ALTER ROLE as "tuple concurrently updated": so they end first, and whatever it
    -- fails with, it is tried again.
    FOR attempt IN 1..30 LOOP
        PERFORM pg_catalog.pg_stat_clear_snapshot();
        FOR session IN SELECT pid FROM pg_catalog.pg_stat_activity WHERE usename = '{{name}}' LOOP
            BEGIN
                PERFORM pg_catalog.pg_terminate_backend(session);
            EXCEPTION WHEN insufficient_privilege THEN NULL;  -- another role's by now
            END;
        END LOOP;
        EXIT WHEN stopped;
        BEGIN
            SET LOCAL lock_timeout = '100ms';
            EXECUTE pg_catalog.format('ALTER ROLE %I NOLOGIN PASSWORD NULL VALID UNTIL %L',
                '{{name}}', pg_catalog.clock_timestamp());
            stopped := true;
        EXCEPTION WHEN OTHERS THEN
            IF attempt = 30 THEN
                RAISE;
            END IF;
            PERFORM pg_catalog.pg_sleep(0.002 * attempt);
        END;
    END LOOP;
END $$
