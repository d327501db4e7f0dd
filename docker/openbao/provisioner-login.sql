CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';
GRANT pgsilo_provisioner TO "{{name}}" WITH INHERIT TRUE, SET TRUE;
GRANT pg_use_reserved_connections TO "{{name}}" WITH INHERIT TRUE, SET FALSE;
GRANT "{{name}}" TO CURRENT_USER WITH INHERIT TRUE, SET TRUE;
ALTER ROLE "{{name}}" SET role = 'pgsilo_provisioner';
