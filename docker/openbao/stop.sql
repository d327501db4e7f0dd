-- What ends a leased role's use, whatever becomes of the role itself: nobody logs in as it from its
-- COMMIT on. The first of four revocation_statements: this, COMMIT, drop.sql, BEGIN.
-- VALID UNTIL says when that was; drop.sql and `pgsiloctl leases audit` count from it. A role that is
-- gone is no failure: a lease whose revocation can never work would stay for ever.
DO $$
DECLARE
    stopped boolean := NOT EXISTS (
        SELECT FROM pg_catalog.pg_roles WHERE rolname = '{{name}}' AND rolcanlogin);
BEGIN
    -- A session may hold its role's row, and ALTER ROLE would wait for it in vain: those end first.
    -- Who hammers logins may take the row in between, so it is tried again at once.
    FOR attempt IN 1..30 LOOP
        PERFORM pg_catalog.pg_stat_clear_snapshot();
        PERFORM pg_catalog.pg_terminate_backend(pid)
            FROM pg_catalog.pg_stat_activity WHERE usename = '{{name}}';
        EXIT WHEN stopped;
        BEGIN
            SET LOCAL lock_timeout = '100ms';
            EXECUTE pg_catalog.format('ALTER ROLE %I NOLOGIN PASSWORD NULL VALID UNTIL %L',
                '{{name}}', pg_catalog.clock_timestamp());
            stopped := true;
        EXCEPTION WHEN lock_not_available THEN NULL;
        END;
    END LOOP;
    IF NOT stopped THEN
        RAISE lock_not_available USING MESSAGE = 'somebody holds the row of the leased role';
    END IF;
END $$
