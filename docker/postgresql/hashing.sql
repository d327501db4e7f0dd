-- Of a tenant whose leased passwords PostgreSQL makes the verifiers of (lease_hashing = "postgres"), run by
-- the provisioner in any database; TENANT stands for what PostgreSQL calls the tenant. One iteration: the
-- passwords are random, so nothing is guessed from a verifier. They stand in the broker's statements then,
-- which the server's log must not have; what it has all the same, docs/tenants.md says.
ALTER ROLE "tenant_TENANT_broker" SET scram_iterations = 1;
ALTER ROLE "tenant_TENANT_broker" SET log_statement = 'none';
ALTER ROLE "tenant_TENANT_broker" SET log_min_error_statement = 'panic';
ALTER ROLE "tenant_TENANT_broker" SET log_min_duration_statement = -1;
ALTER ROLE "tenant_TENANT_broker" SET log_min_duration_sample = -1;
ALTER ROLE "tenant_TENANT_broker" SET log_transaction_sample_rate = 0;
ALTER ROLE "tenant_TENANT_broker" SET log_duration = off;
