# What the running proxy may do at OpenBAO: lease tenants' credentials, keep those leases and
# its own token alive, give them back. It cannot see or change how credentials are made.
# Attach it with `token_no_default_policy = true`: nothing comes from the default policy.

# A mount for each tenant. `+` is one segment of the path, whatever it is.
path "pgsilo/+/creds/tenant-*" {
  capabilities = ["read"]
}

# The registry, where it is a database ([registry.postgres]).
path "pgsilo-registry/creds/proxy*" {
  capabilities = ["read"]
}

# Who watches the servers of a cluster that has several.
path "pgsilo-monitor/creds/*" {
  capabilities = ["read"]
}

# After a failover: OpenBAO makes its connection to a tenant's database anew. It tells nothing, and
# changes nothing of how credentials are made.
path "pgsilo/+/reset/tenant-*" {
  capabilities = ["update"]
}

path "pgsilo-monitor/reset/*" {
  capabilities = ["update"]
}

# A lease is named in the request's body, and its id ends in random characters: whoever does
# not hold the lease cannot name it.
path "sys/leases/renew" {
  capabilities = ["update"]
}

path "sys/leases/revoke" {
  capabilities = ["update"]
}

# How many leases OpenBAO has given up on: a number, for the metrics.
path "sys/leases/count" {
  capabilities = ["read"]
  allowed_parameters = {
    "type" = ["irrevocable"]
  }
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}

path "auth/token/renew-self" {
  capabilities = ["update"]
}

path "auth/token/revoke-self" {
  capabilities = ["update"]
}
