-- The registry's first version. Run once, as the schema's owner, in one transaction, with search_path =
-- pg_catalog, pg_temp: so every name of the registry's own is written with its schema.
--
-- Triggers' plans are kept for as long as a session lives: without sequential scans, so that none that was
-- made while a table was small walks a large one.
--
-- Who may do what: the owner (nobody logs in as it) owns all of this; `control` may read everything, and
-- write the tables of what there is; `proxy` may read the views whose names begin with proxy_.

-- What the proxy takes for a tenant's id.
CREATE DOMAIN pgsilo.tenant_id AS text
    CHECK (VALUE ~ '^[a-z0-9][a-z0-9_-]{0,48}$');
-- A cluster's name, a region's: what an operator types.
CREATE DOMAIN pgsilo.label AS text
    CHECK (VALUE ~ '^[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$');
-- One line that may be shown: no controls, not empty.
CREATE DOMAIN pgsilo.line AS text
    CHECK (VALUE !~ '[[:cntrl:]]' AND length(VALUE) BETWEEN 1 AND 1024);
CREATE DOMAIN pgsilo.access AS text
    CHECK (VALUE IN ('read-write', 'read-only', 'migrate'));

-- ---------------------------------------------------------------------------------------------------------
-- The revision: one row. Who writes raises it and holds its lock until the end of the transaction: so
-- revisions become visible in their order, and who has read up to one has missed nothing before it. (A
-- sequence's values become visible in any order.)

CREATE TABLE pgsilo.revision (
    is_only_row boolean PRIMARY KEY DEFAULT true CHECK (is_only_row),
    revision bigint NOT NULL,
    raised_by xid8 NOT NULL,
    raised_at timestamptz NOT NULL,
    -- What is gone since before this revision is not told any more: who has read less reads everything.
    forgotten bigint NOT NULL DEFAULT 0
);
INSERT INTO pgsilo.revision (revision, raised_by, raised_at)
    VALUES (1, pg_current_xact_id(), clock_timestamp());

-- A mark for each revision: after a restore, or a failover that lost the newest, the same number is
-- another revision, and who has read the one that is lost finds another mark there, or none.
CREATE TABLE pgsilo.history (
    revision bigint PRIMARY KEY,
    mark uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO pgsilo.history (revision) VALUES (1);

-- What there was: who has read the row reads here that it is gone.
CREATE TABLE pgsilo.tombstones (
    kind text NOT NULL,
    key text NOT NULL,
    revision bigint NOT NULL,
    PRIMARY KEY (kind, key)
);
CREATE INDEX tombstones_by_revision ON pgsilo.tombstones (revision);

CREATE FUNCTION pgsilo.raise_revision() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    raised bigint;
BEGIN
    UPDATE pgsilo.revision
        SET revision = revision + 1, raised_by = pg_current_xact_id(), raised_at = clock_timestamp()
        WHERE raised_by <> pg_current_xact_id()
        RETURNING revision INTO raised;
    IF FOUND THEN
        INSERT INTO pgsilo.history (revision) VALUES (raised);
        PERFORM pg_notify('pgsilo_registry', raised::text);
        IF raised % 1000 = 0 THEN
            DELETE FROM pgsilo.tombstones WHERE revision < raised - 100000;
            DELETE FROM pgsilo.history WHERE revision < raised - 100000;
            UPDATE pgsilo.revision SET forgotten = greatest(forgotten, raised - 100000);
        END IF;
    ELSE
        SELECT revision INTO STRICT raised FROM pgsilo.revision;
    END IF;
    RETURN raised;
END $$;

-- ---------------------------------------------------------------------------------------------------------
-- What there is.

CREATE TABLE pgsilo.clusters (
    name pgsilo.label PRIMARY KEY,
    region pgsilo.label,
    -- Servers of one cluster, the usual primary first: "db1.internal:5432", or one Unix socket's path.
    -- Each in one spelling, so that two are not taken for different ones.
    endpoints text[] NOT NULL CHECK (cardinality(endpoints) BETWEEN 1 AND 16 AND array_position(endpoints, NULL) IS NULL
        AND array_to_string(endpoints, ' ') !~ '(^| )([^ /]*\.(:| |$)|[^ /]*:0[0-9]*( |$)|[^ /[]*:[^ ]*:|/[^ ]*(//|/\./|/\.\./))'),
    -- As in the file: mode, ca_pem (a file's path would mean another file to each reader), server_name,
    -- channel_binding.
    tls jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(tls) = 'object' AND NOT tls ? 'ca'),
    -- What its databases may ask for besides SCRAM.
    auth text[] NOT NULL DEFAULT '{}' CHECK (auth <@ ARRAY['scram-sha-256', 'md5', 'password']),
    server_version integer CHECK (server_version > 0),
    -- Not kept to by proxies yet.
    max_sessions integer CHECK (max_sessions IS NULL),
    revision bigint NOT NULL DEFAULT 0
);

CREATE TABLE pgsilo.tenants (
    id pgsilo.tenant_id PRIMARY KEY,
    -- For people.
    name pgsilo.line,
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended', 'paused', 'deleting')),
    -- When a deletion becomes final; until then it can be undone.
    delete_after timestamptz CHECK ((delete_after IS NULL) = (state <> 'deleting')),
    -- What its applications call its database, besides its id and its database's name.
    database_names text[] NOT NULL DEFAULT '{}' CHECK (array_position(database_names, NULL) IS NULL),
    limits jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(limits) = 'object'),
    settings jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(settings) = 'object'),
    -- Where it may live; none said: anywhere.
    regions text[] CHECK (cardinality(regions) > 0 AND array_position(regions, NULL) IS NULL),
    -- The newest of its own and of all that is said of it below.
    revision bigint NOT NULL DEFAULT 0
);
CREATE INDEX tenants_by_revision ON pgsilo.tenants (revision);
CREATE INDEX tenants_by_database_name ON pgsilo.tenants USING gin (database_names) WITH (fastupdate = off);

-- Coordinates, never a credential.
CREATE TABLE pgsilo.placements (
    tenant pgsilo.tenant_id PRIMARY KEY REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE,
    cluster pgsilo.label NOT NULL REFERENCES pgsilo.clusters ON UPDATE CASCADE DEFERRABLE,
    dbname text NOT NULL CHECK (dbname <> ''),
    -- What the database says of itself, which no other tenant's says. A random value tells a neighbour
    -- that can read it nothing.
    seal pgsilo.line NOT NULL UNIQUE DEFERRABLE,
    mount text NOT NULL,
    -- By access: {"read-write": "..."}.
    roles jsonb NOT NULL CHECK (jsonb_typeof(roles) = 'object' AND roles <> '{}'),
    -- Two tenants may change places.
    UNIQUE (cluster, dbname) DEFERRABLE
);

-- Whose each server is, and each of OpenBAO's roles: two who had one would have one another's databases.
-- Kept by triggers.
CREATE TABLE pgsilo.servers (
    server text PRIMARY KEY DEFERRABLE,
    cluster text NOT NULL
);
CREATE INDEX servers_by_cluster ON pgsilo.servers (cluster);
CREATE TABLE pgsilo.roles (
    mount text NOT NULL,
    -- In small letters: whether OpenBAO tells them from capitals is its business.
    role text NOT NULL,
    tenant text NOT NULL,
    PRIMARY KEY (mount, role) DEFERRABLE
);
CREATE INDEX roles_by_tenant ON pgsilo.roles (tenant);

-- What issuers call tenants instead of their ids.
CREATE TABLE pgsilo.aliases (
    alias pgsilo.line PRIMARY KEY,
    tenant pgsilo.tenant_id NOT NULL REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE INDEX aliases_by_tenant ON pgsilo.aliases (tenant);

-- Which tenant the holder of a certificate is for.
CREATE TABLE pgsilo.bindings (
    certificate pgsilo.line PRIMARY KEY,
    tenant pgsilo.tenant_id NOT NULL REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE,
    access pgsilo.access NOT NULL
);
CREATE INDEX bindings_by_tenant ON pgsilo.bindings (tenant);

-- Who may use a tenant, where its issuer's word alone is not enough.
CREATE TABLE pgsilo.grants (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    issuer pgsilo.line NOT NULL,
    subject pgsilo.line NOT NULL,
    tenant pgsilo.tenant_id NOT NULL REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE,
    access pgsilo.access NOT NULL,
    reason pgsilo.line NOT NULL,
    -- None: until it is withdrawn.
    expires_at timestamptz CHECK (isfinite(expires_at)),
    -- Of one that was asked for: how long it lasts once it is given.
    lasts interval CHECK (lasts > interval '0'),
    break_glass boolean NOT NULL DEFAULT false,
    -- Who asked for it, where it had to be approved, and who gave it: never the same.
    requested_by pgsilo.line,
    granted_by pgsilo.line,
    granted_at timestamptz,
    CHECK ((granted_by IS NULL) = (granted_at IS NULL)),
    CHECK (NOT break_glass OR coalesce(expires_at <= granted_at + interval '4 hours', false)),
    CHECK (requested_by IS NULL OR granted_by IS NULL OR requested_by <> granted_by),
    revision bigint NOT NULL DEFAULT 0
);
CREATE INDEX grants_by_revision ON pgsilo.grants (revision);
CREATE INDEX grants_by_tenant ON pgsilo.grants (tenant);

-- Who is kept out, whatever else is said.
CREATE TABLE pgsilo.locks (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    kind text NOT NULL CHECK (kind IN ('tenant', 'subject', 'issuer', 'token', 'certificate', 'address')),
    target pgsilo.line NOT NULL,
    -- Of a subject or a token: whose. None: of any.
    issuer pgsilo.line CHECK (issuer IS NULL OR kind IN ('subject', 'token')),
    -- What its sessions and logins read.
    message pgsilo.line,
    -- Tokens issued and certificates made after this are not meant. None: all are.
    issued_before timestamptz CHECK (isfinite(issued_before)),
    expires_at timestamptz CHECK (isfinite(expires_at)),
    locked_by pgsilo.line NOT NULL,
    revision bigint NOT NULL DEFAULT 0,
    CHECK (kind <> 'tenant' OR target ~ '^[a-z0-9][a-z0-9_-]{0,48}$'),
    -- As PostgreSQL writes it: what it takes in short, others do not. IPv4 is not written as IPv6.
    CHECK (kind <> 'address' OR (target = (target::cidr)::text AND target !~* '^::ffff:'))
);
CREATE INDEX locks_by_revision ON pgsilo.locks (revision);

-- What tools have made of tenants' databases. No proxy reads it.
CREATE TABLE pgsilo.database_versions (
    tenant pgsilo.tenant_id NOT NULL REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE,
    chain pgsilo.label NOT NULL,
    version pgsilo.line NOT NULL,
    reached_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, chain)
);

CREATE TABLE pgsilo.backups (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant pgsilo.tenant_id NOT NULL REFERENCES pgsilo.tenants ON DELETE CASCADE ON UPDATE CASCADE,
    status text NOT NULL CHECK (status IN ('running', 'done', 'failed', 'verified', 'expired')),
    began_at timestamptz NOT NULL,
    ended_at timestamptz,
    -- Where it is, and what it must be: a manifest's digest.
    location pgsilo.line,
    digest bytea CHECK (length(digest) = 32)
);
CREATE INDEX backups_by_tenant ON pgsilo.backups (tenant, began_at);

-- ---------------------------------------------------------------------------------------------------------
-- The audit: a row for each change, each bound to the one before.

CREATE TABLE pgsilo.audit (
    number bigint PRIMARY KEY,
    revision bigint NOT NULL,
    at timestamptz NOT NULL,
    -- As whom PostgreSQL knows it, and on whose behalf it says that it did it, and why.
    login text NOT NULL,
    actor text,
    reason text,
    relation text NOT NULL,
    key text NOT NULL,
    operation text NOT NULL CHECK (operation IN ('insert', 'update', 'delete')),
    before jsonb,
    after jsonb,
    -- SHA-256 of the one before and of this row's content.
    hash bytea NOT NULL
);
CREATE INDEX audit_by_key ON pgsilo.audit (relation, key, number);

-- What a row's hash covers, behind the hash before it.
CREATE FUNCTION pgsilo.audit_content(entry pgsilo.audit) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_array((entry).number, (entry).revision, extract(epoch FROM (entry).at), (entry).login,
        (entry).actor, (entry).reason, (entry).relation, (entry).key, (entry).operation, (entry).before,
        (entry).after)::text
$$;

CREATE FUNCTION pgsilo.write_audit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    entry pgsilo.audit;
    last pgsilo.audit;
    row_before jsonb;
    row_after jsonb;
BEGIN
    IF TG_OP <> 'INSERT' THEN row_before := to_jsonb(OLD) - 'revision'; END IF;
    IF TG_OP <> 'DELETE' THEN row_after := to_jsonb(NEW) - 'revision'; END IF;
    -- Something that is said of a tenant has changed, and is a row of its own.
    IF row_before::text = row_after::text THEN RETURN NULL; END IF;
    -- Holds the lock, so there is one last row.
    entry.revision := pgsilo.raise_revision();
    SELECT * INTO last FROM pgsilo.audit ORDER BY number DESC LIMIT 1;
    entry.number := coalesce(last.number, 0) + 1;
    entry.at := clock_timestamp();
    entry.login := session_user;
    entry.actor := nullif(current_setting('pgsilo.actor', true), '');
    entry.reason := nullif(current_setting('pgsilo.reason', true), '');
    entry.relation := TG_TABLE_NAME;
    entry.key := coalesce(row_after, row_before) ->> TG_ARGV[0];
    entry.operation := lower(TG_OP);
    entry.before := row_before;
    entry.after := row_after;
    entry.hash := sha256(coalesce(last.hash, '') || convert_to(pgsilo.audit_content(entry), 'UTF8'));
    INSERT INTO pgsilo.audit SELECT entry.*;
    RETURN NULL;
END $$;

CREATE FUNCTION pgsilo.refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the audit is only added to' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON pgsilo.audit
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.refuse_change();

-- ---------------------------------------------------------------------------------------------------------
-- Revisions of rows.

-- Before any row is locked, so that two who write wait for each other here and nowhere else.
CREATE FUNCTION pgsilo.take_turn() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    PERFORM FROM pgsilo.revision FOR NO KEY UPDATE;
    RETURN NULL;
END $$;

-- A row that says what it said keeps its revision, and nothing is told.
CREATE FUNCTION pgsilo.stamp() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW)::text = to_jsonb(OLD)::text THEN RETURN NULL; END IF;
    NEW.revision := pgsilo.raise_revision();
    RETURN NEW;
END $$;

CREATE FUNCTION pgsilo.bury() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    old_key text;
    new_key text;
BEGIN
    IF TG_OP <> 'INSERT' THEN old_key := to_jsonb(OLD) ->> TG_ARGV[0]; END IF;
    IF TG_OP <> 'DELETE' THEN new_key := to_jsonb(NEW) ->> TG_ARGV[0]; END IF;
    IF old_key = new_key THEN RETURN NULL; END IF;
    IF old_key IS NOT NULL THEN
        INSERT INTO pgsilo.tombstones (kind, key, revision)
            VALUES (TG_TABLE_NAME, old_key, pgsilo.raise_revision())
            ON CONFLICT ON CONSTRAINT tombstones_pkey DO UPDATE SET revision = excluded.revision;
    END IF;
    IF new_key IS NOT NULL THEN
        DELETE FROM pgsilo.tombstones WHERE kind = TG_TABLE_NAME AND key = new_key;
    END IF;
    RETURN NULL;
END $$;

-- What is said of a tenant elsewhere makes the tenant another one.
CREATE FUNCTION pgsilo.touch_tenant() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    touched text[];
    now_at bigint;
BEGIN
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW)::text = to_jsonb(OLD)::text THEN RETURN NULL; END IF;
    IF TG_OP <> 'INSERT' THEN touched := touched || (to_jsonb(OLD) ->> 'tenant'); END IF;
    IF TG_OP <> 'DELETE' THEN touched := touched || (to_jsonb(NEW) ->> 'tenant'); END IF;
    now_at := pgsilo.raise_revision();
    UPDATE pgsilo.tenants SET revision = now_at WHERE id = ANY (touched) AND revision < now_at;
    RETURN NULL;
END $$;

CREATE FUNCTION pgsilo.touch_tenants_of_cluster() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    now_at CONSTANT bigint := pgsilo.raise_revision();
BEGIN
    UPDATE pgsilo.tenants SET revision = now_at
        WHERE id IN (SELECT tenant FROM pgsilo.placements WHERE cluster = NEW.name)
          AND revision < now_at;
    RETURN NULL;
END $$;

DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT * FROM (VALUES
        ('clusters', 'name', true, false), ('tenants', 'id', true, false), ('grants', 'id', true, false),
        ('locks', 'id', true, false), ('placements', 'tenant', false, true), ('aliases', 'alias', false, true),
        ('bindings', 'certificate', false, true), ('database_versions', 'tenant', false, false),
        ('backups', 'id', false, false)
    ) AS tables (name, key, has_revision, is_of_tenant) LOOP
        EXECUTE format('CREATE TRIGGER a_turn BEFORE INSERT OR UPDATE OR DELETE ON pgsilo.%I
            FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.take_turn()', one.name);
        IF one.has_revision THEN
            EXECUTE format('CREATE TRIGGER a_stamp BEFORE INSERT OR UPDATE ON pgsilo.%I
                FOR EACH ROW EXECUTE FUNCTION pgsilo.stamp()', one.name);
            EXECUTE format('CREATE TRIGGER b_bury AFTER INSERT OR DELETE OR UPDATE OF %I ON pgsilo.%I
                FOR EACH ROW EXECUTE FUNCTION pgsilo.bury(%L)', one.key, one.name, one.key);
        END IF;
        IF one.is_of_tenant THEN
            EXECUTE format('CREATE TRIGGER b_touch AFTER INSERT OR UPDATE OR DELETE ON pgsilo.%I
                FOR EACH ROW EXECUTE FUNCTION pgsilo.touch_tenant()', one.name);
        END IF;
        EXECUTE format('CREATE TRIGGER c_audit AFTER INSERT OR UPDATE OR DELETE ON pgsilo.%I
            FOR EACH ROW EXECUTE FUNCTION pgsilo.write_audit(%L)', one.name, one.key);
        -- It would pass the triggers by.
        EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON pgsilo.%I
            FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.refuse_change()', one.name);
    END LOOP;
END $$;
CREATE TRIGGER b_touch AFTER INSERT OR UPDATE ON pgsilo.clusters
    FOR EACH ROW EXECUTE FUNCTION pgsilo.touch_tenants_of_cluster();

-- ---------------------------------------------------------------------------------------------------------
-- No two are taken for each other. Who writes has the turn, so what is looked up here stays so.

-- A word in a token means one tenant, and the id of one means that one, whatever becomes of its entry: so
-- no alias, seal or further name of another's database is a tenant's id.
CREATE FUNCTION pgsilo.check_words() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    word text;
    other text;
BEGIN
    CASE TG_TABLE_NAME
        WHEN 'tenants' THEN
            SELECT id, name INTO word, other FROM (
                SELECT NEW.id, 'alias of ' || tenant AS name FROM pgsilo.aliases WHERE alias = NEW.id
                UNION ALL SELECT NEW.id, 'seal of ' || tenant FROM pgsilo.placements
                    WHERE seal = NEW.id AND tenant <> NEW.id
                UNION ALL SELECT NEW.id, 'database name of ' || id FROM pgsilo.tenants
                    WHERE database_names @> ARRAY[NEW.id::text] AND id <> NEW.id
                UNION ALL SELECT id, 'id of a tenant' FROM pgsilo.tenants
                    WHERE id = ANY (NEW.database_names) AND id <> NEW.id
            ) AS taken LIMIT 1;
        WHEN 'aliases' THEN
            SELECT id, 'id of a tenant' INTO word, other FROM pgsilo.tenants WHERE id = NEW.alias;
        ELSE
            SELECT id, 'id of a tenant' INTO word, other FROM pgsilo.tenants
                WHERE id = NEW.seal AND id <> NEW.tenant;
    END CASE;
    IF word IS NOT NULL THEN
        RAISE EXCEPTION '% is the %', quote_literal(word), other USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER words AFTER INSERT OR UPDATE OF id, database_names ON pgsilo.tenants
    DEFERRABLE FOR EACH ROW EXECUTE FUNCTION pgsilo.check_words();
CREATE CONSTRAINT TRIGGER words AFTER INSERT OR UPDATE OF alias ON pgsilo.aliases
    DEFERRABLE FOR EACH ROW EXECUTE FUNCTION pgsilo.check_words();
CREATE CONSTRAINT TRIGGER words AFTER INSERT OR UPDATE OF seal, tenant ON pgsilo.placements
    DEFERRABLE FOR EACH ROW EXECUTE FUNCTION pgsilo.check_words();

CREATE FUNCTION pgsilo.keep_servers() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN DELETE FROM pgsilo.servers WHERE cluster = OLD.name; END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO pgsilo.servers
            SELECT CASE WHEN server ~ '^/' THEN server ELSE lower(server) END
                || CASE WHEN server ~ '^/|:[0-9]+$' THEN '' ELSE ':5432' END, NEW.name
            FROM unnest(NEW.endpoints) AS server;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER b_servers AFTER INSERT OR DELETE OR UPDATE OF name, endpoints ON pgsilo.clusters
    FOR EACH ROW EXECUTE FUNCTION pgsilo.keep_servers();

CREATE FUNCTION pgsilo.keep_roles() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN DELETE FROM pgsilo.roles WHERE tenant = OLD.tenant; END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO pgsilo.roles
            SELECT DISTINCT NEW.mount, lower(role), NEW.tenant FROM jsonb_each_text(NEW.roles) AS each(access, role);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER b_roles AFTER INSERT OR DELETE OR UPDATE OF tenant, mount, roles ON pgsilo.placements
    FOR EACH ROW EXECUTE FUNCTION pgsilo.keep_roles();

-- ---------------------------------------------------------------------------------------------------------
-- A placement is where its tenant may live.

CREATE VIEW pgsilo.misplaced AS
    SELECT t.id::text AS tenant, t.regions, c.name::text AS cluster, c.region::text AS region
    FROM pgsilo.tenants t JOIN pgsilo.placements p ON p.tenant = t.id
        JOIN pgsilo.clusters c ON c.name = p.cluster
    WHERE t.regions IS NOT NULL AND (c.region IS NULL OR c.region <> ALL (t.regions));

CREATE FUNCTION pgsilo.check_residency() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    wrong pgsilo.misplaced;
BEGIN
    CASE TG_TABLE_NAME
        WHEN 'tenants' THEN SELECT * INTO wrong FROM pgsilo.misplaced WHERE tenant = to_jsonb(NEW) ->> 'id';
        WHEN 'placements' THEN SELECT * INTO wrong FROM pgsilo.misplaced WHERE tenant = to_jsonb(NEW) ->> 'tenant';
        ELSE SELECT * INTO wrong FROM pgsilo.misplaced WHERE cluster = to_jsonb(NEW) ->> 'name' LIMIT 1;
    END CASE;
    IF wrong.tenant IS NOT NULL THEN
        RAISE EXCEPTION 'tenant % may live in % only, and cluster % is in %', wrong.tenant,
            array_to_string(wrong.regions, ', '), wrong.cluster, coalesce(wrong.region, 'no region')
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER residency AFTER INSERT OR UPDATE OF id, regions ON pgsilo.tenants
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pgsilo.check_residency();
CREATE CONSTRAINT TRIGGER residency AFTER INSERT OR UPDATE OF tenant, cluster ON pgsilo.placements
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pgsilo.check_residency();
CREATE CONSTRAINT TRIGGER residency AFTER INSERT OR UPDATE OF name, region ON pgsilo.clusters
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pgsilo.check_residency();

-- ---------------------------------------------------------------------------------------------------------
-- What proxies read.

CREATE VIEW pgsilo.proxy_revision AS
    SELECT revision, forgotten, raised_at, mark::text AS mark
    FROM pgsilo.revision JOIN pgsilo.history USING (revision);

CREATE VIEW pgsilo.proxy_history AS
    SELECT revision, mark::text AS mark FROM pgsilo.history;

CREATE VIEW pgsilo.proxy_clusters AS
    SELECT name::text AS name, revision,
        jsonb_strip_nulls(jsonb_build_object('name', name, 'endpoints', endpoints, 'region', region,
            'tls', nullif(tls, '{}'), 'auth', auth, 'max_sessions', max_sessions)) AS entry
    FROM pgsilo.clusters;

-- A tenant as the file has it, and the certificates that are bound to it. One without a placement is not
-- there yet.
CREATE VIEW pgsilo.proxy_tenants AS
    SELECT t.id::text AS id, t.revision,
        jsonb_strip_nulls(jsonb_build_object(
            'id', t.id,
            'state', t.state,
            'aliases', (SELECT jsonb_agg(a.alias ORDER BY a.alias) FROM pgsilo.aliases a WHERE a.tenant = t.id),
            'database_names', t.database_names,
            'regions', t.regions,
            'limits', t.limits,
            'placement', jsonb_build_object('cluster', p.cluster, 'dbname', p.dbname, 'seal', p.seal),
            'lease', jsonb_build_object('mount', p.mount, 'roles', p.roles)
        )) AS entry,
        (SELECT coalesce(jsonb_agg(jsonb_build_object('certificate', b.certificate, 'tenant', b.tenant, 'access', b.access)
                ORDER BY b.certificate), '[]') FROM pgsilo.bindings b WHERE b.tenant = t.id) AS bindings
    FROM pgsilo.tenants t JOIN pgsilo.placements p ON p.tenant = t.id;

-- Of those who were given one, not of those who ask.
CREATE VIEW pgsilo.proxy_grants AS
    SELECT id::text AS id, revision, issuer::text AS issuer, subject::text AS subject, tenant::text AS tenant,
        access::text AS access, expires_at, break_glass
    FROM pgsilo.grants WHERE granted_by IS NOT NULL;

CREATE VIEW pgsilo.proxy_locks AS
    SELECT id::text AS id, revision, kind, target::text AS target, issuer::text AS issuer, message::text AS message,
        issued_before, expires_at
    FROM pgsilo.locks;

-- And what is not to be seen any more: a tenant without a placement, a grant that nobody has given.
CREATE VIEW pgsilo.proxy_tombstones AS
    SELECT kind, key, revision FROM pgsilo.tombstones
    UNION ALL SELECT 'tenants', id, revision FROM pgsilo.tenants t
        WHERE NOT EXISTS (SELECT FROM pgsilo.placements p WHERE p.tenant = t.id)
    UNION ALL SELECT 'grants', id::text, revision FROM pgsilo.grants WHERE granted_by IS NULL;

-- What a proxy must have if it has missed nothing: how many rows, and a sum over their keys and revisions.
CREATE VIEW pgsilo.proxy_digest AS
    SELECT kind, count(*) AS rows,
        coalesce(sum(('x' || encode(substr(sha256(convert_to(key || ' ' || revision, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint), 0)
            AS digest
    FROM (SELECT 'tenants' AS kind, id AS key, revision FROM pgsilo.proxy_tenants
        UNION ALL SELECT 'clusters', name, revision FROM pgsilo.proxy_clusters
        UNION ALL SELECT 'grants', id, revision FROM pgsilo.proxy_grants
        UNION ALL SELECT 'locks', id, revision FROM pgsilo.proxy_locks) AS all_rows
    GROUP BY kind;
