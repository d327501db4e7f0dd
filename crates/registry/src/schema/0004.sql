-- What takes several steps outside the registry: tenants' databases that are made and unmade. No proxy reads any of it.

-- How OpenBAO reaches a cluster's servers, where that is not by its endpoints: a container's network, a socket.
ALTER TABLE pgsilo.clusters ADD COLUMN openbao_endpoints text[]
    CHECK (cardinality(openbao_endpoints) BETWEEN 1 AND 16 AND array_position(openbao_endpoints, NULL) IS NULL);

-- Which servers these are, whatever they are called: two clusters are never the same ones.
ALTER TABLE pgsilo.clusters ADD COLUMN system_identifier text UNIQUE CHECK (system_identifier <> '');

-- What the names of locks are made with: whoever sees a lock learns nothing of whose it is.
CREATE TABLE pgsilo.lock_key (
    is_only_row boolean PRIMARY KEY DEFAULT true CHECK (is_only_row),
    key uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO pgsilo.lock_key DEFAULT VALUES;

-- A journal. Of what was begun and has not ended, whoever comes next knows how to go on, or to take it back.
CREATE TABLE pgsilo.operations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    kind text NOT NULL CHECK (kind IN ('create', 'prepare', 'delete')),
    -- The tenant; of a database that is prepared and nobody's yet, its name.
    subject pgsilo.tenant_id NOT NULL,
    -- All that was settled when it began: names, the seal, where. Never a credential.
    plan jsonb NOT NULL CHECK (jsonb_typeof(plan) = 'object'),
    undoing boolean NOT NULL DEFAULT false,
    -- Of a removal: what each step has removed, and how that was checked.
    evidence jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(evidence) = 'object'),
    -- The last step that was done, or undone, and why the next was not.
    step text,
    failure text,
    began_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    outcome text CHECK (outcome IN ('done', 'undone')),
    CHECK ((ended_at IS NULL) = (outcome IS NULL))
);
CREATE UNIQUE INDEX one_operation_at_a_time ON pgsilo.operations (subject) WHERE ended_at IS NULL;
-- Two that are made never have one name there.
CREATE UNIQUE INDEX one_of_a_name ON pgsilo.operations ((plan ->> 'cluster'), (plan ->> 'name'))
    WHERE ended_at IS NULL AND kind IN ('create', 'prepare');
CREATE INDEX operations_by_subject ON pgsilo.operations (subject, began_at);

-- Databases that are made, closed and nobody's: a tenant that comes gets one.
CREATE TABLE pgsilo.prepared (
    name pgsilo.tenant_id PRIMARY KEY,
    cluster pgsilo.label NOT NULL REFERENCES pgsilo.clusters ON UPDATE CASCADE,
    -- What it was made of.
    template text NOT NULL CHECK (template <> ''),
    prepared_at timestamptz NOT NULL DEFAULT now()
);

-- What is being removed is not served again meanwhile, nor forgotten before that has ended.
CREATE FUNCTION pgsilo.check_removal() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    tenant CONSTANT text := to_jsonb(OLD) ->> TG_ARGV[0];
BEGIN
    IF EXISTS (SELECT FROM pgsilo.operations WHERE subject = tenant AND kind = 'delete' AND ended_at IS NULL) THEN
        RAISE EXCEPTION 'the removal of % has begun: pgsiloctl tenant purge goes on with it', tenant
            USING ERRCODE = 'object_in_use';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE TRIGGER a_removal BEFORE DELETE OR UPDATE OF id, state, delete_after ON pgsilo.tenants
    FOR EACH ROW EXECUTE FUNCTION pgsilo.check_removal('id');
CREATE TRIGGER a_removal BEFORE DELETE OR UPDATE ON pgsilo.placements
    FOR EACH ROW EXECUTE FUNCTION pgsilo.check_removal('tenant');

-- Its beginning and its end are told, not each step.
CREATE TRIGGER a_turn BEFORE INSERT OR UPDATE OF outcome ON pgsilo.operations
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.take_turn();
CREATE TRIGGER c_audit AFTER INSERT OR UPDATE OF outcome ON pgsilo.operations
    FOR EACH ROW EXECUTE FUNCTION pgsilo.write_audit('subject');
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON pgsilo.operations
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.refuse_change();

-- What was removed, for good; whoever it was about may ask for it later.
CREATE TABLE pgsilo.certificates (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant pgsilo.tenant_id NOT NULL,
    issued_at timestamptz NOT NULL DEFAULT now(),
    -- As it was signed, to the byte.
    document text NOT NULL CHECK (document <> ''),
    signature text NOT NULL CHECK (signature <> '')
);
CREATE INDEX certificates_by_tenant ON pgsilo.certificates (tenant, issued_at);
CREATE TRIGGER a_turn BEFORE INSERT ON pgsilo.certificates
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.take_turn();
CREATE TRIGGER c_audit AFTER INSERT ON pgsilo.certificates
    FOR EACH ROW EXECUTE FUNCTION pgsilo.write_audit('tenant');
CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON pgsilo.certificates
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.refuse_change();
