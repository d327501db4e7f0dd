-- Clusters of several servers, and OpenBAO's connections, which follow their primary.

-- With what the servers are watched: {"mount": "...", "role": "...", "connection": "...", "dbname": "..."}; none: they are not.
ALTER TABLE pgsilo.clusters ADD COLUMN monitor jsonb
    CHECK (jsonb_typeof(monitor) = 'object' AND monitor ? 'mount' AND monitor ? 'role');

-- Sessions of all its tenants at once, for each proxy, which keep to it now.
ALTER TABLE pgsilo.clusters DROP CONSTRAINT clusters_max_sessions_check,
    ADD CHECK (max_sessions > 0);

-- What OpenBAO calls its connection to the database; none: "tenant-" and the tenant's id.
ALTER TABLE pgsilo.placements ADD COLUMN connection text CHECK (connection <> '');

CREATE OR REPLACE VIEW pgsilo.proxy_clusters AS
    SELECT name::text AS name, revision,
        jsonb_strip_nulls(jsonb_build_object('name', name, 'endpoints', endpoints, 'region', region,
            'tls', nullif(tls, '{}'), 'auth', auth, 'max_sessions', max_sessions, 'monitor', monitor)) AS entry
    FROM pgsilo.clusters;

CREATE OR REPLACE VIEW pgsilo.proxy_tenants AS
    SELECT t.id::text AS id, t.revision,
        jsonb_strip_nulls(jsonb_build_object(
            'id', t.id,
            'state', t.state,
            'aliases', (SELECT jsonb_agg(a.alias ORDER BY a.alias) FROM pgsilo.aliases a WHERE a.tenant = t.id),
            'database_names', t.database_names,
            'regions', t.regions,
            'limits', t.limits,
            'placement', jsonb_build_object('cluster', p.cluster, 'dbname', p.dbname, 'seal', p.seal),
            'lease', jsonb_build_object('mount', p.mount, 'connection', p.connection, 'roles', p.roles)
        )) AS entry,
        (SELECT coalesce(jsonb_agg(jsonb_build_object('certificate', b.certificate, 'tenant', b.tenant, 'access', b.access)
                ORDER BY b.certificate), '[]') FROM pgsilo.bindings b WHERE b.tenant = t.id) AS bindings
    FROM pgsilo.tenants t JOIN pgsilo.placements p ON p.tenant = t.id;
