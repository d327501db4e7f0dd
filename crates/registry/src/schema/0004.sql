-- What takes several steps outside the registry: tenants' databases that are made and unmade. No proxy reads any of it.

-- How OpenBAO reaches a cluster's servers, where that is not by its endpoints: a container's network, a socket.
ALTER TABLE pgsilo.clusters ADD COLUMN openbao_endpoints text[]
    CHECK (cardinality(openbao_endpoints) BETWEEN 1 AND 16 AND array_position(openbao_endpoints, NULL) IS NULL);

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
CREATE INDEX operations_by_subject ON pgsilo.operations (subject, began_at);

-- Databases that are made, closed and nobody's: a tenant that comes gets one.
CREATE TABLE pgsilo.prepared (
    name pgsilo.tenant_id PRIMARY KEY,
    cluster pgsilo.label NOT NULL REFERENCES pgsilo.clusters ON UPDATE CASCADE,
    -- What it was made of.
    template text NOT NULL CHECK (template <> ''),
    prepared_at timestamptz NOT NULL DEFAULT now()
);

-- Its beginning and its end are told, not each step.
CREATE TRIGGER a_turn BEFORE INSERT OR UPDATE OF outcome OR DELETE ON pgsilo.operations
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.take_turn();
CREATE TRIGGER c_audit AFTER INSERT OR UPDATE OF outcome OR DELETE ON pgsilo.operations
    FOR EACH ROW EXECUTE FUNCTION pgsilo.write_audit('subject');
CREATE TRIGGER no_truncate BEFORE TRUNCATE ON pgsilo.operations
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
CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON pgsilo.certificates
    FOR EACH STATEMENT EXECUTE FUNCTION pgsilo.refuse_change();
