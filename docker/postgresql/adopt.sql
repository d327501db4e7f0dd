-- What a template of the operator's brings into a tenant's database, run there by the provisioner; TENANT
-- stands for what PostgreSQL calls the tenant. What is pgsilo_template_owner's becomes the tenant's own.
-- May be run again.
BEGIN;
SET LOCAL lock_timeout = '2s';
DO $$
DECLARE
    database name := (SELECT datname FROM pg_catalog.pg_database
        WHERE datdba = 'pgsilo_template_owner'::pg_catalog.regrole LIMIT 1);
BEGIN
    -- REASSIGN OWNED would give the tenant that, too.
    IF database IS NOT NULL THEN
        RAISE 'database % belongs to pgsilo_template_owner: give it another owner', database;
    END IF;
END $$;
GRANT "tenant_TENANT_app", pgsilo_template_owner TO CURRENT_USER WITH INHERIT TRUE, SET TRUE;
-- Schemas first: an object's new owner must be let in.
DO $$
DECLARE
    schema name;
BEGIN
    FOR schema IN SELECT nspname FROM pg_catalog.pg_namespace
            WHERE nspowner = 'pgsilo_template_owner'::pg_catalog.regrole LOOP
        EXECUTE pg_catalog.format('ALTER SCHEMA %I OWNER TO "tenant_TENANT_app"', schema);
    END LOOP;
END $$;
REASSIGN OWNED BY pgsilo_template_owner TO "tenant_TENANT_app";
-- And what it was granted here.
DROP OWNED BY pgsilo_template_owner;
SET LOCAL ROLE "tenant_TENANT_app";
DO $$
DECLARE
    schema name;
BEGIN
    -- As what will be made: its read-only role may read it.
    FOR schema IN SELECT DISTINCT n.nspname FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relowner = 'tenant_TENANT_app'::pg_catalog.regrole AND n.nspname !~ '^pg_' LOOP
        EXECUTE pg_catalog.format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO "tenant_TENANT_ro"', schema);
        EXECUTE pg_catalog.format('GRANT SELECT ON ALL SEQUENCES IN SCHEMA %I TO "tenant_TENANT_ro"', schema);
    END LOOP;
    FOR schema IN SELECT nspname FROM pg_catalog.pg_namespace
            WHERE nspowner = 'tenant_TENANT_app'::pg_catalog.regrole LOOP
        EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA %I TO "tenant_TENANT_ro"', schema);
    END LOOP;
END $$;
RESET ROLE;
REVOKE "tenant_TENANT_app", pgsilo_template_owner FROM CURRENT_USER;
COMMIT;
