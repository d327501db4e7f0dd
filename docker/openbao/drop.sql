-- Drops a leased role that stop.sql has stopped, in transactions of its own, and up to three that were
-- left earlier. Nothing that objects to that fails it: such a role stays, without a way to log in,
-- and is tried again by later revocations and by `pgsiloctl leases audit --fix`.
--
-- No session may outlive its role: nobody but a superuser could end it. InitPostgres asks whether a
-- role may log in after its authentication (InitializeSessionUserId), but pg_stat_activity does not tell
-- whose session it is before the end of that transaction (pgstat_bestart), and a client can put half
-- an hour between the two (post_auth_delay in its startup packet). Until then it shows in pg_locks,
-- as a virtual transaction of nobody's. So a role is dropped when all who were logging in at its stop
-- have come to an end, or are known to be somebody else: pg_terminate_backend, called as the leased
-- role, ends that role's logins and no others. Who has not shown a password by authentication_timeout
-- is gone; later than that, only those who have are asked about.
DO $$
DECLARE
    here CONSTANT oid := (
        SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database());
    broker CONSTANT name := current_user;
    -- To come back to; the audit has become the broker by SET ROLE.
    usual CONSTANT text := pg_catalog.current_setting('role');
    ripe CONSTANT timestamptz := pg_catalog.clock_timestamp() - '5 s'::interval
        - pg_catalog.current_setting('authentication_timeout')::interval;
    until CONSTANT timestamptz := pg_catalog.clock_timestamp() + '2 s'::interval;
    patience timestamptz := pg_catalog.clock_timestamp() + '1 s'::interval;
    victims name[];
    victim name;
    id oid;
    since timestamptz;
    holders text[];
    starting text[];
    login text;
    seen boolean;
    ended boolean;
    objects oid[];
    weight bigint;
    group_role name;
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r
            JOIN pg_catalog.pg_auth_members m ON m.roleid = r.oid AND m.admin_option
            JOIN pg_catalog.pg_roles b ON b.oid = m.member AND b.rolname = broker
            WHERE NOT r.rolcanlogin AND r.rolvaliduntil > ripe AND r.rolname <> '{{name}}') THEN
        -- Somebody keeps logins waiting: it is known to be in vain, and others wait for this.
        patience := pg_catalog.clock_timestamp() + '20 ms'::interval;
    END IF;
    victims := ARRAY['{{name}}']::name[] || ARRAY(
        SELECT r.rolname FROM pg_catalog.pg_roles r
            JOIN pg_catalog.pg_auth_members m ON m.roleid = r.oid AND m.admin_option
            JOIN pg_catalog.pg_roles b ON b.oid = m.member AND b.rolname = broker
        WHERE NOT r.rolcanlogin AND r.rolvaliduntil < ripe AND r.rolname <> '{{name}}'
            -- What another database grants it, only the audit can take away.
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_shdepend d
                WHERE d.refclassid = 'pg_catalog.pg_authid'::regclass AND d.refobjid = r.oid
                    AND d.dbid NOT IN (0, here))
        ORDER BY pg_catalog.random() LIMIT 3);

    FOREACH victim IN ARRAY victims LOOP
        SELECT oid, rolvaliduntil INTO id, since FROM pg_catalog.pg_roles
            WHERE rolname = victim AND NOT rolcanlogin;
        CONTINUE WHEN NOT FOUND;

        -- Who is logged in, and who is about to be. Locks first: who is in none of both by then
        -- began later, and is refused.
        starting := NULL;
        LOOP
            holders := ARRAY(SELECT l.pid || ' ' || l.virtualtransaction FROM pg_catalog.pg_locks l
                WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.granted
                    AND l.pid <> pg_catalog.pg_backend_pid());
            PERFORM pg_catalog.pg_stat_clear_snapshot();
            PERFORM pg_catalog.pg_terminate_backend(pid)
                FROM pg_catalog.pg_stat_activity WHERE usesysid = id;
            seen := FOUND;
            ended := false;
            holders := ARRAY(SELECT h FROM pg_catalog.unnest(holders) h
                WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a
                    WHERE a.pid = pg_catalog.split_part(h, ' ', 1)::int
                        AND (a.usesysid IS NOT NULL OR a.datid IS NOT NULL)));
            IF starting IS NULL THEN
                starting := holders;
            ELSE
                -- Whose database is another one is somebody else.
                starting := ARRAY(SELECT h FROM pg_catalog.unnest(starting) h
                    WHERE h = ANY (holders) AND NOT EXISTS (SELECT FROM pg_catalog.pg_locks d
                        WHERE d.pid = pg_catalog.split_part(h, ' ', 1)::int AND d.locktype = 'object'
                            AND d.classid = 'pg_catalog.pg_database'::regclass AND d.objid <> here));
                FOREACH login IN ARRAY starting LOOP
                    BEGIN
                        PERFORM pg_catalog.set_config('role', victim, true);
                        ended := pg_catalog.pg_terminate_backend(
                            pg_catalog.split_part(login, ' ', 1)::int) OR ended;
                    EXCEPTION WHEN insufficient_privilege THEN NULL;
                    END;
                    PERFORM pg_catalog.set_config('role', usual, true);
                END LOOP;
                EXIT WHEN since < ripe AND NOT seen AND NOT ended;
            END IF;
            EXIT WHEN (NOT seen AND starting = '{}') OR pg_catalog.clock_timestamp() > patience;
            PERFORM pg_catalog.pg_sleep(0.005);
        END LOOP;
        CONTINUE WHEN seen OR ended OR (starting <> '{}' AND since > ripe);

        -- Each object that is dropped takes a place in the lock table, which is the cluster's, until
        -- the end of the transaction. Anybody can make large objects, tens of thousands of them.
        LOOP
            objects := ARRAY(SELECT objid FROM pg_catalog.pg_shdepend
                WHERE refclassid = 'pg_catalog.pg_authid'::regclass AND refobjid = id
                    AND classid = 'pg_catalog.pg_largeobject'::regclass AND dbid = here
                    AND deptype = 'o' LIMIT 500);
            EXIT WHEN objects = '{}' OR pg_catalog.clock_timestamp() > until;
            BEGIN
                SET LOCAL lock_timeout = '500ms';
                PERFORM pg_catalog.lo_unlink(o) FROM pg_catalog.unnest(objects) o;
            EXCEPTION WHEN OTHERS THEN
                RAISE LOG 'the large objects of % stay for now: %', victim, SQLERRM;
                EXIT;
            END;
            COMMIT;
        END LOOP;
        WITH RECURSIVE gone AS (
            SELECT classid, objid FROM pg_catalog.pg_shdepend
                WHERE refclassid = 'pg_catalog.pg_authid'::regclass AND refobjid = id
                    AND dbid IN (0, here)
            UNION
            SELECT d.classid, d.objid FROM pg_catalog.pg_depend d
                JOIN gone g ON d.refclassid = g.classid AND d.refobjid = g.objid
        ) SELECT pg_catalog.count(*) INTO weight FROM (SELECT FROM gone LIMIT 2000) g;
        CONTINUE WHEN weight = 2000;

        BEGIN
            SET LOCAL lock_timeout = '500ms';
            IF weight > 0 THEN
                -- What the tenant's own roles have granted it, only they take away.
                FOR group_role IN SELECT r.rolname FROM pg_catalog.pg_roles r
                        JOIN pg_catalog.pg_auth_members m ON m.roleid = r.oid AND m.admin_option
                        JOIN pg_catalog.pg_roles b ON b.oid = m.member AND b.rolname = broker
                        WHERE NOT r.rolcanlogin AND r.rolvaliduntil IS NULL LOOP
                    EXECUTE pg_catalog.format('GRANT %I TO %I WITH INHERIT TRUE GRANTED BY %2$I',
                        group_role, broker);
                END LOOP;
                EXECUTE pg_catalog.format('DROP OWNED BY %I CASCADE', victim);
                FOR group_role IN SELECT r.rolname FROM pg_catalog.pg_roles r
                        JOIN pg_catalog.pg_auth_members m ON m.roleid = r.oid
                        JOIN pg_catalog.pg_roles b ON b.oid = m.member AND b.rolname = broker
                        WHERE NOT r.rolcanlogin AND r.rolvaliduntil IS NULL
                            AND m.grantor = b.oid LOOP
                    EXECUTE pg_catalog.format('REVOKE %I FROM %I GRANTED BY %2$I',
                        group_role, broker);
                END LOOP;
            END IF;
            EXECUTE pg_catalog.format('DROP ROLE %I', victim);
        EXCEPTION WHEN OTHERS THEN
            RAISE LOG 'the revoked role % stays for now: %', victim, SQLERRM;
        END;
        COMMIT;
    END LOOP;
END $$
