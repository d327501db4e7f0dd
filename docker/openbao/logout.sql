-- How OpenBAO unmakes a login that it made by login.sql or provisioner-login.sql: nobody logs in as it,
-- its sessions end, and it is dropped. It owns nothing.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '{{name}}') THEN
        ALTER ROLE "{{name}}" NOLOGIN;
        GRANT "{{name}}" TO CURRENT_USER WITH INHERIT TRUE;
        PERFORM pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = '{{name}}';
        DROP ROLE "{{name}}";
    END IF;
END $$
