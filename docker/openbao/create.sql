CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE "tenant_TENANT_login";
GRANT "tenant_TENANT_KIND" TO "{{name}}" WITH INHERIT FALSE, SET TRUE;
GRANT "{{name}}" TO "tenant_TENANT_broker" WITH INHERIT TRUE, SET TRUE;
ALTER ROLE "{{name}}" SET role = 'tenant_TENANT_KIND';
