-- What is in a tenant's database, made there by the provisioner, which owns it; TENANT stands for the
-- tenant's id. May be run again.
--
-- Only the tenant's own role can say what others may do with its tables, and only who may become
-- the broker can give it a function: so the provisioner joins both for this one transaction.
BEGIN;
-- Whoever uses what is made here is waited for no longer: meanwhile nobody new is let in.
SET LOCAL lock_timeout = '2s';
GRANT "tenant_TENANT_app", "tenant_TENANT_broker" TO CURRENT_USER WITH INHERIT TRUE, SET TRUE;

-- Schema public is the tenant's, and its read-only role sees what will be made.
DO $$
BEGIN
    -- The tenant may have dropped or renamed it.
    IF EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'public') THEN
        ALTER SCHEMA public OWNER TO "tenant_TENANT_app";
        SET LOCAL ROLE "tenant_TENANT_app";
        GRANT USAGE ON SCHEMA public TO "tenant_TENANT_ro";
    END IF;
END $$;
SET LOCAL ROLE "tenant_TENANT_app";
ALTER DEFAULT PRIVILEGES GRANT USAGE ON SCHEMAS TO "tenant_TENANT_ro";
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO "tenant_TENANT_ro";
ALTER DEFAULT PRIVILEGES GRANT SELECT ON SEQUENCES TO "tenant_TENANT_ro";
RESET ROLE;

-- Each session has a role of its own, so PostgreSQL lets none see, cancel or end another by SQL. These
-- functions do, for the tenant's own sessions. They are the broker's: it is a member of
-- each leased role of this tenant and of no other, so PostgreSQL itself refuses it every other session,
-- whatever is asked here, and whosever a pid has become meanwhile. They leave out the broker's own
-- sessions, and from a session that only reads, all that may write. The schema is the provisioner's.
DO $$
BEGIN
    -- A database that was copied from another tenant's has that one's.
    IF EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname = 'pgsilo' AND pg_catalog.pg_get_userbyid(n.nspowner) = current_user
                AND pg_catalog.pg_get_userbyid(p.proowner) <> 'tenant_TENANT_broker') THEN
        DROP SCHEMA pgsilo CASCADE;
    END IF;
END $$;
CREATE SCHEMA IF NOT EXISTS pgsilo;
-- Looked at behind that: the tenant may make one of its own at any moment before.
DO $$
BEGIN
    IF (SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace
            WHERE nspname = 'pgsilo') <> current_user THEN
        RAISE 'schema pgsilo is the tenant''s own: have it renamed first';
    END IF;
END $$;
GRANT USAGE, CREATE ON SCHEMA pgsilo TO "tenant_TENANT_broker";
GRANT USAGE ON SCHEMA pgsilo TO "tenant_TENANT_app", "tenant_TENANT_ro", "tenant_TENANT_login";

CREATE OR REPLACE FUNCTION pgsilo.sessions() RETURNS SETOF pg_catalog.pg_stat_activity
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT a.* FROM pg_stat_activity a
        WHERE a.datname = current_database() AND a.usename <> current_user
            AND pg_has_role(a.usesysid, 'USAGE')
            AND (pg_has_role(session_user, 'tenant_TENANT_app'::name, 'MEMBER')
                OR NOT pg_has_role(a.usesysid, 'tenant_TENANT_app'::name, 'MEMBER'));
END $$;

-- Fails and warns as PostgreSQL does.
CREATE OR REPLACE FUNCTION pgsilo.may_signal(pid integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- What this transaction has seen of sessions may be old.
    PERFORM pg_stat_clear_snapshot();
    IF EXISTS (SELECT FROM pgsilo.sessions() s WHERE s.pid = may_signal.pid) THEN
        RETURN true;
    ELSIF EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = may_signal.pid) THEN
        RAISE insufficient_privilege USING MESSAGE = 'permission denied to signal process',
            DETAIL = 'It is no session of this tenant, or one that may do more than this one.';
    END IF;
    RAISE WARNING 'PID % is not a PostgreSQL backend process', pid;
    RETURN false;
END $$;

CREATE OR REPLACE FUNCTION pgsilo.pg_cancel_backend(pid integer) RETURNS boolean
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pgsilo.may_signal(pid) THEN
        RETURN false;
    END IF;
    RETURN pg_catalog.pg_cancel_backend(pid);
END $$;

CREATE OR REPLACE FUNCTION pgsilo.pg_terminate_backend(pid integer, timeout bigint DEFAULT 0) RETURNS boolean
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pgsilo.may_signal(pid) THEN
        RETURN false;
    END IF;
    RETURN pg_catalog.pg_terminate_backend(pid, timeout);
END $$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pgsilo FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgsilo.sessions(), pgsilo.pg_cancel_backend(integer),
    pgsilo.pg_terminate_backend(integer, bigint)
    TO "tenant_TENANT_app", "tenant_TENANT_ro", "tenant_TENANT_login";
ALTER FUNCTION pgsilo.sessions() OWNER TO "tenant_TENANT_broker";
ALTER FUNCTION pgsilo.may_signal(integer) OWNER TO "tenant_TENANT_broker";
ALTER FUNCTION pgsilo.pg_cancel_backend(integer) OWNER TO "tenant_TENANT_broker";
ALTER FUNCTION pgsilo.pg_terminate_backend(integer, bigint) OWNER TO "tenant_TENANT_broker";
REVOKE CREATE ON SCHEMA pgsilo FROM "tenant_TENANT_broker";

-- Its columns are the server's, and another major version has others. To make it anew would wait for
-- every transaction that has read it.
DO $$
BEGIN
    IF ARRAY(SELECT attname FROM pg_catalog.pg_attribute WHERE attnum > 0 AND NOT attisdropped
                AND attrelid = pg_catalog.to_regclass('pgsilo.pg_stat_activity') ORDER BY attnum)
            <> ARRAY(SELECT attname FROM pg_catalog.pg_attribute WHERE attnum > 0 AND NOT attisdropped
                AND attrelid = 'pg_catalog.pg_stat_activity'::pg_catalog.regclass ORDER BY attnum) THEN
        DROP VIEW IF EXISTS pgsilo.pg_stat_activity;
        CREATE VIEW pgsilo.pg_stat_activity AS SELECT * FROM pgsilo.sessions();
    END IF;
END $$;
GRANT SELECT ON pgsilo.pg_stat_activity TO "tenant_TENANT_app", "tenant_TENANT_ro", "tenant_TENANT_login";

REVOKE "tenant_TENANT_app", "tenant_TENANT_broker" FROM CURRENT_USER;
COMMIT;
