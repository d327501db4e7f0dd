-- Where sessions go that only read, and grants that OpenBAO has, too.

-- To the server that takes writes, or to one that replays, if there is one: none said: the former.
ALTER TABLE pgsilo.clusters ADD COLUMN read_only text CHECK (read_only IN ('primary', 'prefer-standby')),
    ADD CHECK (read_only IS DISTINCT FROM 'prefer-standby' OR (cardinality(endpoints) > 1 AND monitor IS NOT NULL));

CREATE OR REPLACE VIEW pgsilo.proxy_clusters AS
    SELECT name::text AS name, revision,
        jsonb_strip_nulls(jsonb_build_object('name', name, 'endpoints', endpoints, 'region', region,
            'tls', nullif(tls, '{}'), 'auth', auth, 'max_sessions', max_sessions, 'monitor', monitor,
            'read_only', read_only)) AS entry
    FROM pgsilo.clusters;

-- It is a policy at OpenBAO, too, for as long as it is in force; or will be, once it is given.
ALTER TABLE pgsilo.grants ADD COLUMN at_openbao boolean NOT NULL DEFAULT false;
