-- What tenants' databases are made from, run once for each cluster by a superuser, in the database
-- pgsilo_template (docs/setup.md, "PostgreSQL"). It takes from PUBLIC what lets a session with no
-- rights at all use up what is the whole cluster's: advisory locks fill the lock table, which nobody
-- can log in without; large objects make a role that cannot be dropped in one transaction; messages
-- for logical decoding write WAL without an end. The provisioner may give them to a tenant
-- whose applications need them. Functions that only let go are everybody's.
DO $$
DECLARE
  function pg_catalog.regprocedure;
BEGIN
  FOR function IN
    SELECT oid FROM pg_catalog.pg_proc
    WHERE pronamespace = 'pg_catalog'::pg_catalog.regnamespace
      AND (proname ~ '^pg_(try_)?advisory_(xact_)?lock'
        OR proname IN ('lo_creat', 'lo_create', 'lo_from_bytea', 'lo_import', 'pg_logical_emit_message'))
  LOOP
    EXECUTE pg_catalog.format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
    CONTINUE WHEN function::pg_catalog.text LIKE '%lo_import(%';  -- reads the server's own files
    EXECUTE pg_catalog.format(
      'GRANT EXECUTE ON FUNCTION %s TO pgsilo_provisioner WITH GRANT OPTION', function);
  END LOOP;
END $$;
