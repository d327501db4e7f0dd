-- Drops a leased role that stop.sql has stopped, in transactions of its own, and up to three that were
-- left earlier. Nothing that objects to that fails it: such a role stays, without a way to log in
-- and without a membership, and is tried again by later revocations and by `pgsiloctl leases audit --fix`.
--
-- No session may outlive its role: nobody but a superuser could end it. InitPostgres asks whether a
-- role may log in after its authentication (InitializeSessionUserId), but pg_stat_activity does not tell
-- whose session it is before the end of that transaction (pgstat_bestart), and a client can put half
-- an hour between the two (post_auth_delay in its startup packet). Until then it shows in pg_locks,
-- as a virtual transaction of a process that shows no role. So a role is dropped when all who were
-- logging in at its stop have come to an end, or are known to be somebody else: pg_terminate_backend,
-- called as the leased role, ends that role's logins and no others. Who has not shown a password by
-- authentication_timeout is gone; later than that, only those who have are asked about.
--
-- OpenBAO lets a tenant's logins wait meanwhile, so nothing here waits for a lock that another tenant
-- can hold: GRANT takes one on the role it names until its transaction ends (shdepLockAndCheckObject).
DO $$
DECLARE
    here CONSTANT oid := (
        SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database());
    broker CONSTANT oid := (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user);
    -- To come back to; the audit has become the broker by SET ROLE.
    usual CONSTANT text := pg_catalog.current_setting('role');
    began CONSTANT timestamptz := pg_catalog.clock_timestamp();
    ripe CONSTANT timestamptz := began - '5 s'::interval
        - pg_catalog.current_setting('authentication_timeout')::interval;
    until CONSTANT timestamptz := began + '2 s'::interval;
    patience timestamptz := began + '1 s'::interval;
    group_roles name[];
    young boolean;
    old boolean;
    victims name[] := ARRAY['{{name}}']::name[];
    victim name;
    id oid;
    since timestamptz;
    looks int;
    holders text[];
    starting text[];
    login text;
    detail text;
    seen boolean;
    ended boolean;
    objects oid[];
    weight bigint;
    named boolean;
    dropped boolean;
    membership record;
BEGIN
    -- Tenants make operators and functions in this database: none of theirs is found.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
    SELECT coalesce(array_agg(r.rolname) FILTER (WHERE r.rolvaliduntil IS NULL), '{}'),
        bool_or(r.rolvaliduntil > ripe AND r.rolvaliduntil <= began AND r.rolname <> '{{name}}'),
        bool_or(r.rolvaliduntil <= ripe)
        INTO group_roles, young, old
        FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid AND m.admin_option
        WHERE m.member = broker AND NOT r.rolcanlogin;
    IF young THEN
        -- Somebody keeps logins waiting: it is known to be in vain, and others wait for this.
        patience := began + '20 ms'::interval;
    END IF;
    IF old THEN
        victims := victims || ARRAY(SELECT older.rolname FROM (
                SELECT r.oid, r.rolname
                    FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid AND m.admin_option
                    WHERE m.member = broker AND NOT r.rolcanlogin AND r.rolvaliduntil <= ripe
                        AND r.rolname <> '{{name}}'
                    ORDER BY random() LIMIT 30) older
            -- What another database grants it, only the audit can take away.
            WHERE NOT EXISTS (SELECT FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass
                AND d.refobjid = older.oid AND d.dbid NOT IN (0, here))
            LIMIT 3);
    END IF;

    FOREACH victim IN ARRAY victims LOOP
        EXIT WHEN victim <> '{{name}}' AND clock_timestamp() > until;
        SELECT oid, rolvaliduntil INTO id, since FROM pg_roles
            WHERE rolname = victim AND NOT rolcanlogin;
        CONTINUE WHEN NOT FOUND;
        -- It is not asked to wait: somebody may be at work with it for as long as he likes.
        CONTINUE WHEN victim <> '{{name}}' AND EXISTS (SELECT FROM pg_locks l
            WHERE l.locktype = 'object' AND l.classid = 'pg_authid'::regclass AND l.objid = id);
        IF NOT (pg_has_role(id, 'SET') AND pg_has_role(id, 'USAGE')) THEN
            BEGIN
                SET LOCAL lock_timeout = '20ms';
                EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT TRUE, SET TRUE
                    GRANTED BY CURRENT_USER', victim);
            EXCEPTION WHEN OTHERS THEN
                RAISE LOG 'the revoked role % stays for now: %', victim, SQLERRM;
                CONTINUE;
            END;
        END IF;

        -- Who is logged in, and who is about to be. Locks first: whoever is in neither list by then
        -- began later, and is refused.
        looks := 0;
        LOOP
            holders := ARRAY(SELECT l.pid || ' ' || l.virtualtransaction FROM pg_locks l
                WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.granted
                    AND l.pid <> pg_backend_pid());
            PERFORM pg_stat_clear_snapshot();
            seen := false;
            FOR login IN SELECT a.pid FROM pg_stat_activity a WHERE a.usesysid = id LOOP
                seen := true;
                BEGIN
                    PERFORM pg_terminate_backend(login::int);
                EXCEPTION WHEN insufficient_privilege THEN NULL;  -- another role's by now
                END;
            END LOOP;
            holders := ARRAY(SELECT h FROM unnest(holders) h
                WHERE NOT EXISTS (SELECT FROM pg_stat_activity a
                    WHERE a.pid = split_part(h, ' ', 1)::int
                        AND (a.usesysid IS NOT NULL OR a.datid IS NOT NULL)));
            IF looks = 0 THEN
                starting := holders;
            ELSE
                -- Whose database is another one is somebody else.
                starting := ARRAY(SELECT h FROM unnest(starting) h
                    WHERE h = ANY (holders) AND NOT EXISTS (SELECT FROM pg_locks d
                        WHERE d.pid = split_part(h, ' ', 1)::int AND d.locktype = 'object'
                            AND d.classid = 'pg_database'::regclass AND d.objid <> here));
            END IF;
            ended := false;
            FOREACH login IN ARRAY starting LOOP
                PERFORM set_config('role', victim, true);
                BEGIN
                    ended := pg_terminate_backend(split_part(login, ' ', 1)::int) OR ended;
                EXCEPTION WHEN insufficient_privilege THEN
                    -- Its role is known (PGPROC->roleId) before it is asked whether that may log in, and is
                    -- another one. Else the detail is about superusers.
                    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
                    IF detail LIKE '%pg_signal_backend%' THEN
                        starting := array_remove(starting, login);
                    END IF;
                END;
                PERFORM set_config('role', usual, true);
            END LOOP;
            EXIT WHEN NOT seen AND starting = '{}';
            EXIT WHEN since < ripe AND NOT seen AND NOT ended;
            EXIT WHEN looks > 0 AND clock_timestamp() > patience;
            looks := looks + 1;
            PERFORM pg_sleep(least(0.002 * looks, 0.05));
        END LOOP;
        CONTINUE WHEN seen OR ended OR (starting <> '{}' AND since > ripe);

        named := EXISTS (SELECT FROM pg_shdepend
            WHERE refclassid = 'pg_authid'::regclass AND refobjid = id);
        weight := 0;
        -- Each object that is dropped takes a place in the lock table, which is the cluster's, until
        -- the end of the transaction. Anybody can make large objects, tens of thousands of them.
        WHILE named LOOP
            objects := ARRAY(SELECT objid FROM pg_shdepend
                WHERE refclassid = 'pg_authid'::regclass AND refobjid = id
                    AND classid = 'pg_largeobject'::regclass AND dbid = here
                    AND deptype = 'o' LIMIT 500);
            EXIT WHEN objects = '{}' OR clock_timestamp() > until;
            BEGIN
                SET LOCAL lock_timeout = '100ms';
                PERFORM lo_unlink(o) FROM unnest(objects) o;
            EXCEPTION WHEN OTHERS THEN
                RAISE LOG 'the large objects of % stay for now: %', victim, SQLERRM;
                EXIT;
            END;
            COMMIT;
        END LOOP;
        IF named THEN
            WITH RECURSIVE gone AS (
                SELECT classid, objid FROM pg_shdepend
                    WHERE refclassid = 'pg_authid'::regclass AND refobjid = id AND dbid IN (0, here)
                UNION
                SELECT d.classid, d.objid FROM pg_depend d
                    JOIN gone g ON d.refclassid = g.classid AND d.refobjid = g.objid
            ) SELECT count(*) INTO weight FROM (SELECT FROM gone LIMIT 2000) g;
        END IF;

        dropped := false;
        IF weight < 2000 AND NOT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'object'
                AND l.classid = 'pg_authid'::regclass AND l.objid = id
                AND l.pid <> pg_backend_pid()) THEN
            BEGIN
                SET LOCAL lock_timeout = '100ms';
                IF weight > 0 THEN
                    -- What the tenant's own roles have granted it, only they take away.
                    FOREACH login IN ARRAY group_roles LOOP
                        EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT TRUE
                            GRANTED BY CURRENT_USER', login);
                    END LOOP;
                    EXECUTE format('DROP OWNED BY %I CASCADE', victim);
                    FOREACH login IN ARRAY group_roles LOOP
                        EXECUTE format('REVOKE %I FROM CURRENT_USER GRANTED BY CURRENT_USER', login);
                    END LOOP;
                END IF;
                EXECUTE format('DROP ROLE %I', victim);
                dropped := true;
            EXCEPTION WHEN OTHERS THEN
                RAISE LOG 'the revoked role % stays for now: %', victim, SQLERRM;
            END;
        END IF;
        IF NOT dropped THEN
            -- PostgreSQL looks through all that the broker and the tenant's roles have to do with at
            -- each statement about a role: those that stay must not make new ones slower.
            BEGIN
                SET LOCAL lock_timeout = '20ms';
                FOR membership IN SELECT g.rolname AS granted, m.rolname AS member
                        FROM pg_auth_members a JOIN pg_roles g ON g.oid = a.roleid
                            JOIN pg_roles m ON m.oid = a.member
                        WHERE a.grantor = broker AND (a.member = id OR a.roleid = id) LOOP
                    EXECUTE format('REVOKE %I FROM %I GRANTED BY CURRENT_USER',
                        membership.granted, membership.member);
                END LOOP;
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END IF;
        COMMIT;
    END LOOP;
END $$
