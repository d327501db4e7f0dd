-- Drops a login of pgsilo's own (login.sql, provisioner-login.sql) that stop.sql has stopped, and those that
-- were left earlier. Nothing that objects to that fails it: any tenant of the cluster can grant such a role
-- something, and so keep it. It stays then, without a way to log in, and is tried again by later ones. Not
-- drop.sql: that asks as the role whose a session is, and the provisioner may end everybody's.
DO $$
DECLARE
    victim pg_catalog.name;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
    FOR victim IN SELECT r.rolname FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid AND m.admin_option
            WHERE m.member = current_user::regrole AND NOT r.rolcanlogin
                AND r.rolvaliduntil <= clock_timestamp()
            ORDER BY r.rolname <> '{{name}}', random() LIMIT 10 LOOP
        BEGIN
            SET LOCAL lock_timeout = '100ms';
            EXECUTE format('DROP ROLE %I', victim);
        EXCEPTION WHEN OTHERS THEN
            RAISE LOG 'the login % stays for now: %', victim, SQLERRM;
        END;
    END LOOP;
END $$
