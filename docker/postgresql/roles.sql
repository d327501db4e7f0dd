-- A tenant's roles, made by the provisioner in any database; TENANT stands for the tenant's id. May be run
-- again. The broker has no password yet: whoever tells OpenBAO of it gives it one.
DO $$
DECLARE
    role record;
BEGIN
    FOR role IN SELECT * FROM (VALUES
        ('tenant_TENANT_app', 'NOLOGIN'),               -- owns what the tenant makes
        ('tenant_TENANT_ro', 'NOLOGIN'),                -- may read it
        ('tenant_TENANT_login', 'NOLOGIN'),             -- may connect, nothing else: every leased role is in it
        ('tenant_TENANT_broker', 'LOGIN CREATEROLE')    -- what OpenBAO logs in as
    ) AS roles (name, attributes) LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role.name) THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I %s', role.name, role.attributes);
        END IF;
    END LOOP;
END $$;
-- The broker works inside a database where the tenant may make functions: it must never find one
-- of those by an unqualified name.
ALTER ROLE "tenant_TENANT_broker" SET search_path = pg_catalog, pg_temp;
GRANT "tenant_TENANT_app", "tenant_TENANT_ro", "tenant_TENANT_login" TO "tenant_TENANT_broker"
    WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
-- It gets in when the cluster's connections are used up, or nothing could be revoked then.
GRANT pg_use_reserved_connections TO "tenant_TENANT_broker" WITH INHERIT TRUE, SET FALSE;
