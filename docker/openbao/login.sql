CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';
GRANT GROUP TO "{{name}}" WITH INHERIT TRUE, SET TRUE;
